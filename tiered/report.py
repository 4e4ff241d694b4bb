"""Tables, plots and one self-contained page from finished runs.

    python -m tiered.report runs/quickstart-n01 runs/quickstart-n16 --output runs/report

Reads each run's config.yaml, metrics.json, eval/utility.json, models/<k>/record.json and the
timings; writes tables/*.md, tables/*.csv, plots/*.png, plots/*.svg and index.html. Nothing is
computed here that is not a mean, a ratio or a comparison of stored numbers.
"""

import argparse
import base64
import csv
import html
import io
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml

from tiered.store import TIMINGS, UserError, read_json, write_text

matplotlib.rcParams["svg.hashsalt"] = "tiered"  # equal figures are equal files
MARKERS = {"oracle": ("o", "-"), "token": ("s", "--"), "sample": ("^", ":")}


@dataclass
class Run:
    """One finished experiment."""

    folder: Path
    config: dict[str, Any]
    utility: dict[str, Any]
    unlearning: dict[str, Any]
    short_name: str = ""

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def n(self) -> int:
        return len(self.utility["partitions"])

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


def tell_apart(runs: list[Run]) -> None:
    """Give runs that share a label their names instead, without what all names begin with."""
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        prefix = runs[0].name.split("-")[0] + "-"
        shared = all(run.name.startswith(prefix) for run in runs)
        for run in runs:
            run.short_name = run.name.removeprefix(prefix) if shared else run.name


