"""Measures against hand calculations, scipy and scikit-learn."""

import math

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score, roc_auc_score

from tiered import metrics
from tiered.domains import CODES

GENERATOR = np.random.default_rng(0)


def test_bits_per_byte_of_uniform_bytes_is_eight():
    # a model that gives every one of 256 bytes the same probability pays ln 256 nats per byte
    assert metrics.bits_per_byte(10 * math.log(256), 10) == pytest.approx(8, abs=1e-12)


def test_auc_agrees_with_sklearn_and_counts_ties_half():
    members = GENERATOR.integers(0, 6, 40).astype(float)
    others = GENERATOR.integers(2, 8, 60).astype(float)
    labels = np.r_[np.zeros(40), np.ones(60)]
    expected = roc_auc_score(labels, np.r_[members, others])
    assert metrics.auc(members, others) == pytest.approx(expected, abs=1e-12)


def test_auc_known_answers():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0])
    # pairs (1,2) (1,4) (2,4) (3,4) are ordered, (2,2) ties, (3,2) is not: (4 + 0.5) / 6
    assert metrics.auc(a, b) == pytest.approx(0.75)
    assert metrics.auc(a, b) == pytest.approx(1 - metrics.auc(b, a))
    assert metrics.auc(np.ones(5), np.ones(7)) == 0.5
    assert metrics.auc(np.zeros(3), np.ones(3)) == 1.0


def test_bootstrap_resamples_are_scored_as_whole_sets_are():
    """With ties: the same draws, each resample's AUC by the plain function."""
    g = np.random.default_rng(3)
    a, b = g.integers(0, 9, 30).astype(float), g.integers(2, 12, 20).astype(float)
    found = metrics.bootstrap_auc(a, b, 50, np.random.default_rng(7))
    g = np.random.default_rng(7)
    drawn = [metrics.auc(a[g.integers(30, size=30)], b[g.integers(20, size=20)]) for _ in range(50)]
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist())
    assert found.value == metrics.auc(a, b)


def test_bootstrap_interval_covers_the_truth_at_its_rate():
    # Gaussians one standard deviation apart have AUC Phi(1 / sqrt 2) = 0.7602
    hits = 0
    for seed in range(60):
        g = np.random.default_rng(seed)
        interval = metrics.bootstrap_auc(g.normal(0, 1, 80), g.normal(1, 1, 80), 200, g)
        hits += interval.low <= 0.7602 <= interval.high
    # 95 % coverage of 60 draws: below 50 has probability under 0.1 %
    assert hits >= 50


def test_hanley_mcneil_error_by_hand():
    # theta = 0.8, m = 10, n = 20: Q1 = 0.8/1.2, Q2 = 1.28/1.8
    variance = (0.16 + 9 * (0.8 / 1.2 - 0.64) + 19 * (1.28 / 1.8 - 0.64)) / 200
    assert metrics.hanley_mcneil_error(0.8, 10, 20) == pytest.approx(math.sqrt(variance))


def test_power_gate_needs_two_standard_errors():
    assert metrics.has_power(metrics.Interval(0.61, 0.5, 0.7, 0.05))
    assert not metrics.has_power(metrics.Interval(0.60, 0.5, 0.7, 0.05))
    assert not metrics.has_power(metrics.Interval(0.3, 0.2, 0.4, 0.05))


def test_separated_sets_of_two_do_not_claim_certainty():
    # two members below two holdouts happen by chance once in six: the error may not be 0
    interval = metrics.bootstrap_auc(np.zeros(2), np.ones(2), 50, np.random.default_rng(0))
    assert interval.value == 1.0
    assert interval.standard_error > 0.1


def test_median_efficacy_is_one_half_without_signal_and_zero_for_members():
    values = np.arange(100.0)
    assert metrics.median_efficacy(values, values) == 0.5
    assert metrics.median_efficacy(values - 1000, values) == 0.0


def test_normalised_unlearning_is_zero_at_original_and_one_at_gold():
    assert metrics.normalised_unlearning(0.4, 0.4, 0.1) == 0
    assert metrics.normalised_unlearning(0.4, 0.1, 0.1) == 1
    assert metrics.normalised_unlearning(0.4, 0.0, 0.1) == pytest.approx(4 / 3)


def test_kolmogorov_smirnov_of_a_sample_with_itself():
    values = GENERATOR.normal(size=50)
    assert metrics.kolmogorov_smirnov(values, values) == (0.0, 1.0)


def test_nmi_of_equal_groups_reaches_its_maximum():
    domains = np.repeat(np.arange(16), 8)
    for n in (2, 4, 8, 16):
        partitions = domains // (16 // n)
        expected = normalized_mutual_info_score(domains, partitions)
        assert metrics.partition_nmi(domains, partitions) == pytest.approx(expected)
        assert metrics.maximal_nmi(n, 16) == pytest.approx(expected, abs=1e-9)


def test_token_lcs_against_a_hand_table():
    assert metrics.token_lcs([1, 2, 3, 4], [2, 4, 3, 4]) == 0.75  # 2 3 4
    assert metrics.token_lcs([1, 2], [3]) == 0.0
    assert metrics.token_lcs([], [1]) == 0.0


@pytest.mark.parametrize("code", CODES)
def test_token_lcs_of_a_text_with_itself_is_one_in_every_script(code, sample_texts):
    ids = list(sample_texts[code][:400].encode())
    assert metrics.token_lcs(ids, ids) == 1.0


def test_extraction_strength_cases():
    correct = np.array(
        [
            [True, True, True, True],  # everything can be continued: 1
            [True, True, True, False],  # the last is wrong: 0
            [False, True, False, True],  # right from position 3 of 4: k* = 3, 1/4
            [False, False, True, True],  # 1/2
        ]
    )
    assert metrics.extraction_strength(correct).tolist() == [1.0, 0.0, 0.25, 0.5]
