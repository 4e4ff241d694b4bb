"""Tests and intervals: what a difference between two systems, or an attack, may claim.

Rows of different documents are the units that are resampled. Low score means "member", so an AUC
is the probability that a member's score is below a non-member's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval
LEAST_NON_MEMBERS = 300  # below it a threshold at 1 % false positives is a matter of 2 rows
CHUNK = 2_000_000  # resampled entries that are held at once


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval and standard error."""

    value: float
    low: float
    high: float
    standard_error: float

    @classmethod
    def of(cls, value: float, drawn: np.ndarray, least_error: float = 0.0) -> "Interval":
        """A value with the percentile interval of its resamples."""
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        error = max(float(np.std(drawn, ddof=1)), least_error)
        return cls(float(value), float(low), float(high), error)

    def as_json(self) -> dict[str, float]:
        """Rounded to 6 decimals, for metrics.json."""
        names = ("value", "low", "high", "standard_error")
        return {name: round(getattr(self, name), 6) for name in names}


def auc(members: np.ndarray, non_members: np.ndarray) -> float:
    """Probability in [0, 1] that a member's score is below a non-member's; ties count half."""
    m, n = len(members), len(non_members)
    ranks = stats.rankdata(np.concatenate([members, non_members]))
    above = ranks[m:].sum() - n * (n + 1) / 2  # Mann-Whitney U of the non-members
    return float(above / (m * n))


