"""Level 1: the partition map, a function of the configuration alone.

The map never looks at which data is present: removing a domain leaves every other document where
it was, and a partition's index never shifts. That is what makes deletion exact.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiered.config import Config
from tiered.domains import BY_CODE, FAMILY_ORDER
from tiered.store import UserError, digest


@dataclass(frozen=True)
class PartitionMap:
    """Which partition trains on what.

    `members[k]` are the configured domains of partition k. With `by_document` every domain is
    spread over all partitions and `members[k]` is the whole domain list.
    """

    method: str
    members: tuple[tuple[str, ...], ...]
    by_document: bool
    seed: int

    @property
    def n(self) -> int:
        """Number of partitions."""
        return len(self.members)

    def identity(self, k: int) -> list[Any]:
        """What makes partition k itself, independent of present data: seeds derive from this."""
        return [sorted(self.members[k]), [k, self.n, self.seed] if self.by_document else None]

    def share(self, k: int) -> float:
        """Configured share in (0, 1] of all domains that partition k holds."""
        domains = {d for group in self.members for d in group}
        return 1.0 / self.n if self.by_document else len(self.members[k]) / len(domains)

    def touched(self, domain: str) -> tuple[int, ...]:
        """Partitions that hold data of a domain."""
        return tuple(k for k, group in enumerate(self.members) if domain in group)

    def partition_of(self, domain: str) -> int:
        """The one partition of a domain; undefined (ValueError) for maps by document."""
        (k,) = self.touched(domain)
        return k

    def assign(self, domain: str, document_ids: list[str]) -> np.ndarray:
        """Partition of each document, (documents,) int64."""
        if not self.by_document:
            return np.full(len(document_ids), self.partition_of(domain), dtype=np.int64)
        salt = f"{self.seed}:".encode()
        hashes = [hashlib.sha256(salt + i.encode()).digest()[:8] for i in document_ids]
        # 64 bits modulo n: the bias is below n / 2^64.
        values = np.array([int.from_bytes(h, "big") for h in hashes], dtype=np.uint64)
        return (values % np.uint64(self.n)).astype(np.int64)

    def as_json(self) -> dict[str, Any]:
        """The map as stored beside the router, with its hash."""
        body = {
            "method": self.method,
            "members": [list(group) for group in self.members],
            "by_document": self.by_document,
            "seed": self.seed if self.method.startswith("random") else None,
        }
        return {**body, "hash": digest(body)}


def make_partition_map(config: Config) -> PartitionMap:
    """The map of a config; UserError if the method cannot make that n."""
    method, n, seed = config.partition.method, config.partition.n, config.partition.seed
    domains = config.data.domains
    if method == "random":
        return PartitionMap(method, (domains,) * n, True, seed)
    if n > len(domains):
        raise UserError(
            f"partition.n: {n} partitions need at least {n} domains, got {len(domains)}"
        )
    if method == "family":
        return PartitionMap(method, _family_groups(domains, n), False, 0)
    if method == "random_language":
        shuffled = list(domains)
        random.Random(f"random_language:{seed}").shuffle(shuffled)
        return PartitionMap(method, _contiguous(tuple(shuffled), n), False, seed)
    return PartitionMap(method, _contiguous(domains, n), False, 0)


def _contiguous(domains: tuple[str, ...], n: int) -> tuple[tuple[str, ...], ...]:
    """n groups of neighbours; sizes differ by at most one, larger groups first."""
    return tuple(tuple(str(d) for d in part) for part in np.array_split(np.array(domains), n))


def _family_groups(domains: tuple[str, ...], n: int) -> tuple[tuple[str, ...], ...]:
    """The study's groups, merged (n below their number) or split into equal parts (above)."""
    for domain in domains:
        if domain not in BY_CODE:
            raise UserError(f"partition.method: family knows no group for domain {domain!r}")
    grouped = {
        group: tuple(d for d in domains if BY_CODE[d].group == group) for group in FAMILY_ORDER
    }
    groups = [members for members in grouped.values() if members]
    if n <= len(groups) and len(groups) % n == 0:
        per = len(groups) // n
        return tuple(tuple(d for g in groups[i * per : (i + 1) * per] for d in g) for i in range(n))
    per, rest = divmod(n, len(groups))
    if rest == 0 and all(len(g) % per == 0 for g in groups):
        return tuple(part for g in groups for part in _contiguous(g, per))
    possible = [
        m
        for m in range(1, len(domains) + 1)
        if len(groups) % m == 0
        or (m % len(groups) == 0 and all(len(g) % (m // len(groups)) == 0 for g in groups))
    ]
    raise UserError(
        f"partition.n: method family cannot make {n} partitions of these domains"
        f" (possible: {', '.join(map(str, possible))})"
    )
