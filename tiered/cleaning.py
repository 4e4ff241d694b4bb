"""Raw text -> cleaned documents of a domain: source files, records, filters, duplicates.

Everything here is domain-local and independent of file order: what is kept of a domain is a
function of its own raw text and the config. Cleaned text is stored by the hash of what decides it:

    <processed_dir>/.clean/<key>/<domain>/   documents.parquet in the order of document ids
"""

import hashlib
import itertools
import json
import lzma
import os
import re
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasketch import MinHash, MinHashLSH

from tiered.config import Config, DataConfig, plain
from tiered.domains import script_share
from tiered.store import (
    UserError,
    atomic_folder,
    code_hash,
    digest,
    file_hash,
    is_complete,
    read_json,
    verify,
    write_json,
)

JSON_NAME = re.compile(r"\.jsonl?(\.(gz|bz2|xz))?$")
TEXT_NAME = re.compile(r"\.txt(\.(gz|bz2|xz))?$")
# Fields that decide the cleaned text; splits, budgets and the tokenizer come after it.
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
)
FILTERS = ("broken", "too_short", "wrong_script", "exact_duplicate", "near_duplicate")
# 5 characters: about a word of an alphabetic script and three of Chinese or Japanese.
SHINGLE_CHARACTERS = 5
PERMUTATIONS = 128
BATCH_DOCUMENTS = 1000

# --- source ---------------------------------------------------------------------------------


def source_files(data: DataConfig, domain: str) -> list[str]:
    """Files (paths or hf:// URLs) of a domain's raw text, sorted.

    The source is a folder with a sub-folder per domain, or whatever load_dataset accepts as a
    first argument (hub name, or a folder whose README.md has `configs:`). Raises UserError.
    """
    try:
        name = data.config_name.format(domain=domain)
    except (KeyError, IndexError, ValueError):
        raise UserError(
            f"data.config_name: {data.config_name!r} may hold {{domain}} and nothing else in braces"
        ) from None
    root = Path(data.source)
    if root.is_dir() and not _has_configs(root):
        return _folder_files(root / name, domain)
    if not root.is_dir() and (root.exists() or root.is_absolute() or data.source.startswith(".")):
        raise UserError(f"data.source: {data.source} is not a folder")
    files = _open_builder(data, domain, name).config.data_files or {}
    if data.source_split not in files:
        raise UserError(
            f"data.source_split: {data.source} has no split {data.source_split!r} for domain"
            f" {domain} (it has {', '.join(map(str, files)) or 'none'})"
        )
    return sorted(str(file) for file in files[data.source_split])


def _has_configs(root: Path) -> bool:
    readme = root / "README.md"
    return readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8")


def _folder_files(folder: Path, domain: str) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{folder}: domain {domain} has no folder in data.source")
    names = sorted(p for p in folder.rglob("*") if p.is_file())
    files = [str(p) for p in names if _format(p.name)]
    if not files:
        raise UserError(f"{folder}: no .jsonl, .json, .parquet or .txt file for domain {domain}")
    return files


def _format(name: str) -> str:
    if JSON_NAME.search(name):
        return "json"
    if TEXT_NAME.search(name):
        return "text"
    return "parquet" if name.endswith(".parquet") else ""


def _open_builder(data: DataConfig, domain: str, name: str) -> datasets.DatasetBuilder:
    """The load_dataset builder of a domain; network faults are retried, then a UserError."""
    where = f"data.source: {data.source}"
    for attempt in itertools.count(1):
        try:
            return datasets.load_dataset_builder(data.source, name, revision=data.revision or None)
        except ValueError as error:
            raise UserError(
                f"{where} has no configuration {name!r} for domain {domain}"
                f" ({' '.join(str(error).split())})"
            ) from None
        except (OSError, httpx2.HTTPError) as error:
            if Path(data.source).is_dir():
                raise UserError(
                    f"{where} has no files for domain {domain} ({' '.join(str(error).split())})"
                ) from None
            # a lasting 503 or 429 comes out of datasets as FileNotFoundError: not proof of absence.
            offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
            if attempt == 3 or offline:
                raise UserError(
                    f"{where} is neither a folder here nor reachable on the hub for domain"
                    f" {domain} ({' '.join(str(error).split())})"
                ) from None
            time.sleep(2.0**attempt)


def source_record(data: DataConfig, files: list[str], read: set[str]) -> dict[str, Any]:
    """What identifies raw text: each file's name with the sha256 of those that were read.

    Hub files are identified by the commit in their URL.
    """
    record: dict[str, str | None] = {}
    for file in files:
        remote = "://" in file
        name = file if remote else os.path.relpath(file, data.source)
        record[name] = file_hash(Path(file)) if file in read and not remote else None
    commits = {m.group(1) for f in files if (m := re.search(r"@([0-9a-f]{40})/", f))}
    return {"files": record, "revision": ", ".join(sorted(commits)) or data.revision}


