"""Monet: mixture of monosemantic experts for transformers (arXiv:2412.04139), trained from scratch.

Every layer holds E^2 experts, decomposed over two axes: expert ij is assembled from factor i of the
first axis and factor j of the second, so E^2 experts cost O(E) parameters. A router gives each of H
heads a sparse distribution over both axes; it is shared by `moe_groups` consecutive layers.

Shapes: B batch, T tokens, D hidden_size, H moe_heads, E moe_experts (i, j: the two axes),
m moe_dim (expert width), k = m / 2, V vocabulary. Gates g = [g1, g2] are (2, B, T, H, E), float32,
and sum to 1 over E: the factored forms below rest on that.
"""

import copy
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple, is_liger_kernel_available

Gates = tuple[torch.Tensor, torch.Tensor]


@strict
class MonetConfig(PreTrainedConfig):
    """Configuration of a Monet.

    moe_topk experts are kept per head and axis on average; moe_groups consecutive layers share a
    router; head_dim is hidden_size // num_attention_heads. The two coefficients weigh the auxiliary
    losses, in training only. freeze_router keeps the router at its random start (an ablation).
    head_dim defaults to hidden_size // num_attention_heads. expert_masks: some experts are purged
    (see `purge_experts`); renormalize_masked: the kept experts of a head then sum to 1 again.
    """

    model_type = "monet"
    keys_to_ignore_at_inference = ("past_key_values", "router_probs")
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    hidden_act: str = "relu2"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_dropout: float | int = 0.0
    head_dim: int | None = None
    moe_dim: int = 8
    moe_heads: int = 8
    moe_experts: int = 64
    moe_topk: int = 8
    moe_groups: int = 4
    moe_decompose: str = "vertical"
    uniformity_loss_coef: float | int = 1e-3
    ambiguity_loss_coef: float | int = 1e-3
    freeze_router: bool = False
    expert_masks: bool = False
    renormalize_masked: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:  # floor: q/k/v may be narrower than hidden_size
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        """Raise ValueError naming key, value and what is allowed."""
        rules = {
            "hidden_size": (self.hidden_size % 2 == 0, "even"),
            "num_attention_heads": (
                self.num_attention_heads > 0 and self.head_dim > 0 and self.head_dim % 2 == 0,
                "such that head_dim, by default hidden_size // num_attention_heads"
                f" ({self.head_dim}) is even and positive",
            ),
            "num_key_value_heads": (
                self.num_key_value_heads > 0
                and self.num_attention_heads % self.num_key_value_heads == 0,
                f"a divisor of num_attention_heads ({self.num_attention_heads})",
            ),
            "hidden_act": (self.hidden_act == "relu2", "relu2"),
            "moe_decompose": (
                self.moe_decompose in ("vertical", "horizontal"),
                "vertical or horizontal",
            ),
            "moe_dim": (self.moe_dim > 0 and self.moe_dim % 2 == 0, "even and positive"),
            "moe_topk": (
                0 < self.moe_topk <= self.moe_experts,
                f"between 1 and moe_experts ({self.moe_experts})",
            ),
        }
        for key in ("vocab_size", "num_hidden_layers", "moe_groups", "moe_heads"):
            rules[key] = (getattr(self, key) > 0, "positive")
        for key in ("uniformity_loss_coef", "ambiguity_loss_coef"):
            rules[key] = (getattr(self, key) >= 0, "0 or more")
        for key, (holds, allowed) in rules.items():
            if not holds:
                raise ValueError(f"{key}: {getattr(self, key)!r} must be {allowed}")

    @property
    def num_routers(self) -> int:
        """Routers: one per `moe_groups` consecutive layers."""
        return -(-self.num_hidden_layers // self.moe_groups)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; `trainable_without_routers` is the paper's count.

        computed_per_token: every parameter a token's forward pass multiplies or adds (Monet
        computes all factor products; of the input embedding it reads one row, counted as none).
        """
        d, e, m, layers = self.hidden_size, self.moe_experts, self.moe_dim, self.num_hidden_layers
        width = self.num_attention_heads * self.head_dim
        kv_width = self.num_key_value_heads * self.head_dim
        attention = layers * (2 * d * width + 2 * d * kv_width)
        experts = layers * e * (2 * m * d + m + d)
        routers = self.num_routers * 2 * d * self.moe_heads * e
        norms = (2 * layers + 1) * d
        table = self.vocab_size * d
        embedding = table if self.tie_word_embeddings else 2 * table
        total = embedding + attention + experts + routers + norms
        return {
            "total": total,
            "trainable_without_routers": total - routers,
            "embedding": embedding,
            "non_embedding": total - embedding,
            "attention": attention,
            "experts": experts,
            "routers": routers,
            "computed_per_token": total - (0 if self.tie_word_embeddings else table),
        }

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations (2 per multiply-add) of one token's forward pass in a sequence
        of `length` tokens: matrix products, causal attention and the mixing of factors by gates."""
        counts, e, heads = self.parameter_counts(), self.moe_experts, self.moe_heads
        width = self.num_attention_heads * self.head_dim
        attention = 2 * width * (length + 1)  # scores and values over (length + 1) / 2 keys
        k = self.moe_dim // 2 if self.moe_decompose == "vertical" else self.moe_dim
        products = 2 if self.moe_decompose == "vertical" else 1
        mixing = products * 2 * (2 * heads * e * k)
        return 2 * counts["computed_per_token"] + self.num_hidden_layers * (attention + mixing)


