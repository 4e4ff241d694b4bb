"""Bytes on paper: what training holds on a device, and what a run keeps on disk.

Training holds float32 weights, their gradients and AdamW's two moments; under bfloat16 autocast a
copy of every weight that it casts; what the forward pass keeps for the backward pass; and the block
in which the loss is made. The CUDA context (about half a GB) and the allocator's gaps come on top:
`USABLE`.

Kept for the backward pass, per token: of every norm its input and its normalised input (float32);
of every linear map its input; of fused attention queries, keys, values, output and one sum per head
(no scores); of a SwiGLU block of width I gate, its activation, up and their product (4 I); of a
sparse mixture that, the token's copy and the output for each expert that it uses. Of a Monet layer
with E experts per axis of width m and H heads: vertical 4 E m + H m, horizontal 3 E m + H m, the
sums of gates, and per router group the gates of both axes (2 H E) with a mask. Under autocast every
linear map keeps a bfloat16 copy of its own of a float32 input, every Monet layer some of its gates.
With gradient checkpointing a layer keeps its input (the first of a router group its gates too), and
one layer at a time the above.

Shapes: B rows of a micro-batch, T tokens of a row, D hidden_size, V vocabulary.
"""

from dataclasses import dataclass

from torch import nn

from tiered.flops import attention_width, float32_parts, head_weight, part_of

USABLE = 0.9  # of a device's memory: its context and the allocator's gaps take the rest
LOSS_ROWS, LOSS_ELEMENTS = 512, 2**25  # as in modeling_monet.py
WHOLE_LOGITS = 2**28  # as in modeling_tiered.py


