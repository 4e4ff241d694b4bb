"""Models on the meta device, and one training of each on paper.

Built from the same classes and by the same functions as in training: counts follow the code. NaN
stands for what nobody can know yet. Shapes: T tokens of a row.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from tiered.baselines.modeling_lora_experts import linear_names
from tiered.config import Config
from tiered.flops import Part, lora_flops, model_flops, training_flops
from tiered.memory import Memory, checkpoint_bytes, resume_bytes, training_memory
from tiered.methods import MODELS
from tiered.modeling_tiered import WHOLE_LOGITS, Level1Embedder
from tiered.router import level1_config
from tiered.workload import UNKNOWN, Corpus, Job, Vocabulary, steps_of


@dataclass(frozen=True)
class Blueprint:
    """A model on the meta device.

    passed: what a row passes; held: what its training holds (a trunk has the parts of all
    partitions); own: parameters that are a partition's alone; updates: of a LoRA expert, widths in
    and out of every linear map with its rank; parts: FLOPs per training token.
    """

    passed: nn.Module
    held: nn.Module
    counts: dict[str, int]
    own: int
    parts: dict[str, Part]
    updates: tuple[tuple[int, int, int], ...] = ()


def blueprint(config: Config, vocabulary: Vocabulary, own_alone: bool = False) -> Blueprint:
    """The model of a config's partitions; own_alone: a trunk's shared weights are not trained."""
    kind, length = MODELS[config.model.type], config.data.block_size
    with torch.device("meta"):
        held = kind.build(kind.config_from(config, vocabulary))
    passed = held.part(0) if kind.shared else held
    counts = _counts(config, passed)
    if config.model.type == "lora":
        return _lora(config, held, counts)
    own = sum(p.numel() for p in held.part_parameters(0)) if kind.shared else counts["total"]
    if own_alone and kind.shared:
        held, parts = passed, {id(p) for p in held.part_parameters(0)}
        for parameter in passed.parameters():
            parameter.requires_grad_(id(parameter) in parts)
    return Blueprint(passed, held, counts, own, model_flops(passed, length))


def _counts(config: Config, model: nn.Module) -> dict[str, int]:
    if hasattr(model.config, "parameter_counts"):
        return model.config.parameter_counts()
    return MODELS[config.model.type].card(model, np.zeros((1, config.data.block_size)))


def _lora(config: Config, base: nn.Module, counts: dict[str, int]) -> Blueprint:
    base.requires_grad_(False)
    rank, names = config.model.lora_rank, linear_names(base)
    linears = {name: base.get_submodule(name) for name in names}
    widths = tuple((m.in_features, m.out_features, rank) for m in linears.values())
    # with the gate of every map
    own = sum(r * (i + o) + i for i, o, r in widths)
    parts = lora_flops(base, linears, rank, config.data.block_size)
    return Blueprint(base, base, counts, own, parts, widths)


@dataclass(frozen=True)
class Trained:
    """One training on paper: FLOPs in all, tokens read, bytes on a device and on disk (checkpoint:
    what is published of it; resume: one resume state)."""

    job: Job
    counts: dict[str, int]
    parts: dict[str, Part]
    tokens: float
    flops: float
    memory: Memory
    checkpoint: float
    resume: float


def memory_of(model: Blueprint, rows: int, length: int, half: bool) -> Memory:
    """Bytes of a training on one device."""
    passed = model.passed if model.held is not model.passed else None
    found = training_memory(model.held, rows, length, half, passed)
    if not model.updates:
        return found
    added = 4 * sum(rank * (i + o) for i, o, rank in model.updates)
    # an update keeps what comes out of its first factor, and under autocast a copy of what goes in
    narrow = sum((2 if half else 4) * rank + (2 * i if half else 0) for i, _, rank in model.updates)
    return replace(
        found,
        weights=found.weights + added,
        gradients=added,
        optimizer=2 * added + 4 * 2 * len(model.updates),
        copies=found.copies + (added // 2 if half else 0),
        activations=found.activations + rows * length * narrow,
        checkpointed=found.checkpointed + rows * length * narrow,
    )


def disk_of(model: Blueprint, own_alone: bool) -> tuple[float, float]:
    """Bytes that are published of one training, and of one resume state."""
    if model.updates:  # merged into the base, and apart
        own = 4 * model.own
        return checkpoint_bytes(model.held) + own, checkpoint_bytes(model.held) + 3 * own
    own = 4.0 * model.own if own_alone else checkpoint_bytes(model.held)
    return own, resume_bytes(model.held)


def embedder_training(config: Config, corpus: Corpus) -> Trained | None:
    """The Level-1 embedder's training; None for one that is no language model."""
    if config.router.embedder != "transformer":
        return None
    section, data = config.router, config.data
    with torch.device("meta"):
        model = Level1Embedder(level1_config(config, corpus.vocabulary))
    domains = tuple(d for d in config.present_domains if d not in data.added_domains)
    limit = section.tokens_per_domain
    blocks = sum(corpus.blocks(d, "router", limit=limit) for d in domains)
    passes = section.num_train_epochs * blocks
    rows = UNKNOWN if math.isnan(passes) else max(1, round(passes))
    parts, half = model_flops(model, data.block_size), config.device != "cpu"
    total = sum(p.numel() for p in model.parameters())
    table = model.tokens.weight.numel() + model.positions.weight.numel()
    counts = {
        "total": total,
        "non_embedding": total - table,
        "computed_per_token": total - model.positions.weight.numel(),
    }
    tokens, per_token = rows * data.block_size, training_flops(parts)
    if section.batch_rows * data.block_size * model.config.vocab_size > WHOLE_LOGITS:
        per_token += parts["LM head"].forward  # its logits are made twice
    return Trained(
        Job(
            "Level-1 embedder",
            (),
            domains,
            blocks,
            rows,
            steps_of(rows, section.batch_rows, 1),
            section.batch_rows,
        ),
        counts,
        parts,
        tokens,
        tokens * per_token,
        training_memory(model, section.batch_rows, data.block_size, half),
        checkpoint_bytes(model),
        resume_bytes(model),
    )
