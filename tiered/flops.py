"""FLOPs of a model on paper: the matrix products of a token's pass, by part, and hours from them.

Counted, at 2 FLOPs per multiply-add: linear maps (of experts those that a token uses; Monet
computes the factors of all of them), routers, attention's scores and values over the keys that a
causal query sees, Monet's mixing of factors by gates, the LM head. A backward pass has every
product once more for the gradient of what goes in, and once more for that of a weight, if that is
trained. Not counted: what is done entry by entry (norms, softmax, rotary angles, activations, the
loss), look-ups of embeddings, the optimizer, and what is computed a second time (by flash attention
its scores, by gradient checkpointing a forward pass).

Shapes: D hidden_size, T tokens of a row, V vocabulary. A model may be on the meta device.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Device:
    """A GPU as its data sheet has it: dense TFLOP/s in bfloat16 and in float32 without tensor cores
    (torch's default for float32 products)."""

    name: str
    bfloat16: float
    float32: float


DEVICES = (  # NVIDIA's data sheets: A100 (SXM and PCIe), H100 SXM5
    Device("A100", 312.0, 19.5),
    Device("H100", 989.0, 67.0),
)


@dataclass
class Part:
    """FLOPs of one part of a model per token; float32: autocast does not reach its products."""

    forward: float = 0.0
    backward: float = 0.0
    float32: bool = False

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def model_flops(model: nn.Module, length: int, keys: float = 0.0) -> dict[str, Part]:
    """Part -> FLOPs per token of a model in training on rows of T = length tokens.

    keys: keys that a query meets on average; 0: those that a causal mask leaves it. Monet makes no
    logits for a row's last token, which predicts nothing; a domain token is read with every row.
    """
    config, kind = model.config, model.config.model_type
    positions = length + (kind == "domain_token")  # that the layers read
    scale, parts = positions / length, {}

    def add(part: str, multiply_adds: float, trained: bool = True) -> None:
        entry = parts.setdefault(part, Part(float32=part in float32_parts(model)))
        entry.forward += 2 * multiply_adds
        entry.backward += 2 * multiply_adds * (1 + trained)

    for name, weight in model.named_parameters():
        if weight.ndim > 1 and (part := part_of(name)):
            add(part, scale * weight.numel(), weight.requires_grad)
    used = experts_used(config)
    if used:
        add("experts", scale * used)
    seen = keys or (positions + 1) / 2
    add("attention scores", scale * config.num_hidden_layers * 2 * attention_width(config) * seen)
    if kind == "monet":
        add("mixing of factors", config.num_hidden_layers * mixing(config))
    head = head_weight(model)
    rows = length - 1 if kind == "monet" else length
    add("LM head", rows / length * head.numel(), head.requires_grad)
    return parts


def forward_flops(parts: dict[str, Part]) -> float:
    """FLOPs of a token's forward pass."""
    return sum(part.forward for part in parts.values())


def training_flops(parts: dict[str, Part]) -> float:
    """FLOPs of a token's forward and backward pass."""
    return sum(part.total for part in parts.values())


def float32_flops(parts: dict[str, Part]) -> float:
    """Training FLOPs of a token whose products autocast leaves in float32."""
    return sum(part.total for part in parts.values() if part.float32)


def hours(flops: float, peak: float, utilisation: float) -> float:
    """Hours of one device; peak in TFLOP/s, utilisation as the share of it that is reached."""
    return flops / (peak * 1e12 * utilisation) / 3600


def part_of(name: str) -> str:
    """The part that a weight matrix belongs to, by its name; "" for what is looked up or added, for
    the head, and for experts of which a token uses some."""
    if any(table in name for table in ("embed_", "lm_head", "routing_gate", ".mlp.experts.")):
        return ""
    if name.startswith(("tokens.", "positions.")):  # of the Level-1 embedder
        return ""
    if ".router." in name or ".mlp.gate." in name:
        return "routers"
    if ".mlp.stream." in name:
        return "routing stream"
    if any(word in name for word in ("self_attn.", ".qkv.", ".out.")):
        return "attention maps"
    return "experts" if ".moe." in name else "feed-forward"


def float32_parts(model: nn.Module) -> tuple[str, ...]:
    """Parts whose products stay in float32 while bfloat16 autocast is on.

    Monet's and our mixture's routers switch it off; transformers' grouped product, the default for
    experts, takes the weights as they are.
    """
    kind = model.config.model_type
    grouped = getattr(model.config, "_experts_implementation", None) != "eager"
    experts = ("experts",) if grouped else ()
    return {"monet": ("routers",), "tiered_moe": ("routers", *experts), "mixtral": experts}.get(
        kind, ()
    )


def experts_used(config) -> int:
    """Multiply-adds of the SwiGLU experts that a token uses in all layers of a sparse mixture; 0
    for other families."""
    if config.model_type == "tiered_moe":
        return config.num_moe_layers * 3 * config.hidden_size * sum(config.slot_widths)
    if config.model_type == "mixtral":
        width = config.intermediate_size * config.num_experts_per_tok
        return config.num_hidden_layers * 3 * config.hidden_size * width
    return 0


def mixing(config) -> int:
    """Multiply-adds of one Monet layer that mix factors by gates: gates (H, E) times factors of
    width k on one axis, and the transposed gates of the other axis times what comes out."""
    k, axes = (
        (config.moe_dim // 2, 2) if config.moe_decompose == "vertical" else (config.moe_dim, 1)
    )
    return axes * 2 * config.moe_heads * config.moe_experts * k


def attention_width(config) -> int:
    """Width of all query heads together."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head


def head_weight(model: nn.Module) -> nn.Parameter:
    """The matrix (V, D) of the LM head; the Level-1 embedder's is its embedding."""
    if model.config.model_type == "level1_embedder":
        return model.tokens.weight
    return model.get_output_embeddings().weight


def lora_flops(base: nn.Module, linears: dict[str, nn.Linear], rank: int, length: int) -> dict:
    """Part -> FLOPs per token of training low-rank updates of the linear maps of a frozen model.

    base: its weights take no gradient. The first layer's input takes none either; its products are
    counted all the same.
    """
    parts = model_flops(base, length)
    updates = sum(rank * (linear.in_features + linear.out_features) for linear in linears.values())
    return {**parts, "low-rank updates": Part(2 * updates, 4 * updates)}
