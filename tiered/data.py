"""Reading processed data: packed blocks and scored rows per domain and split.

Legend: T tokens per block or row (data.block_size), V vocabulary. The folder of a config is
addressed by the hash of everything that can change its content (`processed_key`), so experiments
that agree on their data share one folder and configs that differ never meet.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tiered.config import CANARY, Config, plain
from tiered.store import (
    UserError,
    code_hash,
    digest,
    file_hash,
    is_complete,
    read_json,
    verify,
)

# Fields that say which domains are processed, how fast, or where to; none changes a domain's data.
UNKEYED = (
    *("domains", "added_domains", "novel_domains", "exclude_domains", "exclude_documents"),
    *("num_proc", "task", "task_count", "task_index", "processed_dir", "separate_documents"),
    "arriving",
)
PROCESSING_CODE = tuple(
    f"tiered/{name}.py"
    for name in ("cleaning", "domains", "hub", "processing", "sources", "tokenization")
)
# What a tokenizer folder may consist of; a model checkpoint beside it is not hashed.
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def tokenizer_domains(config: Config) -> tuple[str, ...]:
    """Domains whose router split trains the bpe tokenizer, in configured order."""
    return config.tokenizer.train_domains or config.data.domains


def tokenizer_part(config: Config) -> dict[str, Any]:
    """What of tokenizer.* decides the tokenizer: of a folder its content, never its path."""
    tokenizer = config.tokenizer
    if tokenizer.name == "bpe":
        domains = sorted(tokenizer_domains(config))
        size = {"vocab_size": tokenizer.vocab_size, "train_documents": tokenizer.train_documents}
        return {"name": "bpe", "train_domains": domains, **size}
    folder = Path(tokenizer.name)
    if tokenizer.name != "bytes" and folder.is_dir():
        files = sorted({p for pattern in TOKENIZER_FILES for p in folder.glob(pattern)})
        return {"folder": {p.name: file_hash(p) for p in files}}
    return {"name": tokenizer.name, "revision": tokenizer.revision}


def key_parts(config: Config) -> dict[str, Any]:
    """Every setting that can change the processed data of a domain, as JSON-ready mappings."""
    data = {k: v for k, v in plain(config.data).items() if k not in UNKEYED}
    code = code_hash(*PROCESSING_CODE)
    return {"data": data, "tokenizer": tokenizer_part(config), "code": code}


def processed_key(config: Config) -> str:
    """The name of the processed data's folder (16 hexadecimal digits)."""
    return digest(key_parts(config))


def processed_folder(config: Config) -> Path:
    """Where the processed data of a config stands."""
    return Path(config.data.processed_dir) / processed_key(config)


