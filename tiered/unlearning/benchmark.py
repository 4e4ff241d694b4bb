"""The benchmark's flow: operations -> systems -> row scores -> metrics, each resumed by hash."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tiered import shared_trunk
from tiered.branching import has_own_seed, outside_folder, seed_domains
from tiered.config import Config, plain, plain_name
from tiered.data import ProcessedData, listed_documents
from tiered.evaluation import read_rows, rows_table
from tiered.metrics import UNDEFINED
from tiered.partition import make_partition_map
from tiered.record import SCORING_CODE, peak_memory_bytes, training_environment
from tiered.router import (
    check_router,
    load_router,
    missing_embedder,
    router_content,
    run_models,
)
from tiered.sealed import write_table
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
from tiered.unlearning.controls import control_draws
from tiered.unlearning.external import write_row_file
from tiered.unlearning.measures import Judge
from tiered.unlearning.operations import OPERATIONS
from tiered.unlearning.protocol import (
    Losses,
    Measured,
    ScoredRows,
    Scores,
    measure,
    router_losses,
    scored_rows,
)
from tiered.unlearning.robustness import (
    ROUNDING_BITS,
    relearn_curve,
    relearn_rows,
    rounded_rows,
    rounded_scores,
)
from tiered.unlearning.systems import (
    Context,
    Forget,
    NotApplicable,
    Outcome,
    load_system,
    write_system,
)
from tiered.unlearning.utility import alone
from tiered.workers import Call

SCHEMA = 2
CONTROLS = ("mask-random", "mask-massmatched")  # measured over several draws
_LOSSES = ("members", "holdout")
_CLAIMED = ("exact", "exact_given", "complete", "weights_removed", "residue")
# keys of unlearn that say what is done, not how one operation on one forget set is measured
_OF_THE_CALL = ("forget", "operations", "single_run", "compartments", "sequence")
_OF_THE_CALL += ("target", "gold", "original", "rows")
# What decides the measures of an operation besides row scores.
MEASURING_CODE = tuple(
    f"tiered/{name}.py"
    for name in (
        *("metrics", "statistics", "experts"),
        # purge and controls draw the random masks that metrics.json counts
        *(f"unlearning/{m}" for m in ("attacks", "benchmark", "controls", "measures", "purge")),
        *(f"unlearning/{m}" for m in ("robustness", "gradient")),  # what returns
    )
)


def forget_set(config: Config, data: ProcessedData, name: str) -> Forget:
    """What an entry of unlearn.forget names: a domain, or the file of some of its documents."""
    if name in config.all_domains:
        return Forget(name, name)
    listed = listed_documents(name)
    where = f"unlearn.forget: {name}"
    if config.data.exclude_documents:  # gold's own exclusion would take its place
        raise UserError(f"{where}: a run with data.exclude_documents cannot forget a file as well")
    if len(listed) > 1:
        raise UserError(f"{where} lists documents of {', '.join(listed)}; one domain per file")
    ((domain, names),) = listed.items()
    if domain not in data.domains:
        raise UserError(f"{where}: {domain!r} is not a present domain ({', '.join(data.domains)})")
    unknown = sorted(names - set(data.document_ids(domain, "train")))
    if unknown:
        raise UserError(
            f"{where}: {unknown[0]!r} is no train document of {domain} ({len(unknown)} of"
            f" {len(names)} are not; documents of other splits reach more than partition models)"
        )
    stem = plain_name("unlearn.forget", Path(name).stem, ("alone.json", "compartments.json"))
    return Forget(stem, domain, names, name)


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


def forget_sets(context: Context) -> list[Forget]:
    """The forget sets of a run, in order; UserError where two would share a folder."""
    config = context.config
    found = [forget_set(config, context.data, name) for name in config.unlearn.forget]
    names = [forget.name for forget in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"unlearn.forget: two entries are called {name!r}")
    return found


def seeded(context: Context, seed: int) -> Context:
    """The run's context under another seed; the partition map and the data stay."""
    return replace(context, config=replace(context.config, seed=seed))


def gold_seeds(config: Config) -> list[int]:
    """Seeds of the golds, the run's own first."""
    return [config.seed + i for i in range(config.unlearn.gold_seeds)]


