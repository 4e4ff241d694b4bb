"""Level 1 without labels: balanced k-means on document vectors (c-BTM, arXiv:2303.14177).

While fitting every cluster holds floor(N/k) or ceil(N/k) vectors; afterwards a vector goes to its
nearest centre. Shapes: N vectors, D their width, k clusters.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.cluster import kmeans_plusplus

SAMPLE_ROWS = 20_000  # vectors on which the starts compete, before all of them are used
STARTS = 4
MAX_ROUNDS = 50
EPSILONS = (1e-2, 1e-3, 1e-4)  # of the mean gap between nearest and farthest centre
TOLERANCE = 1e-4  # relative gain of inertia below which a fit has converged


@dataclass(frozen=True)
class Clusters:
    """Labels (N,) int64 of the fitted vectors, their means (k, D) float32 per cluster, and their
    inertia: the sum of squared distances to the own mean."""

    centres: np.ndarray
    labels: np.ndarray
    inertia: float


def squared_distances(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (N, k), 0 or more."""
    found = vectors @ (-2 * centres.T)
    found += np.einsum("nd,nd->n", vectors, vectors)[:, None]
    found += np.einsum("kd,kd->k", centres, centres)
    return np.maximum(found, 0, out=found)


def nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre, (N,) int64; the lowest of equally near ones."""
    return squared_distances(vectors, centres).argmin(1)


def balanced_assignment(
    costs: np.ndarray, prices: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) of least total cost with cluster sizes within one of each other, and prices (k,).

    costs (N, k). An auction (Bertsekas, 1988) in bulk: every vector takes the cluster of least cost
    plus price, and a cluster chosen too often raises its price until its surplus prefers another,
    and by epsilon. No vector can then gain more than epsilon by moving: the mean cost is within
    epsilon (the last of EPSILONS) of the optimum.
    prices: where to begin (those of an earlier, similar call).
    """
    k = costs.shape[1]
    prices = np.zeros(k) if prices is None else prices.astype(np.float64)
    spread = float((costs.max(1) - costs.min(1)).mean(dtype=np.float64))
    # From coarse to fine (epsilon scaling): small steps alone would fight over one vector for long.
    least = 1e-9 * float(costs.max()) + np.finfo(np.float32).tiny  # what a price can be seen to do
    for share in EPSILONS:
        labels = _auction(costs, prices, max(share * spread, least))
    return labels, prices


def _auction(costs: np.ndarray, prices: np.ndarray, epsilon: float) -> np.ndarray:
    """Labels (N,) of one auction; raises prices in place."""
    n, k = costs.shape
    labels = (costs + prices).argmin(1)
    counts = np.bincount(labels, minlength=k)
    sizes = np.full(k, n // k)
    sizes[np.argsort(-counts, kind="stable")[: n % k]] += 1  # the fullest take the remainder
    while (surplus := int((counts - sizes).max())) > 0:
        j = int((counts - sizes).argmax())
        rows = np.flatnonzero(labels == j)
        offers = costs[rows] + prices
        own = offers[:, j].copy()
        offers[:, j] = np.inf
        other = offers.argmin(1)
        loss = offers[np.arange(len(rows)), other] - own  # what leaving j costs
        leaving = np.argpartition(loss, surplus - 1)[:surplus]
        prices[j] += max(0.0, loss[leaving].max()) + epsilon
        labels[rows[leaving]] = other[leaving]
        counts += np.bincount(other[leaving], minlength=k)
        counts[j] -= surplus
    return labels


def _fit(vectors: np.ndarray, centres: np.ndarray) -> Clusters:
    """Lloyd's rounds with balanced assignments, from given centres until inertia settles."""
    k, prices, fitted = len(centres), None, None
    total = float(np.einsum("nd,nd->", vectors, vectors, dtype=np.float64))
    for _ in range(MAX_ROUNDS):
        labels, prices = balanced_assignment(squared_distances(vectors, centres), prices)
        means = cluster_means(vectors, labels, k)
        centres = means.astype(np.float32)
        # a difference of large sums: float32 means would cost it digits far from the origin
        held = np.square(means).sum(1) * np.bincount(labels, minlength=k)
        inertia = total - float(held.sum())  # of means
        settled = fitted is not None and inertia > fitted.inertia * (1 - TOLERANCE)
        if fitted is None or inertia < fitted.inertia:
            fitted = Clusters(centres, labels, inertia)
        if settled:
            break
    return fitted


def cluster_means(vectors: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Mean vector of every cluster, (k, D) float64."""
    return np.stack([vectors[labels == j].mean(0, dtype=np.float64) for j in range(k)])


def balanced_kmeans(vectors: np.ndarray, k: int, seed: int) -> Clusters:
    """Balanced k-means of vectors (N, D) float32 in any order; equal inputs give equal clusters.

    The starts (k-means++) compete on a sample; the best goes on with all vectors. Raises
    ValueError if there are fewer vectors than clusters.
    """
    n = len(vectors)
    if not 1 <= k <= n:
        raise ValueError(f"k: {k} clusters need at least {k} vectors, found {n}")
    generator = np.random.default_rng(seed)
    sample = vectors
    if n > SAMPLE_ROWS:
        sample = vectors[np.sort(generator.choice(n, max(SAMPLE_ROWS, k), replace=False))]
    fits = []
    for _ in range(STARTS):
        start, _ = kmeans_plusplus(sample, k, random_state=int(generator.integers(2**31)))
        fits.append(_fit(sample, start))
    best = min(fits, key=lambda fit: fit.inertia)  # the first of equals
    return best if sample is vectors else _fit(vectors, best.centres)
