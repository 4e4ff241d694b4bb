"""Tests and intervals against scipy, scikit-learn and hand calculations."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from tiered import statistics

GENERATOR = np.random.default_rng(0)


def test_auc_agrees_with_sklearn_and_counts_ties_half():
    members = GENERATOR.integers(0, 6, 40).astype(float)
    others = GENERATOR.integers(2, 8, 60).astype(float)
    labels = np.r_[np.zeros(40), np.ones(60)]
    expected = roc_auc_score(labels, np.r_[members, others])
    assert statistics.auc(members, others) == pytest.approx(expected, abs=1e-12)


def test_auc_known_answers():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0])
    # pairs (1,2) (1,4) (2,4) (3,4) are ordered, (2,2) ties, (3,2) is not: (4 + 0.5) / 6
    assert statistics.auc(a, b) == pytest.approx(0.75)
    assert statistics.auc(a, b) == pytest.approx(1 - statistics.auc(b, a))
    assert statistics.auc(np.ones(5), np.ones(7)) == 0.5
    assert statistics.auc(np.zeros(3), np.ones(3)) == 1.0


def test_bootstrap_resamples_are_scored_as_whole_sets_are():
    """With ties: the same draws, each resample's AUC by the plain function."""
    g = np.random.default_rng(3)
    a, b = g.integers(0, 9, 30).astype(float), g.integers(2, 12, 20).astype(float)
    found = statistics.bootstrap_auc(a, b, 50, np.random.default_rng(7))
    g = np.random.default_rng(7)
    rows = g.integers(30, size=(50, 30)), g.integers(20, size=(50, 20))
    drawn = [statistics.auc(a[i], b[j]) for i, j in zip(*rows, strict=True)]
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist())
    assert found.value == statistics.auc(a, b)


def test_bootstrap_interval_covers_the_truth_at_its_rate():
    # Gaussians one standard deviation apart have AUC Phi(1 / sqrt 2) = 0.7602
    hits = 0
    for seed in range(60):
        g = np.random.default_rng(seed)
        interval = statistics.bootstrap_auc(g.normal(0, 1, 80), g.normal(1, 1, 80), 200, g)
        hits += interval.low <= 0.7602 <= interval.high
    # 95 % coverage of 60 draws: below 50 has probability under 0.1 %
    assert hits >= 50


def test_hanley_mcneil_error_by_hand():
    # theta = 0.8, m = 10, n = 20: Q1 = 0.8/1.2, Q2 = 1.28/1.8
    variance = (0.16 + 9 * (0.8 / 1.2 - 0.64) + 19 * (1.28 / 1.8 - 0.64)) / 200
    assert statistics.hanley_mcneil_error(0.8, 10, 20) == pytest.approx(math.sqrt(variance))


def test_power_gate_needs_two_standard_errors():
    assert statistics.has_power(statistics.Interval(0.61, 0.5, 0.7, 0.05))
    assert not statistics.has_power(statistics.Interval(0.60, 0.5, 0.7, 0.05))
    assert not statistics.has_power(statistics.Interval(0.3, 0.2, 0.4, 0.05))


def test_separated_sets_of_two_do_not_claim_certainty():
    # two members below two holdouts happen by chance once in six: the error may not be 0
    interval = statistics.bootstrap_auc(np.zeros(2), np.ones(2), 50, np.random.default_rng(0))
    assert interval.value == 1.0
    assert interval.standard_error > 0.1


def test_kolmogorov_smirnov_of_a_sample_with_itself():
    values = GENERATOR.normal(size=50)
    assert statistics.kolmogorov_smirnov(values, values) == (0.0, 1.0)


def test_the_true_positive_rate_is_the_roc_curves():
    g = np.random.default_rng(1)
    members, others = g.normal(-1, 1, 350).round(1), g.normal(0, 1, 400).round(1)
    labels = np.r_[np.ones(350), np.zeros(400)]
    false, true, _ = roc_curve(labels, -np.r_[members, others])
    expected = true[false <= 0.01].max()
    assert statistics.true_positive_rate(members, others) == pytest.approx(expected)
    # 100 non-members: one may pass; the second lowest is the threshold, and a tie does not pass
    others = np.r_[0.0, 1.0, np.full(98, 5.0)]
    assert statistics.true_positive_rate(np.array([0.5, 1.0, 2.0]), others) == pytest.approx(1 / 3)


