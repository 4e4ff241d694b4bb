"""One removal after another: what is left after the first, the second, ... the last domain."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tiered.data import Rows
from tiered.metrics import NONE, NOT_APPLICABLE
from tiered.modeling_tiered import TieredForCausalLM
from tiered.unlearning.controls import removal_bpb
from tiered.unlearning.purge import Masks, skew_masks
from tiered.unlearning.systems import Context, Forget, NotApplicable


def sequence(
    context: Context,
    model: TieredForCausalLM,
    rows: dict[str, Rows],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Per method the macro bits per byte on domains that stay and on those that are gone, after
    every removal of `unlearn.sequence`, nothing removed first; a word from where it cannot go on.

    delete: partitions are dropped, neighbours lose theirs and still count as staying. mask-skew:
    the union of the domains' masks.
    """
    order = context.config.unlearn.sequence
    found: dict[str, Any] = {"order": list(order), "delete": [], "mask-skew": []}
    for method in ("delete", "mask-skew"):
        masks: Masks = {}
        for i in range(len(order) + 1):
            gone = order[:i]
            say(f"{method} of {i} of {len(order)} domains")
            try:
                allowed = _left(context, gone) if method == "delete" else None
                if method == "mask-skew" and i:
                    masks = _united(masks, context, gone[-1])
            except NotApplicable as reason:
                found[method].append(str(reason))
                break
            bpb = removal_bpb(context, model, rows, masks, allowed)
            found[method].append(_step(bpb, gone))
    return found


def _left(context: Context, gone: tuple[str, ...]) -> list[int]:
    """Partitions that are left without those of the domains; their order does not matter."""
    dropped = {k for d in gone for k in context.partitions.touched(d)}
    left = [k for k in context.models if k not in dropped]
    if not left:
        raise NotApplicable(f"{NOT_APPLICABLE}: removes all {context.partitions.n} models")
    return left


def _united(masks: Masks, context: Context, domain: str) -> Masks:
    """Masks that purge a domain's experts as well."""
    new = {k: purged for k, (_, purged) in skew_masks(context, Forget(domain, domain)).items()}
    return masks | {k: torch.logical_or(purged, masks.get(k, purged)) for k, purged in new.items()}


def _step(bpb: dict[str, float], gone: tuple[str, ...]) -> dict[str, Any]:
    staying = [v for d, v in bpb.items() if d not in gone]
    return {
        "removed": len(gone),
        "bpb_staying": round(float(np.mean(staying)), 6) if staying else NONE,
        "bpb_gone": round(float(np.mean([bpb[d] for d in gone])), 6) if gone else NONE,
    }
