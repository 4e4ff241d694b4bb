"""Balanced k-means against scipy's exact assignment and scikit-learn's KMeans."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from tiered.kmeans import EPSILONS, balanced_assignment, balanced_kmeans, nearest, squared_distances


def blobs(n: int, k: int, seed: int = 0, width: int = 8) -> np.ndarray:
    """k equal groups (n divisible by k) around far centres, shuffled."""
    generator = np.random.default_rng(seed)
    centres = 9 * generator.normal(size=(k, width))
    vectors = centres[np.arange(n) % k] + generator.normal(size=(n, width))
    return generator.permutation(vectors).astype(np.float32)


def test_squared_distances_by_hand():
    found = squared_distances(
        np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [3.0, 0.0]])
    )
    assert np.allclose(found, [[25, 16], [0, 9]])


@pytest.mark.parametrize("n, k", [(60, 4), (61, 4), (63, 4), (40, 8), (7, 7), (9, 1)])
def test_balanced_assignment_is_optimal_within_epsilon(n, k):
    """Against the exact assignment to one column per place: total cost within N epsilon."""
    for seed in range(5):
        costs = np.random.default_rng(seed).random((n, k)) ** 3  # unequal demand
        costs[:, 0] *= 0.1
        labels, prices = balanced_assignment(costs)
        counts = np.bincount(labels, minlength=k)
        assert set(counts) <= {n // k, -(-n // k)} and counts.sum() == n
        places = np.repeat(np.arange(k), counts)
        rows, columns = linear_sum_assignment(costs[:, places])
        exact = costs[rows, places[columns]].sum()
        epsilon = EPSILONS[-1] * (costs.max(1) - costs.min(1)).mean()
        found = costs[np.arange(n), labels].sum()
        assert exact - 1e-12 <= found <= exact + n * epsilon
        # nobody gains more than epsilon by moving, at the prices that came out
        gain = costs[np.arange(n), labels] + prices[labels] - (costs + prices).min(1)
        assert gain.max() <= epsilon * (1 + 1e-6)


def test_equal_vectors_are_shared_out_too():
    labels, _ = balanced_assignment(np.ones((10, 3)))
    assert sorted(np.bincount(labels)) == [3, 3, 4]
    clusters = balanced_kmeans(np.ones((10, 2), dtype=np.float32), 3, 0)
    assert sorted(np.bincount(clusters.labels)) == [3, 3, 4] and clusters.inertia < 1e-5


def test_inertia_keeps_its_digits_far_from_the_origin():
    """Inertia is a difference of sums: of the labels' own means in float64, at any offset."""
    vectors = blobs(400, 4) + np.float32(1000)
    found = balanced_kmeans(vectors, 4, 0)
    exact = vectors.astype(np.float64)
    parts = [exact[found.labels == j] for j in range(4)]
    direct = sum(np.square(part - part.mean(0)).sum() for part in parts)
    assert found.inertia == pytest.approx(direct, rel=1e-7)


def test_equal_natural_clusters_are_those_of_scikit_learn():
    vectors = blobs(1600, 16)
    found = balanced_kmeans(vectors, 16, 0)
    reference = KMeans(16, n_init=10, random_state=0).fit(vectors)
    assert found.inertia == pytest.approx(reference.inertia_, rel=1e-5)
    # the same partition under other names
    pairs = set(zip(found.labels.tolist(), reference.labels_.tolist(), strict=True))
    assert len(pairs) == 16
    means = np.stack([vectors[found.labels == j].mean(0) for j in range(16)])
    assert np.allclose(found.centres, means, atol=1e-5)
    assert np.array_equal(nearest(vectors, reference.cluster_centers_), reference.predict(vectors))


def test_unequal_clusters_are_cut_to_equal_sizes_and_equal_inputs_give_equal_clusters():
    generator = np.random.default_rng(0)
    vectors = np.concatenate([generator.normal(size=(900, 4)), 9 + generator.normal(size=(103, 4))])
    vectors = vectors.astype(np.float32)
    first, second = balanced_kmeans(vectors, 4, 7), balanced_kmeans(vectors, 4, 7)
    assert sorted(np.bincount(first.labels)) == [250, 251, 251, 251]
    assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(first.centres, second.centres) and first.inertia == second.inertia
    by_hand = np.square(vectors - first.centres[first.labels]).sum()
    assert first.inertia == pytest.approx(by_hand, rel=1e-5)


def test_a_sample_only_chooses_the_start(monkeypatch):
    monkeypatch.setattr("tiered.kmeans.SAMPLE_ROWS", 200)
    vectors = blobs(3200, 16)
    found = balanced_kmeans(vectors, 16, 0)
    assert set(np.bincount(found.labels)) == {200}
    reference = KMeans(16, n_init=10, random_state=0).fit(vectors)
    assert found.inertia == pytest.approx(reference.inertia_, rel=1e-5)


def test_more_clusters_than_vectors_is_refused():
    with pytest.raises(ValueError, match="5 clusters need at least 5 vectors, found 3"):
        balanced_kmeans(np.ones((3, 2), dtype=np.float32), 5, 0)
