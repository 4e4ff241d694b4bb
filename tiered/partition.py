"""Level 1: the partition map, a function of the configuration alone; or a fitted cluster map.

The map never looks at which data is present: removing a domain leaves every other document where
it was, and a partition's index never shifts. That is what makes deletion exact. A cluster map saw
the data it was fitted on: it is kept when a domain is removed, and exactness is claimed given it.
"""

import hashlib
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tiered.config import Config
from tiered.domains import BY_CODE, FAMILY_ORDER
from tiered.store import HASHES, UserError, digest, is_complete, read_json, verify


def id_hashes(document_ids: list[str]) -> np.ndarray:
    """First 63 bits of the sha256 of every id, (documents,) int64."""
    digests = (hashlib.sha256(i.encode()).digest()[:8] for i in document_ids)
    return np.array([int.from_bytes(d, "big") >> 1 for d in digests], dtype=np.int64)


class ClusterLabels:
    """The cluster of every document, read from a run's partition folder when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def of(self, domain: str, document_ids: list[str]) -> np.ndarray:
        """Cluster (documents,) int64 of a domain's documents; -1 for one that was not labelled."""
        if domain not in self._loaded:
            files = sorted((self.folder / "labels" / domain).glob("*.safetensors"))
            parts = [load_file(path) for path in files]
            ids, labels = (np.concatenate([p[name] for p in parts]) for name in ("ids", "labels"))
            order = np.argsort(ids, kind="stable")
            self._loaded[domain] = ids[order], labels[order].astype(np.int64)
        ids, labels = self._loaded[domain]
        wanted = id_hashes(document_ids)
        places = np.searchsorted(ids, wanted).clip(max=max(0, len(ids) - 1))
        if not len(ids):
            return np.full(len(wanted), -1, dtype=np.int64)
        return np.where(ids[places] == wanted, labels[places], -1)


@dataclass(frozen=True)
class PartitionMap:
    """Which partition trains on what.

    `members[k]` are the configured domains of partition k; those of the last `added` partitions
    came later. With `by_document` a domain is spread over partitions: under `random` over all, so
    that `members[k]` is the whole domain list; under `cluster` over those that hold training
    documents of it.
    """

    method: str
    members: tuple[tuple[str, ...], ...]
    by_document: bool
    seed: int
    added: int = 0
    clusters: ClusterLabels | None = field(default=None, compare=False)
    clusters_hash: str | None = None

    @property
    def n(self) -> int:
        """Number of partitions."""
        return len(self.members)

    def identity(self, k: int) -> list[Any]:
        """What makes partition k itself, independent of present data: seeds derive from this."""
        if not self.by_document:
            return [sorted(self.members[k]), None]
        found = [k, self.n, self.seed, *([self.clusters_hash] if self.clusters_hash else [])]
        return [sorted(self.members[k]), found]

    def share(self, k: int) -> float:
        """Configured share that partition k holds of all domains; added ones do not count."""
        domains = {d for group in self.members[: self.n - self.added] for d in group}
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
        if self.clusters is not None:
            return self.clusters.of(domain, document_ids)
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
            "seed": self.seed if self.by_document or self.method == "random_language" else None,
        }
        if self.clusters_hash:
            body["clusters"] = self.clusters_hash
        return {**body, "hash": digest(body)}


def make_partition_map(config: Config) -> PartitionMap:
    """The map of a config; UserError if the method cannot make that n."""
    made = _base_map(config)
    added = config.data.added_domains
    return replace(made, members=(*made.members, *((d,) for d in added)), added=len(added))


def _base_map(config: Config) -> PartitionMap:
    """The map without added domains."""
    method, n, seed = config.partition.method, config.partition.n, config.partition.seed
    domains = config.data.domains
    if method == "cluster":
        return cluster_map(config, config.run_dir / "partition" / "clusters")
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


def cluster_map(config: Config, folder: Path) -> PartitionMap:
    """The map fitted in a folder; UserError if there is none yet, or of another n."""
    if not is_complete(folder):
        raise UserError(
            f"{folder}: documents are not clustered yet; run: python train_det_router.py CONFIG"
        )
    verify(folder)
    summary = read_json(folder / "clusters.json")
    if summary["n"] != config.partition.n:
        raise UserError(
            f"{folder}: has {summary['n']} clusters, partition.n is {config.partition.n}; run:"
            " python train_det_router.py CONFIG"
        )
    counts, files = summary["train_documents"], read_json(folder / HASHES)
    labels = {name: value for name, value in files.items() if name.startswith("labels/")}
    members = tuple(
        tuple(d for d in config.data.domains if counts.get(d, [0] * (k + 1))[k])
        for k in range(config.partition.n)
    )
    return PartitionMap(
        "cluster",
        members,
        True,
        config.partition.seed,
        clusters=ClusterLabels(folder),
        clusters_hash=digest(labels),  # of which document is where; the summary may say more
    )
