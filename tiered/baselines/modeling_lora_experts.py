"""LoRA experts on a frozen language model, routed per token and per module without joint training.

Every linear map of the layers holds the low-rank updates of all experts; which of them a token uses
is decided where it arrives, by one vector per expert and module: PHATGOOSE's learned gates
(arXiv:2402.05859), the mean activation, or Arrow's singular vectors (arXiv:2405.11157); Glider
(arXiv:2410.07172) adds a score of the whole query. Experts are named by indices that never shift.

Shapes: B batch, T tokens, K experts, r rank, I inputs and O outputs of a linear map, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

ROUTINGS = (
    "none",
    "phatgoose",
    "glider",
    "average_activation",
    "arrow",
    "merged",
    "oracle",
    "gate",
)
_VECTOR = {  # the vector that stands for an expert in a module
    **{"phatgoose": "gates", "glider": "gates"},
    **{"average_activation": "averages", "arrow": "directions"},
}

_BASE_FIELDS = (  # what callers of a causal LM look up in its configuration
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("pad_token_id", "eos_token_id", "bos_token_id"),
)


class LoraExpertsConfig(PreTrainedConfig):
    """Configuration: the base model's own, the experts' indices, and how they are routed.

    scale: factor of every update; experts_per_token: 0 means all; a Glider query whose largest
    global score reaches `threshold` counts `alpha_high` times, any other `alpha_low` times.
    """

    model_type = "lora_experts"

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        experts: list[int] | None = None,
        rank: int = 16,
        scale: float = 1 / 16,
        routing: str = "phatgoose",
        experts_per_token: int = 2,
        threshold: float = 0.8,
        alpha_high: float = 100.0,
        alpha_low: float = 3.0,
        **kwargs: Any,
    ) -> None:
        if routing not in ROUTINGS:
            raise ValueError(f"routing: {routing!r} is not one of {', '.join(ROUTINGS)}")
        self.base = base or {}
        self.experts = sorted(experts or [])
        self.rank = rank
        self.scale = scale
        self.routing = routing
        self.experts_per_token = experts_per_token
        self.threshold = threshold
        self.alpha_high = alpha_high
        self.alpha_low = alpha_low
        for name in _BASE_FIELDS:
            if name in self.base:
                kwargs.setdefault(name, self.base[name])
        super().__init__(**kwargs)


@dataclass
class Routing:
    """What all modules of one forward pass share: the rule, and where it needs one the expert
    (B,) of every row (a place among the experts) or the global scores (B, T, K), times alpha."""

    name: str
    top_k: int
    expert: torch.Tensor | None = None
    scores: torch.Tensor | None = None


def glider_scores(
    cosines: torch.Tensor, threshold: float, alpha_high: float, alpha_low: float
) -> torch.Tensor:
    """alpha times the cosine (..., K) of a query with every expert's embedding; alpha is alpha_high
    where the largest cosine reaches the threshold, else alpha_low (Glider, section 4)."""
    high = cosines.amax(-1, keepdim=True) >= threshold
    return torch.where(high, alpha_high, alpha_low) * cosines


def top_weights(affinity: torch.Tensor, top_k: int) -> torch.Tensor:
    """Softmax over the top_k largest affinities (..., K) (0: all), 0 for the others; ties go to the
    lowest index."""
    if top_k and top_k < affinity.shape[-1]:
        order = torch.argsort(affinity, dim=-1, descending=True, stable=True)
        affinity = affinity.scatter(-1, order[..., top_k:], -torch.inf)
    return affinity.softmax(-1)


class RoutedLinear(nn.Module):
    """A frozen linear map and the updates of all experts: W u + scale sum_k w_k B_k A_k u.

    a (K, r, I), b (O, K, r); gates, averages, directions (K, I). All experts' low-rank products are
    two matrix products, weighted in between: no loop over tokens or experts.
    """

    def __init__(self, linear: nn.Linear, experts: int, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        outputs, inputs = linear.weight.shape
        self.scale = scale
        self.a = nn.Parameter(torch.zeros(experts, rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, experts, rank))
        for name in ("gates", "averages", "directions"):
            setattr(self, name, nn.Parameter(torch.zeros(experts, inputs)))
        self.routing: Routing | None = None

    def affinities(self, u: torch.Tensor, name: str) -> torch.Tensor:
        """Affinity (B, T, K) of every token u (B, T, I) with every expert."""
        vectors = getattr(self, _VECTOR[name])
        if name == "arrow":
            return (u @ vectors.T).abs()
        size = (u.shape[-1],)
        # both without an affine map: PHATGOOSE, eq. 4
        return F.layer_norm(u, size) @ F.layer_norm(vectors, size).T / size[0] ** 0.5

    def weights(self, u: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Weights (B, T, K) of the experts for tokens u (B, T, I)."""
        count = len(self.a)
        if routing.name == "merged":
            return u.new_full((count,), 1 / count).expand(*u.shape[:-1], count)
        if routing.name == "oracle":
            chosen = F.one_hot(routing.expert, count).to(u.dtype)
            return chosen[:, None].expand(*u.shape[:-1], count)
        if routing.name == "gate":  # how a gate is trained: the expert alone, let through in part
            return torch.sigmoid(u @ self.gates.T)
        affinity = self.affinities(u, routing.name)
        if routing.name == "glider":
            affinity = affinity + routing.scores
        return top_weights(affinity, routing.top_k)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """u (B, T, I) -> (B, T, O)."""
        out = F.linear(u, self.weight, self.bias)
        if self.routing is None or self.routing.name == "none":
            return out
        low = F.linear(u, self.a.flatten(0, 1)).unflatten(-1, self.a.shape[:2])  # (B, T, K, r)
        low = low * self.weights(u, self.routing)[..., None]
        return out + self.scale * F.linear(low.flatten(-2), self.b.flatten(1))


class LoraExpertsForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose linear maps hold LoRA experts.

    `routing`, a name of ROUTINGS, may be given with every call; the config's is used otherwise.
    """

    config: LoraExpertsConfig
    config_class = LoraExpertsConfig
    base_model_prefix = "base"
    _tied_weights_keys: dict[str, str] | None = None

    def __init__(self, config: LoraExpertsConfig) -> None:
        super().__init__(config)
        values = {k: v for k, v in config.base.items() if k != "model_type"}
        own = AutoConfig.for_model(config.base["model_type"], **values)
        if own.tie_word_embeddings:
            self._tied_weights_keys = {"base.lm_head.weight": "base.model.embed_tokens.weight"}
        self.base = AutoModelForCausalLM.from_config(own)
        for name in linear_names(self.base):
            parent, _, leaf = name.rpartition(".")
            linear = self.base.get_submodule(name)
            routed = RoutedLinear(linear, len(config.experts), config.rank, config.scale)
            setattr(self.base.get_submodule(parent), leaf, routed)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The base initialises itself; experts begin at zero, which changes nothing."""

    @classmethod
    def from_base(cls, base: PreTrainedModel, **config: Any) -> "LoraExpertsForCausalLM":
        """Around a trained model (its tensors, not copies), with experts of zeros."""
        made = LoraExpertsConfig(base=base.config.to_dict(), **config)
        model = cls(made)
        state = dict(base.state_dict(keep_vars=True))
        for name, module in model.base.named_modules():
            for leaf, _ in list(module.named_parameters(recurse=False)):
                full = f"{name}.{leaf}" if name else leaf
                if full in state:
                    setattr(module, leaf, state[full])
        model.base.config._attn_implementation = base.config._attn_implementation
        return model.eval()

    @property
    def experts(self) -> list[int]:
        """Indices of the experts that there are."""
        return list(self.config.experts)

    def routed(self) -> dict[str, RoutedLinear]:
        """Every linear map that holds experts, by the name it has in the base model."""
        return {n: m for n, m in self.base.named_modules() if isinstance(m, RoutedLinear)}

    def get_input_embeddings(self) -> nn.Module:
        """The base model's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The base model's."""
        return self.base.get_output_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        routing: str | None = None,
        expert: torch.Tensor | None = None,
        cosines: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits (B, T, V); loss in nats if labelled.

        expert (B,): the expert of each row, by its index, for routing `oracle`. cosines (B, T, K):
        of the query that each token belongs to with every expert's embedding, in the order of
        `experts`, for `glider`; they may depend on earlier tokens alone.
        """
        name = routing or self.config.routing
        if name not in ROUTINGS:
            raise ValueError(f"routing: {name!r} is not one of {', '.join(ROUTINGS)}")
        given = {"oracle": expert, "glider": cosines}
        if name in given and given[name] is None:
            raise ValueError(f"routing {name}: needs {'expert' if expert is None else 'cosines'}")
        shared = Routing(name if self.experts else "none", self.config.experts_per_token)
        if name == "oracle":
            shared.expert = torch.tensor(
                [self._place(k) for k in expert.tolist()], device=expert.device
            )
        if name == "glider":
            shared.scores = glider_scores(
                cosines, self.config.threshold, self.config.alpha_high, self.config.alpha_low
            )
        for module in self.routed().values():
            module.routing = shared
        return self.base(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs
        )

    def _place(self, k: int) -> int:
        if k not in self.config.experts:
            raise ValueError(f"expert {k} is not there (present: {self.experts})")
        return self.config.experts.index(k)

    # --- experts come and go -------------------------------------------------------------------

    @torch.no_grad()
    def add_expert(self, k: int, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Add expert k: per module a (r, I), b (O, r), and gates and averages (I,) where it has
        them. Nothing of the other experts changes. Directions are found here."""
        if k in self.config.experts:
            raise ValueError(f"expert {k} is already there")
        place = sum(i < k for i in self.config.experts)
        for name, module in self.routed().items():
            own = tensors[name]
            inputs = module.weight.new_zeros(module.weight.shape[1])
            values = {
                "a": own["a"],
                "gates": own.get("gates", inputs),
                "averages": own.get("averages", inputs),
                "directions": right_singular_vector(own["a"], own["b"]),
            }
            for leaf, value in values.items():
                _insert(module, leaf, value, place, 0)
            _insert(module, "b", own["b"], place, 1)
        self.config.experts = sorted([*self.config.experts, k])

    @torch.no_grad()
    def remove_expert(self, k: int) -> None:
        """Delete an expert from every module; removing it again is a no-op. With the last one gone
        the model is its base."""
        if k not in self.config.experts:
            return
        place = self._place(k)
        for module in self.routed().values():
            for leaf in ("a", "gates", "averages", "directions", "b"):
                value, axis = getattr(module, leaf), int(leaf == "b")
                rest = [i for i in range(value.shape[axis]) if i != place]
                setattr(module, leaf, nn.Parameter(value.index_select(axis, _index(rest, value))))
        self.config.experts = [i for i in self.config.experts if i != k]


