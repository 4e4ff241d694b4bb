"""DEMix layers (arXiv:2108.05036): a Llama whose feed-forward blocks are experts, one per domain.

Attention, embeddings and norms are shared by all domains. A sequence uses one expert in every
layer: in training its own domain's, afterwards any, and what the experts predict is mixed. Experts
are named by indices that never shift: removing one or adding one leaves the others where they are.

Shapes: B batch, T tokens, D hidden size, K experts, V vocabulary.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel


@strict
class DemixConfig(LlamaConfig):
    """Configuration of a DEMix Llama; domain_experts: indices of the experts that there are."""

    model_type = "demix"
    domain_experts: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.domain_experts = sorted(self.domain_experts or [0])
        super().__post_init__(**kwargs)


@dataclass(frozen=True)
class Dispatch:
    """Rows of a batch by expert: in `order` (None: as they stand) they lie one expert after
    another, `sizes` rows each."""

    experts: tuple[int, ...]
    sizes: tuple[int, ...]
    order: torch.Tensor | None

    @classmethod
    def of(cls, experts: torch.Tensor) -> "Dispatch":
        """Of the expert (B,) of every row."""
        names, counts = experts.unique(return_counts=True)
        ordered = bool((experts[1:] >= experts[:-1]).all())
        order = None if ordered else experts.argsort(stable=True)
        return cls(tuple(names.tolist()), tuple(counts.tolist()), order)


class DomainExperts(nn.Module):
    """One feed-forward block per domain; every row of a batch is read by one of them."""

    def __init__(self, config: DemixConfig) -> None:
        super().__init__()
        names = config.domain_experts
        self.experts = nn.ModuleDict({str(k): LlamaMLP(config) for k in names})

    def forward(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """x (B, T, D) -> (B, T, D), row by row through the dispatched expert."""
        blocks = [self.experts[str(k)] for k in dispatch.experts]
        if len(blocks) == 1:
            return blocks[0](x)
        if dispatch.order is not None:
            x = x[dispatch.order]
        parts = x.split(dispatch.sizes)
        found = torch.cat([block(part) for block, part in zip(blocks, parts, strict=True)])
        return found if dispatch.order is None else found[dispatch.order.argsort()]


class DemixDecoderLayer(LlamaDecoderLayer):
    """A Llama layer with a feed-forward expert per domain."""

    def __init__(self, config: DemixConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = DomainExperts(config)

    def forward(
        self, hidden_states: torch.Tensor, *, dispatch: Dispatch, **kwargs: Any
    ) -> torch.Tensor:
        """hidden_states (B, T, D) -> (B, T, D)."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=normed, **kwargs)[0]
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.mlp(normed, dispatch)


class DemixModel(LlamaModel):
    """The stack of layers; `dispatch` reaches every one of them."""

    config_class = DemixConfig

    def __init__(self, config: DemixConfig) -> None:
        super().__init__(config)
        depth = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([DemixDecoderLayer(config, i) for i in depth])
        self.post_init()


