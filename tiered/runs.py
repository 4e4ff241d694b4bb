"""Finished runs as the report reads them, and how a measure is printed."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tiered.store import UserError, content_hash, is_complete, read_json, read_sealed


@dataclass
class Run:
    """One finished experiment.

    unlearning: forget set -> operation -> measures; checks: claims and whether they hold;
    compartments: how far domains are kept apart, empty where it was not measured; missing: files
    that its stages leave and that are not there, so that something is not in the report.
    """

    folder: Path
    config: dict[str, Any]
    utility: dict[str, Any]
    unlearning: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
    compartments: dict[str, Any] = field(default_factory=dict)
    missing: list[Path] = field(default_factory=list)
    short_name: str = ""

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def n(self) -> int:
        return len(self.utility["partitions"])

    @property
    def domains(self) -> dict[str, Any]:
        """Utility per domain that models were trained on; `novel_domains` are others."""
        novel = self.utility.get("novel_domains", [])
        return {d: entry for d, entry in self.utility["domains"].items() if d not in novel}

    @property
    def scope(self) -> str:
        """The scope that unlearning is measured under."""
        return self.config["router"]["scope"]

    @property
    def gain(self) -> float:
        """Macro gain over the unigram under that scope; NaN where undefined in every domain."""
        figures = self.utility["macro"][self.scope]
        return math.nan if isinstance(figures, str) else figures["gain_over_unigram"]

    @property
    def label(self) -> str:
        """n and partition method, or the name where several runs of a report share those."""
        return self.short_name or f"n = {self.n} ({self.config['partition']['method']})"

    def measured(self, forget: str) -> dict[str, Any]:
        """Operations on a forget set that have numbers."""
        found = self.unlearning.get(forget, {})
        return {name: r for name, r in found.items() if "result" not in r}

    def of_operation(self, forget: str, operation: str, name: str) -> Path:
        """A file of an operation on a forget set."""
        return self.folder / "unlearn" / forget / operation / name


def load_run(folder: Path) -> Run:
    """A run with utility and, if it was measured, unlearning."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (config.yaml is missing)")
    if not (folder / "eval" / "utility.json").is_file():
        raise UserError(f"{folder}: no utility yet; run: python eval_det_router.py CONFIG")
    config = yaml.safe_load(read_sealed(folder / "config.yaml"))
    utility = read_json(folder / "eval" / "utility.json")
    for k, known in utility["models"].items():
        model = folder / "models" / k
        if not is_complete(model) or content_hash(model) != known:
            raise UserError(
                f"{model}: not the model that eval/utility.json is of (a part of a run folder?);"
                " run: python eval_det_router.py CONFIG"
            )
    metrics, apart = folder / "metrics.json", folder / "unlearn" / "compartments.json"
    found = read_json(metrics) if metrics.is_file() else {}
    if found.get("utility") and found["utility"]["models"] != utility["models"]:
        raise UserError(
            f"{metrics}: of other models than eval/utility.json; run: python unlearn_benchmarks.py"
            " CONFIG"
        )
    wanted = config["unlearn"]["compartments"] and apart.is_file()
    return Run(
        folder,
        config,
        utility,
        found.get("unlearning", {}),
        found.get("checks", []),
        read_json(apart) if wanted else {},
        _missing(folder, config),
    )


def _missing(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Files that a run has, by its config and its other files, unless it was copied in part or a
    stage is at work."""
    unlearned = any(folder.glob("unlearn/*/*/metrics.json"))
    expected = {
        "seed_lm/record.json": config["model"]["init_from"] == "seed",
        "partition/clusters/clusters.json": config["partition"]["method"] == "cluster",
        "eval/experts.json": config["eval"]["expert_rows"] > 0,
        "unlearn/compartments.json": unlearned and config["unlearn"]["compartments"],
        "metrics.json": unlearned,
    }
    return [folder / n for n, due in expected.items() if due and not (folder / n).is_file()]


def tell_apart(runs: list[Run]) -> None:
    """Give runs that share a label their names instead, without what all names begin with."""
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        prefix = runs[0].name.split("-")[0] + "-"
        shared = all(run.name.startswith(prefix) for run in runs)
        for run in runs:
            run.short_name = run.name.removeprefix(prefix) if shared else run.name


def cell(value: Any, digits: int = 3) -> str:
    """A number, an interval with its bounds, or the word that stands for it (none: None)."""
    value = "none" if value is None else value
    if isinstance(value, dict):
        return (
            f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value:.{digits}f}"


def point(value: Any) -> float:
    """The number of a measure; NaN where a word stands for it."""
    value = value["value"] if isinstance(value, dict) else value
    return math.nan if isinstance(value, str) else float(value)


def same_columns(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows with the columns of the longest, empty where a row has none."""
    columns = max(rows, key=len).keys() if rows else []
    return [{c: row.get(c, "") for c in columns} for row in rows]
