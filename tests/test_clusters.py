"""Cluster maps of the tiny pipeline: tf-idf by hand, nearest centres, kept when a domain goes."""

import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.feature_extraction.text import TfidfVectorizer

from tests.conftest import brute_ngrams, run_stages
from tiered.clusters import (
    document_vectors,
    fit_clusters,
    fit_tfidf,
    term_code,
    term_reader,
    terms_of,
    write_clusters,
)
from tiered.config import SPLITS, Config, load
from tiered.data import ProcessedData
from tiered.kmeans import nearest
from tiered.partition import make_partition_map
from tiered.router import check_clusters, level1_config, load_router
from tiered.store import UserError, read_json
from tiered.tokenization import Encoder


@pytest.fixture(scope="module")
def run(tiny, monkeypatch_module) -> tuple[Config, ProcessedData]:
    """Config and data of the tiny cluster experiment, seen from its project folder."""
    monkeypatch_module.chdir(tiny)
    config = load(Path("configs/k4.yaml"))
    return config, ProcessedData(config)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_tfidf_vectors_by_hand(run):
    """Counts of the decoded text's n-grams, the idf formula, and the projection found with them."""
    config, data = run
    router, _ = load_router(config.run_dir / "router", "")
    buckets = config.router.tfidf_buckets
    texts = {
        d: [data.tokenizer.decode(ids) for ids in data.documents(d, "router")] for d in data.domains
    }
    counts = [
        Counter(b for b, _ in brute_ngrams([t.encode()], buckets, 3))
        for d in texts
        for t in texts[d]
    ]
    frequency = Counter(b for c in counts for b in c)
    # a projected direction is idf times an orthonormal component
    projection = router.embedder.projection.double()
    idf = torch.zeros(buckets, dtype=torch.float64)
    for bucket, documents in frequency.items():
        if documents >= config.router.tfidf_min_df:
            idf[bucket] = math.log((1 + len(counts)) / (1 + documents)) + 1
    assert torch.equal(projection.abs().sum(1) > 0, idf > 0)
    components = (projection / idf[:, None])[idf > 0]
    gram = components.T @ components
    assert torch.allclose(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-4)
    vectors = np.concatenate(
        [document_vectors(config, router.embedder, data.documents(d, "router")) for d in texts]
    )
    for vector, count in zip(vectors, counts, strict=True):
        expected = sum(n * projection[b] for b, n in count.items())
        assert np.allclose(vector, expected / expected.norm(), atol=1e-5)


