"""Cleaned text -> tokenised, split documents per domain: the stages of process_dset.py.

Everything here is domain-local: what is stored of a domain is a function of its own raw text, the
config and the tokenizer, never of which other domains exist, of file order, or of the number of
worker processes. Deleting a domain therefore leaves every other domain's folder as it is.

    <processed_dir>/<key>/tokenizer/         the shared tokenizer
    <processed_dir>/<key>/<domain>/<split>/  Arrow, documents in the order of a salted hash
    <processed_dir>/<key>/manifest.json      all domains that are there
"""

import contextlib
import functools
import hashlib
import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from tiered.cleaning import (
    FILTERS,
    check_not_empty,
    clean_batches,
    clean_domain,
    clean_done,
    clean_folder,
    count_clean,
    domain_files,
    last_record,
    pinned_files,
    read_shard,
)
from tiered.config import CANARY, SPLITS, Config, DataConfig
from tiered.data import (
    key_parts,
    processed_folder,
    processed_key,
    tokenizer_domains,
    tokenizer_part,
)
from tiered.locks import locked
from tiered.sources import BATCH_DOCUMENTS, source_changed, source_files
from tiered.store import (
    HASHES,
    TOKENIZER_RECORD,
    UserError,
    atomic_folder,
    content_hash,
    digest,
    is_complete,
    read_json,
    seed_of,
    verify,
    write_json,
    write_text,
)
from tiered.tokenization import (
    TOKEN_FILTERS,
    Encoder,
    bytes_tokenizer,
    fast_tokenizer,
    load_tokenizer,
    tokenizer_record,
    train_bpe,
)
from tiered.workers import Call, in_order, run_all, run_queue

PIECE_BYTES = 2**18  # of text that a process tokenises at a time, about
ARROW_FILE = "data-00000-of-00001.arrow"  # as save_to_disk names it
FEATURES = datasets.Features(
    {
        "document_id": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "token_bytes": datasets.List(datasets.Value("uint16")),
        "token_chars": datasets.List(datasets.Value("uint16")),
    }
)


# --- splits ----------------------------------------------------------------------------------


def split_edges(data: DataConfig) -> np.ndarray:
    """Where splits begin and end among positions in [0, 1), (splits + 1,)."""
    edges = np.cumsum([0.0, *(data.split_shares[split] for split in SPLITS)]) / 100
    edges[-1] = 1.0
    return edges


def split_range(data: DataConfig, split: str) -> tuple[float, float]:
    """The positions of a split's documents, [low, high)."""
    k = SPLITS.index(split)
    return tuple(split_edges(data)[k : k + 2].tolist())


# --- the tokenizer ------------------------------------------------------------------------------


def make_tokenizer(config: Config, pool: Executor | None = None) -> dict[str, Any]:
    """The record of the config's tokenizer, which is made and saved unless it is there.

    bpe is trained on the router split of its training domains; it is made again if their cleaned
    text changed. Raises UserError if a training domain has no raw text.
    """
    folder = processed_folder(config) / "tokenizer"
    bpe = config.tokenizer.name == "bpe"
    if is_complete(folder) and not config.overwrite:
        verify(folder)
        record = read_json(folder / TOKENIZER_RECORD)
        if not bpe or not _training_text_changed(config, record["trained_on"]):
            return record
    tokenizer, trained_on = _new_tokenizer(config, pool)
    # of a folder the content counts (it is in the hash), not where it happened to stand.
    name = "folder" if "folder" in tokenizer_part(config) else config.tokenizer.name
    record = tokenizer_record(tokenizer, name) | {"trained_on": trained_on}
    with atomic_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        write_json(temporary / TOKENIZER_RECORD, record)
    return record


