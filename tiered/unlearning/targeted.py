"""Gradient methods with a narrower aim: hidden states (RMU), logits (UNDIAL), experts (SEUF).

Shapes: B blocks, T tokens per block, S = T - 1 predicted positions, D hidden size, V vocabulary,
G router groups, E experts per axis of a Monet, X experts of a group.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from modeling_monet import MonetMoHDE
from tiered.metrics import NOT_APPLICABLE
from tiered.unlearning.gradient import Method, Task, descend, retain_loss
from tiered.unlearning.systems import NotApplicable

TARGETED_CODE = ("tiered/unlearning/targeted.py",)
RMU_LAYERS = 3  # trained: the steered one and those before it


# --- RMU --------------------------------------------------------------------------------------


def rmu(model: nn.Module, task: Task) -> dict[str, Any]:
    """Representation misdirection (arXiv:2403.03218): hidden states of the forget set are drawn
    to one random direction, those of the rest to what they were.

    The direction's length is `rmu_steering` times the original state's, token by token (adaptive
    RMU, arXiv:2408.06223), since a fixed one fits one model's scale only. Trained are the
    feed-forward blocks or experts of the layer and the two before it.
    """
    section, layers = task.section, model.base_model.layers
    depth = section.rmu_layer or math.ceil(len(layers) / 2)
    if depth > len(layers):
        raise NotApplicable(f"{NOT_APPLICABLE}: unlearn.rmu_layer {depth} of {len(layers)} layers")
    original = copy.deepcopy(model).eval()
    direction = task.generator("RMU direction").random(model.config.hidden_size)
    unit = torch.from_numpy(direction / np.linalg.norm(direction)).float().to(model.device)
    own = {id(p) for p in model.parameters() if p.requires_grad}  # the others are not its alone
    model.requires_grad_(False)
    for layer in layers[max(0, depth - RMU_LAYERS) : depth]:
        block = layer.moe if hasattr(layer, "moe") else layer.mlp
        for name, parameter in block.named_parameters():
            # all but a Mixtral's router
            parameter.requires_grad_(name != "gate.weight" and id(parameter) in own)
    if not any(p.requires_grad for p in model.parameters()):
        raise NotApplicable(f"{NOT_APPLICABLE}: its layers are shared by all partitions")

    def loss(m: nn.Module, forget: torch.Tensor, retain: torch.Tensor, _: float) -> torch.Tensor:
        with torch.no_grad():
            before = hidden_states(original, forget, depth)
        target = section.rmu_steering * before.norm(dim=-1, keepdim=True) * unit
        total = F.mse_loss(hidden_states(m, forget, depth), target)
        if len(retain) and section.rmu_retain_weight:
            with torch.no_grad():
                kept = hidden_states(original, retain, depth)
            total = total + section.rmu_retain_weight * F.mse_loss(
                hidden_states(m, retain, depth), kept
            )
        return total

    return descend(model, task, "RMU", loss, "forget retain") | {"layer": depth}


def hidden_states(model: nn.Module, ids: torch.Tensor, depth: int) -> torch.Tensor:
    """States (B, T, D) after `depth` layers, float32; those of the last are normalised."""
    out = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)
    return out.hidden_states[depth].float()


# --- UNDIAL -----------------------------------------------------------------------------------


def undial_loss(
    logits: torch.Tensor, original: torch.Tensor, targets: torch.Tensor, strength: float
) -> torch.Tensor:
    """Cross-entropy of logits (N, V) against the original's with `strength` taken off the right
    token's: softmax(z_o - strength 1[v = x]) (UNDIAL, arXiv:2402.10052); targets (N,)."""
    adjusted = original.scatter_add(
        1, targets[:, None], torch.full_like(targets[:, None], -strength, dtype=original.dtype)
    )
    return F.cross_entropy(logits, adjusted.softmax(-1))


def undial(model: nn.Module, task: Task) -> dict[str, Any]:
    """Self-distillation from the original's adjusted logits: a bounded aim, unlike ascent's."""
    section, original = task.section, copy.deepcopy(model).eval()

    def loss(m: nn.Module, forget: torch.Tensor, retain: torch.Tensor, _: float) -> torch.Tensor:
        with torch.no_grad():
            before = _logits(original, forget)
        targets = forget[:, 1:].flatten()
        own = undial_loss(_logits(m, forget), before, targets, section.undial_strength)
        return own + retain_loss(m, retain, section.retain_weight)

    return descend(model, task, "UNDIAL", loss, "forget retain")


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Float32 logits (B S, V) of tokens 1..T-1 of blocks (B, T)."""
    return model(input_ids=ids[:, :-1], use_cache=False).logits.float().flatten(0, 1)


# --- SEUF ---------------------------------------------------------------------------------------


def seuf(model: nn.Module, task: Task) -> dict[str, Any]:
    """Selected-expert unlearning (arXiv:2411.18797): GradDiff on the experts that the forget set
    engages most and on the routers, whose gates on the forget set are anchored to the original's.

    Adapted: `seuf_experts` of every router group, since one of a Monet's E^2 holds next to nothing
    (an expert ij of a Monet shares its factors with all i* and *j); the anchor is all gates as they
    were, where the paper's is 1 on its one expert.
    """
    section = task.section
    if not expert_blocks(model):
        raise NotApplicable(f"{NOT_APPLICABLE}: a {model.config.model_type} has no experts")
    original = copy.deepcopy(model).eval()
    rows = torch.from_numpy(np.asarray(task.forget[: section.check_rows], dtype=np.int64))
    chosen = most_engaged(model, rows.split(section.batch_rows), section.seuf_experts)

    def loss(m: nn.Module, forget: torch.Tensor, retain: torch.Tensor, _: float) -> torch.Tensor:
        with torch.no_grad():
            _, before = gates(original, forget)
        logits, after = gates(m, forget)
        ascent = -F.cross_entropy(logits.flatten(0, 1), forget[:, 1:].flatten())
        kept = retain_loss(m, retain, section.retain_weight)
        return ascent + kept + section.seuf_anchor_weight * anchor_loss(after, before)

    with only_experts(model, chosen):
        record = descend(model, task, "SEUF", loss, "forget retain")
    return record | {"experts": [group.tolist() for group in chosen]}


def anchor_loss(after: list[torch.Tensor], before: list[torch.Tensor]) -> torch.Tensor:
    """Squared distance of a router's probabilities, mean over tokens and routers (a Monet's heads
    and axes are routers of their own)."""
    parts = [(a - b).square().sum(-1).mean() for a, b in zip(after, before, strict=True)]
    return torch.stack(parts).mean()


def gates(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits (B, S, V) of tokens 1..T-1 of blocks (B, T), and the routing probabilities behind
    them: (B, S, H, E) per axis and group of a Monet, (B S, X) per layer of a Mixtral."""
    if model.config.model_type == "monet":
        out = model(input_ids=ids[:, :-1], use_cache=False, output_router_probs=True)
        return out.logits.float(), [g.float() for pair in out.router_probs for g in pair]
    out = model(input_ids=ids[:, :-1], use_cache=False, output_router_logits=True)
    return out.logits.float(), [z.float().softmax(-1) for z in out.router_logits]


