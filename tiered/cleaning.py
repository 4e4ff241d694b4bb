"""Raw text -> cleaned documents of a domain, never all at once: filters, shards, duplicates, parts.

    <processed_dir>/.clean/<key>/.shards/<domain>/<shard>/  documents of one source file that passed
                                                            the filters, in chunks; until merged
    <processed_dir>/.clean/<key>/<domain>/                  part-00000.parquet ..: those that are no
                                                            duplicates, in order of their position

A document's position is a salted hash of its id in [0, 1): splits are ranges of it. What is kept of
a domain is a function of its own raw text and the config, never of the order of files, of how text
is spread over them (data.num_documents takes the first records of the files in order), of the
number of processes, or of how often they were stopped. While a domain is merged, a byte per
document is held, 8 per pair of near duplicates, and 16 for every time that a document stands in a
crowd (more than CROWD documents that share a band).
"""

import contextlib
import functools
import hashlib
import itertools
import math
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasketch import MinHash

from tiered.config import Config, DataConfig, plain
from tiered.domains import script_share
from tiered.sources import (
    BATCH_DOCUMENTS,
    Damaged,
    raw_records,
    source_changed,
    source_files,
    source_record,
)
from tiered.store import (
    UserError,
    atomic_folder,
    code_hash,
    digest,
    file_hash,
    is_complete,
    read_json,
    remove_abandoned,
    verify,
    write_json,
    write_json_once,
)

# Fields that decide the cleaned text; shares, budgets and the tokenizer come after it.
CLEAN_FIELDS = (
    "source",
    "revision",
    "config_name",
    "source_split",
    "text_column",
    "text_unit",
    "first_document",
    "num_documents",
    "normalize",
    "strip_control",
    "min_characters",
    "min_script_share",
    "exact_duplicates",
    "near_duplicate_threshold",
    "max_broken_records",
    "split_seed",
)
FILTERS = ("broken", "too_short", "wrong_script", "exact_duplicate", "near_duplicate")
KEPT, BROKEN, TOO_SHORT, WRONG_SCRIPT = range(4)  # verdicts on a record: the first filters
# 5 characters: about a word of an alphabetic script and three of Chinese or Japanese.
SHINGLE_CHARACTERS = 5
PERMUTATIONS = 128
SHINGLES_AT_ONCE = 2**11  # their hashes under all permutations stay in a core's cache (1 MB)
CHUNK_BYTES = 2**25  # of text that a process holds before it writes a chunk of its shard
PART_BYTES = 2**25  # of text in a part of the cleaned domain, about
SMALLEST_GROUP = 64  # documents of a chunk that are read together, at least
MOST_GROUPS = 1024  # of a chunk
COMPARED = 2**15  # documents whose hashes are compared at once
AT_ONCE = 2**12  # MinHashes of pairs
CROWD = 64  # documents that share a band: of more of them not all pairs are looked at beforehand
POSITIONS = 2.0**53  # positions are multiples of 2^-53: what a float64 holds exactly
INDEX = np.dtype(
    [("position", "<u8"), ("id", "<u8"), ("words", "<u8", 2), ("record", "<u8"), ("bytes", "<u8")]
)

# --- documents -------------------------------------------------------------------------------

# Cc without newline and tab; format characters (Cf) stay: joiners are spelling in many scripts.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean_text(text: str, data: DataConfig) -> str:
    """Text with unified line ends, without control characters, normalised and trimmed."""
    if data.strip_control:
        text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    if data.normalize != "none":
        text = unicodedata.normalize(data.normalize, text)
    return text.strip()


def document_id(text: str) -> str:
    """First 16 hexadecimal digits of the sha256 of a cleaned text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def position(name: str, seed: int) -> int:
    """Salted hash of a document id, uniform in [0, 2^53): its place among a domain's documents."""
    # 53 bits: what a float64 holds exactly, so no position rounds up to 1.
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 11


def verdict(text: str, data: DataConfig, domain: str) -> int:
    """What the filters that look at one document say of a cleaned text."""
    if len(text) < max(1, data.min_characters):
        return TOO_SHORT
    if data.min_script_share and script_share(text, domain) < data.min_script_share:
        return WRONG_SCRIPT
    return KEPT


@functools.cache
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """a and b of the hash functions x -> a x + b (mod 2^32): (PERMUTATIONS, 1) uint32 each."""
    a, b = MinHash(PERMUTATIONS, seed=1, scheme="affine32").permutations
    return a.reshape(-1, 1), b.reshape(-1, 1)


