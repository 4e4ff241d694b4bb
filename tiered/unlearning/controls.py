"""Removals that are scored without a system of their own: masks and routes of loaded models, and
the random controls of the expert purge."""

from pathlib import Path

from tiered.data import Rows
from tiered.evaluation import score_cache
from tiered.modeling_tiered import TieredForCausalLM
from tiered.store import content_hash, digest
from tiered.unlearning.protocol import ScoredRows, Scorer, Scores, measure
from tiered.unlearning.purge import Masks, mask_hash, random_masks
from tiered.unlearning.systems import Context, Forget, load_system


def control_draws(
    context: Context, forget: Forget, kind: str, scored: ScoredRows, system: Path
) -> list[Scores]:
    """Row scores of the test rows under every draw of a random control, the first one included.

    system: the folder of the first draw. Row scores are kept in the store, so that a draw is
    scored once.
    """
    model, _ = load_system(context, system)
    scores = []
    for draw in range(context.config.unlearn.random_masks):
        masks = random_masks(context, forget, kind, draw)
        for k, purged in masks.items():
            model.purge_experts(k, ~purged)
        hashes = masked_hashes(context, masks)
        scores.append(measure(context, scored, model, hashes, None, ("test",)))
    return scores


def removal_bpb(
    context: Context,
    model: TieredForCausalLM,
    rows: dict[str, Rows],
    masks: Masks,
    allowed: list[int] | None,
) -> dict[str, float]:
    """Bits per byte of every domain's rows with experts left out; the model is as before after."""
    for k, purged in masks.items():
        model.purge_experts(k, ~purged)
    cache = score_cache(context.config, masked_hashes(context, masks))
    scorer = Scorer(context, model, cache, allowed)
    try:
        return {d: scorer.rows(found, attacked=False).bpb() for d, found in rows.items()}
    finally:
        for k in masks:
            model.purge_experts(k, None)


def masked_hashes(context: Context, masks: Masks) -> dict[int, str]:
    """What every model of the run is with experts left out."""
    hashes = {k: content_hash(path) for k, path in context.models.items()}
    return hashes | {k: digest([hashes[k], mask_hash(purged)]) for k, purged in masks.items()}
