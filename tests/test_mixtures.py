"""Mixtures of partition models: weights sum to 1, see no later token, and the cases by hand."""

import dataclasses
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tiered.evaluation import ExpertTable
from tiered.mixtures import MIXTURES, Evidence, MixtureSettings, keep_top, mix
from tiered.store import read_json

R, S, N = 4, 6, 3
SETTINGS = MixtureSettings()


def evidence(present=(0, 1, 2), seed: int = 0, rows: int = R) -> Evidence:
    """Random scores and log-probabilities; absent partitions as evaluation has them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, S, N, generator=generator) * 2 - 1
    log_probs = torch.rand(rows, S, N, generator=generator, dtype=torch.float64).log()
    earlier = torch.rand(5, S, N, generator=generator, dtype=torch.float64).log()
    for j in set(range(N)) - set(present):
        scores[..., j], log_probs[..., j], earlier[..., j] = -math.inf, math.nan, math.nan
    return Evidence(scores, log_probs, earlier, present)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("top_k", [0, 1, 2])
@pytest.mark.parametrize("likelihood", ["cumulative", "last_token"])
def test_weights_sum_to_one_and_absent_partitions_have_none(name, present, top_k, likelihood):
    given = evidence(present)
    settings = MixtureSettings(top_k=top_k, likelihood=likelihood)
    weights = MIXTURES[name](given, settings).exp()
    assert torch.allclose(weights.sum(-1), torch.ones(R, S, dtype=torch.float64), atol=1e-12)
    assert all(weights[..., j].abs().max() == 0 for j in set(range(N)) - set(present))
    if top_k and name not in ("average", "hindsight"):
        assert ((weights > 0).sum(-1) <= top_k).all()
    # absent partitions (NaN) are skipped, not multiplied by 0
    nats = mix(weights.log(), given.log_probs)
    by_hand = -(weights * given.log_probs.exp().nan_to_num(0)).sum(-1).log()
    assert torch.allclose(nats, by_hand, atol=1e-12)


@pytest.mark.parametrize("name", MIXTURES)
def test_one_partition_is_the_bare_model_exactly(name):
    given = evidence((1,))
    assert torch.equal(
        mix(MIXTURES[name](given, SETTINGS), given.log_probs), -given.log_probs[..., 1]
    )


@pytest.mark.parametrize("name", sorted(set(MIXTURES) - {"hindsight"}))
@pytest.mark.parametrize("likelihood", ["cumulative", "last_token"])
def test_weights_do_not_see_the_token_they_predict(name, likelihood):
    """Position t's weights rest on scores up to t (tokens 0..t) and on predictions before t."""
    given, settings = evidence(rows=1), MixtureSettings(likelihood=likelihood)
    weights = MIXTURES[name](given, settings)
    for t in range(S):
        log_probs, scores = given.log_probs.clone(), given.scores.clone()
        log_probs[:, t:] = -torch.rand(1, S - t, N, dtype=torch.float64)
        scores[:, t + 1 :] = 0.5
        changed = dataclasses.replace(given, log_probs=log_probs, scores=scores)
        found = MIXTURES[name](changed, settings)
        assert torch.equal(found[:, : t + 1], weights[:, : t + 1])
        if t + 1 < S and name != "average":
            assert not torch.equal(found[:, t + 1 :], weights[:, t + 1 :])


def test_distance_weights_by_formula_and_cold_is_top_1():
    given = evidence()
    squared = 2 - 2 * given.scores.double()  # of unit vectors
    for power in (2, 4):
        found = MIXTURES["distance"](given, MixtureSettings(0.5, distance_power=power))
        expected = (-(squared ** (power / 2)) / 0.5).softmax(-1)
        assert torch.allclose(found.exp(), expected, atol=1e-12)
    euclidean = dataclasses.replace(given, scores=-squared, metric="euclidean")
    expected = MIXTURES["distance"](given, SETTINGS)
    assert torch.allclose(MIXTURES["distance"](euclidean, SETTINGS), expected, atol=1e-5)
    top = mix(MIXTURES["distance"](given, MixtureSettings(top_k=1)), given.log_probs)
    cold = mix(MIXTURES["distance"](given, MixtureSettings(1e-9)), given.log_probs)
    chosen = given.log_probs.gather(-1, given.scores.argmax(-1, keepdim=True))[..., 0]
    assert torch.equal(top, -chosen) and torch.equal(cold, top)
    hot = MIXTURES["distance"](given, MixtureSettings(1e9)).exp()
    assert torch.allclose(hot, torch.full_like(hot, 1 / 3), atol=1e-8)
    frozen = MIXTURES["distance"](given, MixtureSettings(routing_fraction=0.5))
    free = MIXTURES["distance"](given, SETTINGS)
    assert torch.equal(frozen[:, :3], free[:, :3])
    assert torch.equal(frozen[:, 3:], free[:, 2:3].expand(-1, 3, -1))