def shingles(text: str) -> np.ndarray:
    """32-bit hashes of a text's shingles of characters (lower case, white space collapsed), one for
    every place where a shingle begins: (K,) uint32."""
    characters = np.frombuffer(" ".join(text.lower().split()).encode("utf-32-le"), "<u4")
    count = max(1, len(characters) - SHINGLE_CHARACTERS + 1)
    mixed = np.zeros(count, dtype="<u8")
    for start in range(min(SHINGLE_CHARACTERS, len(characters))):
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed += characters[start : start + count]
    mixed ^= mixed >> np.uint64(31)  # splitmix64's last steps: every character reaches every bit
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(32)).astype("<u4")


def min_hash(text: str) -> np.ndarray:
    """MinHash of a text's set of shingles: (PERMUTATIONS,) uint32.

    As datasketch's MinHash ("affine32") has it, without a call into Python for every shingle.
    """
    a, b = _permutations()
    values = shingles(text)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # murmur3's last steps
        values ^= values >> np.uint32(shift)
        values *= np.uint32(factor)
    values ^= values >> np.uint32(16)
    smallest = np.full(PERMUTATIONS, 2**32 - 1, "<u4")
    room = np.empty((PERMUTATIONS, SHINGLES_AT_ONCE), "<u4")
    for start in range(0, len(values), SHINGLES_AT_ONCE):
        part = values[start : start + SHINGLES_AT_ONCE]
        hashed = np.multiply(part, a, out=room[:, : len(part)])
        hashed += b
        np.minimum(smallest, hashed.min(1), out=smallest)
    return smallest


# --- shards ----------------------------------------------------------------------------------


def clean_key(config: Config) -> str:
    """Name of the folder of cleaned text: the hash of what decides it."""
    fields = {name: plain(getattr(config.data, name)) for name in CLEAN_FIELDS}
    code = code_hash(*(f"tiered/{name}.py" for name in ("cleaning", "domains", "hub", "sources")))
    return digest([fields, code])


def clean_folder(config: Config, domain: str) -> Path:
    """Where a domain's cleaned text stands."""
    return Path(config.data.processed_dir) / ".clean" / clean_key(config) / domain


def shards_folder(config: Config, domain: str) -> Path:
    """Where what was read of a domain's source files stands until it is merged."""
    return clean_folder(config, domain).parent / ".shards" / domain


def shard_folder(config: Config, domain: str, path: str) -> Path:
    """Where what was read of a source file stands, by its name and content."""
    identity = [path, None if "://" in path else file_hash(Path(path))]
    return shards_folder(config, domain) / digest(identity)


def _file_state(path: str) -> tuple[int, ...] | None:
    """What changes when a file of this machine is written; None for one of the hub."""
    if "://" in path:
        return None
    state = os.stat(path)
    return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def pinned_files(config: Config, domain: str) -> Path:
    """The list of a domain's source files on the hub."""
    return clean_folder(config, domain).parent / ".files" / f"{domain}.json"


def domain_files(config: Config, domain: str) -> list[str]:
    """Source files of a domain; those of the hub as they were found first (their URLs hold the
    commit), however often reading is begun again and on however many machines."""
    pinned = pinned_files(config, domain)
    if pinned.is_file():
        return read_json(pinned)["files"]
    files = source_files(config.data, domain)
    if any("://" in file for file in files):
        return write_json_once(pinned, {"files": files})["files"]
    return files


def last_record(data: DataConfig) -> int:
    """The raw records of a domain that are looked at; 0: all."""
    return data.first_document + data.num_documents if data.num_documents else 0


