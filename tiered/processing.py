"""Raw text -> cleaned, tokenised, split documents per domain (process_dset.py).

Everything here is domain-local: what is stored of a domain is a function of its own raw text, the
config and the tokenizer, never of which other domains exist, of file order, or of the number of
worker processes. Deleting a domain therefore leaves every other domain's folder as it is.

    <processed_dir>/.clean/<key>/<domain>/   cleaned text in the order of document ids
    <processed_dir>/<key>/tokenizer/         the shared tokenizer
    <processed_dir>/<key>/<domain>/<split>/  Arrow, documents in the order of a salted hash
    <processed_dir>/<key>/manifest.json      all domains that are there
"""

import hashlib
import itertools
import json
import lzma
import os
import re
import threading
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import datasets
import fsspec
import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasketch import MinHash, MinHashLSH
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from tiered.config import SPLITS, Config, DataConfig, plain
from tiered.data import (
    key_parts,
    processed_folder,
    processed_key,
    tokenizer_domains,
    tokenizer_part,
)
from tiered.domains import script_share
from tiered.store import (
    UserError,
    atomic_folder,
    canonical_json,
    content_hash,
    digest,
    file_hash,
    is_complete,
    read_json,
    verify,
    write_json,
)

END, PAD = "<|endoftext|>", "<|pad|>"
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
TOKEN_FILTERS = ("unknown_tokens", "untokenizable")
# 5 characters: about a word of an alphabetic script and three of Chinese or Japanese.
SHINGLE_CHARACTERS = 5
PERMUTATIONS = 128
BATCH_DOCUMENTS = 1000
MAX_TOKEN_SPAN = np.iinfo(np.uint16).max
# Words of every script: marks (\p{M}: Indic vowel signs) and the two joiners stay with their
# letters. GPT-2's pattern breaks Devanagari at each vowel sign.
WORDS = (
    r" ?[\p{L}\p{M}\x{200C}\x{200D}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}\x{200C}\x{200D}]+"
    r"|\s+(?!\S)|\s+"
)
FEATURES = datasets.Features(
    {
        "document_id": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "token_bytes": datasets.List(datasets.Value("uint16")),
        "token_chars": datasets.List(datasets.Value("uint16")),
    }
)


# --- 1. source ---------------------------------------------------------------------------------


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


# --- 2. records ---------------------------------------------------------------------------------


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


# --- 3. cleaning --------------------------------------------------------------------------------

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
    return digest({name: plain(getattr(config.data, name)) for name in CLEAN_FIELDS})


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
    _check_not_empty(domain, len(documents), counts["read"], dropped)
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


def _check_not_empty(domain: str, documents: int, read: int, dropped: dict[str, int]) -> None:
    if not documents:
        parts = ", ".join(f"{name} {count}" for name, count in dropped.items())
        raise UserError(f"domain {domain}: no document is left of {read} read (dropped: {parts})")


def read_clean(config: Config, domain: str) -> tuple[list[str], list[str]]:
    """Document ids and texts of a cleaned domain, in the order of ids."""
    table = pq.read_table(clean_folder(config, domain) / "documents.parquet")
    return table["document_id"].to_pylist(), table["text"].to_pylist()


# --- 4. splits ----------------------------------------------------------------------------------


def positions(ids: list[str], seed: int) -> np.ndarray:
    """Salted hash of each document id, uniform in [0, 1), (documents,) float64."""
    digests = (hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8] for name in ids)
    # 53 bits: what a float64 holds exactly, so no position rounds up to 1.
    return np.array([(int.from_bytes(d) >> 11) / 2**53 for d in digests], dtype=np.float64)


def split_order(ids: list[str], data: DataConfig) -> dict[str, np.ndarray]:
    """Per split the indices of its documents, in the order of their salted hash."""
    place = positions(ids, data.split_seed)
    edges = np.cumsum([data.split_shares[split] for split in SPLITS]) / 100
    edges[-1] = 1.0
    which = np.searchsorted(edges, place, side="right")
    order = np.lexsort((np.array(ids), place))
    return {split: order[which[order] == k] for k, split in enumerate(SPLITS)}


