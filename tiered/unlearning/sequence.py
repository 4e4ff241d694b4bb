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
    """Per method the macro bits per byte on domains that stay and on those that are gone, and what
    it has changed by on the same domains, after every removal of `unlearn.sequence`, nothing
    removed first; a word from where it cannot go on.

    delete: partitions are dropped, neighbours lose theirs and still count as staying. mask-skew:
    the union of the domains' masks.
    """
    order = context.config.unlearn.sequence
    found: dict[str, Any] = {"order": list(order), "delete": [], "mask-skew": []}
    for method in ("delete", "mask-skew"):
        masks: Masks = {}
        before: dict[str, float] = {}
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
            before = before or bpb
            found[method].append(_step(bpb, before, gone))
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


def _step(bpb: dict[str, float], before: dict[str, float], gone: tuple[str, ...]) -> dict[str, Any]:
    step: dict[str, Any] = {"removed": len(gone)}
    # which domains stay changes from step to step: only the change on them compares steps
    for name, domains in (("staying", [d for d in bpb if d not in gone]), ("gone", gone)):
        values = np.array([[bpb[d], bpb[d] - before[d]] for d in domains])
        mean = [round(float(v), 6) for v in values.mean(0)] if len(values) else [NONE, NONE]
        step |= {f"bpb_{name}": mean[0], f"bpb_change_{name}": mean[1]}
    return step