@functools.cache
def listed_documents(path: str) -> dict[str, frozenset[str]]:
    """Domain -> document ids of a file with a `domain/document_id` a line.

    Raises UserError for a file that is missing, empty, or has another kind of line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    found: dict[str, set[str]] = {}
    for number, line in enumerate(lines, 1):
        domain, slash, name = line.strip().partition("/")
        if line.strip() and not (domain and slash and name):
            raise UserError(f"{path}, line {number}: {line!r} is not `domain/document_id`")
        if line.strip():
            found.setdefault(domain, set()).add(name)
    if not found:
        raise UserError(f"{path}: lists no document")
    return {domain: frozenset(names) for domain, names in sorted(found.items())}


@dataclass(frozen=True)
class Rows:
    """Scored rows, one per document: its first T tokens.

    input_ids, token_bytes, token_chars (N, T) int64: tokens and the UTF-8 bytes and characters of
    the original text under each; occurrences (N,) int64: how often the row occurs in training
    (train: 1, or the configured times of a repeated row; canary: as configured, 0 for references;
    other splits: 0); unk_share (N,) float in
    [0, 1].
    """

    domain: str
    split: str
    document_ids: tuple[str, ...]
    input_ids: np.ndarray
    token_bytes: np.ndarray
    token_chars: np.ndarray
    occurrences: np.ndarray
    unk_share: np.ndarray

    def only(self, chosen: np.ndarray, count: int = 0) -> "Rows":
        """The chosen rows (R,) bool, at most `count` of them (0: all)."""
        places = np.flatnonzero(chosen)[: count or None]
        names = ("input_ids", "token_bytes", "token_chars", "occurrences", "unk_share")
        ids = tuple(self.document_ids[i] for i in places)
        return replace(self, document_ids=ids, **{n: getattr(self, n)[places] for n in names})

    def hash(self) -> str:
        """Hash of what is scored (ids, tokens, bytes, characters, occurrences), 16 digits."""
        sha = hashlib.sha256(digest([self.domain, self.split, list(self.document_ids)]).encode())
        for array in (self.input_ids, self.token_bytes, self.token_chars, self.occurrences):
            sha.update(repr(array.shape).encode())
            sha.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return sha.hexdigest()[:16]


class ProcessedData:
    """Processed data of a config's present domains, and of novel ones.

    Raises UserError naming the command to run if a domain is missing or incomplete; a folder that
    changed since it was written is noticed when its first split is read.
    """

    def __init__(self, config: Config):
        self.folder: Path = processed_folder(config)
        self.key: str = self.folder.name
        self.block_size: int = config.data.block_size
        self.domains: tuple[str, ...] = config.present_domains
        self.novel_domains: tuple[str, ...] = config.data.novel_domains
        command = f"run `python process_dset.py CONFIG` (experiment {config.name or 'unnamed'})"
        if not (self.folder / "manifest.json").is_file():
            raise UserError(f"{self.folder}: no processed data for this config; {command}")
        self.manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
        for domain in (*self.domains, *self.novel_domains):
            if domain not in self.manifest["domains"] or not is_complete(self.folder / domain):
                raise UserError(
                    f"{self.folder / domain}: processed data of domain {domain} is missing or"
                    f" incomplete; {command}"
                )
        info = self.manifest["tokenizer"]
        self.tokenizer_hash: str = info["hash"]
        self.vocab_size: int = info["vocab_size"]
        self.separator_id: int = info["separator_id"]
        self.pad_id: int = info["pad_id"]
        self.unk_id: int | None = info["unk_id"]
        self._verified: set[str] = set()
        self._tables: dict[tuple[str, str], pa.Table] = {}

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The shared tokenizer (PreTrainedTokenizerFast)."""
        from transformers import AutoTokenizer  # costs seconds: only where text is made or read

        return AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    def split_hash(self, domain: str, split: str) -> str:
        """Content hash of a split: document ids, tokens, bytes, characters, repeats."""
        return self.manifest["domains"][domain]["splits"][split]["hash"]

    def document_ids(self, domain: str, split: str) -> list[str]:
        """Ids of a split's documents in stored (hash) order."""
        column = self._column(domain, split, "document_id")
        return [] if column is None else column.to_pylist()

    def documents(self, domain: str, split: str, limit_tokens: int = 0) -> Iterator[np.ndarray]:
        """Tokens (int32) of one document after another in stored order, without its separator;
        only those that begin in the domain's first limit_tokens tokens (0: all)."""
        tokens = 0
        for offsets, values in self._lists(domain, split, "input_ids"):
            for begin, end in itertools.pairwise(offsets.tolist()):
                if limit_tokens and tokens >= limit_tokens:
                    return
                tokens += end - begin
                yield values[begin : end - 1]

    def blocks(
        self,
        domain: str,
        split: str = "train",
        keep: np.ndarray | None = None,
        limit_tokens: int = 0,
    ) -> np.ndarray:
        """Packed blocks (blocks, T) int32: documents in stored order, each with its separator.

        limit_tokens: only the domain's first so many tokens are used (0: all); keep:
        (documents,) bool, the documents of them that are packed (None: all). The tail that fills
        no block is dropped. In train the extra occurrences of kept repeated rows follow as whole
        blocks.
        """
        size = self.block_size
        parts, start, tokens = [], 0, 0
        for offsets, values in self._lists(domain, split, "input_ids"):
            count = len(offsets) - 1
            values = values[offsets[0] : offsets[-1]]
            if limit_tokens:
                values = values[: limit_tokens - tokens]
            tokens += len(values)
            if keep is not None:
                kept = np.repeat(keep[start : start + count], np.diff(offsets))
                values = values[kept[: len(values)]]
            parts.append(values)
            start += count
            if limit_tokens and tokens == limit_tokens:
                break
        whole = not limit_tokens
        assert keep is None or not whole or len(keep) == start, "keep masks the split's documents"
        stream = np.concatenate([np.zeros(0, np.int32), *parts])
        packed = stream[: len(stream) // size * size].reshape(-1, size)  # (blocks, T)
        if split != "train" or not self.manifest["domains"][domain]["repeats"]:
            return packed
        return np.concatenate([packed, self._extra_blocks(domain, keep)])

    def _extra_blocks(self, domain: str, keep: np.ndarray | None) -> np.ndarray:
        """Occurrences of kept repeated rows beyond the packed one, (blocks, T) int32."""
        occurrences = self._occurrences(domain, "train")
        if keep is not None:
            occurrences = np.where(keep, occurrences, 1)
        chosen = np.flatnonzero(occurrences > 1)
        rows = self._first_tokens(domain, "train", "input_ids", chosen)
        return np.repeat(rows, occurrences[chosen] - 1, axis=0).astype(np.int32)

    def canary_blocks(self, domain: str, keep: np.ndarray | None = None) -> np.ndarray:
        """Canaries as often as they occur in train, a block each, (blocks, T) int32; keep:
        (canaries,) bool, those that are taken (None: all)."""
        occurrences = self._occurrences(domain, CANARY)
        if keep is not None:
            occurrences = np.where(keep, occurrences, 0)
        chosen = np.flatnonzero(occurrences)
        rows = self._first_tokens(domain, CANARY, "input_ids", chosen)
        return np.repeat(rows, occurrences[chosen], axis=0).astype(np.int32)

    def packed(
        self,
        domain: str,
        split: str,
        partition: np.ndarray | None = None,
        limit_tokens: int = 0,
    ) -> np.ndarray:
        """Documents whose first T tokens all stand in blocks of their partition, (documents,) bool.

        partition: (documents,) index each document is packed under (None: all together);
        limit_tokens as for `blocks`. The others are cut by the dropped tail and do not count as
        members (a repeated one among them is trained on once less than configured).
        """
        lengths, size = self._lengths(domain, split), self.block_size
        if limit_tokens:
            lengths = np.diff(np.minimum(np.cumsum(lengths), limit_tokens), prepend=0)
        found = np.zeros(len(lengths), dtype=bool)
        partition = np.zeros(len(lengths), dtype=np.int64) if partition is None else partition
        for k in np.unique(partition):
            here = partition == k
            ends = np.cumsum(lengths[here])
            begins = ends - lengths[here]
            found[here] = begins + size <= ends[-1] // size * size
        return found

    def rows(self, domain: str, split: str, count: int = 0, only: np.ndarray | None = None) -> Rows:
        """The first T tokens of documents with at least T tokens (separator not counted).

        Those that occur most often in training come first, then stored order. At most `count` rows
        (0: all); only: (documents,) bool, the documents that may be chosen (None: all).
        """
        lengths = self._lengths(domain, split)
        occurrences = self._occurrences(domain, split)
        long = lengths > self.block_size  # T tokens and the separator
        chosen = np.flatnonzero(long if only is None else long & only)
        chosen = chosen[np.argsort(-occurrences[chosen], kind="stable")]
        chosen = chosen[:count] if count else chosen
        ids = self.document_ids(domain, split)
        input_ids, token_bytes, token_chars = (
            self._first_tokens(domain, split, name, chosen)
            for name in ("input_ids", "token_bytes", "token_chars")
        )
        unk = input_ids == (-1 if self.unk_id is None else self.unk_id)
        return Rows(
            domain=domain,
            split=split,
            document_ids=tuple(ids[i] for i in chosen),
            input_ids=input_ids,
            token_bytes=token_bytes,
            token_chars=token_chars,
            occurrences=occurrences[chosen],
            unk_share=unk.mean(axis=1),
        )

    def _column(self, domain: str, split: str, name: str) -> pa.ChunkedArray | None:
        """A stored column, memory-mapped; None if the split is empty."""
        from datasets import load_from_disk

        if domain not in self._verified:
            verify(self.folder / domain)
            self._verified.add(domain)
        if not self.manifest["domains"][domain]["splits"][split]["documents"]:
            return None
        if (domain, split) not in self._tables:
            self._tables[domain, split] = load_from_disk(self.folder / domain / split).data
        return self._tables[domain, split].column(name)

    def _lists(self, domain: str, split: str, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Per stored chunk: offsets (documents + 1,) into the chunk's flat values, no copy."""
        column = self._column(domain, split, name)
        for chunk in column.chunks if column is not None else ():
            yield chunk.offsets.to_numpy(), chunk.values.to_numpy()

    def _lengths(self, domain: str, split: str) -> np.ndarray:
        """Tokens per document with the separator, (documents,) int64."""
        parts = [np.diff(offsets) for offsets, _ in self._lists(domain, split, "input_ids")]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _occurrences(self, domain: str, split: str) -> np.ndarray:
        """How often a document's first row occurs in training, (documents,) int64."""
        if split == CANARY:  # in the order they are stored in
            return np.array(list(self.manifest["domains"][domain]["canaries"].values()), np.int64)
        count = self.manifest["domains"][domain]["splits"][split]["documents"]
        occurrences = np.full(count, int(split == "train"), dtype=np.int64)
        repeats = self.manifest["domains"][domain]["repeats"] if split == "train" else {}
        if repeats:
            # the first of equal ids: they differ only if duplicates were kept.
            ids, first = np.unique(np.array(self.document_ids(domain, split)), return_index=True)
            names = sorted(repeats)
            occurrences[first[np.searchsorted(ids, names)]] = [repeats[name] for name in names]
        return occurrences

    def _first_tokens(self, domain: str, split: str, name: str, chosen: np.ndarray) -> np.ndarray:
        """The first T entries of the chosen documents (indices in any order), (N, T) int64."""
        size = self.block_size
        result = np.zeros((len(chosen), size), dtype=np.int64)
        start = 0
        for offsets, values in self._lists(domain, split, name):
            here = np.flatnonzero((chosen >= start) & (chosen < start + len(offsets) - 1))
            begins = offsets[chosen[here] - start]
            result[here] = values[begins[:, None] + np.arange(size)]
            start += len(offsets) - 1
        return result


def position_ids(blocks: np.ndarray, separator_id: int) -> np.ndarray:
    """Positions that restart at 0 after each separator; same shape as blocks (..., T), int64."""
    index = np.arange(blocks.shape[-1])
    starts = np.zeros(blocks.shape, dtype=np.int64)
    starts[..., 1:] = np.where(blocks[..., :-1] == separator_id, index[1:], 0)
    return index - np.maximum.accumulate(starts, axis=-1)


def unigram_log_probs(data: ProcessedData, domain: str) -> np.ndarray:
    """Natural log of add-one smoothed token frequencies of a domain's train split, (V,) float64."""
    counts = np.ones(data.vocab_size, dtype=np.int64)
    for offsets, values in data._lists(domain, "train", "input_ids"):
        counts += np.bincount(values[offsets[0] : offsets[-1]], minlength=data.vocab_size)
    return np.log(counts) - np.log(counts.sum())
