"""What a model's experts did with the text of every domain, read once and in bounded memory.

A recorder is fed batches of one domain after another and keeps sums: of weights, of uses per word
and per path, the few contexts that gave an expert most weight, and a sample of tokens. Everything
that the report says of experts comes from them, and nothing depends on the size of batches.

Shapes: D domains, G groups (layers; a Monet's router groups), X experts of a group, S experts of a
token, N = B T tokens of a batch, V words, R rows, C contexts kept, K tokens of the sample.
"""

import heapq
import math
import zlib
from collections import Counter
from collections.abc import Iterable
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
SAMPLE = 2**16  # tokens whose experts are kept, for what needs each of them
LARGEST = 2**27  # entries of a table; one that would be larger is not kept
PART = 2**25  # entries of all groups' tables of tokens and experts that are made at once
LEAST_USES = 20  # occurrences of a word (ICS: in a domain) before its experts are compared
WATCHED = 64  # words whose experts are compared between domains (ICS)
SHUFFLES = 20
STEPS = (1, 2, 3)  # of expert continuity


class RoutingRecorder:
    """Sums over the text of every domain.

    weights (D, G, X) float64: soft counts. counts (D, G, X) float64: uses of experts (of a Monet:
    by all heads), uses (D, G, X) of those that a token is said to have (of a Monet: the heaviest of
    every head), which hold `named` (G,) of the weight. stays, chances (G,): uses of an expert of
    some group that last for s more groups, and that could. by_word (G, V, X): uses per word; by_row
    (R, G, X) float32: weights of every row; None where too large. Of a tree, what follows a token
    from layer to layer or compares words looks at leaves alone: `first` is the first of their
    edges.
    """

    def __init__(self, domains: Iterable[str], words: int) -> None:
        self.domains, self.words = list(domains), words
        self.tokens = torch.zeros(len(self.domains), dtype=torch.int64)
        self.word_counts = torch.zeros(words, dtype=torch.int64)
        self.paths: list[Counter[tuple[int, ...]]] = [Counter() for _ in self.domains]
        self.pathless = [0] * len(self.domains)  # tokens on paths that found no place any more
        self.rows_of: list[int] = []  # the domain of every row in by_row
        self.weights: torch.Tensor | None = None

    def _begin(self, groups: list[GroupRouting]) -> None:
        count, shape = len(self.domains), (len(groups), groups[0].sums.shape[1])
        self.first = groups[0].first
        self.weights = torch.zeros(count, *shape, dtype=torch.float64)
        self.counts = torch.zeros(count, *shape, dtype=torch.float64)
        self.uses = torch.zeros(count, *shape, dtype=torch.int64)
        self.named = torch.zeros(shape[0], dtype=torch.float64)
        self.stays = torch.zeros(shape[0], dtype=torch.int64)
        self.chances = torch.zeros(shape[0], dtype=torch.int64)
        self.by_word = None
        self.by_row: list[torch.Tensor] | None = []
        if math.prod(shape) * self.words <= LARGEST:
            self.by_word = torch.zeros(shape[0], self.words, shape[1], dtype=torch.int32)
        # of every expert, the tokens that gave it most weight: weight; domain, row, position
        self.best = torch.zeros(*shape, CONTEXTS, dtype=torch.float64)
        self.where = torch.full((*shape, CONTEXTS, 3), -1, dtype=torch.int64)
        slots = groups[0].index.shape[1]
        self.sample_size = min(SAMPLE, LARGEST // (shape[0] * slots))
        self.order = np.zeros(0, dtype=np.uint64)
        self.sample = np.zeros((0, 2 + shape[0] * slots), dtype=np.int32)

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
        tensors = ([t.cpu() if torch.is_tensor(t) else t for t in g] for g in groups)
        groups = [GroupRouting(*own) for own in tensors]
        if self.weights is None:
            self._begin(groups)
        d = self.domains.index(domain)
        self.tokens[d] += ids.numel()
        self.word_counts += torch.bincount(ids.flatten(), minlength=self.words)
        self._add_rows(d, groups)
        for g, group in enumerate(groups):
            self.weights[d, g] += group.sums.double().sum(0)
            self.counts[d, g] += group.counts.double().sum(0)
            self.named[g] += group.weights.double().sum()
        row, position = np.divmod(np.arange(ids.numel()), ids.shape[1])
        row += first_row
        order = _order(domain, row, position)
        self._add_sample(d, ids.flatten().numpy(), groups, order)
        place = torch.from_numpy(np.stack([np.full_like(row, d), row, position], 1))
        among = torch.from_numpy(order / 2.0**64)  # float64
        step = max(1, PART // math.prod(self.weights.shape[1:]))
        for start in range(0, ids.numel(), step):
            own = slice(start, start + step)
            parts = [(g.index[own], g.weights[own].float()) for g in groups]
            self._add_tokens(d, ids.flatten()[own], parts, place[own], among[own])

    def _add_tokens(
        self,
        d: int,
        ids: torch.Tensor,
        groups: list[tuple[torch.Tensor, torch.Tensor]],
        place: torch.Tensor,
        among: torch.Tensor,
    ) -> None:
        """Add tokens: ids (N,), per group their experts and weights (N, S), where they stand (N, 3)
        and an order among equals (N,)."""
        shape = (len(ids), self.weights.shape[-1])
        # (N, X) of every group: weight of a token's experts
        given = [torch.zeros(shape).scatter_add(1, *group) for group in groups]
        used = [weight > 0 for weight in given]
        for g, weight in enumerate(given):
            self.uses[d, g] += used[g].sum(0)
            if self.by_word is not None:
                self.by_word[g].index_add_(0, ids, used[g].int())
            self._add_contexts(g, weight, place, among)
        self._add_continuity([u[:, self.first :] for u in used])
        most = [weight[:, self.first :].max(1) for weight in given]
        # -1: a token that no expert is left to
        tops = [torch.where(m.values > 0, m.indices + self.first, -1) for m in most]
        self._add_paths(d, torch.stack(tops, 1))

    def _add_rows(self, d: int, groups: list[GroupRouting]) -> None:
        if self.by_row is None:
            return
        rows = torch.stack([g.sums for g in groups], 1)  # (B, G, X)
        self.rows_of += [d] * len(rows)
        self.by_row.append(rows)
        if len(self.rows_of) * rows[0].numel() > LARGEST:
            self.by_row, self.rows_of = None, []

    def _add_sample(
        self, d: int, ids: np.ndarray, groups: list[GroupRouting], order: np.ndarray
    ) -> None:
        """Keep the tokens that come first in an order that is as good as random: domain, word, and
        per group the experts (-1: a place without one)."""
        seen = [g.index.masked_fill((g.weights <= 0) | (g.index < g.first), -1) for g in groups]
        rows = torch.cat([torch.full((len(ids), 1), d), torch.from_numpy(ids)[:, None], *seen], 1)
        self.sample = np.concatenate([self.sample, rows.numpy().astype(np.int32)])
        self.order = np.concatenate([self.order, order])
        if len(self.order) > self.sample_size:
            kept = np.argpartition(self.order, self.sample_size - 1)[: self.sample_size]
            self.sample, self.order = self.sample[kept], self.order[kept]

    def _add_contexts(
        self, g: int, weight: torch.Tensor, place: torch.Tensor, among: torch.Tensor
    ) -> None:
        """Keep an expert's heaviest tokens; equal ones in an order as good as random."""
        # less than two neighbouring float32 differ by: no other tokens change places
        exact = weight.double() * (1 + 2.0**-26 * among[:, None])
        most = exact.T.topk(min(CONTEXTS, len(weight)), 1)  # (X, C)
        where = place[most.indices]
        where[most.values <= 0] = -1
        values = torch.cat([self.best[g], most.values], 1)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :CONTEXTS]
        self.best[g] = values.gather(1, order)
        both = torch.cat([self.where[g], where], 1)
        self.where[g] = both.gather(1, order[..., None].expand(-1, -1, 3))

    def _add_continuity(self, used: list[torch.Tensor]) -> None:
        for first in range(len(used) - 1):
            lasting, could = used[first], used[first].count_nonzero()
            for steps in range(1, len(used) - first):
                lasting = lasting & used[first + steps]
                self.stays[steps] += lasting.count_nonzero()
                self.chances[steps] += could

    def _add_paths(self, d: int, tops: torch.Tensor) -> None:
        counter = self.paths[d]
        for path, count in Counter(map(tuple, tops.tolist())).items():
            if len(counter) < PATHS or path in counter:
                counter[path] += count
            else:
                self.pathless[d] += count

    # --- measures ---------------------------------------------------------------------------

    def joint(self, g: int) -> np.ndarray:
        """Weight of domain and expert of a group, (D, X), every domain's row summing to 1 / D; 0
        where no expert has any."""
        rows = self.weights[:, g].numpy()
        total = rows.sum(1, keepdims=True)
        return np.divide(rows, total, out=np.zeros_like(rows), where=total > 0) / len(rows)

    def load(self, g: int) -> np.ndarray:
        """Uses of every expert of a group, (X,)."""
        return self.counts[:, g].sum(0).numpy()

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """Every measure, of every group and over groups, as JSON-ready values; None where there is
        nothing to measure."""
        rows = None if self.by_row is None else torch.cat(self.by_row).double().numpy()
        by_order = np.argsort(self.order)
        groups = [
            self._group(g, None if rows is None else rows[:, g], self.sample[by_order], seed)
            for g in range(self.weights.shape[1])
        ]
        return {
            "domains": self.domains,
            "tokens": dict(zip(self.domains, self.tokens.tolist(), strict=True)),
            "experts": self.weights.shape[-1],
            "first_leaf": self.first,
            "groups": groups,
            "continuity": self.continuity(),
            "paths": {
                d: path_coverage(*own)
                for d, *own in zip(self.domains, self.paths, self.pathless, strict=True)
            },
        }

    def snapshot(self) -> dict[str, Any]:
        """What is worth keeping of many moments: loads (G, X), their MaxVio, NMI and continuity."""
        groups = range(self.weights.shape[1])
        loads = [self.load(g) for g in groups]
        return {
            "domains": self.domains,
            "load": [(load / max(load.sum(), 1.0)).round(5).tolist() for load in loads],
            "max_violation": [_round(max_violation(load[self.first :])) for load in loads],
            "nmi": [
                _round(normalised_information(joint)) if joint.any() else None
                for joint in map(self.joint, groups)
            ],
            "continuity": self.continuity(),
        }

    def _group(
        self, g: int, rows: np.ndarray | None, sample: np.ndarray, seed: int
    ) -> dict[str, Any]:
        load, joint = self.load(g), self.joint(g)
        found: dict[str, Any] = {
            "load": (load / max(load.sum(), 1.0)).round(6).tolist(),
            "max_violation": _round(max_violation(load[self.first :])),
            "load_entropy": _round(load_entropy(load[self.first :])),
            "share_of_domain": (joint * len(joint)).round(6).tolist(),
            "js_bits": None,
        }
        names = ("nmi", "nmi_shuffled", "nmi_shuffled_sd", "weight_named")
        found |= dict.fromkeys((*names, "effective_domains_per_expert"))
        found["effective_experts_per_domain"] = None
        if not joint.any():  # every expert of the layer is purged
            return found | _specialisation_of([], [], "tis") | _specialisation_of([], [], "ics")
        apart = np.full((len(joint), len(joint)), np.nan)
        live = joint.any(1)
        apart[np.ix_(live, live)] = divergences(joint[live])
        found["js_bits"] = [[_round(v) if v == v else None for v in row] for row in apart.tolist()]
        per_expert, per_domain = effective_numbers(joint[live])
        found["nmi"] = _round(normalised_information(joint))
        found["effective_domains_per_expert"] = _round(per_expert)
        found["effective_experts_per_domain"] = _round(per_domain)
        found["weight_named"] = _round(self.named[g] / self.weights[:, g].sum())
        if rows is not None:
            generator = np.random.default_rng([seed, g])
            labels = np.array(self.rows_of)
            shuffled = permuted_information(rows, labels, SHUFFLES, generator)
            found["nmi_shuffled"] = _round(shuffled.mean())
            found["nmi_shuffled_sd"] = _round(shuffled.std(ddof=1))
        slots = (sample.shape[1] - 2) // self.weights.shape[1]
        index = sample[:, 2 + g * slots : 2 + (g + 1) * slots]
        generator = np.random.default_rng([seed, g, 1])
        domain, word = sample[:, 0], sample[:, 1]
        return (
            found
            | self._token_specialisation(index, word, generator)
            | self._context_specialisation(index, word, domain, generator)
        )

    def _token_specialisation(
        self, index: np.ndarray, word: np.ndarray, generator: np.random.Generator
    ) -> dict[str, float | None]:
        """TIS: how far a word's experts are from those of all tokens, over frequent words; the same
        with words dealt out anew; and were no word's experts another's. index (K, S), word (K,)."""
        occurrences = np.bincount(word, minlength=self.words)
        frequent = np.flatnonzero(occurrences >= LEAST_USES)
        place = np.full(self.words, -1)
        place[frequent] = np.arange(len(frequent))
        everything = self._tables(np.zeros(len(word), dtype=np.int64), 1, index)[0]
        tables = self._tables(place[word], len(frequent), index)
        dealt = self._tables(place[generator.permutation(word)], len(frequent), index)
        measured = [(t, everything) for t in tables if t.any()]
        by_chance = [(t, everything) for t in dealt if t.any()]
        return _specialisation_of(measured, by_chance, "tis")

    def _context_specialisation(
        self,
        index: np.ndarray,
        word: np.ndarray,
        domain: np.ndarray,
        generator: np.random.Generator,
    ) -> dict[str, float | None]:
        """ICS: how far a word's experts in a domain are from its experts in all of them, over words
        that are frequent in several; the same with its occurrences dealt out to domains anew."""
        count = len(self.domains)
        measured, by_chance = [], []
        for w in shared_words(word, domain, WATCHED):
            here = word == w
            own, labels = index[here], domain[here]
            enough = np.bincount(labels, minlength=count) >= LEAST_USES
            labels = np.where(enough[labels], labels, -1)
            if enough.sum() < 2:
                continue
            kept = labels >= 0
            for given, pairs in ((labels[kept], measured), (None, by_chance)):
                given = generator.permutation(labels[kept]) if given is None else given
                tables = self._tables(given, count, own[kept])
                pairs += [(t, tables.sum(0)) for t in tables if t.any()]
        return _specialisation_of(measured, by_chance, "ics")

    def _tables(self, labels: np.ndarray, count: int, index: np.ndarray) -> np.ndarray:
        """Uses (count, X) of experts by label: labels (K,) in [-1, count), experts index (K, S)
        with -1 for none."""
        experts = self.weights.shape[-1]
        kept = (index >= 0) & (labels >= 0)[:, None]
        flat = (labels[:, None] * experts + index)[kept]
        return np.bincount(flat, minlength=count * experts).reshape(count, experts)

    def continuity(self) -> dict[str, dict[str, float]]:
        """EC(s), s = 1, 2, ..: the share of uses of an expert that last for s more groups; and what
        it would be if groups chose on their own, with the loads that they have."""
        share = (self.uses.sum(0).double() / self.tokens.sum()).numpy()[:, self.first :]  # (G, X)
        found, groups = {}, len(share)
        for steps in (s for s in STEPS if s < groups):
            lasting = sum(share[g : g + steps + 1].prod(0).sum() for g in range(groups - steps))
            could = sum(share[g].sum() for g in range(groups - steps))
            observed = int(self.stays[steps]) / max(1, int(self.chances[steps]))
            by_chance = lasting / could if could else 0.0
            found[str(steps)] = {"observed": _round(observed), "by_chance": _round(by_chance)}
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


def _order(domain: str, row: np.ndarray, position: np.ndarray) -> np.ndarray:
    """A place (N,) uint64 for every token, as good as random (splitmix64's mixing of what names
    it): which tokens come first depends on neither batches nor the order of domains."""
    row, position = row.astype(np.uint64), position.astype(np.uint64)
    x = np.full(len(row), zlib.crc32(domain.encode()), dtype=np.uint64) << np.uint64(32)
    x += row * np.uint64(0x9E3779B97F4A7C15) + position * np.uint64(0xD1B54A32D192ED03)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def max_violation(load: np.ndarray) -> float | None:
    """MaxVio = largest load / mean load - 1 of loads (X,) (arXiv:2408.15664, section 4.1); None
    without any."""
    return float(load.max() / load.mean() - 1) if load.any() else None


def load_entropy(load: np.ndarray) -> float | None:
    """Entropy of loads (X,) over that of equal ones, in [0, 1]; None without any."""
    if not load.any():
        return None
    p = load[load > 0] / load.sum()
    return float(-(p * np.log(p)).sum() / np.log(len(load))) if len(load) > 1 else 1.0


def js_distance(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon distance (base 2, the root of the divergence) of counts (X,), in [0, 1]."""
    return float(np.nan_to_num(jensenshannon(p, q, base=2)))  # of equal ones rounding may give nan


def _specialisation_of(
    measured: list[tuple[np.ndarray, np.ndarray]],
    by_chance: list[tuple[np.ndarray, np.ndarray]],
    name: str,
) -> dict[str, float | None]:
    """Mean distance of (counts, counts of all) pairs, (X,) each; of pairs by chance; and of the
    measured ones did each share no expert with the rest (what can be reached)."""
    totals = [(part.sum(), whole.sum()) for part, whole in measured]
    apart = [js_distance(np.array([1, 0]), np.array([n, of - n])) for n, of in totals]
    return {
        name: _round(_mean([js_distance(*pair) for pair in measured])),
        f"{name}_by_chance": _round(_mean([js_distance(*pair) for pair in by_chance])),
        f"{name}_attainable": _round(_mean(apart)),
    }


def path_coverage(counter: Counter[tuple[int, ...]], uncounted: int = 0) -> dict[str, Any]:
    """Share of tokens on the most frequent path (a token's heaviest expert, group by group), on the
    four most frequent ones, and how many paths there are; uncounted: tokens on further ones."""
    total = sum(counter.values()) + uncounted
    most = heapq.nsmallest(4, counter.items(), key=lambda item: (-item[1], item[0]))
    shares = [count / total for _, count in most]
    return {
        "top_1": _round(shares[0] if shares else None),
        "top_4": _round(sum(shares) if shares else None),
        "paths": len(counter),
        "uncounted": _round(uncounted / total if total else None),
        "most_frequent": [[list(path), _round(count / total)] for path, count in most],
    }


def shared_words(word: np.ndarray, domain: np.ndarray, count: int) -> list[int]:
    """The `count` words that occur most often in several domains: by the second largest of their
    counts in a domain, so that a word of one domain alone is none of them. word, domain (K,)."""
    tables = np.zeros((domain.max(initial=0) + 1, word.max(initial=0) + 1), dtype=np.int64)
    np.add.at(tables, (domain, word), 1)
    if len(tables) < 2:
        return []
    second = np.sort(tables, 0)[-2]
    order = np.argsort(-second, kind="stable")[:count]
    return [int(w) for w in order if second[w] > 0]


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), 6)