def test_words_are_those_of_the_published_analyser(run):
    """From tokens, from text, and from scikit-learn set up as c-BTM does (numbers become one more
    stop word); a word counts from the character that ends it."""
    _, data = run
    level1 = level1_config(load(Path("configs/k4.yaml"), ("router.tfidf_analyzer=word",)), data)
    reader = term_reader(level1, data)
    published = TfidfVectorizer(stop_words="english").build_analyzer()
    found_any = 0
    for domain in data.domains:
        for tokens in data.documents(domain, "router"):
            text = data.tokenizer.decode(tokens)
            words = [w for w in published(text + " ") if not w[0].isdigit()]
            assert Counter(terms_of(text + " ", level1)) == Counter(words)
            ids = torch.from_numpy(tokens.astype(np.int64))
            bucket, end = reader.terms(ids, torch.zeros_like(ids))
            for length in (len(ids), len(ids) // 2, len(ids) // 3):
                raw = b"".join(data_pieces(data, ids[:length]))
                seen = terms_of(raw.decode("utf-8", "ignore"), level1)
                expected = Counter(term_code(w, "word") % level1.tfidf_buckets for w in seen)
                assert Counter(bucket[end < length].tolist()) == expected
            found_any += len(bucket)
    assert found_any > 1000
    # texts laid one after another share no word, and a word needs its end
    ids = torch.tensor(data.tokenizer("ab cdé fg", add_special_tokens=False)["input_ids"])
    twice, rows = torch.cat([ids, ids]), torch.arange(2).repeat_interleave(len(ids))
    codes = [term_code(w, "word") % level1.tfidf_buckets for w in ("ab", "cdé")]
    assert reader.terms(twice, rows)[0].tolist() == codes * 2
    assert not len(reader.terms(ids[:0], rows[:0])[0])


def data_pieces(data: ProcessedData, ids: torch.Tensor) -> list[bytes]:
    pieces = Encoder(data.folder / "tokenizer").pieces()
    return [pieces[i] for i in ids.tolist()]


def test_top_terms_by_brute_force(run):
    """p log(p / q) of every bucket's share of documents, and the names that stand behind it."""
    config, data = run
    buckets, partitions = config.router.tfidf_buckets, make_partition_map(config)
    terms = read_json(config.run_dir / "partition/clusters/clusters.json")["top_terms"]
    present, labels, names = [], [], []
    for domain in data.domains:
        labels += partitions.assign(domain, data.document_ids(domain, "router")).tolist()
        for tokens in data.documents(domain, "router"):
            row, raw = np.zeros(buckets), data.tokenizer.decode(tokens).encode()
            row[[b for b, _ in brute_ngrams([raw], buckets, 3)]] = 1
            present.append(row)
            names.append(domain)
    present, labels = np.stack(present), np.array(labels)
    for k in range(4):
        p, q = present[labels == k].mean(0), present.mean(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = np.where(p > q, p * np.log(p / q), 0)
        found = [term_code(term, "char") % buckets for term in terms[k]]
        assert len(found) == 10
        assert np.allclose(weights[found], np.sort(weights)[::-1][:10])
        domain = Counter(np.array(names)[labels == k]).most_common(1)[0][0]
        blocks = {"hi": ("\u0900", "\u097f"), "si": ("\u0d80", "\u0dff")}
        if domain in blocks:
            low, high = blocks[domain]
            letters = [c for term in terms[k] for c in term if not c.isspace()]
            assert all(low <= c <= high for c in letters)


def test_every_document_stands_in_its_nearest_cluster_and_the_fit_is_balanced(run):
    config, data = run
    partitions = make_partition_map(config)
    router, _ = load_router(config.run_dir / "router", "")
    folder = config.run_dir / "partition/clusters"
    centres = load_file(folder / "centres.safetensors")["centres"].numpy()
    fitted = []
    for domain in data.domains:
        for split in SPLITS:
            labels = partitions.assign(domain, data.document_ids(domain, split))
            assert ((labels >= 0) & (labels < 4)).all()
            vectors = document_vectors(config, router.embedder, data.documents(domain, split))
            if split == "router":
                fitted.append((vectors, labels))
            elif len(vectors):
                assert np.array_equal(labels, nearest(vectors, centres))
    vectors, labels = (np.concatenate(part) for part in zip(*fitted, strict=True))
    sizes = np.bincount(labels, minlength=4)
    assert sizes.max() - sizes.min() <= 1
    # centre, centroid of the router and mean of the fitted documents are one
    means = np.stack([vectors[labels == k].mean(0) for k in range(4)])
    assert np.allclose(centres, means, atol=1e-5)
    assert np.allclose(router.centroids.numpy(), means, atol=1e-5)
    assert router.embedder.config.metric == "euclidean"
    # scripts of this profile are far apart: clusters are languages (E3)
    assert read_json(folder / "clusters.json")["nmi_with_domain"]["train"] > 0.9


def test_the_map_is_kept_when_a_domain_goes_and_the_claim_says_so(run):
    config, data = run
    whole, without = make_partition_map(config), make_partition_map(config.without("hi"))
    assert whole == without and whole.identity(0) == without.identity(0)
    ids = data.document_ids("en", "train")
    assert np.array_equal(whole.assign("en", ids), without.assign("en", ids))
    # members are the domains with training documents in a cluster
    for k, members in enumerate(whole.members):
        for domain in data.domains:
            held = (whole.assign(domain, data.document_ids(domain, "train")) == k).any()
            assert held == (domain in members)
    system = read_json(config.run_dir / "unlearn/hi/gold/system/system.json")
    assert system["exact"] and "map" in system["exact_given"]


def test_a_map_fitted_without_the_domain_is_another_gold(run, tmp_path_factory):
    """Everything but the tokenizer is made without hi; a map that is no fit has no such gold."""
    folder = tmp_path_factory.mktemp("recluster") / "project"
    shutil.copytree(Path.cwd(), folder)
    operations = "unlearn.operations=original,gold,gold-recluster,delete-S1"
    (folder / "configs/k2.yaml").write_text("base: k4.yaml\nname: k2\npartition: {n: 2}\n")
    run_stages(folder, ("train_det_router", "run_clm"), "configs/k2.yaml")
    experiments = [f"configs/{name}.yaml" for name in ("k2", "k4", "n4")]
    run_stages(folder, ["unlearn_benchmarks"], *experiments, operations)
    found = read_json(folder / "runs/k2/unlearn/hi/gold-recluster/metrics.json")
    assert found["exact"] and found["exact_given"] == ["tokenizer"]
    assert found["rebuilt"] == ["map", "router", "model/0", "model/1"]
    kept = read_json(folder / "runs/k2/unlearn/hi/gold/metrics.json")
    assert kept["exact_given"] == ["tokenizer", "map"]
    models = folder / "runs/k2/unlearn/hi/gold-recluster/system/models"
    for k in range(2):
        assert "hi" not in read_json(models / str(k) / "record.json")["partition"]["present"]
    # four clusters of three languages: one would have nothing to train on
    word = read_json(folder / "runs/k4/unlearn/hi/gold-recluster/metrics.json")["result"]
    assert word.startswith("not applicable: partition.n: cluster") and "no training block" in word
    other = read_json(folder / "runs/n4/unlearn/hi/gold-recluster/metrics.json")
    assert other["result"] == "not applicable: the map was not fitted to data"


def test_a_fit_is_of_the_first_documents_and_chunks_change_nothing(run, monkeypatch):
    config, data = run
    router, _ = load_router(config.run_dir / "router", "")
    some = load(Path("configs/k4.yaml"), ("partition.fit_documents=5",))
    clusters, labels = fit_clusters(some, data, router.embedder)
    assert {d: len(v) for d, v in labels.items()} == dict.fromkeys(data.domains, 5)
    whole = document_vectors(config, router.embedder, data.documents("en", "train"))
    monkeypatch.setattr("tiered.clusters.CHUNK_TOKENS", 300)
    parts = document_vectors(config, router.embedder, data.documents("en", "train"))
    assert np.allclose(whole, parts, atol=1e-6)
    first = document_vectors(config, router.embedder, data.documents("en", "router"))[:5]
    means = [first[labels["en"] == k].mean(0) for k in range(4) if (labels["en"] == k).any()]
    # five of each of four languages in four clusters: English has one to itself
    assert len(means) == 1
    assert np.abs(clusters.centres - means[0]).max(1).min() < 1e-5


def test_a_fit_without_terms_is_one_line(run):
    config, data = run
    none = load(Path("configs/k4.yaml"), ("router.tfidf_min_df=5000",))
    with pytest.raises(UserError, match="terms in the router split, found 42 and 0"):
        fit_tfidf(none, level1_config(config, data), data, list(data.domains))


def test_another_config_is_told_to_cluster_anew(run):
    config, data = run
    check_clusters(config, data)
    other = load(Path("configs/k4.yaml"), ("partition.seed=5",))
    with pytest.raises(UserError, match="fitted by another config"):
        check_clusters(other, data)
    other = load(Path("configs/k4.yaml"), ("partition.n=3",))
    with pytest.raises(UserError, match=r"has 4 clusters, partition\.n is 3"):
        make_partition_map(other)
    other = load(Path("configs/k4.yaml"), ("name=new",))
    with pytest.raises(UserError, match=r"run: python train_det_router\.py CONFIG"):
        make_partition_map(other)
    assert make_partition_map(config).assign("hi", ["unknown"]).tolist() == [-1]


def test_a_cluster_without_a_training_block_is_refused(run):
    """Forty clusters of this little text would leave models without data."""
    config, data = run
    router, _ = load_router(config.run_dir / "router", "")
    many = load(Path("configs/k4.yaml"), ("name=many", "partition.n=40"))
    with pytest.raises(UserError, match=r"cluster \d+ of 40 holds no training block"):
        level1 = level1_config(many, data)
        write_clusters(many, data, router.embedder, level1, Path("many"), "")
    assert not Path("many").exists()