# --- 5. tokenizer -------------------------------------------------------------------------------


def _words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level pieces, by byte value (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def train_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of `vocab_size` tokens, a function of the set of texts alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = _words(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    return tokenizer


def bytes_tokenizer() -> Tokenizer:
    """Tokenizer whose id is the byte; 256 ends a document, 257 pads."""
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = _words(), decoders.ByteLevel()
    tokenizer.add_special_tokens([END, PAD])
    return tokenizer


def _own_tokenizer(backend: Tokenizer) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(name: str, revision: str) -> Any:
    """The fast tokenizer of a folder or of the hub; raises UserError."""
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer

    folder = name
    try:
        if not Path(name).is_dir():
            # whole files first: a fault while AutoTokenizer reads them one by one can come out as
            # another tokenizer without an error.
            patterns = ["*.json", "*.txt", "*.model", "*.jinja"]
            folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except (OSError, ValueError, KeyError, httpx2.HTTPError) as error:
        raise UserError(
            f"tokenizer.name: cannot load {name!r} ({' '.join(str(error).split())[:300]})"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"tokenizer.name: {name!r} has no fast tokenizer (tokenizer.json)")
    tokenizer.split_special_tokens = True
    return tokenizer


def tokenizer_record(tokenizer: Any, name: str) -> dict[str, Any]:
    """What other stages know of a tokenizer: hash, size, and the ids they need."""
    separator = tokenizer.eos_token_id
    separator = tokenizer.sep_token_id if separator is None else separator
    if separator is None:
        raise UserError(f"tokenizer.name: {name!r} has neither an eos nor a sep token")
    pad = tokenizer.pad_token_id
    identity = {
        "separator_id": separator,
        "pad_id": separator if pad is None else pad,
        "unk_id": None if tokenizer.unk_token_id == separator else tokenizer.unk_token_id,
        "vocab_size": len(tokenizer),
    }
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # settings of a call (how to pad and cut), not of the tokenizer; this project never uses them.
    backend = {k: v for k, v in backend.items() if k not in ("padding", "truncation")}
    return {"name": name, "hash": digest([canonical_json(backend), identity]), **identity}


def make_tokenizer(config: Config, pool: Executor | None = None) -> dict[str, Any]:
    """The record of the config's tokenizer, which is made and saved unless it is there.

    bpe is trained on the router split of its training domains; it is made again if their cleaned
    text changed. Raises UserError if a training domain has no raw text.
    """
    folder = processed_folder(config) / "tokenizer"
    bpe = config.tokenizer.name == "bpe"
    if is_complete(folder) and not config.overwrite:
        verify(folder)
        record = read_json(folder / "tokenizer_record.json")
        if not bpe or not _training_text_changed(config, record["trained_on"]):
            return record
    tokenizer, trained_on = _new_tokenizer(config, pool)
    # of a folder the content counts (it is in the hash), not where it happened to stand.
    name = "folder" if "folder" in tokenizer_part(config) else config.tokenizer.name
    record = tokenizer_record(tokenizer, name) | {"trained_on": trained_on}
    with atomic_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "tokenizer_record.json", record)
    return record


def _new_tokenizer(config: Config, pool: Executor | None) -> tuple[Any, dict[str, str]]:
    """The config's tokenizer, and the domains it was trained on with their text's hash."""
    name, trained_on = config.tokenizer.name, {}
    if name == "bytes":
        return _own_tokenizer(bytes_tokenizer()), trained_on
    if name != "bpe":
        # a tokenizer of this project's making still saw the text it once was trained on.
        origin = Path(name) / "tokenizer_record.json"
        trained_on = read_json(origin)["trained_on"] if origin.is_file() else {}
        return load_tokenizer(name, config.tokenizer.revision), trained_on
    texts = []
    clean_domains(config, pool, _training_domains(config))
    for domain in tokenizer_domains(config):
        trained_on[domain] = content_hash(clean_folder(config, domain))
        ids, documents = read_clean(config, domain)
        texts += [documents[i] for i in split_order(ids, config.data)["router"]]
    return _own_tokenizer(train_bpe(texts, config.tokenizer.vocab_size)), trained_on


def _training_domains(config: Config) -> list[str]:
    """Training domains of bpe; UserError for an absent one that explains the ways out."""
    for domain in tokenizer_domains(config):
        if domain in config.present_domains or is_complete(clean_folder(config, domain)):
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


# --- 6. tokens ----------------------------------------------------------------------------------


class Encoder:
    """Token ids of a text with the UTF-8 bytes and characters under each token."""

    def __init__(self, folder: Path):
        self.record = read_json(folder / "tokenizer_record.json")
        self.backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend.no_padding()
        self.backend.no_truncation()
        # a special token's name in a text is text.
        self.backend.encode_special_tokens = True
        added = self.backend.get_added_tokens_decoder()
        self.special = np.array([i for i, token in added.items() if token.special], dtype=np.int32)
        decoder = json.loads(self.backend.to_str())["decoder"]
        self.byte_level = "ByteLevel" in json.dumps(decoder)
        if self.byte_level:
            self.bytes_of, self.chars_of = self._piece_tables(added)

    def _piece_tables(self, added: dict[int, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and characters (bytes that start one) of every token, (V,) int64 each."""
        value = {character: byte for byte, character in enumerate(byte_alphabet())}
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        tables = np.zeros((2, max(vocabulary.values()) + 1), dtype=np.int64)
        for piece, i in vocabulary.items():
            # added tokens are stored as text, pieces as one character per byte.
            raw = piece.encode() if i in added else [value.get(c, 0x80) for c in piece]
            tables[:, i] = len(raw), sum(byte & 0xC0 != 0x80 for byte in raw)
        return tables[0], tables[1]

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids, bytes, characters) per text, each (tokens,); the sums are the text's, exactly."""
        if not self.byte_level:
            return [self._by_offsets(text) for text in texts]
        results = []
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            token_bytes, token_chars = self.bytes_of[ids], self.chars_of[ids]
            exact = token_bytes.sum() == len(text.encode()) and token_chars.sum() == len(text)
            # a normaliser or an added first space: the pieces are not the text's own bytes.
            results.append((ids, token_bytes, token_chars) if exact else self._by_offsets(text))
        return results

    def _by_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As encode, from offsets: what no token covers goes to the following (or last) token."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        if not len(ids):
            return ids, np.zeros(0, np.int64), np.zeros(0, np.int64)
        ends = np.maximum.accumulate(np.array(encoding.offsets, dtype=np.int64)[:, 1])
        ends[-1] = len(text)
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        bytes_before = np.concatenate([[0], np.cumsum(widths)])
        return ids, np.diff(bytes_before[ends], prepend=0), np.diff(ends, prepend=0)

    def verdict(self, ids: np.ndarray, token_bytes: np.ndarray, max_unk_share: float) -> str:
        """The filter that drops a tokenised document, or "" if it is kept."""
        unk = self.record["unk_id"]
        if unk is not None and len(ids) and (ids == unk).mean() > max_unk_share:
            return "unknown_tokens"
        special = self.special[self.special != (-1 if unk is None else unk)]
        if not len(ids) or token_bytes.max() > MAX_TOKEN_SPAN or np.isin(ids, special).any():
            return "untokenizable"
        return ""


def tokenize_split(
    encoder: Encoder, documents: list[tuple[str, str]], max_unk_share: float, counts: Counter
) -> pa.Table:
    """Stored columns of a split's documents (FEATURES), each document with its separator."""
    batches = []
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        batch = documents[start : start + BATCH_DOCUMENTS]
        names, columns = [], ([], [], [])
        encoded = encoder.encode([text for _, text in batch])
        for (name, _), parts in zip(batch, encoded, strict=True):
            why = encoder.verdict(parts[0], parts[1], max_unk_share)
            if why:
                counts[why] += 1
                continue
            names.append(name)
            tails = (encoder.record["separator_id"], 0, 0)
            for column, part, tail in zip(columns, parts, tails, strict=True):
                column.append(np.append(part, tail))
        batches.append(_batch_table(names, columns))
    return pa.concat_tables(batches) if batches else FEATURES.arrow_schema.empty_table()


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


def apply_budget(table: pa.Table, budget: int) -> tuple[pa.Table, dict[str, Any]]:
    """The first documents until the budget (tokens; 0: all) is reached, and what was left over."""
    ends = np.cumsum(table_lengths(table))
    total = int(ends[-1]) if len(ends) else 0
    keep = len(ends) if not budget else min(len(ends), int(np.searchsorted(ends, budget)) + 1)
    used = int(ends[keep - 1]) if keep else 0
    return table.slice(0, keep), {
        "budget_tokens": budget,
        "unused": {"documents": len(ends) - keep, "tokens": total - used},
        "shortfall_tokens": max(0, budget - total),
    }


def choose_repeats(
    ids: list[str], lengths: np.ndarray, domain: str, data: DataConfig
) -> dict[str, int]:
    """Document id -> occurrences of its first T tokens in train, for the repeated member rows.

    The first train documents with at least T tokens, fewest times first. Raises UserError if
    there are too few.
    """
    if not data.repeats or (data.repeat_domains and domain not in data.repeat_domains):
        return {}
    long = (lengths > data.block_size).tolist()  # T tokens and the separator
    eligible = list(dict.fromkeys(name for name, fits in zip(ids, long, strict=True) if fits))
    wanted = [t for t, rows in sorted(data.repeats.items()) for _ in range(rows)]
    if len(wanted) > len(eligible):
        raise UserError(
            f"data.repeats: domain {domain} has {len(eligible)} train documents of at least"
            f" {data.block_size} tokens, {len(wanted)} are asked for"
        )
    return dict(zip(eligible, wanted, strict=False))


def split_summary(table: pa.Table, repeats: dict[str, int]) -> dict[str, Any]:
    """Counts and content hash of a split; the hash is of values, not of Arrow's bytes."""
    sha = hashlib.sha256(canonical_json([table["document_id"].to_pylist(), repeats]).encode())
    sha.update(table_lengths(table).astype("<i8").tobytes())
    sums = Counter()
    for name in ("input_ids", "token_bytes", "token_chars"):
        for chunk in table[name].chunks:
            flat = chunk.flatten().to_numpy()
            sha.update(np.ascontiguousarray(flat, dtype="<i4").tobytes())
            sums[name] += int(flat.sum(dtype=np.int64))
    return {
        "documents": table.num_rows,
        "tokens": int(table_lengths(table).sum()),
        "bytes": sums["token_bytes"],
        "characters": sums["token_chars"],
        "hash": sha.hexdigest(),
    }


def save_split(table: pa.Table, folder: Path, content: str) -> None:
    """datasets.save_to_disk with a fingerprint that is the content, so equal data is equal bytes.

    An empty split is not written: load_from_disk cannot read one.
    """
    if not table.num_rows:
        return
    datasets.Dataset(
        datasets.table.InMemoryTable(table),
        info=datasets.DatasetInfo(features=FEATURES),
        fingerprint=content[:16],
    ).save_to_disk(str(folder))


def domain_done(config: Config, domain: str, tokenizer_hash: str) -> bool:
    """Whether a domain's processed data is there, made by this tokenizer of this raw text."""
    folder = processed_folder(config) / domain
    if config.overwrite or not is_complete(folder):
        return False
    manifest = read_json(folder / "manifest.json")
    return manifest["tokenizer_hash"] == tokenizer_hash and not source_changed(
        config.data, domain, manifest["source"]
    )


def tokenize_domain(config: Config, domain: str) -> None:
    """Write a domain's processed data: tokenised splits and its manifest."""
    datasets.disable_progress_bars()
    data, folder = config.data, processed_folder(config)
    clean = read_json(clean_domain(config, domain) / "clean.json")
    encoder = Encoder(folder / "tokenizer")
    ids, texts = read_clean(config, domain)
    counts: Counter = Counter()
    tables = {
        split: tokenize_split(
            encoder, [(ids[i], texts[i]) for i in order], data.max_unk_share, counts
        )
        for split, order in split_order(ids, data).items()
    }
    dropped = clean["dropped"] | {name: counts[name] for name in TOKEN_FILTERS}
    _check_not_empty(domain, sum(t.num_rows for t in tables.values()), clean["read"], dropped)
    budget = data.tokens_per_domain
    budget = budget.get(domain, 0) if isinstance(budget, dict) else budget
    tables["train"], spent = apply_budget(tables["train"], budget)
    train_ids = tables["train"]["document_id"].to_pylist()
    repeats = choose_repeats(train_ids, table_lengths(tables["train"]), domain, data)
    summaries = {
        split: split_summary(table, repeats if split == "train" else {})
        for split, table in tables.items()
    }
    manifest = clean | {"dropped": dropped, "splits": summaries, "repeats": repeats, **spent}
    manifest["tokenizer_hash"] = encoder.record["hash"]
    with atomic_folder(folder / domain) as temporary:
        for split, table in tables.items():
            save_split(table, temporary / split, summaries[split]["hash"])
        write_json(temporary / "manifest.json", manifest)


# --- 7. the stages of process_dset.py -----------------------------------------------------------


@contextmanager
def workers(config: Config) -> Iterator[Executor | None]:
    """A pool of data.num_proc processes; None (this process) for one."""
    # spawn: a forked copy of a process whose tokenizer threads run can lock up.
    count = min(config.data.num_proc, len(config.data.domains))
    if count == 1:
        yield None
        return
    with ProcessPoolExecutor(count, get_context("spawn"), _end_with_parent) as pool:
        yield pool


def _end_with_parent() -> None:
    """Make a worker end when its parent is killed; it would wait for work for ever."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def for_domains(
    function: Callable[[Config, str], Any],
    config: Config,
    domains: list[str],
    pool: Executor | None,
    label: str,
) -> None:
    """Call function(config, domain) for each domain, in the pool's processes if there is one."""
    bar = tqdm(total=len(domains), desc=label, unit="domain", disable=None)
    with bar:
        if pool is None:
            for domain in domains:
                function(config, domain)
                bar.update()
            return
        futures = [pool.submit(function, config, domain) for domain in domains]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        finally:
            for future in futures:
                future.cancel()


def clean_again(config: Config, domain: str) -> None:
    """clean_domain under config.overwrite."""
    clean_domain(config, domain, overwrite=True)


def clean_domains(
    config: Config, pool: Executor | None, domains: list[str], overwrite: bool = False
) -> None:
    """Make the cleaned text of these domains where it is not there yet."""
    for_domains(clean_again if overwrite else clean_domain, config, domains, pool, "clean")


def clean_present_domains(config: Config, pool: Executor | None) -> None:
    """Cleaned text of the present domains, except those whose processed data is already there."""
    record = processed_folder(config) / "tokenizer" / "tokenizer_record.json"
    tokenizer_hash = read_json(record)["hash"] if record.is_file() else ""
    domains = [d for d in config.present_domains if not domain_done(config, d, tokenizer_hash)]
    clean_domains(config, pool, domains, config.overwrite)


def tokenize_domains(config: Config, pool: Executor | None, tokenizer_hash: str) -> list[str]:
    """Processed data of the present domains; returns those that had to be made."""
    todo = [d for d in config.present_domains if not domain_done(config, d, tokenizer_hash)]
    for_domains(tokenize_domain, config, todo, pool, "tokenise")
    return todo


def write_manifest(config: Config, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Merge the manifests of all complete domain folders made by this tokenizer, and write it."""
    folder = processed_folder(config)
    domains = {}
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
    for domain in config.present_domains:
        m = manifest["domains"][domain]
        splits = [m["splits"][split] for split in SPLITS]
        filtered = [m["dropped"][name] for name in (*FILTERS, *TOKEN_FILTERS)]
        numbers = [m["read"], *filtered, m["unused"]["documents"], m["shortfall_tokens"]]
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
