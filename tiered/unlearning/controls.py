"""Random controls of the expert purge: what masks of equal size or mass do by chance."""

from pathlib import Path

from tiered.store import content_hash, digest
from tiered.unlearning.protocol import ScoredRows, Scores, measure
from tiered.unlearning.purge import mask_hash, random_masks
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
        hashes = {k: content_hash(path) for k, path in context.models.items()}
        for k, purged in masks.items():
            model.purge_experts(k, ~purged)
            hashes[k] = digest([hashes[k], mask_hash(purged)])
        scores.append(measure(context, scored, model, hashes, None, ("test",)))
    return scores