def source_changed(data: DataConfig, domain: str, record: dict[str, Any]) -> bool:
    """Whether local raw text differs from what a stored record was made of.

    Raw text that is on the hub, or no longer there, cannot contradict the record.
    """
    if not Path(data.source).is_dir():
        return False
    try:
        files = source_files(data, domain)
    except UserError:
        return False
    read = {f for f in files if record["files"].get(os.path.relpath(f, data.source))}
    return source_record(data, files, read)["files"] != record["files"]


# --- records ---------------------------------------------------------------------------------


def _check_text(value: Any) -> tuple[str | None, str]:
    """(text, "") or (None, why it is broken)."""
    if not isinstance(value, str):
        return None, f"text is {type(value).__name__}, not a string"
    try:
        value.encode()
    except UnicodeEncodeError:
        return None, "half a surrogate pair"
    return value, ""


def parse_line(line: bytes, column: str) -> tuple[str | None, str]:
    """Text of one JSON line, or None and the reason why it is broken."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except (ValueError, RecursionError):
        return None, "not JSON"
    if not isinstance(record, dict):
        return None, "not a JSON object"
    if column not in record:
        return None, f"no column {column!r} (data.text_column); it has {', '.join(record)[:100]}"
    return _check_text(record[column])


def _json_records(path: str, data: DataConfig) -> Iterator[tuple[str | None, str]]:
    with fsspec.open(path, "rb", compression="infer") as file:
        for line in file:
            if line.strip():
                yield parse_line(line, data.text_column)


def _parquet_records(path: str, data: DataConfig) -> Iterator[tuple[str | None, str]]:
    with fsspec.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        if data.text_column not in table.schema_arrow.names:
            raise UserError(
                f"data.text_column: {path} has no column {data.text_column!r}"
                f" (it has {', '.join(table.schema_arrow.names)})"
            )
        for batch in table.iter_batches(BATCH_DOCUMENTS, columns=[data.text_column]):
            values = batch.column(0)
            if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                values = values.cast(pa.large_binary())
            for value in values.to_pylist():
                yield _decode(value) if isinstance(value, bytes) else _check_text(value)


def _decode(value: bytes) -> tuple[str | None, str]:
    try:
        return value.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return None, "not UTF-8"


def _text_records(path: str, data: DataConfig) -> Iterator[tuple[str | None, str]]:
    with fsspec.open(path, "rb", compression="infer") as file:
        content = file.read()
    if data.text_unit == "file":
        units = [content]
    elif data.text_unit == "line":
        units = content.splitlines()
    else:
        units = re.split(rb"(?:\r?\n[ \t]*){2,}", content)
    for unit in units:
        if unit.strip():
            yield _decode(unit)


def raw_records(path: str, data: DataConfig) -> Iterator[tuple[str | None, str]]:
    """(text, "") or (None, reason) per record of a file; a damaged file is a UserError."""
    readers = {"json": _json_records, "parquet": _parquet_records, "text": _text_records}
    kind = _format(path)
    if not kind:
        raise UserError(f"{path}: not a .jsonl, .json, .parquet or .txt file")
    number = 0
    try:
        for record in readers[kind](path, data):
            number += 1
            yield record
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: truncated, damaged or unreadable after record {number}"
            f" ({' '.join(str(error).split())})"
        ) from None
    except httpx2.HTTPError as error:
        raise UserError(
            f"{path}: connection lost after record {number} ({error}); finished domains are kept,"
            " run again"
        ) from None


def read_texts(
    data: DataConfig, domain: str, files: list[str], counts: Counter, read: set[str]
) -> Iterator[str]:
    """Texts of a domain's raw records `first_document` .. + `num_documents`.

    counts["read"] and counts["broken"] are filled on the way, `read` gets the files opened.
    Raises UserError naming file and record beyond data.max_broken_records broken records, and if
    every record is broken.
    """
    path, number, why = "", 0, ""
    stop = data.first_document + data.num_documents if data.num_documents else None
    records = _numbered_records(files, data, read)
    for path, number, text, reason in itertools.islice(records, data.first_document, stop):
        counts["read"] += 1
        if text is not None:
            yield text
            continue
        counts["broken"], why = counts["broken"] + 1, reason
        if counts["broken"] > data.max_broken_records:
            raise UserError(
                f"{path}: record {number} of domain {domain} is broken ({why}); more than"
                f" data.max_broken_records = {data.max_broken_records}"
            )
    if counts["read"] and counts["broken"] == counts["read"]:
        raise UserError(f"{path}: every record of domain {domain} is broken, the last one: {why}")


def _numbered_records(
    files: list[str], data: DataConfig, read: set[str]
) -> Iterator[tuple[str, int, str | None, str]]:
    for path in files:
        read.add(path)
        for number, (text, why) in enumerate(raw_records(path, data), 1):
            yield path, number, text, why


# --- cleaning --------------------------------------------------------------------------------

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


def filter_texts(
    texts: Iterable[str], data: DataConfig, domain: str, counts: Counter
) -> list[tuple[str, str]]:
    """(document id, cleaned text) of a domain's kept documents, sorted by id; drops are counted.

    The verdict on a document never depends on the order of `texts`: duplicates are judged in the
    order of ids and the first is kept.
    """
    kept = []
    for raw in texts:
        text = clean_text(raw, data)
        if len(text) < max(1, data.min_characters):
            counts["too_short"] += 1
        elif data.min_script_share and script_share(text, domain) < data.min_script_share:
            counts["wrong_script"] += 1
        else:
            kept.append((document_id(text), text))
    kept.sort()
    if data.exact_duplicates:
        kept = drop_exact_duplicates(kept, counts)
    if data.near_duplicate_threshold:
        kept = drop_near_duplicates(kept, data.near_duplicate_threshold, counts)
    return kept


def drop_exact_duplicates(
    documents: list[tuple[str, str]], counts: Counter
) -> list[tuple[str, str]]:
    """Documents whose text differs from every earlier one's in more than white space."""
    seen, kept = set(), []
    for name, text in documents:
        fingerprint = hashlib.sha256(" ".join(text.split()).encode()).digest()
        if fingerprint in seen:
            counts["exact_duplicate"] += 1
        else:
            seen.add(fingerprint)
            kept.append((name, text))
    return kept