def missing_gold_seeds(config: Config) -> dict[Path, Call]:
    """Calls that train the seed LMs that the gold retrains of a finished run still lack."""
    calls: dict[Path, Call] = {}
    if has_own_seed(config):
        for without in _gold_configs(config):
            calls |= missing_seeds(without)
    return calls


def missing_golds(config: Config) -> dict[Path, Call]:
    """Calls that train what else the gold retrains of a finished run still lack."""
    calls: dict[Path, Call] = {}
    context = open_run(config)
    for without in _gold_configs(config):
        standing = context.standing(without)
        wanted = [k for k in range(config.num_partitions) if k not in standing]
        calls |= missing_models(without, wanted) | missing_embedder(without)
    return calls


def _gold_configs(config: Config) -> Iterator[Config]:
    context = open_run(config)
    for forget in forget_sets(context):
        for seed in gold_seeds(config):
            yield seeded(context, seed).without(forget)


class Bench:
    """Every operation on one forget set: systems, row scores, measures; each resumed by hash."""

    def __init__(self, context: Context, forget: Forget, bar: Any = None) -> None:
        self.context, self.forget, self.bar = context, forget, bar
        self.scored = scored_rows(context, forget)
        self.names: list[str] = []  # in table order
        self.outcomes: dict[str, Outcome] = {}
        self.words: dict[str, str] = {}
        self.measured: dict[str, Measured] = {}
        self.keys: dict[str, str] = {}  # operation -> hash of what its row scores depend on
        self.router_losses: dict[str, Losses] = {}
        self.returned: dict[str, tuple[dict[str, Scores], dict[str, Any]]] = {}  # by their key
        self.alone = alone(context)

    def run(self) -> dict[str, Any]:
        """Measures of every operation: operation -> measures or words."""
        near, _ = self.context.neighbours(self.forget)
        # with what the ReCaLL attack reads before a row
        prefix = self.context.data.rows(self.forget.domain, "calibration", 1)
        rows = self.scored | {("calibration", self.forget.domain): prefix}
        write_row_file(self.folder("rows.jsonl"), rows, near)
        self._operate()
        for name, outcome in self.outcomes.items():
            self._say(f"{name}: scores")
            description = describe(self.context, self.forget, outcome, self.outcomes)
            seconds = write_system(self.folder(name) / "system", outcome, description)
            outcome.seconds += seconds * name.startswith("delete")
            self.measured[name] = self._measured(name)
        judge = Judge(self.context, self.forget, self.measured, self.alone)
        return {name: self._result(name, judge) for name in self.names}

    def folder(self, operation: str) -> Path:
        """Where an operation's results are kept, or what all of them share."""
        return self.context.config.run_dir / "unlearn" / self.forget.name / operation

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.forget.name}: {text}")

    def _operate(self) -> None:
        """Outcomes of all operations in table order, golds of other seeds after gold."""
        context, forget = self.context, self.forget
        for name in context.config.unlearn.operations:
            self._say(name)
            self.names.append(name)
            try:
                self.outcomes[name] = OPERATIONS[name](context, forget)
            except NotApplicable as reason:
                self.words[name] = str(reason)
            if name == "gold":
                for seed in gold_seeds(context.config)[1:]:
                    self._say(f"gold of seed {seed}")
                    outcome = OPERATIONS["gold"](seeded(context, seed), forget)
                    outcome.is_gold = True
                    self.names.append(f"gold-seed-{seed}")
                    self.outcomes[f"gold-seed-{seed}"] = outcome

    def _measured(self, name: str) -> Measured:
        """Row scores of an operation's system, from its rows.parquet if nothing has changed."""
        context, forget, outcome = self.context, self.forget, self.outcomes[name]
        folder, section = self.folder(name), context.config.unlearn
        passes = ("attacks", "min_k_share", "neighbours", "neighbour_swaps", "grad_norm_rows")
        passes += ("verbatim_rows",)
        key = digest(
            {
                "schema": SCHEMA,
                "system": outcome.identity(),
                "rows": [[*k, rows.hash()] for k, rows in self.scored.items()],
                "router_rows": context.data.split_hash(forget.domain, "router"),
                "calibration_rows": context.data.split_hash(forget.domain, "calibration"),
                "router": plain(context.config.router),
                "unlearn": {n: plain(getattr(section, n)) for n in passes},
                "seed": context.config.seed,
                "batch_rows": context.config.eval.batch_rows,
                "environment": training_environment(context.config),
                "code": code_hash(*SCORING_CODE),
            }
        )
        self.keys[name] = key
        inputs = folder / "inputs.json"
        stored = inputs.is_file() and (folder / "rows.parquet").is_file()
        if stored and read_json(inputs) == {"key": key} and not context.config.overwrite:
            return self._stored(name)
        # an operation may end with a system that another has made (sisa and gold, say)
        same = next((n for n in self.measured if self.keys[n] == key), None)
        measured = self.measured[same] if same else self._scored(outcome, folder / "system")
        inputs.unlink(missing_ok=True)
        write_table(folder / "rows.parquet", rows_table(measured.scores.values()))
        losses = (measured.router_members, measured.router_holdout)
        value = {n: None if v is None else v.tolist() for n, v in zip(_LOSSES, losses, strict=True)}
        write_json(folder / "router_losses.json", value)
        write_json(inputs, {"key": key})
        return measured

    def _scored(self, outcome: Outcome, system: Path) -> Measured:
        """Row scores of a system folder, by its models."""
        context, forget = self.context, self.forget
        model, hashes = load_system(context, system)
        scores = measure(context, self.scored, model, hashes, outcome.allowed)
        embedder = outcome.router / "embedder"
        embedder_hash = content_hash(embedder) if embedder.is_dir() else ""
        if embedder_hash not in self.router_losses:
            self.router_losses[embedder_hash] = router_losses(context, forget, model)
        return Measured(scores, *self.router_losses[embedder_hash])

    def _stored(self, name: str) -> Measured:
        """Measured from rows.parquet and router_losses.json."""
        folder, scope = self.folder(name), self.context.config.router.scope
        scores = read_rows(folder / "rows.parquet", self.scored, scope)
        losses = read_json(folder / "router_losses.json")
        arrays = [None if losses[n] is None else np.array(losses[n]) for n in _LOSSES]
        return Measured(scores, arrays[0], arrays[1])

    def _result(self, name: str, judge: Judge) -> dict[str, Any]:
        """metrics.json of an operation; measured again only if what it depends on has changed."""
        folder = self.folder(name)
        if name in self.words:
            shutil.rmtree(folder, ignore_errors=True)
            result = {"operation": name, "forget": self.forget.name, "result": self.words[name]}
            write_json(folder / "metrics.json", result)
            return result
        self._write_timings(name)
        key = digest(
            {
                "rows": {n: self.keys[n] for n in self.keys if n in (name, "original")}
                | {n: self.keys[n] for n in judge.golds},
                "operation": name,
                "alone": self._alone_key(),
                "config": _science(self.context.config),
                "code": code_hash(*MEASURING_CODE),
            }
        )
        path = folder / "metrics.json"
        if path.is_file() and not self.context.config.overwrite:
            known = read_json(path)
            if known.get("key") == key:
                return known
        self._say(f"{name}: measures")
        result = {"key": key, **self._facts(name)}
        result |= judge.metrics(name, bool(self.outcomes[name].changed))
        if name == "gold":
            result["envelope"] = judge.envelope()
        if self.context.config.unlearn.robustness:
            result["robustness"] = self._robustness(name, judge)
        if name in CONTROLS:
            draws = control_draws(self.context, self.forget, name, self.scored, folder / "system")
            result["draws"] = judge.draws(draws)
        write_json(path, result)
        return result

    def _alone_key(self) -> Any:
        found = self.alone or {}
        return {d: [v.unigram.tolist(), v.single.tolist()] for d, v in found.items()}

    def _robustness(self, name: str, judge: Judge) -> dict[str, Any]:
        """What rounding and relearning bring back; the curve against gold's."""
        rounded, curve = self._what_returns(name)
        found: dict[str, Any] = {r: judge.rounded(f"{name}, {r}", s) for r, s in rounded.items()}
        if curve:
            found["relearn"] = judge.relearnt(curve, self._what_returns("gold")[1])
        return found

    def _what_returns(self, name: str) -> tuple[dict[str, Scores], dict[str, Any]]:
        """Row scores under rounded weights, rounding by rounding, and the relearn curve; from their
        files unless what they depend on has changed."""
        context, forget, folder = self.context, self.forget, self.folder(name)
        section, scope = context.config.unlearn, context.config.router.scope
        used = ("robustness", "relearn_share", "relearn_steps", "relearn_learning_rate")
        used += ("batch_rows", "forget_rows")
        key = digest(
            {
                "rows": self.keys[name],
                "settings": {n: plain(getattr(section, n)) for n in used},
                "code": code_hash(
                    *(f"tiered/unlearning/{m}.py" for m in ("robustness", "gradient"))
                ),
            }
        )
        rows = rounded_rows(context, forget, self.scored)
        files = {r: folder / f"rows_{r}.parquet" for r in section.robustness if r in ROUNDING_BITS}
        path = folder / "robustness.json"
        if path.is_file() and not context.config.overwrite and read_json(path)["key"] == key:
            rounded = {r: read_rows(file, rows, scope) for r, file in files.items()}
            return rounded, read_json(path)["relearn"]
        self._say(f"{name}: robustness")
        path.unlink(missing_ok=True)
        if key not in self.returned:
            self.returned[key] = self._returning(name, rows)
        rounded, curve = self.returned[key]
        for rounding, file in files.items():
            write_table(file, rows_table(rounded[rounding].values()))
        write_json(path, {"key": key, "relearn": curve})
        return rounded, curve

    def _returning(self, name: str, rows: ScoredRows) -> tuple[dict[str, Scores], dict[str, Any]]:
        """Row scores of an operation's system under rounded weights, and its relearn curve."""
        context, forget, wanted = self.context, self.forget, self.context.config.unlearn.robustness
        model, hashes = load_system(context, self.folder(name) / "system")
        allowed, curve = self.outcomes[name].allowed, {}
        rounded = {
            r: rounded_scores(context, rows, model, hashes, allowed, ROUNDING_BITS[r])
            for r in wanted
            if r in ROUNDING_BITS
        }
        several = min(len(r.document_ids) for r in relearn_rows(context, forget))
        if "relearn" in wanted and several:  # last: it changes the model
            curve = relearn_curve(context, forget, model, allowed)
        return rounded, curve

    def _facts(self, name: str) -> dict[str, Any]:
        outcome, gold = self.outcomes[name], self.outcomes["gold"]
        system = read_json(self.folder(name) / "system" / "system.json")
        return {
            "schema": SCHEMA,
            "operation": name,
            "forget": self.forget.name,
            "config": digest(_science(self.context.config)),
            "seed": self.context.config.seed,
            "system": outcome.identity(),
            **{k: system[k] for k in _CLAIMED},
            "removed": outcome.removed,
            "rebuilt": outcome.rebuilt,
            "changed": outcome.changed,
            "cost": {
                "tokens": outcome.tokens,
                "tokens_relative_to_gold": round(outcome.tokens / gold.tokens, 6),
                "models_trained": sum(r.startswith("model/") for r in outcome.rebuilt),
            },
        }

    def _write_timings(self, name: str) -> None:
        """RTE: wall seconds of the operation alone (recorded seconds where parts were reused)."""
        outcome, gold = self.outcomes[name], self.outcomes["gold"]
        value = {
            "RTE_seconds": round(outcome.seconds, 4),
            "RTE_relative_to_gold": round(outcome.seconds / gold.seconds, 6),
            "reused": outcome.reused,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write_json(self.folder(name) / TIMINGS, value)


def describe(
    context: Context, forget: Forget, outcome: Outcome, outcomes: dict[str, Outcome]
) -> dict[str, Any]:
    """What is exact, what that rests on, and what still holds the domain.

    `exact`: every artefact of the system, those in `exact_given` apart, is bit for bit what gold
    has and no weight of the domain is left. A system with a map of its own is a gold itself.
    `complete`: it has a model for every partition that gold has one for; a dropped partition that
    held other domains too is missing, so that an exact system need not be gold.
    """
    gold = outcome if outcome.is_gold else outcomes["gold"]
    ids = {k: content_hash(path) for k, path in outcome.models.items()}
    gold_ids = {k: content_hash(path) for k, path in gold.models.items()}
    # its listed documents are of the train split, which trains no tokenizer
    in_tokenizer = not forget.documents and forget.domain in _tokenizer_domains(context)
    given = ["tokenizer"] if in_tokenizer else []
    if context.partitions.method == "cluster" and not outcome.is_gold:
        given.append("map")  # fitted with the domain, and kept: gold has the same
    outside = context.config.model.init_from and not has_own_seed(context.config)
    if outside:
        given.append("seed_lm")  # gold starts from the same
    if router_content(outcome.router) != router_content(gold.router):
        given.append("router")
    models_clean = all(gold_ids.get(k) == h for k, h in ids.items())
    if outside:  # where nothing is known of it, the claim rests on it
        models_clean &= forget.domain not in (seed_domains(outside_folder(context.config)) or [])
    exact = outcome.weights_removed and models_clean
    saw = _trunk_saw(context, forget) and not exact
    trunk = ["the trunk that all partitions share"] if saw else []
    trunk += [] if exact else _descendants(context, forget, outcome)
    return {
        "exact": exact,
        "exact_given": given if exact else [],
        "complete": ids.keys() == gold_ids.keys(),
        "weights_removed": outcome.weights_removed,
        "removed": outcome.removed,
        "rebuilt": outcome.rebuilt,
        "residue": [
            "raw, cleaned (.clean) and processed data",
            "the dataset library's cache",
            *trunk,
            f"the run the operation started from ({context.config.run_dir}) and its store",
            "logs and trackers",
            "other runs",
        ],
    }


def _trunk_saw(context: Context, forget: Forget) -> bool:
    """Whether weights that all partitions share were trained on the forget set."""
    founding = shared_trunk.founding(context.partitions)
    held = set(context.touched(forget)) & set(founding)
    return shared_trunk.is_shared(context.config) and bool(held)


def _descendants(context: Context, forget: Forget, outcome: Outcome) -> list[str]:
    """Models of an outcome that started from one that was trained on the forget domain."""
    found = []
    records = {k: path / "record.json" for k, path in outcome.models.items()}
    records = {k: read_json(path) for k, path in records.items() if path.is_file()}
    seeds = [(r.get("seed") or {}).get("domains") or [] for r in records.values()]
    if any(forget.domain in domains for domains in seeds):
        found.append("the seed LM that models started from")
    for k, record in records.items():
        start = record.get("started_from")
        if start and start["partition"] in context.touched(forget):
            found.append(f"model/{k}, which started from model/{start['partition']}")
    return found


def _tokenizer_domains(context: Context) -> list[str]:
    """Domains whose text trained the tokenizer; none if it came from outside."""
    return sorted(context.data.manifest["tokenizer"]["trained_on"])


def _science(config: Config) -> dict[str, Any]:
    """The config without what cannot change a result of one operation on one forget set."""
    value = plain(config)
    for key in _OF_THE_CALL:
        del value["unlearn"][key]  # single_run: what it measured stands in the key itself
    for key in ("output_dir", "overwrite", "name"):
        del value[key]
    for key in ("num_proc", "task", "task_count", "task_index", "processed_dir"):
        del value["data"][key]
    del value["training"]["num_proc"]
    return value


def print_table(config: Config, results: dict[str, Any]) -> None:
    """The few columns that tell the story, one line per operation."""
    about = f"{config.partition.method}, n = {config.partition.n}"
    print(f"{config.name} ({config.unlearn.target or about})")
    columns = ("UA", "UA_norm", "bpb test", "bpb near", "bpb far", "AUC", "verdict", "exact")
    widths = (8, 11, 10, 10, 9, 11, 17, 7)
    head = "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))
    print(f"{'forget':10}{'operation':18}{head}{'tokens':>12}")
    for forget, operations in results.items():
        for name, r in operations.items():
            if "result" in r:
                print(f"{forget:10}{name:18}{r['result']}")
                continue
            cells = r["AUC"].get("LOSS", {"all": UNDEFINED})
            repeated = cells[max(cells, key=lambda k: -1 if k == "all" else int(k))]
            retain = r["bpb"]["retain"]
            values = [r["UA"], r["UA_norm"], r["bpb"]["test"], retain["near"], retain["far"]]
            values += [repeated, r["verdict"]]
            tokens = "-"
            if "cost" in r:  # of a model from elsewhere nobody knows
                values.append("yes" if r["exact"] else "no")
                tokens = f"{r['cost']['tokens']:,}"
            else:
                values.append("-")
            line = "".join(f"{_cell(v):>{w}}" for v, w in zip(values, widths, strict=True))
            print(f"{forget:10}{name:18}{line}{tokens:>12}")


def _cell(value: Any) -> str:
    """A number with three decimals, an interval's value, or the word itself."""
    value = value["value"] if isinstance(value, dict) else value
    return value if isinstance(value, str) else f"{value:.3f}"
