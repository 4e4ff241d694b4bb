"""What is trained on, on paper: the numbers that real trainings note, and hand calculations."""

import dataclasses
import json
import math

import numpy as np
import pytest

from tiered import branching
from tiered.config import (
    Config,
    DataConfig,
    ModelConfig,
    PartitionConfig,
    SeedConfig,
    TokenizerConfig,
    TrainingConfig,
    load,
)
from tiered.joint import BalancedBlocks
from tiered.store import UserError
from tiered.workload import Assumptions, Corpus, jobs_of, partition_map, seed_job, steps_of

DOMAINS = ("hi", "si", "de", "en")


def made(tmp_path, **sections) -> Config:
    """Four languages of 10,000 documents in blocks of 100 tokens, none of it processed."""
    data = {"domains": DOMAINS, "num_documents": 10_000, "block_size": 100}
    data |= {"processed_dir": str(tmp_path), **sections.pop("data", {})}
    return Config(name="x", data=DataConfig(**data), **sections)


def jobs(config: Config, **assumed):
    corpus = Corpus(config, Assumptions(**assumed))
    return jobs_of(config, corpus, partition_map(config, corpus.notes)), corpus


@pytest.mark.parametrize("name", ["n1", "n2", "n4"])
def test_of_processed_data_rows_and_steps_are_those_of_the_trainings(name, tiny, monkeypatch):
    """Repeated rows and both epochs' rounding included: the records of published models."""
    monkeypatch.chdir(tiny)
    found, corpus = jobs(load(f"configs/{name}.yaml"))
    assert corpus.source.startswith("manifest of the processed data")
    for k, job in enumerate(found):
        record = json.loads((tiny / f"runs/{name}/models/{k}/record.json").read_text())
        assert job.blocks == sum(record["blocks"].values())
        assert job.rows * 32 == record["tokens"] and job.steps == record["optimizer_steps"]
        assert job.batch_rows == record["batch_rows"]
        assert sorted(job.domains) == record["partition"]["present"]


@pytest.mark.parametrize("name", ["r2", "k4"])
def test_documents_are_shared_out_as_far_as_is_known(name, tiny, monkeypatch):
    """In sum as trained, within a block per domain and partition; every partition within a tenth:
    documents at random are of many lengths, and a cluster's are counted, not their tokens."""
    monkeypatch.chdir(tiny)
    found, corpus = jobs(load(f"configs/{name}.yaml"))
    records = [
        json.loads((tiny / f"runs/{name}/models/{job.name}/record.json").read_text())
        for job in found
    ]
    blocks = [sum(record["blocks"].values()) for record in records]
    assert abs(sum(job.blocks for job in found) - sum(blocks)) <= 4 * len(found)
    for job, own in zip(found, blocks, strict=True):
        assert job.blocks == pytest.approx(own, rel=0.1)
    assert any(("clusters: tokens" if name == "k4" else "equal share") in n for n in corpus.notes)


def test_without_data_documents_times_an_assumption(tmp_path):
    """10,000 documents, 60 % of them train, 500 tokens each: 30,000 blocks of a domain."""
    config = made(tmp_path, partition=PartitionConfig(n=2))
    found, corpus = jobs(config)
    assert [job.blocks for job in found] == [60_000, 60_000]
    assert "500 tokens per document (assumed)" in corpus.source
    assert corpus.tokens("hi", "test") == 10_000 * 0.08 * 500
    assert corpus.documents("hi", "test") == 800
    assert corpus.text_bytes("hi", "test") == 400_000 * 4.7
    assert [job.blocks for job in jobs(config, tokens_per_document=250)[0]] == [30_000, 30_000]
    # rows that are scored: as asked for, or as many as there are
    assert (corpus.rows("hi", "test", 64), corpus.rows("hi", "test", 0)) == (64, 800)


def test_a_budget_caps_what_is_read_and_repeats_add_blocks(tmp_path):
    data = {"tokens_per_domain": {"hi": 1050, "si": 10**9}, "repeats": {4: 2, 3: 1}}
    data |= {"canaries": {2: 5}, "repeat_domains": ("hi",)}
    config = made(tmp_path, data=data, partition=PartitionConfig(n=4))
    found, corpus = jobs(config)
    # ten blocks; 3 + 3 + 2 more of repeated rows, 10 of canaries
    assert found[0].blocks == 10 + 8 + 10
    assert found[1].blocks == 30_000  # the budget is beyond what is read
    assert "data.tokens_per_domain" in corpus.source


def test_what_nobody_can_know_stays_unknown(tmp_path):
    config = made(tmp_path, data={"num_documents": 0})
    (job,), corpus = jobs(config)
    assert math.isnan(job.blocks) and math.isnan(job.rows) and math.isnan(job.steps)
    assert corpus.source.startswith("unknown")
    assert corpus.rows("hi", "test", 64) == 64  # at most, and as far as is known