def _new_tokenizer(config: Config, pool: Executor | None) -> tuple[Any, dict[str, str]]:
    """The config's tokenizer, and the domains it was trained on with their text's hash."""
    name, trained_on = config.tokenizer.name, {}
    if name == "bytes":
        return fast_tokenizer(bytes_tokenizer()), trained_on
    if name != "bpe":
        # a tokenizer of this project's making still saw the text it once was trained on.
        origin = Path(name) / TOKENIZER_RECORD
        trained_on = read_json(origin)["trained_on"] if origin.is_file() else {}
        return load_tokenizer(name, config.tokenizer.revision), trained_on
    domains = _training_domains(config)
    clean_domains(config, pool, domains)
    trained_on = {d: content_hash(clean_folder(config, d)) for d in domains}
    texts = itertools.chain.from_iterable(_router_texts(config, d) for d in sorted(domains))
    return fast_tokenizer(train_bpe(texts, config.tokenizer.vocab_size)), trained_on


def _router_texts(config: Config, domain: str) -> Iterator[str]:
    """Texts of a domain's router split that bpe is trained on, in the order of positions."""
    batches = clean_batches(config, domain, *split_range(config.data, "router"))
    texts = itertools.chain.from_iterable(batch["text"].to_pylist() for batch in batches)
    return itertools.islice(texts, config.tokenizer.train_documents or None)


def _training_domains(config: Config) -> list[str]:
    """Training domains of bpe; UserError for an absent one that explains the ways out."""
    for domain in tokenizer_domains(config):
        if domain in config.processed_domains or is_complete(clean_folder(config, domain)):
            continue
        try:
            source_files(config.data, domain)
        except UserError as error:
            raise UserError(
                f"tokenizer.name: bpe is trained on the router split of {domain}, which is excluded"
                f" but not there to read ({error}); name a tokenizer folder in tokenizer.name, or"
                " set tokenizer.train_domains"
            ) from None
    return list(tokenizer_domains(config))


def _training_text_changed(config: Config, trained_on: dict[str, str]) -> bool:
    """Whether the cleaned text that is there differs from what the tokenizer was trained on."""
    folders = {domain: clean_folder(config, domain) for domain in trained_on}
    return any(
        is_complete(folder) and content_hash(folder) != trained_on[domain]
        for domain, folder in folders.items()
    )


# --- tokens of a domain -------------------------------------------------------------------------


def encode_batch(
    folder: Path, names: list[str], texts: list[str], max_unk_share: float
) -> tuple[pa.Table, list[str]]:
    """Stored columns (FEATURES) of documents, each with its separator, and of all documents the
    filter that drops them, or "".

    folder: the tokenizer's.
    """
    encoder, verdicts = _encoder(folder), []
    kept, columns = [], ([], [], [])
    for name, parts in zip(names, encoder.encode(texts), strict=True):
        verdicts.append(encoder.verdict(parts[0], parts[1], max_unk_share))
        if verdicts[-1]:
            continue
        kept.append(name)
        tails = (encoder.record["separator_id"], 0, 0)
        for column, part, tail in zip(columns, parts, tails, strict=True):
            column.append(np.append(part, tail))
    return _batch_table(kept, columns), verdicts


@functools.lru_cache(2)
def _encoder_of(folder: Path, made: int) -> Encoder:
    return Encoder(folder)


def _encoder(folder: Path) -> Encoder:
    """A tokenizer folder's encoder, read once in a process while it is the same."""
    return _encoder_of(folder, (folder / HASHES).stat().st_mtime_ns)


def _batch_table(names: list[str], columns: tuple[list[np.ndarray], ...]) -> pa.Table:
    offsets = np.cumsum([0] + [len(ids) for ids in columns[0]], dtype=np.int32)
    kinds = (pa.int32(), pa.uint16(), pa.uint16())
    arrays = [pa.array(names, pa.string())]
    for column, kind in zip(columns, kinds, strict=True):
        flat = np.concatenate([np.zeros(0, np.int64), *column]).astype(kind.to_pandas_dtype())
        arrays.append(pa.ListArray.from_arrays(offsets, pa.array(flat, kind)))
    return pa.Table.from_arrays(arrays, schema=FEATURES.arrow_schema)


def table_lengths(table: pa.Table) -> np.ndarray:
    """Tokens per document with the separator, (documents,) int64."""
    lengths = [np.diff(c.offsets.to_numpy()) for c in table["input_ids"].chunks]
    return np.concatenate([np.zeros(0, np.int64), *lengths])


