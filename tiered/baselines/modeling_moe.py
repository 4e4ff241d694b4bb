"""Mixtures of feed-forward experts whose routing can be read: OLMoE (arXiv:2409.02060), variants.

One field of the configuration each: experts that are always on, leading dense layers, balancing by
loss or without one, a routing stream with one gate for all layers, a bank of experts that several
layers share, experts on the edges of a tree. With none of them it is transformers'
OlmoeForCausalLM, weight by weight.

Shapes: B batch, T tokens, N = B T, D hidden_size, E experts of a layer, k num_experts_per_tok,
U units that a token chooses k of (the experts, or a tree's leaves), S slots of a token (k, or k per
level of a tree), I expert width, Z routing_stream_size, b tree_branching, L tree_depth, V words.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, OlmoeConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeAttention,
    OlmoeRMSNorm,
    OlmoeRotaryEmbedding,
)
from transformers.utils import can_return_tuple


@strict
class MoeConfig(OlmoeConfig):
    """Configuration: OLMoE's (intermediate_size is the width I of one expert), and the variants.

    num_shared_experts: experts of width I that every token uses, ungated (DeepSeekMoE,
    arXiv:2401.06066). num_dense_layers: the first layers have one feed-forward block of
    dense_intermediate_size (0: all experts' that a token uses together). router_z_loss_coef
    (arXiv:2202.08906) and router_aux_loss_coef weigh losses, in training only.
    router_aux_loss_per_layer: balance every layer (arXiv:2101.03961), not the sum of all layers
    as transformers does. balance_update_rate: loss-free balancing (arXiv:2408.15664), 0 for none.
    freeze_router keeps the gates at their random start (an ablation).

    routing_stream_size: Z > 0 routes every layer by a stream of its own, with one gate for all
    layers and a small offset per layer, weighed by routing_offset_coef. expert_bank_layers:
    consecutive layers that use one bank of experts. tree_depth: L > 0 puts the experts on the edges
    of a tree with tree_branching branches per node, those of depth l of width I / b^l, and a token
    chooses k leaves, whose weights always sum to 1; num_experts then counts the edges.
    expert_masks: some experts are purged (see `purge_experts`); renormalize_masked: other experts
    are chosen in their place.
    """

    model_type = "tiered_moe"

    num_shared_experts: int = 0
    num_dense_layers: int = 0
    dense_intermediate_size: int = 0
    router_z_loss_coef: float | int = 0.001
    router_aux_loss_per_layer: bool = False
    balance_update_rate: float | int = 0.0
    freeze_router: bool = False
    routing_stream_size: int = 0
    routing_offset_coef: float | int = 0.1
    expert_bank_layers: int = 1
    tree_branching: int = 2
    tree_depth: int = 0
    expert_masks: bool = False
    renormalize_masked: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.tree_depth > 0 and self.tree_branching > 1:  # else the check says so
            self.num_experts = sum(self.tree_branching**d for d in self.tree_levels)
        super().__post_init__(**kwargs)
        self._check()

    @property
    def tree_levels(self) -> range:
        """Depths of a tree's edges, 1 .. L; none where the experts are not on one."""
        return range(1, self.tree_depth + 1)

    @property
    def units(self) -> int:
        """U: what a token chooses k of, the experts or the leaves of their tree."""
        return self.tree_branching**self.tree_depth if self.tree_depth else self.num_experts

    @property
    def num_moe_layers(self) -> int:
        """Layers that have experts."""
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def slot_widths(self) -> list[int]:
        """Widths of the experts that a token uses at most, one after another."""
        k, b, width = self.num_experts_per_tok, self.tree_branching, self.intermediate_size
        if not self.tree_depth:
            return [width] * k
        return [width // b**depth for depth in self.tree_levels for _ in range(min(k, b**depth))]

    def _width_of(self, layers: int) -> int:
        """Width of the experts that a token uses at most in so many layers of one bank."""
        k, b, width = self.num_experts_per_tok, self.tree_branching, self.intermediate_size
        if not self.tree_depth:
            return width * min(self.num_experts, layers * k)
        levels = ((b**depth, width // b**depth) for depth in self.tree_levels)
        return sum(own * min(edges, layers * min(k, edges)) for edges, own in levels)

    @property
    def _banks(self) -> range:
        """Layers that hold experts, those without any not counted."""
        return range(0, self.num_moe_layers, self.expert_bank_layers)

    @property
    def dense_width(self) -> int:
        """Width of the leading layers' feed-forward block."""
        used = sum(self.slot_widths) + self.num_shared_experts * self.intermediate_size
        return self.dense_intermediate_size or used

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part. `active` (published for OLMoE-1B-7B: 1.3 of 6.9 billion) leaves out
        the experts that a token does not use; computed_per_token also the input embedding, of
        which it reads one row, and has those of a bank as often as layers use them."""
        d, layers, moe = self.hidden_size, self.num_hidden_layers, self.num_moe_layers
        kv_width = d // self.num_attention_heads * self.num_key_value_heads
        bias = 2 * d + 2 * kv_width if self.attention_bias else 0
        attention = layers * (2 * d * d + 2 * d * kv_width + d + kv_width + bias)
        levels = max(1, self.tree_depth)  # all experts of a depth have width I together
        bank = (1 if self.tree_depth else self.num_experts) * self.intermediate_size * levels
        experts = len(self._banks) * 3 * d * bank
        used = moe * 3 * d * sum(self.slot_widths)
        active = (
            3 * d * sum(self._width_of(min(self.expert_bank_layers, moe - i)) for i in self._banks)
        )
        shared = moe * 3 * d * self.num_shared_experts * self.intermediate_size
        dense = self.num_dense_layers * 3 * d * self.dense_width
        z, inputs = self.routing_stream_size, self.routing_stream_size or d
        routers = moe * self.num_experts * inputs
        if z:
            routers += self.num_experts * z + moe * (2 * d * z + z)
        norms = (2 * layers + 1) * d
        table, streamed = self.vocab_size * d, self.vocab_size * z
        embedding = table * (1 if self.tie_word_embeddings else 2) + streamed
        rest = attention + shared + dense + routers + norms
        total = embedding + rest + experts
        read = streamed + (0 if self.tie_word_embeddings else table)
        return {
            "total": total,
            "active": embedding + rest + active,
            "embedding": embedding,
            "non_embedding": total - embedding,
            "attention": attention,
            "experts": experts,
            "routers": routers,
            "computed_per_token": embedding - read + rest + used,
        }

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations (2 per multiply-add) of one token's forward pass in a sequence
        of `length` tokens: matrix products and causal attention."""
        d, layers, z = self.hidden_size, self.num_hidden_layers, self.routing_stream_size
        attention = 2 * d * (length + 1)  # over (length + 1) / 2 keys on average
        kv_width = d // self.num_attention_heads * self.num_key_value_heads
        # norms, biases; and the gate of all layers, of which every layer counts its own sum
        vectors = (2 * layers + 1) * d + layers * (d + kv_width) + self.num_moe_layers * z
        vectors += layers * (2 * d + 2 * kv_width) if self.attention_bias else 0
        products = self.parameter_counts()["computed_per_token"] - vectors - self.num_experts * z
        return 2 * products + layers * attention

    def _check(self) -> None:
        """Raise ValueError naming key, value and what is allowed; ranges before what divides."""
        least = dict.fromkeys(("num_attention_heads", "num_hidden_layers", "intermediate_size"), 1)
        least |= dict.fromkeys(("num_experts", "num_experts_per_tok", "expert_bank_layers"), 1)
        least |= {"num_key_value_heads": 1, "tree_branching": 2}
        sizes = ("num_shared_experts", "dense_intermediate_size", "routing_stream_size")
        rates = ("balance_update_rate", "router_z_loss_coef", "router_aux_loss_coef")
        others = ("tree_depth", "routing_offset_coef", "num_dense_layers")
        least |= dict.fromkeys((*sizes, *rates, *others), 0)
        for key, low in least.items():
            self._require(key, getattr(self, key) >= low, f"{low} or more")
        heads, leaf = self.num_attention_heads, self.tree_branching**self.tree_depth
        self._require(
            "hidden_size", self.hidden_size % (2 * heads) == 0, f"{heads} heads of even width"
        )
        self._require("num_key_value_heads", heads % self.num_key_value_heads == 0, "a divisor")
        kind = "leaves" if self.tree_depth else "experts"
        within = self.num_experts_per_tok <= self.units
        self._require("num_experts_per_tok", within, f"between 1 and {self.units}, the {kind}")
        self._require(
            "num_dense_layers",
            self.num_dense_layers < self.num_hidden_layers,
            f"between 0 and {self.num_hidden_layers - 1}: one layer needs experts",
        )
        self._require(
            "intermediate_size",
            self.intermediate_size % leaf == 0,
            f"a multiple of {leaf}, the tree's leaves: a leaf's expert has that share of it",
        )

    def _require(self, key: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{key}: {getattr(self, key)!r} must be {allowed}")


PURGED = -1e30  # a score: no probability is left of it, and no infinity comes up


class Routing(NamedTuple):
    """What a layer's router says of N tokens.

    logits (N, R) float32: raw scores, R the experts (a tree's: its edges). probs (N, U) float32: of
    the units. chosen (N, k): units. index, weights (N, S): experts that are used, and how much.
    """

    logits: torch.Tensor
    probs: torch.Tensor
    chosen: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


class Router(nn.Module):
    """Softmax over experts, the k largest kept (OLMoE, section 2).

    With a routing stream `weight` is this layer's offset to the gate that all layers share.
    """

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.routing_stream_size or config.hidden_size
        self.weight = nn.Parameter(torch.empty(config.num_experts, inputs))
        if config.balance_update_rate:
            self.register_buffer("balance", torch.zeros(config.units, dtype=torch.float32))
        self.load: torch.Tensor | None = None  # no buffer: DDP would hand one rank's to all
        if config.expert_masks:
            self.register_buffer("keep", torch.ones(config.num_experts).bool())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """As torch's, but b stays float32: a bfloat16 loses steps of a thousandth."""
        before = self._buffers.get("balance")
        super()._apply(fn, recurse)
        if before is not None:
            after = self._buffers["balance"]
            self._buffers["balance"] = after.float() if before.is_meta else before.to(after.device)
        return self

    def forward(self, x: torch.Tensor, shared: torch.Tensor | None = None) -> Routing:
        """x (N, D), or with a routing stream (N, Z); shared (E, Z): the gate of all layers."""
        # float32 in a bfloat16 model and under autocast too, where transformers' OLMoE computes
        # scores in bfloat16: near ones would change places
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight if shared is None else self.weight + shared
            logits = F.linear(x.float(), weight.float())
        scores, living = self.unit_scores(logits), self.living
        if living is not None:
            scores = scores.masked_fill(~living, PURGED)
        probs = scores.softmax(-1)
        with torch.no_grad():
            order = probs + self.balance if self.config.balance_update_rate else probs
            if living is not None:
                order = order.masked_fill(~living, -torch.inf)
            chosen = order.topk(self.config.num_experts_per_tok, -1).indices
        if self.normalises:  # of their scores: tiny probabilities would lose their ratio
            weights = scores.gather(-1, chosen).softmax(-1)
        else:
            weights = probs.gather(-1, chosen)
        if living is not None:  # fewer may be left than a token chooses
            probs, weights = probs * living, weights * living[chosen]
        index, weights = self.experts_of(chosen, weights)
        if self.config.expert_masks and not self.config.renormalize_masked:
            weights = weights * self.keep[index]
        return Routing(logits, probs, chosen, index, weights.to(x.dtype))

    @property
    def normalises(self) -> bool:
        """Whether the weights of chosen units sum to 1."""
        return self.config.norm_topk_prob

    @property
    def living(self) -> torch.Tensor | None:
        """Units (U,) that are left, bool, where others are chosen in place of purged experts."""
        if not (self.config.expert_masks and self.config.renormalize_masked):
            return None
        return self.kept_units()

    def kept_units(self) -> torch.Tensor:
        """Units (U,), bool, no expert of which is purged."""
        return self.keep

    def unit_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores (N, U) float32 whose softmax are the units' probabilities."""
        return logits

    @torch.no_grad()
    def count(self, chosen: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Add a batch's choices (N, k) to the loads since the last step; valid (N,) or None."""
        counts = unit_counts(chosen, self.config.units, valid)
        self.load = counts if self.load is None else self.load + counts

    @torch.no_grad()
    def update_balance(self) -> None:
        """b_u += rate sign(mean load - load_u) (arXiv:2408.15664, algorithm 1), the mean over units
        that can be chosen: purged ones keep their b. The loads begin anew."""
        load = torch.zeros_like(self.balance) if self.load is None else self.load
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        living = torch.ones_like(load).bool() if self.living is None else self.living
        # of no unit the mean is nan, which no product with 0 takes back
        sign = torch.where(living, (load[living].mean() - load).sign(), 0.0)
        self.balance += self.config.balance_update_rate * sign
        self.load = None

    def experts_of(
        self, chosen: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts (N, S) and their weights that chosen units (N, k) stand for: themselves."""
        return chosen, weights

    def squared_log_sums(self, logits: torch.Tensor) -> torch.Tensor:
        """(N,): the router z-loss of every token, log(sum exp logits)^2."""
        return logits.logsumexp(-1).square()


def tree_paths(branching: int, depth: int) -> torch.Tensor:
    """Edges (b^L, L) on the path to every leaf.

    Edges are counted from the root, level by level, from left to right: those of depth l begin at
    b + b^2 + .. + b^(l-1).
    """
    leaves = torch.arange(branching**depth)
    columns, begin = [], 0
    for level in range(1, depth + 1):
        # integer arithmetic: a logarithm in floating point ends below 5 for 3^5
        columns.append(begin + leaves // branching ** (depth - level))
        begin += branching**level
    return torch.stack(columns, 1)


class TreeRouter(Router):
    """A softmax over the branches of every node; a leaf's probability is the product on its path.

    Of the k most probable leaves, whose probabilities are scaled to sum to 1, an edge's expert gets
    the sum of those beneath it.
    """

    def __init__(self, config: MoeConfig) -> None:
        super().__init__(config)
        paths = tree_paths(config.tree_branching, config.tree_depth)
        self.register_buffer("paths", paths, persistent=False)
        self.sizes = [config.tree_branching**d for d in config.tree_levels]

    @property
    def normalises(self) -> bool:
        """Always, in a tree."""
        return True

    def kept_units(self) -> torch.Tensor:
        """Leaves (b^L,), bool, with no purged edge on their path."""
        return self.keep[self.paths].all(-1)

    def unit_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (N, b^L) float32 of the leaves."""
        b, path = self.config.tree_branching, None
        for level in logits.split(self.sizes, -1):
            branch = level.unflatten(-1, (-1, b)).log_softmax(-1).flatten(-2)
            path = branch if path is None else path.repeat_interleave(b, -1) + branch
        return path

    def experts_of(
        self, chosen: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Edges (N, S), S = sum_l min(k, b^l), and their weights; an edge stands once per token."""
        index, parts, begin = [], [], 0
        for level, size in enumerate(self.sizes, 1):
            edge = chosen // self.config.tree_branching ** (self.config.tree_depth - level)
            total = weights.new_zeros(len(chosen), size).scatter_add(-1, edge, weights)
            most = total.topk(min(chosen.shape[-1], size), -1)
            index.append(begin + most.indices)
            parts.append(most.values)
            begin += size
        return torch.cat(index, -1), torch.cat(parts, -1)

    def squared_log_sums(self, logits: torch.Tensor) -> torch.Tensor:
        """(N,): the mean over nodes of log(sum exp branches)^2."""
        b = self.config.tree_branching
        return logits.unflatten(-1, (-1, b)).logsumexp(-1).square().mean(-1)


@use_experts_implementation
class Experts(nn.Module):
    """SwiGLU experts of one width; transformers chooses how they are computed
    (config._experts_implementation), `eager` being the loop below."""

    def __init__(self, config: MoeConfig, num_experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """sum_s weight_s expert_index_s(x): x (N, D), index and weights (N, S) -> (N, D)."""
        mixed = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, -1)
            out = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            weighted = out * top_k_weights[token, slot, None]
            mixed = mixed.index_add(0, token, weighted.to(mixed.dtype))
        return mixed


def make_experts(config: MoeConfig, num_experts: int, width: int) -> Experts:
    """Experts of a width; one after another where torch's grouped product cannot take them."""
    if width % 8 or config.hidden_size % 8:  # it wants rows of whole 16 bytes
        config = copy.deepcopy(config)
        config._experts_implementation = "eager"
    return Experts(config, num_experts, width)


class TreeExperts(nn.Module):
    """The experts of a tree's edges: those of depth l have width I / b^l."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        b, k = config.tree_branching, config.num_experts_per_tok
        self.levels = nn.ModuleList(
            make_experts(config, b**depth, config.intermediate_size // b**depth)
            for depth in config.tree_levels
        )
        self.slots = [min(k, b**depth) for depth in config.tree_levels]

    def forward(
        self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As `Experts.forward`; index counts the edges of all levels."""
        mixed, begin = 0, 0
        indices, shares = index.split(self.slots, -1), weights.split(self.slots, -1)
        for experts, own, share in zip(self.levels, indices, shares, strict=True):
            mixed = mixed + experts(hidden_states, own - begin, share)
            begin += experts.num_experts
        return mixed


class SpreadExperts(nn.Module):
    """Experts of one width on several devices, consecutive ones on each, as many as it goes evenly.

    A token's states go to the devices of its experts and their outputs come back. The state dict
    is that of `Experts`: a checkpoint does not say how they were spread.
    """

    def __init__(self, experts: Experts, devices: Sequence[torch.device]) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.parts, self.ranges = nn.ModuleList(), expert_ranges(self.num_experts, len(devices))
        for own, device in zip(self.ranges, devices, strict=True):
            with torch.device("meta"):
                part = Experts(experts.config, len(own), experts.down_proj.shape[-1])
            for name, weight in experts.named_parameters():
                own_weight = weight.detach()[own.start : own.stop].to(device, copy=True)
                setattr(part, name, nn.Parameter(own_weight, weight.requires_grad))
            self.parts.append(part)
        self.register_state_dict_post_hook(_unite_parts)
        self.register_load_state_dict_pre_hook(_divide_parts)

    def forward(
        self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """As `Experts.forward`; a device computes nothing but what its experts were chosen for."""
        mixed = torch.zeros_like(hidden_states)
        for own, part in zip(self.ranges, self.parts, strict=True):
            device = part.down_proj.device
            mine = (index >= own.start) & (index < own.stop)
            token, slot = mine.nonzero(as_tuple=True)
            if not len(token):  # one of weight 0: a grouped product of nothing has no backward
                token = slot = index.new_zeros(1)
            local = (index[token, slot, None] - own.start).clamp(0, len(own) - 1)
            given = (hidden_states[token], local, (weights * mine)[token, slot, None])
            out = part(*(t.to(device) for t in given))
            mixed = mixed.index_add(0, token, out.to(mixed))
        return mixed


def expert_ranges(num_experts: int, devices: int) -> list[range]:
    """Consecutive experts of every device, the first ones one more where it does not go evenly."""
    ends = [-(-num_experts * (i + 1) // devices) for i in range(devices)]
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _unite_parts(module: SpreadExperts, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put one tensor per weight into a state dict, on the first part's device."""
    for name, weight in module.parts[0].named_parameters():
        keys = [f"{prefix}parts.{i}.{name}" for i in range(len(module.parts))]
        state[prefix + name] = torch.cat([state.pop(key).to(weight.device) for key in keys])


def _divide_parts(module: SpreadExperts, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of a state dict with one tensor per weight, the parts that are loaded."""
    for name, _weight in module.parts[0].named_parameters():
        whole = state.pop(prefix + name, None)
        if whole is not None:
            for i, own in enumerate(module.ranges):
                state[f"{prefix}parts.{i}.{name}"] = whole[own.start : own.stop]


class SwiGLU(nn.Module):
    """A dense feed-forward block: W_down (act(W_gate x) * W_up x)."""

    def __init__(self, config: MoeConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class RoutingStream(nn.Module):
    """A layer's step of the routing stream: r <- RMSNorm(r + W_lin u * silu(W_gate u))."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.routing_stream_size, bias=False)
        self.gate = nn.Linear(config.hidden_size, config.routing_stream_size, bias=False)
        self.norm = OlmoeRMSNorm(config.routing_stream_size, eps=config.rms_norm_eps)

    def forward(self, r: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """r (B, T, Z), u (B, T, D) -> (B, T, Z)."""
        return self.norm(r + self.linear(u) * F.silu(self.gate(u)))


class MoeBlock(nn.Module):
    """Router, its experts (None: those of the bank that an earlier layer holds), shared experts."""

    def __init__(self, config: MoeConfig, holds_experts: bool) -> None:
        super().__init__()
        self.gate = (TreeRouter if config.tree_depth else Router)(config)
        self.experts = None
        if holds_experts:
            self.experts = (
                TreeExperts(config)
                if config.tree_depth
                else make_experts(config, config.num_experts, config.intermediate_size)
            )
        self.stream = RoutingStream(config) if config.routing_stream_size else None
        self.shared_experts = None
        if config.num_shared_experts:
            width = config.num_shared_experts * config.intermediate_size
            self.shared_experts = SwiGLU(config, width)  # side by side they are one block

    def forward(
        self,
        u: torch.Tensor,
        bank: nn.Module,
        r: torch.Tensor | None = None,
        shared_gate: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Routing]:
        """Output (B, T, D), the routing stream (B, T, Z) after this layer, and the routing.

        bank: the experts; r: the stream before; shared_gate (E, Z): the gate of all layers.
        """
        if self.stream is not None:
            r = self.stream(r, u)
        routing = self.gate((u if r is None else r).flatten(0, 1), shared_gate)
        out = bank(u.flatten(0, 1), routing.index, routing.weights).view_as(u)
        if self.shared_experts is not None:
            out = out + self.shared_experts(u)
        return out, r, routing


class MoeDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention, then experts, or one dense block in the leading layers."""

    def __init__(self, config: MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = OlmoeAttention(config, layer_idx)
        self.input_layernorm = OlmoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = OlmoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        place = layer_idx - config.num_dense_layers  # among the layers with experts
        self.mlp = (
            SwiGLU(config, config.dense_width)
            if place < 0
            else MoeBlock(config, place % config.expert_bank_layers == 0)
        )

    def forward(
        self,
        x: torch.Tensor,
        r: torch.Tensor | None,
        bank: nn.Module | None,
        shared_gate: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """New states (B, T, D), the routing stream, and the routing's tensors (none of a dense
        layer), all in one tuple: reentrant checkpointing sees no deeper."""
        x = x + self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)[0]
        u = self.post_attention_layernorm(x)
        if isinstance(self.mlp, SwiGLU):
            return x + self.mlp(u), r
        out, r, routing = self.mlp(u, bank, r, shared_gate)
        return x + out, r, *routing


class MoePreTrainedModel(PreTrainedModel):
    """What every model of the family shares."""

    config: MoeConfig
    config_class = MoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MoeDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    # a bfloat16 bias cannot follow updates of a thousandth
    _keep_in_fp32_modules_strict = ("balance",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """normal(0, initializer_range) for matrices, 1 for norms, 0 for the offsets of gates."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Router):
            if self.config.routing_stream_size:
                init.zeros_(module.weight)
            else:
                init.normal_(module.weight, mean=0.0, std=std)
            if hasattr(module, "balance"):
                init.zeros_(module.balance)
            if hasattr(module, "keep"):
                init.ones_(module.keep)
            if isinstance(module, TreeRouter):
                paths = tree_paths(self.config.tree_branching, self.config.tree_depth)
                init.copy_(module.paths, paths.to(module.paths.device))


@dataclass
class MoeModelOutput(ModelOutput):
    """Hidden states after the final norm, and the routing of every layer with experts."""

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    routing: tuple[Routing, ...] | None = None


class MoeModel(MoePreTrainedModel):
    """Embedding, decoder layers, final norm; the routing stream runs beside the residual one."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            MoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = OlmoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = OlmoeRotaryEmbedding(config)
        if config.routing_stream_size:
            self.embed_routing = nn.Embedding(config.vocab_size, config.routing_stream_size)
            self.routing_gate = nn.Linear(
                config.routing_stream_size, config.num_experts, bias=False
            )
        self.gradient_checkpointing = False
        self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True) -> "MoeModel":
        """As in torch; frozen gates stay frozen after from_pretrained, which makes parameters anew
        and then calls this."""
        if self.config.freeze_router:
            gates = [router.weight for router in self.routers()]
            if self.config.routing_stream_size:
                gates.append(self.routing_gate.weight)
            for weight in gates:
                weight.requires_grad_(False)
        return super().train(mode)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutput:
        """input_ids (B, T); attention_mask (B, past + T) marks tokens that are not padding.

        position_ids that restart at 0 inside a row (and no attention_mask) pack documents that do
        not see one another.
        """
        if input_ids is None:  # the routing stream begins with them
            raise ValueError("input_ids: needed; inputs_embeds do not take their place")
        x = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + seen
        cache = past_key_values
        if isinstance(cache, DynamicCache) and not seen:
            cache = None  # transformers looks for packed documents only where there is no cache
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        if "flash" in (self.config._attn_implementation or "") and attention_mask is cache is None:
            kwargs |= document_bounds(position_ids.expand(x.shape[:2]))  # it takes no mask
        streamed = self.config.routing_stream_size
        r = self.embed_routing(input_ids) if streamed else None
        gate = self.routing_gate.weight if streamed else None
        given = {"attention_mask": mask, "past_key_values": past_key_values, **kwargs}
        given["position_embeddings"] = self.rotary_emb(x, position_ids)
        states, routings, bank = [x], [], None
        for layer in self.layers:
            bank = getattr(layer.mlp, "experts", None) or bank
            x, r, *routing = layer(x, r, bank, gate, **given)
            states.append(x)
            if routing:
                routings.append(Routing(*routing))
        x = self.norm(x)
        if self.training and self.config.balance_update_rate:
            # here: checkpointing runs a layer twice
            valid = valid_tokens(attention_mask, x)
            for router, routing in zip(self.routers(), routings, strict=True):
                router.count(routing.chosen, valid)
        return MoeModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], x) if output_hidden_states else None,
            routing=tuple(routings),
        )

    def routers(self) -> list[Router]:
        """The routers, layer by layer."""
        return [m for m in self.modules() if isinstance(m, Router)]


def document_bounds(position_ids: torch.Tensor) -> dict[str, Any]:
    """Flash attention's arguments for documents packed in rows; none where no row is packed.

    position_ids (B, T). A document starts where a row starts and where positions do not rise by 1.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    if not starts[:, 1:].any():
        return {}
    bounds = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel()).int()
    longest = int(bounds.diff().max())
    bounded = {f"cu_seq_lens_{side}": bounds for side in "qk"}
    return bounded | {f"max_length_{side}": longest for side in "qk"}


def valid_tokens(attention_mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """(N,) bool of tokens that are not padding, of states x (B, T, D); None if there is none."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask: expected (B, T) to tell padding, found {shape}")
    valid = attention_mask[:, -x.shape[1] :].bool()
    return None if valid.all() else valid.flatten()


def unit_counts(chosen: torch.Tensor, units: int, valid: torch.Tensor | None) -> torch.Tensor:
    """How often each unit was chosen, (U,) float32; chosen (N, k), valid (N,) bool."""
    if valid is not None:
        chosen = chosen[valid]
    return torch.bincount(chosen.flatten(), minlength=units).float()


def balancing_loss(routings: tuple[Routing, ...], valid: torch.Tensor | None) -> torch.Tensor:
    """U sum_u f_u P_u over the units; f_u: how often a token chooses u (they sum to k), P_u: its
    mean probability, both pooled over all layers before the product, as in transformers."""
    units = routings[0].probs.shape[-1]
    counts = sum(unit_counts(r.chosen, units, valid) for r in routings)
    probs = sum((r.probs if valid is None else r.probs[valid]).sum(0) for r in routings)
    tokens = len(routings[0].probs) if valid is None else valid.sum().clamp(min=1)
    rows = len(routings) * tokens
    return units * ((counts / rows) * (probs / rows)).sum()


@dataclass
class MoeCausalLMOutput(CausalLMOutputWithPast):
    """CausalLMOutputWithPast plus the unweighted losses apart, and the routing of every layer.

    loss: lm_loss and, in training, the weighted others. aux_loss: load balancing; z_loss: router z;
    offset_loss: mean square of the layers' offsets to the shared gate (0 without one).
    """

    lm_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    z_loss: torch.FloatTensor | None = None
    offset_loss: torch.FloatTensor | None = None
    routing: tuple[Routing, ...] | None = None


class MoeForCausalLM(MoePreTrainedModel, GenerationMixin):
    """The family with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoeConfig) -> None:
        super().__init__(config)
        self.model = MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """As transformers', the routing stream's embedding included."""
        table = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.config.routing_stream_size:
            stream = self._get_resized_embeddings(self.model.embed_routing, table.num_embeddings)
            self.model.embed_routing = stream
        return table

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutput:
        """Logits (B, T, V), and the loss in nats if labels (B, T) are given (-100 is ignored).

        With num_items_in_batch (target tokens of all micro-batches and ranks of one step) the LM
        loss is summed nats over it, and the routers' losses are weighted by this micro-batch's
        share of it: over a step they count once.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        states, keep = outputs.last_hidden_state, logits_to_keep
        logits = self.lm_head(states[:, slice(-keep, None) if isinstance(keep, int) else keep])
        losses: dict[str, torch.Tensor] = {}
        if labels is not None:
            valid = valid_tokens(attention_mask, states)
            losses = self.router_losses(outputs.routing, valid)
            lm_loss = self.loss_function(
                logits,
                labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            share = 1.0
            if num_items_in_batch is not None:
                share = (labels[:, 1:] != -100).sum() / num_items_in_batch
            losses = {**losses, "lm_loss": lm_loss, "loss": lm_loss}
            if self.training:
                losses["loss"] = lm_loss + share * self.weighted(losses)
        return MoeCausalLMOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            routing=outputs.routing if output_routing else None,
            **losses,
        )

    def purge_experts(self, keep: torch.Tensor | None, renormalize: bool = False) -> None:
        """Leave out every expert e whose keep[layer, e] is False (layers: those with experts).

        keep (layers, E) bool, saved with the checkpoint; None brings all experts back. Tokens that
        chose a purged expert go without it, or choose among the others (renormalize). Its weights
        stay in the checkpoint.
        """
        routers = [m for m in self.modules() if isinstance(m, Router)]
        shared, config = self.config, copy.deepcopy(self.config)
        expected = (len(routers), config.num_experts)
        if keep is not None and tuple(keep.shape) != expected:
            raise ValueError(f"keep: expected shape {expected}, found {tuple(keep.shape)}")
        config.expert_masks, config.renormalize_masked = keep is not None, renormalize
        for module in self.modules():  # another model may hold the config it was made from
            if getattr(module, "config", None) is shared:
                module.config = config
        for layer, router in enumerate(routers):
            router._buffers.pop("keep", None)
            if keep is not None:
                own = keep[layer].bool().to(router.weight.device, copy=True)
                router.register_buffer("keep", own)

    def spread_experts(self, devices: Sequence[torch.device | str]) -> None:
        """Share out every layer's experts among devices; everything else goes to the first.

        For one process that drives several GPUs: a model that does not fit one is trained so. Of
        fewer experts than devices (near a tree's root) each gets a device of its own.
        """
        devices = [torch.device(device) for device in devices]
        if not devices or any(isinstance(m, SpreadExperts) for m in self.modules()):
            raise ValueError("spread_experts: once, over one device or more")
        found = [
            (parent, name, child)
            for parent in self.modules()
            for name, child in [*parent.named_children()]
            if isinstance(child, Experts)
        ]
        for parent, name, _ in found:
            parent.register_module(name, None)
        self.to(devices[0])
        for parent, name, experts in found:
            own = devices[: experts.num_experts]  # a tree has few at its root
            parent.register_module(name, SpreadExperts(experts, own))
        if len(set(devices)) > 1:  # what transformers' Trainer asks for before it moves a model
            self.hf_device_map = {
                f"{name}.parts.{i}": device
                for name, spread in self.named_modules()
                if isinstance(spread, SpreadExperts)
                for i, device in enumerate(devices[: len(spread.parts)])
            }

    def router_losses(
        self, routings: tuple[Routing, ...], valid: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """aux_loss, z_loss and offset_loss, unweighted."""
        routers = self.model.routers()
        squares = [m.squared_log_sums(r.logits) for m, r in zip(routers, routings, strict=True)]
        tokens = len(squares[0]) if valid is None else valid.sum().clamp(min=1)
        own = (s if valid is None else s[valid] for s in squares)
        z = torch.stack([s.sum() / tokens for s in own]).mean()
        offset = z.new_zeros(())
        if self.config.routing_stream_size:
            offset = torch.stack([m.weight.float().square().mean() for m in routers]).mean()
        balancing = balancing_loss(routings, valid)
        if self.config.router_aux_loss_per_layer:
            apart = [balancing_loss((routing,), valid) for routing in routings]
            balancing = torch.stack(apart).mean()
        return {"aux_loss": balancing, "z_loss": z, "offset_loss": offset}

    def weighted(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """The routers' losses, each times its coefficient."""
        config = self.config
        return (
            config.router_aux_loss_coef * losses["aux_loss"]
            + config.router_z_loss_coef * losses["z_loss"]
            + config.routing_offset_coef * losses["offset_loss"]
        )

    @property
    def layers_stand_alone(self) -> bool:
        """Whether no layer's weights are read outside of it: later layers read a bank's experts,
        offset_loss the layers' offsets to the shared gate."""
        return self.config.expert_bank_layers == 1 and not self.config.routing_stream_size

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Loss-free balancing: every router's biases move, by the loads of all micro-batches and
        ranks of the step. Nothing without balance_update_rate."""
        if self.config.balance_update_rate:
            for router in self.model.routers():
                router.update_balance()


AutoConfig.register(MoeConfig.model_type, MoeConfig, exist_ok=True)
AutoModelForCausalLM.register(MoeConfig, MoeForCausalLM, exist_ok=True)
# save_pretrained copies this file beside the weights, so that a checkpoint loads anywhere.
MoeConfig.register_for_auto_class()
MoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
