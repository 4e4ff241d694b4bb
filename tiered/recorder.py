"""What a model's experts did with the text of every domain, read once and in bounded memory.

A recorder is fed batches of one domain after another and keeps sums: of weights, of uses per word
and per path, and the few contexts that gave an expert most weight. Everything that the report says
of experts comes from them.

Shapes: D domains, G groups (layers; a Monet's router groups), X experts of a group, S experts of a
token, N = B T tokens of a batch, V words, M watched words, R rows, C contexts kept.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import jensenshannon

from tiered.experts import (
    GroupRouting,
    divergences,
    effective_numbers,
    evaluating,
    normalised_information,
    permuted_information,
    routing_of,
)

CONTEXTS = 8  # kept per expert
PATHS = 2**20  # different paths of a domain that are counted, at most
LARGEST = 2**27  # entries of a table; one that would be larger is not kept
LEAST_USES = 20  # of a word (ICS: in a domain) before its distribution over experts counts
SHUFFLES = 20
STEPS = (1, 2, 3)  # of expert continuity


class RoutingRecorder:
    """Sums over the text of every domain.

    weights (D, G, X) float64: soft counts. uses (D, G, X): tokens that used an expert. stays,
    chances (G,): uses of an expert of some group that last for s more groups, and that could.
    by_word (G, V, X), by_domain (M, D, G, X): uses per word, and per watched word and domain;
    by_row (R, G, X) float32: weights of every row. The last three are None where too large.
    """

    def __init__(self, domains: Iterable[str], words: int, watched: Sequence[int] = ()) -> None:
        self.domains, self.words = list(domains), words
        self.watched = torch.tensor(sorted(watched), dtype=torch.int64)
        self.tokens = torch.zeros(len(self.domains), dtype=torch.int64)
        self.word_counts = torch.zeros(words, dtype=torch.int64)
        self.paths: list[Counter[tuple[int, ...]]] = [Counter() for _ in self.domains]
        self.pathless = [0] * len(self.domains)  # tokens on paths that found no place any more
        self.rows_of: list[int] = []  # the domain of every row in by_row
        self.weights: torch.Tensor | None = None

    def _begin(self, groups: int, experts: int) -> None:
        count, shape = len(self.domains), (groups, experts)
        self.weights = torch.zeros(count, *shape, dtype=torch.float64)
        self.uses = torch.zeros(count, *shape, dtype=torch.int64)
        self.stays = torch.zeros(groups, dtype=torch.int64)
        self.chances = torch.zeros(groups, dtype=torch.int64)
        self.by_word = self.by_domain = None
        self.by_row: list[torch.Tensor] | None = []
        if math.prod(shape) * self.words <= LARGEST:
            self.by_word = torch.zeros(groups, self.words, experts)
        if math.prod(shape) * len(self.watched) * count <= LARGEST:
            self.by_domain = torch.zeros(len(self.watched), count, *shape)
        # of every expert, the tokens that gave it most weight: weight; domain, row, position
        self.best = torch.zeros(*shape, CONTEXTS)
        self.where = torch.full((*shape, CONTEXTS, 3), -1, dtype=torch.int64)

    def read(
        self, model: torch.nn.Module, domain: str, input_ids: np.ndarray, batch_rows: int = 16
    ) -> None:
        """Run a model over rows (R, T) of a domain, without padding, and add what it did."""
        with evaluating(model):
            for start in range(0, len(input_ids), batch_rows):
                part = np.ascontiguousarray(input_ids[start : start + batch_rows], dtype=np.int64)
                ids = torch.from_numpy(part)
                self.add(domain, ids, routing_of(model, ids), start)

    @torch.inference_mode()
    def add(
        self, domain: str, ids: torch.Tensor, groups: list[GroupRouting], first_row: int = 0
    ) -> None:
        """Add a batch of a domain, ids (B, T), and its routing; first_row: the place of its first
        row among the domain's."""
        groups = [GroupRouting(*(t.cpu() for t in g)) for g in groups]
        if self.weights is None:
            self._begin(len(groups), groups[0].sums.shape[1])
        d = self.domains.index(domain)
        self.tokens[d] += ids.numel()
        self.word_counts += torch.bincount(ids.flatten(), minlength=self.words)
        self._add_rows(d, groups)
        # (N, X) of every group: weight of a token's chosen experts
        shape = (ids.numel(), self.weights.shape[-1])
        chosen = [torch.zeros(shape).scatter_add(1, g.index, g.weights.float()) for g in groups]
        used = [weight > 0 for weight in chosen]
        for g, weight in enumerate(chosen):
            self.weights[d, g] += groups[g].sums.double().sum(0)
            self.uses[d, g] += used[g].sum(0)
            self._add_words(d, g, ids.flatten(), used[g].float())
            self._add_contexts(d, g, weight, first_row, ids.shape[1])
        self._add_continuity(used)
        tops = torch.stack([weight.argmax(1) for weight in chosen], 1)  # (N, G)
        self._add_paths(d, tops)

    def _add_rows(self, d: int, groups: list[GroupRouting]) -> None:
        rows = torch.stack([g.sums for g in groups], 1)  # (B, G, X)
        self.rows_of += [d] * len(rows)
        if self.by_row is not None:
            self.by_row.append(rows)
            if len(self.rows_of) * rows[0].numel() > LARGEST:
                self.by_row = None

    def _add_words(self, d: int, g: int, ids: torch.Tensor, used: torch.Tensor) -> None:
        if self.by_word is not None:
            self.by_word[g].index_add_(0, ids, used)
        if self.by_domain is not None and len(self.watched):
            place = torch.searchsorted(self.watched, ids).clamp(max=len(self.watched) - 1)
            here = self.watched[place] == ids
            own = self.by_domain[:, d, g]
            own.index_add_(0, place[here], used[here])

    def _add_contexts(
        self, d: int, g: int, weight: torch.Tensor, first_row: int, length: int
    ) -> None:
        """Keep an expert's heaviest tokens."""
        most = weight.T.topk(min(CONTEXTS, len(weight)), 1)  # (X, C)
        row, position = most.indices // length + first_row, most.indices % length
        where = torch.stack([torch.full_like(row, d), row, position], -1)
        where[most.values <= 0] = -1
        values = torch.cat([self.best[g], most.values], 1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :CONTEXTS]
        self.best[g] = values.gather(1, order)
        both = torch.cat([self.where[g], where], 1)
        self.where[g] = both.gather(1, order[..., None].expand(-1, -1, 3))

    def _add_continuity(self, used: list[torch.Tensor]) -> None:
        for first in range(len(used)):
            lasting = used[first]
            for steps in range(1, len(used) - first):
                lasting = lasting & used[first + steps]
                self.stays[steps] += lasting.sum()
                self.chances[steps] += used[first].sum()

    def _add_paths(self, d: int, tops: torch.Tensor) -> None:
        paths, counts = tops.unique(dim=0, return_counts=True)
        counter = self.paths[d]
        for path, count in zip(paths.tolist(), counts.tolist(), strict=True):
            if len(counter) < PATHS or tuple(path) in counter:
                counter[tuple(path)] += count
            else:
                self.pathless[d] += count

    # --- measures ---------------------------------------------------------------------------

    def joint(self, g: int) -> np.ndarray:
        """Weight of domain and expert of a group, (D, X), every domain's row summing to 1 / D."""
        rows = self.weights[:, g].numpy()
        return rows / rows.sum(1, keepdims=True) / len(rows)

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """Every measure, of every group and over groups, as JSON-ready values."""
        groups = [self._group(g, seed) for g in range(self.weights.shape[1])]
        return {
            "domains": self.domains,
            "tokens": dict(zip(self.domains, self.tokens.tolist(), strict=True)),
            "experts": self.weights.shape[-1],
            "groups": groups,
            "continuity": self.continuity(),
            "paths": {
                d: path_coverage(*own)
                for d, *own in zip(self.domains, self.paths, self.pathless, strict=True)
            },
        }

    def snapshot(self) -> dict[str, Any]:
        """What is worth keeping of many moments: loads (G, X), their MaxVio, every domain's share
        of weight per expert (D, G, X), NMI and continuity."""
        load = self.uses.sum(0).numpy()
        share = self.weights / self.weights.sum(-1, keepdim=True)
        groups = range(len(load))
        return {
            "domains": self.domains,
            "load": (load / load.sum(1, keepdims=True)).round(5).tolist(),
            "max_violation": [_round(max_violation(row)) for row in load],
            "share_of_domain": share.numpy().round(5).tolist(),
            "nmi": [_round(normalised_information(self.joint(g))) for g in groups],
            "continuity": self.continuity(),
        }

    def _group(self, g: int, seed: int) -> dict[str, Any]:
        load, joint = self.uses[:, g].sum(0).numpy(), self.joint(g)
        per_expert, per_domain = effective_numbers(joint)
        information, shuffled = normalised_information(joint), None
        if self.by_row is not None:
            rows = torch.cat(self.by_row)[:, g].double().numpy()
            generator = np.random.default_rng([seed, g])
            labels = np.array(self.rows_of)
            shuffled = float(permuted_information(rows, labels, SHUFFLES, generator).mean())
        return {
            "load": (load / load.sum()).round(6).tolist(),
            "max_violation": _round(max_violation(load)),
            "load_entropy": _round(load_entropy(load)),
            "nmi": _round(information),
            "nmi_shuffled": _round(shuffled),
            "effective_domains_per_expert": _round(per_expert),
            "effective_experts_per_domain": _round(per_domain),
            "share_of_domain": (self.weights[:, g] / self.weights[:, g].sum(1, keepdim=True))
            .numpy()
            .round(6)
            .tolist(),
            "js_bits": divergences(joint).round(6).tolist(),
            **self._specialisation(g, seed),
        }

    def _specialisation(self, g: int, seed: int) -> dict[str, float | None]:
        """TIS and ICS with what words of as many uses would show by chance; None where unknown."""
        found: dict[str, float | None] = dict.fromkeys(("tis", "tis_by_chance", "ics"))
        found["ics_by_chance"] = None
        generator = np.random.default_rng([seed, g, 1])
        everything = self.uses[:, g].sum(0).numpy()
        if self.by_word is not None:
            words = np.flatnonzero(self.word_counts.numpy() >= LEAST_USES)
            tables = self.by_word[g].numpy()[words]
            found["tis"] = _round(_mean([js_distance(t, everything) for t in tables]))
            found["tis_by_chance"] = _round(_mean(_by_chance(tables, everything, generator)))
        if self.by_domain is not None and len(self.watched):
            values, chance = [], []
            for table in self.by_domain[:, :, g].numpy():  # (D, X) of a word
                rows = table[table.sum(1) >= LEAST_USES]
                if len(rows) > 1:
                    values += [js_distance(row, rows.sum(0)) for row in rows]
                    chance += _by_chance(rows, rows.sum(0), generator)
            found["ics"], found["ics_by_chance"] = _round(_mean(values)), _round(_mean(chance))
        return found

    def continuity(self) -> dict[str, dict[str, float]]:
        """EC(s), s = 1, 2, ..: the share of uses of an expert that last for s more groups; and what
        it would be if groups chose on their own, with the loads that they have."""
        share = (self.uses.sum(0).double() / self.tokens.sum()).numpy()  # (G, X)
        found, groups = {}, len(share)
        for steps in (s for s in STEPS if s < groups):
            lasting = sum(share[g : g + steps + 1].prod(0).sum() for g in range(groups - steps))
            could = sum(share[g].sum() for g in range(groups - steps))
            observed = int(self.stays[steps]) / max(1, int(self.chances[steps]))
            found[str(steps)] = {"observed": _round(observed), "by_chance": _round(lasting / could)}
        return found

    def top_words(self, g: int, count: int = 10) -> list[list[int]]:
        """Ids of the words most typical of every expert of a group: uses times log of how much more
        often than other words they use it. Empty lists where uses per word were not kept."""
        if self.by_word is None:
            return [[] for _ in range(self.weights.shape[-1])]
        table, seen = self.by_word[g].double(), self.word_counts.clamp(min=1)[:, None]
        overall = table.sum(0) / self.word_counts.sum()
        lift = (table / seen) / overall.clamp(min=1e-12)
        score = torch.where(table > 0, table * lift.clamp(min=1e-12).log(), 0.0)
        best = score.topk(min(count, self.words), 0)
        return [
            [w for w, value in zip(ids, values, strict=True) if value > 0]
            for ids, values in zip(best.indices.T.tolist(), best.values.T.tolist(), strict=True)
        ]

    def contexts(self, g: int) -> list[list[tuple[float, str, int, int]]]:
        """Weight, domain, row and position of the tokens that gave every expert most, heaviest
        first."""
        return [
            [
                (weight, self.domains[d], row, position)
                for weight, (d, row, position) in zip(weights, places, strict=True)
                if weight > 0
            ]
            for weights, places in zip(self.best[g].tolist(), self.where[g].tolist(), strict=True)
        ]


