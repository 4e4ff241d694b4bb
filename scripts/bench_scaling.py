"""Contenders of scripts/bench.py that are numbers of partitions: how code paths grow with n.

Everything is synthetic: centroids, scores and document ids at random, partition models that cost
nothing. What is timed is what the path itself does.
"""

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tiered.kmeans import balanced_kmeans
from tiered.mixtures import MIXTURES, Evidence, MixtureSettings, mix
from tiered.modeling_tiered import Level1Config, Level1Router, assign
from tiered.partition import PartitionMap
from tiered.scoring import score_rows

EMBEDDER_HEADS = 2  # as configs/c4.yaml has it
STUB_WORDS = 8  # logits of a model that costs nothing


def scaling_step(kind: str, size: dict[str, Any]) -> Callable[[], None]:
    """One turn of a path at n = kind partitions; tokens: tokens (route, mix, score), documents
    (documents) or vectors (clusters)."""
    torch.manual_seed(0)
    paths = {
        "route": route_step,
        "mix": mix_step,
        "score": score_step,
        "documents": documents_step,
        "clusters": clusters_step,
    }
    return paths[size["path"]](int(kind), size)


def route_step(n: int, size: dict[str, Any]) -> Callable[[], None]:
    """The partition of every position: embedder, comparison with n centroids, argmax."""
    config = Level1Config(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        num_attention_heads=EMBEDDER_HEADS,
        max_position_embeddings=size["length"],
    )
    router = Level1Router(config, n, n).eval()
    router.centroids.normal_()
    router.centroid_partition.copy_(torch.arange(n))
    ids = torch.randint(0, size["vocab"], (size["tokens"] // size["length"], size["length"]))

    @torch.inference_mode()
    def step() -> None:
        assign(router.scores(ids), "token", 1)

    return step


def mix_step(n: int, size: dict[str, Any]) -> Callable[[], None]:
    """Weights by distance, the four heaviest kept, and the mixture, where every partition's log
    probability is there."""
    shape = (size["tokens"] // size["length"], size["length"], n)
    log_probs = -torch.rand(shape, dtype=torch.float64)
    evidence = Evidence(torch.rand(shape), log_probs, log_probs[:0], tuple(range(n)))

    def step() -> None:
        mix(MIXTURES["distance"](evidence, MixtureSettings(0.1, 4)), log_probs)

    return step


class Stub(torch.nn.Module):
    """A model whose logits are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, **given: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.weight.new_zeros(*input_ids.shape, STUB_WORDS))


def score_step(n: int, size: dict[str, Any]) -> Callable[[], None]:
    """What scoring does around its models: rows of one partition each, all partitions equally."""
    model = SimpleNamespace(partitions={str(k): Stub() for k in range(n)})
    rows = size["tokens"] // size["length"]
    ids = np.zeros((rows, size["length"]), dtype=np.int64)
    chosen = (torch.arange(rows) % n)[:, None].expand(rows, size["length"] - 1)

    def step() -> None:
        score_rows(model, ids, {"sample": chosen}, 16)

    return step


def documents_step(n: int, size: dict[str, Any]) -> Callable[[], None]:
    """Which documents one partition of a random map is trained on: every document is looked at."""
    partitions = PartitionMap("random", (("en",),) * n, True, 0)
    ids = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(size["tokens"])]

    def step() -> None:
        np.flatnonzero(partitions.assign("en", ids) == 0)

    return step


def clusters_step(n: int, size: dict[str, Any]) -> Callable[[], None]:
    """Balanced clusters of random vectors of dimension 100."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(size["tokens"], 100)).astype(np.float32)
    return lambda: balanced_kmeans(vectors, n, 0)
