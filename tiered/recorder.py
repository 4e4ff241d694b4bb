"""What a model's experts did with the text of every domain, read once and in bounded memory.

A recorder is fed batches of one domain after another and keeps sums: of weights, of uses per word
and per path, the few contexts that gave an expert most weight, and a sample of tokens. Everything
that the report says of experts comes from them, and nothing depends on the size of batches.

Shapes: D domains, G groups (layers; a Monet's router groups), X experts of a group, S experts of a
token, N = B T tokens of a batch, M uses of experts by them, V words, R rows, C contexts kept, K
tokens of the sample.
"""

import heapq
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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
SAMPLE = 2**17  # tokens whose experts are kept, for what needs each of them
LARGEST = 2**27  # entries of a table; one that would be larger is not kept
DRAWN = 256  # experts of a group whose use by every domain is told
TOGETHER = 32  # experts of a group, the busiest, whose use together is told
FOLLOWED = 512  # tokens whose experts are kept of every moment of training, for saturation
LEAST_USES = 20  # occurrences of a word (ICS: in a domain) before its experts are compared
WATCHED = 64  # words whose experts are compared between domains (ICS)
SHUFFLES = 20
STEPS = (1, 2, 3)  # of expert continuity


class Uses(NamedTuple):
    """Which experts of a group a batch's tokens used, in order of token and expert.

    key (M,): token X + expert; token, expert (M,); weight (M,) float64, above 0.
    """

    key: np.ndarray
    token: np.ndarray
    expert: np.ndarray
    weight: np.ndarray

    def among(self, kept: np.ndarray) -> "Uses":
        """Those that are kept, (M,) bool."""
        return Uses(*(part[kept] for part in self))


