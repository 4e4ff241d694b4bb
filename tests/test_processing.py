"""Claims of tiered/processing.py on corpora of a few hundred short documents."""

import dataclasses
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk
from datasketch import MinHash
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import process_dset
from tiered import cleaning, processing, tokenization
from tiered.config import SPLITS, Config, DataConfig, TokenizerConfig, check
from tiered.data import processed_folder, processed_key
from tiered.store import UserError, machine, read_json, tree_hashes

ALPHABETS = {
    "en": [chr(c) for c in range(97, 123)],
    "de": [*"aeiourstnäöüß"],
    "hi": [chr(c) for c in (*range(0x0915, 0x0939), *range(0x093E, 0x0945))],
    "zh": [chr(c) for c in range(0x4E00, 0x4F00)],
}


def make_texts(domain: str, count: int, seed: int = 0) -> list[str]:
    """Random words in the domain's script, 220 to 500 characters per text."""
    rng = random.Random(f"{domain}/{seed}")
    letters = ALPHABETS[domain]
    words = ["".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(600)]
    gap = "" if domain == "zh" else " "
    texts = []
    for _ in range(count):
        text, length = "", rng.randint(220, 500)
        while len(text) < length:
            text += rng.choice(words) + gap
        texts.append(text.strip() + ".")
    return texts


def write_lines(path: Path, texts: list, column: str = "text") -> Path:
    """Gzipped or plain JSON lines; a bytes item is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [t if isinstance(t, bytes) else json.dumps({column: t}).encode() for t in texts]
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_corpus(root: Path, corpus: dict[str, list]) -> Path:
    """A folder with a sub-folder per domain."""
    for domain, texts in corpus.items():
        write_lines(root / domain / "part-0.jsonl", texts)
    return root


def make_config(source: Path, out: Path, tokenizer: str = "bytes", **data) -> Config:
    """A config of one process on `source`; data.* as keywords."""
    data = {"domains": ("en", "hi"), "num_proc": 1, "block_size": 32} | data
    return Config(
        name="test",
        data=DataConfig(source=str(source), processed_dir=str(out), **data),
        tokenizer=TokenizerConfig(name=tokenizer, vocab_size=400),
    )


def run(config: Config) -> dict:
    """Process and return the top manifest."""
    process_dset.main(config)
    return json.loads((processed_folder(config) / "manifest.json").read_text())


def change(config: Config, **data) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def error_of(config: Config) -> str:
    """The one-line message with which processing fails."""
    with pytest.raises(UserError) as caught:
        process_dset.main(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stored(config: Config, domain: str) -> dict[str, dict[str, list]]:
    """Split -> stored columns of a domain."""
    folder = processed_folder(config) / domain
    return {s: load_from_disk(folder / s)[:] if (folder / s).is_dir() else {} for s in SPLITS}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    texts = {domain: make_texts(domain, 120) for domain in ALPHABETS}
    return write_corpus(tmp_path_factory.mktemp("raw"), texts)


@pytest.fixture(scope="session")
def bpe(corpus, tmp_path_factory) -> Config:
    """A processed corpus of three domains with a trained tokenizer."""
    config = make_config(corpus, tmp_path_factory.mktemp("bpe"), "bpe", domains=("en", "hi", "zh"))
    run(config)
    return config


@pytest.fixture(scope="session")
def word_piece(tmp_path_factory) -> Path:
    """A lower-casing WordPiece tokenizer without eos that knows half of the Latin letters."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "."]
    letters = "abcdefghijklm"
    pieces += [*letters, *("##" + c for c in letters), "ab", "##cd"]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    folder = tmp_path_factory.mktemp("word_piece")
    tokenizer.save_pretrained(folder)
    return folder


# --- cleaning and filters ---


def test_cleaning_normalises_and_removes_control_characters_but_keeps_joiners():
    data = DataConfig()
    raw = " a\x00b\x07\r\nc\rd\te\u0301\u200c\u200d\x85 "
    assert cleaning.clean_text(raw, data) == "ab\nc\nd\té\u200c\u200d"
    kept = cleaning.clean_text(raw, DataConfig(strip_control=False, normalize="none"))
    assert "\x00" in kept and "e\u0301" in kept
    assert cleaning.clean_text("ﬁ", DataConfig(normalize="NFKC")) == "fi"
    # removal may bring characters together that then compose: cleaning twice changes nothing.
    assert unicodedata.is_normalized("NFC", cleaning.clean_text("e\x01\u0301", data))


def test_every_injected_document_is_dropped_by_its_filter_and_counted(tmp_path):
    texts = make_texts("en", 60)
    hindi = make_texts("hi", 60)
    near = [t[:100] + "X" + t[101:] for t in texts[:5]]
    exact = [t.replace(" ", "  \n", 3) for t in texts[5:12]] + [texts[12]]
    short, wrong = ["word " * 10] * 3, make_texts("hi", 4, seed=1)
    shared = texts[20:30]
    corpus = {"en": [*texts, *near, *exact, *short, *wrong], "hi": hindi}
    config = make_config(write_corpus(tmp_path / "raw", corpus), tmp_path / "out")
    manifest = run(config)["domains"]
    assert manifest["en"]["read"] == 60 + 5 + 8 + 3 + 4
    assert manifest["en"]["dropped"] == {
        "broken": 0,
        "too_short": 3,
        "wrong_script": 4,
        "exact_duplicate": 8,
        "near_duplicate": 5,
        "unknown_tokens": 0,
        "untokenizable": 0,
    }
    assert manifest["en"]["documents"] == 60
    # the same English documents under a second domain (no script filter): kept in both.
    corpus["hi"] = [*hindi, *shared, *near]
    config = make_config(
        write_corpus(tmp_path / "raw2", corpus), tmp_path / "out", min_script_share=0.0
    )
    manifest = run(config)["domains"]
    assert manifest["hi"]["documents"] == 60 + 10 + 5
    ids = [{i for s in stored(config, d).values() for i in s["document_id"]} for d in ("en", "hi")]
    assert {cleaning.document_id(t) for t in shared} <= ids[0] & ids[1]


def test_min_hashes_are_datasketchs_of_the_same_shingles():
    for text in ("Abc  d", "ab", "x", "नमस्ते दुनिया " * 9, "\U0001f600 a \U0001f600 " * 3):
        expected = MinHash(cleaning.PERMUTATIONS, seed=1, scheme="affine32", hashfunc=int)
        expected.update_batch(cleaning.shingles(text).tolist())
        assert cleaning.min_hash(text).tolist() == expected.hashvalues.tolist()
    assert len(cleaning.shingles("Abc  def")) == 3 and len(cleaning.shingles("Abc  d")) == 1
    assert len(set(cleaning.shingles("a" * 99).tolist())) == len(cleaning.shingles("")) == 1
    # texts that share shingles share hashes
    one, two = (set(cleaning.shingles(t).tolist()) for t in ("abcdefgh", "Xbcdefgh"))
    assert len(one & two) == 3 and len(one) == len(two) == 4