def load_run(folder: Path) -> Run:
    """A run with utility and, if it was measured, unlearning."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (config.yaml is missing)")
    if not (folder / "eval" / "utility.json").is_file():
        raise UserError(f"{folder}: no utility yet; run: python eval_det_router.py CONFIG")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    metrics = folder / "metrics.json"
    unlearning = read_json(metrics)["unlearning"] if metrics.is_file() else {}
    return Run(folder, config, read_json(folder / "eval" / "utility.json"), unlearning)


# ---------------------------------------------------------------- tables


def cell(value: Any, digits: int = 3) -> str:
    """A number, an interval with its bounds, or the word that stands for it."""
    if isinstance(value, dict):
        return (
            f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else f"{value:.{digits}f}"


def size_table(runs: list[Run]) -> list[dict[str, str]]:
    """T1: parameters, tokens and steps of every run, summed over partition models."""
    rows = []
    for run in runs:
        paths = sorted((run.folder / "models").glob("*/record.json"))
        records = [read_json(path) for path in paths]
        counts = [record["parameters"] for record in records]
        steps = sorted({record["optimizer_steps"] for record in records})
        seed = run.folder / "seed_lm" / "record.json"
        parts = [path.parent for path in (*paths, *([seed] if seed.is_file() else []))]
        rows.append(
            {
                "experiment": run.name,
                "n": str(run.n),
                "models": str(len(records)),
                "parameters, all models": cell(sum(c["total"] for c in counts)),
                "non-embedding": cell(sum(c["non_embedding"] for c in counts)),
                "computed per token, one model": cell(counts[0]["computed_per_token"]),
                "selected per token, one model": cell(counts[0]["selected_per_token"]),
                "FLOPs per token, forward": cell(counts[0]["forward_flops_per_token"]),
                "training tokens": cell(sum(record["tokens"] for record in records)),
                "seed LM tokens": cell(read_json(seed)["tokens"] if seed.is_file() else "none"),
                "training seconds, all": cell(
                    round(sum(read_json(part / TIMINGS)["seconds"] for part in parts))
                ),
                "optimizer steps per model": f"{steps[0]:,} to {steps[-1]:,}",
                "batch rows": str(records[0]["batch_rows"]),
            }
        )
    return rows


def macro_table(runs: list[Run]) -> list[dict[str, str]]:
    """T2, macro: utility under every routing scope."""
    rows = []
    for run in runs:
        for scope in run.config["eval"]["scopes"]:
            figures = run.utility["macro"][scope]
            row = {"experiment": run.name, "n": str(run.n), "routing": scope}
            if isinstance(figures, str):
                rows.append({**row, "bits per byte": figures})
                continue
            rows.append(
                {
                    **row,
                    "bits per byte": cell(figures["bpb"]),
                    "unigram": cell(figures["unigram_bpb"]),
                    "below unigram": f"{figures['gain_over_unigram']:.1%}",
                    "bits per character": cell(figures["bits_per_character"]),
                    "accuracy": cell(figures["accuracy"]),
                    "routing accuracy": cell(run.utility["routing"]["sample_accuracy"]),
                }
            )
    return _same_columns(rows)


def partition_table(runs: list[Run]) -> list[dict[str, str]]:
    """T5: what a way of partitioning costs; clusters are compared with languages by NMI."""
    rows = []
    for run in runs:
        routing, macro = run.utility["routing"], run.utility["macro"]
        figures = {s: v["bpb"] if isinstance(v, dict) else v for s, v in macro.items()}
        found = _clusters(run)
        counts = np.array(list(found["train_documents"].values())) if found else None
        rows.append(
            {
                "experiment": run.name,
                "method": run.utility["method"],
                "n": str(run.n),
                "oracle bpb": cell(figures.get("oracle", "none")),
                "routed bpb": cell(figures[run.scope]),
                "routing accuracy": cell(routing["sample_accuracy"]),
                "NMI of routing and domain": cell(routing["nmi"]),
                "NMI of clusters and domain": cell(
                    found["nmi_with_domain"]["train"] if found else "none"
                ),
                # what removing one domain touches: models that hold at least one document of it
                "models per domain": cell(
                    (counts > 0).sum(1).mean() if found else _models_per_domain(run)
                ),
                "largest / mean partition, documents": cell(
                    counts.sum(0).max() / counts.sum(0).mean() if found else "none"
                ),
            }
        )
    return rows


def _models_per_domain(run: Run) -> float:
    """Partitions that hold data of a domain, mean over domains."""
    groups = run.utility["partitions"]
    return float(np.mean([sum(d in g for g in groups) for d in run.utility["domains"]]))


def mixture_table(runs: list[Run]) -> list[dict[str, str]]:
    """T6: bits per byte (macro) of every mixture beside the routed top-1."""
    labels = {label: None for r in runs for label in r.utility.get("mixtures", {}).get("macro", {})}
    rows = []
    for label in labels:
        row = {"mixture": label}
        for run in runs:
            if "mixtures" in run.utility:
                figures = run.utility["mixtures"]["macro"].get(label, "none")
                row[run.name] = cell(figures["bpb"] if isinstance(figures, dict) else figures)
        rows.append(row)
    return rows


def term_table(run: Run) -> list[dict[str, str]]:
    """Clusters of a run: training documents, the domains they come from, the top terms."""
    found = _clusters(run)
    counts = np.array(list(found["train_documents"].values()))  # (domains, clusters)
    domains = list(found["train_documents"])
    rows = []
    for k, terms in enumerate(found["top_terms"]):
        order = np.argsort(-counts[:, k], kind="stable")[:4]
        rows.append(
            {
                "cluster": str(k),
                "training documents": cell(int(counts[:, k].sum())),
                "from": " ".join(f"{domains[i]}:{counts[i, k]}" for i in order if counts[i, k]),
                "top terms": " ".join(f"“{_visible(term)}”" for term in terms),
            }
        )
    return rows


def _visible(term: str) -> str:
    """A term on one line, and safe in a Markdown table."""
    return term.replace("\n", "⏎").replace("\t", "⇥").replace("|", "\\|")


def _clusters(run: Run) -> dict[str, Any] | None:
    """The summary of a run's fitted map, if it has one."""
    path = run.folder / "partition" / "clusters" / "clusters.json"
    return read_json(path) if path.is_file() else None