def linear_names(base: nn.Module) -> list[str]:
    """Names of all linear maps of the layers: everything but the output head."""
    head = base.get_output_embeddings()
    return [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head]


def right_singular_vector(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The first right singular vector (I,) of B A, of a (r, I) and b (O, r): Arrow's prototype.

    Found in the r-dimensional row space of A; zeros where the product is zero.
    """
    q, triangle = torch.linalg.qr(a.T.double())  # A = triangle^T q^T
    small = b.double() @ triangle.T
    if not small.any():
        return torch.zeros_like(a[0])
    _, _, right = torch.linalg.svd(small, full_matrices=False)
    return (q @ right[0]).to(a.dtype)


def _insert(module: RoutedLinear, leaf: str, value: torch.Tensor, place: int, axis: int) -> None:
    old = getattr(module, leaf)
    parts = old.split([place, old.shape[axis] - place], axis)
    new = torch.cat([parts[0], value.to(old).unsqueeze(axis), parts[1]], axis)
    setattr(module, leaf, nn.Parameter(new))


def _index(places: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(places, dtype=torch.long, device=like.device)


AutoConfig.register(LoraExpertsConfig.model_type, LoraExpertsConfig, exist_ok=True)
AutoModelForCausalLM.register(LoraExpertsConfig, LoraExpertsForCausalLM, exist_ok=True)
# save_pretrained copies this file beside the weights, so that a checkpoint loads anywhere.
LoraExpertsConfig.register_for_auto_class()
LoraExpertsForCausalLM.register_for_auto_class("AutoModelForCausalLM")
