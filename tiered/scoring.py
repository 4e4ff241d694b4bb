"""Per-token scores of rows under routed systems: one pass over each routed partition's model.

Shapes: R rows, T tokens per row, S = T - 1 scored positions; position t predicts token t + 1.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tiered.modeling_tiered import PrefixGroup, TieredForCausalLM, needed_positions, prefix_groups
from tiered.store import code_hash, digest

GROUP_BATCHES = 64  # batches that are cached together


@dataclass
class TokenScores:
    """nll (R, S) float32 nats, correct (R, S) bool: the next token was the argmax.

    scored (R, S) bool: False where the protocol leaves a position out.
    """

    nll: np.ndarray
    correct: np.ndarray
    scored: np.ndarray

    def rows(self, chosen: slice) -> "TokenScores":
        """Those of some rows."""
        return TokenScores(self.nll[chosen], self.correct[chosen], self.scored[chosen])


class ScoreCache:
    """Scores of one model on one group of prefixes, by (model hash, hash of the token ids).

    Groups are cached whole: a row's last bits may depend on the batch and length it ran in.
    environment: what the scores depend on besides; renew: score again what is there.
    """

    def __init__(
        self,
        folder: Path,
        model_hashes: Mapping[int, str],
        environment: Any = None,
        renew: bool = False,
    ) -> None:
        self.folder = folder
        self.model_hashes = model_hashes
        self.computed_by = [environment, code_hash("tiered/scoring.py")]
        self.renew = renew
        self.renewed: set[Path] = set()

    def read(self, path: Path) -> dict[str, torch.Tensor] | None:
        """A stored group, or None where it must be scored."""
        if not path.is_file() or (self.renew and path not in self.renewed):
            return None
        return load_file(path)

    def write(self, path: Path, nll: torch.Tensor, correct: torch.Tensor) -> None:
        """Store a group, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        save_file({"nll": nll.contiguous(), "correct": correct.contiguous()}, temporary)
        temporary.replace(path)
        self.renewed.add(path)

    def path(self, k: int, prefixes: torch.Tensor, batch_rows: int) -> Path:
        """File of one group."""
        ids = hashlib.sha256(prefixes.contiguous().numpy().tobytes()).hexdigest()
        name = digest([ids, list(prefixes.shape), batch_rows, *self.computed_by])
        return self.folder / self.model_hashes[k] / f"{name}.safetensors"


@torch.inference_mode()
def score_prefixes(
    model: torch.nn.Module, input_ids: torch.Tensor, length: int, batch_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """nll (R, length) and correct (R, length) of tokens 1..length given tokens 0..length-1."""
    losses, hits = [], []
    device = next(model.parameters()).device
    for batch in input_ids.split(batch_rows):
        batch = batch.to(device)
        logits = model(
            input_ids=batch[:, :length], use_cache=False
        ).logits.float()  # (b, length, V)
        targets = batch[:, 1 : length + 1]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(loss.view(targets.shape).cpu())
        hits.append((logits.argmax(-1) == targets).cpu())
    return torch.cat(losses), torch.cat(hits)


def _cached_group(
    model: TieredForCausalLM,
    k: int,
    input_ids: torch.Tensor,
    group: PrefixGroup,
    batch_rows: int,
    cache: ScoreCache | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    prefixes = input_ids[group.rows, : group.length + 1]
    path = cache.path(k, prefixes, batch_rows) if cache else None
    stored = cache.read(path) if cache else None
    if stored is not None:
        return stored["nll"], stored["correct"]
    nll, correct = score_prefixes(model.partitions[str(k)], prefixes, group.length, batch_rows)
    if cache:
        cache.write(path, nll, correct)
    return nll, correct


def _parts(groups: Iterable[PrefixGroup], rows: int) -> Iterator[PrefixGroup]:
    """Groups of at most so many rows: what a killed run has to score again."""
    for group in groups:
        for part in group.rows.split(rows):
            yield PrefixGroup(part, group.length)


def score_rows(
    model: TieredForCausalLM,
    input_ids: np.ndarray,
    assignments: Mapping[str, torch.Tensor],
    batch_rows: int,
    cache: ScoreCache | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, TokenScores]:
    """Scores of rows (R, T) under several assignments (name -> partition (R, S)) in one pass.

    A partition's model reads a row once, up to the last position at which any assignment chose
    it; short prefixes run together, grouped by length. An assignment of -1 is not scored.
    """
    ids = torch.as_tensor(np.ascontiguousarray(input_ids))
    steps = ids.shape[1] - 1
    results = {
        name: (torch.full((len(ids), steps), torch.nan), torch.zeros(len(ids), steps, dtype=bool))
        for name in assignments
    }
    wanted = sorted({int(k) for a in assignments.values() for k in a.unique()} - {-1})
    for k in progress(wanted):
        needed = torch.stack([needed_positions(a, k) for a in assignments.values()]).amax(0)
        for group in _parts(prefix_groups(needed, steps), GROUP_BATCHES * batch_rows):
            nll, correct = _cached_group(model, k, ids, group, batch_rows, cache)
            for name, chosen in assignments.items():
                here = chosen[group.rows, : group.length] == k
                for target, source in zip(results[name], (nll, correct), strict=True):
                    rows = target[group.rows]
                    rows[:, : group.length][here] = source[here]
                    target[group.rows] = rows
    return {
        name: TokenScores(nll.numpy(), hit.numpy(), (assignments[name] >= 0).numpy())
        for name, (nll, hit) in results.items()
    }