def max_violation(load: np.ndarray) -> float:
    """MaxVio = largest load / mean load - 1 of loads (X,) (arXiv:2408.15664, section 4.1)."""
    return float(load.max() / load.mean() - 1)


def load_entropy(load: np.ndarray) -> float:
    """Entropy of loads (X,) over that of equal ones, in [0, 1]."""
    p = load[load > 0] / load.sum()
    return float(-(p * np.log(p)).sum() / np.log(len(load))) if len(load) > 1 else 1.0


def js_distance(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon distance (base 2, the root of the divergence) of counts (X,), in [0, 1]."""
    return float(np.nan_to_num(jensenshannon(p, q, base=2)))  # of equal ones rounding may give nan


def _by_chance(
    tables: np.ndarray, everything: np.ndarray, generator: np.random.Generator
) -> list[float]:
    """Distances that counts (rows, X) would have, were they drawn from what all have in common."""
    p = everything.astype(np.float64) / everything.sum(dtype=np.float64)
    drawn = (generator.multinomial(round(float(t.sum())), p) for t in tables)
    return [js_distance(row, everything) for row in drawn]


def path_coverage(counter: Counter[tuple[int, ...]], uncounted: int = 0) -> dict[str, Any]:
    """Share of tokens on the most frequent path (a token's heaviest expert, group by group), on the
    four most frequent ones, and how many paths there are; uncounted: tokens on further ones."""
    total, most = sum(counter.values()) + uncounted, counter.most_common(4)
    shares = [count / total for _, count in most]
    return {
        "top_1": _round(shares[0] if shares else None),
        "top_4": _round(sum(shares) if shares else None),
        "paths": len(counter),
        "uncounted": _round(uncounted / total if total else None),
        "most_frequent": [[list(path), _round(count / total)] for path, count in most],
    }


def frequent_words(rows: Iterable[np.ndarray], count: int) -> list[int]:
    """Ids of the `count` words that occur most often in every domain's rows alike: by the second
    largest of their counts in a domain, so that a word of one domain alone is none of them."""
    tables = [np.bincount(np.asarray(r).ravel()) for r in rows]
    size = max(len(t) for t in tables)
    stacked = np.stack([np.pad(t, (0, size - len(t))) for t in tables])
    second = np.sort(stacked, 0)[-2] if len(stacked) > 1 else stacked[0]
    order = np.argsort(-second, kind="stable")[:count]
    return [int(w) for w in order if second[w] > 0]


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), 6)
