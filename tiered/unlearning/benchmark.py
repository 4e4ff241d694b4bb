"""The benchmark's flow: operations -> systems -> row scores -> metrics, each resumed by hash."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tiered.branching import has_own_seed, outside_folder, seed_domains
from tiered.config import Config, plain
from tiered.data import ProcessedData
from tiered.evaluation import RowScores, rows_table, write_rows
from tiered.partition import make_partition_map
from tiered.record import SCORING_CODE, environment, peak_memory_bytes
from tiered.router import (
    check_router,
    load_router,
    missing_embedder,
    router_content,
    run_models,
)
from tiered.store import (
    TIMINGS,
    UserError,
    code_hash,
    content_hash,
    digest,
    read_json,
    verify,
    write_json,
)
from tiered.training import missing_models, missing_seeds
from tiered.unlearning.deletion import OPERATIONS, NotApplicable
from tiered.unlearning.protocol import (
    Losses,
    Measured,
    ScoredRows,
    measure,
    metrics,
    router_losses,
    scored_rows,
)
from tiered.unlearning.systems import Context, Outcome, load_system, write_system
from tiered.workers import Call

SCHEMA = 1


def open_run(config: Config) -> Context:
    """Context of a finished run; UserError naming the missing stage or a bad forget domain."""
    for key in ("training", "router"):
        if getattr(config, key).num_train_epochs < 1:
            raise UserError(
                f"{key}.num_train_epochs: below 1 some members were never trained on; unlearning"
                " is measured after at least one whole pass"
            )
    if has_own_seed(config) and 0 < config.seed_lm.num_train_epochs < 1:
        raise UserError(
            "seed_lm.num_train_epochs: below 1 some members were never trained on; unlearning is"
            " measured after at least one whole pass"
        )
    if config.training.split != "train":
        raise UserError(
            f"training.split: {config.training.split} is trained on, but members are rows of the"
            " train split; unlearning is measured after training on that"
        )
    if not config.unlearn.forget:
        raise UserError("unlearn.forget: name at least one forget domain, e.g. unlearn.forget=hi")
    for name in config.unlearn.forget:
        if name in config.data.exclude_domains:
            raise UserError(f"unlearn.forget: {name!r} is already in data.exclude_domains")
    if config.router.scope == "oracle":
        raise UserError(
            "router.scope: oracle routing needs the removed label; unlearning is measured under"
            " token or sample"
        )
    for operation in ("original", "gold"):
        if operation not in config.unlearn.operations:
            raise UserError(f"unlearn.operations: {operation!r} is needed to measure the others")
    partitions = make_partition_map(config)
    data = ProcessedData(config)
    load_router(config.run_dir / "router", "python train_det_router.py CONFIG")
    check_router(config, data, partitions)
    models = run_models(config, partitions, data)
    for folder in models.values():
        verify(folder)
    return Context(config, data, partitions, models, config.run_dir / "router")


def missing_gold_seeds(config: Config) -> dict[Path, Call]:
    """Calls that train the seed LMs that the gold retrains of a finished run still lack."""
    calls: dict[Path, Call] = {}
    if not has_own_seed(config):
        return calls
    open_run(config)
    for forget in config.unlearn.forget:
        calls |= missing_seeds(config.without(forget))
    return calls


def missing_golds(config: Config) -> dict[Path, Call]:
    """Calls that train what else the gold retrains of a finished run still lack."""
    open_run(config)
    calls: dict[Path, Call] = {}
    for forget in config.unlearn.forget:
        without = config.without(forget)
        calls |= missing_models(without, range(config.num_partitions)) | missing_embedder(without)
    return calls


def benchmark_domain(context: Context, forget: str, bar: Any = None) -> dict[str, Any]:
    """Metrics of every operation on one forget domain: operation -> metrics or words."""
    outcomes: dict[str, Outcome] = {}
    words: dict[str, str] = {}
    operation_seconds: dict[str, float] = {}
    for name in context.config.unlearn.operations:
        if bar is not None:
            bar.set_postfix_str(f"{forget}: {name}")
        begin = time.perf_counter()
        try:
            outcomes[name] = OPERATIONS[name](context, forget)
        except NotApplicable as reason:
            words[name] = str(reason)
        operation_seconds[name] = time.perf_counter() - begin
    measured: dict[str, Measured] = {}
    scored, losses = scored_rows(context, forget), {}
    for name, outcome in outcomes.items():
        folder = _folder(context, forget, name)
        begin = time.perf_counter()
        write_system(folder / "system", outcome, describe(context, forget, outcome, outcomes))
        outcome.seconds += (time.perf_counter() - begin) * (name.startswith("delete"))
        measured[name] = _measured(context, forget, scored, name, outcome, losses)
    results: dict[str, Any] = {}
    for name in context.config.unlearn.operations:
        folder = _folder(context, forget, name)
        if name in words:
            shutil.rmtree(folder, ignore_errors=True)
            results[name] = {"operation": name, "forget": forget, "result": words[name]}
        else:
            results[name] = _result(context, forget, name, outcomes, measured)
            _write_timings(folder, outcomes[name], outcomes["gold"])
        write_json(folder / "metrics.json", results[name])
    return results


def _folder(context: Context, forget: str, operation: str) -> Path:
    return context.config.run_dir / "unlearn" / forget / operation


def describe(
    context: Context, forget: str, outcome: Outcome, outcomes: dict[str, Outcome]
) -> dict[str, Any]:
    """What is exact, what that rests on, and what still holds the domain.

    `exact`: every artefact of the system, those in `exact_given` apart, is bit for bit what gold
    has and no weight of the domain is left. A system with a map of its own is a gold itself.
    """
    gold = outcome if outcome.own_map else outcomes["gold"]
    ids = {k: content_hash(path) for k, path in outcome.models.items()}
    gold_ids = {k: content_hash(path) for k, path in gold.models.items()}
    given = [] if forget not in _tokenizer_domains(context) else ["tokenizer"]
    if context.partitions.method == "cluster" and not outcome.own_map:
        given.append("map")  # fitted with the domain, and kept: gold has the same
    outside = context.config.model.init_from and not has_own_seed(context.config)
    if outside:
        given.append("seed_lm")  # gold starts from the same
    if router_content(outcome.router) != router_content(gold.router):
        given.append("router")
    models_clean = all(gold_ids.get(k) == h for k, h in ids.items())
    if outside:  # where nothing is known of it, the claim rests on it
        models_clean &= forget not in (seed_domains(outside_folder(context.config)) or [])
    exact = outcome.weights_removed and models_clean
    return {
        "exact": exact,
        "exact_given": given if exact else [],
        "weights_removed": outcome.weights_removed,
        "removed": outcome.removed,
        "rebuilt": outcome.rebuilt,
        "residue": [
            "raw, cleaned (.clean) and processed data",
            "the dataset library's cache",
            f"the run the operation started from ({context.config.run_dir}) and its store",
            "logs and trackers",
            "other runs",
        ],
    }


def _tokenizer_domains(context: Context) -> list[str]:
    """Domains whose text trained the tokenizer; none if it came from outside."""
    return sorted(context.data.manifest["tokenizer"]["trained_on"])


def _measured(
    context: Context,
    forget: str,
    scored: ScoredRows,
    name: str,
    outcome: Outcome,
    losses: dict[str, Losses],
) -> Measured:
    """Row scores of an operation's system, from its rows.parquet if nothing has changed.

    losses: those of routers already measured, by their content hash; this one's are added.
    """
    folder = _folder(context, forget, name)
    key = digest(
        {
            "schema": SCHEMA,
            "system": outcome.identity(),
            "rows": [[*k, rows.hash()] for k, rows in scored.items()],
            "router_rows": context.data.split_hash(forget, "router"),
            "router": plain(context.config.router),
            "batch_rows": context.config.eval.batch_rows,
            "environment": environment(context.config),
            "code": code_hash(*SCORING_CODE),
        }
    )
    inputs = folder / "inputs.json"
    stored = inputs.is_file() and (folder / "rows.parquet").is_file()
    if stored and read_json(inputs) == {"key": key} and not context.config.overwrite:
        return _read_measured(context, scored, folder)
    model, hashes = load_system(context, folder / "system")
    scores = measure(context, scored, model, hashes, outcome.allowed)
    embedder = outcome.router / "embedder"
    embedder_hash = content_hash(embedder) if embedder.is_dir() else ""
    if embedder_hash not in losses:
        losses[embedder_hash] = router_losses(context, forget, model)
    measured = Measured(scores, *losses[embedder_hash])
    inputs.unlink(missing_ok=True)
    write_rows(folder / "rows.parquet", rows_table(measured.scores.values()))
    _write_router_losses(folder, measured)
    write_json(inputs, {"key": key})
    return measured


def _write_router_losses(folder: Path, measured: Measured) -> None:
    losses = [measured.router_members, measured.router_holdout]
    names = ("members", "holdout")
    value = {n: None if v is None else v.tolist() for n, v in zip(names, losses, strict=True)}
    write_json(folder / "router_losses.json", value)


def _read_measured(context: Context, scored: ScoredRows, folder: Path) -> Measured:
    """Measured from rows.parquet and router_losses.json."""
    table = pq.read_table(folder / "rows.parquet")
    splits, domains = (np.array(table[c].to_pylist()) for c in ("split", "domain"))
    columns = {
        c: table[c].to_numpy()
        for c in ("loss_nats", "correct", "tokens", "bytes", "characters", "last_partition")
    }
    scores = {}
    for (split, domain), rows in scored.items():
        here = (splits == split) & (domains == domain)
        values = {c: v[here] for c, v in columns.items()}
        scores[split, domain] = RowScores(
            rows=rows,
            scope=context.config.router.scope,
            loss_nats=values["loss_nats"],
            correct=values["correct"],
            tokens=values["tokens"],
            num_bytes=values["bytes"],
            num_chars=values["characters"],
            last_partition=values["last_partition"],
        )
    losses = read_json(folder / "router_losses.json")
    arrays = [None if losses[n] is None else np.array(losses[n]) for n in ("members", "holdout")]
    return Measured(scores, arrays[0], arrays[1])


def _result(
    context: Context,
    forget: str,
    name: str,
    outcomes: dict[str, Outcome],
    measured: dict[str, Measured],
) -> dict[str, Any]:
    outcome, gold = outcomes[name], outcomes["gold"]
    system = read_json(_folder(context, forget, name) / "system" / "system.json")
    return {
        "schema": SCHEMA,
        "operation": name,
        "forget": forget,
        "config": digest(_science(context.config)),
        "seed": context.config.seed,
        "system": outcome.identity(),
        **{k: system[k] for k in ("exact", "exact_given", "weights_removed", "residue")},
        "removed": outcome.removed,
        "rebuilt": outcome.rebuilt,
        "cost": {
            "tokens": outcome.tokens,
            "tokens_relative_to_gold": round(outcome.tokens / gold.tokens, 6),
            "models_trained": sum(r.startswith("model/") for r in outcome.rebuilt),
        },
        **metrics(context, forget, measured, name),
    }


def _science(config: Config) -> dict[str, Any]:
    """The config without what cannot change a result."""
    value = plain(config)
    for key in ("output_dir", "overwrite", "name"):
        del value[key]
    for section, key in (("data", "num_proc"), ("data", "processed_dir"), ("training", "num_proc")):
        del value[section][key]
    return value


def _write_timings(folder: Path, outcome: Outcome, gold: Outcome) -> None:
    """RTE: wall seconds of the operation alone (recorded training seconds where reused)."""
    path = folder / TIMINGS
    write_json(
        path,
        {
            "RTE_seconds": round(outcome.seconds, 4),
            "RTE_relative_to_gold": round(outcome.seconds / gold.seconds, 6),
            "reused": outcome.reused,
            "peak_memory_bytes": peak_memory_bytes(),
        },
    )


def print_table(config: Config, results: dict[str, Any]) -> None:
    """The few columns that tell the story, one line per operation."""
    print(f"{config.name} ({config.partition.method}, n = {config.partition.n})")
    head = f"{'forget':8}{'operation':12}{'UA':>8}{'UA_norm':>11}{'bpb test':>10}{'bpb far':>9}"
    print(head + f"{'AUC x16':>11}{'exact':>7}{'tokens':>12}")
    for forget, operations in results.items():
        for name, r in operations.items():
            if "result" in r:
                print(f"{forget:8}{name:12}{r['result']}")
                continue
            cells = r["AUC"]["LOSS"]
            repeated = cells[max((k for k in cells if k != "all"), key=int)]
            print(
                f"{forget:8}{name:12}{r['UA']:8.3f}{_cell(r['UA_norm']):>11}"
                f"{r['bpb']['test']:10.3f}{_cell(r['bpb']['retain']['far']):>9}"
                f"{_cell(repeated):>11}{'yes' if r['exact'] else 'no':>7}"
                f"{r['cost']['tokens']:12,}"
            )


def _cell(value: Any) -> str:
    """A number with three decimals, an interval's value, or the word itself."""
    value = value["value"] if isinstance(value, dict) else value
    return value if isinstance(value, str) else f"{value:.3f}"
