"""Utility and routing quality of a tiered model, per domain and macro.

Shapes: R rows, T tokens per row, S = T - 1 scored positions, N partitions.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from tiered.baselines.glider import Inside, glider_inputs
from tiered.config import ROUTED_INSIDE, Config, plain
from tiered.data import ProcessedData, Rows, unigram_log_probs
from tiered.metrics import UNDEFINED, bits_per_byte, maximal_nmi, partition_nmi
from tiered.mixtures import MIXTURES, Evidence, MixtureSettings, mix
from tiered.modeling_tiered import TieredForCausalLM, assign
from tiered.partition import PartitionMap
from tiered.record import SCORING_CODE, training_environment
from tiered.scoring import ScoreCache, TokenScores, score_prefixes, score_rows
from tiered.sealed import read_table
from tiered.store import code_hash, content_hash, digest, read_json

SCHEMA = 5
MAX_UNK_SHARE = 0.01  # rows above it print `undefined`: [UNK] hides the text it replaces


# Wraps items in a progress bar that names what is done and in which unit.
Progress = Callable[[Iterable, str, str], Iterable]


def plain_progress(items: Iterable, what: str, unit: str) -> Iterable:
    """No bar."""
    return items


@dataclass
class RowScores:
    """Sums per row (R,): nats, right predictions, scored tokens, their bytes and characters.

    extra: further statistics of each row (R,), by name.
    """

    rows: Rows
    scope: str
    loss_nats: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray
    num_bytes: np.ndarray
    num_chars: np.ndarray
    last_partition: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def mean_loss(self) -> np.ndarray:
        """L(x): mean nats per scored token of each row."""
        return self.loss_nats / self.tokens

    def bpb(self) -> float:
        """Bits per byte over all rows."""
        return bits_per_byte(float(self.loss_nats.sum()), float(self.num_bytes.sum()))

    def accuracy(self) -> float:
        """Top-1 next-token accuracy over all scored tokens."""
        return float(self.correct.sum() / self.tokens.sum())


def score_cache(config: Config, model_hashes: Mapping[int, str]) -> ScoreCache:
    """The store's row scores of some models, scored anew under `overwrite`."""
    folder = config.store_dir / "scores"
    return ScoreCache(folder, model_hashes, training_environment(config), config.overwrite)


def sum_rows(rows: Rows, scope: str, scores: TokenScores, assignment: torch.Tensor) -> RowScores:
    """Row sums over scored positions; bytes and characters are those of the predicted tokens."""
    scored = scores.scored
    nll = np.where(scored, scores.nll, 0).astype(np.float64)
    return RowScores(
        rows=rows,
        scope=scope,
        loss_nats=nll.sum(1),
        correct=(scores.correct & scored).sum(1),
        tokens=scored.sum(1),
        num_bytes=(rows.token_bytes[:, 1:] * scored).sum(1),
        num_chars=(rows.token_chars[:, 1:] * scored).sum(1),
        last_partition=assignment[:, -1].numpy(),
    )


@torch.inference_mode()
def router_scores(
    model: TieredForCausalLM,
    input_ids: np.ndarray,
    batch_rows: int,
    allowed: list[int] | None = None,
) -> torch.Tensor:
    """Partition scores (R, S, N) of every scored position, on the CPU."""
    device = next(model.partitions.parameters()).device
    ids = torch.from_numpy(np.ascontiguousarray(input_ids[:, :-1]))
    parts = [
        model.partition_scores(batch.to(device), allowed_partitions=allowed).cpu()
        for batch in ids.split(batch_rows)
    ]
    return torch.cat(parts)


def first_position(config: Config, scope: str) -> int:
    """The first scored position: those before the decision are left out only if so configured."""
    skip = scope == "sample" and config.router.early_positions == "skip"
    return config.router.context_tokens - 1 if skip else 0


def oracle_of(partitions: PartitionMap, rows: Rows) -> np.ndarray | None:
    """The partition (R,) that a row's label or (cluster) its whole document stands for; None where
    there is none: documents at random have no readable label, a novel domain has no partition."""
    if partitions.method == "random" or not partitions.touched(rows.domain):
        return None
    return partitions.assign(rows.domain, list(rows.document_ids))