def domain_table(runs: list[Run]) -> list[dict[str, str]]:
    """T2, per domain: bits per byte under the unlearning scope."""
    rows = []
    for domain in runs[0].utility["domains"]:
        row = {"domain": domain, "unigram": "undefined"}
        for run in runs:
            entry = run.utility["domains"].get(domain)
            figures = entry["scopes"][run.scope] if entry else "none"
            column = f"{run.name} ({run.scope} routing)"
            row[column] = figures if isinstance(figures, str) else cell(figures["bpb"])
            if not isinstance(figures, str):
                row["unigram"] = cell(figures["unigram_bpb"])
        rows.append(row)
    return rows


def unlearning_table(run: Run, forget: str) -> list[dict[str, str]]:
    """T3: every operation on one forget domain of one run."""
    rows = []
    for name, r in run.unlearning[forget].items():
        row = {"n": str(run.n), "operation": name}
        if "result" in r:
            rows.append({**row, "UA": r["result"]})
            continue
        timings = read_json(run.folder / "unlearn" / forget / name / "timings.json")
        rows.append(
            {
                **row,
                "UA": cell(r["UA"]),
                "UA_norm": cell(r["UA_norm"]),
                "RA near": cell(r["RA"]["near"]),
                "RA far": cell(r["RA"]["far"]),
                "TA near": cell(r["TA"]["near"]),
                "TA far": cell(r["TA"]["far"]),
                "TA_f": cell(r["TA_f"]),
                "MIA efficacy": cell(r["MIA_efficacy"]),
                "MIA efficacy, domain-shifted": cell(r["MIA_efficacy_domain_shifted"]),
                "bpb test f": cell(r["bpb"]["test"]),
                "bpb near": cell(r["bpb"]["retain"]["near"]),
                "bpb far": cell(r["bpb"]["retain"]["far"]),
                "bpb change near": cell(r["bpb_change"]["near"]),
                "bpb change far": cell(r["bpb_change"]["far"]),
                "gap to gold": cell(r["gap_to_gold"]),
                "far rows changed": r["far_rows_changed"],
                "verdict": r["verdict"],
                "exact": cell(r["exact"]),
                "exact given": ", ".join(r["exact_given"]) or ("nothing" if r["exact"] else "-"),
                "weights removed": cell(r["weights_removed"]),
                "tokens": cell(r["cost"]["tokens"]),
                "tokens / gold": cell(r["cost"]["tokens_relative_to_gold"]),
                "RTE s": cell(timings["RTE_seconds"]) + (" reused" if timings["reused"] else ""),
            }
        )
    return _same_columns(rows)


def attack_table(run: Run, forget: str) -> list[dict[str, str]]:
    """Membership attacks on every operation: AUC by how often members occurred, TPR, verdicts."""
    rows = []
    for name, r in _measured(run, forget).items():
        row = {"n": str(run.n), "operation": name}
        for attack, cells in r["AUC"].items():
            for times, value in cells.items():
                label = {"all": "", "1": " plain"}.get(times, f" x{times}")
                row[f"{attack}{label}"] = cell(value)
        row |= {f"TPR {attack}": cell(v) for attack, v in r["TPR_at_1_FPR"].items()}
        strongest = r["strongest_attack"]
        if isinstance(strongest, dict):
            row["strongest"] = f"{strongest['attack']} {strongest['AUC']:.3f}"
            row["chance, 95 %"], row["p"] = cell(strongest["chance_95"]), cell(strongest["p"], 4)
        else:
            row |= {"strongest": strongest, "chance, 95 %": "-", "p": "-"}
        row |= {"PrivLeak %": cell(r["PrivLeak"], 1), "s_MIA": cell(r["s_MIA"])}
        row |= {"AUC router": cell(r["router_AUC"]), "membership": r["membership_verdict"]}
        rows.append(row)
    return _same_columns(rows)