class DemixForCausalLM(LlamaForCausalLM):
    """DEMix language model.

    Every row is read by the expert that `domain_ids` names, or by all of them, mixed by
    `domain_weights`; without either by all of them equally.
    """

    config_class = DemixConfig
    config: DemixConfig

    def __init__(self, config: DemixConfig) -> None:
        super().__init__(config)
        self.model = DemixModel(config)
        self.post_init()

    @property
    def domain_experts(self) -> list[int]:
        """Indices of the experts that there are."""
        return list(self.config.domain_experts)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        domain_ids: torch.Tensor | None = None,
        domain_weights: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits (B, T, V); loss in nats if labelled.

        domain_ids (B,): the expert of each row. domain_weights (B, K) or (K,): of the experts in
        the order of `domain_experts`; logits are then log sum_k w_k p_k (DEMix, eq. 3).
        """
        if domain_ids is None and len(self.domain_experts) == 1:
            domain_ids = input_ids.new_full((len(input_ids),), self.domain_experts[0])
        if domain_ids is not None:
            self._check_present(domain_ids)
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                dispatch=Dispatch.of(domain_ids),
                **kwargs,
            )
        return self._mixed(input_ids, attention_mask, domain_weights, labels, kwargs)

    def _check_present(self, domain_ids: torch.Tensor) -> None:
        missing = sorted(set(domain_ids.tolist()) - set(self.domain_experts))
        if missing:
            raise ValueError(f"expert {missing[0]} is not there (present: {self.domain_experts})")

    def expert_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        experts: Iterable[int] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (K B, T, V) of every expert (None: all), one after another, in one pass."""
        names = self.domain_experts if experts is None else list(experts)
        rows = len(input_ids)
        mask = None if attention_mask is None else attention_mask.repeat(len(names), 1)
        domain_ids = torch.tensor(names, device=input_ids.device).repeat_interleave(rows)
        repeated = input_ids.repeat(len(names), 1)
        return self(repeated, mask, domain_ids=domain_ids, **kwargs)

    def _mixed(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        domain_weights: torch.Tensor | None,
        labels: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        """All experts on all rows in one pass, mixed by probability."""
        rows, names = len(input_ids), self.domain_experts
        if domain_weights is None:
            domain_weights = torch.full((len(names),), 1 / len(names))
        weights = domain_weights.to(self.device, torch.float32).expand(rows, len(names))
        out = self.expert_logits(input_ids, attention_mask, **kwargs)
        log_probs = out.logits.float().log_softmax(-1)
        log_probs = log_probs.view(len(names), rows, *log_probs.shape[1:])  # (K, B, T, V)
        mixed = (weights.T.log()[:, :, None, None] + log_probs).logsumexp(0)
        loss = None
        if labels is not None:
            loss = self.loss_function(mixed, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=mixed, past_key_values=out.past_key_values)

    # --- experts come and go ----------------------------------------------------------------

    def add_expert(self, source: int) -> int:
        """A copy of expert `source` under the next free index, which is returned; nothing that
        another expert computes changes (domain-adaptive pretraining trains it alone)."""
        self._check_present(torch.tensor([source]))
        k = max(self.domain_experts) + 1
        for layer in self.model.layers:
            experts = layer.mlp.experts
            experts[str(k)] = copy.deepcopy(experts[str(source)])
        self.config.domain_experts = [*self.domain_experts, k]
        return k

    def remove_part(self, k: int) -> None:
        """Delete an expert from every layer; removing it again is a no-op. ValueError for the last.

        The shared parameters have seen its domain all the same.
        """
        if k not in self.domain_experts:
            return
        if len(self.domain_experts) == 1:
            raise ValueError("removing the last expert would leave no model")
        for layer in self.model.layers:
            del layer.mlp.experts[str(k)]
        self.config.domain_experts = [i for i in self.domain_experts if i != k]

    def part_parameters(self, k: int) -> Iterator[nn.Parameter]:
        """Parameters of one expert in all layers."""
        for layer in self.model.layers:
            yield from layer.mlp.experts[str(k)].parameters()

    def part(self, k: int) -> LlamaForCausalLM:
        """The Llama that expert k makes with the shared parameters: the same tensors, no copies."""
        self._check_present(torch.tensor([k]))
        values = {n: v for n, v in self.config.to_dict().items() if n not in _OWN}
        config = LlamaConfig(**values)
        config._attn_implementation = self.config._attn_implementation
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        shared = ("embed_tokens", "norm", "rotary_emb")
        for name in shared:
            setattr(model.model, name, getattr(self.model, name))
        for own, layer in zip(model.model.layers, self.model.layers, strict=True):
            for name in ("self_attn", "input_layernorm", "post_attention_layernorm"):
                setattr(own, name, getattr(layer, name))
            own.mlp = layer.mlp.experts[str(k)]
        model.lm_head = self.lm_head
        return model.train(self.training)


_OWN = ("domain_experts", "model_type", "architectures", "auto_map", "transformers_version")

AutoConfig.register(DemixConfig.model_type, DemixConfig, exist_ok=True)
AutoModelForCausalLM.register(DemixConfig, DemixForCausalLM, exist_ok=True)
# save_pretrained copies this file beside the weights, so that a checkpoint loads anywhere.
DemixConfig.register_for_auto_class()
DemixForCausalLM.register_for_auto_class("AutoModelForCausalLM")