class MonetRotaryEmbedding(nn.Module):
    """Rotary position embedding: cos and signed sin, each (B, 1, T, head_dim), of the rotate-half
    layout (see `rotate`)."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        self.config = config
        self.inv_freq = nn.Buffer(self.frequencies(config), persistent=False)
        self.original_inv_freq = nn.Buffer(self.frequencies(config), persistent=False)
        self.rope_type = "default"

    @staticmethod
    def frequencies(config: MonetConfig) -> torch.Tensor:
        """theta^(-2i / head_dim), i = 0 .. head_dim / 2 - 1."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents

    @staticmethod
    def compute_default_rope_parameters(config: MonetConfig, **kwargs: Any) -> tuple:
        """Frequencies and scale, as transformers asks for them when it initialises buffers."""
        return MonetRotaryEmbedding.frequencies(config), 1.0

    @torch.no_grad()
    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> Gates:
        angles = positions[..., None].float() * self.inv_freq.float()
        cos, sin = angles.cos(), angles.sin()
        pairs = (torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))
        return pairs[0][:, None].to(x.dtype), pairs[1][:, None].to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, heads, T, head_dim) by its positions' angles: its halves [a, b] become
    [a cos - b sin, b cos + a sin]; the sign stands in sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; returns (B, T, heads, head_dim) and the weights (B, heads, T, T)."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = F.dropout(scores.softmax(-1, dtype=wide).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# The fused attention of the CPU is made for heads of 16 entries and more: those of 6 (published for
# n = 16) take 1.4 to 1.6 times as long as when they are padded, those of 12 1.1 times.
CPU_HEAD_DIM = 16


class MonetAttention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: MonetConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: Gates,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (
            p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, heads, T, head_dim)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        fused = x.device.type == "cpu" and self.config._attn_implementation == "sdpa"
        # a single query is read against all keys: padding them costs more than it saves
        spare = CPU_HEAD_DIM - self.head_dim if fused and x.shape[1] > 1 else 0
        if spare > 0:  # zeros change no score and no mixture of the first head_dim entries
            query, key, value = (F.pad(t, (0, spare)) for t in (query, key, value))
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        mixed = mixed[..., : self.head_dim]  # (B, T, heads, head_dim)
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), weights


