"""Claims of tiered/data.py against brute force over the stored documents."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from tests.test_processing import change, make_config, make_texts, run, stored, write_corpus
from tiered import cleaning, processing
from tiered.config import Config
from tiered.data import ProcessedData, position_ids, processed_folder, unigram_log_probs
from tiered.store import UserError

T = 48
REPEATS = {16: 2, 4: 3}


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Config:
    """150 documents per domain, stored in chunks of 16, five rows of `en` repeated."""
    folder = tmp_path_factory.mktemp("data")
    texts = {"en": make_texts("en", 150), "zh": make_texts("zh", 150)}
    # documents too short for a row
    texts["en"] += [t[:60] for t in make_texts("en", 30, seed=4)]
    config = make_config(
        write_corpus(folder / "raw", texts),
        folder / "out",
        "bpe",
        domains=("zh", "en"),
        block_size=T,
        min_characters=20,
        repeats=REPEATS,
        repeat_domains=("en",),
    )
    patch = pytest.MonkeyPatch()
    for module in (cleaning, processing):
        patch.setattr(module, "BATCH_DOCUMENTS", 16)
    patch.setattr(processing, "PIECE_BYTES", 2**11)
    patch.setattr("datasets.config.DEFAULT_MAX_BATCH_SIZE", 16)
    run(config)
    patch.undo()
    return config


@pytest.fixture(scope="session")
def data(config) -> ProcessedData:
    return ProcessedData(config)


@pytest.fixture(scope="session")
def columns(config) -> dict[str, dict]:
    return {domain: stored(config, domain) for domain in config.data.domains}


def brute_blocks(documents: list[list[int]], limit: int = 0) -> list[list[int]]:
    stream = [token for document in documents for token in document]
    stream = stream[:limit] if limit else stream
    return [stream[i : i + T] for i in range(0, len(stream) - T + 1, T)]


def test_attributes_are_those_of_the_config_and_the_stored_tokenizer(data, config):
    assert data.domains == ("zh", "en") and data.folder == processed_folder(config)
    assert data.key == data.folder.name
    assert data.vocab_size == len(data.tokenizer)
    assert data.separator_id == data.tokenizer.eos_token_id
    assert data.pad_id == data.tokenizer.pad_token_id
    assert data.manifest["tokenizer"]["hash"] == data.tokenizer_hash
    without = ProcessedData(config.without("zh"))
    assert without.domains == ("en",)
    assert without.split_hash("en", "train") == data.split_hash("en", "train")


def test_columns_are_stored_in_several_chunks(data):
    # else the tests below would not see how chunks are joined.
    chunks = [len(offsets) - 1 for offsets, _ in data._lists("zh", "train", "input_ids")]
    assert len(chunks) > 3 and max(chunks) < 32


@pytest.mark.parametrize("split", ["train", "test", "router", "holdout"])
def test_blocks_are_the_concatenated_documents(data, columns, split):
    documents = columns["zh"][split]["input_ids"]
    assert data.document_ids("zh", split) == columns["zh"][split]["document_id"]
    blocks = data.blocks("zh", split)
    assert blocks.dtype == np.int32 and blocks.tolist() == brute_blocks(documents)
    for limit in (1, T, 5 * T + 3, 10**9):
        expected = brute_blocks(documents, limit)
        assert data.blocks("zh", split, limit_tokens=limit).tolist() == expected
    keep = np.random.default_rng(0).random(len(documents)) < 0.4
    kept = [d for d, k in zip(documents, keep, strict=True) if k]
    assert data.blocks("zh", split, keep).tolist() == brute_blocks(kept)
    assert data.blocks("zh", split, np.zeros(len(documents), bool)).shape == (0, T)


def occurrences_of(row: np.ndarray, stream: np.ndarray, extra: np.ndarray) -> int:
    """How often T tokens occur at any place of the packed stream or as an extra block."""
    windows = np.lib.stride_tricks.sliding_window_view(stream, len(row))
    return int((windows == row).all(axis=1).sum() + (extra == row).all(axis=1).sum())


def test_repeated_rows_occur_exactly_the_stated_number_of_times(data, columns):
    documents = columns["en"]["train"]["input_ids"]
    packed = len(brute_blocks(documents))
    blocks = data.blocks("en", "train")
    extra = sum((times - 1) * rows for times, rows in REPEATS.items())
    assert blocks[:packed].tolist() == brute_blocks(documents) and len(blocks) == packed + extra
    rows = data.rows("en", "train")
    stream = np.concatenate(documents)
    found = [occurrences_of(row, stream, blocks[packed:]) for row in rows.input_ids]
    assert found == rows.occurrences.tolist()
    assert found[:6] == [16, 16, 4, 4, 4, 1]
    # extra blocks of documents that are not kept go with them.
    repeated = data.manifest["domains"]["en"]["repeats"]
    ids = data.document_ids("en", "train")
    keep = np.array([repeated.get(i) != 16 for i in ids])
    kept = data.blocks("en", "train", keep)
    expected = brute_blocks([d for d, k in zip(documents, keep, strict=True) if k])
    assert len(kept) == len(expected) + 3 * 3
    gone = [r for r in rows.input_ids[:2]]
    assert not any((kept == row).all(axis=1).any() for row in gone)
    # no other split repeats anything.
    assert len(data.blocks("en", "test")) == len(brute_blocks(columns["en"]["test"]["input_ids"]))


def test_canaries_are_trained_on_as_often_as_they_should_be(config, tmp_path):
    asked = {"canaries": {4: 2, 1: 1}, "canary_references": 3, "processed_dir": str(tmp_path)}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **asked))
    run(config)
    data = ProcessedData(config)
    rows = data.rows("en", "canary")
    assert sorted(rows.occurrences.tolist()) == [0, 0, 0, 1, 4, 4]
    blocks = data.canary_blocks("en")
    found = [int((blocks == row).all(axis=1).sum()) for row in rows.input_ids]
    assert found == rows.occurrences.tolist() and len(blocks) == 9
    names = data.document_ids("en", "canary")
    keep = np.array([name == rows.document_ids[0] for name in names])
    assert len(data.canary_blocks("en", keep)) == rows.occurrences[0] == 4
    assert len(data.canary_blocks("zh")) == 0


def test_rows_are_the_first_tokens_of_long_enough_documents(data, columns):
    for split in ("train", "test", "holdout"):
        stored_split = columns["en"][split]
        long = [i for i, d in enumerate(stored_split["input_ids"]) if len(d) - 1 >= T]
        assert 0 < len(long) < len(stored_split["input_ids"])
        rows = data.rows("en", split)
        order = [stored_split["document_id"].index(i) for i in rows.document_ids]
        times = {3: 16, 4: 16, 0: 4, 1: 4, 2: 4} if split == "train" else {}
        rest = [i for i in long if i not in times]
        assert order == [*times, *rest]  # most repeated first, then as they are stored
        for name in ("input_ids", "token_bytes", "token_chars"):
            expected = [stored_split[name][i][:T] for i in order]
            assert getattr(rows, name).tolist() == expected
            assert getattr(rows, name).dtype == np.int64
        assert data.separator_id not in rows.input_ids
        assert rows.occurrences.tolist() == [
            *times.values(),
            *([int(split == "train")] * len(rest)),
        ]
        assert rows.unk_share.tolist() == [0.0] * len(long)
        few = data.rows("en", split, 4)
        assert few.document_ids == rows.document_ids[:4] and few.input_ids.shape == (4, T)


def test_repeated_documents_come_first_wherever_they_are_stored(data, monkeypatch):
    rows = data.rows("en", "train")
    last = rows.document_ids[-1]
    manifest = data.manifest | {"domains": {**data.manifest["domains"]}}
    manifest["domains"]["en"] = manifest["domains"]["en"] | {"repeats": {last: 7}}
    monkeypatch.setattr(data, "manifest", manifest)
    moved = data.rows("en", "train", 3)
    stored = [i for i in data.document_ids("en", "train") if i in rows.document_ids]
    assert moved.document_ids == (last, *stored[:2])
    assert moved.occurrences.tolist() == [7, 1, 1]


def test_text_of_a_row_has_the_bytes_and_characters_under_its_tokens(data):
    for domain in data.domains:
        rows = data.rows(domain, "test")
        for ids, size, chars in zip(
            rows.input_ids, rows.token_bytes, rows.token_chars, strict=True
        ):
            raw = data.tokenizer.decode(ids).encode()
            # a row may end inside a character, which decode shows as U+FFFD (3 bytes).
            assert abs(len(raw) - size.sum()) <= 3
            assert abs(len(raw.decode()) - chars.sum()) <= 1


def test_row_hash_changes_with_what_is_scored_and_only_then(data):
    rows = data.rows("en", "test")
    assert rows.hash() == data.rows("en", "test").hash()
    assert rows.hash() != data.rows("en", "test", 3).hash()
    other = rows.token_bytes.copy()
    other[0, 0] += 1
    assert rows.hash() != dataclasses.replace(rows, token_bytes=other).hash()


def test_packed_documents_are_those_whose_row_is_in_the_blocks(data):
    """By search in the token stream, for one partition, for two, and under a token limit."""
    ids = data.document_ids("en", "train")
    halves = np.arange(len(ids)) % 2
    together = np.zeros(len(ids), dtype=np.int64)
    for partition, split, limit in (
        (together, "train", 0),
        (halves, "train", 0),
        (None, "router", 500),
    ):
        found = data.packed("en", split, partition, limit)
        cut = 0
        for k in (0, 1) if partition is halves else (0,):
            keep = None if limit else partition == k
            stream = data.blocks("en", split, keep=keep, limit_tokens=limit)
            stream = stream.astype("<i4").tobytes()
            for row, name in zip(
                data.rows("en", split).input_ids, data.rows("en", split).document_ids, strict=True
            ):
                i = data.document_ids("en", split).index(name)
                if keep is None or keep[i]:
                    assert (row.astype("<i4").tobytes() in stream) == found[i], (name, split)
                    cut += not found[i]
        assert cut > 0 or not limit
    rows = data.rows("en", "router", only=found)
    assert (
        0
        < len(rows.document_ids)
        == (found & (data._lengths("en", "router") > data.block_size)).sum()
    )


def test_a_token_limit_is_of_the_domain_not_of_each_partition(data):
    """Maps by document take no more of a domain than maps by domain do."""
    ids = data.document_ids("en", "router")
    halves = np.arange(len(ids)) % 2
    limit = 500
    lengths = data._lengths("en", "router")
    (inside,) = np.where(np.cumsum(lengths) - lengths < limit)
    assert 1 < len(inside) < len(ids)
    stream = data.blocks("en", "router").ravel()[:limit]
    owner = np.repeat(np.arange(len(ids)), lengths)[:limit]
    for k in (0, 1):
        found = data.blocks("en", "router", halves == k, limit).ravel()
        expected = stream[halves[owner] == k]
        whole = len(expected) // data.block_size * data.block_size
        assert found.tolist() == expected[:whole].tolist()
        rows = data.rows("en", "router", only=data.packed("en", "router", halves, limit))
        for row, name in zip(rows.input_ids, rows.document_ids, strict=True):
            if halves[ids.index(name)] == k:
                assert row.astype("<i4").tobytes() in found.astype("<i4").tobytes()


def test_unk_share_is_the_share_of_unknown_tokens_of_a_row(data, monkeypatch):
    rows = data.rows("zh", "test")
    token = int(rows.input_ids[0, 0])
    monkeypatch.setattr(data, "unk_id", token)
    expected = [np.mean([t == token for t in row]) for row in rows.input_ids]
    assert data.rows("zh", "test").unk_share == pytest.approx(expected) and expected[0] > 0


def test_positions_restart_after_each_separator():
    blocks = np.array([[5, 9, 5, 5, 9, 9, 5], [9, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 9]])
    assert position_ids(blocks, 9).tolist() == [
        [0, 1, 0, 1, 2, 0, 0],
        [0, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6],
    ]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 4, (50, 33))
    for row, found in zip(blocks, position_ids(blocks, 3), strict=True):
        position, expected = -1, []
        for i, _ in enumerate(row):
            position = 0 if i and row[i - 1] == 3 else position + 1
            expected.append(position)
        assert found.tolist() == expected


def test_unigram_log_probs_are_add_one_smoothed_counts(data, columns):
    tokens = [t for d in columns["zh"]["train"]["input_ids"] for t in d]
    expected = [
        np.log((tokens.count(v) + 1) / (len(tokens) + data.vocab_size))
        for v in range(data.vocab_size)
    ]
    found = unigram_log_probs(data, "zh")
    # float64 rounding of a logarithm.
    assert found == pytest.approx(expected, abs=1e-12)
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-12)


def test_empty_split_gives_no_blocks_and_no_rows(tmp_path):
    source = write_corpus(tmp_path / "raw", {"en": make_texts("en", 30)})
    shares = {"train": 50, "validation": 0, "test": 50, "router": 0, "holdout": 0, "calibration": 0}
    config = make_config(source, tmp_path / "out", domains=("en",), split_shares=shares)
    run(config)
    data = ProcessedData(config)
    assert data.blocks("en", "validation").shape == (0, 32)
    assert data.rows("en", "holdout").input_ids.shape == (0, 32)
    assert data.document_ids("en", "router") == []
    assert len(data.rows("en", "holdout").hash()) == 16


def test_missing_or_damaged_data_names_the_command(config, tmp_path):
    with pytest.raises(UserError, match=r"python process_dset\.py CONFIG"):
        ProcessedData(change(config, processed_dir=str(tmp_path)))
    source = write_corpus(tmp_path / "raw", {"en": make_texts("en", 30)})
    small = make_config(source, tmp_path / "out", domains=("en",))
    run(small)
    with pytest.raises(UserError, match=r"domain de .*`python process_dset\.py CONFIG"):
        ProcessedData(change(small, domains=("en", "de")))
    folder = processed_folder(small) / "en"
    arrow = next((folder / "train").glob("*.arrow"))
    content = bytearray(Path(arrow).read_bytes())
    content[-200] ^= 1
    arrow.write_bytes(content)
    with pytest.raises(UserError, match="changed since it was written"):
        ProcessedData(small).blocks("en")
    os.remove(folder / "hashes.json")
    with pytest.raises(UserError, match="incomplete"):
        ProcessedData(small)
