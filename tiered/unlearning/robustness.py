"""What comes back: relearning from a few rows, and rounded weights.

Relearning fine-tunes the models that the forget set's text reaches in a system, in the unlearnt one
and in gold alike, on a fixed share of the members, and reads the loss on the others on the way.
Rounding (round-to-nearest, one scale per output row) can undo an edit that moved weights little.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tiered.data import Rows
from tiered.evaluation import score_cache
from tiered.modeling_tiered import TieredForCausalLM
from tiered.store import code_hash, digest, seed_of
from tiered.unlearning.gradient import cycled, nll
from tiered.unlearning.protocol import ATTACKED, ScoredRows, Scorer, Scores
from tiered.unlearning.systems import Context, Forget

ROUNDING_BITS = {"int8": 8, "int4": 4}
BIASES = ("bias", "b", "b1", "b2")  # the last three: one row per expert of a Monet's axis


def relearn_rows(context: Context, forget: Forget) -> tuple[Rows, Rows]:
    """R_f, the share of the members that is relearnt (at least one row), and others to read.

    Drawn from the seed alone: the same rows for every system of a forget set.
    """
    section = context.config.unlearn
    members = context.members(forget, 0)
    count = len(members.document_ids)
    generator = np.random.default_rng(seed_of(context.config.seed, "relearn", forget.identity()))
    chosen = np.zeros(count, dtype=bool)
    chosen[generator.permutation(count)[: max(1, round(section.relearn_share * count))]] = True
    return members.only(chosen), members.only(~chosen, section.forget_rows)


def relearn_steps(most: int) -> list[int]:
    """Steps at which the loss is read: 0, 1, 2, 4, ... up to `most`."""
    steps = [0]
    while 2 ** (len(steps) - 1) <= most:
        steps.append(2 ** (len(steps) - 1))
    return steps


def relearn_curve(
    context: Context,
    forget: Forget,
    model: TieredForCausalLM,
    allowed: list[int] | None = None,
) -> dict[str, Any]:
    """Bits per byte of the other members after 0, 1, 2, 4, ... steps on the relearn rows, and the
    nats and bytes of each of those members behind them.

    Every model that the relearn rows are routed to takes as many steps, on the rows that reach it
    (by their last prefix); AdamW, evaluation mode. The model is changed in place.
    """
    section = context.config.unlearn
    relearnt, others = relearn_rows(context, forget)
    scorer = Scorer(context, model, None, allowed)
    _, assignment = scorer.tokens(relearnt.input_ids)
    reached = assignment[:, -1].numpy()
    learners = [
        _learner(model.partitions[str(k)], relearnt.input_ids[reached == k], context, forget, k)
        for k in np.unique(reached).tolist()
    ]
    steps, curve, nats = relearn_steps(section.relearn_steps), [], []
    for before, step in zip([0, *steps], steps, strict=False):
        for _ in range(step - before):
            for learner in learners:
                next(learner)
        found = scorer.rows(others, attacked=False)
        curve.append(round(found.bpb(), 6))
        nats.append(found.loss_nats.round(4).tolist())
    return {
        "steps": steps,
        "bpb": curve,
        "models": np.unique(reached).tolist(),
        "loss_nats": nats,  # (steps, rows)
        "num_bytes": found.num_bytes.tolist(),
    }


def _learner(
    model: torch.nn.Module, ids: np.ndarray, context: Context, forget: Forget, k: int
) -> Iterator[None]:
    """Every turn is one optimizer step of a partition's model on its rows (R, T)."""
    section = context.config.unlearn
    seed = seed_of(context.config.seed, "relearn", forget.identity(), k)
    batches = cycled(ids, min(section.batch_rows, len(ids)), np.random.default_rng(seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = section.relearn_learning_rate
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    model.eval()
    for batch in batches:
        loss = nll(model, torch.from_numpy(batch).to(parameters[0].device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield


@torch.no_grad()
def round_weights(model: torch.nn.Module, bits: int) -> None:
    """Round every matrix to nearest on a symmetric grid of `bits` bits, in place.

    One scale per output row, max |w| / (2^(bits - 1) - 1); norms and biases stay, those of a
    Monet's experts too, which are stored as matrices.
    """
    most = 2 ** (bits - 1) - 1
    seen: set[int] = set()
    for name, weights in model.named_parameters():
        bias = name.rpartition(".")[2] in BIASES
        if weights.ndim < 2 or bias or weights.data_ptr() in seen:  # tied weights: once
            continue
        seen.add(weights.data_ptr())
        scale = weights.abs().amax(-1, keepdim=True) / most
        scale[scale == 0] = 1.0
        weights.copy_((weights / scale).round().clamp(-most, most) * scale)


def rounded_rows(context: Context, forget: Forget, scored: ScoredRows) -> ScoredRows:
    """Of the scored rows those that tell what rounding brings back, and what it costs."""
    retained = context.retained(forget)
    return {
        (split, domain): rows
        for (split, domain), rows in scored.items()
        if split in ATTACKED or (split == "test" and domain in retained)
    }


def rounded_scores(
    context: Context,
    rows: ScoredRows,
    model: TieredForCausalLM,
    hashes: dict[int, str],
    allowed: list[int] | None,
    bits: int,
) -> Scores:
    """Row scores of a system whose partition models are rounded; the system itself stays.

    hashes: what each model is. Systems share most of their models: each is scored once.
    """
    rounded = copy.deepcopy(model)
    for own in rounded.partitions.values():
        round_weights(own, bits)
    code = code_hash("tiered/unlearning/robustness.py")
    cache = score_cache(context.config, {k: digest([h, bits, code]) for k, h in hashes.items()})
    scorer = Scorer(context, rounded, cache, allowed)
    return {key: scorer.rows(found, attacked=False) for key, found in rows.items()}
