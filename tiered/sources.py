"""Raw text of a domain: which files hold it, what identifies them, their records one by one.

Files of the hub are fetched whole before they are read (tiered/hub.py), one per process at a time.
"""

import contextlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import httpx2
import pyarrow as pa
import pyarrow.parquet as pq

from tiered.config import DataConfig
from tiered.hub import URL, exists, fetched, patiently
from tiered.store import UserError, file_hash

JSON_NAME = re.compile(r"\.jsonl?(\.(gz|bz2|xz))?$")
TEXT_NAME = re.compile(r"\.txt(\.(gz|bz2|xz))?$")
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
    """The load_dataset builder of a domain; UserError where there is none, or no answer."""
    where = f"data.source: {data.source}"
    local = Path(data.source).is_dir()

    def build() -> datasets.DatasetBuilder:
        try:
            return datasets.load_dataset_builder(data.source, name, revision=data.revision or None)
        except FileNotFoundError:
            # a lasting 503 or 429 comes out of datasets as this, too: ask the hub itself
            if local or not exists(data.source, data.revision):
                raise
            raise ConnectionError("the hub has it and does not give its files") from None

    try:
        return build() if local else patiently(f"{where}, domain {domain}", build)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"{where} has no configuration {name!r} for domain {domain}"
            f" ({' '.join(str(error).split())})"
        ) from None
    except (OSError, httpx2.HTTPError) as error:
        said = " ".join(str(error).split())
        if local:
            raise UserError(f"{where} has no files for domain {domain} ({said})") from None
        raise UserError(
            f"{where} is neither a folder here nor reachable on the hub for domain {domain}"
            f" ({said})"
        ) from None


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
            raise Damaged(
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


class Damaged(UserError):
    """A source file that cannot be read to its end."""


def raw_records(path: str, data: DataConfig) -> Iterator[tuple[str | None, str]]:
    """(text, "") or (None, reason) per record of a file. Raises Damaged."""
    readers = {"json": _json_records, "parquet": _parquet_records, "text": _text_records}
    kind = _format(path)
    if not kind:
        raise UserError(f"{path}: not a .jsonl, .json, .parquet or .txt file")
    number = 0
    try:
        with contextlib.ExitStack() as stack:
            file = path
            if URL.fullmatch(path):
                folder = Path(data.processed_dir) / ".fetched"
                file = str(stack.enter_context(fetched(path, folder)))
            for record in readers[kind](file, data):
                number += 1
                yield record
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
        raise Damaged(
            f"{path}: truncated, damaged or unreadable after record {number}"
            f" ({' '.join(str(error).split())})"
        ) from None