class SplitWriter:
    """Writes a split as datasets.save_to_disk does, table after table, and sums up what it holds.

    The hash is of values, not of Arrow's bytes. A split without documents is not written:
    load_from_disk cannot read one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.stream = folder, None
        self.waiting: list[pa.Table] = []  # small ones are written together
        self.counts: Counter = Counter()
        self.hashes = {name: hashlib.sha256() for name in (*FEATURES, "lengths")}

    def add(self, table: pa.Table) -> None:
        """Append documents (columns FEATURES)."""
        if not table.num_rows:
            return
        self.waiting.append(table)
        if sum(waiting.num_rows for waiting in self.waiting) >= BATCH_DOCUMENTS:
            self._write()
        lengths = table_lengths(table)
        self.counts["documents"] += table.num_rows
        self.counts["tokens"] += int(lengths.sum())
        self.hashes["document_id"].update("".join(f"{i}\n" for i in table["document_id"]).encode())
        self.hashes["lengths"].update(lengths.astype("<i8").tobytes())
        for name in ("input_ids", "token_bytes", "token_chars"):
            for chunk in table[name].chunks:
                flat = chunk.flatten().to_numpy()
                self.hashes[name].update(np.ascontiguousarray(flat, dtype="<i4").tobytes())
                self.counts[name] += int(flat.sum(dtype=np.int64))

    def _write(self) -> None:
        if self.stream is None:
            self.folder.mkdir(parents=True)
            self.file = pa.OSFile(str(self.folder / ARROW_FILE), "wb")
            self.stream = pa.ipc.new_stream(self.file, FEATURES.arrow_schema)
        self.stream.write_table(pa.concat_tables(self.waiting).combine_chunks())
        self.waiting = []

    def close(self, repeats: dict[str, int]) -> dict[str, Any]:
        """Finish the files; counts and content hash of the split with its repeats."""
        content = digest([{n: h.hexdigest() for n, h in self.hashes.items()}, repeats], 64)
        if self.waiting:
            self._write()
        if self.stream is not None:
            self.stream.close()
            self.file.close()
            datasets.DatasetInfo(features=FEATURES).write_to_directory(str(self.folder))
            # equal data is equal bytes: the fingerprint is the content
            state = {"_data_files": [{"filename": ARROW_FILE}], "_fingerprint": content[:16]}
            state |= {
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_split": None,
            }
            state["_output_all_columns"] = False
            write_text(self.folder / "state.json", json.dumps(state, indent=1) + "\n")
        return {
            **{name: self.counts[name] for name in ("documents", "tokens")},
            "bytes": self.counts["token_bytes"],
            "characters": self.counts["token_chars"],
            "hash": content,
        }


def budget_of(data: DataConfig, domain: str) -> int:
    """Training tokens of a domain, 0 for all."""
    budget = data.tokens_per_domain
    return budget.get(domain, 0) if isinstance(budget, dict) else budget


def wanted_repeats(domain: str, data: DataConfig) -> list[int]:
    """Occurrences of each repeated member row of a domain, fewest first."""
    if data.repeat_domains and domain not in data.repeat_domains:
        return []
    return [times for times, rows in sorted(data.repeats.items()) for _ in range(rows)]


def choose_repeats(eligible: list[str], domain: str, data: DataConfig) -> dict[str, int]:
    """Document id -> occurrences of its first T tokens in train, for the repeated member rows.

    eligible: the first train documents with at least T tokens. Raises UserError if there are too
    few.
    """
    wanted = wanted_repeats(domain, data)
    if len(wanted) > len(eligible):
        raise UserError(
            f"data.repeats: domain {domain} has {len(eligible)} train documents of at least"
            f" {data.block_size} tokens, {len(wanted)} are asked for"
        )
    return dict(zip(eligible, wanted, strict=False))


def choose_canaries(domain: str, data: DataConfig) -> dict[str, int]:
    """Canary id -> times it occurs in train, fewest first; references, with 0, last."""
    if not data.canaries or (data.repeat_domains and domain not in data.repeat_domains):
        return {}
    times = [t for t, rows in sorted(data.canaries.items()) for _ in range(rows)]
    times += [0] * data.canary_references
    return {f"{CANARY}-{i:05d}": t for i, t in enumerate(times)}


def canary_table(
    counts: np.ndarray, names: list[str], domain: str, data: DataConfig, tokenizer: dict[str, Any]
) -> pa.Table:
    """Documents of T tokens that nobody wrote; no text stands under them: 0 bytes, 0 characters.

    counts (V,): the domain's train tokens, each as often as it occurs. Drawn uniformly from the
    fewest that make up 90 % of them, so that the Level-1 router takes canaries for the domain's.
    (Canaries: arXiv:1802.08232.)
    """
    if not names:
        return FEATURES.arrow_schema.empty_table()
    special = [tokenizer[name] for name in ("separator_id", "pad_id", "unk_id")]
    counts = counts.copy()
    counts[[i for i in special if i is not None]] = 0
    order = np.argsort(-counts, kind="stable")
    covered = np.cumsum(counts[order])
    frequent = order[: int(np.searchsorted(covered, 0.9 * covered[-1])) + 1]
    generator = np.random.default_rng(seed_of(data.split_seed, CANARY, domain))
    drawn = generator.choice(frequent, size=(len(names), data.block_size))
    zeros = np.zeros(data.block_size + 1, np.int64)
    ids = [np.append(row, tokenizer["separator_id"]) for row in drawn]
    return _batch_table(names, (ids, [zeros] * len(ids), [zeros] * len(ids)))


def domain_done(config: Config, domain: str, tokenizer_hash: str) -> bool:
    """Whether a domain's processed data is there, made by this tokenizer of this raw text."""
    folder = processed_folder(config) / domain
    if config.overwrite or not is_complete(folder):
        return False
    manifest = read_json(folder / "manifest.json")
    return manifest["tokenizer_hash"] == tokenizer_hash and not source_changed(
        config.data, domain, manifest["source"]
    )