def assignments(
    scores: torch.Tensor, scopes: Iterable[str], config: Config, oracle: np.ndarray | None
) -> dict[str, torch.Tensor]:
    """Partition (R, S) per scope; an undefined oracle is left out; -1 marks unscored positions."""
    chosen = {}
    for scope in scopes:
        if scope == "oracle":
            if oracle is not None:
                chosen[scope] = torch.from_numpy(oracle)[:, None].repeat(1, scores.shape[1])
            continue
        chosen[scope] = assign(scores, scope, config.router.context_tokens)
        chosen[scope][:, : first_position(config, scope)] = -1
    return chosen


def rows_table(scores: Iterable[RowScores], **columns: str) -> pa.Table:
    """Per-row scores as one Arrow table: every statistic can be recomputed from it."""
    tables, scores = [], list(scores)
    extra = sorted({name for s in scores for name in s.extra})
    for s in scores:
        n = len(s.loss_nats)
        constant = {"domain": s.rows.domain, "split": s.rows.split, "scope": s.scope, **columns}
        tables.append(
            pa.table(
                {
                    **{k: pa.array([v] * n, pa.string()) for k, v in constant.items()},
                    "document_id": pa.array(list(s.rows.document_ids), pa.string()),
                    "occurrences": s.rows.occurrences,
                    "loss_nats": s.loss_nats,
                    "correct": s.correct.astype(np.int64),
                    "tokens": s.tokens.astype(np.int64),
                    "bytes": s.num_bytes.astype(np.int64),
                    "characters": s.num_chars.astype(np.int64),
                    "last_partition": s.last_partition.astype(np.int64),
                    **{name: _extra(s, name) for name in extra},
                }
            )
        )
    return pa.concat_tables(tables)


def _extra(scores: RowScores, name: str) -> pa.Array:
    """A further statistic as a float64 column; null where it was not computed."""
    if name not in scores.extra:
        return pa.nulls(len(scores.loss_nats), pa.float64())
    return pa.array(scores.extra[name].astype(np.float64))


def read_rows(
    path: Path, rows: Mapping[tuple[str, str], Rows], scope: str
) -> dict[tuple[str, str], RowScores]:
    """Row scores of a stored table, of rows by (split, domain) as they were scored."""
    table = read_table(path)
    splits, domains = (np.array(table[c].to_pylist()) for c in ("split", "domain"))
    numbers = [c for c in table.column_names if not pa.types.is_string(table[c].type)]
    columns = {c: table[c].to_numpy() for c in numbers}
    fixed = {"occurrences", "loss_nats", "correct", "tokens", "bytes", "characters"}
    further = sorted(columns.keys() - fixed - {"last_partition"})
    found = {}
    for (split, domain), scored in rows.items():
        here = (splits == split) & (domains == domain)
        values = {c: v[here] for c, v in columns.items()}
        found[split, domain] = RowScores(
            rows=scored,
            scope=scope,
            loss_nats=values["loss_nats"],
            correct=values["correct"],
            tokens=values["tokens"],
            num_bytes=values["bytes"],
            num_chars=values["characters"],
            last_partition=values["last_partition"],
            extra={c: values[c] for c in further if not np.isnan(values[c]).all()},
        )
    return found


def unigram_bpb(log_probs: np.ndarray, rows: Rows, first: int = 0) -> float:
    """Bits per byte of the domain's add-one smoothed unigram (V,) on positions from `first` on."""
    loss = -log_probs[rows.input_ids[:, 1 + first :]].sum()
    return bits_per_byte(float(loss), float(rows.token_bytes[:, 1 + first :].sum()))


def utility_of(scores: RowScores, unigram: float) -> dict[str, float]:
    """Utility figures of one domain under one scope; unigram: bits per byte on the same tokens."""
    nats = float(scores.loss_nats.sum())
    return {
        "bpb": round(scores.bpb(), 6),
        "unigram_bpb": round(unigram, 6),
        "bits_per_character": round(nats / (math.log(2) * float(scores.num_chars.sum())), 6),
        "perplexity": round(math.exp(nats / float(scores.tokens.sum())), 4),
        "accuracy": round(scores.accuracy(), 6),
        "tokens": int(scores.tokens.sum()),
    }


