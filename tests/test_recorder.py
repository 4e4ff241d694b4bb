"""The routing recorder: brute force, hand-made tables, batches of any size."""

import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch

from modeling_monet import MonetConfig, MonetForCausalLM
from tests.test_modeling_moe import VARIANTS, make
from tiered import recorder
from tiered.experts import (
    GroupRouting,
    block_expert_weights,
    experts_of,
    group_layers,
    mean_expert_weights,
    purge,
    routing_of,
)
from tiered.inspection import skewed_sets
from tiered.recorder import (
    RoutingRecorder,
    js_distance,
    load_entropy,
    max_violation,
    path_coverage,
    shared_words,
    used_together,
)

ROWS = {d: np.random.default_rng(i).integers(2, 50, (5, 12)) for i, d in enumerate("abc")}


def monet(decompose: str = "vertical") -> MonetForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "moe_groups": 1}
    sizes |= {"num_attention_heads": 2, "moe_experts": 4, "moe_topk": 2, "moe_heads": 3}
    return MonetForCausalLM(
        MonetConfig(**sizes, moe_dim=4, moe_decompose=decompose, initializer_range=0.3)
    ).eval()


def recorded(model, batch_rows: int = 16, domains: str = "abc") -> RoutingRecorder:
    found = RoutingRecorder(domains, 50)
    for domain in domains:
        found.read(model, domain, ROWS[domain], batch_rows)
    return found


@pytest.fixture(scope="module")
def moe():
    return make(initializer_range=0.4).eval()


def test_sums_are_those_of_a_loop_over_tokens(moe):
    found = recorded(moe)
    weights, uses = np.zeros((3, 3, 6)), np.zeros((3, 3, 6), dtype=int)
    by_word, tokens = np.zeros((3, 50, 6)), Counter()
    paths = {d: Counter() for d in "abc"}
    with torch.no_grad():
        for d, (name, rows) in enumerate(ROWS.items()):
            for row in rows:
                routing = moe(torch.from_numpy(row)[None], output_routing=True).routing
                for t, word in enumerate(row):
                    tops, named = [], []
                    for g in range(3):
                        index, share = routing[g].index[t].tolist(), routing[g].weights[t].tolist()
                        tops.append(index[int(np.argmax(share))])
                        for e, w in zip(index, share, strict=True):
                            weights[d, g, e] += w
                            uses[d, g, e] += 1
                            by_word[g, word, e] += 1
                        named += index
                    tokens[d, int(word), *named] += 1
                    paths[name][tuple(tops)] += 1
    assert np.allclose(found.weights.numpy(), weights, atol=1e-5)
    assert np.array_equal(found.uses.numpy(), uses)
    assert np.array_equal(found.counts.numpy(), uses)
    assert np.array_equal(found.by_word.numpy(), by_word)
    assert Counter(map(tuple, found.sample().tolist())) == tokens  # few: all are kept
    assert found.paths == list(paths.values())
    counts = np.bincount(np.concatenate([r.ravel() for r in ROWS.values()]), minlength=50)
    assert np.array_equal(found.word_counts.numpy(), counts)


def dense_weights(kind: str, model) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per domain the weight of every token's experts, and how often it used each, (N, G, X)."""
    weights, uses = [], []
    for rows in ROWS.values():
        ids = torch.from_numpy(rows)
        with torch.no_grad():
            if kind == "monet":
                gates = model(ids, output_router_probs=True).router_probs
                pairs = [
                    g1.flatten(0, 1)[..., None] * g2.flatten(0, 1)[:, :, None] for g1, g2 in gates
                ]
                own = torch.stack([p.sum(1).flatten(1) for p in pairs], 1)
                used = torch.stack([(p > 0).sum(1).flatten(1) for p in pairs], 1)
            else:
                routing = model(ids, output_routing=True).routing
                zeros = torch.zeros(ids.numel(), model.config.num_experts)
                own = torch.stack([zeros.scatter(1, r.index, r.weights) for r in routing], 1)
                used = own > 0
        weights.append(own.double().numpy())
        uses.append(used.numpy().astype(int))
    return weights, uses


