"""Metrics of the protocol against hand-made rows; words where numbers would lie."""

import dataclasses

import numpy as np
import pytest

from tiered.config import Config, PartitionConfig, UnlearnConfig
from tiered.data import Rows
from tiered.evaluation import RowScores
from tiered.partition import make_partition_map
from tiered.unlearning import protocol
from tiered.unlearning.protocol import Measured
from tiered.unlearning.systems import Context

DOMAINS = ("hi", "si", "de", "en")


def context(n: int, method: str = "family") -> Context:
    config = Config(
        name="x",
        partition=PartitionConfig(method=method, n=n),
        unlearn=UnlearnConfig(forget=("hi",), bootstrap_samples=200),
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, domains=DOMAINS))

    class Data:
        domains = DOMAINS

    return Context(config, Data(), make_partition_map(config), {}, None)


def scores(split: str, domain: str, losses, correct=None, occurrences=None) -> RowScores:
    """Rows of 10 scored tokens with given mean losses and right predictions."""
    n = len(losses)
    ones = np.ones((n, 11), dtype=np.int64)
    times = np.ones(n, dtype=np.int64) if occurrences is None else np.array(occurrences)
    rows = Rows(domain, split, tuple(map(str, range(n))), ones, ones, ones, times, np.zeros(n))
    tokens = np.full(n, 10)
    hits = np.zeros(n, dtype=np.int64) if correct is None else np.array(correct)
    total = np.array(losses, dtype=float) * 10
    return RowScores(rows, "token", total, hits, tokens, tokens * 2, tokens, np.zeros(n, int))


def system(member_losses, correct, seed: int = 0, router=None) -> Measured:
    g = np.random.default_rng(seed)
    n = len(member_losses)
    occurrences = [16] * (n // 2) + [1] * (n - n // 2)
    found = {
        ("train", "hi"): scores("train", "hi", member_losses, correct, occurrences),
        ("holdout", "hi"): scores("holdout", "hi", g.normal(5, 0.3, 40)),
        ("test", "hi"): scores("test", "hi", g.normal(5, 0.3, 10), [1] * 10),
    }
    for i, domain in enumerate(DOMAINS[1:], 1):
        for split in ("train", "test"):
            found[split, domain] = scores(split, domain, [4.0] * 5, [i] * 5)
    return Measured(found, *(router or (None, None)))


@pytest.fixture
def measured() -> dict[str, Measured]:
    g = np.random.default_rng(1)
    return {
        "original": system(g.normal(3, 0.3, 40), [6] * 20 + [4] * 20),
        "gold": system(g.normal(5, 0.3, 40), [1] * 40),
        "sisa": system(g.normal(5.1, 0.3, 40), [2] * 20 + [1] * 20),
    }


def test_accuracies_near_and_far_by_hand(measured):
    result = protocol.metrics(context(2), "hi", measured, "sisa")
    # family, n = 2: {hi, si}, {de, en}; right predictions of si, de, en: 1, 2, 3 of 10
    assert result["UA"] == pytest.approx(1 - 0.15)
    assert result["RA"] == {"all": 0.2, "near": 0.1, "far": 0.25}
    assert result["TA"]["far"] == 0.25 and result["TA_f"] == 0.1
    # accuracies 0.5, 0.15, 0.1: (0.5 - 0.15) / (0.5 - 0.1)
    assert result["UA_norm"] == pytest.approx(0.875)
    # retained rows: 40 nats on 20 bytes
    assert result["bpb"]["retain"]["near"] == pytest.approx(2 / np.log(2), abs=1e-5)
    assert result["far_rows_changed"] == "0 of 10"


def test_near_and_far_are_words_where_there_is_no_such_domain(measured):
    assert protocol.metrics(context(4, "language"), "hi", measured, "gold")["RA"]["near"] == "none"
    assert protocol.metrics(context(1), "hi", measured, "gold")["RA"]["far"] == "none"
    assert protocol.metrics(context(2, "random"), "hi", measured, "gold")["TA"]["far"] == "none"


def test_gold_against_itself_has_no_gap_and_original_is_attacked(measured):
    gold = protocol.metrics(context(2), "hi", measured, "gold")
    assert gold["gap_to_gold"] == 0 and gold["KS_to_gold"] == {"D": 0.0, "p": 1.0}
    assert gold["UA_norm"] == 1.0 and gold["AUC"]["PrivLeak"] == 0.0
    original = protocol.metrics(context(2), "hi", measured, "original")
    assert original["UA_norm"] == 0.0
    assert original["AUC"]["LOSS"]["all"]["value"] > 0.99
    assert original["MIA_efficacy"] == 0.0
    assert 0.35 < gold["AUC"]["LOSS"]["16"]["value"] < 0.65
    assert set(gold["AUC"]["LOSS"]) == {"all", "1", "16"}


def test_an_attack_without_power_prints_the_word_for_every_operation(measured):
    measured["original"] = system(np.random.default_rng(3).normal(5, 0.3, 40), [6] * 40)
    for name in measured:
        result = protocol.metrics(context(2), "hi", measured, name)
        assert set(result["AUC"]["LOSS"].values()) == {"no power"}
        assert result["AUC"]["PrivLeak"] == "no power"


def test_unlearning_is_undefined_where_original_and_gold_agree(measured):
    measured["original"] = system(np.random.default_rng(3).normal(5, 0.3, 40), [1] * 39 + [2])
    assert protocol.metrics(context(2), "hi", measured, "sisa")["UA_norm"] == "undefined"


def test_reference_attack_subtracts_the_gold_loss(measured):
    result = protocol.metrics(context(2), "hi", measured, "sisa")
    assert (
        protocol.metrics(context(2), "hi", measured, "gold")["AUC"]["reference"]["all"]
        == "undefined"
    )
    u, g = measured["sisa"].scores, measured["gold"].scores
    difference = [u[s, "hi"].mean_loss - g[s, "hi"].mean_loss for s in ("train", "holdout")]
    pairs = (difference[0][:, None] < difference[1]) + 0.5 * (
        difference[0][:, None] == difference[1]
    )
    assert result["AUC"]["reference"]["all"]["value"] == pytest.approx(pairs.mean(), abs=1e-6)


def test_router_is_attacked_through_its_own_losses(measured):
    g = np.random.default_rng(4)
    leaky = (g.normal(2, 0.3, 40), g.normal(3, 0.3, 40))
    clean = (g.normal(3, 0.3, 40), g.normal(3, 0.3, 40))
    for name, losses in (("original", leaky), ("gold", clean), ("sisa", clean)):
        measured[name].router_members, measured[name].router_holdout = losses
    attack = {n: protocol.metrics(context(2), "hi", measured, n)["router_AUC"] for n in measured}
    assert attack["original"]["value"] > 0.95 and 0.35 < attack["gold"]["value"] < 0.65
    for name in measured:  # hashed n-grams have no language model to attack
        measured[name].router_members = None
    assert protocol.metrics(context(2), "hi", measured, "sisa")["router_AUC"] == "not applicable"


def test_changed_far_rows_are_counted_bit_for_bit(measured):
    far = measured["sisa"].scores["test", "de"]
    far.loss_nats[0] = np.nextafter(far.loss_nats[0], np.inf)
    assert protocol.metrics(context(2), "hi", measured, "sisa")["far_rows_changed"] == "1 of 10"