def routing_accuracy(
    scores: torch.Tensor, oracle: np.ndarray, context_lengths: Iterable[int]
) -> dict[str, float]:
    """Share of rows whose prefix of each length is routed to the oracle's partition (R,)."""
    hits = scores.argmax(-1) == torch.from_numpy(oracle)[:, None]
    lengths = [c for c in context_lengths if c <= scores.shape[1]]
    return {str(c): float(hits[:, c - 1].float().mean()) for c in lengths}


def partition_log_probs(
    model: TieredForCausalLM, rows: Rows, batch_rows: int, cache: ScoreCache | None
) -> torch.Tensor:
    """Log probability (R, S, N) float64 of every next token under every partition model; NaN where
    a partition has none."""
    shape = (len(rows.input_ids), rows.input_ids.shape[1] - 1)
    every = {str(k): torch.full(shape, k) for k in model.present}
    found = score_rows(model, rows.input_ids, every, batch_rows, cache)
    result = torch.full((*shape, len(model.config.partitions)), torch.nan, dtype=torch.float64)
    for k in model.present:
        result[..., k] = -torch.from_numpy(found[str(k)].nll).double()
    return result


def mixture_settings(config: Config) -> dict[str, tuple[str, MixtureSettings]]:
    """Every configured mixture by its label: its name and its settings."""
    section, found = config.eval, {}
    for name in section.mixtures:
        swept = name not in ("average", "hindsight", "parameter_average", *ROUTED_INSIDE)
        for top_k in section.top_k if swept else (0,):
            # one partition alone has weight 1 at every temperature
            warm = name == "distance" and top_k != 1
            for temperature in section.temperatures if warm else section.temperatures[:1]:
                label = name + (f" T={temperature:g}" if warm else "")
                label += f" top-{top_k}" if top_k else ""
                found[label] = (
                    name,
                    MixtureSettings(
                        temperature,
                        top_k,
                        section.distance_power,
                        section.routing_fraction,
                        section.likelihood,
                    ),
                )
    return found


def averaged_model(model: TieredForCausalLM) -> PreTrainedModel | None:
    """One model with the mean of the partition models' weights; None if their shapes differ."""
    states = [m.state_dict() for m in model.partitions.values()]
    shapes = [{k: v.shape for k, v in state.items()} for state in states]
    if any(s != shapes[0] for s in shapes):
        return None
    merged = copy.deepcopy(next(iter(model.partitions.values())))
    mean = {
        k: torch.stack([s[k].double() for s in states]).mean(0).to(v.dtype)
        for k, v in states[0].items()
    }
    merged.load_state_dict(mean)
    return merged.eval()