def test_near_duplicates_agree_with_brute_force_jaccard(tmp_path):
    rng = random.Random(0)
    documents = []
    for text in make_texts("zh", 12) + make_texts("en", 12):
        for edits in (0, 1, 40):
            letters = list(text)
            for place in rng.sample(range(len(letters)), edits):
                letters[place] = rng.choice(ALPHABETS["de"])
            documents.append("".join(letters))
    pairs = sorted((cleaning.document_id(t), t) for t in documents)
    data = DataConfig()
    for i in range(3):  # chunks of a shard
        cleaning.write_chunk([(t, 0) for t in documents[i::3]], data, tmp_path / str(i))
    chunks = [cleaning.Chunk(tmp_path / str(i), 0, 1) for i in range(3)]
    exact = len(pairs) - len(set(documents))
    assert cleaning.drop_exact_duplicates(chunks) == exact

    def shingles(text: str) -> set[str]:
        text = " ".join(text.lower().split())
        return {text[i : i + 5] for i in range(len(text) - 4)}

    kept: list[str] = []
    for _, text in pairs:
        found = shingles(text)
        if all(len(found & shingles(k)) / len(found | shingles(k)) < 0.8 for k in kept):
            kept.append(text)
    # the edits put every pair's similarity above 0.9 or below 0.6: an estimate cannot err.
    assert (
        cleaning.drop_near_duplicates(chunks, 0.8) == len(pairs) - len(kept) - exact == 24 - exact
    )
    found = {
        t for c in chunks for t, k in zip(c.texts(0, 24).to_pylist(), c.kept, strict=True) if k
    }
    assert found == set(kept)


@pytest.mark.parametrize("crowd", [1, 64, 1000])
def test_near_duplicates_of_families_and_crowds_are_those_of_a_loop_over_pairs(
    crowd, tmp_path, monkeypatch
):
    """In the order of ids a document goes if a kept one shares a band and is near enough: the rule
    as a double loop, on families of up to 90 documents whose similarities lie around 0.8."""
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(400)]
    documents = []
    for size in (90, 70, *([1, 2, 3, 5] * 12)):
        base = rng.choices(words, k=60)
        for _ in range(size):
            edited = list(base)
            for _ in range(rng.randint(0, 6)):
                edited[rng.randrange(60)] = rng.choice(words)
            documents.append(" ".join(edited))
    rng.shuffle(documents)
    for name, value in (("CROWD", crowd), ("COMPARED", 100), ("AT_ONCE", 9)):
        monkeypatch.setattr(cleaning, name, value)
    chunks = []
    for i in range(7):
        cleaning.write_chunk([(t, 0) for t in documents[i::7]], DataConfig(), tmp_path / str(i))
        chunks.append(cleaning.Chunk(tmp_path / str(i), 0, 1))
    cleaning.drop_exact_duplicates(chunks)
    bands, rows = cleaning.lsh_bands(0.8)
    hashes = {cleaning.document_id(t): cleaning.min_hash(t) for t in documents}
    kept: list[np.ndarray] = []
    for _, own in sorted(hashes.items()):
        parts = own[: bands * rows].reshape(bands, rows)
        shared = [(parts == k[: bands * rows].reshape(bands, rows)).all(1).any() for k in kept]
        near = [(own == k).mean() >= 0.8 for k in kept]
        if not np.logical_and(shared, near).any():
            kept.append(own)
    assert cleaning.drop_near_duplicates(chunks, 0.8) == len(hashes) - len(kept) > 100
    found = [chunk.index()["id"][chunk.kept] for chunk in chunks]
    expected = [int(n, 16) for n, h in hashes.items() if any(h is k for k in kept)]
    assert sorted(np.concatenate(found).tolist()) == sorted(expected)


def test_result_does_not_depend_on_the_order_of_files_and_records(corpus, tmp_path, bpe):
    rng = random.Random(1)
    for domain in bpe.data.domains:
        texts = [json.loads(x)["text"] for x in (corpus / domain / "part-0.jsonl").open()]
        texts += texts[:7] + [t[:50] + "q" + t[51:] for t in texts[7:11]]
        rng.shuffle(texts)
        write_lines(tmp_path / "a" / domain / "part-0.jsonl", texts)
        rng.shuffle(texts)
        write_lines(tmp_path / "b" / domain / "z.json.gz", texts[:60])
        write_lines(tmp_path / "b" / domain / "a.jsonl", texts[60:])
    results = []
    for name in ("a", "b"):
        config = make_config(tmp_path / name, tmp_path / "out", "bpe", domains=bpe.data.domains)
        manifest = run(config)
        results.append(
            {
                d: {k: v for k, v in m.items() if k != "source"}
                for d, m in manifest["domains"].items()
            }
        )
    assert results[0] == results[1]
    assert all(m["dropped"]["exact_duplicate"] == 7 for m in results[0].values())


def test_sizes_of_chunks_and_parts_change_no_byte_of_a_domain(corpus, tmp_path, monkeypatch):
    """Text in many chunks, compared in many slices, is the text that fits into one of each."""
    for domain in ("en", "zh"):
        texts = [json.loads(x)["text"] for x in (corpus / domain / "part-0.jsonl").open()]
        texts += [
            texts[3].replace(" ", "  "),
            texts[7],
            *(t[:50] + "q" + t[51:] for t in texts[:9]),
        ]
        write_lines(tmp_path / "raw" / domain / "a.jsonl", texts[:70])
        write_lines(tmp_path / "raw" / domain / "b.jsonl", texts[70:])
    config = make_config(tmp_path / "raw", tmp_path / "whole", domains=("en", "zh"))
    whole, splits = run(config)["domains"], {}
    assert {m["dropped"]["near_duplicate"] for m in whole.values()} == {9}
    assert whole["en"]["dropped"]["exact_duplicate"] == 2  # zh has no spaces to differ in
    for name, value in (("CHUNK_BYTES", 3000), ("COMPARED", 7), ("PART_BYTES", 20_000)):
        with monkeypatch.context() as patch:
            patch.setattr(cleaning, name, value)
            other = change(config, processed_dir=str(tmp_path / name))
            found = run(other)["domains"]
        splits[name] = {d: m["splits"] for d, m in found.items()}
        assert splits[name] == {d: m["splits"] for d, m in whole.items()}
        same = name != "PART_BYTES"  # the order of documents is, Arrow's batches are not
        for domain in ("en", "zh"):
            trees = [tree_hashes(processed_folder(c) / domain) for c in (config, other)]
            assert (trees[0] == trees[1]) == same
            assert (found[domain]["parts"] > 1) != same