def resampled_counts(size: int, samples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each of `size` rows was drawn in each resample, (samples, size) float64."""
    drawn = generator.integers(size, size=(samples, size))
    drawn += np.arange(samples)[:, None] * size
    counts = np.bincount(drawn.ravel(), minlength=samples * size)
    return counts.reshape(samples, size).astype(np.float64)


def bootstrap_auc(
    members: np.ndarray, non_members: np.ndarray, samples: int, generator: np.random.Generator
) -> Interval:
    """AUC with a percentile bootstrap over both sets (one row per document, so rows resample).

    The standard error is the bootstrap's, but never below Hanley and McNeil's (1982): with every
    member below every non-member the bootstrap sees no spread at all.
    """
    drawn = auc_draws(members, non_members, samples, generator)
    value = auc(members, non_members)
    floor = hanley_mcneil_error(value, len(members), len(non_members))
    return Interval.of(value, drawn, floor)


def auc_draws(
    members: np.ndarray, non_members: np.ndarray, samples: int, generator: np.random.Generator
) -> np.ndarray:
    """AUC of resamples of both sets, (samples,); equal generators and sizes draw equal rows."""
    m, n = len(members), len(non_members)
    a, b = (resampled_counts(size, samples, generator) for size in (m, n))
    drawn = np.zeros(samples)
    step = max(1, CHUNK // n)
    for start in range(0, m, step):  # pairs (member, non-member), a share of the members at a time
        part = members[start : start + step, None]
        pairs = (part < non_members) + 0.5 * (part == non_members)
        drawn += ((a[:, start : start + step] @ pairs) * b).sum(1)
    return drawn / (m * n)


def hanley_mcneil_error(value: float, m: int, n: int) -> float:
    """Standard error of an AUC of m members and n non-members (Hanley and McNeil 1982, eq. 1).

    At a value of exactly 0 or 1 the formula gives 0; the value is moved half a pair inside.
    """
    a = min(max(value, 0.5 / (m * n)), 1 - 0.5 / (m * n))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = a * (1 - a) + (m - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)
    return math.sqrt(max(variance, 0.0) / (m * n))


def chance_error(m: int, n: int) -> float:
    """Standard error of the AUC of scores that say nothing, without ties: of 0.5."""
    return math.sqrt((m + n + 1) / (12 * m * n))


def chance_p(value: float, m: int, n: int) -> float:
    """Two-sided p-value of an AUC against 0.5 (normal approximation of Mann-Whitney's U)."""
    return float(2 * stats.norm.sf(abs(value - 0.5) / chance_error(m, n)))


def has_power(original: Interval) -> bool:
    """Power gate: on the original model the attack beats chance by two standard errors."""
    return original.value > 0.5 + 2 * original.standard_error


def true_positive_rate(
    members: np.ndarray, non_members: np.ndarray, false_positive_rate: float = 0.01
) -> float:
    """Largest share of members below a threshold that at most so many non-members reach."""
    allowed = math.floor(false_positive_rate * len(non_members) + 1e-9)
    # the first non-member that must stay above the threshold; ties with it stay above as well.
    first = np.partition(non_members, allowed)[allowed]
    return float(np.mean(members < first))


def bootstrap_true_positive_rate(
    members: np.ndarray,
    non_members: np.ndarray,
    samples: int,
    generator: np.random.Generator,
    false_positive_rate: float = 0.01,
) -> Interval:
    """`true_positive_rate` with a percentile bootstrap over both sets."""
    m, n = len(members), len(non_members)
    drawn = np.array(
        [
            true_positive_rate(
                members[generator.integers(m, size=m)],
                non_members[generator.integers(n, size=n)],
                false_positive_rate,
            )
            for _ in range(samples)
        ]
    )
    value = true_positive_rate(members, non_members, false_positive_rate)
    return Interval.of(value, drawn, math.sqrt(value * (1 - value) / m))


@dataclass(frozen=True)
class Maximum:
    """The strongest of several attacks: its name, its AUC, the 95 % quantile of the maximum when
    labels are shuffled, and the p-value of the AUC under that."""

    attack: str
    value: float
    null_quantile: float
    p: float


def permuted_maximum(
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
    samples: int,
    generator: np.random.Generator,
) -> Maximum:
    """The largest AUC of several attacks, with what the largest of so many reaches by chance.

    scores: attack -> (members, non-members), rows in one order for all attacks.
    """
    names = list(scores)
    ranks = np.stack([stats.rankdata(np.concatenate(scores[name])) for name in names], 1)
    m, n = (len(part) for part in scores[names[0]])
    values = [auc(*scores[name]) for name in names]
    best = int(np.argmax(values))
    null = np.empty(samples)
    for i in range(samples):
        non_members = generator.permutation(m + n)[:n]
        above = ranks[non_members].sum(0) - n * (n + 1) / 2
        null[i] = above.max() / (m * n)
    p = (1 + int((null >= values[best]).sum())) / (1 + samples)
    return Maximum(names[best], values[best], float(np.quantile(null, LEVEL)), p)


def paired_error(a: np.ndarray, b: np.ndarray) -> float:
    """Standard error of the mean of a - b over rows."""
    difference = a - b
    if len(difference) < 2:
        return math.inf
    return float(difference.std(ddof=1) / math.sqrt(len(difference)))


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Two-sample KS statistic D and p-value."""
    result = stats.ks_2samp(a, b)
    return float(result.statistic), float(result.pvalue)


def median_difference(
    a: np.ndarray, b: np.ndarray, samples: int, generator: np.random.Generator
) -> Interval:
    """Median over rows of a - b, with a bootstrap over rows."""
    difference, n = a - b, len(a)
    drawn = [np.median(difference[generator.integers(n, size=n)]) for _ in range(samples)]
    return Interval.of(float(np.median(difference)), np.array(drawn))


def mean_difference(a: np.ndarray, b: np.ndarray) -> Interval:
    """Mean over rows of a - b, with the interval of a paired t test."""
    value, error = float(np.mean(a - b)), paired_error(a, b)
    reach = error * stats.t.ppf((1 + LEVEL) / 2, max(1, len(a) - 1)) if error else 0.0
    return Interval(value, value - reach, value + reach, error)


def wilcoxon_p(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test; 1 where no row differs."""
    return 1.0 if np.array_equal(a, b) else float(stats.wilcoxon(a, b).pvalue)


def equivalence_p(a: np.ndarray, b: np.ndarray, margin: float) -> float:
    """p-value of "the mean of a - b is at least `margin` away from 0": two one-sided paired t
    tests (TOST, Schuirmann 1987). Small: equivalent."""
    difference = a - b
    if np.ptp(difference) == 0:  # no spread: the mean is known
        return 0.0 if abs(difference[0]) < margin else 1.0
    above = stats.ttest_1samp(difference, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(difference, margin, alternative="less").pvalue
    return float(max(above, below))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values, in their order (Holm 1979)."""
    count, adjusted, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def bootstrap_ratios(top: np.ndarray, bottom: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Resamples over rows of sum(top) / sum(bottom), (samples,); equal seeds and numbers of rows
    draw equal rows, so that differences of two calls are paired."""
    counts = resampled_counts(len(top), samples, np.random.default_rng(seed))
    return (counts @ np.asarray(top, dtype=float)) / (counts @ np.asarray(bottom, dtype=float))
