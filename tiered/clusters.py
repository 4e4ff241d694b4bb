"""Level 1 without labels: tf-idf, document vectors, cluster maps (c-BTM, arXiv:2303.14177).

A cluster map is fitted on the router split by balanced k-means; every other document goes to its
nearest centre. runs/<experiment>/partition/clusters/ holds it: centres.safetensors,
labels/<domain>/<split>.safetensors (see `partition.ClusterLabels`), clusters.json.
"""

import itertools
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.preprocessing import normalize
from torch import nn

from tiered.config import CANARY, SPLITS, Config
from tiered.data import ProcessedData
from tiered.kmeans import Clusters, balanced_kmeans, nearest
from tiered.metrics import partition_nmi
from tiered.modeling_tiered import (
    DIGIT,
    HASH_BASE,
    HASH_PRIME,
    WORD_LENGTH,
    WORD_TABLE,
    Level1Config,
    TfidfEmbedder,
)
from tiered.partition import id_hashes
from tiered.record import device_of
from tiered.store import TIMINGS, UserError, atomic_folder, seed_of, write_json
from tiered.tokenization import Encoder

NAMED_DOCUMENTS = 100  # of each cluster, in which the names of its top terms are looked up
CHUNK_TOKENS = 2**17  # tokens of documents whose n-grams are held at once


class EmptyClusterError(UserError):
    """A fitted map leaves a cluster without anything to train a model on."""


def term_reader(level1: Level1Config, data: ProcessedData) -> TfidfEmbedder:
    """A tf-idf embedder that reads terms from tokens, not fitted yet."""
    embedder = TfidfEmbedder(level1)
    pieces = Encoder(data.folder / "tokenizer").pieces()
    for i, piece in enumerate(pieces):
        # a longer token's tail is lost; the table's width is set for words, not for runs of spaces
        part = torch.frombuffer(bytearray(piece), dtype=torch.uint8) if piece else torch.empty(0)
        part = part[: level1.tfidf_token_bytes].to(torch.int16)
        embedder.token_bytes[i, : len(part)] = part
    if level1.tfidf_analyzer == "word":
        for point in range(WORD_TABLE):
            letter = chr(point)
            if letter.isalnum() or letter == "_":  # what \w matches
                lower = letter.lower()
                folded = ord(lower) if len(lower) == 1 else point
                embedder.word_characters[point] = folded + DIGIT * letter.isdigit()
        codes = [term_code(word, "word") for word in sorted(ENGLISH_STOP_WORDS)]
        embedder.stop_words.copy_(torch.tensor(codes))
    return embedder


def term_code(term: str, analyzer: str) -> int:
    """Hash code of one term, as `TfidfEmbedder.terms` has it before the modulo of buckets."""
    if analyzer == "word":
        powers = (pow(HASH_BASE, i + 1, HASH_PRIME) for i in range(WORD_LENGTH))
        return sum(ord(c) * p for c, p in zip(term, powers, strict=False)) % HASH_PRIME
    code = 0
    for length, letter in enumerate(reversed(term), 1):
        code = (code * HASH_BASE + ord(letter) + 7 * length) % HASH_PRIME
    return code


def terms_of(text: str, config: Level1Config) -> Iterator[str]:
    """All terms of a text, as `TfidfEmbedder.terms` reads them."""
    if config.tfidf_analyzer == "word":
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        for word in re.findall(r"\b\w\w+\b(?=.)", lower, re.DOTALL):
            if not (word[0].isdigit() or word in ENGLISH_STOP_WORDS):
                yield word
        return
    for length in range(1, config.tfidf_ngram_max + 1):
        yield from (text[i : i + length] for i in range(len(text) - length + 1))