@dataclass(frozen=True)
class Memory:
    """Bytes that training a model holds on one device.

    copies: bfloat16 copies of weights; activations: kept by a whole forward pass; checkpointed:
    what takes their place under gradient checkpointing; loss: the block that makes it.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    checkpointed: int
    loss: int

    def total(self, checkpointing: bool = False) -> int:
        """All of it together."""
        kept = self.checkpointed if checkpointing else self.activations
        return self.weights + self.gradients + self.optimizer + self.copies + kept + self.loss

    def devices(self, gigabytes: int, checkpointing: bool = False) -> int:
        """Devices of so many GB (1e9 bytes) that hold it, if it could be cut anywhere."""
        return -int(-self.total(checkpointing) // (gigabytes * 1e9 * USABLE))


def training_memory(
    model: nn.Module, rows: int, length: int, half: bool, layers_of: nn.Module | None = None
) -> Memory:
    """Memory of training on micro-batches of `rows` rows; half: under bfloat16 autocast.

    layers_of: the model whose layers a row passes, if that is a part of this one.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    passed = layers_of or model
    kept, loss = (
        activation_bytes(passed, rows, length, half),
        loss_bytes(passed, rows, length, half),
    )
    return Memory(
        weights=model_bytes(model),
        gradients=gradients,
        # two moments, and a float32 count of steps per tensor
        optimizer=2 * gradients + 4 * len(trained),
        copies=copied_bytes(model) if half else 0,
        activations=kept,
        checkpointed=checkpointed_bytes(passed, rows, length, half),
        loss=sum(loss),
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def copied_bytes(model: nn.Module) -> int:
    """Bytes of the bfloat16 copies of weight matrices that autocast casts."""
    skipped = float32_parts(model)
    found = head_weight(model).numel()
    for name, weight in model.named_parameters():
        part = "experts" if ".mlp.experts." in name else part_of(name)
        found += weight.numel() if weight.ndim > 1 and part and part not in skipped else 0
    return 2 * found


# ---------------------------------------------------------------- activations


def activation_bytes(model: nn.Module, rows: int, length: int, half: bool) -> int:
    """Bytes that a forward pass on B x T tokens keeps for the backward pass, the loss apart."""
    config = model.config
    tokens = rows * (length + (config.model_type == "domain_token"))
    layers = sum(layer_bytes(config, i, half) for i in range(config.num_hidden_layers))
    return round(tokens * (layers + _ends(config, half)))


def checkpointed_bytes(model: nn.Module, rows: int, length: int, half: bool) -> int:
    """The same under gradient checkpointing: every layer's input, and one layer's inside."""
    config = model.config
    tokens = rows * (length + (config.model_type == "domain_token"))
    inside = [layer_bytes(config, i, half) for i in range(config.num_hidden_layers)]
    kept = 4 * config.hidden_size * config.num_hidden_layers
    if config.model_type == "monet":
        # without the masks, which are inside
        kept += config.num_routers * (_gates(config) - 2 * config.moe_heads * config.moe_experts)
    if config.model_type == "tiered_moe":  # scores, which the router z-loss is made from
        kept += config.num_moe_layers * 4 * (config.num_experts + 1)
    return round(tokens * (kept + max(inside) + _ends(config, half)))


def _ends(config, half: bool) -> float:
    """Bytes per token outside of the layers: the ids, the final norm, the head's input."""
    d = config.hidden_size
    head = 0 if config.model_type == "monet" else (2 if half else 4) * d  # Monet's is in the loss
    norm = 4 * (d + 2) if config.model_type == "level1_embedder" else _norm(d)
    return 8 + norm + head


def _norm(width: int) -> int:
    """Bytes per token that an RMSNorm keeps: its input, that normalised, and the scale."""
    return 4 * (2 * width + 1)


def layer_bytes(config, layer: int, half: bool) -> float:
    """Bytes per token that layer number `layer` keeps (see the head of this file)."""
    d, n, kind = config.hidden_size, 2 if half else 4, config.model_type
    if kind == "level1_embedder":  # LayerNorms; an explicit mask, T entries of a token
        inside = n * (14 * d + config.max_position_embeddings) + 4 * config.num_attention_heads
        return 2 * 4 * (d + 2) + inside
    width = attention_width(config)
    kv_width = width // config.num_attention_heads * config.num_key_value_heads
    attention = n * (2 * width + 2 * kv_width) + 4 * config.num_attention_heads
    attention += n * d * (3 if half else 1)  # the input of three maps
    found = 2 * _norm(d) + attention
    if kind == "monet":
        return found + _monet_bytes(config, layer % config.moe_groups == 0, half)
    if kind == "tiered_moe":
        for norm in (width, kv_width):  # of queries and keys
            found += 6 * norm + 4 if half else _norm(norm)
        if layer < config.num_dense_layers:
            return found + _swiglu(d, config.dense_width, half)
        z, shared = config.routing_stream_size, config.num_shared_experts
        found += _sparse(d, config.slot_widths, 2 * config.units)
        found += _swiglu(d, shared * config.intermediate_size, half, 1) if shared else 0
        return found + (n * (3 * z + half * 2 * d) + _norm(z) + 4 * z if z else 0)
    if kind == "mixtral":
        slots = [config.intermediate_size] * config.num_experts_per_tok
        return found + _sparse(d, slots, config.num_local_experts) + (2 * d if half else 0)
    return found + _swiglu(d, config.intermediate_size, half)


def _swiglu(d: int, width: int, half: bool, shared: int = 0) -> int:
    """A SwiGLU block and its input; shared: inputs that something else keeps already."""
    return (2 if half else 4) * (4 * width + d * (2 if half else 1 - shared))


def _sparse(d: int, slots: list[int], scores: int) -> int:
    """Experts by transformers' grouped product, float32 under autocast too: the router's input and
    scores, and per expert its block, the token's copy, its output, indices and weight."""
    return 4 * (d + scores) + sum(4 * (4 * width + 2 * d) + 40 for width in slots)


def _gates(config) -> int:
    """Bytes per token of a router group: gates of both axes, their mask, their largest."""
    count = 2 * config.moe_heads * config.moe_experts
    return 4 * count + count + 4 * 2 * config.moe_heads


def _monet_bytes(config, routes: bool, half: bool) -> float:
    """A Monet layer's experts, and its gates if it routes."""
    n, d, e, heads = 2 if half else 4, config.hidden_size, config.moe_experts, config.moe_heads
    vertical = config.moe_decompose == "vertical"
    axes = 2 if vertical else 1
    found = n * ((3 + vertical) * e * config.moe_dim + heads * config.moe_dim)
    # sums of gates over heads (a vertical layer multiplies by them too, in float32), inputs
    found += n * axes * e + (4 * axes * e if half and vertical else 0)
    found += n * d * (axes if half else 1)
    found += axes * 2 * 2 * heads * e if half else 0  # bfloat16 copies of the gates
    if routes:
        found += _gates(config) + (4 * d if half else 0)
    return found


def loss_bytes(model: nn.Module, rows: int, length: int, half: bool) -> tuple[int, int]:
    """Bytes of the block that makes the loss: kept until the backward pass, and passing.

    Monet makes logits of some rows at a time and both gradients with them: kept are the gradients
    (V, D) and (B T, D). Others keep the log-softmax of all logits (B T, V), and hold the logits and
    their gradient beside it; the Level-1 embedder keeps the states (B T, D) instead where there are
    more than WHOLE_LOGITS, and makes an eighth of that many at a time.
    """
    vocabulary, d = head_weight(model).shape
    if model.config.model_type != "monet":
        logits = rows * length * vocabulary
        if model.config.model_type == "level1_embedder" and logits > WHOLE_LOGITS:
            some = max(1, WHOLE_LOGITS // 8 // vocabulary) * vocabulary
            return 4 * d * rows * (length - 1), 4 * some + (2 + 4 + 2 if half else 4 + 4) * some
        return 4 * logits, (2 + 4 + 2 if half else 4 + 4) * logits
    some = min(LOSS_ROWS, max(64, LOSS_ELEMENTS // vocabulary))
    kept = 4 * d * (vocabulary + rows * (length - 1))
    return kept, some * vocabulary * (4 + (2 + 2 if half else 0))


# ---------------------------------------------------------------- disk

ID_BYTES = 16  # a document's id: hexadecimal digits


def processed_bytes(tokens: float, documents: float) -> float:
    """Arrow's: int32 ids, uint16 bytes and characters of every token (separators too); of every
    document its id, an offset of it, and one of each of the three lists."""
    return tokens * (4 + 2 + 2) + documents * (ID_BYTES + 4 * 4)


def clean_bytes(text_bytes: float, documents: float) -> float:
    """Parquet's before its compression: the text, a position (uint64) and an id per document."""
    return text_bytes + documents * (8 + ID_BYTES)


def resume_bytes(model: nn.Module) -> int:
    """One resume checkpoint: weights, buffers that are saved, AdamW's state."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return checkpoint_bytes(model) + 8 * sum(trained) + 4 * len(trained)


def checkpoint_bytes(model: nn.Module) -> int:
    """Tensors of model.safetensors, float32."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}  # tied ones once
    return sum(t.numel() * t.element_size() for t in tensors.values())


def score_bytes(positions: float, z: bool = False) -> float:
    """Cached scores of so many predicted tokens by one model: nats, a bool, and z if asked for."""
    return positions * (4 + 1 + (4 if z else 0))
