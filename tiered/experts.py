"""Statistics of experts, Monet's and those of the OLMoE family: which ones a text used, and whose
each expert is.

Shapes: G router groups (OLMoE family: layers), E experts per axis (a Monet's expert ij has two
indices, another's one), X experts of a group, S experts of a token, H heads, B batch, T tokens.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import rel_entr, xlogy

from modeling_monet import Gates, MonetRouter, renormalized
from tiered.data import ProcessedData
from tiered.store import UserError

MASKED = 2**24  # pairs of gates that are looked through at once


@contextmanager
def record_gates(model: torch.nn.Module) -> Iterator[list[Gates]]:
    """A list that holds, once the block is left, each router group's gates of the tokens read.

    One (g1, g2) per group, each (B, tokens, H, E): in `generate`, those of the prompt and of every
    new token but the last, which is never read. Beam search reorders rows between steps: read the
    chosen sequences once more instead.
    """
    routers = [m for m in model.modules() if isinstance(m, MonetRouter)]
    steps: list[list[Gates]] = [[] for _ in routers]
    gates: list[Gates] = []
    hooks = [
        router.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[0]))
        for router, kept in zip(routers, steps, strict=True)
    ]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()
    for kept in filter(None, steps):  # none where nothing was read
        first, second = (torch.cat(axis, 1) for axis in zip(*kept, strict=True))
        gates.append((first, second))


class GroupRouting(NamedTuple):
    """What one layer (Monet: router group) did with a batch (B, T).

    sums, counts (B, X) float32: weight that each row's tokens sent through each expert, and how
    often they used it (of a Monet: how often a head kept it). index, weights (B T, S): experts of a
    token, and how much; of a Monet the heaviest one of every head. first: of a tree the first edge
    of a leaf, otherwise 0.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    first: int = 0


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A model in evaluation mode: training mode would move its running statistics."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.inference_mode()
def routing_of(model: torch.nn.Module, input_ids: torch.Tensor) -> list[GroupRouting]:
    """The routing of every layer with experts, of ids (B, T) without padding, by a model in
    evaluation mode. ValueError for a family without experts."""
    ids = input_ids.to(next(model.parameters()).device)
    config = model.config
    if config.model_type == "monet":
        out = model(input_ids=ids, output_router_probs=True, logits_to_keep=1)
        keep, renormalize = expert_masks(model)
        masks = [None] * len(out.router_probs) if keep is None else keep.to(ids.device)
        return [
            _monet_routing(g1, g2, mask, renormalize)
            for (g1, g2), mask in zip(out.router_probs, masks, strict=True)
        ]
    if config.model_type != "tiered_moe":
        raise ValueError(f"a {config.model_type} has no experts whose routing can be read")
    out = model(input_ids=ids, output_routing=True, logits_to_keep=1)
    first, found = first_leaf(model), []
    for routing in out.routing:
        index, weights = (t.view(len(ids), -1) for t in (routing.index, routing.weights.float()))
        zeros = weights.new_zeros(len(ids), config.num_experts)
        sums = zeros.scatter_add(1, index, weights)
        counts = zeros.scatter_add(1, index, (weights > 0).float())
        found.append(GroupRouting(sums, counts, routing.index, routing.weights, first))
    return found