def memory_table(run: Run, forget: str) -> list[dict[str, str]]:
    """What is remembered of the members, and how far their losses are from gold's."""
    rows = []
    for name, r in _measured(run, forget).items():
        row = {"n": str(run.n), "operation": name}
        strength, exposed, gold = r["extraction_strength"], r["exposure"], r["to_gold"]
        pairs = strength.items() if isinstance(strength, dict) else [("members", strength)]
        row |= {f"extraction strength, {k}": cell(v, 4) for k, v in pairs}
        if isinstance(exposed, dict):
            for times, value in exposed.items():
                label = "unseen" if times == "clean" else f"x{times}"
                row[f"exposure {label}, bits"] = cell(value, 2)
        else:
            row["exposure, bits"] = exposed
        rows.append(
            {
                **row,
                "loss to gold, mean nats": cell(gold["mean_difference_nats"]),
                "loss to gold, median nats": cell(gold["median_difference_nats"]),
                "KS D": cell(gold["KS"]["D"]),
                "KS p": cell(gold["KS"]["p"], 4),
                "Wilcoxon p": cell(gold["wilcoxon_p"], 4),
                "margin, nats": cell(gold["margin_nats"]),
                "equivalence p": cell(gold["equivalence_p"], 4),
                "golds": str(gold["gold_seeds"]),
            }
        )
    return _same_columns(rows)


def control_table(run: Run, forget: str) -> list[dict[str, str]]:
    """The expert purge beside its random draws: change of bits per byte on test rows."""
    operations, rows = _measured(run, forget), []
    for name, r in operations.items():
        if not name.startswith("mask"):
            continue
        change = r["bpb_change"]
        if "draws" in r:
            draws = r["draws"]
            row = {"n": str(run.n), "operation": f"{name}, {len(draws['test'])} draws"}
            rows.append(row | {k: _spread(v) for k, v in _renamed(draws).items()})
        else:
            row = {"n": str(run.n), "operation": name}
            rows.append(row | {k: cell(v) for k, v in _renamed(change).items()})
    return rows


def _renamed(change: dict[str, Any]) -> dict[str, Any]:
    names = {"test": "forgotten", "near": "near", "far": "far"}
    return {f"change on {label}, bpb": change[key] for key, label in names.items()}


def _spread(values: list[Any]) -> str:
    if any(isinstance(v, str) for v in values):
        return str(values[0])
    return f"{np.mean(values):.3f} (from {min(values):.3f} to {max(values):.3f})"


def _measured(run: Run, forget: str) -> dict[str, Any]:
    """Operations on a forget set that have numbers."""
    found = run.unlearning.get(forget, {})
    return {name: r for name, r in found.items() if "result" not in r}


def floor_table(runs: list[Run]) -> list[dict[str, str]]:
    """Floors below which a run is a toy: utility, routing, power of the attack."""
    rows = []
    for run in runs:
        cells = run.utility["domains"]
        figures = {d: c["scopes"][run.scope] for d, c in cells.items()}
        below = [d for d, f in figures.items() if f != "undefined" and f["bpb"] < f["unigram_bpb"]]
        gain = run.gain
        length = run.config["router"]["context_tokens"]
        accuracy = _accuracy_at(run, length)
        rows.append(
            _floor(
                run,
                f"below the unigram in all {len(cells)} domains",
                len(below) == len(cells),
                f"{len(below)}",
            )
        )
        rows.append(
            _floor(run, "macro gain over the unigram at least 10 %", gain >= 0.10, f"{gain:.1%}")
        )
        if isinstance(accuracy, float):
            rows.append(
                _floor(
                    run,
                    f"routing accuracy at least 95 % after {length} tokens",
                    accuracy >= 0.95,
                    f"{accuracy:.1%}",
                )
            )
        for forget, operations in run.unlearning.items():
            repeated = _most_repeated(operations["original"]["AUC"]["LOSS"])
            rows.append(
                _floor(
                    run,
                    f"attack has power on repeated members of {forget}",
                    repeated != "no power",
                    cell(repeated),
                )
            )
    return rows


def _floor(run: Run, claim: str, holds: bool, value: str) -> dict[str, str]:
    return {"experiment": run.name, "floor": claim, "measured": value, "holds": cell(holds)}


def _most_repeated(cells: dict[str, Any]) -> Any:
    return cells[max((k for k in cells if k != "all"), key=int)]