def test_a_shard_holds_what_is_left_of_a_file_and_goes_when_it_is_merged(corpus, tmp_path):
    shutil.copytree(corpus / "en", tmp_path / "raw/en")
    config = make_config(tmp_path / "raw", tmp_path / "out", domains=("en",))
    (path,) = (tmp_path / "raw/en").iterdir()
    assert cleaning.read_shard(config, "en", str(path)) == (120, "")
    folder = cleaning.shard_folder(config, "en", str(path))
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert cleaning.read_shard(config, "en", str(path)) == (120, "")  # it is there
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert np.load(folder / "verdicts.npy").tolist() == [cleaning.KEPT] * 120
    index, texts = np.load(folder / "00000.index.npy"), pq.read_table(folder / "00000.parquet")
    for entry, text in zip(index, texts["text"].to_pylist(), strict=True):
        assert f"{entry['id']:016x}" == cleaning.document_id(text)
        assert entry["bytes"] == len(text.encode())
    assert (np.diff(index["position"].astype(float)) > 0).all()
    run(config)
    assert not list((tmp_path / "out").rglob(".shards/en/*"))


def test_a_merge_that_another_process_has_just_made_is_taken(corpus, tmp_path, monkeypatch):
    """It removes the shards while this one is at them: all of them are gone, or some."""
    shutil.copytree(corpus / "en", tmp_path / "raw/en")
    config = make_config(tmp_path / "raw", tmp_path / "out", domains=("en",))
    (path,) = (tmp_path / "raw/en").iterdir()
    run(config)
    clean, done = tree_hashes(cleaning.clean_folder(config, "en")), cleaning.clean_done
    for name in ("hashes.json", "shard.json", "verdicts.npy", "00000.index.npy"):
        cleaning.read_shard(config, "en", str(path))
        asked: list[bool] = []

        def late(config, domain, name=name, asked=asked):
            if not asked:  # it is merged behind this one's back
                (cleaning.shard_folder(config, domain, str(path)) / name).unlink()
            asked.append(done(config, domain))
            return len(asked) > 1 and asked[-1]

        monkeypatch.setattr(cleaning, "clean_done", late)
        monkeypatch.setattr(cleaning, "read_shard", lambda *_: (120, ""))  # it was there
        assert tree_hashes(cleaning.clean_domain(config, "en")) == clean and len(asked) == 2
        monkeypatch.undo()