class MonetRouter(nn.Module):
    """Gates over both expert axes, sparse by an estimated quantile instead of a sort.

    Scores z = w(x) are batch-normalised per head over valid tokens and experts; experts whose
    normalised score reaches the quantile 1 - topk / E of a standard normal (or the head's largest)
    are kept, and the gates are a softmax over the kept raw scores. Ties are all kept.
    """

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        self.config = config
        h, e = config.moe_heads, config.moe_experts
        self.w1 = nn.Linear(config.hidden_size, h * e, bias=False)
        self.w2 = nn.Linear(config.hidden_size, h * e, bias=False)
        self.norm1 = nn.BatchNorm1d(h, affine=False)
        self.norm2 = nn.BatchNorm1d(h, affine=False)
        share = 1 - config.moe_topk / e
        self.quantile = NormalDist().inv_cdf(share) if share > 0 else -math.inf
        if config.expert_masks:  # (E, E): True where expert ij of this group may be used
            self.register_buffer("keep", torch.ones(config.moe_experts, config.moe_experts).bool())
        if config.freeze_router:
            self.requires_grad_(False)

    def train(self, mode: bool = True) -> "MonetRouter":
        """As in torch; a frozen router stays frozen after from_pretrained, which makes parameters
        anew and then calls this."""
        if self.config.freeze_router:
            self.requires_grad_(False)
        return super().train(mode)

    def forward(
        self, x: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates (2, B, T, H, E), and batch statistics (3, 2, H): mean, biased variance, count.

        x (B, T, D); valid (B, T) marks tokens that are not padding (None: all). The running
        statistics are not touched here: gradient checkpointing runs this method twice.
        """
        h, e = self.config.moe_heads, self.config.moe_experts
        # float32 under autocast too: a score near the threshold would fall to either side of it
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            scores = [F.linear(wide, w.weight.to(wide.dtype)) for w in (self.w1, self.w2)]
            z = torch.stack(scores).unflatten(-1, (h, e))  # (2, B, T, H, E)
            with torch.no_grad():
                statistics = self._statistics(z, valid)
                # Normalising is monotonic, so the threshold is moved to the raw scores instead.
                deviation = torch.sqrt(statistics[1] + self.norm1.eps)
                threshold = statistics[0] + self.quantile * deviation  # (2, H)
                threshold = torch.minimum(z.amax(-1), threshold[:, None, None])  # (2, B, T, H)
                dropped = z < threshold[..., None]
            return z.masked_fill(dropped, -1e10).softmax(-1), statistics

    def _statistics(self, z: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Mean, biased variance and count (3, 2, H): in training over valid tokens and experts,
        otherwise the running ones (with a count of 0)."""
        if not self.training:
            norms = (self.norm1, self.norm2)
            mean = torch.stack([n.running_mean for n in norms]).to(z.dtype)
            variance = torch.stack([n.running_var for n in norms]).to(z.dtype)
            return torch.stack([mean, variance, torch.zeros_like(mean)])
        flat = z.flatten(1, 2) if valid is None else z[:, valid]  # (2, tokens, H, E)
        mean = flat.mean((1, 3))
        # two passes: a third of the time that torch.var_mean takes over these dimensions
        variance = (flat - mean[:, None, :, None]).square_().mean((1, 3))
        count = torch.full_like(mean, float(flat.shape[1] * flat.shape[3]))
        return torch.stack([mean, variance, count])

    @torch.no_grad()
    def update_running_statistics(self, statistics: torch.Tensor) -> None:
        """Move the running mean and (unbiased) variance by one batch, as BatchNorm1d does."""
        for axis, norm in enumerate((self.norm1, self.norm2)):
            mean, variance, count = statistics[:, axis]
            unbiased = variance * count / (count - 1).clamp(min=1)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
            norm.num_batches_tracked += 1


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2."""
    return torch.relu(x).square()


# Expert weights of a masked layer that exist at once, (E, E) per token: 4 MiB of float32.
MASKED_ELEMENTS = 2**20


def mix_masked(
    g: torch.Tensor, keep: torch.Tensor, a: torch.Tensor, c: torch.Tensor, renormalize: bool
) -> tuple[torch.Tensor, ...]:
    """Mixtures of factors over kept experts only: purging pairs ij is not a mask of g1 or g2.

    With C_ij = keep_ij sum_h g1_hi g2_hj: sum_j C_ij and sum_i C_ij, each (B, T, E);
    sum_j C_ij c_j and sum_i C_ij a_i, each (B, T, E, width). a, c (B, T, E, width); keep (E, E).
    renormalize: each head's kept weights sum to 1 again.
    """
    shape, e = g.shape[1:3], len(keep)
    keep = keep.to(g.dtype)
    g1, g2 = g.unbind()
    g1 = renormalized(g1, g2, keep) if renormalize else g1
    g1, g2, a, c = (t.flatten(0, 1) for t in (g1, g2, a, c))
    rows = max(1, MASKED_ELEMENTS // e**2)
    ones = a.new_ones(1, 1, 1)
    parts = []
    for g1_part, g2_part, a_part, c_part in zip(
        *(t.split(rows) for t in (g1, g2, a, c)), strict=True
    ):
        weights = (g1_part.transpose(-1, -2) @ g2_part).mul_(keep)  # (n, E, E)
        # a column of ones beside the factors: the sums come out of the same products
        column = ones.expand(len(a_part), e, 1)
        parts.append(
            (
                weights @ torch.cat([c_part, column], -1),
                weights.transpose(-1, -2) @ torch.cat([a_part, column], -1),
            )
        )
    on_i, on_j = (torch.cat(part).unflatten(0, shape) for part in zip(*parts, strict=True))
    return on_i[..., -1], on_j[..., -1], on_i[..., :-1], on_j[..., :-1]


# A head whose kept experts hold less of its weight counts as one without any: it is not blown up.
LEAST_SHARE = 1e-4


def renormalized(g1: torch.Tensor, g2: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """g1 over the share of its head's weight that kept experts hold; 0 where they hold none."""
    wide = torch.promote_types(g1.dtype, torch.float32)
    first, second = g1.to(wide), g2.to(wide)
    share = ((first @ keep.to(wide)) * second).sum(-1, keepdim=True)  # (B, T, H, 1)
    held = share > LEAST_SHARE
    # the inner choice keeps a division by 0 out of the gradient
    scale = torch.where(held, 1 / torch.where(held, share, 1.0), 0.0)
    return (first * scale).to(g1.dtype)


class MonetMoHDE(nn.Module):
    """Horizontal decomposition: expert ij(x) = V_j s(U_i x + b_i) + b2_j."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        d, e, m = config.hidden_size, config.moe_experts, config.moe_dim
        self.config = config
        self.num_experts = e
        self.u = nn.Linear(d, e * m)
        self.v = nn.Linear(e * m, d, bias=False)
        self.b = nn.Parameter(torch.empty(e, d))

    def forward(
        self, x: torch.Tensor, g: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """sum_ij sum_h g1_hi g2_hj expert_ij(x); i is contracted first, so no E x E tensor.

        keep (E, E): experts that take part (None: all).
        """
        g = g.to(x.dtype)
        a = squared_relu(self.u(x)).unflatten(-1, (self.num_experts, -1))  # (B, T, E, m)
        if keep is None:
            g1, g2 = g.unbind()
            s2, z = g2.sum(-2), g2.transpose(-1, -2) @ (g1 @ a)  # (B, T, E), (B, T, E, m)
        else:
            _, s2, _, z = mix_masked(g, keep, a, a[..., :0], self.config.renormalize_masked)
        return self.v(z.flatten(-2)) + s2 @ self.b


class MonetMoVDE(nn.Module):
    """Vertical decomposition: the output's halves come from the two axes.

    expert ij(x) = [V11_i a_i + V12_i c_j + b1_i ; V21_j a_i + V22_j c_j + b2_j] with
    a_i = s(U1_i x), c_j = s(U2_j x).
    """

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        d, e, k = config.hidden_size, config.moe_experts, config.moe_dim // 2
        self.config = config
        self.num_experts = e
        self.u1 = nn.Linear(d, e * k)
        self.u2 = nn.Linear(d, e * k)
        self.v11 = nn.Linear(e * k, d // 2, bias=False)
        self.v12 = nn.Linear(e * k, d // 2, bias=False)
        self.v21 = nn.Linear(e * k, d // 2, bias=False)
        self.v22 = nn.Linear(e * k, d // 2, bias=False)
        self.b1 = nn.Parameter(torch.empty(e, d // 2))
        self.b2 = nn.Parameter(torch.empty(e, d // 2))

    def forward(
        self, x: torch.Tensor, g: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """sum_ij sum_h g1_hi g2_hj expert_ij(x), factored: the gates of a head sum to 1.

        keep (E, E): experts that take part (None: all).
        """
        g = g.to(x.dtype)
        f = squared_relu(torch.stack([self.u1(x), self.u2(x)]))  # both axes' factors, [a, c]
        f = f.unflatten(-1, (self.num_experts, -1))  # (2, B, T, E, k)
        if keep is None:
            s = g.sum(-2)  # (2, B, T, E)
            # sum_h g1_hi sum_j g2_hj c_j and sum_h g2_hj sum_i g1_hi a_i, (2, B, T, E, k)
            other = g.transpose(-1, -2) @ (g @ f).flip(0)
        else:
            mixed = mix_masked(g, keep, *f, self.config.renormalize_masked)
            s, other = torch.stack(mixed[:2]), torch.stack(mixed[2:])
        # unbound, not indexed: the gradient of an index is a whole tensor of zeros around it
        a, c = (f * s[..., None]).flatten(-2).unbind()  # (B, T, E k)
        c_on_i, a_on_j = other.flatten(-2).unbind()
        s1, s2 = s.unbind()
        left = self.v11(a) + self.v12(c_on_i) + s1 @ self.b1
        right = self.v21(a_on_j) + self.v22(c) + s2 @ self.b2
        return torch.cat([left, right], -1)


class MonetDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and experts; the first layer of a group also routes for the group."""

    def __init__(self, config: MonetConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MonetAttention(config, layer_idx)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.router = MonetRouter(config) if layer_idx % config.moe_groups == 0 else None
        kinds = {"vertical": MonetMoVDE, "horizontal": MonetMoHDE}
        self.moe = kinds[config.moe_decompose](config)

    def forward(
        self,
        x: torch.Tensor,
        g: torch.Tensor | None,
        keep: torch.Tensor | None,
        valid: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_embeddings: Gates,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """New states (B, T, D), the group's gates, batch statistics (if routed), attention.

        g (2, B, T, H, E): the gates of the group, None in its first layer, which makes them.
        keep (E, E): the group's experts that take part (None: all).
        """
        attended, weights = self.self_attn(
            self.input_layernorm(x), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        x = x + attended
        inner = self.post_attention_layernorm(x)
        statistics = None
        if self.router is not None:
            g, statistics = self.router(inner, valid)
        return x + self.moe(inner, g, keep), g, statistics, weights


class MonetPreTrainedModel(PreTrainedModel):
    """What every Monet model shares."""

    config: MonetConfig
    config_class = MonetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MonetDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    # The routers' running statistics: a bfloat16 mean cannot follow small updates.
    _keep_in_fp32_modules_strict = ("norm1", "norm2")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """normal(0, initializer_range) for matrices, 0 for biases, 1 for norms."""
        super()._init_weights(module)
        if isinstance(module, MonetMoVDE):
            init.zeros_(module.b1)
            init.zeros_(module.b2)
        elif isinstance(module, MonetMoHDE):
            init.zeros_(module.b)
        elif isinstance(module, MonetRouter) and self.config.expert_masks:
            init.ones_(module.keep)

    def purge_experts(self, keep: torch.Tensor | None, renormalize: bool = False) -> None:
        """Leave out every expert ij whose keep[group, i, j] is False, in all layers of the group.

        keep (router groups, E, E) bool, saved with the checkpoint; None brings all experts back.
        The weights of kept experts stay as they are, or are scaled so that each head's sum to 1
        (renormalize). The weights of purged experts stay in the checkpoint: i and j are shared.
        """
        routers = [m for m in self.modules() if isinstance(m, MonetRouter)]
        shared, config = self.config, copy.deepcopy(self.config)
        expected = (len(routers), config.moe_experts, config.moe_experts)
        if keep is not None and tuple(keep.shape) != expected:
            raise ValueError(f"keep: expected shape {expected}, found {tuple(keep.shape)}")
        config.expert_masks, config.renormalize_masked = keep is not None, renormalize
        for module in self.modules():  # another model may hold the config it was made from
            if getattr(module, "config", None) is shared:
                module.config = config
        for group, router in enumerate(routers):
            if keep is None:
                router._buffers.pop("keep", None)
            else:
                device = router.w1.weight.device
                router.register_buffer("keep", keep[group].bool().to(device, copy=True))


@dataclass
class MonetModelOutput(BaseModelOutputWithPast):
    """BaseModelOutputWithPast plus router_probs: one (g1, g2) per router group."""

    router_probs: tuple[Gates, ...] | None = None


class MonetModel(MonetPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            MonetDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MonetRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MonetModelOutput:
        """Hidden states after the final norm; hidden_states has num_hidden_layers + 1 entries.

        attention_mask (B, past + T) marks tokens that are not padding. position_ids that restart at
        0 inside a row (and no attention_mask) pack documents that do not see one another.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + seen
        mask, bounds = self._masks(x, attention_mask, position_ids, past_key_values)
        positions = self.rotary_emb(x, position_ids)
        valid = valid_tokens(attention_mask, x)
        if self.training and valid is not None and not valid.any():
            raise ValueError("attention_mask: all tokens are padding; training needs at least one")
        states, attentions, routed, g, keep = [x], [], [], None, None
        for layer in self.layers:
            if layer.router is not None:
                keep = getattr(layer.router, "keep", None)
            x, g, statistics, weights = layer(
                x,
                g,
                keep,
                valid,
                mask,
                positions,
                past_key_values=past_key_values,
                **{**bounds, **kwargs},  # bounds that a collator brings win
            )
            states.append(x)
            attentions.append(weights)
            if statistics is not None:
                routed.append((layer.router, g, statistics))
        if self.training:
            for router, _, statistics in routed:
                router.update_running_statistics(statistics)
        x = self.norm(x)
        return MonetModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], x)
            if self._wants("hidden_states", output_hidden_states)
            else None,
            attentions=tuple(attentions) if self._wants("attentions", output_attentions) else None,
            router_probs=tuple(g.unbind() for _, g, _ in routed),
        )

    def _masks(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """The causal mask, and for flash attention (which takes no mask) the packed documents."""
        if isinstance(cache, DynamicCache) and cache.get_seq_length() == 0:
            cache = None  # transformers looks for packed documents only where there is no cache
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        flash = "flash" in (self.config._attn_implementation or "")
        if not flash or attention_mask is not None or cache is not None:
            return mask, {}
        return mask, document_bounds(position_ids.expand(x.shape[:2]))

    def _wants(self, name: str, given: bool | None) -> bool:
        return bool(getattr(self.config, f"output_{name}", False) if given is None else given)


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
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def valid_tokens(attention_mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """(B, T) bool of tokens that are not padding; None if there is no padding at all."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    valid = attention_mask[:, -x.shape[1] :].bool()
    return None if valid.all() else valid


def uniformity_loss(gates: Gates, valid: torch.Tensor | None) -> torch.Tensor:
    """L_unif of one router group: mean negative log of the batch-mean gates; minimum log E."""
    total = gates[0].new_zeros(())
    for gate in gates:
        mean = (gate.flatten(0, 1) if valid is None else gate[valid]).mean(0)  # (H, E)
        total = total - mean.clamp(min=1e-9).log().mean()
    return total / 2


def ambiguity_loss(gates: Gates, valid: torch.Tensor | None) -> torch.Tensor:
    """L_amb of one router group: mean of 1 - max gate over heads, axes and valid tokens."""
    total = gates[0].new_zeros(())
    for gate in gates:
        total = total + (1 - (gate if valid is None else gate[valid]).amax(-1)).mean()
    return total / 2


# Rows of states taken at once, and the most logits kept for them (128 MiB of float32). On a CPU
# they are made in tiles of LOSS_COLUMNS words: 2 MiB, so that a tile's passes stay in the cache.
LOSS_ROWS, LOSS_COLUMNS, LOSS_ELEMENTS = 512, 1024, 2**25


class LinearCrossEntropy(torch.autograd.Function):
    """Nats of targets under softmax(states @ weight.T), without a tensor of all logits.

    The gradients are computed in the forward pass, while some rows' logits are at hand: three
    matrix products as in the plain path, no logits kept for the backward pass or computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        divisor: torch.Tensor,
    ) -> torch.Tensor:
        """Summed nats over divisor. states (N, D), weight (V, D), targets (N,), -100 ignored."""
        kind = states.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        x, w = states.to(narrow), weight.to(narrow)
        wide = torch.promote_types(narrow, torch.float32)
        learns = any(ctx.needs_input_grad[:2])
        make = torch.empty if len(x) else torch.zeros  # the first rows fill them
        gradients = [make(t.shape, dtype=wide, device=t.device) for t in (x, w) if learns]
        words = w.split(LOSS_COLUMNS if kind == "cpu" else len(w))
        rows = min(LOSS_ROWS, max(64, LOSS_ELEMENTS // len(w)))
        buffer = torch.empty(rows * len(w), dtype=wide, device=x.device)
        nats = torch.zeros((), dtype=wide, device=x.device)
        for i in range(0, len(x), rows):
            part, target = x[i : i + rows], targets[i : i + rows]
            kept, target = (target != -100)[:, None], target.clamp(min=0)
            tiles, largest, totals = [], [], []  # per tile (rows, columns), (rows, 1), (rows, 1)
            chosen = nats.new_zeros(len(part), 1)
            stretches = buffer[: len(part) * len(w)].split(len(part) * len(words[0]))
            for j, (word, stretch) in enumerate(zip(words, stretches, strict=True)):
                # exp(logits - the row's largest of this tile), and its sum
                tile = set_product(stretch.view(len(part), len(word)), part, word.T)
                column = (target - j * len(words[0]))[:, None]
                here = (column >= 0) & (column < len(word))
                found = tile.gather(1, column.clamp(0, len(word) - 1))
                chosen += found.masked_fill_(~here, 0.0)
                largest.append(tile.amax(-1, keepdim=True))
                tiles.append(tile.sub_(largest[-1]).exp_())
                totals.append(tile.sum(-1, keepdim=True))
            scales = torch.stack(largest)  # (tiles, rows, 1)
            most = scales.amax(0)
            scales = (scales - most).exp_()
            total = (scales * torch.stack(totals)).sum(0)
            nats += (total.log() + most - chosen).masked_fill(~kept, 0.0).sum()
            if learns:  # d nats / d logits = softmax - one-hot
                share = kept.to(wide) / divisor
                scales *= share / total
                grad_x, grad_words = gradients[0][i : i + rows], gradients[1].split(len(words[0]))
                pairs = zip(tiles, scales, words, grad_words, strict=True)
                for j, (tile, scale, word, grad_w) in enumerate(pairs):
                    tile = tile.mul_(scale).to(narrow)
                    add_product(grad_x, tile, word, first=j == 0)
                    add_product(grad_w, tile.T, part, first=i == 0)
                grad_x.sub_(w[target] * share)
                gradients[1].index_add_(0, target, -part.to(wide) * share)
        if learns:
            ctx.save_for_backward(gradients[0].to(states.dtype), gradients[1].to(weight.dtype))
        return nats / divisor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the forward pass, scaled."""
        grad_x, grad_w = ctx.saved_tensors
        if grad.device.type == "cpu" and grad == 1:  # one pass over the head less
            return grad_x, grad_w, None, None
        return grad_x * grad, grad_w * grad, None, None


@torch.compiler.disable  # a compiler would undo the tiles that stay in place
def linear_cross_entropy(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor
) -> torch.Tensor:
    """Summed nats over divisor without all logits: liger-kernel's on CUDA where it is installed,
    ours elsewhere. Shapes as in LinearCrossEntropy."""
    if states.is_cuda and is_liger_kernel_available():
        return liger_cross_entropy(states, weight, targets, divisor)
    return LinearCrossEntropy.apply(states, weight, targets, divisor)


def liger_cross_entropy(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor
) -> torch.Tensor:
    """The same by liger-kernel's fused kernel, its sums kept in float32."""
    # by name: a checkpoint that carries this file loads where liger-kernel is not installed
    kernels = importlib.import_module("liger_kernel.transformers")
    fused = kernels.LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    return fused(weight, states, targets) / divisor


def set_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """out = a @ b in place, out in float32 or wider where a and b are narrower."""
    return torch.mm(a, b, out=out) if out.dtype == a.dtype else out.copy_(a @ b)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total += a @ b in place (first: total = a @ b), total float32 where a and b are narrower."""
    if first:
        set_product(total, a, b)
    elif total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


@dataclass
class MonetCausalLMOutput(CausalLMOutputWithPast):
    """CausalLMOutputWithPast plus the losses apart and the gates.

    loss: lm_loss, and in training the weighted auxiliary losses. lm_loss: nats per target token
    (or summed nats over num_items_in_batch). uniformity_loss, ambiguity_loss: unweighted means over
    router groups. router_probs: one (g1, g2) per router group, each (B, T, H, E).
    """

    lm_loss: torch.FloatTensor | None = None
    uniformity_loss: torch.FloatTensor | None = None
    ambiguity_loss: torch.FloatTensor | None = None
    router_probs: tuple[Gates, ...] | None = None


class MonetForCausalLM(MonetPreTrainedModel, GenerationMixin):
    """Monet with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config)
        self.model = MonetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_probs: bool = False,
        output_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> MonetCausalLMOutput:
        """Logits (B, T, V), and the loss if labels (B, T) are given (-100 is ignored).

        Training with labels leaves the logits out (None): the loss comes from tiles of them. Ask
        for them with output_logits=True.

        With num_items_in_batch (target tokens of all micro-batches and ranks of one step) the LM
        loss is summed nats over it, and the auxiliary losses are weighted by this micro-batch's
        share of it: over a step they count once, as their token-weighted mean.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        states = outputs.last_hidden_state
        logits = None
        if output_logits or labels is None or (output_logits is None and not self.training):
            keep = logits_to_keep
            logits = self.lm_head(states[:, slice(-keep, None) if isinstance(keep, int) else keep])
        losses: dict[str, torch.Tensor | None] = {}
        if labels is not None:
            losses = self._losses(labels, attention_mask, outputs, num_items_in_batch)
        return MonetCausalLMOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_probs=outputs.router_probs if output_router_probs else None,
            **losses,
        )

    def _losses(
        self,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
        outputs: MonetModelOutput,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> dict[str, torch.Tensor]:
        """loss, lm_loss and both auxiliary losses (L = L_lm + lambda L_unif + lambda L_amb)."""
        valid = valid_tokens(attention_mask, labels)
        if valid is not None:
            labels = labels.masked_fill(~valid, -100)
        targets = labels[:, 1:].flatten()
        count = (targets != -100).sum()
        items = count if num_items_in_batch is None else num_items_in_batch
        states = outputs.last_hidden_state
        lm_loss = linear_cross_entropy(
            states[:, :-1].flatten(0, 1),
            self.lm_head.weight,
            targets.to(states.device),
            torch.as_tensor(items, dtype=torch.float32, device=states.device),
        )
        groups = outputs.router_probs
        uniformity = sum(uniformity_loss(g, valid) for g in groups) / len(groups)
        ambiguity = sum(ambiguity_loss(g, valid) for g in groups) / len(groups)
        loss = lm_loss
        if self.training:
            weight = 1.0
            if num_items_in_batch is not None:
                weight = count / num_items_in_batch
            auxiliary = (
                self.config.uniformity_loss_coef * uniformity
                + self.config.ambiguity_loss_coef * ambiguity
            )
            loss = lm_loss + weight * auxiliary
        return {
            "loss": loss,
            "lm_loss": lm_loss,
            "uniformity_loss": uniformity,
            "ambiguity_loss": ambiguity,
        }


AutoConfig.register(MonetConfig.model_type, MonetConfig, exist_ok=True)
AutoModel.register(MonetConfig, MonetModel, exist_ok=True)
AutoModelForCausalLM.register(MonetConfig, MonetForCausalLM, exist_ok=True)
# save_pretrained copies this file beside the weights, so that a checkpoint loads anywhere.
MonetConfig.register_for_auto_class()
MonetModel.register_for_auto_class("AutoModel")
MonetForCausalLM.register_for_auto_class("AutoModelForCausalLM")
