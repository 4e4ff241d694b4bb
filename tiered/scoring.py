"""Per-token scores of rows under routed systems: one pass over each routed partition's model.

Shapes: R rows, T tokens per row, S = T - 1 scored positions; position t predicts token t + 1.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiered.modeling_tiered import PrefixGroup, TieredForCausalLM, needed_positions, prefix_groups
from tiered.sealed import read_tensors, write_tensors
from tiered.store import code_hash, digest

GROUP_BATCHES = 64  # batches that are cached together
# Logits that are alive at once where the head is a plain projection: what a CPU's cache holds,
# but for no fewer tokens than pay for reading the head once more.
CHUNK_LOGITS = {"cpu": 2**19, "cuda": 2**27}
CHUNK_TOKENS = 128
# Families whose logits are lm_head(last_hidden_state) and nothing else.
PLAIN_HEADS = ("monet", "llama", "mixtral", "tiered_moe")
MIN_VARIANCE = 1e-6  # of log p over the vocabulary (arXiv:2404.02936)


@dataclass
class TokenScores:
    """nll (R, S) float32 nats, correct (R, S) bool: the next token was the argmax.

    scored (R, S) bool: False where the protocol leaves a position out. z (R, S) float32, where it
    was asked for: log p of the next token, standardised over the vocabulary (`token_statistics`).
    """

    nll: np.ndarray
    correct: np.ndarray
    scored: np.ndarray
    z: np.ndarray | None = None

    def rows(self, chosen: slice) -> "TokenScores":
        """Those of some rows."""
        z = None if self.z is None else self.z[chosen]
        return TokenScores(self.nll[chosen], self.correct[chosen], self.scored[chosen], z)


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
        return read_tensors(path)

    def write(self, path: Path, found: dict[str, torch.Tensor]) -> None:
        """Store a group, atomically."""
        write_tensors(path, found)
        self.renewed.add(path)

    def path(self, k: int, prefixes: torch.Tensor, batch_rows: int, z: bool) -> Path:
        """File of one group."""
        ids = hashlib.sha256(prefixes.contiguous().numpy().tobytes()).hexdigest()
        name = digest([ids, list(prefixes.shape), batch_rows, z, *self.computed_by])
        return self.folder / self.model_hashes[k] / f"{name}.safetensors"


def token_statistics(
    logits: torch.Tensor, targets: torch.Tensor, z: bool = False
) -> dict[str, torch.Tensor]:
    """nll, correct and (asked for) z, each (N,), of targets (N,) under float32 logits (N, V).

    z = (log p(target) - mu) / sigma, where mu and sigma^2 >= 1e-6 are mean and variance of
    log p(v) over v drawn from p itself (Min-K%++, arXiv:2404.02936). The logits are overwritten.
    """
    # amax, and softmax's own exponentials: on a CPU an argmax or exp() costs more than all of it.
    peak = logits.amax(-1)
    weights = logits.softmax(-1)
    # shifted by the largest, a peaked distribution's moments are small: nothing cancels.
    logits -= peak[:, None]
    own = logits.gather(-1, targets[:, None])[:, 0]
    correct = own == 0
    ties = correct.nonzero()[:, 0]  # of equal largest logits the first is the prediction
    correct[ties] = logits[ties].argmax(-1) == targets[ties]
    found = {"nll": -weights.amax(-1).log() - own, "correct": correct}
    if z:
        weights *= logits
        mean = weights.sum(-1)
        variance = torch.linalg.vecdot(weights, logits) - mean.square()
        found["z"] = (own - mean) / variance.clamp_min(MIN_VARIANCE).sqrt()
    return found


def _logits(model: torch.nn.Module, input_ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Float32 logits of all positions of (B, T) ids in order, (N, V) at a time."""
    if getattr(getattr(model, "config", None), "model_type", "") not in PLAIN_HEADS:
        yield model(input_ids=input_ids, use_cache=False).logits.float().flatten(0, 1)
        return
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    chunk = CHUNK_LOGITS.get(hidden.device.type, 2**27) // head.weight.shape[0]
    for part in hidden.flatten(0, 1).split(max(CHUNK_TOKENS, chunk)):
        yield head(part).float()


@torch.inference_mode()
def score_prefixes(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    length: int,
    batch_rows: int,
    z: bool = False,
) -> dict[str, torch.Tensor]:
    """Statistics (R, length) of tokens 1..length given tokens 0..length-1, on the CPU."""
    batches: list[dict[str, torch.Tensor]] = []
    device = next(model.parameters()).device
    for batch in input_ids.split(batch_rows):
        batch = batch.to(device)
        targets, parts, start = batch[:, 1 : length + 1].flatten(), [], 0
        for logits in _logits(model, batch[:, :length]):
            parts.append(token_statistics(logits, targets[start : start + len(logits)], z))
            start += len(logits)
        batches.append({n: torch.cat([p[n] for p in parts]).cpu() for n in parts[0]})
    return {n: torch.cat([b[n] for b in batches]).view(-1, length) for n in batches[0]}


def _cached_group(
    model: TieredForCausalLM,
    k: int,
    input_ids: torch.Tensor,
    group: PrefixGroup,
    batch_rows: int,
    cache: ScoreCache | None,
    z: bool,
) -> dict[str, torch.Tensor]:
    prefixes = input_ids[group.rows, : group.length + 1]
    path = cache.path(k, prefixes, batch_rows, z) if cache else None
    stored = cache.read(path) if cache else None
    if stored is not None:
        return stored
    found = score_prefixes(model.partitions[str(k)], prefixes, group.length, batch_rows, z)
    if cache:
        cache.write(path, found)
    return found


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
    z: bool = False,
) -> dict[str, TokenScores]:
    """Scores of rows (R, T) under several assignments (name -> partition (R, S)) in one pass.

    A partition's model reads a row once, up to the last position at which any assignment chose
    it; short prefixes run together, grouped by length. An assignment of -1 is not scored.
    """
    ids = torch.as_tensor(np.ascontiguousarray(input_ids))
    shape = (len(ids), ids.shape[1] - 1)
    results = {}
    for name in assignments:
        results[name] = {"nll": torch.full(shape, torch.nan)}
        results[name]["correct"] = torch.zeros(shape, dtype=bool)
        if z:
            results[name]["z"] = torch.full(shape, torch.nan)
    wanted = sorted({int(k) for a in assignments.values() for k in a.unique()} - {-1})
    for k in progress(wanted):
        needed = torch.stack([needed_positions(a, k) for a in assignments.values()]).amax(0)
        for group in _parts(prefix_groups(needed, shape[1]), GROUP_BATCHES * batch_rows):
            found = _cached_group(model, k, ids, group, batch_rows, cache, z)
            for name, chosen in assignments.items():
                here = chosen[group.rows, : group.length] == k
                for statistic, target in results[name].items():
                    rows = target[group.rows]
                    rows[:, : group.length][here] = found[statistic][here]
                    target[group.rows] = rows
    return {
        name: TokenScores(
            scored=(assignments[name] >= 0).numpy(), **{n: v.numpy() for n, v in found.items()}
        )
        for name, found in results.items()
    }
