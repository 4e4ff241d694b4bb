"""Measures: nats, bits per byte, accuracy, AUC with intervals, normalised mutual information.

A scored row is T tokens of one document; position 0 is never scored, so a row has T - 1 scored
tokens and its bytes are those under tokens 1..T-1. Low loss means "member" for every attack.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import normalized_mutual_info_score

# What a cell prints when a number would be a lie.
NOT_APPLICABLE, NONE, UNDEFINED, NO_POWER = "not applicable", "none", "undefined", "no power"


def bits_per_byte(loss_nats: float, num_bytes: float) -> float:
    """Summed loss in nats over UTF-8 bytes, as bits per byte."""
    return loss_nats / (math.log(2) * num_bytes)


def auc(members: np.ndarray, non_members: np.ndarray) -> float:
    """Probability in [0, 1] that a member's score is below a non-member's; ties count half."""
    m, n = len(members), len(non_members)
    ranks = rankdata(np.concatenate([members, non_members]))
    above = ranks[m:].sum() - n * (n + 1) / 2  # Mann-Whitney U of the non-members
    return float(above / (m * n))


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval and standard error."""

    value: float
    low: float
    high: float
    standard_error: float

    def as_json(self) -> dict[str, float]:
        """Rounded to 6 decimals, for metrics.json."""
        names = ("value", "low", "high", "standard_error")
        return {name: round(getattr(self, name), 6) for name in names}


def bootstrap_auc(
    members: np.ndarray, non_members: np.ndarray, samples: int, generator: np.random.Generator
) -> Interval:
    """AUC with a percentile bootstrap over both sets (one row per document, so rows resample).

    The standard error is the bootstrap's, but never below Hanley and McNeil's (1982): with every
    member below every non-member the bootstrap sees no spread at all.
    """
    value, m = auc(members, non_members), len(members)
    # Scores only count by their order: resample their places among the distinct values.
    distinct, places = np.unique(np.concatenate([members, non_members]), return_inverse=True)
    drawn = np.empty(samples)
    for i in range(samples):
        a, b = (
            np.bincount(own[generator.integers(len(own), size=len(own))], minlength=len(distinct))
            for own in (places[:m], places[m:])
        )
        above = b.sum() - np.cumsum(b)  # non-members above each value
        drawn[i] = (a * (above + 0.5 * b)).sum() / (a.sum() * b.sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    floor = hanley_mcneil_error(value, len(members), len(non_members))
    return Interval(value, float(low), float(high), max(float(drawn.std(ddof=1)), floor))


def hanley_mcneil_error(value: float, m: int, n: int) -> float:
    """Standard error of an AUC of m members and n non-members (Hanley and McNeil 1982, eq. 1).

    At a value of exactly 0 or 1 the formula gives 0; the value is moved half a pair inside.
    """
    a = min(max(value, 0.5 / (m * n)), 1 - 0.5 / (m * n))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = a * (1 - a) + (m - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)
    return math.sqrt(max(variance, 0.0) / (m * n))


def has_power(original: Interval) -> bool:
    """Power gate: on the original model the attack beats chance by two standard errors."""
    return original.value > 0.5 + 2 * original.standard_error


def median_efficacy(members: np.ndarray, holdout: np.ndarray) -> float:
    """Within-domain MIA efficacy: share of members with loss at least the holdout median.

    About 0.5 for a model that never saw the members.
    """
    return float(np.mean(members >= np.median(holdout)))


def normalised_unlearning(original: float, unlearnt: float, gold: float) -> float:
    """UA_norm = (acc_o - acc_u) / (acc_o - acc_g): 0 nothing, 1 as gold, above 1 too much."""
    return (original - unlearnt) / (original - gold)


def paired_error(a: np.ndarray, b: np.ndarray) -> float:
    """Standard error of the mean of a - b over rows."""
    difference = a - b
    return (
        float(difference.std(ddof=1) / math.sqrt(len(difference)))
        if len(difference) > 1
        else math.inf
    )


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Two-sample KS statistic D and p-value."""
    from scipy.stats import ks_2samp

    result = ks_2samp(a, b)
    return float(result.statistic), float(result.pvalue)


def partition_nmi(domains: np.ndarray, partitions: np.ndarray) -> float:
    """NMI(domain; partition) with arithmetic normalisation."""
    return float(normalized_mutual_info_score(domains, partitions, average_method="arithmetic"))


def maximal_nmi(num_partitions: int, num_domains: int) -> float:
    """Largest NMI that n equal groups of D equal domains can have: 2 ln n / (ln n + ln D)."""
    if num_domains == 1 or num_partitions == 1:
        return 1.0 if num_domains == num_partitions else 0.0
    return 2 * math.log(num_partitions) / (math.log(num_partitions) + math.log(num_domains))


def token_lcs(a: list[int], b: list[int]) -> float:
    """Longest common subsequence of two id lists as a share of the first, in [0, 1].

    On token ids, because word tokenisers that keep [a-z0-9] see nothing in most scripts.
    """
    if not a:
        return 0.0
    row = np.zeros(len(b) + 1, dtype=np.int64)
    other = np.asarray(b)
    for token in a:
        candidate = np.where(other == token, row[:-1] + 1, row[1:])
        row[1:] = np.maximum.accumulate(candidate)
    return float(row[-1] / len(a))


def extraction_strength(correct: np.ndarray) -> np.ndarray:
    """ES = 1 - k*/N per row of correct (rows, N): k* is the first position from which every
    argmax is right, N if the last is wrong."""
    wrong_later = np.flip(np.logical_or.accumulate(np.flip(~correct, 1), axis=1), 1)
    return 1.0 - wrong_later.sum(1) / correct.shape[1]
