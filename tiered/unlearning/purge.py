"""Operations that leave experts out (a Monet's, the OLMoE family's), random controls, a reset.

Masks are chosen on calibration rows, which nothing else scores, inside each partition that holds
the domain: an expert is told from others by what the domains of its own partition send through it.
The weights stay in the checkpoint (halves of a Monet's purged experts serve others), so no mask is
exact.

Shapes: G router groups (layers), E experts per axis; masks are (G, E, E) of a Monet, whose expert
ij has two indices, and (G, E) of others.
"""

import copy
import math
import time
from collections.abc import Callable

import numpy as np
import torch

from tiered.config import HAVE_EXPERTS
from tiered.experts import expert_scores, experts_of
from tiered.metrics import NOT_APPLICABLE
from tiered.record import training_environment
from tiered.router import load_models
from tiered.sealed import read_tensors, write_tensors
from tiered.store import code_hash, content_hash, digest, seed_of
from tiered.unlearning.systems import Context, Forget, NotApplicable, Outcome, edited

PURGE_CODE = ("tiered/unlearning/purge.py",)
Scores = dict[str, torch.Tensor]  # domain -> mean weight of every expert (G, E, E) float64
Masks = dict[int, torch.Tensor]  # partition -> experts that are purged (G, E, E) bool


# --- which experts ------------------------------------------------------------------------------


def domain_share(scores: Scores, domain: str) -> torch.Tensor:
    """Share of every expert's weight that a domain sends it, all domains alike, (G, E, E)."""
    total = torch.stack(list(scores.values())).sum(0)
    return scores[domain] / total.clamp_min(torch.finfo(total.dtype).tiny)


def purged_mass(scores: Scores, domain: str, purged: torch.Tensor) -> float:
    """kappa: the share of a domain's routing mass that a purge removes, mean over groups."""
    own = scores[domain].flatten(1)
    return float(((own * purged.flatten(1)).sum(1) / own.sum(1)).mean())


def most_shared(scores: Scores, domain: str, percent: float) -> torch.Tensor:
    """The `percent` of each group's experts with the largest share of the domain (ties: first)."""
    share = domain_share(scores, domain).flatten(1)
    count = math.ceil(round(percent / 100 * share.shape[1], 9))  # 7 % of 100 is 7.000...01
    order = torch.argsort(share, dim=1, descending=True, stable=True)[:, :count]
    purged = torch.zeros_like(share, dtype=torch.bool).scatter_(1, order, True)
    return purged.view_as(scores[domain])


def most_shared_mass(scores: Scores, domain: str, mass: float) -> torch.Tensor:
    """Each group's experts in order of their share of the domain, until they hold `mass` of it."""
    share = domain_share(scores, domain).flatten(1)
    order = torch.argsort(share, dim=1, descending=True, stable=True)
    own = scores[domain].flatten(1).gather(1, order)
    before = own.cumsum(1) - own
    chosen = before < mass * own.sum(1, keepdim=True) - 1e-12
    return torch.zeros_like(chosen).scatter_(1, order, chosen).view_as(scores[domain])