def test_bayes_by_hand():
    """Three domains; a row of three tokens with likelihoods (.5 .25 .1), (.5 .5 .2), (.1 .4 .4)."""
    likelihood = torch.tensor([[0.5, 0.25, 0.1], [0.5, 0.5, 0.2], [0.1, 0.4, 0.4]])
    rows = likelihood.double().log().expand(2, -1, -1)
    given = Evidence(torch.zeros(2, 3, 3), rows, rows[:1], (0, 1, 2))
    uniform = MIXTURES["bayes_uniform"](given, SETTINGS).exp()
    second = [0.5 / 0.85, 0.25 / 0.85, 0.1 / 0.85]
    third = [0.25 / 0.395, 0.125 / 0.395, 0.02 / 0.395]
    expected = torch.tensor([[1 / 3] * 3, second, third], dtype=torch.float64)
    assert torch.allclose(uniform, expected.expand(2, -1, -1), atol=1e-7)
    last = MIXTURES["bayes_uniform"](given, MixtureSettings(likelihood="last_token")).exp()
    assert torch.allclose(last[0, 2], torch.tensor([0.5, 0.5, 0.2]).double() / 1.2, atol=1e-7)
    # after the row: .025 .05 .008, so the next prior is .7/3 + .3 of their shares
    posterior = torch.tensor([0.025, 0.05, 0.008], dtype=torch.float64) / 0.083
    prior = 0.7 / 3 + 0.3 * posterior
    updating = MIXTURES["bayes_updating"](given, SETTINGS).exp()
    assert torch.allclose(updating[0], expected, atol=1e-7)
    assert torch.allclose(updating[1, 0], prior, atol=1e-7)
    weighted = prior * torch.tensor([0.5, 0.25, 0.1])
    assert torch.allclose(updating[1, 1], weighted / weighted.sum(), atol=1e-7)
    cached = MIXTURES["bayes_cached"](given, SETTINGS).exp()  # one earlier row, for both rows
    assert torch.allclose(cached[0], updating[1], atol=1e-12)
    assert torch.equal(cached[0], cached[1])
    # the mixture itself: sum of weight times probability
    nats = mix(uniform.log(), rows)
    assert nats[0, 1].item() == pytest.approx(-math.log(0.395 / 0.85), abs=1e-7)


def test_top_k_ties_go_to_the_lowest_index():
    weights = torch.tensor([0.25, 0.25, 0.4, 0.1], dtype=torch.float64).log()
    assert torch.allclose(
        keep_top(weights, 2).exp(), torch.tensor([0.25 / 0.65, 0, 0.4 / 0.65, 0]).double()
    )
    assert torch.allclose(keep_top(weights, 0).exp(), weights.exp())


def test_hindsight_takes_the_best_partition_of_each_row():
    given = evidence()
    nats = mix(MIXTURES["hindsight"](given, SETTINGS), given.log_probs).sum(1)
    assert torch.allclose(nats, -given.log_probs.sum(1).amax(-1), atol=1e-12)


def test_expert_perplexities_by_hand():
    table = ExpertTable()
    table.add(["0", "1"], np.array([[2.0, np.nan], [4.0, np.nan]]), 2)
    table.add(["1"], np.array([[8.0, np.nan]]), 2)
    # group 1: 12 nats over 4 tokens
    assert table.as_json() == {"0": [2.7183, None], "1": [20.0855, None]}


def test_mixtures_of_the_pipeline(tiny):
    """Top-1 by distance is token routing; nothing beats the parts it is made of by magic."""
    folder = tiny / "runs/k4/eval"
    mixed = pq.read_table(folder / "mixtures.parquet").to_pandas()
    rows = pq.read_table(folder / "rows.parquet").to_pandas()
    token = rows[rows.scope == "token"].set_index(["domain", "document_id"]).loss_nats
    top = mixed[mixed.mixture == "distance top-1"].set_index(["domain", "document_id"]).loss_nats
    assert np.allclose(top.sort_index(), token.sort_index(), rtol=1e-6)
    found = read_json(folder / "utility.json")
    macro = found["mixtures"]["macro"]
    names = {"distance T=0.1", "distance top-1", "bayes_cached", "average", "parameter_average"}
    assert names <= set(macro)
    assert macro["distance top-1"]["bpb"] == pytest.approx(found["macro"]["token"]["bpb"], abs=1e-5)
    # E5: what the models themselves say of a stream is a better weight than none
    assert macro["bayes_cached"]["bpb"] < macro["average"]["bpb"]
    # every domain under every model: a cluster's own is the best on its documents
    experts = found["mixtures"]["expert_perplexity"]
    assert set(experts["domain"]) == {"hi", "si", "de", "en"}
    table = np.array([experts["cluster"][k] for k in sorted(experts["cluster"])])
    own = [int(k) for k in sorted(experts["cluster"])]
    assert (table.argmin(1) == own).all() and table.shape[1] == 4
    single = read_json(tiny / "runs/n1/eval/utility.json")
    for figures in single["mixtures"]["macro"].values():  # n = 1: the bare model, however mixed
        assert figures["bpb"] == pytest.approx(single["macro"]["token"]["bpb"], abs=1e-6)