def test_a_file_that_changes_while_it_is_read_is_no_shard(corpus, tmp_path, monkeypatch):
    """Copied once more in place: cut when its records are read, whole when its hash was made."""
    path = tmp_path / "raw" / "en" / "part-0.jsonl"
    shutil.copytree(corpus / "en", path.parent)
    content, records = path.read_bytes(), cleaning.raw_records
    config = make_config(tmp_path / "raw", tmp_path / "out", domains=("en",))

    def copied_again(name, data):
        path.write_bytes(content[: content.index(b"\n", len(content) // 2) + 1])
        yield from records(name, data)
        path.write_bytes(content)

    monkeypatch.setattr(cleaning, "raw_records", copied_again)
    assert "part-0.jsonl: changed while it was read" in error_of(config)
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob("shard.json"))
    assert run(config)["domains"]["en"]["read"] == 120


def test_as_many_files_are_read_as_the_records_asked_for_need(corpus, tmp_path):
    """With several workers, too: what they read beyond that, and its faults, do not count."""
    texts = [json.loads(x)["text"] for x in (corpus / "en" / "part-0.jsonl").open()]
    for i in range(6):
        write_lines(tmp_path / "raw" / "en" / f"{i}.jsonl", texts[20 * i : 20 * i + 20])
    (tmp_path / "raw" / "en" / "3.jsonl").write_bytes(b"{broken\n" * 200)
    results = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        config = make_config(
            tmp_path / "raw", out, domains=("en",), num_documents=55, num_proc=workers
        )
        results.append(run(config))
        assert results[-1]["domains"]["en"]["read"] == 55
        files = results[-1]["domains"]["en"]["source"]["files"]
        assert [files[f"en/{i}.jsonl"] is not None for i in range(6)] == [True] * 3 + [False] * 3
    assert results[0] == results[1]
    # a file of which nothing that is broken or damaged belongs to the records asked for is no fault
    write_lines(tmp_path / "raw" / "en" / "2.jsonl", [*texts[40:55], b"broken", b"broken"])
    (tmp_path / "raw" / "en" / "3.json.gz").write_bytes(gzip.compress(b"x" * 9000)[:-9])
    for workers in (1, 2):
        other = change(config, num_proc=workers, processed_dir=str(tmp_path / "exact"))
        assert run(change(other, max_broken_records=0))["domains"]["en"]["read"] == 55
        for index in (0, 1):  # nor in calls that share the reading
            process_dset.main(
                change(other, task="read", task_count=2, task_index=index, split_seed=3)
            )
        shutil.rmtree(tmp_path / "exact")
    message = error_of(change(config, num_documents=61, max_broken_records=2))
    assert "3.json.gz: truncated" in message
    (tmp_path / "raw" / "en" / "3.json.gz").unlink()
    write_lines(tmp_path / "raw" / "en" / "2.jsonl", texts[40:60])
    message = error_of(change(config, num_documents=61, max_broken_records=0))
    assert "3.jsonl: record 1 of domain en is broken" in message


BOTH = ("en", "hi")


@pytest.mark.parametrize("records", [0, 70])
def test_tasks_that_share_the_files_change_no_byte(corpus, tmp_path, records, capsys):
    texts = [json.loads(x)["text"] for x in (corpus / "en" / "part-0.jsonl").open()]
    for i in range(6):
        write_lines(tmp_path / "raw" / "en" / f"{i}.jsonl", texts[20 * i : 20 * i + 20])
    shutil.copytree(corpus / "hi", tmp_path / "raw" / "hi")
    config = make_config(tmp_path / "raw", tmp_path / "one", num_documents=records)
    whole = run(config)
    for count in (2, 8):
        shared = change(config, processed_dir=str(tmp_path / str(count)))
        for index in reversed(range(count)):
            process_dset.main(change(shared, task="read", task_count=count, task_index=index))
            assert not processed_folder(shared).exists()
        found = list((tmp_path / str(count)).rglob("shard.json"))
        # of 70 records each of 2 tasks reads 35: two files of en, of hi the one file there is
        assert len(found) == {(0, 2): 7, (0, 8): 7, (70, 2): 5, (70, 8): 7}[records, count]
        process_dset.main(change(shared, task="merge"))
        assert [p.name for p in processed_folder(shared).iterdir()] == ["tokenizer"]
        for index in range(count):
            process_dset.main(change(shared, task="tokenise", task_count=count, task_index=index))
        times = [(processed_folder(shared) / d / "hashes.json").stat().st_mtime_ns for d in BOTH]
        assert run(shared) == whole
        for domain in BOTH:
            trees = [tree_hashes(processed_folder(c) / domain) for c in (config, shared)]
            assert trees[0] == trees[1]
        assert times == [
            (processed_folder(shared) / d / "hashes.json").stat().st_mtime_ns for d in BOTH
        ]
    output = capsys.readouterr().out
    assert "read 2 of 2: 4 files of 2 domains" in output or records
    assert "tokenise 1 of 2: en made" in output and "tokenise 8 of 8: no domain made" in output
    with pytest.raises(UserError, match=r"data.task_count: calls share read or tokenise, not"):
        check(change(config, task_count=2))
    with pytest.raises(UserError, match=r"data.task_index: 2 is not below data.task_count = 2"):
        check(change(config, task_count=2, task_index=2))


# --- splits, budget, repeats ---


@pytest.mark.parametrize("workers", [1, 2])
def test_files_are_read_as_they_arrive(workers, corpus, tmp_path, capsys):
    """In pieces, renamed when whole, a domain later than the other: the result is that of all files
    at once. What paused in the middle is read again."""
    lines = (corpus / "en" / "part-0.jsonl").read_bytes().splitlines(keepends=True)
    packed = gzip.compress(b"".join(lines[60:]))
    pieces = {
        "en/0.jsonl": [b"".join(lines[:30])[:-40], b"".join(lines[:30])[-40:]],
        "en/1.jsonl": [b"".join(lines[30:60])],
        "hi/2.jsonl": [(corpus / "hi" / "part-0.jsonl").read_bytes()],
        "en/3.json.gz": [packed[:500], packed[500:]],
    }
    whole = make_config(tmp_path / "whole", tmp_path / "out")
    for name, content in pieces.items():
        (tmp_path / "whole" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "whole" / name).write_bytes(b"".join(content))

    def shards() -> list[Path]:
        return list((tmp_path / "late").rglob("shard.json"))

    def arrive() -> None:
        """Each piece when the one before has been read."""
        for name, content in pieces.items():
            path = tmp_path / "raw" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            growing = path if len(content) > 1 else path.with_name(f".{path.name}.part")
            for piece in content:
                known, deadline = len(shards()), time.monotonic() + 60
                with growing.open("ab") as file:
                    file.write(piece)
                growing.rename(path)
                while len(shards()) == known and time.monotonic() < deadline:
                    time.sleep(0.01)

    writer = threading.Thread(target=arrive)
    config = make_config(tmp_path / "raw", tmp_path / "late", num_proc=workers)
    writer.start()
    process_dset.main(change(config, task="read", arriving=1.0))
    assert not writer.is_alive()
    writer.join()
    kept = {p.parent.name: read_json(p) for p in shards()}
    ends = Counter(Path(shard["file"]).name for shard in kept.values())
    assert ends == {"0.jsonl": 2, "1.jsonl": 1, "2.jsonl": 1, "3.json.gz": 2}
    assert [s["damage"] != "" for s in kept.values()].count(True) == 1  # half of the packed file
    before = {p: p.stat().st_mtime_ns for p in shards()}
    process_dset.main(change(config, task="read"))
    assert before == {p: p.stat().st_mtime_ns for p in shards()}
    assert run(config)["domains"].keys() == run(whole)["domains"].keys()
    for domain in BOTH:
        assert stored(config, domain) == stored(whole, domain)


def test_nothing_arrives_by_itself_from_elsewhere(corpus, tmp_path):
    config = make_config(tmp_path / "none", tmp_path / "out")
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"data\.source"):
        process_dset.main(change(config, task="read", arriving=0.4))
    assert time.monotonic() - begin > 0.4
    with pytest.raises(UserError, match=r"data\.arriving: is for data\.task=read, not"):
        check(change(config, arriving=1.0))
    assert processed_folder(config) == processed_folder(change(config, arriving=1.0))


def test_splits_are_disjoint_and_follow_the_salted_hash(bpe):
    for domain in bpe.data.domains:
        columns = stored(bpe, domain)
        ids = [i for split in columns.values() for i in split.get("document_id", [])]
        assert len(ids) == len(set(ids)) == 120
        for k, split in enumerate(SPLITS):
            found = columns[split].get("document_id", [])
            seed = bpe.data.split_seed
            place = np.array([cleaning.position(i, seed) for i in found]) / cleaning.POSITIONS
            low = sum(bpe.data.split_shares[s] for s in SPLITS[:k]) / 100
            high = low + bpe.data.split_shares[split] / 100
            assert ((place >= low - 1e-12) & (place < high + 1e-12)).all()
            assert (np.diff(place) > 0).all()
    names = [f"{i:016x}" for i in range(20000)]

    def split_of(seed: int) -> np.ndarray:
        place = [cleaning.position(name, seed) / cleaning.POSITIONS for name in names]
        ranges = [processing.split_range(DataConfig(), split) for split in SPLITS]
        inside = np.array(
            [(low <= np.array(place)) & (np.array(place) < high) for low, high in ranges]
        )
        assert (inside.sum(0) == 1).all()
        return inside.argmax(0)

    shares = np.bincount(split_of(0)) / 200
    # binomial standard error of a 60 % share of 20,000 is 0.35 percentage points.
    for split, share in zip(SPLITS, shares, strict=True):
        assert abs(share - DataConfig().split_shares[split]) < 1.5
    test = SPLITS.index("test")
    assert ((split_of(0) == test) & (split_of(1) == test)).sum() < 300


def test_a_split_of_share_zero_is_empty():
    shares = {"train": 50, "validation": 0, "test": 50, "router": 0, "holdout": 0, "calibration": 0}
    data = DataConfig(split_shares=shares)
    found = {split: processing.split_range(data, split) for split in SPLITS}
    assert found["train"] == (0, 0.5) and found["test"] == (0.5, 1)
    assert all((low == high) == (shares[s] == 0) for s, (low, high) in found.items())


def test_budget_keeps_the_first_documents_and_records_the_rest(corpus, tmp_path):
    config = make_config(corpus, tmp_path)
    full = run(config)["domains"]
    budget = {"en": 5000, "hi": 10**9}
    config = change(config, tokens_per_domain=budget)
    cut = run(config)["domains"]
    lengths = [
        len(x) for x in stored(change(config, tokens_per_domain=0), "en")["train"]["input_ids"]
    ]
    keep = next(i for i in range(len(lengths)) if sum(lengths[: i + 1]) >= 5000) + 1
    train = cut["en"]["splits"]["train"]
    assert (train["documents"], train["tokens"]) == (keep, sum(lengths[:keep]))
    assert cut["en"]["unused_documents"] == len(lengths) - keep
    assert full["en"]["unused_documents"] == cut["en"]["shortfall_tokens"] == 0
    train = full["hi"]["splits"]["train"]
    assert cut["hi"]["splits"]["train"] == train
    assert cut["hi"]["shortfall_tokens"] == 10**9 - train["tokens"]
    assert cut["en"]["splits"]["test"] == full["en"]["splits"]["test"]


def test_arrays_are_numpys_and_a_full_disk_is_called_one(tmp_path):
    for array in (np.arange(24, dtype="<u8").reshape(4, 6), np.zeros(3, cleaning.INDEX)):
        cleaning.save_array(tmp_path / "ours.npy", array)
        np.save(tmp_path / "numpys.npy", array)
        assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpys.npy").read_bytes()
    with pytest.raises(OSError, match="No space left on device"):
        cleaning.save_array(Path("/dev/full"), np.zeros(10**5))


def test_what_comes_after_the_budget_is_not_looked_at(corpus, tmp_path, monkeypatch):
    """However documents are dealt to batches: drops behind the last document kept do not count."""
    letters = {"e": "unknown_tokens", "t": ""}
    monkeypatch.setattr(
        tokenization.Encoder, "verdict", lambda _, ids, *__: letters.get(chr(ids[0]), "")
    )
    found = []
    for size in (2**25, 2**12):
        monkeypatch.setattr(cleaning, "PART_BYTES", size)
        monkeypatch.setattr(processing, "PIECE_BYTES", size)
        config = make_config(corpus, tmp_path / str(size), domains=("en",), tokens_per_domain=9000)
        manifest = run(config)["domains"]["en"]
        found.append({k: v for k, v in manifest.items() if k != "parts"})
    assert found[0] == found[1] and 0 < found[0]["dropped"]["unknown_tokens"] < 20


def test_repeats_are_the_first_long_train_documents_and_change_the_train_hash(corpus, tmp_path):
    config = make_config(corpus, tmp_path, block_size=300)
    plain = run(config)["domains"]
    config = change(config, repeats={16: 2, 4: 3}, repeat_domains=("en",))
    manifest = run(config)["domains"]
    columns = stored(config, "en")["train"]
    long = [
        i for i, t in zip(columns["document_id"], columns["input_ids"], strict=True) if len(t) > 300
    ]
    assert 0 < len(long) < len(columns["document_id"])
    assert manifest["en"]["repeats"] == dict(zip(long, [4, 4, 4, 16, 16], strict=False))
    assert manifest["hi"]["repeats"] == {}
    assert manifest["en"]["splits"]["train"]["hash"] != plain["en"]["splits"]["train"]["hash"]
    assert manifest["hi"]["splits"] == plain["hi"]["splits"]
    assert "200 are asked for" in error_of(change(config, repeats={2: 200}))


def test_canaries_are_rows_of_the_domains_own_tokens_in_a_split_of_their_own(corpus, tmp_path):
    config = make_config(corpus, tmp_path, block_size=64)
    plain = run(config)["domains"]
    asked = {"canaries": {16: 1, 1: 2}, "canary_references": 5, "repeat_domains": ("en",)}
    config = change(config, **asked)
    manifest = run(config)["domains"]
    assert list(manifest["en"]["canaries"].values()) == [1, 1, 16, 0, 0, 0, 0, 0]
    assert manifest["hi"]["canaries"] == {} and manifest["hi"]["splits"] == plain["hi"]["splits"]
    before, after = (m["en"]["splits"] for m in (plain, manifest))
    assert after["canary"]["documents"] == 8 and after["canary"]["bytes"] == 0
    assert after["train"]["hash"] != before["train"]["hash"]  # what is trained on has changed
    assert after["holdout"] == before["holdout"]
    train = stored(config, "en")["train"]["input_ids"]
    counts = Counter(t for document in train for t in document[:-1])
    drawn = load_from_disk(processed_folder(config) / "en/canary")["input_ids"]
    used = {t for document in drawn for t in document[:-1]}
    assert all(len(d) == 65 and d[-1] == train[0][-1] for d in drawn)
    # no rarer than what makes up nine tenths of the domain's tokens
    ranked = [t for t, _ in counts.most_common()]
    covered = np.cumsum([counts[t] for t in ranked]) / sum(counts.values())
    least = counts[ranked[int(np.searchsorted(covered, 0.9)) + 1]]
    assert min(counts[t] for t in used) >= least and len({tuple(d) for d in drawn}) == 8


# --- what deletion rests on: a domain's folder is a function of its own data ---


def test_worker_count_and_other_domains_leave_a_domain_byte_identical(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(processing, "PIECE_BYTES", 2**12)  # several pieces of a split
    two = make_config(corpus, tmp_path / "two", domains=("en", "hi"), num_proc=1)
    run(two)
    four = make_config(corpus, tmp_path / "four", domains=("de", "en", "hi", "zh"), num_proc=2)
    run(four)
    assert processed_key(two) == processed_key(four)
    for domain in ("en", "hi"):
        trees = [tree_hashes(processed_folder(c) / domain) for c in (two, four)]
        assert len(trees[0]) > 10 and trees[0] == trees[1]
    # the comparison can fail: one more document changes the tree.
    shutil.copytree(corpus / "en", tmp_path / "raw" / "en")
    write_lines(tmp_path / "raw" / "en" / "part-1.jsonl", make_texts("en", 1, seed=5))
    other = make_config(tmp_path / "raw", tmp_path / "more", domains=("en",))
    run(other)
    assert tree_hashes(processed_folder(other) / "en") != trees[0]


def test_trained_tokenizer_and_data_are_equal_for_one_and_two_workers(bpe, tmp_path):
    config = change(bpe, processed_dir=str(tmp_path), num_proc=2)
    run(config)
    assert tree_hashes(processed_folder(config)) == tree_hashes(processed_folder(bpe))


def test_excluded_domain_is_not_read_and_changes_no_key(bpe, corpus, tmp_path):
    shutil.copytree(processed_folder(bpe), tmp_path / processed_key(bpe))
    config = change(bpe, processed_dir=str(tmp_path), exclude_domains=("hi",))
    assert processed_key(config) == processed_key(bpe)
    shutil.rmtree(processed_folder(config) / "hi")
    before = {d: tree_hashes(processed_folder(config) / d) for d in ("en", "zh", "tokenizer")}
    manifest = run(config)
    assert sorted(manifest["domains"]) == ["en", "zh"]
    assert before == {d: tree_hashes(processed_folder(config) / d) for d in before}
    # nothing is there yet and the excluded domain has no raw text: bpe cannot be trained.
    shutil.copytree(corpus, tmp_path / "raw")
    shutil.rmtree(tmp_path / "raw" / "hi")
    config = make_config(
        tmp_path / "raw", tmp_path / "new", "bpe", domains=("en", "hi"), exclude_domains=("hi",)
    )
    message = error_of(config)
    assert "router split of hi" in message and "tokenizer.train_domains" in message
    trained = dataclasses.replace(config.tokenizer, train_domains=("en",))
    config = dataclasses.replace(config, tokenizer=trained)
    assert list(run(config)["domains"]) == ["en"]


def test_tokenizer_taken_from_a_folder_keeps_hash_and_provenance(bpe, corpus, tmp_path):
    first = processed_folder(bpe) / "tokenizer"
    shutil.copytree(first, tmp_path / "tok")
    config = make_config(corpus, tmp_path / "out", str(tmp_path / "tok"), domains=("en", "zh"))
    taken = run(config)
    trained = json.loads((processed_folder(bpe) / "manifest.json").read_text())
    assert taken["tokenizer"]["hash"] == trained["tokenizer"]["hash"]
    assert sorted(taken["tokenizer"]["trained_on"]) == ["en", "hi", "zh"]
    assert taken["domains"]["zh"] == trained["domains"]["zh"]
    for domain in ("en", "zh"):
        trees = [tree_hashes(processed_folder(c) / domain) for c in (bpe, config)]
        assert trees[0] == trees[1]


def test_key_holds_what_changes_results_and_nothing_else(corpus, tmp_path, word_piece):
    config = make_config(corpus, tmp_path)
    key = processed_key(config)
    same = {"num_proc": 7, "processed_dir": "x", "separate_documents": True, "domains": ("zh",)}
    for name, value in same.items():
        assert processed_key(change(config, **{name: value})) == key
    other = {"block_size": 64, "min_characters": 1, "split_seed": 1, "repeats": {4: 1}}
    for name, value in other.items():
        assert processed_key(change(config, **{name: value})) != key
    # only bpe depends on the configured domains, by the text it is trained on.
    keys = {
        processed_key(make_config(corpus, tmp_path, "bpe", domains=d)) for d in (("en",), ("hi",))
    }
    assert len(keys) == 2
    shutil.copytree(word_piece, tmp_path / "moved")
    folders = [make_config(corpus, tmp_path, str(f)) for f in (word_piece, tmp_path / "moved")]
    assert processed_key(folders[0]) == processed_key(folders[1]) != key


# --- tokenizers and what lies under a token ---


def test_bpe_is_deterministic_and_blind_to_special_names(bpe):
    texts = make_texts("hi", 30) + make_texts("en", 30)
    trained = tokenization.train_bpe(texts, 500).to_str()
    assert trained == tokenization.train_bpe(texts[::-1], 500).to_str()
    assert json.loads(trained)["model"]["vocab"].keys() >= set(tokenization.byte_alphabet())
    encoder = tokenization.Encoder(processed_folder(bpe) / "tokenizer")
    text = "a<|endoftext|>b <|pad|> c"
    ids, token_bytes, _ = encoder.encode([text])[0]
    assert not np.isin(ids, encoder.special).any() and token_bytes.sum() == len(text)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(processed_folder(bpe) / "tokenizer")
    assert tokenizer(text)["input_ids"] == ids.tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == encoder.record["separator_id"]


def test_indic_words_are_not_broken_at_vowel_signs():
    pieces = tokenization._words().pre_tokenize_str("हिन्दी می‌خواهم ab12345")
    assert [end - start for _, (start, end) in pieces] == [6, 9, 3, 3, 2]


def test_bytes_tokenizer_is_the_identity_on_bytes(corpus, tmp_path):
    config = make_config(corpus, tmp_path, domains=("hi", "zh"))
    manifest = run(config)
    assert (manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["separator_id"]) == (
        258,
        256,
    )
    encoder = tokenization.Encoder(processed_folder(config) / "tokenizer")
    text = "aé語<|endoftext|>\n  \U0001f600"
    ids, token_bytes, token_chars = encoder.encode([text])[0]
    assert bytes(ids.tolist()) == text.encode()
    assert set(token_bytes) == {1} and token_chars.sum() == len(text)


@pytest.mark.parametrize("kind", ["bpe", "bytes", "word_piece"])
def test_bytes_and_characters_under_tokens_sum_to_the_text(corpus, tmp_path, word_piece, bpe, kind):
    config = bpe
    if kind != "bpe":
        name = str(word_piece) if kind == "word_piece" else kind
        config = make_config(corpus, tmp_path, name, domains=("en", "hi", "zh"), max_unk_share=1.0)
        run(config)
    separator = json.loads((processed_folder(config) / "manifest.json").read_text())
    separator = separator["tokenizer"]["separator_id"]
    for domain in ("en", "hi", "zh"):
        texts = dict(zip(*cleaning.read_clean(config, domain), strict=True))
        seen = 0
        for columns in stored(config, domain).values():
            for name, ids, size, chars in zip(*columns.values(), strict=True):
                assert sum(size) == len(texts[name].encode()) and sum(chars) == len(texts[name])
                assert ids[-1] == separator and ids.count(separator) == 1
                assert size[-1] == chars[-1] == 0
                seen += 1
        assert seen == 120


def test_offsets_give_uncovered_characters_to_the_following_token(word_piece, corpus, tmp_path):
    config = make_config(corpus, tmp_path, str(word_piece), domains=("en",), max_unk_share=1.0)
    run(config)
    encoder = tokenization.Encoder(processed_folder(config) / "tokenizer")
    # two spaces and two letters of 3 bytes make [UNK]; the last token takes the spaces at the end.
    ids, size, chars = encoder.encode(["abcd  नह  AB.  "])[0]
    pieces = [encoder.backend.id_to_token(i) for i in ids]
    assert pieces == ["ab", "##cd", "[UNK]", "ab", "."]
    assert chars.tolist() == [2, 2, 4, 4, 3] and size.tolist() == [2, 2, 2 + 6, 4, 3]


def test_documents_of_unknown_tokens_are_dropped_and_counted(corpus, tmp_path, word_piece):
    config = make_config(corpus, tmp_path, str(word_piece), max_unk_share=0.9)
    message = error_of(change(config, max_unk_share=0.0))
    assert "domain en" in message and "unknown_tokens 120" in message
    config = change(config, domains=("en",))
    manifest = run(config)["domains"]["en"]
    share = {}
    unk = encoder_unk(config)
    for i, text in zip(*cleaning.read_clean(config, "en"), strict=True):
        ids = tokenization.Encoder(processed_folder(config) / "tokenizer").encode([text])[0][0]
        share[i] = (ids == unk).mean()
    kept = {i for s in stored(config, "en").values() for i in s.get("document_id", [])}
    assert kept == {i for i, s in share.items() if s <= 0.9} and 0 < len(kept) < 120
    assert manifest["dropped"]["unknown_tokens"] == 120 - len(kept)


def encoder_unk(config: Config) -> int:
    return tokenization.Encoder(processed_folder(config) / "tokenizer").record["unk_id"]


def test_tokenizer_without_a_separator_is_refused(corpus, tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(
        tmp_path / "tok"
    )
    message = error_of(make_config(corpus, tmp_path / "out", str(tmp_path / "tok")))
    assert "neither an eos nor a sep token" in message
    message = error_of(make_config(corpus, tmp_path / "out", "nobody/nothing"))
    assert "tokenizer.name" in message and "nobody/nothing" in message


# --- sources ---


def source_of(tmp_path: Path, kind: str, texts: list[str]) -> tuple[Path, dict]:
    """The same texts as another kind of source, with the settings it needs."""
    root = tmp_path / kind
    if kind == "c4":
        write_lines(root / "multilingual" / "c4-en.tfrecord-0.json.gz", texts[:50])
        write_lines(root / "multilingual" / "c4-en.tfrecord-1.json.gz", texts[50:])
        readme = "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n"
        readme += "    path: multilingual/c4-en.*.json.gz\n---\n"
        (root / "README.md").write_text(readme)
    elif kind == "parquet":
        (root / "en").mkdir(parents=True)
        pq.write_table(pa.table({"body": [*texts, None]}), root / "en" / "a.parquet")
        return root, {"text_column": "body"}
    elif kind == "line":
        (root / "en").mkdir(parents=True)
        (root / "en" / "a.txt").write_text("\n".join(texts), encoding="utf-8")
        return root, {"text_unit": "line"}
    elif kind == "paragraph":
        (root / "en").mkdir(parents=True)
        (root / "en" / "a.txt.gz").write_bytes(gzip.compress("\n\n\n".join(texts).encode()))
        return root, {"text_unit": "paragraph"}
    else:
        for i, text in enumerate(texts):
            (root / "en").mkdir(parents=True, exist_ok=True)
            (root / "en" / f"{i}.txt").write_text(text, encoding="utf-8")
    return root, {}


@pytest.mark.parametrize("kind", ["c4", "parquet", "line", "paragraph", "file"])
def test_every_kind_of_source_gives_the_same_data(corpus, tmp_path, kind):
    texts = [json.loads(x)["text"] for x in (corpus / "en" / "part-0.jsonl").open()]
    expected = run(make_config(corpus, tmp_path / "out", domains=("en",)))["domains"]["en"]
    source, settings = source_of(tmp_path, kind, texts)
    manifest = run(make_config(source, tmp_path / "out", domains=("en",), **settings))
    assert manifest["domains"]["en"]["splits"] == expected["splits"]
    assert manifest["domains"]["en"]["dropped"]["broken"] == (kind == "parquet")


def test_files_of_another_file_system_are_read_by_the_same_code():
    import fsspec

    texts = make_texts("zh", 3)
    lines = "\n".join(json.dumps({"text": t}) for t in texts)
    with fsspec.open("memory://corpus/a.json.gz", "wb", compression="gzip") as file:
        file.write(lines.encode())
    records = cleaning.raw_records("memory://corpus/a.json.gz", DataConfig())
    assert [text for text, _ in records] == texts
    url = "hf://datasets/allenai/c4@" + "1" * 40 + "/multilingual/c4-hi.json.gz"
    record = cleaning.source_record(DataConfig(), [url], {url})
    assert record == {"files": {url: None}, "revision": "1" * 40}


def test_record_range_is_read_and_nothing_beyond_it(corpus, tmp_path):
    texts = [json.loads(x)["text"] for x in (corpus / "en" / "part-0.jsonl").open()]
    write_lines(tmp_path / "raw" / "en" / "a.jsonl", [*texts[:30], b"broken"])
    write_lines(tmp_path / "raw" / "en" / "b.jsonl", texts[30:])
    (tmp_path / "raw" / "en" / "c.json.gz").write_bytes(b"no gzip")
    config = make_config(
        tmp_path / "raw", tmp_path / "out", domains=("en",), first_document=10, num_documents=40
    )
    manifest = run(config)["domains"]["en"]
    assert (manifest["read"], manifest["dropped"]["broken"], manifest["documents"]) == (40, 1, 39)
    ids, _ = cleaning.read_clean(config, "en")
    assert set(ids) == {cleaning.document_id(t) for t in texts[10:49]}
    assert manifest["source"]["files"]["en/c.json.gz"] is None


# --- bad input: one line, nothing half written ---


def broken_source(root: Path, case: str) -> None:
    texts = make_texts("en", 20)
    path = root / "en" / "part-0.jsonl"
    if case == "truncated gzip":
        packed = write_lines(path.with_name("part-0.json.gz"), texts)
        packed.write_bytes(packed.read_bytes()[:-200])
    elif case == "too many broken":
        write_lines(path, [*texts, *[b"{broken"] * 4])
    elif case == "missing column":
        write_lines(path, texts, column="body")
    elif case == "too short":
        write_lines(path, ["short"] * 9)
    elif case == "parquet column":
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"body": texts}), path.with_name("a.parquet"))
    elif case == "damaged parquet":
        path.parent.mkdir(parents=True)
        path.with_name("a.parquet").write_bytes(b"PAR1 nothing")
    elif case == "no files":
        path.parent.mkdir(parents=True)
        path.with_name("a.csv").write_text("text\n")
    elif case == "c4 layout":
        root.mkdir(parents=True)
        readme = "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n"
        (root / "README.md").write_text(readme + "    path: multilingual/c4-en.*.json.gz\n---\n")
    elif case == "c4 domain":
        broken_source(root, "c4 layout")
        (root / "README.md").write_text((root / "README.md").read_text().replace("en", "de"))
        write_lines(root / "multilingual" / "c4-de.0.json.gz", texts)
    else:
        root.mkdir(parents=True)