def random_of_size(purged: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """As many experts of each group, drawn uniformly."""
    flat = purged.flatten(1)
    drawn = torch.zeros_like(flat)
    for group, count in enumerate(flat.sum(1).tolist()):
        drawn[group, generator.permutation(flat.shape[1])[:count]] = True
    return drawn.view_as(purged)


def random_of_mass(
    own: torch.Tensor, purged: torch.Tensor, generator: np.random.Generator
) -> torch.Tensor:
    """Experts of each group in random order, until they hold nearest to the domain's mass that
    `purged` holds; own (G, E, E): the domain's weights."""
    flat, weights = purged.flatten(1), own.flatten(1)
    drawn = torch.zeros_like(flat)
    for group in range(len(flat)):
        order = generator.permutation(flat.shape[1])
        target = float(weights[group][flat[group]].sum())
        held = np.concatenate([[0.0], np.cumsum(weights[group][order].numpy())])
        drawn[group, order[: int(np.argmin(np.abs(held - target)))]] = True
    return drawn.view_as(purged)


def calibration_scores(context: Context, forget: Forget, k: int) -> Scores:
    """S of every domain of partition k under its model, on calibration blocks; kept in the store.

    Raises NotApplicable where there is nothing to choose experts by.
    """
    domains = [d for d in context.data.domains if d in context.partitions.members[k]]
    if context.config.model.type not in HAVE_EXPERTS:
        raise NotApplicable(f"{NOT_APPLICABLE}: a {context.config.model.type} has no such experts")
    if forget.documents:
        raise NotApplicable(f"{NOT_APPLICABLE}: experts are told apart by domain")
    if len(domains) < 2:
        raise NotApplicable(f"{NOT_APPLICABLE}: its partition holds no other domain")
    key = digest(
        {
            "model": content_hash(context.models[k]),
            "data": {d: context.data.split_hash(d, "calibration") for d in domains},
            "batch_rows": context.config.eval.batch_rows,
            "environment": training_environment(context.config),
            "code": code_hash("tiered/experts.py"),
        }
    )
    path = context.config.store_dir / "expert_scores" / f"{key}.safetensors"
    if path.is_file() and not context.config.overwrite:
        return read_tensors(path)
    model = load_models({k: context.models[k]})[k]
    scores = expert_scores(
        model, context.data, batch_rows=context.config.eval.batch_rows, domains=domains
    )
    write_tensors(path, scores)
    return scores


def skew_masks(context: Context, forget: Forget) -> dict[int, tuple[Scores, torch.Tensor]]:
    """Partition -> its scores, and the experts that are the domain's at unlearn.mask_ratio."""
    ratio, found = context.config.unlearn.mask_ratio, {}
    for k in context.touched(forget):
        scores = calibration_scores(context, forget, k)
        found[k] = scores, experts_of(scores, forget.domain, ratio)
    if not any(purged.any() for _, purged in found.values()):
        raise NotApplicable(f"{NOT_APPLICABLE}: no expert is {forget.domain}'s at {ratio:g} times")
    return found


def random_masks(context: Context, forget: Forget, kind: str, draw: int) -> Masks:
    """A random control of mask-skew: `mask-random` (as many experts) or `mask-massmatched`."""
    masks = {}
    for k, (scores, purged) in skew_masks(context, forget).items():
        seed = seed_of(context.config.seed, kind, draw, context.partitions.identity(k))
        generator = np.random.default_rng(seed)
        if kind == "mask-random":
            masks[k] = random_of_size(purged, generator)
        else:
            masks[k] = random_of_mass(scores[forget.domain], purged, generator)
    return masks


# --- operations -----------------------------------------------------------------------------


def _masked(context: Context, masks: Callable[[], Masks]) -> Outcome:
    """The run with experts left out."""
    begin, changed = time.perf_counter(), {}
    for k, purged in masks().items():
        inputs = {"operation": "purge", "mask": mask_hash(purged)}

        def make(model: torch.nn.Module, purged: torch.Tensor = purged) -> dict:
            model.purge_experts(~purged)
            return {"tokens": 0, "purged": purged.flatten(1).sum(1).tolist()}

        changed[k] = edited(context, k, inputs, make, PURGE_CODE, begin)
        begin = time.perf_counter()
    return Outcome.of_edits(context, changed)


def mask_hash(purged: torch.Tensor) -> str:
    """Hash of a mask's shape and entries."""
    return digest([list(purged.shape), purged.nonzero().tolist()])


def mask_skew(context: Context, forget: Forget) -> Outcome:
    """Purge the experts whose weight under the domain is mask_ratio times every other's."""
    return _masked(
        context,
        lambda: {k: purged for k, (_, purged) in skew_masks(context, forget).items()},
    )


def mask_topshare(context: Context, forget: Forget) -> Outcome:
    """Purge mask_topshare percent of the experts: those with the largest share of the domain."""
    percent = context.config.unlearn.mask_topshare
    return _masked(
        context,
        lambda: {
            k: most_shared(calibration_scores(context, forget, k), forget.domain, percent)
            for k in context.touched(forget)
        },
    )


def mask_mass(context: Context, forget: Forget) -> Outcome:
    """Purge experts in order of the domain's share until mask_mass of its mass is gone."""
    mass = context.config.unlearn.mask_mass
    return _masked(
        context,
        lambda: {
            k: most_shared_mass(calibration_scores(context, forget, k), forget.domain, mass)
            for k in context.touched(forget)
        },
    )


def mask_random(context: Context, forget: Forget) -> Outcome:
    """Control: as many experts as mask-skew purges, at random (the first of random_masks draws)."""
    return _masked(context, lambda: random_masks(context, forget, "mask-random", 0))


def mask_massmatched(context: Context, forget: Forget) -> Outcome:
    """Control: random experts that hold as much of the domain's mass as mask-skew purges."""
    return _masked(
        context,
        lambda: random_masks(context, forget, "mask-massmatched", 0),
    )


def reinit(context: Context, forget: Forget) -> Outcome:
    """Control: the models of the partitions that hold the domain, reset to random weights."""
    begin, changed = time.perf_counter(), {}
    for k in context.touched(forget):

        def make(model: torch.nn.Module, k: int = k) -> dict:
            seed = seed_of(context.config.seed, "train", context.partitions.identity(k))
            torch.manual_seed(seed)
            state = type(model)(copy.deepcopy(model.config)).state_dict()
            kept = {n for n, p in model.named_parameters() if not p.requires_grad}  # of others, too
            model.load_state_dict({n: w for n, w in state.items() if n not in kept}, strict=False)
            return {"tokens": 0}

        changed[k] = edited(context, k, {"operation": "reinit"}, make, PURGE_CODE, begin)
        begin = time.perf_counter()
    outcome = Outcome.of_edits(context, changed)
    outcome.weights_removed = True
    return outcome