def expert_blocks(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """(router group, experts of one layer), for families that have experts."""
    if model.config.model_type == "monet":
        width = model.config.moe_groups
        return [(i // width, layer.moe) for i, layer in enumerate(model.base_model.layers)]
    blocks = [m for m in model.modules() if isinstance(m, MixtralSparseMoeBlock)]
    return list(enumerate(blocks))


@torch.no_grad()
def most_engaged(
    model: nn.Module, batches: tuple[torch.Tensor, ...], count: int
) -> list[torch.Tensor]:
    """Per group the `count` experts with the largest mean weight on blocks (B, T): (count, 2) pairs
    i, j of a Monet, (count, 1) of a Mixtral; in order of weight, ties by index."""
    totals: list[Any] = [0.0] * len({group for group, _ in expert_blocks(model)})
    for ids in batches:
        _, found = gates(model, ids.to(model.device))
        if model.config.model_type == "monet":
            pairs = zip(found[::2], found[1::2], strict=True)
            found = [torch.einsum("bthi,bthj->ij", g1, g2) for g1, g2 in pairs]
        else:
            found = [z.sum(0) for z in found]
        totals = [a + b.double() for a, b in zip(totals, found, strict=True)]
    chosen = []
    for total in totals:
        order = total.flatten().argsort(descending=True, stable=True)[:count]
        chosen.append(torch.stack(torch.unravel_index(order, total.shape), 1).cpu())
    return chosen


@contextmanager
def only_experts(model: nn.Module, chosen: list[torch.Tensor]) -> Iterator[None]:
    """Inside, gradients reach the chosen experts' weights and the routers alone: all others' are
    exactly 0, so that AdamW without decay leaves them as they are, bit for bit."""
    model.requires_grad_(False)
    hooks = []
    for group, block in expert_blocks(model):
        for parameter, mask in expert_entries(block, chosen[group]):
            parameter.requires_grad_(True)
            mask = mask.to(parameter.device)
            hooks.append(parameter.register_hook(lambda grad, mask=mask: grad * mask))
    for name, parameter in model.named_parameters():
        # a Monet's router.w1, w2; a Mixtral's gate
        if ".router." in name or name.endswith("gate.weight"):
            parameter.requires_grad_(True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def expert_entries(
    block: nn.Module, chosen: torch.Tensor
) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """(parameter, bool mask that broadcasts to it) of the chosen experts of one layer."""
    if isinstance(block, MixtralSparseMoeBlock):
        experts = block.experts
        mask = _selected(chosen[:, 0], experts.num_experts)[:, None, None]
        yield experts.gate_up_proj, mask
        yield experts.down_proj, mask
        return
    on_i, on_j = (_selected(index, block.num_experts) for index in chosen.unbind(1))
    if isinstance(block, MonetMoHDE):
        width = block.u.out_features // block.num_experts
        sides = [(on_i, (block.u,), (), None), (on_j, (), (block.v,), block.b)]
    else:
        width = block.u1.out_features // block.num_experts
        sides = [
            (on_i, (block.u1,), (block.v11, block.v12), block.b1),
            (on_j, (block.u2,), (block.v21, block.v22), block.b2),
        ]
    for on, ups, downs, bias in sides:
        units = on.repeat_interleave(width)  # rows of u*, columns of v* are expert-major
        for up in ups:
            yield up.weight, units[:, None]
            yield up.bias, units
        for down in downs:
            yield down.weight, units
        if bias is not None:
            yield bias, on[:, None]


def _selected(index: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, index, True)


METHODS: dict[str, Method] = {
    "RMU": Method(rmu, ("rmu_layer", "rmu_steering", "rmu_retain_weight"), code=TARGETED_CODE),
    "UNDIAL": Method(undial, ("retain_weight", "undial_strength"), code=TARGETED_CODE),
    "SEUF": Method(
        seuf,
        ("retain_weight", "seuf_experts", "seuf_anchor_weight"),
        needs_retain=True,
        code=TARGETED_CODE,
    ),
}