BAD = {
    "truncated gzip": ("part-0.json.gz", "truncated"),
    "too many broken": ("part-0.jsonl: record 24", "data.max_broken_records = 3"),
    "missing column": ("record 4", "data.text_column", "body"),
    "too short": ("domain en", "9 read", "too_short 9", "wrong_script 0"),
    "parquet column": ("data.text_column", "a.parquet", "body"),
    "damaged parquet": ("a.parquet", "damaged"),
    "no files": ("domain en", "no .jsonl"),
    "c4 layout": ("no files for domain en",),
    "c4 domain": ("no configuration 'en'", "Available: ['de']"),
    "missing domain": ("domain en has no folder",),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(tmp_path, case):
    broken_source(tmp_path / "raw", case)
    config = make_config(tmp_path / "raw", tmp_path / "out", domains=("en",), max_broken_records=3)
    message = error_of(config)
    for part in BAD[case]:
        assert part in message, message
    found = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    # only what was read of its files
    assert all(".shards" in p.parts and (p.parent / "hashes.json").exists() for p in found)


def test_source_that_is_nowhere_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = error_of(make_config(Path("nobody/nothing"), tmp_path, domains=("en",)))
    assert "nobody/nothing" in message and "domain en" in message
    assert "is not a folder" in error_of(make_config(tmp_path / "gone", tmp_path))
    message = error_of(make_config(tmp_path, tmp_path, config_name="{language}"))
    assert "data.config_name" in message


def test_few_broken_records_are_skipped_and_counted(tmp_path):
    texts = make_texts("en", 40)
    bad = [b"{broken", b'{"text": 3}', b'{"other": "x"}', b"[1]", b'{"text": "\xff"}']
    bad += [rb'{"text": "\ud800 half a pair"}']
    write_lines(tmp_path / "raw" / "en" / "a.json.gz", [*texts[:20], b"", *bad, *texts[20:]])
    config = make_config(tmp_path / "raw", tmp_path / "out", domains=("en",))
    manifest = run(config)["domains"]["en"]
    assert (manifest["read"], manifest["dropped"]["broken"], manifest["documents"]) == (46, 6, 40)


def test_script_ends_with_one_line_and_code_2(tmp_path):
    (tmp_path / "c.yaml").write_text(f"name: x\ndata: {{source: {tmp_path}/none}}\n")
    done = subprocess.run(
        [sys.executable, "process_dset.py", str(tmp_path / "c.yaml")],
        capture_output=True,
        text=True,
        cwd=Path(process_dset.__file__).parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("process_dset.py: error: ")


# --- stages that are killed, repeated or outdated ---


def test_killed_run_is_repeated_without_redoing_what_is_finished(corpus, tmp_path):
    config = make_config(corpus, tmp_path)
    run(config)
    folder = processed_folder(config)
    complete = tree_hashes(folder)
    # killed while `hi` was written: a temporary folder of a dead process, no final one.
    os.replace(folder / "hi", folder / f".hi.tmp999999999@{machine()}")
    (folder / f".hi.tmp999999999@{machine()}" / "hashes.json").unlink()
    (folder / "manifest.json").unlink()
    written = (folder / "en" / "manifest.json").stat().st_mtime_ns
    run(config)
    assert tree_hashes(folder) == complete and not list(folder.glob(".hi*"))
    assert (folder / "en" / "manifest.json").stat().st_mtime_ns == written
    run(dataclasses.replace(config, overwrite=True))
    assert tree_hashes(folder) == complete
    assert (folder / "en" / "manifest.json").stat().st_mtime_ns != written


def test_workers_end_with_a_killed_script_and_the_next_run_is_complete(tmp_path):
    # enough text that the kill meets workers inside their first domain
    texts = {domain: make_texts(domain, 1500) for domain in ("en", "hi")}
    source = write_corpus(tmp_path / "raw", texts)
    config = make_config(source, tmp_path / "out", num_proc=2)
    (tmp_path / "c.yaml").write_text(
        f"name: x\ndata: {{source: {source}, processed_dir: {tmp_path}/out, domains: [en, hi],"
        " block_size: 32}\ntokenizer: {name: bytes}\nrouter: {context_tokens: 8}\n"
    )
    process = subprocess.Popen(
        [sys.executable, process_dset.__file__, str(tmp_path / "c.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=Path(process_dset.__file__).parent,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.clean/*/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    # the pipe is closed when its last holder, a worker, has ended.
    process.communicate(timeout=20)
    assert not (processed_folder(config) / "manifest.json").exists()
    assert sorted(run(config)["domains"]) == ["en", "hi"]
    assert not list(tmp_path.glob("out/**/.*tmp*"))


def test_failure_in_one_domain_keeps_the_others(corpus, tmp_path, monkeypatch):
    config = make_config(corpus, tmp_path)
    original = processing.DomainWriter.add
    calls = []

    def fail_later(*args):
        calls.append(args)
        if len(calls) > len(SPLITS) + 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(processing.DomainWriter, "add", fail_later)
    with pytest.raises(KeyboardInterrupt):
        process_dset.main(config)
    folder = processed_folder(config)
    assert sorted(p.name for p in folder.iterdir()) == ["en", "tokenizer"]
    monkeypatch.undo()
    assert sorted(run(config)["domains"]) == ["en", "hi"]


def test_changed_raw_text_is_noticed_and_absent_raw_text_is_not_needed(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "raw")
    config = make_config(tmp_path / "raw", tmp_path / "out", "bpe")
    first = run(config)
    write_lines(tmp_path / "raw" / "hi" / "part-1.jsonl", make_texts("hi", 30, seed=9))
    second = run(config)
    assert second["domains"]["hi"]["documents"] == 150
    assert second["tokenizer"]["hash"] != first["tokenizer"]["hash"]
    fresh = run(change(config, processed_dir=str(tmp_path / "fresh")))
    assert fresh == second
    shutil.rmtree(tmp_path / "raw")
    shutil.rmtree(tmp_path / "out" / ".clean")
    assert run(config) == second


def test_summary_counts_are_those_of_the_manifest(bpe, capsys):
    manifest = run(bpe)
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("zh") and "/" in line)
    splits = manifest["domains"]["zh"]["splits"]
    assert row[1:7] == [f"{splits[s]['documents']}/{splits[s]['tokens']}" for s in SPLITS]
    total = {k: sum(s[k] for s in splits.values()) for k in ("bytes", "tokens", "documents")}
    assert row[7] == f"{total['bytes'] / (total['tokens'] - total['documents']):.2f}"
    assert "0 domains made, 3 present" in lines[-1]