def tokenize_domain(config: Config, domain: str, pool: Executor | None = None) -> None:
    """Write a domain's processed data: tokenised splits and its manifest."""
    folder = processed_folder(config)
    clean = read_json(clean_domain(config, domain) / "clean.json")
    tokenizer = read_json(folder / "tokenizer" / TOKENIZER_RECORD)
    with atomic_folder(folder / domain) as temporary:
        tokens = DomainWriter(config, domain, tokenizer, temporary)
        with closing(encoded(config, domain, tokens.full, pool)) as tables:
            for split, table, verdicts in tables:
                tokens.add(split, table, verdicts)
        manifest = clean | tokens.finish(clean)
        manifest["tokenizer_hash"] = tokenizer["hash"]
        write_json(temporary / "manifest.json", manifest)


def encoded(
    config: Config, domain: str, full: Collection[str], pool: Executor | None
) -> Iterator[tuple[str, pa.Table, list[str]]]:
    """Split after split, without a pause between them: its name, stored columns of documents in
    their order, and what drops the others. A split that is `full` meanwhile is left."""
    folder, unk = processed_folder(config) / "tokenizer", config.data.max_unk_share
    drawn: deque[str] = deque()

    def calls() -> Iterator[tuple[Path, list[str], list[str], float]]:
        for split in SPLITS:
            batches = clean_batches(config, domain, *split_range(config.data, split))
            for piece in itertools.chain.from_iterable(map(pieces, batches)):
                if split in full:
                    break
                drawn.append(split)
                yield folder, *(piece[name].to_pylist() for name in ("document_id", "text")), unk

    for table, verdicts in in_order(pool, encode_batch, calls(), config.data.num_proc):
        yield drawn.popleft(), table, verdicts