def _monet_routing(
    g1: torch.Tensor, g2: torch.Tensor, keep: torch.Tensor | None, renormalize: bool
) -> GroupRouting:
    """Of gates (B, T, H, E) of both axes; expert ij counts as i E + j. keep (E, E) or None."""
    if keep is not None and renormalize:
        g1 = renormalized(g1, g2, keep)
    mask = 1.0 if keep is None else keep.float()
    sums, counts = (
        (torch.einsum("bthi,bthj->bij", first, second) * mask).flatten(1)
        for first, second in ((g1, g2), ((g1 > 0).float(), (g2 > 0).float()))
    )
    heads, experts = g1.shape[2:]
    pairs = g1.flatten(0, 2), g2.flatten(0, 2)  # (B T H, E)
    if keep is None:
        first, second = (axis.max(-1) for axis in pairs)
        index, weights = first.indices * experts + second.indices, first.values * second.values
    else:  # the heaviest pair that is left need not be of the heaviest halves
        step = max(1, MASKED // experts**2)
        parts = [
            (a[:, :, None] * b[:, None] * mask).flatten(1).max(-1)
            for a, b in zip(*(axis.split(step) for axis in pairs), strict=True)
        ]
        index = torch.cat([p.indices for p in parts])
        weights = torch.cat([p.values for p in parts])
    return GroupRouting(sums, counts, index.view(-1, heads), weights.view(-1, heads))


def expert_masks(model: torch.nn.Module) -> tuple[torch.Tensor | None, bool]:
    """Experts that a model has left, (G, E, E) or (G, E) bool (None: all), and whether others take
    the place of purged ones: what `purge_experts` takes."""
    masks = [b for name, b in model.named_buffers() if name.rpartition(".")[2] == "keep"]
    return (torch.stack(masks), model.config.renormalize_masked) if masks else (None, False)


def experts_shape(model: torch.nn.Module) -> tuple[int, ...]:
    """Shape of one layer's experts: (E, E) of a Monet, (E,) of another."""
    if model.config.model_type == "monet":
        return (model.config.moe_experts,) * 2
    return (model.config.num_experts,)


def first_leaf(model: torch.nn.Module) -> int:
    """Of a tree the first edge of a leaf, otherwise 0: what tokens choose begins there."""
    config = model.config
    return config.num_experts - config.units if config.model_type == "tiered_moe" else 0


def group_layers(model: torch.nn.Module) -> list[list[int]]:
    """Decoder layers of every group: a Monet's router group may serve several, and the leading
    layers of another family may have no experts."""
    config, layers = model.config, range(model.config.num_hidden_layers)
    if config.model_type == "monet":
        return [[*layers[i : i + config.moe_groups]] for i in layers[:: config.moe_groups]]
    return [[i] for i in layers[config.num_dense_layers :]]


@torch.inference_mode()
def mean_expert_weights(model: torch.nn.Module, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean weight that a token sends through every expert, (G, E, E) or (G, E), float64 on the CPU;
    of a Monet sum_h g1_hi g2_hj, so that a group's weights sum to H.

    batches: input ids (B, T) without padding. The model is read in evaluation mode.
    """
    total, tokens = None, 0
    with evaluating(model):
        for ids in filter(len, batches):  # a split without a block is one empty batch
            sums = torch.stack([g.sums.double().sum(0) for g in routing_of(model, ids)])
            total = sums if total is None else total + sums
            tokens += ids.numel()
    if total is None:
        raise ValueError("mean_expert_weights: no tokens")
    return (total / tokens).unflatten(1, experts_shape(model)).cpu()


@torch.inference_mode()
def block_expert_weights(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean over each row's tokens of the same, (B, G, E, E) or (B, G, E) float64 on the CPU.

    input_ids (B, T) without padding; the model is read in evaluation mode.
    """
    with evaluating(model):
        sums = torch.stack([g.sums for g in routing_of(model, input_ids)], 1).double()  # (B, G, X)
    return (sums / input_ids.shape[1]).unflatten(2, experts_shape(model)).cpu()


def expert_scores(
    model: torch.nn.Module,
    data: ProcessedData,
    split: str = "calibration",
    batch_rows: int = 16,
    domains: Iterable[str] | None = None,
) -> dict[str, torch.Tensor]:
    """S_D of the domains (None: all present): `mean_expert_weights` on a split's blocks."""
    scores = {}
    for domain in data.domains if domains is None else domains:
        blocks = torch.from_numpy(np.ascontiguousarray(data.blocks(domain, split), dtype=np.int64))
        if not len(blocks):
            raise UserError(f"domain {domain}: no block in its {split} split; nothing to score")
        scores[domain] = mean_expert_weights(model, blocks.split(batch_rows))
    return scores


def experts_of(scores: dict[str, torch.Tensor], domain: str, ratio: float = 2.0) -> torch.Tensor:
    """Experts that are a domain's, bool, as its scores: S_D > 0 and S_D >= ratio * every other's.

    The rest are generalists or another domain's. (arXiv:2412.04139, where ratio is 2.) Raises
    ValueError for a domain without scores or without others to compare with.
    """
    if domain not in scores or len(scores) < 2:
        raise ValueError(
            f"domain: {domain!r} and at least one other need scores, found {list(scores)}"
        )
    others = torch.stack([s for name, s in scores.items() if name != domain])
    own = scores[domain]
    return (own > 0) & (own >= ratio * others.amax(0))


def purge(
    model: torch.nn.Module,
    scores: dict[str, torch.Tensor],
    domain: str,
    ratio: float = 2.0,
    renormalize: bool = False,
) -> torch.Tensor:
    """Purge a domain's experts from a model, in place; returns them, shaped as its scores."""
    purged = experts_of(scores, domain, ratio)
    model.purge_experts(~purged, renormalize)
    return purged


# --- how experts divide domains among them -----------------------------------------------------
#
# joint (D, X): weight that domain d sends through expert x, every domain's row summing to the same.


def joint_of(scores: dict[str, torch.Tensor], first: int = 0) -> list[np.ndarray]:
    """One joint (D, X - first) per group from S of every domain, of experts from `first` on, rows
    summing to 1 / D."""
    stacked = torch.stack(list(scores.values())).flatten(2)[..., first:].double().numpy()
    rows = stacked / stacked.sum(-1, keepdims=True) / len(stacked)
    return [rows[:, group] for group in range(rows.shape[1])]


def _entropy(p: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Entropy in nats along an axis (None: of all entries); 0 log 0 = 0."""
    return -xlogy(p, p).sum(axis)


def normalised_information(joint: np.ndarray) -> float:
    """NMI of domain and expert under a joint (D, X): I(d; x) over the mean of H(d) and H(x)."""
    p = joint / joint.sum()
    by_domain, by_expert = _entropy(p.sum(1)), _entropy(p.sum(0))
    information = by_domain + by_expert - _entropy(p)
    mean = (by_domain + by_expert) / 2
    return float(information / mean) if mean > 0 else 0.0


def permuted_information(
    weights: np.ndarray, labels: np.ndarray, samples: int, generator: np.random.Generator
) -> np.ndarray:
    """`normalised_information` with the labels of documents shuffled, (samples,): what few
    documents and many experts give by chance. weights (documents, X), labels (documents,)."""
    live = weights.sum(1) > 0  # of what no expert is left to, no domain's share could be told
    weights, labels = weights[live], labels[live]
    domains, index = np.unique(labels, return_inverse=True)
    found = []
    for _ in range(samples):
        joint = np.zeros((len(domains), weights.shape[1]))
        np.add.at(joint, generator.permutation(index), weights)
        found.append(normalised_information(joint / joint.sum(1, keepdims=True)))
    return np.array(found)


def effective_numbers(joint: np.ndarray) -> tuple[float, float]:
    """Effective domains per expert and experts per domain under a joint (D, X): exp of the
    conditional entropy, mean over experts (by weight) and over domains."""
    p = joint / joint.sum()
    by_expert, by_domain = p.sum(0), p.sum(1)
    used = by_expert > 0
    domains = np.exp(_entropy(p[:, used] / by_expert[used], 0))
    experts = np.exp(_entropy(p / by_domain[:, None], 1))
    return float(domains @ by_expert[used]), float(experts @ by_domain)


def divergences(joint: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits between the experts of every two domains, (D, D)."""
    rows = joint / joint.sum(1, keepdims=True)
    found = []
    for row in rows:
        mean = (rows + row) / 2
        found.append((rel_entr(rows, mean) + rel_entr(row, mean)).sum(1) / 2)
    # of nearly equal rows the sum of tiny terms of both signs may end below 0
    return np.maximum(found, 0) / np.log(2)