def top_terms(
    config: Config,
    data: ProcessedData,
    level1: Level1Config,
    labels: dict[str, np.ndarray],
    count: int = 10,
) -> list[list[str]]:
    """The terms that tell each cluster from all documents, heaviest first.

    Weight of a bucket: p log(p / q), p and q its share of the cluster's documents and of all. A
    second pass over NAMED_DOCUMENTS of each cluster finds the most frequent term behind it.
    """
    reader, n = term_reader(level1, data), config.partition.n
    shares, documents = np.zeros((n, level1.tfidf_buckets)), np.zeros(n)
    chosen: list[list[str]] = [[] for _ in range(n)]
    for domain in sorted(labels):
        done = 0
        for chunk in _chunks(fitted_documents(config, data, domain)):
            own = labels[domain][done : done + len(chunk)]
            present = (_counts(reader, chunk) > 0).astype(np.float64)
            onto = scipy.sparse.csr_matrix(
                (np.ones(len(own)), (own, np.arange(len(own)))), (n, len(own))
            )
            shares += (onto @ present).toarray()
            documents += np.bincount(own, minlength=n)
            done += len(chunk)
            for tokens, k in zip(chunk, own, strict=True):
                if len(chosen[k]) < NAMED_DOCUMENTS:
                    chosen[k].append(_text(reader, tokens))
    overall = shares.sum(0) / documents.sum()
    shares /= documents[:, None].clip(min=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(shares > overall, shares * np.log(shares / overall), 0)
    found = []
    for k in range(n):
        heaviest = np.argsort(-weights[k], kind="stable")[:count]
        names: dict[int, Counter] = {int(b): Counter() for b in heaviest if weights[k, b]}
        for term, times in Counter(t for x in chosen[k] for t in terms_of(x, level1)).items():
            bucket = term_code(term, level1.tfidf_analyzer) % level1.tfidf_buckets
            if bucket in names:
                names[bucket][term] += times
        found.append([c.most_common(1)[0][0] for c in names.values() if c])
    return found


def _text(reader: TfidfEmbedder, tokens: np.ndarray) -> str:
    """Text of a document from the bytes of its tokens; broken characters are left out."""
    values = reader.token_bytes[torch.from_numpy(tokens.astype(np.int64))]
    return bytes(values[values >= 0].tolist()).decode("utf-8", "ignore")


def fit_tfidf(
    config: Config, level1: Level1Config, data: ProcessedData, domains: list[str]
) -> TfidfEmbedder:
    """Tf-idf embedder of these domains' router split.

    idf = ln((1 + documents) / (1 + documents with the n-gram)) + 1 over all of it (buckets in
    fewer than tfidf_min_df documents are left out); the SVD is of the first tfidf_documents of
    every domain, of unit length each.
    """
    section = config.router
    embedder = term_reader(level1, data)
    frequency, documents, kept = np.zeros(section.tfidf_buckets), 0, []
    for domain in domains:
        used = 0
        for chunk in _chunks(data.documents(domain, "router", section.tokens_per_domain)):
            counts = _counts(embedder, chunk)
            frequency += counts.getnnz(axis=0)
            documents += counts.shape[0]
            if used < section.tfidf_documents:
                kept.append(counts[: section.tfidf_documents - used])
                used += kept[-1].shape[0]
    idf = np.log((1 + documents) / (1 + frequency)) + 1
    idf[frequency < section.tfidf_min_df] = 0
    columns = np.flatnonzero(idf)
    held, dimensions = sum(part.shape[0] for part in kept), section.tfidf_dimensions
    if min(held, len(columns)) <= dimensions:
        raise UserError(
            f"router.tfidf_dimensions: {dimensions} need more than {dimensions} documents and"
            f" terms in the router split, found {held} and {len(columns)}"
        )
    rows = normalize(scipy.sparse.vstack(kept)[:, columns].multiply(idf[columns]).tocsr())
    seed = seed_of(config.seed, "tfidf", sorted(config.data.domains))
    svd = TruncatedSVD(dimensions, random_state=seed).fit(rows)
    projection = np.zeros((section.tfidf_buckets, dimensions), dtype=np.float32)
    projection[columns] = (svd.components_ * idf[columns]).T
    embedder.projection.copy_(torch.from_numpy(projection))
    return embedder


def _chunks(documents: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Documents in groups of at most CHUNK_TOKENS tokens (a longer one alone)."""
    group, tokens = [], 0
    for document in documents:
        if group and tokens + len(document) > CHUNK_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(document)
        tokens += len(document)
    if group:
        yield group


def _padded(documents: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents as rows (B, T) padded on the right, and their mask."""
    lengths = torch.tensor([len(d) for d in documents])
    ids = torch.zeros(len(documents), int(lengths.max()), dtype=torch.long)
    for row, document in zip(ids, documents, strict=True):
        row[: len(document)] = torch.from_numpy(document.astype(np.int64))
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def _counts(embedder: TfidfEmbedder, documents: list[np.ndarray]) -> scipy.sparse.csr_matrix:
    """Bucket counts of documents, (documents, buckets)."""
    ids = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    bucket, end = (t.numpy() for t in embedder.terms(ids, torch.from_numpy(owner)))
    shape = (len(documents), embedder.config.tfidf_buckets)
    ones = np.ones(len(bucket), dtype=np.float32)
    counts = scipy.sparse.csr_matrix((ones, (owner[end], bucket)), shape=shape)
    counts.sum_duplicates()
    return counts


def fitted_documents(config: Config, data: ProcessedData, domain: str) -> Iterator[np.ndarray]:
    """A domain's documents that clusters are fitted on: the first of its router split."""
    found = data.documents(domain, "router", config.router.tokens_per_domain)
    return itertools.islice(found, config.partition.fit_documents)


def document_vectors(
    config: Config, embedder: nn.Module, documents: Iterator[np.ndarray]
) -> np.ndarray:
    """Unit vectors (documents, D) float32; the transformer reads a document's first block."""
    parts = list(vector_chunks(config, embedder, documents))
    return np.concatenate(parts) if parts else np.zeros((0, 1), dtype=np.float32)


def vector_chunks(
    config: Config, embedder: nn.Module, documents: Iterator[np.ndarray]
) -> Iterator[np.ndarray]:
    """As `document_vectors`, a chunk of documents at a time."""
    device = device_of(config)
    embedder = embedder.to(device)
    reads = config.data.block_size if config.router.embedder == "transformer" else None
    for chunk in _chunks(d[:reads] for d in documents):
        order = np.argsort([len(d) for d in chunk], kind="stable")  # neighbours need little padding
        found = torch.zeros(len(chunk), 0)
        for rows in np.array_split(order, max(1, len(order) // config.router.batch_rows)):
            ids, mask = _padded([chunk[i] for i in rows])
            with torch.inference_mode():
                part = embedder.row_embeddings(ids.to(device), mask.to(device)).float().cpu()
            if not found.shape[1]:
                found = torch.zeros(len(chunk), part.shape[1])
            found[torch.from_numpy(rows)] = part
        yield nn.functional.normalize(found, dim=-1).numpy()


def fit_clusters(
    config: Config, data: ProcessedData, embedder: nn.Module
) -> tuple[Clusters, dict[str, np.ndarray]]:
    """Balanced clusters of the present domains' documents, and each domain's labels."""
    vectors = {
        domain: document_vectors(config, embedder, fitted_documents(config, data, domain))
        for domain in sorted(data.domains)
    }
    total, n = sum(map(len, vectors.values())), config.partition.n
    if total < n:
        raise UserError(f"partition.n: {n} clusters need at least {n} documents, found {total}")
    seed = seed_of(config.partition.seed, "cluster", sorted(config.data.domains))
    clusters = balanced_kmeans(np.concatenate(list(vectors.values())), n, seed)
    ends = np.cumsum([len(v) for v in vectors.values()])[:-1]
    labels = np.split(clusters.labels, ends)
    return clusters, dict(zip(vectors, labels, strict=True))


def write_clusters(
    config: Config,
    data: ProcessedData,
    embedder: nn.Module,
    level1: Level1Config,
    folder: Path,
    inputs: str,
) -> None:
    """Fit a cluster map and write it: every document of every split with its cluster."""
    begin = time.perf_counter()
    clusters, fitted = fit_clusters(config, data, embedder)
    n = config.partition.n
    counts: dict[str, list[int]] = {}
    blocks = np.zeros(n, dtype=np.int64)  # training blocks of every cluster
    with atomic_folder(folder) as path:
        save_file({"centres": torch.from_numpy(clusters.centres)}, path / "centres.safetensors")
        for domain in data.domains:
            for split in (*SPLITS, CANARY):
                labels = fitted[domain]
                if split != "router":
                    chunks = vector_chunks(config, embedder, data.documents(domain, split))
                    found = [nearest(vectors, clusters.centres) for vectors in chunks]
                    labels = np.concatenate([labels[:0], *found])
                if split == "train":
                    counts[domain] = np.bincount(labels, minlength=n).tolist()
                    lengths = [len(d) + 1 for d in data.documents(domain, split)]
                    tokens = np.bincount(labels, weights=lengths, minlength=n)
                    blocks += tokens.astype(np.int64) // data.block_size
                _write_labels(path, domain, split, data.document_ids(domain, split), labels)
        if not blocks.all():
            raise EmptyClusterError(
                f"partition.n: cluster {int(blocks.argmin())} of {n} holds no training block of"
                f" {data.block_size} tokens; lower partition.n or give it more text"
            )
        summary = _summary(config, clusters, fitted, counts, inputs)
        summary["top_terms"] = top_terms(config, data, level1, fitted)
        write_json(path / "clusters.json", summary)
        write_json(path / TIMINGS, {"seconds": time.perf_counter() - begin})


def _write_labels(
    folder: Path, domain: str, split: str, ids: list[str], labels: np.ndarray
) -> None:
    """Labels of a split's documents (router: those that were fitted), sorted by id hash."""
    hashes = id_hashes(ids[: len(labels)])
    order = np.argsort(hashes, kind="stable")
    arrays = {"ids": hashes[order], "labels": labels[order].astype(np.int16)}
    path = folder / "labels" / domain / f"{split}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(arrays, path)


def _summary(
    config: Config,
    clusters: Clusters,
    fitted: dict[str, np.ndarray],
    counts: dict[str, list[int]],
    inputs: str,
) -> dict[str, Any]:
    """What a reader and the partition map want to know of a fit.

    inertia: sum of squared distances over router-split documents; nmi: of clusters with domains,
    on the balanced router split and on train (nearest centre).
    """
    table = np.stack([np.bincount(v, minlength=config.partition.n) for v in fitted.values()])
    tables = {"router": table, "train": np.array(list(counts.values()))}
    return {
        "inputs": inputs,
        "n": config.partition.n,
        "embedder": config.router.embedder,
        "inertia": clusters.inertia,
        "fitted_sizes": np.bincount(clusters.labels, minlength=config.partition.n).tolist(),
        "nmi_with_domain": {name: _nmi(found) for name, found in tables.items()},
        "train_documents": counts,
    }


def _nmi(table: np.ndarray) -> float:
    """Normalised mutual information of rows and columns of a table of counts."""
    rows, columns = table.nonzero()
    times = table[rows, columns]
    return round(partition_nmi(np.repeat(rows, times), np.repeat(columns, times)), 6)