@pytest.mark.parametrize("schedule, n, rows", [("constant_steps", 4, 4), ("constant_batch", 4, 16)])
def test_steps_by_hand(schedule, n, rows, tmp_path):
    """30,000 rows, 1.5 passes: 45,000 in micro-batches of 4 or 16, two of them a step."""
    section = TrainingConfig(schedule=schedule, num_train_epochs=1.5, gradient_accumulation_steps=2)
    config = made(tmp_path, training=section, partition=PartitionConfig(n=n))
    job = jobs(config)[0][0]
    assert (job.rows, job.batch_rows) == (45_000, rows)
    assert job.steps == math.ceil(math.ceil(45_000 / rows) / 2)
    assert steps_of(1, 16, 4) == 1 and steps_of(65, 16, 4) == 2


def test_balanced_steps_pass_over_the_largest(tmp_path):
    """As many rows as the data set of a training has, for domains and for a trunk's partitions."""
    data = {"tokens_per_domain": {"hi": 3000, "si": 1000, "de": 2000, "en": 500}}
    section = TrainingConfig(balanced=True, num_train_epochs=2, per_device_train_batch_size=8)
    sizes, labels = [30, 10, 20, 5], [0] * 30 + [1] * 10 + [2] * 20 + [3] * 5
    real = BalancedBlocks(np.zeros((65, 4)), np.array(labels), 2, 2.0, 0)
    job = jobs(made(tmp_path, data=data, training=section))[0][0]
    assert (job.blocks, job.rows, job.batch_rows) == (sum(sizes), len(real), 8)
    assert job.steps == len(real) / 8
    trunk = made(
        tmp_path,
        data=data,
        training=dataclasses.replace(section, balanced=False),
        model=ModelConfig(type="demix"),
        partition=PartitionConfig(n=4),
    )
    (whole,), _ = jobs(trunk)
    assert (whole.name, whole.partitions) == ("all", (0, 1, 2, 3))
    assert (whole.rows, whole.steps, whole.batch_rows) == (len(real), len(real) / 8, 8)


def test_an_excluded_domain_leaves_its_partition_without_a_training(tmp_path):
    config = made(tmp_path, partition=PartitionConfig(n=4)).without("si")
    assert [job.name for job in jobs(config)[0]] == ["0", "2", "3"]


def test_a_seed_lm_takes_its_share_of_the_documents(tmp_path):
    config = made(
        tmp_path,
        model=ModelConfig(type="llama", init_from="seed"),
        seed_lm=SeedConfig(share=0.25),
        partition=PartitionConfig(n=4),
    )
    found, corpus = jobs(config)
    own, seed = seed_job(config, corpus)
    assert own == branching.seed_config(config)
    assert seed.blocks == 4 * 7500 and all(job.blocks == 22_500 for job in found)
    assert seed_job(made(tmp_path), corpus) is None


def test_clusters_that_are_not_fitted_are_of_equal_shares(tmp_path):
    config = made(tmp_path, partition=PartitionConfig(method="cluster", n=8))
    found, corpus = jobs(dataclasses.replace(config, output_dir=str(tmp_path)))
    assert [job.blocks for job in found] == [4 * 3750] * 8
    assert any("not fitted yet" in note for note in corpus.notes)
    with pytest.raises(UserError, match="need at least 8 domains"):
        jobs(made(tmp_path, partition=PartitionConfig(n=8)))


@pytest.mark.parametrize(
    "tokenizer, size",
    [({}, 4096), ({"name": "bytes"}, 258), ({"name": "bert-base-multilingual-cased"}, 119_547)],
)
def test_vocabularies_that_are_not_there(tokenizer, size, tmp_path):
    config = made(tmp_path, tokenizer=TokenizerConfig(**tokenizer))
    assert Corpus(config, Assumptions()).vocabulary.vocab_size == size


def test_a_vocabulary_that_nobody_knows_is_one_line(tmp_path):
    config = made(tmp_path, tokenizer=TokenizerConfig(name="some/model"))
    with pytest.raises(UserError, match=r"set model\.vocab_size"):
        Corpus(config, Assumptions())
    known = dataclasses.replace(config, model=ModelConfig(vocab_size=50_000))
    assert Corpus(known, Assumptions()).vocabulary.vocab_size == 50_000
    folder = dataclasses.replace(config, tokenizer=TokenizerConfig(name=str(tmp_path)))
    with pytest.raises(UserError, match=r"tokenizer\.name: cannot load"):
        Corpus(folder, Assumptions())


def test_a_tokenizer_folder_is_read(tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    (folder,) = (tiny / "processed").glob("*/tokenizer")
    config = made("nowhere", tokenizer=TokenizerConfig(name=str(folder)))
    assert Corpus(config, Assumptions()).vocabulary.vocab_size == 400
