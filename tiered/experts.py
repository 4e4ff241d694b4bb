"""Statistics of Monet's experts: which gates a text opened, and whose each expert is.

Shapes: G router groups, E experts per axis (expert ij has two indices), H heads, B batch, T tokens.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from modeling_monet import Gates, MonetRouter
from tiered.data import ProcessedData
from tiered.store import UserError


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


@torch.inference_mode()
def mean_expert_weights(model: torch.nn.Module, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean over tokens of sum_h g1_hi g2_hj, (G, E, E) float64 on the CPU.

    batches: input ids (B, T) without padding. Every group's weights sum to H. The model is read
    in evaluation mode: training mode would move its running statistics.
    """
    device, total, tokens = next(model.parameters()).device, None, 0
    training = model.training
    model.eval()
    for ids in filter(len, batches):  # a split without a block is one empty batch
        out = model(input_ids=ids.to(device), output_router_probs=True, logits_to_keep=1)
        sums = torch.stack([g1.flatten(0, 2).T @ g2.flatten(0, 2) for g1, g2 in out.router_probs])
        total = sums.double() if total is None else total + sums.double()
        tokens += ids.numel()
    model.train(training)
    if total is None:
        raise ValueError("mean_expert_weights: no tokens")
    return (total / tokens).cpu()


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
    """Experts (G, E, E) bool that are a domain's: S_D > 0 and S_D >= ratio * every other's score.

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
    """Purge a domain's experts from a model, in place; returns them, (G, E, E) bool."""
    purged = experts_of(scores, domain, ratio)
    model.purge_experts(~purged, renormalize)
    return purged