def entropy(p: np.ndarray) -> float:
    p = np.asarray(p, float).ravel()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def information(table: np.ndarray) -> float:
    """NMI of a (D, X) whose rows get equal weight, by entropies."""
    p = table / table.sum(1, keepdims=True) / len(table)
    apart = entropy(p.sum(0)) + entropy(p.sum(1))
    return 2 * (apart - entropy(p)) / apart


@pytest.mark.parametrize("kind", ["moe", "tree", "monet"])
def test_how_domains_share_experts_by_brute_force(kind, moe):
    """Of a tree all of it is of leaves; skewed sets are of what can be purged, all edges."""
    model = {"moe": moe, "monet": monet()}.get(kind) or make("tree", initializer_range=0.4).eval()
    found, first = recorded(model), 2 if kind == "tree" else 0
    weights, uses = dense_weights(kind, model)
    for g, measures in enumerate(found.summary()["groups"]):
        table = np.stack([w[:, g, first:].sum(0) for w in weights])
        assert measures["nmi"] == pytest.approx(information(table), abs=1e-5)
        rows = np.concatenate([w[:, g, first:].reshape(5, 12, -1).sum(1) for w in weights])
        shuffled = []
        for i in range(300):
            labels = np.random.default_rng(i).permutation(np.repeat([0, 1, 2], 5))
            dealt = np.stack([rows[labels == d].sum(0) for d in range(3)])
            shuffled.append(information(dealt))
        # the recorder's mean is of 20 draws: five standard errors
        error = 5 * np.std(shuffled) / np.sqrt(20)
        assert measures["nmi_shuffled"] == pytest.approx(np.mean(shuffled), abs=error)
        assert measures["nmi_shuffled"] > 0
        p = table / table.sum(1, keepdims=True)
        per_expert = sum(
            column.sum() / 3 * np.exp(entropy(column / column.sum()))
            for column in p.T
            if column.any()
        )
        assert measures["effective_domains_per_expert"] == pytest.approx(per_expert, abs=1e-5)
        per_domain = np.mean([np.exp(entropy(row)) for row in p])
        assert measures["effective_experts_per_domain"] == pytest.approx(per_domain, abs=1e-5)
        for a in range(3):
            for b in range(3):
                bits = (entropy((p[a] + p[b]) / 2) - (entropy(p[a]) + entropy(p[b])) / 2) / np.log(
                    2
                )
                assert measures["js_bits"][a][b] == pytest.approx(bits, abs=1e-5)
        load = sum(u[:, g, first:].sum(0) for u in uses)
        assert measures["max_violation"] == pytest.approx(load.max() / load.mean() - 1, abs=1e-5)
        balance = entropy(load / load.sum()) / np.log(len(load))
        assert measures["load_entropy"] == pytest.approx(balance, abs=1e-5)
    pooled = sum(u[:, :, first:].sum((0, 1)) for u in uses)
    expected = pooled.max() / pooled.mean() - 1
    assert found.summary()["max_violation_pooled"] == pytest.approx(expected, abs=1e-5)
    means = np.stack([w.mean(0) for w in weights])  # (D, G, X), all edges of a tree
    for ratio, sets in skewed_sets(found).items():
        for d, name in enumerate("abc"):
            others = np.delete(means, d, 0).max(0)
            own = (means[d] > 0) & (means[d] >= float(ratio) * others)
            held = (means[d] * own).sum(1) / means[d].sum(1)
            assert sets[name]["experts"] == own.sum(1).tolist()
            assert sets[name]["coverage"] == pytest.approx(held.mean(), abs=1e-5)
    assert sum(sum(s["experts"]) for s in skewed_sets(found)["1.2"].values()) > 0


