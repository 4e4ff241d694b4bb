"""Measures of models from elsewhere: any Hugging Face causal LM folder, on a file of rows.

A row file has one JSON object a line (`docs/unlearning.md`, Bring your own model):

    split        forget, holdout, test, train or calibration
    domain       forget and holdout rows are of one domain, the forget domain
    text         tokenised by the target's tokenizer, the first `data.block_size` tokens; or
    input_ids, token_bytes, token_chars    as many tokens, UTF-8 bytes and characters under each
    document_id, occurrences, near         optional: a name, times in training, shares f's fate
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from tiered.config import Config
from tiered.data import Rows
from tiered.record import device_of
from tiered.store import UserError, digest, write_json, write_text
from tiered.tokenization import TOKENIZER_RECORD, Encoder, load_tokenizer, tokenizer_record
from tiered.unlearning.measures import Judge
from tiered.unlearning.protocol import (
    ATTACKED,
    Measured,
    ScoredRows,
    Scorer,
    Scores,
    check_readable,
    readable,
)
from tiered.unlearning.systems import Context, Forget

SPLITS = ("forget", "holdout", "test", "train", "calibration")
KEYS = {"split", "domain", "text", "input_ids", "token_bytes", "token_chars"}
KEYS |= {"document_id", "occurrences", "near"}
ARRAYS = ("input_ids", "token_bytes", "token_chars")


# ---------------------------------------------------------------- rows


def write_row_file(path: Path, scored: ScoredRows, near: Iterable[str]) -> None:
    """Rows of a protocol as a row file, so that others' models can be measured on them."""
    beside, lines = set(near), []
    for (split, domain), rows in scored.items():
        if split not in SPLITS:
            continue
        for i, name in enumerate(rows.document_ids):
            row = {"split": split, "domain": domain, "document_id": name}
            row |= {"occurrences": int(rows.occurrences[i]), "near": domain in beside}
            row |= {key: getattr(rows, key)[i].tolist() for key in ARRAYS}
            lines.append(json.dumps(row))
    text = "\n".join(lines) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