def read_shard(config: Config, domain: str, path: str) -> tuple[int, str]:
    """Store the documents of a source file that pass the filters, unless they are there; returns
    how many raw records were looked at, and why there are no more of them if the file is damaged.

    Whether the broken records count, and the damage, is for the domain to say (gather): the file
    may be the last one that data.num_documents needs, and needed in part. verdicts.npy (R,) uint8:
    of every record; shard.json: where and why records are broken, and the damage; and the documents
    in chunks (write_chunk).
    """
    before = _file_state(path)
    folder, data = shard_folder(config, domain, path), config.data
    if is_complete(folder):
        record = read_json(folder / "shard.json")
        if not record["damage"]:
            return record["records"], ""
    verdicts, broken, chunks, damage = bytearray(), [], 0, ""
    waiting: list[tuple[str, int]] = []
    size = 0
    with atomic_folder(folder) as temporary:
        records = itertools.islice(raw_records(path, data), last_record(data) or None)
        for number in itertools.count():
            try:
                raw, why = next(records)
            except StopIteration:
                break
            except Damaged as error:
                damage = str(error)
                break
            if raw is None:
                verdicts.append(BROKEN)
                broken.append((number, why))
                if not last_record(data) and not data.first_document:  # every record counts
                    check_broken(data, domain, [(path, *broken[-1])], len(broken))
                continue
            text = clean_text(raw, data)
            verdicts.append(verdict(text, data, domain))
            if verdicts[-1] == KEPT:
                waiting.append((text, number))
                size += len(text.encode())
            if size >= CHUNK_BYTES:
                write_chunk(waiting, data, temporary / f"{chunks:05d}")
                waiting, size, chunks = [], 0, chunks + 1
        if waiting:
            write_chunk(waiting, data, temporary / f"{chunks:05d}")
            chunks += 1
        if _file_state(path) != before:  # its address is that of another content
            raise UserError(f"{path}: changed while it was read; run again when it is whole")
        save_array(temporary / "verdicts.npy", np.frombuffer(bytes(verdicts), np.uint8))
        record = {"file": path, "records": len(verdicts), "chunks": chunks}
        record |= {"broken": broken, "damage": damage}
        write_json(temporary / "shard.json", record)
    return len(verdicts), damage


def check_broken(
    data: DataConfig, domain: str, broken: list[tuple[str, int, str]], count: int
) -> None:
    """Raise UserError, naming the last of them (file, record, why), for more broken records than
    data.max_broken_records."""
    if count > data.max_broken_records:
        path, number, why = broken[-1]
        raise UserError(
            f"{path}: record {number + 1} of domain {domain} is broken ({why}); more than"
            f" data.max_broken_records = {data.max_broken_records}"
        )