def min_hash(text: str) -> MinHash:
    """MinHash of a text's set of character shingles (lower case, white space collapsed)."""
    # 4 bytes per character: shingles are plain byte slices.
    data = " ".join(text.lower().split()).encode("utf-32-le")
    width = 4 * SHINGLE_CHARACTERS
    shingles = {data[i : i + width] for i in range(0, max(4, len(data) - width + 4), 4)}
    result = MinHash(PERMUTATIONS, seed=1, hashfunc=xxhash.xxh32_intdigest)
    result.update_batch(shingles)
    return result


def lsh_bands(threshold: float) -> tuple[int, int]:
    """(bands, rows per band) that find a pair of similarity `threshold` with probability 0.99.

    A missed pair is worse than a spare candidate, which is compared anyway.
    """
    for rows in range(PERMUTATIONS // 2, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.99:
            return bands, rows
    return PERMUTATIONS, 1


def drop_near_duplicates(
    documents: list[tuple[str, str]], threshold: float, counts: Counter
) -> list[tuple[str, str]]:
    """Documents whose estimated Jaccard similarity to every kept earlier one is below threshold."""
    index = MinHashLSH(num_perm=PERMUTATIONS, params=lsh_bands(threshold))
    hashes: dict[int, MinHash] = {}
    for i, (_, text) in enumerate(documents):
        found = min_hash(text)
        if any(found.jaccard(hashes[j]) >= threshold for j in index.query(found)):
            counts["near_duplicate"] += 1
        else:
            hashes[i] = found
            index.insert(i, found)
    return [documents[i] for i in hashes]


def clean_key(config: Config) -> str:
    """Name of the folder of cleaned text: the hash of what decides it."""
    fields = {name: plain(getattr(config.data, name)) for name in CLEAN_FIELDS}
    return digest([fields, code_hash("tiered/cleaning.py", "tiered/domains.py")])


def clean_folder(config: Config, domain: str) -> Path:
    """Where a domain's cleaned text stands."""
    return Path(config.data.processed_dir) / ".clean" / clean_key(config) / domain


def clean_domain(config: Config, domain: str, overwrite: bool = False) -> Path:
    """The folder of a domain's cleaned text, made unless it is there and its source unchanged."""
    folder, data = clean_folder(config, domain), config.data
    if not overwrite and is_complete(folder):
        record = read_json(folder / "clean.json")
        if not source_changed(data, domain, record["source"]):
            verify(folder)
            return folder
    counts, read = Counter(), set()
    files = source_files(data, domain)
    documents = filter_texts(read_texts(data, domain, files, counts, read), data, domain, counts)
    dropped = {name: counts[name] for name in FILTERS}
    check_not_empty(domain, len(documents), counts["read"], dropped)
    record = {
        "domain": domain,
        "source": {"name": data.source, **source_record(data, files, read)},
        "read": counts["read"],
        "dropped": dropped,
        "documents": len(documents),
    }
    with atomic_folder(folder) as temporary:
        columns = dict(zip(("document_id", "text"), zip(*documents, strict=True), strict=True))
        pq.write_table(
            pa.table({k: pa.array(v, pa.large_string()) for k, v in columns.items()}),
            temporary / "documents.parquet",
        )
        write_json(temporary / "clean.json", record)
    return folder


def check_not_empty(domain: str, documents: int, read: int, dropped: dict[str, int]) -> None:
    """Raise UserError with the counts per filter if no document is left of a domain."""
    if not documents:
        parts = ", ".join(f"{name} {count}" for name, count in dropped.items())
        raise UserError(f"domain {domain}: no document is left of {read} read (dropped: {parts})")


def read_clean(config: Config, domain: str) -> tuple[list[str], list[str]]:
    """Document ids and texts of a cleaned domain, in the order of ids."""
    table = pq.read_table(clean_folder(config, domain) / "documents.parquet")
    return table["document_id"].to_pylist(), table["text"].to_pylist()