def score_mixtures(
    config: Config,
    model: TieredForCausalLM,
    rows: Rows,
    earlier: Rows,
    cache: ScoreCache | None = None,
    inside: Inside | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Summed nats per row (R,) of every configured mixture, from one pass of every partition; and
    those (R, N) of every partition alone, NaN where it is absent (None: none was needed).

    earlier: rows that make the cached prior; inside: the model that routes its experts itself.
    Weights of a position come from tokens up to it.
    """
    wanted, batch_rows = mixture_settings(config), config.eval.batch_rows
    results = {}
    if "parameter_average" in wanted:
        del wanted["parameter_average"]
        merged = averaged_model(model)
        if merged is not None:
            ids = torch.from_numpy(np.ascontiguousarray(rows.input_ids))
            nll = score_prefixes(merged, ids, ids.shape[1] - 1, batch_rows)["nll"]
            results["parameter_average"] = nll.double().sum(1).numpy()
    for name in ROUTED_INSIDE:
        if name in wanted:
            del wanted[name]
            results[name] = score_inside(config, inside, rows.input_ids, name).sum(1)
    if not wanted:
        return results, None
    cached = any(name == "bayes_cached" for name, _ in wanted.values())
    log_probs = partition_log_probs(model, rows, batch_rows, cache)
    evidence = Evidence(
        scores=router_scores(model, rows.input_ids, batch_rows),
        log_probs=log_probs,
        earlier=partition_log_probs(model, earlier, batch_rows, cache) if cached else log_probs[:0],
        present=tuple(model.present),
        metric=model.router.embedder.config.metric,
    )
    for label, (name, settings) in wanted.items():
        nats = mix(MIXTURES[name](evidence, settings), log_probs)
        results[label] = nats.sum(1).numpy()
    return results, -log_probs.sum(1).numpy()


@torch.inference_mode()
def score_inside(config: Config, inside: Inside, input_ids: np.ndarray, routing: str) -> np.ndarray:
    """Nats (R, S) float64 of tokens (R, T) under experts chosen in every linear map."""
    ids, parts = torch.from_numpy(np.ascontiguousarray(input_ids)), []
    for batch in ids.split(config.eval.batch_rows):
        tokens, given = batch[:, :-1].to(inside.model.device), {}
        if routing == "glider":
            given["cosines"] = inside.cosines(tokens)
        name = "none" if routing == "base" else routing
        logits = inside.model(tokens, routing=name, use_cache=False, **given).logits.float()
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten().to(logits.device), reduction="none"
        )
        parts.append(nll.view(len(batch), -1).double().cpu())
    return torch.cat(parts).numpy()


class ExpertTable:
    """Perplexity of every partition's model on rows of every group (a domain, or a cluster)."""

    def __init__(self) -> None:
        self._nats: dict[str, np.ndarray] = {}
        self._tokens: dict[str, int] = {}

    def add(self, groups: Iterable[str], nats: np.ndarray, tokens: int) -> None:
        """Rows of named groups: their nats (R, N) under each model; scored tokens per row."""
        for group, values in zip(groups, nats, strict=True):
            self._nats[group] = self._nats.get(group, 0) + values
            self._tokens[group] = self._tokens.get(group, 0) + tokens

    def as_json(self) -> dict[str, list[float | None]]:
        """group -> perplexity (N,) of each model, None where there is no model."""
        found = {g: np.exp(nats / self._tokens[g]) for g, nats in self._nats.items()}
        return {
            g: [None if np.isnan(p) else round(float(p), 4) for p in row]
            for g, row in found.items()
        }


def stream_of(config: Config) -> str:
    """The split whose rows make the cached prior: not the one that is scored."""
    return "validation" if config.eval.split != "validation" else "test"


def evaluate_mixtures(
    config: Config,
    data: ProcessedData,
    partitions: PartitionMap,
    model: TieredForCausalLM,
    cache: ScoreCache | None = None,
    progress: Progress = plain_progress,
    inside: Inside | None = None,
) -> tuple[dict[str, Any], pa.Table]:
    """Bits per byte and perplexity of every configured mixture, per domain and macro, with the
    perplexity of every partition's model on every domain and cluster; row sums.

    inside: the model of all experts that routes them itself, if a mixture asks for one.
    """
    domains: dict[str, Any] = {}
    tables = []
    experts = {"domain": ExpertTable(), "cluster": ExpertTable()}
    stream = stream_of(config)
    for domain in progress((*data.domains, *data.novel_domains), "mixtures", "domain"):
        rows = data.rows(domain, config.eval.split, config.eval.rows_per_domain)
        earlier = data.rows(domain, stream, config.eval.cached_rows)
        tokens, size = rows.input_ids.shape[1] - 1, rows.token_bytes[:, 1:].sum(1)
        # parameters of models of several shapes have no average
        domains[domain] = dict.fromkeys(mixture_settings(config), UNDEFINED)
        found, alone = score_mixtures(config, model, rows, earlier, cache, inside)
        if alone is not None:
            experts["domain"].add([domain] * len(alone), alone, tokens)
            oracle = oracle_of(partitions, rows)
            if partitions.method == "cluster" and oracle is not None:
                names = [str(k) for k in oracle]
                experts["cluster"].add(names, alone, tokens)
        for label, nats in found.items():
            tables.append(
                pa.table(
                    {
                        "domain": pa.array([domain] * len(nats), pa.string()),
                        "mixture": pa.array([label] * len(nats), pa.string()),
                        "document_id": pa.array(list(rows.document_ids), pa.string()),
                        "loss_nats": nats,
                        "tokens": np.full(len(nats), tokens, dtype=np.int64),
                        "bytes": size.astype(np.int64),
                    }
                )
            )
            if float(rows.unk_share.mean()) <= MAX_UNK_SHARE:
                domains[domain][label] = {
                    "bpb": round(bits_per_byte(float(nats.sum()), float(size.sum())), 6),
                    "perplexity": round(math.exp(nats.sum() / (tokens * len(nats))), 4),
                }
    perplexity = {name: table.as_json() for name, table in experts.items()}
    perplexity["cluster"] = dict(sorted(perplexity["cluster"].items(), key=lambda c: int(c[0])))
    settings = {
        label: {"name": name, "temperature": s.temperature, "top_k": s.top_k}
        for label, (name, s) in mixture_settings(config).items()
    }
    result = {"domains": domains, "settings": settings}
    result["macro"] = _mixture_macro([domains[d] for d in data.domains])
    if data.novel_domains:
        result["novel_macro"] = _mixture_macro([domains[d] for d in data.novel_domains])
    result["expert_perplexity"] = perplexity
    return result, pa.concat_tables(tables) if tables else pa.table({})


def _mixture_macro(domains: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of every mixture's figures over the domains where they are defined."""
    macro: dict[str, Any] = {}
    for label in domains[0]:
        cells = [d[label] for d in domains if d[label] != UNDEFINED]
        macro[label] = UNDEFINED
        if cells:
            macro[label] = {
                n: round(float(np.mean([c[n] for c in cells])), 6) for n in ("bpb", "perplexity")
            }
    return macro


# fields of eval that concern the expert pages alone
EXPERT_SETTINGS = ("expert_rows", "expert_ablations", "flow_tokens", "flow_texts")


def evaluation_key(
    config: Config, data: ProcessedData, partitions: PartitionMap, models: Mapping[int, str]
) -> str:
    """Hash of everything that can change utility.json; models: content hash per partition."""
    return digest(
        {
            "schema": SCHEMA,
            "models": {str(k): h for k, h in models.items()},
            "router": [content_hash(config.run_dir / "router"), plain(config.router)],
            "map": partitions.as_json()["hash"],
            "data": {
                d: [data.split_hash(d, s) for s in ("train", config.eval.split, stream_of(config))]
                for d in (*data.domains, *data.novel_domains)
            },
            "novel": data.novel_domains,
            "eval": {n: v for n, v in plain(config.eval).items() if n not in EXPERT_SETTINGS},
            "glider": glider_inputs(config, data),
            "environment": training_environment(config),  # LoRA experts are routed by their file
            "code": code_hash(*SCORING_CODE),
        }
    )


def finished(path: Path, inputs: str) -> dict[str, Any] | None:
    """A finished evaluation of equal inputs, or None; UserError where a file of it is damaged."""
    if not path.is_file():
        return None
    result = read_json(path)
    tables = ["rows.parquet", *(["mixtures.parquet"] if "mixtures" in result else [])]
    if result.get("inputs") != inputs or not all(path.with_name(t).is_file() for t in tables):
        return None
    for table in tables:
        read_table(path.with_name(table))
    return result


def evaluate(
    config: Config,
    data: ProcessedData,
    partitions: PartitionMap,
    model: TieredForCausalLM,
    cache: ScoreCache | None = None,
    progress: Progress = plain_progress,
) -> tuple[dict[str, Any], pa.Table]:
    """utility.json's content and the per-row table of a tiered model.

    Every domain is routed first; then a partition's model reads all rows that it needs to, so that
    the few short prefixes that stray into it from many domains share a forward pass.
    """
    domains, tables, decided, right = {}, [], [], []
    routed = {}
    for domain in progress((*data.domains, *data.novel_domains), "routing", "domain"):
        rows = data.rows(domain, config.eval.split, config.eval.rows_per_domain)
        oracle = oracle_of(partitions, rows)
        scores = router_scores(model, rows.input_ids, config.eval.batch_rows)
        chosen = assignments(scores, config.eval.scopes, config, oracle)
        decided.append(assign(scores, "sample", config.router.context_tokens)[:, -1].numpy())
        accuracy: Any = UNDEFINED
        if oracle is not None:
            accuracy = routing_accuracy(scores, oracle, config.eval.context_lengths)
            right.extend(decided[-1] == oracle)
        routed[domain] = rows, chosen, accuracy  # not the scores: N times as many numbers
    whole = score_rows(
        model,
        np.concatenate([rows.input_ids for rows, *_ in routed.values()]),
        {
            # a novel domain has no oracle: none of its positions is scored
            scope: torch.cat(
                [
                    chosen.get(scope, torch.full(rows.input_ids[:, 1:].shape, -1))
                    for rows, chosen, _ in routed.values()
                ]
            )
            for scope in config.eval.scopes
            if any(scope in chosen for _, chosen, _ in routed.values())
        },
        config.eval.batch_rows,
        cache,
        lambda wanted: progress(wanted, "scores", "partition"),
    )
    begin = 0
    for domain, (rows, chosen, accuracy) in routed.items():
        own = slice(begin, begin := begin + len(rows.input_ids))
        found = {s: sum_rows(rows, s, whole[s].rows(own), chosen[s]) for s in chosen}
        domains[domain] = _domain_entry(config, data, rows, found)
        domains[domain]["routing_accuracy"] = accuracy
        tables.append(rows_table(found.values()))
    result = {
        "schema": SCHEMA,
        "split": config.eval.split,
        "partitions": [list(group) for group in partitions.members],
        "method": partitions.method,
        "domains": domains,
        "macro": _macro([domains[d] for d in data.domains], config.eval.scopes),
        "routing": _routing(data.domains, partitions, decided[: len(data.domains)], right),
    }
    if data.novel_domains:
        result["novel_domains"] = list(data.novel_domains)
        novel = [domains[d] for d in data.novel_domains]
        result["novel_macro"] = _macro(novel, config.eval.scopes)
        sent = zip(data.novel_domains, decided[len(data.domains) :], strict=True)
        counts = {d: np.bincount(k, minlength=partitions.n).tolist() for d, k in sent}
        result["routing"]["novel"] = counts
    return result, pa.concat_tables(tables)


def _domain_entry(
    config: Config,
    data: ProcessedData,
    rows: Rows,
    found: dict[str, RowScores],
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "rows": len(rows.document_ids),
        "bytes": int(rows.token_bytes[:, 1:].sum()),
        "scopes": {},
    }
    log_probs = unigram_log_probs(data, rows.domain)
    for scope in config.eval.scopes:
        entry["scopes"][scope] = UNDEFINED
        if scope in found and float(rows.unk_share.mean()) <= MAX_UNK_SHARE:
            unigram = unigram_bpb(log_probs, rows, first_position(config, scope))
            entry["scopes"][scope] = utility_of(found[scope], unigram)
    return entry


def _macro(domains: list[dict[str, Any]], scopes: Iterable[str]) -> dict[str, Any]:
    """Mean over the domains whose figure is defined, with their number."""
    macro = {}
    for scope in scopes:
        cells = [c for c in (d["scopes"][scope] for d in domains) if c != UNDEFINED]
        if not cells:
            macro[scope] = UNDEFINED
            continue
        names = ("bpb", "unigram_bpb", "bits_per_character", "perplexity", "accuracy")
        macro[scope] = {n: round(float(np.mean([c[n] for c in cells])), 6) for n in names}
        gains = [1 - c["bpb"] / c["unigram_bpb"] for c in cells]
        macro[scope] |= {
            "gain_over_unigram": round(float(np.mean(gains)), 6),
            "domains": len(cells),
        }
    return macro


def _routing(
    domains: tuple[str, ...],
    partitions: PartitionMap,
    decided: list[np.ndarray],
    right: list[bool],
) -> dict[str, Any]:
    """Confusion (domain x partition, rows) of sample routing, its accuracy and NMI."""
    confusion = [np.bincount(k, minlength=partitions.n).tolist() for k in decided]
    labels = np.concatenate([np.full(len(k), i) for i, k in enumerate(decided)])
    routing: dict[str, Any] = {
        "confusion": confusion,
        "nmi": round(partition_nmi(labels, np.concatenate(decided)), 6),
        "maximal_nmi": round(maximal_nmi(partitions.n, len(domains)), 6),
        "sample_accuracy": round(float(np.mean(right)), 6) if right else UNDEFINED,
    }
    return routing