class RowFile:
    """Rows of a file, with the part of ProcessedData's interface that scoring needs."""

    def __init__(self, path: Path, block_size: int, encoder: Encoder, tokenizer: Any) -> None:
        self.path, self.block_size, self.tokenizer = path, block_size, tokenizer
        self.vocab_size, self.unk_id = len(tokenizer), encoder.record["unk_id"]
        self.short, self.near, found = 0, set(), {}
        for number, row in enumerate(self._lines(), 1):
            arrays = self._arrays(row, encoder, number)
            if len(arrays[0]) < block_size:
                self.short += 1
                continue
            if row.get("near"):
                self.near.add(row["domain"])
            default = int(row["split"] in ("forget", "train"))
            entry = (
                str(row.get("document_id", number)),
                *(a[:block_size] for a in arrays),
                int(row.get("occurrences", default)),
            )
            found.setdefault((row["split"], row["domain"]), []).append(entry)
        self.found = {key: self._rows(*key, entries) for key, entries in found.items()}
        self.domains = tuple(dict.fromkeys(domain for _, domain in self.found))

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            raise UserError(f"unlearn.rows: {self.path} does not exist")
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{self.path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: no JSON ({error})") from None
            if not isinstance(row, dict) or not row.keys() <= KEYS:
                unknown = sorted(row.keys() - KEYS) if isinstance(row, dict) else ["no object"]
                raise UserError(f"{where}: {unknown[0]!r}; keys are {', '.join(sorted(KEYS))}")
            if row.get("split") not in SPLITS or not row.get("domain"):
                raise UserError(f"{where}: needs a domain and a split of {', '.join(SPLITS)}")
            yield row

    def _arrays(
        self, row: dict[str, Any], encoder: Encoder, number: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        where = f"{self.path}:{number}"
        if "text" in row:
            return encoder.encode([row["text"]])[0]
        missing = [name for name in ARRAYS if name not in row]
        if missing:
            raise UserError(f"{where}: neither text nor {missing[0]}")
        arrays = [np.array(row[name], dtype=np.int64) for name in ARRAYS]
        if len({len(a) for a in arrays}) > 1:
            raise UserError(f"{where}: {', '.join(ARRAYS)} differ in length")
        if len(arrays[0]) and not 0 <= arrays[0].min() <= arrays[0].max() < self.vocab_size:
            raise UserError(f"{where}: a token id is outside the vocabulary of {self.vocab_size}")
        return arrays[0], arrays[1], arrays[2]

    def _rows(self, split: str, domain: str, entries: list[tuple]) -> Rows:
        names, ids, token_bytes, token_chars, times = zip(*entries, strict=True)
        stacked = np.stack(ids).astype(np.int64)
        unknown = stacked == (-1 if self.unk_id is None else self.unk_id)
        return Rows(
            domain=domain,
            split=split,
            document_ids=tuple(names),
            input_ids=stacked,
            token_bytes=np.stack(token_bytes).astype(np.int64),
            token_chars=np.stack(token_chars).astype(np.int64),
            occurrences=np.array(times, dtype=np.int64),
            unk_share=unknown.mean(1),
        )

    def rows(self, domain: str, split: str, count: int = 0) -> Rows:
        """Rows of a split in file order, at most `count` (0: all)."""
        if (split, domain) not in self.found:
            empty = np.zeros((0, self.block_size), dtype=np.int64)
            none = np.zeros(0)
            return Rows(domain, split, (), empty, empty, empty, none.astype(np.int64), none)
        rows = self.found[split, domain]
        return rows.only(np.full(len(rows.document_ids), True), count)

    def retained(self, forget: str) -> list[str]:
        """Domains other than the forget domain; it too, if train rows of it are to stay."""
        return [d for d in self.domains if d != forget or ("train", d) in self.found]

    def _lists(self, domain: str, split: str, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What `unigram_log_probs` counts: all rows of the domain, whatever their split, so that
        neighbours of members are not made of members' words alone."""
        values = [getattr(r, name).ravel() for (_, d), r in self.found.items() if d == domain]
        joined = np.concatenate(values)
        yield np.array([0, joined.size]), joined


# ---------------------------------------------------------------- models


class OneModel(nn.Module):
    """A causal LM as a tiered model of one partition: nothing is routed."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.partitions = nn.ModuleDict({"0": model})
        self.generate, self.device = model.generate, model.device

    def partition_scores(
        self, input_ids: torch.Tensor, allowed_partitions: list[int] | None = None
    ) -> torch.Tensor:
        """Zeros (B, T, 1)."""
        return torch.zeros(*input_ids.shape, 1)


def open_model(folder: str, key: str, config: Config, rows: RowFile) -> OneModel:
    """A model folder in evaluation mode; UserError where it cannot read the rows."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"unlearn.{key}: {folder} is no causal LM folder ({error})") from None
    longest = max(int(r.input_ids.max()) for r in rows.found.values())
    width = model.get_input_embeddings().num_embeddings
    if longest >= width:
        raise UserError(f"unlearn.{key}: {folder} has {width} token ids, the rows use {longest}")
    most = getattr(model.config, "max_position_embeddings", None)
    if most and most < rows.block_size:
        raise UserError(
            f"unlearn.{key}: {folder} reads {most} tokens, rows have {rows.block_size}; lower"
            " data.block_size"
        )
    # its own settings (a temperature, no repeated n-grams) say nothing of what it remembers
    model.generation_config = GenerationConfig()
    return OneModel(model.to(device_of(config)).eval())


def open_tokenizer(config: Config, folder: Path) -> tuple[Encoder, Any]:
    """The target's tokenizer and its encoder; the models compared must share it."""
    section, hashes = config.unlearn, {}
    for key in ("target", "gold", "original"):
        name = getattr(section, key)
        if name:
            tokenizer = load_tokenizer(name, "main")
            hashes[key] = tokenizer_record(tokenizer, name)["hash"]
            if key == "target":
                found = tokenizer
    for key, value in hashes.items():
        if value != hashes["target"]:
            raise UserError(
                f"unlearn.{key}: its tokenizer is not the target's; losses per token of the same"
                " rows cannot be compared"
            )
    found.save_pretrained(folder)
    write_json(folder / TOKENIZER_RECORD, tokenizer_record(found, "target"))
    return Encoder(folder), found


# ---------------------------------------------------------------- measures


@dataclass(frozen=True)
class RowContext(Context):
    """A context without a run: rows of a file, models from outside."""

    def neighbours(self, forget: Forget) -> tuple[list[str], list[str]]:
        """Retained domains that the file says are near, and others."""
        retained = self.retained(forget)
        near = [d for d in retained if d in self.data.near]
        return near, [d for d in retained if d not in near]

    def retained(self, forget: Forget) -> list[str]:
        """Domains of which the file has rows that should still be known."""
        return self.data.retained(forget.domain)


def scored_file(rows: RowFile, config: Config) -> tuple[Forget, ScoredRows]:
    """The forget domain of a row file and its rows, all of them, in the protocol's order."""
    forgets = [domain for split, domain in rows.found if split == "forget"]
    if len(forgets) != 1:
        found = ", ".join(forgets) or "none"
        raise UserError(f"{rows.path}: forget rows must be of one domain (found {found})")
    (f,) = forgets
    scored = {(split, f): rows.rows(f, split) for split in ("forget", "holdout", "test")}
    check_readable(scored.values())
    for d in rows.retained(f):
        parts = {split: rows.rows(d, split) for split in ("train", "test")}
        if all(readable(part) for part in parts.values()):
            scored |= {(split, d): part for split, part in parts.items()}
    for (split, domain), part in scored.items():
        if not part.document_ids:
            raise UserError(
                f"{rows.path}: no {split} row of {domain} with {rows.block_size} tokens"
                f" (data.block_size); {rows.short} rows are shorter"
            )
    return Forget(f, f), scored


def measure_external(config: Config) -> dict[str, dict[str, Any]]:
    """Measures of target, gold and (where given) original: system -> measures or words.

    Written to <run folder>/external/<target's path>/metrics.json, slashes as dashes.
    """
    section = config.unlearn
    for key in ("gold", "rows"):
        if not getattr(section, key):
            raise UserError(f"unlearn.{key}: a target is measured against it; name it")
    # the path in its name: a run's models are all called 0
    output = config.run_dir / "external" / re.sub(r"[^\w.=-]+", "-", section.target).strip("-")
    encoder, tokenizer = open_tokenizer(config, output / "tokenizer")
    rows = RowFile(Path(section.rows), config.data.block_size, encoder, tokenizer)
    forget, scored = scored_file(rows, config)
    context = RowContext(config, rows, None, {}, None)
    measured: dict[str, Measured] = {}
    for key in ("original", "gold", "target"):
        folder = getattr(section, key)
        if folder:
            model = open_model(folder, key, config, rows)
            measured[key] = Measured(_scores(context, scored, model), None, None)
    judge = Judge(context, forget, measured)
    results = {name: judge.metrics(name, edited=name == "target") for name in measured}
    value = {
        "forget": forget.domain,
        "models": {k: getattr(section, k) for k in ("target", "gold", "original")},
        "rows": {"file": section.rows, "hash": digest([r.hash() for r in scored.values()])},
        "shorter_rows_left_out": rows.short,
        "measures": results,
    }
    write_json(output / "metrics.json", value)
    return {forget.name: results}


def _scores(context: Context, scored: ScoredRows, model: OneModel) -> Scores:
    scorer = Scorer(context, model, None, None)
    return {key: scorer.rows(rows, key[0] in ATTACKED) for key, rows in scored.items()}