def test_the_true_positive_rates_interval_holds_its_value():
    g = np.random.default_rng(2)
    members, others = g.normal(-2, 1, 300), g.normal(0, 1, 300)
    found = statistics.bootstrap_true_positive_rate(members, others, 200, g)
    assert found.low < found.value < found.high and found.value > 0.1


def test_chance_error_is_mann_whitneys():
    g = np.random.default_rng(3)
    a, b = g.normal(size=30), g.normal(0.4, size=40)
    u = stats.mannwhitneyu(b, a, method="asymptotic", use_continuity=False)
    value = statistics.auc(a, b)
    assert value == pytest.approx(u.statistic / 1200)
    assert statistics.chance_p(value, 30, 40) == pytest.approx(u.pvalue, rel=1e-6)
    assert statistics.chance_error(30, 40) == pytest.approx(math.sqrt(71 / (12 * 1200)))


def test_paired_tests_agree_with_scipy():
    g = np.random.default_rng(4)
    a = g.normal(3, 1, 60)
    b = a + g.normal(0.2, 0.3, 60)
    assert statistics.wilcoxon_p(a, b) == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert statistics.wilcoxon_p(a, a) == 1.0
    found, expected = statistics.mean_difference(a, b), stats.ttest_rel(a, b)
    bounds = expected.confidence_interval(0.95)
    assert [found.value, found.low, found.high] == pytest.approx([np.mean(a - b), *bounds])
    d = a - b
    t = (d.mean() - 0.5) / (d.std(ddof=1) / math.sqrt(60))
    u = (d.mean() + 0.5) / (d.std(ddof=1) / math.sqrt(60))
    by_hand = max(stats.t.cdf(t, 59), stats.t.sf(u, 59))
    assert statistics.equivalence_p(a, b, 0.5) == pytest.approx(by_hand)
    assert statistics.equivalence_p(a, b, 0.5) < 0.001 < statistics.equivalence_p(a, b, 0.2)
    assert statistics.equivalence_p(a, a, 0.1) == 0.0 and statistics.equivalence_p(a, a, 0) == 1.0


def test_a_small_paired_shift_is_seen_by_wilcoxon_and_not_by_kolmogorov_smirnov():
    """Why "KS p > 0.05" is no proof: the same rows are scored twice."""
    g = np.random.default_rng(5)
    gold = g.normal(5, 1, 400)
    unlearnt = gold - 0.05 + g.normal(0, 0.05, 400)
    assert statistics.kolmogorov_smirnov(unlearnt, gold)[1] > 0.2
    assert statistics.wilcoxon_p(unlearnt, gold) < 1e-20
    found = statistics.median_difference(unlearnt, gold, 200, g)
    assert found.low < -0.05 < found.high < 0


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.9 times 4, 3, 2, 1, never falling
    assert statistics.holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_the_largest_of_many_attacks_is_judged_by_the_largest_of_many():
    g = np.random.default_rng(6)
    noise = {f"a{i}": (g.normal(size=40), g.normal(size=40)) for i in range(8)}
    found = statistics.permuted_maximum(noise, 300, g)
    alone = statistics.chance_p(found.value, 40, 40)
    assert found.value == max(statistics.auc(*pair) for pair in noise.values())
    assert found.p > alone  # eight tries are no discovery
    assert found.null_quantile > 0.5 + 1.96 * statistics.chance_error(40, 40)
    noise["real"] = (g.normal(-2, size=40), g.normal(size=40))
    found = statistics.permuted_maximum(noise, 300, g)
    assert found.attack == "real" and found.p == pytest.approx(1 / 301)


def test_resampled_ratios_are_those_of_the_drawn_rows():
    top, bottom = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 5.0])
    drawn = statistics.bootstrap_ratios(top, bottom, 40, 9)
    rows = np.random.default_rng(9).integers(3, size=(40, 3))
    assert drawn == pytest.approx(top[rows].sum(1) / bottom[rows].sum(1))
    assert statistics.resampled_counts(3, 5, GENERATOR).sum(1).tolist() == [3.0] * 5