def test_memory_does_not_grow_with_words_times_experts(monkeypatch):
    """400 frequent words over 2^16 experts: their tables together would be 210 MB."""
    monkeypatch.setattr(recorder, "LEAST_USES", 2)
    g, experts = np.random.default_rng(0), 2**16
    found = RoutingRecorder("a", 400)
    index = torch.from_numpy(g.integers(0, experts, (800, 4)))
    sums = torch.zeros(1, experts)
    ids = torch.arange(400).repeat(2)[None]
    tracemalloc.start()
    found.add("a", ids, [GroupRouting(sums, sums, index, torch.ones(800, 4))])
    assert (
        found._token_specialisation(
            found.sample()[:, 2:], found.sample()[:, 1], np.random.default_rng(1)
        )["tis_words"]
        == 400
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_layers_of_groups():
    assert group_layers(make("dense")) == [[1], [2]]
    assert group_layers(make("bank")) == [[0], [1], [2]]
    config = MonetConfig(vocab_size=50, hidden_size=16, num_hidden_layers=5, moe_groups=2)
    with torch.device("meta"):
        assert group_layers(MonetForCausalLM(config)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("kind", ["moe", "monet", "tree"])
def test_batches_of_any_size_record_the_same(kind, moe, monkeypatch):
    monkeypatch.setattr(recorder, "LEAST_USES", 2)
    model = {"moe": moe, "monet": monet()}.get(kind) or make("tree").eval()
    whole, parts = recorded(model, 16), recorded(model, 2)
    for name in ("uses", "counts", "by_word", "stays", "chances", "word_counts", "where"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert torch.allclose(whole.weights, parts.weights, atol=1e-5)
    assert torch.allclose(whole.best, parts.best, atol=1e-6)
    assert whole.paths == parts.paths
    for domain, coverage in whole.summary()["paths"].items():
        assert coverage == parts.summary()["paths"][domain]
    # nor does the order of domains matter
    turned = recorded(model, 3, "cab")
    assert torch.equal(turned.where[..., 1:], whole.where[..., 1:])
    for a, b in zip(turned.summary()["groups"], whole.summary()["groups"], strict=True):
        for name in ("load", "max_violation", "load_entropy", "nmi", "tis", "ics"):
            assert b[name] is not None and a[name] == pytest.approx(b[name], abs=1e-5), name
    assert torch.allclose(torch.cat(whole.by_row), torch.cat(parts.by_row), atol=1e-5)


def test_continuity_by_a_walk_over_every_use(moe):
    found, lasting, could = recorded(moe), {1: 0, 2: 0}, {1: 0, 2: 0}
    with torch.no_grad():
        for rows in ROWS.values():
            routing = moe(torch.from_numpy(rows), output_routing=True).routing
            sets = [[set(t) for t in r.index.tolist()] for r in routing]
            for t in range(rows.size):
                for g in range(3):
                    for e in sets[g][t]:
                        for steps in (s for s in (1, 2) if g + s < 3):
                            could[steps] += 1
                            lasting[steps] += all(e in sets[g + i][t] for i in range(steps + 1))
    for steps in (1, 2):
        ec = found.continuity()[str(steps)]
        assert ec["observed"] == pytest.approx(lasting[steps] / could[steps], abs=1e-6)


def group(index: list[list[int]], experts: int, weights=None) -> GroupRouting:
    """One row of tokens: the experts of each, with equal weights or those given."""
    index = torch.tensor(index)
    weights = torch.ones(index.shape) if weights is None else torch.tensor(weights)
    sums = torch.zeros(1, experts).scatter_add(1, index.view(1, -1), weights.view(1, -1))
    counts = torch.zeros(1, experts).scatter_add(
        1, index.view(1, -1), (weights > 0).float().view(1, -1)
    )
    return GroupRouting(sums, counts, index, weights)


def test_continuity_and_chance_by_hand():
    """Three layers, two experts, one used: of four tokens three stay once, two twice."""
    found = RoutingRecorder("a", 9)
    layers = [[[0], [0], [0], [1]], [[0], [0], [1], [1]], [[0], [1], [1], [1]]]
    found.add("a", torch.tensor([[1, 2, 3, 4]]), [group(layer, 2) for layer in layers])
    ec = found.continuity()
    assert ec["1"]["observed"] == (3 + 3) / 8 and ec["2"]["observed"] == 2 / 4
    # loads 3/4 1/4, 1/2 1/2, 1/4 3/4
    once = 3 / 4 / 2 + 1 / 4 / 2 + 1 / 2 / 4 + 1 / 2 * 3 / 4
    assert ec["1"]["by_chance"] == pytest.approx(once / 2)
    assert ec["2"]["by_chance"] == pytest.approx(3 / 4 / 2 / 4 + 1 / 4 / 2 * 3 / 4)


def test_specialisation_by_hand(monkeypatch):
    """Word 1 always uses expert 0, word 2 either; word 2 uses 0 in domain a and 1 in domain b."""
    monkeypatch.setattr(recorder, "LEAST_USES", 2)
    found = RoutingRecorder("ab", 9)
    found.add("a", torch.tensor([[1, 1, 2, 2]]), [group([[0], [0], [0], [0]], 2)])
    found.add("b", torch.tensor([[1, 1, 2, 2]]), [group([[0], [0], [1], [1]], 2)])
    measures = found.summary()["groups"][0]

    def entropy(p: float) -> float:
        return -sum(q * np.log2(q) for q in (p, 1 - p) if q)

    def distance(p: float, q: float) -> float:
        return np.sqrt(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)

    tis = (distance(1, 3 / 4) + distance(1 / 2, 3 / 4)) / 2
    assert measures["tis"] == pytest.approx(tis, abs=1e-6)
    assert measures["tis_words"] == 2
    assert measures["ics_words"] == 2 and measures["ics_pairs"] == 4
    # word 1 does not tell the domains apart, word 2 does
    ics = (0 + 0 + distance(1, 1 / 2) + distance(0, 1 / 2)) / 4
    assert measures["ics"] == pytest.approx(ics, abs=1e-6)
    apart = distance(1, 1 / 2)  # either word is half of all tokens, either domain half of a word
    assert measures["tis_attainable"] == pytest.approx(apart, abs=1e-6)
    assert measures["ics_attainable"] == pytest.approx(apart, abs=1e-6)
    assert measures["max_violation"] == pytest.approx(6 / 4 - 1)
    assert measures["load_entropy"] == pytest.approx(entropy(3 / 4), abs=1e-6)
    assert measures["share_of_domain"] == [[1.0, 0.0], [0.5, 0.5]]
    assert found.top_words(0) == [[1], [2]]


def test_hand_values():
    assert max_violation(np.array([6, 2, 4, 0])) == 1.0
    assert load_entropy(np.array([5, 5, 0, 0])) == pytest.approx(0.5)
    assert load_entropy(np.array([3, 3])) == pytest.approx(1.0)
    assert js_distance(np.array([4, 0]), np.array([0, 9])) == pytest.approx(1.0)
    assert js_distance(np.array([1, 3]), np.array([10, 30])) == 0.0
    g = np.random.default_rng(0)
    p, q = g.integers(0, 3, 20), g.integers(0, 9, 20)
    a, b = p / p.sum(), q / q.sum()
    bits = (entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2) / np.log(2)
    assert js_distance(p, q) == pytest.approx(bits**0.5) and (p == 0).any()
    coverage = path_coverage(Counter({(0, 1): 5, (1, 1): 2, (2, 2): 1, (3, 3): 1, (4, 4): 1}))
    assert coverage["top_1"] == 0.5 and coverage["top_4"] == 0.9 and coverage["paths"] == 5
    assert coverage["most_frequent"][0] == [[0, 1], 0.5]
    word = np.array([1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 2, 4])
    assert shared_words(word, np.repeat([0, 1, 2], 4), 5) == [2, 3]  # 1 and 4: one domain alone
    assert shared_words(word, np.zeros(12, dtype=int), 5) == []
    tied = Counter({(2, 1): 3, (0, 1): 3, (1, 1): 3})
    assert [p for p, _ in path_coverage(tied)["most_frequent"]] == [[0, 1], [1, 1], [2, 1]]


@pytest.mark.parametrize("kind", ["moe", "tree"])
def test_experts_used_together_by_a_walk_over_tokens(kind, moe):
    model = moe if kind == "moe" else make("tree", initializer_range=0.4).eval()
    found, first = recorded(model), 2 if kind == "tree" else 0
    for g, measures in enumerate(found.summary()["groups"]):
        sets = []
        with torch.no_grad():
            for rows in ROWS.values():
                routing = model(torch.from_numpy(rows), output_routing=True).routing[g]
                sets += [{*t} - {*range(first)} for t in routing.index.tolist()]
        experts, share = measures["together"]["experts"], measures["together"]["share"]
        uses = {e: sum(e in s for s in sets) for s in sets for e in s}
        assert [uses.get(e, 0) for e in experts] == sorted(uses.values(), reverse=True) + [0] * (
            len(experts) - len(uses)
        )
        assert len(experts) == (4 if kind == "tree" else 6)
        for i, a in enumerate(experts):
            for j, b in enumerate(experts):
                both = sum(a in s and b in s for s in sets)
                assert share[i][j] == pytest.approx(both / max(1, uses.get(a, 0)), abs=1e-4)


def test_the_busiest_experts_used_together_by_hand(monkeypatch):
    monkeypatch.setattr(recorder, "TOGETHER", 2)
    index = np.array([[0, 1], [1, 2], [1, -1], [2, 1]])
    found = used_together(index, np.bincount([0, 1, 1, 2, 1, 2, 1], minlength=4))
    assert found == {"experts": [1, 2], "share": [[1.0, 0.5], [1.0, 1.0]]}
    idle = used_together(np.full((3, 2), -1), np.zeros(4))
    assert idle["share"] == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("kind", ["moe", "tree", "monet"])
def test_measures_by_chance_are_those_of_routing_that_knows_nothing(kind, monkeypatch):
    """Words and domains dealt out to the tokens of a real routing: nothing stands out. Draws from
    a multinomial would not do: a token's experts are distinct."""
    monkeypatch.setattr(recorder, "LEAST_USES", 8)
    model = {"moe": make(initializer_range=0.4, num_experts_per_tok=4).eval(), "monet": monet()}
    model = model.get(kind) or make("tree", initializer_range=0.4).eval()
    generator = np.random.default_rng(5)
    ids = generator.integers(2, 50, (3 * 100, 12))
    with torch.no_grad():
        groups = routing_of(model, torch.from_numpy(ids))
    found = RoutingRecorder("abc", 50)
    order = generator.permutation(ids.size)  # of tokens' experts, whatever the words are
    for d, domain in enumerate("abc"):
        own = order[d * 1200 : (d + 1) * 1200]
        parts = [
            GroupRouting(g.sums[:100], g.counts[:100], g.index[own], g.weights[own], g.first)
            for g in groups
        ]
        words = torch.from_numpy(generator.integers(2, 50, (100, 12)))
        found.add(domain, words, parts)
    measures = found.summary()["groups"]
    for name in ("tis", "ics"):
        observed, by_chance = (sum(m[key] for m in measures) for key in (name, f"{name}_by_chance"))
        assert observed == pytest.approx(by_chance, rel=0.1), name


def test_a_sample_is_the_same_whatever_the_batches(moe, monkeypatch):
    monkeypatch.setattr(recorder, "SAMPLE", 40)
    whole, parts = recorded(moe, 16), recorded(moe, 1)
    a, b = whole.sample(), parts.sample()
    assert len(a) == 40 and np.array_equal(a, b)
    assert set(a[:, 0]) == {0, 1, 2}


def test_a_trees_paths_and_balance_are_of_its_leaves():
    model = make("tree", initializer_range=0.4).eval()  # edges 0, 1, then leaves 2 .. 5
    found, leaves, paths = recorded(model), np.zeros((3, 4)), {d: Counter() for d in "abc"}
    with torch.no_grad():
        for name, rows in ROWS.items():
            routing = model(torch.from_numpy(rows), output_routing=True).routing
            for t in range(60):
                for g in range(3):
                    leaves[g] += np.bincount(routing[g].chosen[t], minlength=4)
                best = (int(r.chosen[t][r.probs[t][r.chosen[t]].argmax()]) + 2 for r in routing)
                paths[name][tuple(best)] += 1
    assert found.paths == list(paths.values())
    for g, measures in enumerate(found.summary()["groups"]):
        expected = leaves[g].max() / leaves[g].mean() - 1
        assert measures["max_violation"] == pytest.approx(expected, abs=1e-5)
        assert sum(measures["load"][2:]) / sum(measures["load"]) < 0.7  # the page shows all edges


def test_contexts_are_the_heaviest_tokens_in_order(moe):
    found = recorded(moe)
    for g in range(3):
        heaviest = {e: [] for e in range(6)}
        for domain, rows in ROWS.items():
            routing = routing_of(moe, torch.from_numpy(rows))[g]
            for n, (index, weights) in enumerate(zip(routing.index, routing.weights, strict=True)):
                for e, w in zip(index.tolist(), weights.tolist(), strict=True):
                    heaviest[e].append((w, domain, n // 12, n % 12))
        for e, contexts in enumerate(found.contexts(g)):
            expected = sorted(heaviest[e], reverse=True, key=lambda c: c[0])[:8]
            assert [c[0] for c in contexts] == pytest.approx([c[0] for c in expected], abs=1e-6)
            for weight, domain, row, position in contexts:
                assert any(
                    c[1:] == (domain, row, position) and c[0] == pytest.approx(weight, abs=1e-6)
                    for c in heaviest[e]
                )


def test_what_would_be_too_large_is_left_out(moe, monkeypatch):
    monkeypatch.setattr(recorder, "LARGEST", 3 * 6 * 9)
    found = recorded(moe)
    assert found.by_word is None and found.by_row is None and found.rows_of == []
    assert len(found.sample()) == 3 * 6 * 9 // (3 * 2)
    measures = found.summary()["groups"][0]
    assert measures["nmi_shuffled"] is None and measures["nmi"] > 0
    assert found.top_words(0) == [[]] * 6
    everything = found.summary()["paths"]["a"]
    monkeypatch.setattr(recorder, "PATHS", 2)
    found = recorded(moe)
    assert all(len(c) == 2 for c in found.paths)
    least = found.summary()["paths"]["a"]
    assert everything["uncounted"] == 0.0 and everything["paths"] > 2
    assert least["uncounted"] + least["top_4"] == pytest.approx(1, abs=1e-5)
    assert sum(found.paths[0].values()) + found.pathless[0] == found.tokens[0] == 60


def test_a_monets_heads_use_one_expert_each():
    model = monet()
    rows = torch.from_numpy(ROWS["a"])
    routing, (g1, g2) = (
        routing_of(model, rows)[1],
        model(rows, output_router_probs=True).router_probs[1],
    )
    assert routing.index.shape == (60, 3)
    for token, (row, position) in enumerate(np.ndindex(5, 12)):
        for h in range(3):
            pair = torch.outer(g1[row, position, h], g2[row, position, h])
            assert routing.index[token, h] == pair.argmax()
            assert routing.weights[token, h] == pytest.approx(pair.max().item())
    assert torch.allclose(routing.sums.sum(1), torch.tensor(12.0 * 3))
    kept = (g1 > 0)[..., :, None] & (g2 > 0)[..., None, :]  # (B, T, H, E, E)
    assert torch.equal(routing.counts, kept.sum((1, 2)).flatten(1).float())


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("decompose", ["vertical", "horizontal"])
def test_a_purged_monet_is_read_as_it_computes(renormalize, decompose):
    """Purged experts have no weight, whatever the router's gates say of their halves."""
    model = monet(decompose)
    keep = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.6
    model.purge_experts(keep, renormalize)
    ids = torch.from_numpy(ROWS["a"])
    gates = model(ids, output_router_probs=True).router_probs
    for g, routing in enumerate(routing_of(model, ids)):
        g1, g2 = gates[g]
        weight = torch.einsum("bthi,bthj->bthij", g1, g2) * keep[g]
        if renormalize:
            total = weight.sum((-1, -2), keepdim=True)
            weight = torch.where(total > 1e-4, weight / total, 0.0)
        assert torch.allclose(routing.sums, weight.sum((1, 2)).flatten(1), atol=1e-5)
        most = weight.flatten(0, 1).flatten(2).max(-1)  # (B T, H)
        assert torch.allclose(routing.weights, most.values, atol=1e-6)
        assert (routing.index == most.indices)[most.values > 0].all()
        assert not routing.sums[:, ~keep[g].flatten()].any()
        assert not routing.counts[:, ~keep[g].flatten()].any()


def test_a_layer_without_experts_is_no_number(monkeypatch):
    """All experts of one layer purged: None, and tokens on paths through nothing."""
    monkeypatch.setattr(recorder, "LEAST_USES", 2)
    model = make(initializer_range=0.4).eval()
    keep = torch.ones(3, 6).bool()
    keep[1] = False
    model.purge_experts(keep)
    found = recorded(model)
    first, empty, _ = found.summary()["groups"]
    assert first["tis_words"] > 0 and empty["tis_words"] == empty["ics_pairs"] == 0
    assert set(first) == set(empty) and first["nmi"] > 0
    for name in ("max_violation", "load_entropy", "nmi", "tis", "ics", "js_bits"):
        assert empty[name] is None, name
    assert all(path[1] == -1 for counter in found.paths for path in counter)
    json.dumps([found.summary(), found.snapshot()], allow_nan=False)
    assert found.snapshot()["max_violation"][1] is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_mean_weights_of_every_variant_by_loops(variant):
    model = make(variant, initializer_range=0.3).train()
    ids = torch.from_numpy(ROWS["a"])
    shape = (model.config.num_moe_layers, model.config.num_experts)
    expected = torch.zeros(5, *shape, dtype=torch.float64)
    with torch.no_grad():
        for g, routing in enumerate(model.eval()(ids, output_routing=True).routing):
            for n in range(60):
                for e, w in zip(
                    routing.index[n].tolist(), routing.weights[n].tolist(), strict=True
                ):
                    expected[n // 12, g, e] += w
    model.train()
    assert torch.allclose(block_expert_weights(model, ids), expected / 12, atol=1e-6)
    found = mean_expert_weights(model, ids.split(2))
    assert torch.allclose(found, expected.sum(0) / 60, atol=1e-6) and model.training
    for router in model.model.routers():
        assert router.load is None  # reading is no training


def test_experts_of_a_domain_are_purged():
    """One expert of layer 1 made the domain's own: purging it moves that domain alone."""
    model = make(initializer_range=0.3).eval()
    scores = {d: mean_expert_weights(model, [torch.from_numpy(r)]) for d, r in ROWS.items()}
    found = experts_of(scores, "b", 1.05)
    assert found.shape == (3, 6) and found.any()
    before = model(torch.from_numpy(ROWS["b"])).logits
    assert torch.equal(purge(model, scores, "b", 1.05), found)
    for g, routing in enumerate(routing_of(model, torch.from_numpy(ROWS["b"]))):
        assert not routing.sums[:, found[g]].any()
    assert not torch.equal(model(torch.from_numpy(ROWS["b"])).logits, before)