def pieces(documents: pa.Table) -> Iterator[pa.Table]:
    """Documents in pieces of about PIECE_BYTES: every worker has one until the last is done."""
    rows = max(1, PIECE_BYTES * documents.num_rows // max(1, documents["text"].nbytes))
    for begin in range(0, documents.num_rows, rows):
        yield documents.slice(begin, rows)


class DomainWriter:
    """Writes the splits of a domain in one pass, with what depends on train: its budget, the
    repeated rows, and the tokens that canaries are drawn from."""

    def __init__(
        self, config: Config, domain: str, tokenizer: dict[str, Any], folder: Path
    ) -> None:
        self.config, self.domain, self.tokenizer = config, domain, tokenizer
        self.splits = {split: SplitWriter(folder / split) for split in (*SPLITS, CANARY)}
        self.dropped: dict[str, Counter] = {split: Counter() for split in SPLITS}
        self.budget = budget_of(config.data, domain)
        self.full: set[str] = set()  # splits that take no more
        self.eligible: dict[str, None] = {}  # in order: train documents of at least T tokens
        self.train_tokens = np.zeros(tokenizer["vocab_size"], dtype=np.int64)

    def add(self, split: str, table: pa.Table, verdicts: list[str]) -> None:
        """Add documents of a split, those without a verdict, unless it is full."""
        if split in self.full:
            return
        used = self.splits[split].counts["tokens"]
        if split == "train" and self.budget:
            # the first documents until the budget is reached
            ends = used + np.cumsum(table_lengths(table))
            count = int(np.searchsorted(ends, self.budget)) + 1
            table = table.slice(0, count)
            if count <= len(ends):  # what comes after the last of them is not looked at
                self.full.add(split)
                last = [i for i, why in enumerate(verdicts) if not why][count - 1]
                verdicts = verdicts[: last + 1]
        self.dropped[split] += Counter(why for why in verdicts if why)
        self.splits[split].add(table)
        if split == "train":
            self._look_at(table)

    def _look_at(self, table: pa.Table) -> None:
        data = self.config.data
        if len(self.eligible) < len(wanted_repeats(self.domain, data)):
            long = table_lengths(table) > data.block_size  # T tokens and the separator
            self.eligible |= dict.fromkeys(table["document_id"].filter(pa.array(long)).to_pylist())
        for chunk in table["input_ids"].chunks:
            flat = chunk.flatten().to_numpy()
            self.train_tokens += np.bincount(flat, minlength=len(self.train_tokens))

    def finish(self, clean: dict[str, Any]) -> dict[str, Any]:
        """Write what is left; the domain's manifest, as far as it is not that of the clean text."""
        data, domain, written = self.config.data, self.domain, self.splits
        total = sum(self.dropped.values(), Counter())
        dropped = clean["dropped"] | {name: total[name] for name in TOKEN_FILTERS}
        documents = sum(writer.counts["documents"] for writer in written.values())
        check_not_empty(domain, documents, clean["read"], dropped)
        train = written["train"].counts
        left = count_clean(self.config, domain, *split_range(data, "train")) - train["documents"]
        repeats = choose_repeats(list(self.eligible), domain, data)
        canaries = choose_canaries(domain, data)
        table = canary_table(self.train_tokens, list(canaries), domain, data, self.tokenizer)
        written[CANARY].add(table)
        extra = {"train": repeats, CANARY: canaries}
        splits = {split: writer.close(extra.get(split, {})) for split, writer in written.items()}
        if canaries:  # what is trained on has changed
            splits["train"]["hash"] = digest([splits[s]["hash"] for s in ("train", CANARY)], 64)
        return {
            "dropped": dropped,
            "splits": splits,
            "repeats": repeats,
            "canaries": canaries,
            "budget_tokens": self.budget,
            "unused_documents": left - self.dropped["train"].total(),
            "shortfall_tokens": max(0, self.budget - train["tokens"]),
        }


# --- stages -----------------------------------------------------------


class Reading:
    """The source files of a domain, read in order until it has `stop` records (0: all of them).

    Several are read at a time: what lies beyond, and its errors, does not count.
    """

    def __init__(self, files: list[str], stop: int, whole: bool = True) -> None:
        """whole: these are all files of the domain, so that a damaged one is known to be needed."""
        self.files, self.stop, self.whole, self.begun = files, stop, whole, 0
        self.ended: dict[int, Future] = {}

    def more(self) -> bool:
        """Whether another file should be read now. Raises the error of one that is needed."""
        records = 0
        for i in range(self.begun):
            if i not in self.ended or (self.stop and records >= self.stop):
                break
            read, damage = self.ended[i].result()
            records += read
            if damage and self.whole and not (self.stop and records >= self.stop):
                raise UserError(damage)
        return self.begun < len(self.files) and not (self.stop and records >= self.stop)


def read_shards(
    config: Config, pool: Executor | None, domains: list[str], overwrite: bool = False
) -> None:
    """Read the source files of domains whose cleaned text is not there, in the pool's processes."""
    todo = [d for d in domains if overwrite or not clean_done(config, d)]
    if pool is not None:  # without one, clean_domain reads what it needs
        stop = last_record(config.data)
        readings = {d: Reading(domain_files(config, d), stop) for d in todo}
        _read(config, pool, readings)


def read_share(config: Config, pool: Executor | None) -> str:
    """Read the source files that are this call's among data.task_count; what it did, in words.

    Of data.num_documents it reads its share, as if all files were of one size: the call that does
    the rest reads what is missing.
    """
    todo = [d for d in domains_to_clean(config) if not clean_done(config, d)]
    if config.data.arriving:
        _read_arriving(config, pool, todo)
    files = _read_files(config, pool, {d: domain_files(config, d) for d in todo})
    return f"{files} files of {len(todo)} domains read"


def _read_arriving(config: Config, pool: Executor | None, domains: list[str]) -> None:
    """Read this call's share of the files that have not changed from one look to the next, until
    none has come or changed for data.arriving seconds.

    A file whose writer paused may be read in part: what was made of it has its content in its
    address, and the whole file is read again. So what is wrong with a file is said, and is no error
    before the end.
    """
    pause = min(config.data.arriving / 4, 10.0)
    before: dict[str, dict[str, tuple[int, int]]] = {}
    since, told, read = time.monotonic(), set(), None
    while True:
        now = {d: _arrived(config, d) for d in domains}
        whole = {
            d: [path for path, state in files.items() if before.get(d, {}).get(path) == state]
            for d, files in now.items()
        }
        if now != before:
            since, before = time.monotonic(), now
        elif time.monotonic() - since >= config.data.arriving:
            return
        try:
            if whole != read:
                _read_files(config, pool, whole)
        except (UserError, FileNotFoundError) as error:
            if str(error) not in told:
                print(f"not whole yet? {error}", flush=True)
            told.add(str(error))
        read = whole
        time.sleep(pause)


def _arrived(config: Config, domain: str) -> dict[str, tuple[int, int]]:
    """Source files of a domain that are there, and what changes as they grow: (size, time)."""
    try:
        files = source_files(config.data, domain)
    except UserError:
        return {}  # none yet; whether there ever is one is asked in the end
    if any("://" in file for file in files):
        raise UserError("data.arriving: a hub's files are those of one commit; none will come")
    found = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # renamed as it became whole
            state = Path(file).stat()
            found[file] = state.st_size, state.st_mtime_ns
    return found


def _read_files(config: Config, pool: Executor | None, files: dict[str, list[str]]) -> int:
    """Read this call's share of the files of domains; how many there were."""
    data, count = config.data, config.data.task_count
    stop = -(-last_record(data) // count)
    # every domain begins with another task: those of few files are spread, too
    first = {d: (data.task_index - i) % count for i, d in enumerate(config.processed_domains)}
    readings = {d: Reading(own[first[d] :: count], stop, whole=False) for d, own in files.items()}
    if pool is None:
        for domain, reading in readings.items():
            while reading.more():
                reading.ended[reading.begun] = done = Future()
                done.set_result(read_shard(config, domain, reading.files[reading.begun]))
                reading.begun += 1
    else:
        _read(config, pool, readings)
    return sum(reading.begun for reading in readings.values())


def _read(config: Config, pool: Executor, readings: dict[str, Reading]) -> None:
    with tqdm(desc="read", unit="file", disable=None) as bar:

        def take() -> tuple[Any, Call] | None:
            wanting = [d for d, reading in readings.items() if reading.more()]
            if not wanting:
                return None
            domain = min(wanting, key=lambda d: readings[d].begun)
            i, readings[domain].begun = readings[domain].begun, readings[domain].begun + 1
            return (domain, i), (read_shard, config, domain, readings[domain].files[i])

        def give(key: Any, future: Future) -> None:
            domain, i = key
            readings[domain].ended[i] = future
            bar.update()

        run_queue(take, give, pool, config.data.num_proc, "read")


def clean_again(config: Config, domain: str) -> None:
    """clean_domain under config.overwrite."""
    clean_domain(config, domain, overwrite=True)


def clean_domains(
    config: Config, pool: Executor | None, domains: list[str], overwrite: bool = False
) -> None:
    """Make the cleaned text of these domains where it is not there yet."""
    function = clean_again if overwrite else clean_domain
    if overwrite:  # of the hub's files as they are now
        for domain in domains:
            pinned_files(config, domain).unlink(missing_ok=True)
    read_shards(config, pool, domains, overwrite)
    run_all([(function, config, d) for d in domains], pool, "merge", "domain")


def clean_present_domains(config: Config, pool: Executor | None) -> None:
    """Cleaned text of the present domains, except those whose processed data is already there."""
    clean_domains(config, pool, domains_to_clean(config), config.overwrite)


def domains_to_clean(config: Config) -> list[str]:
    """Present domains whose processed data is not there."""
    record = processed_folder(config) / "tokenizer" / TOKENIZER_RECORD
    tokenizer_hash = read_json(record)["hash"] if record.is_file() else ""
    return [d for d in config.processed_domains if not domain_done(config, d, tokenizer_hash)]


def tokenize_domains(config: Config, pool: Executor | None, tokenizer_hash: str) -> list[str]:
    """Processed data of the present domains that are this call's among data.task_count; returns
    those that had to be made."""
    own = config.processed_domains[config.data.task_index :: config.data.task_count]
    todo = [d for d in own if not domain_done(config, d, tokenizer_hash)]
    for domain in tqdm(todo, "tokenise", unit="domain", disable=None):
        tokenize_domain(config, domain, pool)
    return todo


def write_manifest(config: Config, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Merge the manifests of all complete domain folders made by this tokenizer, and write it."""
    folder, domains = processed_folder(config), {}
    # of two writers the later one has seen the domains of the other
    with locked(folder / ".locks" / "manifest.lock", f"{folder}: manifest"):
        for path in sorted(folder.glob("*/manifest.json")):
            if path.parent.name.startswith("."):
                continue  # a living writer's temporary folder
            manifest = read_json(path)
            if is_complete(path.parent) and manifest["tokenizer_hash"] == tokenizer["hash"]:
                domains[path.parent.name] = manifest
        manifest = {
            "key": processed_key(config),
            "config": key_parts(config),
            "tokenizer": tokenizer,
            "domains": domains,
        }
        write_json(folder / "manifest.json", manifest)
    return manifest


def table_text(header: list[str], rows: list[list[str]]) -> str:
    """Columns of words, the first left-aligned, the others right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def summary(config: Config, manifest: dict[str, Any]) -> str:
    """Two tables for the terminal: what was dropped, what is in each split."""
    drops, contents = [], []
    for domain in config.processed_domains:
        m = manifest["domains"][domain]
        splits = [m["splits"][split] for split in SPLITS]
        filtered = [m["dropped"][name] for name in (*FILTERS, *TOKEN_FILTERS)]
        numbers = [m["read"], *filtered, m["unused_documents"], m["shortfall_tokens"]]
        drops.append([domain, *map(str, numbers)])
        cells = [f"{s['documents']}/{s['tokens']}" for s in splits]
        # one separator per document is no token of the text.
        tokens = sum(s["tokens"] - s["documents"] for s in splits)
        contents.append([domain, *cells, f"{sum(s['bytes'] for s in splits) / tokens:.2f}"])
    filters = ("broken", "short", "script", "exact", "near", "unknown", "untokenizable")
    return (
        "documents read, dropped per filter, beyond the token budget; tokens short of it\n"
        + table_text(["domain", "read", *filters, "unused", "shortfall"], drops)
        + "\n\ndocuments/tokens per split\n"
        + table_text(["domain", *SPLITS, "bytes/token"], contents)
    )
