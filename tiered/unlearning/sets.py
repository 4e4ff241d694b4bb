"""What makes holdout rows comparable with members: no text that stands in both.

Holdout rows that share boilerplate with training text are half members; they are left out by the
share of their token 13-grams that occur in train (as in MIMIR, arXiv:2402.07841). Members are left
out by the same rule, their own document apart: otherwise boilerplate, which every model of the
language finds easy, would be on one side only, and an attack would find it.
"""

import numpy as np

from tiered.data import ProcessedData, Rows

NGRAM = 13
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: powers are distinct modulo 2^64


def ngram_hashes(ids: np.ndarray) -> np.ndarray:
    """Hash of every run of 13 tokens of ids (..., T), (..., T - 12) uint64; fewer give none."""
    ids = np.asarray(ids).astype(np.uint64) + np.uint64(1)
    width = max(0, ids.shape[-1] - NGRAM + 1)
    total = np.zeros((*ids.shape[:-1], width), dtype=np.uint64)
    for i in range(NGRAM if width else 0):
        total = total * _FACTOR + ids[..., i : i + width]
        total ^= total >> np.uint64(29)
    return total


def overlap(
    data: ProcessedData, rows: Rows, split: str = "train", documents: int = 1
) -> np.ndarray:
    """Share (R,) in [0, 1] of each row's 13-grams that stand in so many documents of the split."""
    wanted = ngram_hashes(rows.input_ids)
    if not wanted.size:
        return np.zeros(len(rows.input_ids))
    distinct = np.unique(wanted)
    found = np.zeros(len(distinct), dtype=np.int64)
    for document in data.documents(rows.domain, split):
        hashes = ngram_hashes(document)
        places = np.searchsorted(distinct, hashes).clip(max=len(distinct) - 1)
        found[np.unique(places[distinct[places] == hashes])] += 1
    return (found >= documents)[np.searchsorted(distinct, wanted)].mean(-1)


def distinct_from_train(data: ProcessedData, rows: Rows, most: float) -> np.ndarray:
    """Rows (R,) bool of whose 13-grams at most this share stand in the domain's train split: of a
    train row, in another document of it."""
    return overlap(data, rows, documents=1 + (rows.split == "train")) <= most
