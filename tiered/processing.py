"""Cleaned text -> tokenised, split documents per domain: the stages of process_dset.py.

Everything here is domain-local: what is stored of a domain is a function of its own raw text, the
config and the tokenizer, never of which other domains exist, of file order, or of the number of
worker processes. Deleting a domain therefore leaves every other domain's folder as it is.

    <processed_dir>/<key>/tokenizer/         the shared tokenizer
    <processed_dir>/<key>/<domain>/<split>/  Arrow, documents in the order of a salted hash
    <processed_dir>/<key>/manifest.json      all domains that are there
"""

import hashlib
from collections import Counter
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from tiered.cleaning import (
    BATCH_DOCUMENTS,
    FILTERS,
    check_not_empty,
    clean_domain,
    clean_folder,
    read_clean,
    source_changed,
    source_files,
)
from tiered.config import CANARY, SPLITS, Config, DataConfig
from tiered.data import (
    key_parts,
    processed_folder,
    processed_key,
    tokenizer_domains,
    tokenizer_part,
)
from tiered.store import (
    TOKENIZER_RECORD,
    UserError,
    atomic_folder,
    canonical_json,
    content_hash,
    digest,
    is_complete,
    read_json,
    seed_of,
    verify,
    write_json,
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
from tiered.workers import run_all

FEATURES = datasets.Features(
    {
        "document_id": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "token_bytes": datasets.List(datasets.Value("uint16")),
        "token_chars": datasets.List(datasets.Value("uint16")),
    }
)


# --- splits ----------------------------------------------------------------------------------


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
    texts = []
    clean_domains(config, pool, _training_domains(config))
    for domain in tokenizer_domains(config):
        trained_on[domain] = content_hash(clean_folder(config, domain))
        ids, documents = read_clean(config, domain)
        texts += [documents[i] for i in split_order(ids, config.data)["router"]]
    return fast_tokenizer(train_bpe(texts, config.tokenizer.vocab_size)), trained_on


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


def choose_canaries(domain: str, data: DataConfig) -> dict[str, int]:
    """Canary id -> times it occurs in train, fewest first; references, with 0, last."""
    if not data.canaries or (data.repeat_domains and domain not in data.repeat_domains):
        return {}
    times = [t for t, rows in sorted(data.canaries.items()) for _ in range(rows)]
    times += [0] * data.canary_references
    return {f"{CANARY}-{i:05d}": t for i, t in enumerate(times)}


def canary_table(
    train: pa.Table, names: list[str], domain: str, data: DataConfig, tokenizer: dict[str, Any]
) -> pa.Table:
    """Documents of T tokens that nobody wrote; no text stands under them: 0 bytes, 0 characters.

    Tokens are drawn uniformly from the fewest that make up 90 % of the domain's train tokens, so
    that the Level-1 router takes them for the domain's. (Canaries: arXiv:1802.08232.)
    """
    if not names:
        return FEATURES.arrow_schema.empty_table()
    flat = np.concatenate([c.flatten().to_numpy() for c in train["input_ids"].chunks])
    special = [tokenizer[name] for name in ("separator_id", "pad_id", "unk_id")]
    counts = np.bincount(flat[~np.isin(flat, [i for i in special if i is not None])])
    order = np.argsort(-counts, kind="stable")
    covered = np.cumsum(counts[order])
    frequent = order[: int(np.searchsorted(covered, 0.9 * covered[-1])) + 1]
    generator = np.random.default_rng(seed_of(data.split_seed, CANARY, domain))
    drawn = generator.choice(frequent, size=(len(names), data.block_size))
    zeros = np.zeros(data.block_size + 1, np.int64)
    ids = [np.append(row, tokenizer["separator_id"]) for row in drawn]
    return _batch_table(names, (ids, [zeros] * len(ids), [zeros] * len(ids)))


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
    check_not_empty(domain, sum(t.num_rows for t in tables.values()), clean["read"], dropped)
    budget = data.tokens_per_domain
    budget = budget.get(domain, 0) if isinstance(budget, dict) else budget
    tables["train"], spent = apply_budget(tables["train"], budget)
    train_ids = tables["train"]["document_id"].to_pylist()
    repeats = choose_repeats(train_ids, table_lengths(tables["train"]), domain, data)
    canaries = choose_canaries(domain, data)
    tables[CANARY] = canary_table(tables["train"], list(canaries), domain, data, encoder.record)
    extra = {"train": repeats, CANARY: canaries}
    summaries = {s: split_summary(table, extra.get(s, {})) for s, table in tables.items()}
    if canaries:  # what is trained on has changed
        hashes = [summaries[s]["hash"] for s in ("train", CANARY)]
        summaries["train"]["hash"] = digest(hashes, 64)
    manifest = clean | {"dropped": dropped, "splits": summaries, "repeats": repeats, **spent}
    manifest["canaries"] = canaries
    manifest["tokenizer_hash"] = encoder.record["hash"]
    with atomic_folder(folder / domain) as temporary:
        for split, table in tables.items():
            save_split(table, temporary / split, summaries[split]["hash"])
        write_json(temporary / "manifest.json", manifest)


# --- stages -----------------------------------------------------------


def clean_again(config: Config, domain: str) -> None:
    """clean_domain under config.overwrite."""
    clean_domain(config, domain, overwrite=True)


def clean_domains(
    config: Config, pool: Executor | None, domains: list[str], overwrite: bool = False
) -> None:
    """Make the cleaned text of these domains where it is not there yet."""
    function = clean_again if overwrite else clean_domain
    run_all([(function, config, d) for d in domains], pool, "clean", "domain")


def clean_present_domains(config: Config, pool: Executor | None) -> None:
    """Cleaned text of the present domains, except those whose processed data is already there."""
    record = processed_folder(config) / "tokenizer" / TOKENIZER_RECORD
    tokenizer_hash = read_json(record)["hash"] if record.is_file() else ""
    domains = [d for d in config.processed_domains if not domain_done(config, d, tokenizer_hash)]
    clean_domains(config, pool, domains, config.overwrite)


def tokenize_domains(config: Config, pool: Executor | None, tokenizer_hash: str) -> list[str]:
    """Processed data of the present domains; returns those that had to be made."""
    todo = [d for d in config.processed_domains if not domain_done(config, d, tokenizer_hash)]
    run_all([(tokenize_domain, config, d) for d in todo], pool, "tokenise", "domain")
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
    for domain in config.processed_domains:
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