class RoutingRecorder:
    """Sums over the text of every domain.

    weights (D, G, X) float64: soft counts. counts (D, G, X) float64: uses of experts (of a Monet:
    by all heads), uses (D, G, X) of those that a token is said to have (of a Monet: the heaviest of
    every head), which hold `named` (G,) of the weight. stays, chances (G,): uses of an expert of
    some group that last for s more groups, and that could. by_word (G, V, X): uses per word; by_row
    (R, G, X) float32: weights of every row; None where too large. Of a tree every measure is of its
    leaves alone, for a token's weight stands once on every level: `first` is the first of their
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
        order, rows = np.zeros(0, dtype=np.uint64), np.zeros((0, 2 + shape[0] * slots), np.int32)
        self._sampled = [(order, rows)]
        self._waiting = 0  # tokens of all but the first part

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
        words = ids.flatten().numpy()
        self._add_sample(d, words, groups, order)
        self._add_uses(d, words, [_uses(group) for group in groups], row, position, order)

    def _add_uses(
        self,
        d: int,
        words: np.ndarray,
        groups: list[Uses],
        row: np.ndarray,
        position: np.ndarray,
        order: np.ndarray,
    ) -> None:
        """Add what tokens used: their ids, rows, positions and places in a random order (N,)."""
        experts, among = self.weights.shape[-1], order / 2.0**64
        place = np.stack([np.full_like(row, d), row, position], 1)
        for g, used in enumerate(groups):
            self.uses[d, g] += torch.from_numpy(np.bincount(used.expert, minlength=experts))
            if self.by_word is not None:
                cells = torch.from_numpy(words[used.token].astype(np.int64) * experts + used.expert)
                ones = torch.ones(len(cells), dtype=torch.int32)
                self.by_word[g].view(-1).index_add_(0, cells, ones)
            self._add_contexts(g, used, place, among)
        leaves = [used.among(used.expert >= self.first) for used in groups]
        self._add_continuity([used.key for used in leaves])
        self._add_paths(d, np.stack([_heaviest(used, len(words)) for used in leaves], 1))

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
        self._sampled.append((order, rows.numpy().astype(np.int32)))
        self._waiting += len(ids)
        if self._waiting > self.sample_size:  # seldom: it moves the whole sample
            self._settle()

    def _settle(self) -> tuple[np.ndarray, np.ndarray]:
        """The sample's tokens (K, ..) and their places in the random order (K,)."""
        if self._waiting:
            order, sample = (np.concatenate(parts) for parts in zip(*self._sampled, strict=True))
            if len(order) > self.sample_size:
                kept = np.argpartition(order, self.sample_size - 1)[: self.sample_size]
                order, sample = order[kept], sample[kept]
            self._sampled, self._waiting = [(order, sample)], 0
        return self._sampled[0][1], self._sampled[0][0]

    def sample(self) -> np.ndarray:
        """Tokens (K, 2 + G S) that stand for all, in a random order: domain, word, and per group
        the experts (-1: a place without one)."""
        sample, order = self._settle()
        return sample[np.argsort(order)]

    def _add_contexts(self, g: int, used: Uses, place: np.ndarray, among: np.ndarray) -> None:
        """Keep an expert's heaviest tokens; equal ones in an order as good as random. place (N, 3):
        domain, row, position; among (N,) in [0, 1)."""
        # less than two neighbouring float32 differ by: no other tokens change places
        exact = used.weight * (1 + 2.0**-26 * among[used.token])
        better = exact > self.best[g, :, -1].numpy()[used.expert]
        used, exact = used.among(better), exact[better]
        order = np.lexsort((-exact, used.expert))
        experts, begin = np.unique(used.expert[order], return_index=True)
        spans = np.diff(begin, append=len(order))
        rank = np.arange(len(order)) - np.repeat(begin, spans)
        kept = rank < CONTEXTS
        own, rank = np.repeat(np.arange(len(experts)), spans)[kept], rank[kept]
        values = np.zeros((len(experts), 2 * CONTEXTS))
        where = np.full((*values.shape, 3), -1)
        at = torch.from_numpy(experts)
        values[:, :CONTEXTS], where[:, :CONTEXTS] = self.best[g, at], self.where[g, at]
        values[own, CONTEXTS + rank] = exact[order][kept]
        where[own, CONTEXTS + rank] = place[used.token[order][kept]]
        best = np.argsort(-values, 1, kind="stable")[:, :CONTEXTS]
        self.best[g, at] = torch.from_numpy(np.take_along_axis(values, best, 1))
        self.where[g, at] = torch.from_numpy(np.take_along_axis(where, best[..., None], 1))

    def _add_continuity(self, used: list[np.ndarray]) -> None:
        """Add what stays from group to group: per group the keys of its uses, in order."""
        for first, lasting in enumerate(used):
            could = len(lasting)
            for steps in (s for s in STEPS if first + s < len(used)):
                lasting = lasting[_is_in(lasting, used[first + steps])]
                self.stays[steps] += len(lasting)
                self.chances[steps] += could

    def _add_paths(self, d: int, tops: np.ndarray) -> None:
        counter = self.paths[d]
        for path, count in Counter(map(tuple, tops.tolist())).items():
            if len(counter) < PATHS or path in counter:
                counter[path] += count
            else:
                self.pathless[d] += count

    # --- measures ---------------------------------------------------------------------------

    def joint(self, g: int, first: int = 0) -> np.ndarray:
        """Weight of domain and expert of a group, (D, X - first), of experts from `first` on, every
        domain's row summing to 1 / D; 0 where none of them has any."""
        rows = self.weights[:, g, first:].numpy()
        total = rows.sum(1, keepdims=True)
        return np.divide(rows, total, out=np.zeros_like(rows), where=total > 0) / len(rows)

    def load(self, g: int) -> np.ndarray:
        """Uses of every expert of a group, (X,)."""
        return self.counts[:, g].sum(0).numpy()

    def pooled_load(self) -> np.ndarray:
        """Uses of every expert (a tree's leaves) in all groups together, (X - first,): what a
        balancing loss that pools layers balances."""
        return self.counts[:, :, self.first :].sum((0, 1)).numpy()

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """Every measure, of every group and over groups, as JSON-ready values; None where there is
        nothing to measure."""
        rows = None if self.by_row is None else torch.cat(self.by_row).double().numpy()
        sample = self.sample()
        groups = [
            self._group(g, None if rows is None else rows[:, g], sample, seed)
            for g in range(self.weights.shape[1])
        ]
        return {
            "domains": self.domains,
            "tokens": dict(zip(self.domains, self.tokens.tolist(), strict=True)),
            "experts": self.weights.shape[-1],
            "first_leaf": self.first,
            "groups": groups,
            "max_violation_pooled": _round(max_violation(self.pooled_load())),
            "continuity": self.continuity(),
            "paths": {
                d: path_coverage(*own)
                for d, *own in zip(self.domains, self.paths, self.pathless, strict=True)
            },
        }

    def snapshot(self) -> dict[str, Any]:
        """What is worth keeping of many moments: loads (G, X), their MaxVio, NMI and continuity;
        and per group the experts of some tokens, of the same ones whenever the text is the same."""
        groups = range(self.weights.shape[1])
        loads = [self.load(g) for g in groups]
        followed = self.sample()[:FOLLOWED]
        return {
            "domains": self.domains,
            "load": [shares(load) for load in loads],
            "max_violation": [_round(max_violation(load[self.first :])) for load in loads],
            "nmi": [
                _round(normalised_information(joint)) if joint.any() else None
                for joint in (self.joint(g, self.first) for g in groups)
            ],
            "chosen": [
                [np.unique(own[own >= 0]).tolist() for own in self._experts_in(followed, g)]
                for g in groups
            ],
            "continuity": self.continuity(),
        }

    def _group(
        self, g: int, rows: np.ndarray | None, sample: np.ndarray, seed: int
    ) -> dict[str, Any]:
        load, joint = self.load(g), self.joint(g) * len(self.domains)
        drawn = np.sort(np.argsort(-joint.max(0), kind="stable")[:DRAWN])
        index = self._experts_in(sample, g)
        generator = np.random.default_rng([seed, g, 1])
        domain, word = sample[:, 0], sample[:, 1]
        return {
            "load": shares(load),
            "max_violation": _round(max_violation(load[self.first :])),
            "load_entropy": _round(load_entropy(load[self.first :])),
            "drawn": drawn.tolist(),
            "share_of_domain": joint[:, drawn].round(6).tolist(),
            "together": used_together(index, load, self.first),
            **self._domains_apart(g, rows, np.random.default_rng([seed, g])),
            **self._token_specialisation(index, word, generator),
            **self._context_specialisation(index, word, domain, generator),
        }

    def _experts_in(self, sample: np.ndarray, g: int) -> np.ndarray:
        """Experts (K, S) of a sample's tokens in a group; -1: a place without one."""
        slots = (sample.shape[1] - 2) // self.weights.shape[1]
        return sample[:, 2 + g * slots : 2 + (g + 1) * slots]

    def _domains_apart(
        self, g: int, rows: np.ndarray | None, generator: np.random.Generator
    ) -> dict[str, Any]:
        """How experts divide domains among them. rows (R, X): weights of every row, or None."""
        names = ("nmi", "nmi_shuffled", "nmi_shuffled_sd", "weight_named")
        numbers = ("effective_domains_per_expert", "effective_experts_per_domain")
        found = dict.fromkeys((*names, *numbers, "js_bits"))
        joint = self.joint(g, self.first)
        if not joint.any():  # every expert of the layer is purged
            return found
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
            own, labels = rows[:, self.first :], np.array(self.rows_of)
            shuffled = permuted_information(own, labels, SHUFFLES, generator)
            found["nmi_shuffled"] = _round(shuffled.mean())
            found["nmi_shuffled_sd"] = _round(shuffled.std(ddof=1))
        return found

    def _token_specialisation(
        self, index: np.ndarray, word: np.ndarray, generator: np.random.Generator
    ) -> dict[str, float | None]:
        """TIS: how far a word's experts are from those of all tokens, over frequent words; the same
        with words dealt out anew; and were no word's experts another's. index (K, S), word (K,)."""
        frequent = np.bincount(word, minlength=self.words) >= LEAST_USES
        everything = sum(self._tables(np.zeros(len(word), dtype=np.int64), index))

        def pairs(words: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            tables = self._tables(np.where(frequent[words], words, -1), index)
            return ((table, everything) for table in tables)

        dealt = pairs(generator.permutation(word))
        found = _of_distances(_distances(pairs(word)), _distances(dealt), "tis")
        return found | {"tis_words": found.pop("tis_pairs")}

    def _context_specialisation(
        self,
        index: np.ndarray,
        word: np.ndarray,
        domain: np.ndarray,
        generator: np.random.Generator,
    ) -> dict[str, float | None]:
        """ICS: how far a word's experts in a domain are from its experts in all of them, over words
        that are frequent in several; the same with its occurrences dealt out to domains anew."""
        measured, by_chance, words = [], [], 0
        for w in shared_words(word, domain, WATCHED):
            here = word == w
            own, labels = index[here], domain[here]
            enough = np.bincount(labels, minlength=len(self.domains)) >= LEAST_USES
            kept = enough[labels]
            if enough.sum() < 2:
                continue
            words += 1
            for pairs, given in (
                (measured, labels[kept]),
                (by_chance, generator.permutation(labels[kept])),
            ):
                tables = list(self._tables(given, own[kept]))
                pairs += _distances((t, sum(tables)) for t in tables)
        found = _of_distances(measured, by_chance, "ics")
        return found | {"ics_words": words}

    def _tables(self, labels: np.ndarray, index: np.ndarray) -> Iterator[np.ndarray]:
        """Uses (X,) of experts, label by label: labels (K,), experts index (K, S); -1 of either is
        none. One at a time: of a Monet's experts those of all words would fill the memory."""
        order = np.argsort(labels, kind="stable")
        for own in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
            if len(own) and labels[own[0]] >= 0:
                experts = index[own]
                table = np.bincount(experts[experts >= 0], minlength=self.weights.shape[-1])
                if table.any():
                    yield table

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


def _uses(group: GroupRouting) -> Uses:
    """What a batch's tokens used of a group's experts."""
    index, weights = group.index.numpy(), group.weights.double().numpy()
    experts = group.sums.shape[1]
    keys = np.arange(len(index))[:, None] * experts + index
    key, place = np.unique(keys, return_inverse=True)  # a Monet's heads may name one expert
    weight = np.bincount(place.ravel(), weights.ravel(), minlength=len(key))
    token, expert = np.divmod(key, experts)
    return Uses(key, token, expert, weight).among(weight > 0)


def _heaviest(used: Uses, tokens: int) -> np.ndarray:
    """Expert (N,) that every token gave most weight, the first of equal ones; -1 where no expert is
    left to it."""
    found = np.full(tokens, -1)
    if len(used.token):
        begin = np.flatnonzero(np.diff(used.token, prepend=-1))
        spans = np.diff(begin, append=len(used.token))
        most = np.repeat(np.maximum.reduceat(used.weight, begin), spans)
        heaviest = np.flatnonzero(used.weight == most)[::-1]  # the first of equal ones is set last
        found[used.token[heaviest]] = used.expert[heaviest]
    return found


def _is_in(keys: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which keys are among others, bool; both in order."""
    if not len(others):
        return np.zeros(len(keys), dtype=bool)
    place = np.searchsorted(others, keys).clip(max=len(others) - 1)
    return others[place] == keys


def shares(load: np.ndarray) -> list[float]:
    """Share of all uses of every expert, of loads (X,); four digits, however many there are."""
    return [float(f"{share:.4g}") for share in load / max(load.sum(), 1.0)]


def used_together(index: np.ndarray, load: np.ndarray, first: int = 0) -> dict[str, Any]:
    """Co-activation (arXiv:2409.02060, section 5) of the busiest experts: of the tokens that use
    the one, the share that uses the other as well; 1 for itself, 0 for an expert without tokens.

    index (K, S): experts of tokens, -1 for none; load (X,); first: the first of a tree's leaves.
    """
    busy = first + np.argsort(-load[first:], kind="stable")[:TOGETHER]
    place = np.full(len(load) + 1, len(busy))  # the last one is where -1 points to
    place[busy] = np.arange(len(busy))
    used = np.zeros((len(index), len(busy) + 1), dtype=np.float32)
    np.put_along_axis(used, place[index], 1, 1)
    both = used.T.astype(np.float64) @ used
    alone = both.diagonal()[:, None].clip(min=1)
    return {"experts": busy.tolist(), "share": (both / alone)[:-1, :-1].round(4).tolist()}


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
    used = p > 0  # what p does not use may be one: of many experts a word uses few
    p, q = np.append(p[used], 0), np.append(q[used], q.sum() - q[used].sum())
    return float(np.nan_to_num(jensenshannon(p, q, base=2)))  # of equal ones rounding may give nan


def _distances(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[tuple[float, float]]:
    """Of (counts, counts of all) pairs, (X,) each: their distance, and what it were did the two
    share no expert but those counts themselves."""
    found = []
    for part, whole in pairs:
        n, rest = part.sum(), whole.sum() - part.sum()
        apart = js_distance(np.array([1, 0]), np.array([n, rest]))
        found.append((js_distance(part, whole), apart))
    return found


def _of_distances(
    measured: list[tuple[float, float]], by_chance: list[tuple[float, float]], name: str
) -> dict[str, float | None]:
    """Mean distance, by chance, and what can be reached; and of how many pairs."""
    return {
        name: _round(_mean([distance for distance, _ in measured])),
        f"{name}_by_chance": _round(_mean([distance for distance, _ in by_chance])),
        f"{name}_attainable": _round(_mean([apart for _, apart in measured])),
        f"{name}_pairs": len(measured),
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
