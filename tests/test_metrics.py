"""Measures against hand calculations and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from tiered import metrics
from tiered.domains import CODES

GENERATOR = np.random.default_rng(0)


def test_bits_per_byte_of_uniform_bytes_is_eight():
    # a model that gives every one of 256 bytes the same probability pays ln 256 nats per byte
    assert metrics.bits_per_byte(10 * math.log(256), 10) == pytest.approx(8, abs=1e-12)


def test_median_efficacy_is_one_half_without_signal_and_zero_for_members():
    values = np.arange(100.0)
    assert metrics.median_efficacy(values, values) == 0.5
    assert metrics.median_efficacy(values - 1000, values) == 0.0


def test_normalised_unlearning_is_zero_at_original_and_one_at_gold():
    assert metrics.normalised_unlearning(0.4, 0.4, 0.1) == 0
    assert metrics.normalised_unlearning(0.4, 0.1, 0.1) == 1
    assert metrics.normalised_unlearning(0.4, 0.0, 0.1) == pytest.approx(4 / 3)


def test_nmi_of_equal_groups_reaches_its_maximum():
    domains = np.repeat(np.arange(16), 8)
    for n in (2, 4, 8, 16):
        partitions = domains // (16 // n)
        expected = normalized_mutual_info_score(domains, partitions)
        assert metrics.partition_nmi(domains, partitions) == pytest.approx(expected)
        assert metrics.maximal_nmi(n, 16) == pytest.approx(expected, abs=1e-9)


def test_no_grouping_exceeds_the_maximal_nmi():
    """All groupings of five domains: the bound holds, and no more than 1 is ever promised."""
    domains = np.arange(5)
    for n in (2, 3, 4):
        groupings = itertools.product(range(n), repeat=5)
        best = max(metrics.partition_nmi(domains, np.array(g)) for g in groupings)
        assert best < metrics.maximal_nmi(n, 5) < best + 0.05  # 5 domains make no equal groups
    assert metrics.maximal_nmi(5, 5) == metrics.maximal_nmi(32, 5) == 1.0


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


def test_exposure_of_a_clean_model_by_hand():
    references = np.arange(1.0, 100.0)  # 99 of them: |R| = 100
    assert metrics.exposure(0.0, references) == pytest.approx(math.log2(100))  # rank 1
    assert metrics.exposure(1000.0, references) == pytest.approx(0.0)  # rank 100
    ranks = [metrics.exposure(i + 0.5, references) for i in range(100)]
    assert np.mean(ranks) == pytest.approx(1.40, abs=0.005)
    assert metrics.exposure(50.0, references) == pytest.approx(math.log2(100 / 50.5))  # a tie


def test_privacy_leak_and_similarity_by_hand():
    # AUC' 0.1 against 0.5: -80 %
    assert metrics.privacy_leak(0.9, 0.5) == pytest.approx(-80)
    assert metrics.privacy_leak(0.4, 0.4) == 0
    assert metrics.membership_similarity(0.7, 0.5) == pytest.approx(0.6)
    assert metrics.membership_similarity(0.5, 0.5) == 1
    assert metrics.membership_similarity(1.0, 0.2) == 0  # 0.8 / 0.8


def test_relearn_advantage_is_a_mean_over_doublings():
    steps = np.array([0, 1, 3])  # log2(1 + steps): 0, 1, 2
    gold, unlearnt = np.array([4.0, 3.0, 3.0]), np.array([4.0, 2.0, 3.0])
    # differences 0, 1, 0: trapezoids 0.5 + 0.5 over a width of 2
    assert metrics.relearn_advantage(steps, unlearnt, gold) == pytest.approx(0.5)
    assert metrics.relearn_advantage(steps, gold, gold) == 0


def test_harmonic_mean_by_hand():
    assert metrics.harmonic_mean(np.array([1.0, 0.5])) == pytest.approx(2 / 3)
