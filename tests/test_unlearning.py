"""Metrics of the protocol against hand-made rows; words where numbers would lie."""

import dataclasses
import json

import numpy as np
import pytest

from tiered.config import Config, PartitionConfig, UnlearnConfig
from tiered.data import Rows
from tiered.evaluation import RowScores
from tiered.partition import make_partition_map
from tiered.unlearning.measures import AS_GOLD, LEAKS, OVER, UNLIKE, Judge
from tiered.unlearning.protocol import Measured
from tiered.unlearning.systems import Context, Forget

DOMAINS = ("hi", "si", "de", "en")


def context(n: int, method: str = "family") -> Context:
    config = Config(
        name="x",
        partition=PartitionConfig(method=method, n=n),
        unlearn=UnlearnConfig(
            forget=("hi",), bootstrap_samples=200, attacks=("LOSS", "Min-K", "reference")
        ),
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
    extra = {"min_k": total / 5, "extraction_strength": np.full(n, 0.25)}
    last = np.zeros(n, int)
    return RowScores(rows, "token", total, hits, tokens, tokens * 2, tokens, last, extra)


def system(member_losses, correct, seed: int = 0, router=None) -> Measured:
    g = np.random.default_rng(seed)
    n = len(member_losses)
    occurrences = [16] * (n // 2) + [1] * (n - n // 2)
    found = {
        ("forget", "hi"): scores("forget", "hi", member_losses, correct, occurrences),
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


HI = Forget("hi", "hi")


def metrics(where: Context, measured: dict[str, Measured], operation: str, edited: bool = False):
    return Judge(where, HI, measured).metrics(operation, edited)


def values(cells):
    """The numbers of intervals; words stay."""
    return {k: v["value"] if isinstance(v, dict) else v for k, v in cells.items()}


def test_accuracies_near_and_far_by_hand(measured):
    result = metrics(context(2), measured, "sisa")
    # family, n = 2: {hi, si}, {de, en}; right predictions of si, de, en: 1, 2, 3 of 10
    assert result["UA"]["value"] == pytest.approx(1 - 0.15)
    assert result["UA"]["low"] < 0.85 < result["UA"]["high"]
    assert values(result["RA"]) == {"all": 0.2, "near": 0.1, "far": 0.25}
    assert result["TA"]["far"]["value"] == 0.25 and result["TA_f"]["value"] == 0.1
    # accuracies 0.5, 0.15, 0.1: (0.5 - 0.15) / (0.5 - 0.1)
    assert result["UA_norm"]["value"] == pytest.approx(0.875)
    # retained rows: 40 nats on 20 bytes
    bpb = result["bpb"]["retain"]["near"]
    assert [bpb["value"], bpb["low"]] == pytest.approx([2 / np.log(2)] * 2, abs=1e-5)
    assert values(result["bpb_change"])["far"] == 0
    assert result["far_rows_changed"] == "0 of 10"
    assert values(result["extraction_strength"]) == {"members": 0.25, "holdout": 0.25}
    assert result["exposure"] == "none"


def test_near_and_far_are_words_where_there_is_no_such_domain(measured):
    assert metrics(context(4, "language"), measured, "gold")["RA"]["near"] == "none"
    assert metrics(context(1), measured, "gold")["RA"]["far"] == "none"
    assert metrics(context(2, "random"), measured, "gold")["TA"]["far"] == "none"


def test_gold_against_itself_has_no_gap_and_original_is_attacked(measured):
    """I5: D = 0, p = 1, gaps 0, PrivLeak 0, UA_norm 1; the original's UA_norm is 0."""
    gold = metrics(context(2), measured, "gold")
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "standard_error": 0.0}
    assert gold["gap_to_gold"] == nothing == gold["PrivLeak"]
    assert gold["s_MIA"]["value"] == gold["s_MIA"]["low"] == 1.0
    assert gold["UA_norm"]["value"] == gold["UA_norm"]["low"] == 1.0
    to_gold = gold["to_gold"]
    assert to_gold["KS"] == {"D": 0.0, "p": 1.0} and to_gold["wilcoxon_p"] == 1.0
    assert to_gold["mean_difference_nats"]["high"] == to_gold["median_difference_nats"]["low"] == 0
    original = metrics(context(2), measured, "original")
    assert original["UA_norm"]["value"] == 0.0
    assert original["AUC"]["LOSS"]["all"]["value"] > 0.99
    assert original["MIA_efficacy"]["value"] == original["MIA_efficacy"]["high"] == 0.0
    assert original["membership_verdict"] == LEAKS and gold["verdict"] == AS_GOLD
    assert gold["AUC_minus_gold"]["all"]["low"] == gold["AUC_minus_gold"]["all"]["high"] == 0
    difference = original["AUC"]["LOSS"]["all"]["value"] - gold["AUC"]["LOSS"]["all"]["value"]
    assert original["AUC_minus_gold"]["all"]["value"] == pytest.approx(difference, abs=2e-6)
    assert 0.35 < gold["AUC"]["LOSS"]["16"]["value"] < 0.65
    assert set(gold["AUC"]["LOSS"]) == {"all", "1", "16"}
    assert original["strongest_attack"]["p"] < 0.01 < gold["strongest_attack"]["p"]


def test_ua_and_efficacy_of_a_gap_are_of_the_same_members(measured):
    """Every member above the holdout median is wrong everywhere, and no other: the two are one
    number, in every resample."""
    judge = Judge(context(2), HI, measured)
    part, holdout = (measured["sisa"].scores[s, "hi"] for s in ("forget", "holdout"))
    above = part.mean_loss >= np.median(holdout.mean_loss)
    part.correct[:] = np.where(above, 0, part.tokens)
    holdout.loss_nats[:] = holdout.loss_nats.mean()  # its median does not move
    above = part.mean_loss >= holdout.mean_loss[0]
    part.correct[:] = np.where(above, 0, part.tokens)
    (ua, ua_drawn), *_, (efficacy, drawn) = judge._headline("sisa")
    assert 0.2 < ua < 0.8 and ua == efficacy == above.mean()
    np.testing.assert_allclose(ua_drawn, drawn, atol=1e-12)
    assert drawn.std() > 0.01


def test_an_attack_without_power_prints_the_word_for_every_operation(measured):
    measured["original"] = system(np.random.default_rng(3).normal(5, 0.3, 40), [6] * 40)
    for name in measured:
        result = metrics(context(2), measured, name)
        assert set(result["AUC"]["LOSS"].values()) == {"no power"}
        assert result["PrivLeak"] == result["s_MIA"] == result["membership_verdict"] == "no power"
        assert result["strongest_attack"] == "no power"


def test_unlearning_is_undefined_where_original_and_gold_agree(measured):
    measured["original"] = system(np.random.default_rng(3).normal(5, 0.3, 40), [1] * 39 + [2])
    assert metrics(context(2), measured, "sisa")["UA_norm"] == "undefined"


def test_true_positive_rates_need_three_hundred_non_members(measured):
    assert metrics(context(2), measured, "original")["TPR_at_1_FPR"]["LOSS"] == "undefined"
    for name in measured:
        many = np.random.default_rng(9).normal(5, 0.3, 300)
        measured[name].scores["holdout", "hi"] = scores("holdout", "hi", many)
    assert metrics(context(2), measured, "original")["TPR_at_1_FPR"]["LOSS"]["value"] > 0.9


def test_reference_attack_subtracts_the_loss_of_another_gold(measured):
    one = metrics(context(2), measured, "gold")["AUC"]["reference"]
    assert set(one.values()) == {"undefined"}  # itself is no reference
    measured["gold-seed-1"] = system(np.random.default_rng(7).normal(5, 0.3, 40), [1] * 40)
    judge = Judge(context(2), HI, measured)
    names = {n: judge.reference_of(n) for n in measured}
    assert names == {
        **{"original": "gold-seed-1", "sisa": "gold-seed-1"},
        **{"gold": "gold-seed-1", "gold-seed-1": "gold"},
    }
    u, g = measured["original"].scores, measured["gold-seed-1"].scores
    difference = [u[s, "hi"].mean_loss - g[s, "hi"].mean_loss for s in ("forget", "holdout")]
    pairs = (difference[0][:, None] < difference[1]) + 0.5 * (
        difference[0][:, None] == difference[1]
    )
    result = judge.metrics("original")
    assert result["AUC"]["reference"]["all"]["value"] == pytest.approx(pairs.mean(), abs=1e-6)


def test_a_copy_of_the_reference_is_not_attacked_by_it(measured):
    measured["sisa"] = measured["gold"]
    result = metrics(context(2), measured, "sisa")["AUC"]["reference"]
    assert set(result.values()) == {"undefined"}


def test_a_single_member_is_no_sample(measured):
    """Files of one document: paired tests are words, and every measure can be written as JSON."""
    for name in measured:
        measured[name].scores["forget", "hi"] = scores("forget", "hi", [4.0], [1])
    result = metrics(context(2), measured, "sisa", edited=True)
    assert set(result["to_gold"]["KS"].values()) == {"undefined"}
    assert result["to_gold"]["equivalence_p"] == "undefined"
    json.dumps(result, allow_nan=False)


def test_golds_of_several_seeds_are_the_margin_and_the_envelope(measured):
    one = metrics(context(2), measured, "sisa")["to_gold"]
    assert one["margin_nats"] == one["equivalence_p"] == "undefined"
    assert Judge(context(2), HI, measured).envelope()["spread"] == "undefined"
    for seed, mean in ((1, 5.2), (2, 4.9)):
        losses = np.random.default_rng(seed).normal(mean, 0.3, 40)
        measured[f"gold-seed-{seed}"] = system(losses, [1] * 40)
    judge = Judge(context(2), HI, measured)
    means = [measured[n].scores["forget", "hi"].mean_loss.mean() for n in judge.golds]
    result = judge.metrics("sisa")["to_gold"]
    assert result["margin_nats"] == pytest.approx(max(means) - min(means), abs=1e-6)
    assert result["gold_seeds"] == 3 and result["equivalence_p"] < 0.05
    spread = judge.envelope()["spread"]["bpb_members"]
    assert spread["low"] == pytest.approx(min(means) / 2 / np.log(2), abs=1e-5)
    assert judge.metrics("original")["to_gold"]["equivalence_p"] > 0.99


def test_going_beyond_gold_is_over_unlearning_and_no_success(measured):
    """Members made improbable: by their rank against holdout, or by loss alone."""
    measured["GA"] = system(np.random.default_rng(5).normal(8, 0.3, 40), [0] * 40)
    result = metrics(context(2), measured, "GA", edited=True)
    assert result["AUC"]["LOSS"]["all"]["value"] < 0.01
    assert result["membership_verdict"] == result["verdict"] == OVER
    assert result["UA_norm"]["value"] > 1
    # everything in the language lost alike: no attack sees it, the loss does
    worse = system(np.random.default_rng(6).normal(8, 0.3, 40), [0] * 40)
    worse.scores["holdout", "hi"].loss_nats[:] = worse.scores["forget", "hi"].loss_nats
    measured["GA"] = worse
    result = metrics(context(2), measured, "GA", edited=True)
    # with one gold nobody knows how far golds differ: the loss says nothing
    assert result["membership_verdict"] == result["verdict"] == AS_GOLD
    losses = np.random.default_rng(7).normal(5.2, 0.3, 40)
    measured["gold-seed-1"] = system(losses, [1] * 40)
    result = metrics(context(2), measured, "GA", edited=True)
    assert result["membership_verdict"] == AS_GOLD and result["verdict"] == OVER
    # the language still known, members and others alike: at chance, and not as gold
    known = system(np.random.default_rng(6).normal(3, 0.3, 40), [0] * 40)
    known.scores["holdout", "hi"].loss_nats[:] = known.scores["forget", "hi"].loss_nats
    found = metrics(context(2), measured | {"RMU": known}, "RMU", edited=True)
    assert found["membership_verdict"] == AS_GOLD and found["verdict"] == UNLIKE
    # a removed model is judged by membership alone: no edit drove its loss
    assert metrics(context(2), measured, "GA")["verdict"] == AS_GOLD


def test_exposure_of_canaries_by_hand(measured):
    losses = [1.0, 9.5, *np.arange(2.0, 9.0)]  # two canaries, seven references
    part = scores("canary", "hi", losses, occurrences=[16, 1] + [0] * 7)
    measured["original"].scores["canary", "hi"] = part
    found = metrics(context(2), measured, "original")["exposure"]
    # |R| = 8: ranks 1 and 8; a clean model: mean of 3 - log2(rank)
    assert values(found) == {"clean": pytest.approx(1.087, abs=1e-3), "16": 3.0, "1": 0.0}
    # one canary between the references: their resamples move its rank
    part.loss_nats[0] = 45.0
    found = metrics(context(2), measured, "original")["exposure"]["16"]
    assert found["value"] == pytest.approx(1.0) and found["low"] < 1 < found["high"] < 3


def test_random_draws_are_changes_of_test_rows(measured):
    draw = {k: v for k, v in measured["sisa"].scores.items() if k[0] == "test"}
    draw["test", "si"] = scores("test", "si", [6.0] * 5)
    found = Judge(context(2), HI, measured).draws([draw])
    # si: from 40 to 60 nats on 20 bytes; near is si alone, all is a third of it
    assert found["near"] == [pytest.approx(1 / np.log(2), abs=1e-5)]
    assert found["all"] == [pytest.approx(1 / np.log(2) / 3, abs=1e-5)]
    assert found["far"] == [0.0] and len(found["test"]) == 1


def test_router_is_attacked_through_its_own_losses(measured):
    g = np.random.default_rng(4)
    leaky = (g.normal(2, 0.3, 40), g.normal(3, 0.3, 40))
    clean = (g.normal(3, 0.3, 40), g.normal(3, 0.3, 40))
    for name, losses in (("original", leaky), ("gold", clean), ("sisa", clean)):
        measured[name].router_members, measured[name].router_holdout = losses
    attack = {n: metrics(context(2), measured, n)["router_AUC"] for n in measured}
    assert attack["original"]["value"] > 0.95 and 0.35 < attack["gold"]["value"] < 0.65
    for name in measured:  # hashed n-grams have no language model to attack
        measured[name].router_members = None
    assert metrics(context(2), measured, "sisa")["router_AUC"] == "not applicable"


def test_changed_far_rows_are_counted_bit_for_bit(measured):
    far = measured["sisa"].scores["test", "de"]
    far.loss_nats[0] = np.nextafter(far.loss_nats[0], np.inf)
    assert metrics(context(2), measured, "sisa")["far_rows_changed"] == "1 of 10"