def write_chunk(documents: list[tuple[str, int]], data: DataConfig, path: Path) -> None:
    """Write documents (text, raw record) of a shard in the order of their position.

    <path>.parquet: texts, in groups; <path>.index.npy (M,) of INDEX; and for near duplicates
    <path>.hashes.npy (M, PERMUTATIONS) uint32, their MinHashes, and <path>.bands.npy (bands, M)
    uint64, equal where documents have to be compared.
    """
    index = np.zeros(len(documents), INDEX)
    for entry, (text, record) in zip(index, documents, strict=True):
        name = document_id(text)
        words = hashlib.sha256(" ".join(text.split()).encode()).digest()
        entry["position"], entry["id"] = position(name, data.split_seed), int(name, 16)
        entry["words"] = int.from_bytes(words[:8]), int.from_bytes(words[8:16])
        entry["record"], entry["bytes"] = record, len(text.encode())
    order = np.argsort(index[["position", "id"]], kind="stable")
    index, documents = index[order], [documents[i] for i in order]
    save_array(path.with_suffix(".index.npy"), index)
    texts = pa.table({"text": pa.array([text for text, _ in documents], pa.large_string())})
    group = max(SMALLEST_GROUP, len(documents) // MOST_GROUPS)
    pq.write_table(texts, path.with_suffix(".parquet"), row_group_size=group)
    del texts
    pa.default_memory_pool().release_unused()  # a worker would hold it to its end
    if data.near_duplicate_threshold:
        hashes = np.stack([min_hash(text) for text, _ in documents])  # (M, PERMUTATIONS)
        save_array(path.with_suffix(".hashes.npy"), hashes)
        bands, rows = lsh_bands(data.near_duplicate_threshold)
        parts = np.ascontiguousarray(hashes[:, : bands * rows].reshape(-1, bands, rows))
        own = [
            [xxhash.xxh3_64_intdigest(part.tobytes()) for part in parts[:, b]] for b in range(bands)
        ]
        save_array(path.with_suffix(".bands.npy"), np.array(own, dtype="<u8"))


def save_array(path: Path, array: np.ndarray) -> None:
    """np.save; where a disk is full the system's error says so (numpy's own writing of files tells
    how many numbers it has written)."""
    with open(path, "wb") as file:
        np.lib.format.write_array(SimpleNamespace(write=file.write), array, allow_pickle=False)


def lsh_bands(threshold: float) -> tuple[int, int]:
    """(bands, rows per band) that find a pair of similarity `threshold` with probability 0.99.

    A missed pair is worse than a spare candidate, which is compared anyway.
    """
    for rows in range(PERMUTATIONS // 2, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.99:
            return bands, rows
    return PERMUTATIONS, 1


# --- a domain --------------------------------------------------------------------------------


class Chunk:
    """A chunk of a shard, of which the raw records [low, high) belong to the domain.

    kept (M,) bool: its documents that are not dropped (yet). Nothing else of it is held.
    """

    def __init__(self, path: Path, low: int, high: int) -> None:
        self.path = path
        record = self.index()["record"]
        self.kept = (record >= low) & (record < high)

    def index(self) -> np.ndarray:
        """(M,) of INDEX, in the order of positions."""
        return np.load(self.path.with_suffix(".index.npy"))

    def band(self, b: int) -> np.ndarray:
        """(M,) uint64: a hash of band b of every document's MinHash."""
        return np.array(np.load(self.path.with_suffix(".bands.npy"), mmap_mode="r")[b])

    def min_hashes(self, rows: np.ndarray) -> np.ndarray:
        """(N, PERMUTATIONS) uint32: MinHashes of documents."""
        return np.load(self.path.with_suffix(".hashes.npy"), mmap_mode="r")[rows]

    def texts(self, low: int, high: int) -> pa.ChunkedArray:
        """Texts of the documents [low, high)."""
        with pq.ParquetFile(self.path.with_suffix(".parquet")) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            first, last = np.searchsorted(ends, [low, high - 1], side="right")
            table = file.read_row_groups(list(range(first, last + 1)))
            return table["text"].slice(low - (ends[first] - sizes[first]), high - low)


@dataclass
class Gathered:
    """What the filters left of a domain, and what they saw."""

    chunks: list[Chunk]
    counts: Counter
    read: list[str]  # files that were opened


def gather(config: Config, domain: str, files: list[str]) -> Gathered:
    """The shards of a domain's raw records first_document .. + num_documents; those that are not
    there are read.

    Raises UserError beyond data.max_broken_records broken records, and if every record is broken.
    """
    data, found, seen = config.data, Gathered([], Counter(), []), 0
    broken: list[tuple[str, int, str]] = []
    for path in files:
        if last_record(data) and seen >= last_record(data):
            break
        total, damage = read_shard(config, domain, path)
        folder = shard_folder(config, domain, path)
        verify(folder)
        low = min(total, max(0, data.first_document - seen))
        high = min(total, last_record(data) - seen) if last_record(data) else total
        verdicts = np.bincount(np.load(folder / "verdicts.npy")[low:high], minlength=4).tolist()
        for name, count in zip(("kept", *FILTERS), verdicts, strict=False):
            found.counts[name] += count
        found.counts["read"] += high - low
        shard = read_json(folder / "shard.json")
        for number, why in shard["broken"]:
            if low <= number < high:
                broken.append((path, number, why))
                check_broken(data, domain, broken, len(broken))
        found.chunks += [Chunk(folder / f"{i:05d}", low, high) for i in range(shard["chunks"])]
        found.read.append(path)
        seen += total
        if damage and not (last_record(data) and seen >= last_record(data)):
            raise UserError(damage)
    if broken and len(broken) == found.counts["read"]:
        path, _, why = broken[-1]
        raise UserError(f"{path}: every record of domain {domain} is broken, the last one: {why}")
    return found


def same(keys: np.ndarray) -> np.ndarray:
    """(N,) bool: sorted rows (N, C) that equal the row before."""
    return np.r_[np.zeros(min(1, len(keys)), bool), (keys[1:] == keys[:-1]).all(1)]


def slices(count: int) -> int:
    """Into how many parts hashes of `count` documents are split that are compared together."""
    return max(1, -(-count // COMPARED))


def drop_exact_duplicates(chunks: list[Chunk]) -> int:
    """Drop documents whose text differs from that of one with a smaller id in white space alone, or
    not at all; returns how many."""
    dropped, parts = 0, slices(sum(int(chunk.kept.sum()) for chunk in chunks))
    for part in range(parts):
        found = []
        for c, chunk in enumerate(chunks):
            index = chunk.index()
            rows = np.flatnonzero(chunk.kept & (index["words"][:, 0] % parts == part))
            where = np.stack([np.full_like(rows, c), rows], 1).astype("<u8")
            found.append(np.concatenate([index["words"][rows], index["id"][rows, None], where], 1))
        rows = np.concatenate(found)  # words, words, id, chunk, row
        rows = rows[np.lexsort(rows.T[::-1])]
        for c, row in rows[same(rows[:, :2]), 3:].tolist():
            chunks[c].kept[row] = False
            dropped += 1
    return dropped


class Documents:
    """The documents of a domain's chunks by one number each: chunk after chunk, row after row."""

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks
        self.starts = np.cumsum([0, *(len(chunk.kept) for chunk in chunks)])

    def ids(self, numbers: np.ndarray) -> np.ndarray:
        """(N,) uint64: ids of documents."""
        return self._read(numbers, lambda chunk, rows: chunk.index()["id"][rows], (), "<u8")

    def min_hashes(self, numbers: np.ndarray) -> np.ndarray:
        """(N, PERMUTATIONS) uint32: MinHashes of documents."""
        return self._read(numbers, Chunk.min_hashes, (PERMUTATIONS,), "<u4")

    def _read(
        self,
        numbers: np.ndarray,
        read: Callable[[Chunk, np.ndarray], np.ndarray],
        shape: tuple[int, ...],
        kind: str,
    ) -> np.ndarray:
        found = np.empty((len(numbers), *shape), kind)
        owner = np.searchsorted(self.starts, numbers, side="right") - 1
        for c in np.unique(owner).tolist():
            own = np.flatnonzero(owner == c)
            found[own] = read(self.chunks[c], numbers[own] - self.starts[c])
        return found

    def sharing(self, band: int, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents that share a band with another one, of those whose hash of it falls into a
        part: numbers (N,), ascending in a group, and where groups begin (N,) bool."""
        numbers, values = [np.zeros(0, np.int64)], [np.zeros(0, "<u8")]
        for c, chunk in enumerate(self.chunks):
            band_hashes = chunk.band(band)
            own = np.flatnonzero(chunk.kept & (band_hashes % parts == part))
            numbers.append(own + self.starts[c])
            values.append(band_hashes[own])
        numbers, values = np.concatenate(numbers), np.concatenate(values)
        order = np.argsort(values, kind="stable")
        numbers, again = numbers[order], same(values[order][:, None])
        shared = again | np.r_[again[1:], False]
        return numbers[shared], ~again[shared]


def near_pairs(
    documents: Documents, numbers: np.ndarray, begins: np.ndarray, threshold: float
) -> np.ndarray:
    """Pairs (P, 2) of numbers, the smaller one first, of documents in one group whose estimated
    Jaccard similarity is `threshold` or more; groups are those of Documents.sharing."""
    group, hashes, found = np.cumsum(begins), documents.min_hashes(numbers), []
    for distance in itertools.count(1):
        first = np.flatnonzero(group[distance:] == group[:-distance])
        if not len(first):
            return np.concatenate([np.zeros((0, 2), np.int64), *found])
        for low in range(0, len(first), AT_ONCE):
            i = first[low : low + AT_ONCE]
            near = i[(hashes[i] == hashes[i + distance]).mean(1) >= threshold]
            found.append(np.stack([numbers[near], numbers[near + distance]], 1))


@dataclass
class Candidates:
    """Which documents have to be told apart, by their numbers.

    pairs (P, 2): documents that are near duplicates; crowds (M, 2): document and crowd, a group too
    large for all its pairs to be held; its members are compared when their turn comes.
    """

    pairs: np.ndarray
    crowds: np.ndarray


def candidates(documents: Documents, threshold: float) -> Candidates:
    """All documents that share a band with another one, compared group by group."""
    pairs, crowds, seen = np.zeros(0, np.int64), [np.zeros((0, 2), np.int64)], 0
    count = int(documents.starts[-1])
    parts = slices(sum(int(chunk.kept.sum()) for chunk in documents.chunks))
    for band, part in itertools.product(range(lsh_bands(threshold)[0]), range(parts)):
        numbers, begins = documents.sharing(band, part, parts)
        group = np.cumsum(begins) - 1
        crowded = (np.bincount(group) > CROWD)[group] if len(group) else begins
        crowds.append(np.stack([numbers[crowded], seen + group[crowded]], 1))
        seen += len(group)
        own = near_pairs(documents, numbers[~crowded], begins[~crowded], threshold)
        pairs = np.union1d(pairs, own @ [count, 1])
    return Candidates(np.stack(np.divmod(pairs, max(1, count)), 1), np.concatenate(crowds))


def drop_near_duplicates(chunks: list[Chunk], threshold: float) -> int:
    """Drop documents whose estimated Jaccard similarity to one with a smaller id that is kept is
    `threshold` or more; returns how many."""
    documents = Documents(chunks)
    found = candidates(documents, threshold)
    numbers = np.unique(np.concatenate([found.pairs.ravel(), found.crowds[:, 0]]))
    order = np.lexsort([numbers, documents.ids(numbers)])
    place = np.empty(len(order), np.int64)  # of each number: its turn
    place[order] = np.arange(len(order))
    turns = np.sort(place[np.searchsorted(numbers, found.pairs)], axis=1)  # earlier, later
    turns = turns[np.argsort(turns[:, 1], kind="stable")]
    crowds = np.stack([place[np.searchsorted(numbers, found.crowds[:, 0])], found.crowds[:, 1]], 1)
    crowds = crowds[np.argsort(crowds[:, 0], kind="stable")]
    every = np.arange(len(numbers) + 1)
    earlier, member = np.searchsorted(turns[:, 1], every), np.searchsorted(crowds[:, 0], every)
    kept, numbers = np.ones(len(numbers), bool), numbers[order]
    kept_of: dict[int, list[int]] = {}  # of a crowd
    for turn in range(len(numbers)):
        rivals = turns[earlier[turn] : earlier[turn + 1], 0]
        own = crowds[member[turn] : member[turn + 1], 1].tolist()
        kept[turn] = not kept[rivals].any()
        if own and kept[turn]:
            others = sorted({other for crowd in own for other in kept_of.get(crowd, ())})
            kept[turn] = not _is_near(documents, numbers[turn], numbers[others], threshold)
        if kept[turn]:
            for crowd in own:
                kept_of.setdefault(crowd, []).append(turn)
    for number in numbers[~kept]:
        c = int(np.searchsorted(documents.starts, number, side="right")) - 1
        chunks[c].kept[number - documents.starts[c]] = False
    return int((~kept).sum())


def _is_near(documents: Documents, number: int, others: np.ndarray, threshold: float) -> bool:
    """Whether a document is a near duplicate of any of others."""
    own = documents.min_hashes(np.array([number]))
    for low in range(0, len(others), AT_ONCE):
        hashes = documents.min_hashes(others[low : low + AT_ONCE])
        if ((own == hashes).mean(1) >= threshold).any():
            return True
    return False


def write_parts(chunks: list[Chunk], folder: Path) -> int:
    """Write the documents that are kept in the order of position and id, in parts that are equal
    ranges of positions; returns how many parts."""
    size = sum(int(chunk.index()["bytes"][chunk.kept].sum()) for chunk in chunks)
    parts = 2 ** max(0, math.ceil(math.log2(max(1, size) / PART_BYTES)))
    for part in range(parts):
        edges = [int(POSITIONS) // parts * edge for edge in (part, part + 1)]
        path = folder / f"part-{part:05d}.parquet"
        pq.write_table(part_table(chunks, *edges), path, row_group_size=BATCH_DOCUMENTS)
        pa.default_memory_pool().release_unused()
    return parts


def part_table(chunks: list[Chunk], begin: int, end: int) -> pa.Table:
    """The documents that are kept at positions [begin, end), in the order of position and id."""
    entries, texts = [np.zeros(0, INDEX)], [pa.chunked_array([], pa.large_string())]
    for chunk in chunks:
        index = chunk.index()
        low, high = np.searchsorted(index["position"], [begin, end])
        kept = np.flatnonzero(chunk.kept[low:high])
        if len(kept):
            entries.append(index[low:high][kept])
            texts.append(chunk.texts(low, high).take(pa.array(kept)))
    index = np.concatenate(entries)
    order = np.argsort(index[["position", "id"]], kind="stable")
    names = [f"{i:016x}" for i in index["id"][order].tolist()]
    columns = {
        "position": pa.array(index["position"][order], pa.uint64()),
        "document_id": pa.array(names, pa.string()),
        "text": pa.chunked_array(texts, pa.large_string()).take(pa.array(order)),
    }
    return pa.table(columns)


def clean_done(config: Config, domain: str) -> bool:
    """Whether a domain's cleaned text is there, made of the raw text that is there."""
    folder = clean_folder(config, domain)
    return is_complete(folder) and not source_changed(
        config.data, domain, read_json(folder / "clean.json")["source"]
    )


def clean_domain(config: Config, domain: str, overwrite: bool = False) -> Path:
    """The folder of a domain's cleaned text, made unless it is there and its source unchanged."""
    folder = clean_folder(config, domain)
    if not overwrite and clean_done(config, domain):
        verify(folder)
        _remove_shards(config, domain)
        return folder
    try:
        _merge(config, domain)
    except (FileNotFoundError, UserError) as error:
        # another process that merged the same shards was quicker, and has removed them, or some
        mine = overwrite and isinstance(error, UserError)
        if mine or not clean_done(config, domain):
            raise
    _remove_shards(config, domain)
    return folder


def _remove_shards(config: Config, domain: str) -> None:
    """Remove a domain's shards once they are merged; those that are being written end by
    themselves, and are removed by the next call."""
    folder = shards_folder(config, domain)
    for path in folder.glob("[!.]*"):
        shutil.rmtree(path, ignore_errors=True)
    remove_abandoned(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _merge(config: Config, domain: str) -> None:
    """Write a domain's cleaned text from its shards."""
    folder, data = clean_folder(config, domain), config.data
    files = domain_files(config, domain)
    found = gather(config, domain, files)
    counts = found.counts
    if found.chunks and data.exact_duplicates:
        counts["exact_duplicate"] = drop_exact_duplicates(found.chunks)
    if found.chunks and data.near_duplicate_threshold:
        counts["near_duplicate"] = drop_near_duplicates(found.chunks, data.near_duplicate_threshold)
    dropped = {name: counts[name] for name in FILTERS}
    documents = sum(int(chunk.kept.sum()) for chunk in found.chunks)
    check_not_empty(domain, documents, counts["read"], dropped)
    with atomic_folder(folder) as temporary:
        record = {
            "domain": domain,
            "source": {"name": data.source, **source_record(data, files, set(found.read))},
            "read": counts["read"],
            "dropped": dropped,
            "documents": documents,
            "parts": write_parts(found.chunks, temporary),
        }
        write_json(temporary / "clean.json", record)


def check_not_empty(domain: str, documents: int, read: int, dropped: dict[str, int]) -> None:
    """Raise UserError with the counts per filter if no document is left of a domain."""
    if not documents:
        parts = ", ".join(f"{name} {count}" for name, count in dropped.items())
        raise UserError(f"domain {domain}: no document is left of {read} read (dropped: {parts})")


def clean_batches(
    config: Config, domain: str, low: float = 0.0, high: float = 1.0
) -> Iterator[pa.Table]:
    """Cleaned documents with positions in [low, high), in their order, at most BATCH_DOCUMENTS at a
    time: position (uint64, of 2^53), document_id, text."""
    folder = clean_folder(config, domain)
    parts = read_json(folder / "clean.json")["parts"]
    for part in range(parts):
        if (part + 1) / parts <= low or part / parts >= high:
            continue
        with pq.ParquetFile(folder / f"part-{part:05d}.parquet") as file:
            for batch in file.iter_batches(BATCH_DOCUMENTS):
                place = batch.column("position").to_numpy() / POSITIONS
                begin, end = np.searchsorted(place, [low, high])
                if begin < end:
                    yield pa.Table.from_batches([batch.slice(begin, end - begin)])


def count_clean(config: Config, domain: str, low: float, high: float) -> int:
    """How many cleaned documents of a domain have positions in [low, high)."""
    folder = clean_folder(config, domain)
    found = 0
    for part in range(read_json(folder / "clean.json")["parts"]):
        column = pq.read_table(folder / f"part-{part:05d}.parquet", columns=["position"])
        place = column["position"].to_numpy() / POSITIONS
        found += int(((place >= low) & (place < high)).sum())
    return found


def read_clean(config: Config, domain: str) -> tuple[list[str], list[str]]:
    """Document ids and texts of a cleaned domain, in the order of positions."""
    tables = list(clean_batches(config, domain))
    return tuple(
        [v for t in tables for v in t[name].to_pylist()] for name in ("document_id", "text")
    )