def _accuracy_at(run: Run, length: int) -> float | str:
    """Mean over domains of the routing accuracy of prefixes of a length."""
    found = [d["routing_accuracy"] for d in run.utility["domains"].values()]
    if any(isinstance(f, str) or str(length) not in f for f in found):
        return "undefined"
    return float(np.mean([f[str(length)] for f in found]))


def _same_columns(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    columns = max(rows, key=len).keys() if rows else []
    return [{c: row.get(c, "") for c in columns} for row in rows]


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(r.values()) + " |" for r in rows]) + "\n"


def _csv(rows: list[dict[str, str]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _html_table(rows: list[dict[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(v)}</td>" for v in row.values()) + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=scroll>{table}</div>"


# ---------------------------------------------------------------- plots


def plot_utility(runs: list[Run]) -> plt.Figure:
    """Bits per byte of every run under every routing scope, and the unigram's: lines against n, or
    one row per run where several have one n."""
    runs = sorted(runs, key=lambda r: r.n)
    rows = len({r.n for r in runs}) < len(runs)
    size = (7.5, 1.5 + 0.32 * len(runs)) if rows else (6, 4)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    places = range(len(runs))
    lines: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for scope, (marker, line) in MARKERS.items():
        style = {"marker": marker, "ls": "" if rows else line, "color": "black", "mfc": "white"}
        figures = [r.utility["macro"].get(scope) for r in runs]
        lines[f"{scope} routing"] = style, [_bpb(f, "bpb") for f in figures]
    style = {"color": "gray", "marker": "|" if rows else "", "ls": "" if rows else "-."}
    own = [r.utility["macro"][r.scope] for r in runs]
    lines["unigram of the domain"] = style, [_bpb(f, "unigram_bpb") for f in own]
    for label, (style, values) in lines.items():
        if not all(math.isnan(v) for v in values):
            points = (values, places) if rows else (places, values)
            axes.plot(*points, label=label, **style)
    labels = [r.label for r in runs]
    if rows:
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.grid(axis="y", color="lightgray", lw=0.6)
        axes.set_xlabel("test loss, macro mean (bits per byte)")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    else:
        axes.set_xticks(places, labels)
        axes.set_ylabel("test loss, macro mean (bits per byte)")
        axes.set_xlabel("number of strict partitions (partition method)")
        axes.legend()
    return figure


def _bpb(figures: Any, name: str) -> float:
    """A figure of a macro entry; NaN where a word stands for it."""
    return figures[name] if isinstance(figures, dict) else math.nan


def removal_cost(run: Run, given_router: bool) -> list[float]:
    """Per forget domain: least token share of a full retrain that an operation needs to be exact
    with no other domain losing its model; `given_router`: the router may have seen the domain."""
    costs = []
    for operations in run.unlearning.values():
        kept = [
            r["cost"]["tokens_relative_to_gold"]
            for name, r in operations.items()
            if "result" not in r
            and r["exact"]
            and (given_router or "router" not in r["exact_given"])
            and (name == "sisa" or (name.startswith("delete") and r["RA"]["near"] == "none"))
        ]
        if kept:
            costs.append(min(kept))
    return costs


def plot_tradeoff(runs: list[Run]) -> plt.Figure | None:
    """Headline: utility against the cost of removing a domain exactly."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    kinds = {
        "router rebuilt without the domain": (False, "white"),
        "exact given the router": (True, "black"),
    }
    for run in sorted(runs, key=lambda r: r.n):
        y = 100 * run.gain
        places = []
        for given_router, fill in kinds.values():
            costs = removal_cost(run, given_router)
            if not costs or float(np.mean(costs)) in places:
                continue
            x = float(np.mean(costs))
            places.append(x)
            spread = [[x - min(costs)], [max(costs) - x]]
            style = {"color": "black", "mfc": fill, "capsize": 3, "zorder": 3}
            axes.errorbar(x, y, xerr=spread, fmt="o", **style)
        if not places:
            continue
        axes.plot(places, [y] * len(places), color="gray", lw=1)
        side = "right" if max(places) > 0.8 else "left"
        axes.annotate(
            run.label, (places[-1], y), xytext=(0, 8), textcoords="offset points", ha=side
        )
    axes.set_xlim(-0.05, 1.05)
    axes.margins(y=0.25)
    axes.set_xlabel(
        "cost of removing one domain exactly (training tokens, share of a full retrain)"
    )
    axes.set_ylabel("utility: bits per byte below the unigram (%)")
    handles = [
        plt.Line2D([], [], marker="o", color="black", mfc=fill, ls="", label=label)
        for label, (_, fill) in kinds.items()
    ]
    axes.legend(handles=handles, fontsize=8)
    return figure if axes.lines else None


def _heat_maps(runs: list[Run]) -> tuple[plt.Figure, list[plt.Axes]]:
    """A figure with a panel per run, as wide as the run has partitions."""
    widths = [max(4, run.n) for run in runs]
    figure, grid = plt.subplots(
        1,
        len(runs),
        figsize=(2 + 0.34 * sum(widths), 5),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    return figure, grid[0].tolist()


def plot_routing(runs: list[Run]) -> plt.Figure:
    """Which partition each domain's test rows are routed to."""
    runs = [r for r in sorted(runs, key=lambda r: r.n) if r.n > 1] or runs
    figure, panels = _heat_maps(runs)
    for axes, run in zip(panels, runs, strict=True):
        counts = np.array(run.utility["routing"]["confusion"], dtype=float)
        share = counts / counts.sum(1, keepdims=True)
        image = axes.imshow(share, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axes.set_yticks(range(len(share)), list(run.utility["domains"]))
        axes.set_xticks(range(run.n))
        axes.set_xlabel("partition")
        axes.set_title(run.label, fontsize=10)
    panels[0].set_ylabel("domain of the text")
    figure.colorbar(image, ax=panels, label="share of test rows")
    return figure


def plot_mixtures(runs: list[Run]) -> plt.Figure | None:
    """What distance mixtures change against the run's own top-1: by how many models are mixed, and
    by T."""
    runs = [r for r in runs if r.n > 1 and "mixtures" in r.utility]
    if not runs:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    styles = [(m, ls) for ls in ("-", "--", ":") for m in "os^Dv"]
    temperature = _middle_temperature(runs)
    for run, (marker, line) in zip(runs, styles * len(runs), strict=False):
        style = {"marker": marker, "ls": line, "color": "black", "mfc": "white", "ms": 5, "lw": 1}
        by_count, by_heat = [], []
        found = _distance_mixtures(run)
        single = [bpb for settings, bpb in found if settings["top_k"] == 1]
        for settings, bpb in found if single else []:
            change = 100 * (bpb / single[0] - 1)
            count, heat = settings["top_k"], settings["temperature"]
            if count == 1 or heat == temperature:
                by_count.append((min(count or run.n, run.n), change))
            if not count:
                by_heat.append((heat, change))
        for axes, points in ((left, by_count), (right, by_heat)):
            if points:
                axes.plot(*zip(*sorted(set(points)), strict=True), label=run.label, **style)
    left.set_xscale("log", base=2)
    left.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    left.set_xlabel(f"partition models mixed (the nearest), T = {temperature:g}")
    right.set_xscale("log")
    right.set_xlabel("temperature T of all models' weights")
    for axes in (left, right):
        axes.axhline(0, color="gray", lw=0.8)
        axes.set_ylabel("test loss against the run's own top-1 (%)")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _distance_mixtures(run: Run) -> list[tuple[dict[str, Any], float]]:
    """Settings and macro bits per byte of a run's defined distance mixtures."""
    found = run.utility["mixtures"]
    return [
        (settings, found["macro"][label]["bpb"])
        for label, settings in found["settings"].items()
        if settings["name"] == "distance" and isinstance(found["macro"].get(label), dict)
    ]


def _middle_temperature(runs: list[Run]) -> float:
    """The published T = 0.1 where it was run, else the first."""
    heats = [settings["temperature"] for run in runs for settings, _ in _distance_mixtures(run)]
    return 0.1 if 0.1 in heats or not heats else heats[0]


def plot_experts(runs: list[Run]) -> plt.Figure | None:
    """What each model loses against the best one, on the text of every cluster or domain."""
    runs = [r for r in runs if r.n > 1 and "mixtures" in r.utility]
    largest: dict[str, Run] = {}
    for run in sorted(runs, key=lambda r: r.n):
        if run.utility["mixtures"].get("expert_perplexity", {}).get("domain"):
            largest[run.utility["method"]] = run
    if not largest:
        return None
    figure, panels = _heat_maps(list(largest.values()))
    for axes, run in zip(panels, largest.values(), strict=True):
        tables = run.utility["mixtures"]["expert_perplexity"]
        kind = "cluster" if tables["cluster"] else "domain"
        table = np.array(list(tables[kind].values()), dtype=float)
        excess = np.log2(table / np.nanmin(table, 1, keepdims=True))
        image = axes.imshow(excess, cmap="Greys", vmin=0, vmax=4, aspect="auto")
        axes.set_yticks(range(len(table)), list(tables[kind]))
        axes.set_xticks(range(table.shape[1]))
        axes.set_xlabel("partition model")
        axes.set_ylabel(f"{kind} of the text")
        axes.set_title(run.label, fontsize=10)
    figure.colorbar(
        image,
        ax=panels,
        extend="max",
        label="perplexity over the best model's (doublings)",
    )
    return figure


def plot_cost(runs: list[Run]) -> plt.Figure | None:
    """RTE of every operation, seconds on a log axis, mean over forget domains."""
    runs = [r for r in sorted(runs, key=lambda r: r.n) if r.unlearning]
    if not runs:
        return None
    names = [n for n in next(iter(runs[0].unlearning.values())) if n != "original"]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    width = 0.8 / len(runs)
    greys = np.linspace(0.15, 0.85, len(runs))
    floor = 1e-3
    for i, run in enumerate(runs):
        unnamed = True
        for j, name in enumerate(names):
            seconds = _mean_seconds(run, name)
            x = j + (i - (len(runs) - 1) / 2) * width
            if seconds is None:
                axes.text(x, floor * 1.3, "n/a", ha="center", fontsize=8, rotation=90)
                continue
            label, unnamed = (run.label if unnamed else None), False
            axes.bar(
                x,
                max(seconds, floor),
                width * 0.9,
                color=str(greys[i]),
                edgecolor="black",
                label=label,
            )
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("time to remove one domain (seconds, log)")
    axes.set_xlabel("operation (n/a: it would remove every model)")
    axes.legend()
    return figure


def _mean_seconds(run: Run, name: str) -> float | None:
    found = [
        read_json(run.folder / "unlearn" / forget / name / "timings.json")["RTE_seconds"]
        for forget, operations in run.unlearning.items()
        if "result" not in operations[name]
    ]
    return float(np.mean(found)) if found else None


# ---------------------------------------------------------------- page

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#111}
table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #bbb;padding:2px 6px;
text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}
th{background:#eee}.scroll{overflow-x:auto;margin:1rem 0}img{max-width:100%}
"""


def build(folders: list[Path], output: Path) -> Path:
    """Write the report of runs into a folder; returns the page."""
    runs = sorted((load_run(folder) for folder in folders), key=lambda r: (r.n, r.name))
    tell_apart(runs)
    tables = {
        "Sizes": size_table(runs),
        "Utility (macro over domains)": macro_table(runs),
        "Ways to partition": partition_table(runs),
        "Utility per domain (bits per byte, test)": domain_table(runs),
        "Floors": floor_table(runs),
    }
    if any("mixtures" in run.utility for run in runs):
        tables["Mixtures (bits per byte, macro over domains)"] = mixture_table(runs)
    for run in runs:
        if (_clusters(run) or {}).get("top_terms"):
            tables[f"Clusters of {run.name}"] = term_table(run)
    for forget in dict.fromkeys(f for run in runs for f in run.unlearning):
        rows = [
            row for run in runs if forget in run.unlearning for row in unlearning_table(run, forget)
        ]
        tables[f"Unlearning {forget}"] = _same_columns(rows)
        for title, table in (
            ("Membership", attack_table),
            ("Memory", memory_table),
            ("Random controls", control_table),
        ):
            found = [row for run in runs for row in table(run, forget)]
            if found:
                tables[f"{title} {forget}"] = _same_columns(found)
    plots = {
        "Utility against the cost of exact removal": ("tradeoff", plot_tradeoff(runs)),
        "Bits per byte against the number of partitions": ("utility", plot_utility(runs)),
        "Where each domain is routed": ("routing", plot_routing(runs)),
        "Mixtures of partition models": ("mixtures", plot_mixtures(runs)),
        "Every model on every cluster or domain": ("experts", plot_experts(runs)),
        "Time to remove a domain": ("cost", plot_cost(runs)),
    }
    page = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>Tiered routing report</title><style>{STYLE}</style>",
    ]
    page.append(f"<h1>Tiered routing: {html.escape(', '.join(r.name for r in runs))}</h1>")
    page.append(
        "<p>Utility is bits per byte on test rows (lower is better), against each domain's"
        " add-one smoothed unigram. A removal is exact when every remaining artefact is bit for bit"
        " the gold retrain's; what that claim rests on stands beside it. Words instead of numbers:"
        " <i>not applicable</i> (the operation would remove every model), <i>none</i> (no such"
        " domain), <i>undefined</i>, <i>no power</i> (the attack does not succeed on the original"
        " model, so its failure elsewhere proves nothing).</p>"
    )
    for title, (name, figure) in plots.items():
        if figure is None:
            continue
        page.append(
            f"<h2>{html.escape(title)}</h2>{_save_plot(figure, output / 'plots', name, title)}"
        )
    for title, rows in tables.items():
        name = "".join(c if c.isalnum() else "_" for c in title.lower()).strip("_")
        write_text(output / "tables" / f"{name}.md", markdown(rows))
        write_text(output / "tables" / f"{name}.csv", _csv(rows))
        page.append(f"<h2>{html.escape(title)}</h2>{_html_table(rows)}")
    write_text(output / "index.html", "\n".join(page) + "\n</html>\n")
    return output / "index.html"


def _save_plot(figure: plt.Figure, folder: Path, name: str, title: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    plt.close(figure)
    (folder / f"{name}.png").write_bytes(image.getvalue())
    data = base64.b64encode(image.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--output", type=Path, help="report folder (default: RUN/report, or PARENT/report)"
    )
    arguments = parser.parse_args()
    first = arguments.runs[0]
    output = arguments.output or (first if len(arguments.runs) == 1 else first.parent) / "report"
    try:
        page = build(arguments.runs, output)
    except (UserError, OSError) as error:
        print(f"tiered.report: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print((output / "tables" / "utility__macro_over_domains.md").read_text())
    for path in sorted((output / "tables").glob("unlearning_*.md")):
        print(f"{path.stem}\n\n{_narrow(path.read_text())}\n")
    print("floors\n")
    print((output / "tables" / "floors.md").read_text())
    print(f"page: {page}\nplot: {output / 'plots' / 'tradeoff.png'}")


def _narrow(table: str) -> str:
    """The columns of a wide Markdown table that fit a terminal."""
    wanted = (
        "n",
        "operation",
        "UA",
        "UA_norm",
        "RA far",
        "bpb test f",
        "bpb near",
        "bpb far",
        "verdict",
        "exact",
        "tokens / gold",
        "RTE s",
    )
    # intervals stand in the files: here the value alone
    table = re.sub(r" \[[^\]|]*\]", "", table)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.strip().splitlines()]
    keep = [i for i, c in enumerate(rows[0]) if c in wanted]
    return "\n".join("| " + " | ".join(row[i] for i in keep) + " |" for row in rows)


if __name__ == "__main__":
    main()
