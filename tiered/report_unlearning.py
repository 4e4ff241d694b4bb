"""The report's tables and plots of unlearning: per forget set, and over all of them.

Nothing is computed here that is not a mean, a difference or a density of stored numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.compute as pc
from scipy.stats import gaussian_kde

from tiered.metrics import NONE
from tiered.runs import Run, cell, point, same_columns
from tiered.sealed import read_table
from tiered.statistics import chance_error
from tiered.store import read_json

GREY = {"color": "black", "lw": 1, "ms": 5}
# Methods that a plot with few lines shows, in this order.
SHOWN = ("original", "gold", "delete-S1", "delete-S2", "sisa", "mask-skew", "reinit")
SHOWN += ("GA", "NPO", "RMU")
MARKS = ("ko-", "ks-", "kv--", "k^--", "kD:", "kx-", "k+:", "k*--", "kP:", "kh-.")
# What spans an axis of losses: a method that overshoots by far leaves the panel, and is named.
SPANNING = ("original", "gold", "delete-S1", "sisa", "mask-skew", "reinit")
LINES = dict(zip(SHOWN, MARKS, strict=True))
CAUSAL = {
    "delete": "its partitions dropped",
    "mask-skew": "its experts purged",
    "mask-random": "random experts, as many",
    "mask-massmatched": "random experts, of as much mass",
}


def is_seed(operation: str) -> bool:
    """Whether an operation is a gold of another seed."""
    return operation.startswith("gold-seed-")


# ---------------------------------------------------------------- tables of a forget set


def unlearning_table(run: Run, forget: str) -> list[dict[str, str]]:
    """T3: every operation on one forget domain of one run."""
    rows = []
    for name, r in run.unlearning[forget].items():
        row = {"n": str(run.n), "operation": name}
        if "result" in r:
            rows.append({**row, "UA": r["result"]})
            continue
        timings = read_json(run.of_operation(forget, name, "timings.json"))
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
                "model utility": cell(r["model_utility"]),
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
                "a model for every partition": cell(r["complete"]),
                "weights removed": cell(r["weights_removed"]),
                "tokens": cell(r["cost"]["tokens"]),
                "tokens / gold": cell(r["cost"]["tokens_relative_to_gold"]),
                "RTE s": cell(timings["RTE_seconds"]) + (" reused" if timings["reused"] else ""),
            }
        )
    return same_columns(rows)


def attack_table(run: Run, forget: str) -> list[dict[str, str]]:
    """Membership attacks on every operation: AUC by how often members occurred, TPR, verdicts."""
    rows = []
    for name, r in run.measured(forget).items():
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
    return same_columns(rows)


def memory_table(run: Run, forget: str) -> list[dict[str, str]]:
    """What is remembered of the members, and how far their losses are from gold's."""
    rows = []
    for name, r in run.measured(forget).items():
        row = {"n": str(run.n), "operation": name}
        strength, exposed, gold = r["extraction_strength"], r["exposure"], r["to_gold"]
        pairs = strength.items() if isinstance(strength, dict) else [("members", strength)]
        row |= {f"extraction strength, {k}": cell(v, 4) for k, v in pairs}
        verbatim = r["verbatim"] if isinstance(r["verbatim"], dict) else {}
        for times, value in verbatim.items():
            label = {"all": "members - holdout", "1": "plain - holdout"}.get(
                times, times if times == "holdout" else f"x{times} - holdout"
            )
            row[f"verbatim, {label}"] = cell(value)
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
    return same_columns(rows)


def control_table(run: Run, forget: str) -> list[dict[str, str]]:
    """The expert purge beside its random draws: change of bits per byte on test rows."""
    rows = []
    for name, r in run.measured(forget).items():
        if not name.startswith("mask"):
            continue
        if "draws" in r:
            draws = r["draws"]
            row = {"n": str(run.n), "operation": f"{name}, {len(draws['test'])} draws"}
            rows.append(row | {k: _spread(v) for k, v in _renamed(draws).items()})
        else:
            row = {"n": str(run.n), "operation": name}
            rows.append(row | {k: cell(v) for k, v in _renamed(r["bpb_change"]).items()})
    return rows


def _renamed(change: dict[str, Any]) -> dict[str, Any]:
    names = {"test": "forgotten", "near": "near", "far": "far"}
    return {f"change on {label}, bpb": change[key] for key, label in names.items()}


def _spread(values: list[Any]) -> str:
    if any(isinstance(v, str) for v in values):
        return str(values[0])
    return f"{np.mean(values):.3f} (from {min(values):.3f} to {max(values):.3f})"


def robustness_table(run: Run, forget: str) -> list[dict[str, str]]:
    """What rounded weights and relearning bring back of the members."""
    rows = []
    for name, r in run.measured(forget).items():
        found = r.get("robustness")
        if not found:
            continue
        row = {"n": str(run.n), "operation": name, "UA": cell(r["UA"])}
        row["bpb members"] = cell(r["bpb"]["members"])
        for rounding in (x for x in found if x != "relearn"):
            row[f"UA {rounding}"] = cell(found[rounding]["UA"])
            row[f"bpb members {rounding}"] = cell(found[rounding]["bpb_members"])
            auc = found[rounding]["AUC_LOSS"]
            row[f"AUC LOSS {rounding}"] = cell(auc[most_repeated(auc)])
        if "relearn" in found:
            curve = found["relearn"]
            row["relearn advantage, bpb"] = cell(curve["advantage_bpb"])
            row[f"bpb after {curve['steps'][-1]} steps"] = cell(curve["bpb"][-1])
        rows.append(row)
    return same_columns(rows)


def most_repeated(cells: dict[str, Any]) -> str:
    """The key of the members that occur most often in training; `all` where that is all."""
    return max(cells, key=lambda k: -1 if k == "all" else int(k))


def forget_tables(runs: list[Run], forget: str) -> dict[str, list[dict[str, str]]]:
    """Title -> table of one forget set over all runs that removed it."""
    builders: dict[str, Callable[[Run, str], list[dict[str, str]]]] = {
        "Unlearning": unlearning_table,
        "Membership": attack_table,
        "Memory": memory_table,
        "Random controls": control_table,
        "Robustness": robustness_table,
    }
    found = {}
    for title, build in builders.items():
        rows = [row for run in runs if forget in run.unlearning for row in build(run, forget)]
        if rows:
            found[f"{title} {forget}"] = same_columns(rows)
    return found


# ---------------------------------------------------------------- tables over forget sets


def leaderboard(run: Run) -> list[dict[str, str]]:
    """Operations of a run by mean gap to gold over forget sets, with every part of it.

    The golds of other seeds are one row: what a difference of seeds alone looks like.
    """
    found: dict[str, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {}
    for forget in run.unlearning:
        measured = run.measured(forget)
        for name, r in measured.items():
            label = "gold, other seeds" if is_seed(name) else name
            found.setdefault(label, []).append((name, r, measured["gold"]))
    gaps = {label: [point(r["gap_to_gold"]) for _, r, _ in rs] for label, rs in found.items()}
    order = sorted(found, key=lambda label: np.mean(gaps[label]))
    sets = list(run.unlearning)
    rows = []
    for place, label in enumerate(order, 1):
        entries = found[label]
        results = [r for _, r, _ in entries]
        verdicts = Counter(r["verdict"] for r in results).most_common()
        seconds = [
            read_json(run.of_operation(r["forget"], name, "timings.json"))["RTE_seconds"]
            for name, r, _ in entries
        ]
        rows.append(
            {
                "place": str(place),
                "operation": label,
                "n": str(run.n),
                "forget sets": f"{len({r['forget'] for r in results})} of {len(sets)}",
                "gap to gold": _mean(gaps[label]),
                "UA - gold": _mean(_minus(r, g, "UA") for _, r, g in entries),
                "RA - gold": _mean(_minus(r, g, "RA", "all") for _, r, g in entries),
                "TA - gold": _mean(_minus(r, g, "TA", "all") for _, r, g in entries),
                "MIA efficacy - gold": _mean(_minus(r, g, "MIA_efficacy") for _, r, g in entries),
                "member loss - gold, nats": _mean(
                    point(r["to_gold"]["mean_difference_nats"]) for r in results
                ),
                "AUC - gold, most repeated": _mean(
                    point(r["AUC_minus_gold"][most_repeated(r["AUC_minus_gold"])]) for r in results
                ),
                "model utility": _mean(point(r["model_utility"]) for r in results),
                "bpb change near": _mean(point(r["bpb_change"]["near"]) for r in results),
                "bpb change far": _mean(point(r["bpb_change"]["far"]) for r in results),
                "relearn advantage, bpb": _mean(
                    point(r.get("robustness", {}).get("relearn", {}).get("advantage_bpb", NONE))
                    for r in results
                ),
                "verdicts": ", ".join(f"{word} {count}" for word, count in verdicts),
                "exact": f"{sum(r['exact'] for r in results)} of {len(results)}",
                "tokens / gold": _mean(r["cost"]["tokens_relative_to_gold"] for r in results),
                "RTE s": _mean(seconds),
            }
        )
    return rows


def _minus(r: dict[str, Any], gold: dict[str, Any], *keys: str) -> float:
    for key in keys:
        r, gold = r[key], gold[key]
    return point(r) - point(gold)


def _mean(values: Iterable[float]) -> str:
    """The mean of the numbers there are, with the least and the largest; `none` without any."""
    known = [v for v in values if not np.isnan(v)]
    if not known:
        return NONE
    spread = f" ({min(known):.3f} to {max(known):.3f})" if max(known) > min(known) else ""
    return f"{np.mean(known):.3f}{spread}"


def check_table(runs: list[Run]) -> list[dict[str, str]]:
    """Claims of the protocol, what was measured, whether they hold."""
    return [
        {
            "experiment": run.name,
            "forget": claim["forget"],
            "claim": claim["claim"],
            "measured": claim["measured"],
            "holds": cell(claim["holds"]),
        }
        for run in runs
        for claim in run.checks
    ]


def compartment_table(runs: list[Run]) -> list[dict[str, str]]:
    """How far partitions and experts keep domains apart, per router group of every partition."""
    rows = []
    for run in (r for r in runs if r.compartments):
        level1, causal = run.compartments["level1"], run.compartments["causal"]
        row = {
            "experiment": run.name,
            "partition NMI": cell(level1["nmi"]),
            "shuffled": cell(level1["nmi_shuffled"]),
            "maximal": cell(level1["nmi_maximal"]),
        }
        groups = [
            g
            for p in run.compartments["level2"].values()
            if isinstance(p, dict)
            for g in p["groups"]
        ]
        for key, label in (
            ("nmi_above_chance", "expert NMI above chance"),
            ("effective_domains_per_expert", "domains per expert"),
            ("effective_experts_per_domain", "experts per domain"),
        ):
            row[f"{label}, mean over groups"] = _mean(g[key] for g in groups)
        for name, value in causal["selectivity"].items():
            row[f"selectivity {name}"] = cell(value)
        rows.append(row)
    return same_columns(rows)


def unlearning_tables(runs: list[Run]) -> dict[str, list[dict[str, str]]]:
    """Title -> table over all forget sets."""
    found = {}
    for run in (r for r in runs if r.unlearning):
        found[f"Leaderboard {run.name}"] = leaderboard(run)
    if claims := check_table(runs):
        found["Claims"] = claims
    if apart := compartment_table(runs):
        found["Compartments"] = apart
    return found


# ---------------------------------------------------------------- plots of a forget set


def _panels(count: int, columns: int, size: tuple[float, float], **shared: Any) -> Any:
    """A figure with a grid of panels; those beyond `count` are left blank."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (max(size[0], 6.5 / columns), size[1])  # one panel alone still holds its labels
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(size[0] * columns, size[1] * rows),
        layout="constrained",
        squeeze=False,
        **shared,
    )
    panels = grid.ravel().tolist()
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _operations(runs: list[Run], forget: str) -> list[str]:
    """Operations that any of the runs has numbers for, in table order."""
    known = {name for run in runs for name in run.measured(forget)}
    every = dict.fromkeys(name for run in runs for name in run.unlearning.get(forget, {}))
    return [name for name in every if name in known]


def _row_losses(run: Run, forget: str, operation: str) -> dict[str, dict[str, np.ndarray]]:
    """split -> loss (mean nats per token), occurrences of the forget domain's rows."""
    path = run.of_operation(forget, operation, "rows.parquet")
    columns = ["split", "loss_nats", "tokens", "occurrences"]
    table = read_table(path, columns)
    values = {c: table[c].to_numpy(zero_copy_only=False) for c in columns}
    found = {}
    for split in ("forget", "holdout"):
        here = values["split"] == split
        loss = values["loss_nats"][here] / values["tokens"][here]
        found[split] = {"loss": loss, "occurrences": values["occurrences"][here]}
    return found


def plot_densities(run: Run, forget: str) -> plt.Figure | None:
    """Loss of members and of holdout rows under every operation, gold's members behind."""
    names = [name for name in run.measured(forget) if not is_seed(name)]
    if not names:
        return None
    losses = {name: _row_losses(run, forget, name) for name in names}
    every = [part["loss"] for n in names if n in SPANNING for part in losses[n].values()]
    low, high = min(map(np.min, every)), np.quantile(np.concatenate(every), 0.999)
    low, high = low - 0.1 * (high - low), high + 0.3 * (high - low)
    grid = np.linspace(low, high, 300)
    figure, panels = _panels(len(names), 5, (2.6, 1.7), sharex=True)
    for axes, name in zip(panels, names, strict=True):
        curves = {
            "gold's members": losses["gold"]["forget"]["loss"],
            "members": losses[name]["forget"]["loss"],
            "holdout": losses[name]["holdout"]["loss"],
        }
        for label, values in curves.items():
            if len(values) < 3 or np.ptp(values) == 0:
                continue
            density = gaussian_kde(values)(grid)
            if label == "gold's members":
                axes.fill_between(grid, density, color="lightgray", label=label)
            else:
                line = "-" if label == "members" else "--"
                axes.plot(grid, density, line, color="black", lw=1.2, label=label)
        if np.median(curves["members"]) > high:
            text = f"beyond: median {np.median(curves['members']):.1f} $\\rightarrow$"
            axes.text(0.97, 0.5, text, transform=axes.transAxes, ha="right", fontsize=8)
        axes.set_xlim(low, high)
        axes.set_title(name, fontsize=9)
        axes.set_yticks([])
        axes.tick_params(labelsize=8, labelbottom=True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9)
    figure.supxlabel(f"{run.label}: loss of {forget} rows (nats per token)", fontsize=10)
    figure.supylabel("density of rows", fontsize=10)
    return figure


def plot_auc(runs: list[Run], forget: str) -> plt.Figure | None:
    """AUC of the LOSS attack on every operation, all members and those repeated most, with what
    chance gives."""
    shown = [run for run in runs if run.measured(forget)]
    shown = [r for r in shown if "LOSS" in r.measured(forget)["original"]["AUC"]]
    if not shown:
        return None
    names = _operations(shown, forget)
    figure, panels = _panels(
        len(shown), 3, (4.2, 1.2 + 0.24 * len(names)), sharey=True, sharex=True
    )
    for axes, run in zip(panels, shown, strict=True):
        measured = run.measured(forget)
        losses = _row_losses(run, forget, "original")
        most = most_repeated(measured["original"]["AUC"]["LOSS"])
        occurrences, holdout = losses["forget"]["occurrences"], len(losses["holdout"]["loss"])
        kinds = {"all": ("all members", "o", "white", 0.15, len(occurrences))}
        if most not in ("all", "1"):
            few = int((occurrences == int(most)).sum())
            kinds[most] = (f"members that occur {most} times", "s", "black", -0.15, few)
        powerless = []
        for times, (label, marker, fill, shift, count) in kinds.items():
            half = 1.96 * chance_error(count, holdout)
            shade = "0.8" if times == "all" else "0.92"
            axes.axvspan(
                0.5 - half, 0.5 + half, color=shade, lw=0, zorder=0 if times != "all" else 1
            )
            named = False
            for name, r in measured.items():
                value = r["AUC"]["LOSS"][times]
                if isinstance(value, str):
                    powerless.append(f"{label}: {value}")
                    continue
                y = names.index(name) + shift
                bars = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
                style = {"color": "black", "mfc": fill, "ms": 4, "lw": 0.8, "capsize": 2}
                bars = np.maximum(bars, 0)
                text = None if named else label
                axes.errorbar(
                    value["value"], y, xerr=bars, fmt=marker, label=text, zorder=3, **style
                )
                named = True
        for y, name in enumerate(names):
            if name not in measured:
                axes.text(0.02, y, "not applicable", fontsize=7, va="center", color="0.4")
        notes = "".join(f"\n{text}" for text in dict.fromkeys(powerless))
        axes.set_title(run.label + notes, fontsize=10)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(0, 1.02)
        axes.grid(axis="x", color="0.9", lw=0.5)
    panels[0].invert_yaxis()
    figure.supxlabel(
        f"AUC of the LOSS attack on {forget}\n(shaded: 0.5 $\\pm$ 1.96 standard errors of chance)",
        fontsize=10,
    )
    named = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=2, fontsize=9)
    return figure


def plot_relearn(runs: list[Run], forget: str) -> plt.Figure | None:
    """Bits per byte of other members while a few are relearnt."""
    curves = {
        run.label: {
            name: r["robustness"]["relearn"]
            for name, r in run.measured(forget).items()
            if "relearn" in r.get("robustness", {}) and not is_seed(name)
        }
        for run in runs
    }
    curves = {label: found for label, found in curves.items() if found}
    if not curves:
        return None
    figure, panels = _panels(len(curves), 3, (4.4, 3.6), sharey=True)
    spanning = [c["bpb"] for found in curves.values() for n, c in found.items() if n in SPANNING]
    low, high = np.min(spanning), np.max(spanning)
    low, high = low - 0.1 * (high - low), high + 0.2 * (high - low)
    for axes, (label, found) in zip(panels, curves.items(), strict=True):
        axes.set_ylim(low, high)
        for name, curve in found.items():
            places = np.log2(1 + np.array(curve["steps"]))
            if name in LINES:
                continue
            axes.plot(places, curve["bpb"], "-", color="0.75", lw=0.8, zorder=1)
        for name, line in LINES.items():
            if name in found:
                places = np.log2(1 + np.array(found[name]["steps"]))
                width, curve = 2 if name == "gold" else 1, found[name]["bpb"]
                axes.plot(places, curve, line, lw=width, ms=5, mfc="white", label=name)
                if curve[0] > high:
                    axes.annotate(
                        f"{name} from {curve[0]:.1f}",
                        (np.interp(high, curve[::-1], places[::-1]), high),
                        xytext=(4, -10),
                        textcoords="offset points",
                        fontsize=8,
                    )
        steps = next(iter(found.values()))["steps"]
        axes.set_xticks(np.log2(1 + np.array(steps)), [str(s) for s in steps], fontsize=8)
        axes.set_title(label, fontsize=10)
    panels[0].set_ylabel(f"other members of {forget} (bits per byte)")
    label = "steps on the relearn rows (log2(1 + steps); thin grey: other operations)"
    figure.supxlabel(label, fontsize=9)
    named = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    order = [n for n in LINES if n in named]
    figure.legend([named[n] for n in order], order, loc="outside right upper", fontsize=8)
    return figure


def plot_gap(runs: list[Run], forget: str) -> plt.Figure | None:
    """Time that an operation takes against its gap to gold; numbers name operations."""
    shown = [run for run in runs if run.measured(forget)]
    if not shown:
        return None
    names = [n for n in _operations(shown, forget) if n != "original" and not is_seed(n)]
    figure, panels = _panels(len(shown), 3, (3.9, 3.7), sharey=True)
    highest = 0.0
    for axes, run in zip(panels, shown, strict=True):
        measured = run.measured(forget)
        spread = measured["gold"].get("envelope", {}).get("gap_to_gold")
        if spread is not None:
            axes.axhspan(0, spread, color="0.88", lw=0)
        axes.axhline(point(measured["original"]["gap_to_gold"]), color="0.5", lw=0.8, ls="--")
        highest = max(highest, point(measured["original"]["gap_to_gold"]))
        taken: list[tuple[float, float]] = []
        for i, name in enumerate(names, 1):
            if name not in measured:
                continue
            timings = read_json(run.of_operation(forget, name, "timings.json"))
            x, y = max(timings["RTE_seconds"], 1e-3), point(measured[name]["gap_to_gold"])
            highest = max(highest, y)
            fill = "black" if measured[name]["exact"] else "white"
            axes.plot(x, y, "o", color="black", mfc=fill, ms=5, zorder=3)
            # numbers of near points go beside one another
            near = sum(abs(np.log10(x / a)) < 0.35 and abs(y - b) < 0.008 for a, b in taken)
            taken.append((x, y))
            lead = {"arrowstyle": "-", "lw": 0.5, "color": "0.4", "shrinkA": 0, "shrinkB": 3}
            axes.annotate(
                str(i),
                (x, y),
                xytext=(4 + 12 * near, 4),
                textcoords="offset points",
                fontsize=8,
                arrowprops=lead if near else None,
            )
        axes.set_xscale("log")
        axes.margins(0.18, 0.12)
        axes.set_title(run.label, fontsize=10)
    panels[0].set_ylim(-0.005, 1.12 * highest)  # of all panels: they share it
    panels[0].set_ylabel("mean gap to gold (UA, RA, TA, MIA efficacy)")
    figure.supxlabel(
        "time of the operation (seconds, log)\nfilled: exact; dashed: original; shaded: golds of"
        " other seeds",
        fontsize=9,
    )
    texts = [f"{i}  {name}" for i, name in enumerate(names, 1)]
    handles = [plt.Line2D([], [], ls="", label=text) for text in texts]
    figure.legend(
        handles=handles, loc="outside right upper", fontsize=8, handlelength=0, handletextpad=0
    )
    return figure


def plot_rerouting(runs: list[Run], forget: str) -> plt.Figure | None:
    """Where the forget domain's and the others' test rows go, before and after S1."""
    shown = [run for run in runs if run.n > 1 and "delete-S1" in run.measured(forget)]
    if not shown:
        return None
    widths = [max(4, run.n) for run in shown for _ in range(2)]
    figure, grid = plt.subplots(
        1,
        len(widths),
        figsize=(2 + 0.3 * sum(widths), 4.6),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    panels = grid[0].tolist()
    for i, run in enumerate(shown):
        domains = list(run.domains)
        for axes, (operation, title) in zip(
            panels[2 * i : 2 * i + 2],
            (("original", "before"), ("delete-S1", "after S1")),
            strict=True,
        ):
            table = read_table(
                run.of_operation(forget, operation, "rows.parquet"),
                ["split", "domain", "last_partition"],
            ).filter(pc.field("split") == "test")
            names = np.array(table["domain"].to_pylist())
            reached = table["last_partition"].to_numpy()
            counts = np.array(
                [np.bincount(reached[names == d], minlength=run.n)[: run.n] for d in domains]
            )
            share = counts / np.maximum(1, counts.sum(1, keepdims=True))
            image = axes.imshow(share, cmap="Greys", vmin=0, vmax=1, aspect="auto")
            axes.set_yticks(range(len(domains)), domains, fontsize=8)
            axes.set_xticks(range(run.n), range(run.n), fontsize=7)
            axes.get_yticklabels()[domains.index(forget)].set_fontweight("bold")
            axes.set_title(f"{title}, n = {run.n}", fontsize=9)
            axes.set_xlabel("partition")
    panels[0].set_ylabel(f"domain of the test row (removed: {forget})")
    figure.colorbar(image, ax=panels, label="share of test rows (last token)")
    return figure


def forget_plots(runs: list[Run], forget: str) -> dict[str, tuple[str, plt.Figure | None]]:
    """Title -> file name and figure of one forget set."""
    return {
        f"Membership attack on {forget}": ("auc", plot_auc(runs, forget)),
        f"Time against gap to gold, {forget}": ("gap", plot_gap(runs, forget)),
        f"Relearning {forget}": ("relearn", plot_relearn(runs, forget)),
        **{
            f"Losses of {forget}, {run.label}": (
                f"densities_{run.name}",
                plot_densities(run, forget),
            )
            for run in runs
        },
        f"Routing before and after the removal of {forget}": (
            "rerouting",
            plot_rerouting(_with_domain(runs, forget), forget),
        ),
    }


def _with_domain(runs: list[Run], forget: str) -> list[Run]:
    """Runs in which the forget set is a domain (a file of documents has no row of its own)."""
    return [run for run in runs if forget in run.domains]


# ---------------------------------------------------------------- plots over forget sets


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


def plot_causal(run: Run) -> plt.Figure | None:
    """What the removal of one domain does to every other, beside random removals."""
    if not run.compartments:
        return None
    causal, domains = run.compartments["causal"], run.compartments["domains"]
    known = {
        name: np.array(
            [
                [row[b] for b in domains] if isinstance(row, dict) else [np.nan] * len(domains)
                for row in (causal[name][a] for a in domains)
            ]
        )
        for name in CAUSAL
    }
    known = {name: table for name, table in known.items() if not np.isnan(table).all()}
    if not known:
        return None
    # what is compared shares a scale: the purge and its random controls
    masks = [np.nanmax(np.abs(t)) for name, t in known.items() if name != "delete"]
    figure, panels = _panels(len(known), 4, (3.9, 4.2))
    for axes, (name, table) in zip(panels, known.items(), strict=True):
        most = np.nanmax(np.abs(table)) if name == "delete" else max(masks)
        image = axes.imshow(table, cmap="Greys", vmin=0, vmax=most or 1, aspect="auto")
        for i, j in np.argwhere(table < -0.05 * most):
            axes.text(j, i, "-", ha="center", va="center", fontsize=7)
        for i in np.flatnonzero(np.isnan(table).all(1)):
            axes.text(len(domains) / 2 - 0.5, i, "n/a", ha="center", va="center", fontsize=6)
        axes.set_xticks(range(len(domains)), domains, fontsize=7, rotation=90)
        axes.set_yticks(range(len(domains)), domains, fontsize=7)
        axes.set_title(CAUSAL[name], fontsize=9)
        axes.set_xlabel("measured on")
        figure.colorbar(image, ax=axes, shrink=0.8)
    panels[0].set_ylabel("removed domain")
    figure.suptitle(
        f"{run.label}: change of test loss (bits per byte; '-': falls by over 5 % of the scale)",
        fontsize=10,
    )
    return figure


def plot_coverage(runs: list[Run]) -> plt.Figure | None:
    """Share of a domain's routing mass that its purge removes, against what the purge costs it."""
    shown = [run for run in runs if run.compartments and run.compartments["causal"]["coverage"]]
    if not shown:
        return None
    figure, panels = _panels(len(shown), 3, (4.4, 3.8))
    for axes, run in zip(panels, shown, strict=True):
        causal = run.compartments["causal"]
        for name, marker, fill in (("mask-skew", "o", "black"), ("mask-massmatched", "s", "white")):
            points = [
                (float(np.mean(list(by_partition.values()))), causal[name][d][d], d)
                for d, by_partition in causal["coverage"].items()
                if isinstance(causal[name][d], dict)
            ]
            xs, ys = ([p[i] for p in points] for i in (0, 1))
            label = CAUSAL[name]
            axes.plot(xs, ys, marker, color="black", mfc=fill, ms=4, ls="", label=label)
            if name == "mask-skew":
                for x, y, d in points:
                    axes.annotate(d, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
        axes.axhline(0, color="0.7", lw=0.8)
        axes.set_title(run.label, fontsize=10)
        axes.set_xlabel("share of the domain's routing mass that is purged")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("cost on the domain itself (bits per byte)")
    return figure


def plot_sequence(runs: list[Run]) -> plt.Figure | None:
    """Loss on domains that stay and on those that are gone, as more and more are removed."""
    shown = [run for run in runs if "sequence" in run.compartments]
    if not shown:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    markers = "os^Dv"
    for run, marker in zip(shown, markers * len(shown), strict=False):
        for method, line in (("delete", "-"), ("mask-skew", "--")):
            steps = [s for s in run.compartments["sequence"][method] if isinstance(s, dict)]
            if len(steps) < 2:
                continue
            style = {**GREY, "marker": marker, "mfc": "white", "ls": line}
            for axes, key in ((left, "bpb_change_staying"), (right, "bpb_change_gone")):
                points = [(s["removed"], s[key]) for s in steps if not isinstance(s[key], str)]
                label = f"{run.label}, {method}"
                axes.plot(*zip(*points, strict=True), label=label, **style)
    if not left.lines:
        plt.close(figure)
        return None
    left.set_ylabel("change of test loss, macro mean (bits per byte)")
    left.set_title("domains that stay", fontsize=10)
    right.set_title("domains that are gone", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("domains removed")
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def plot_cost(runs: list[Run]) -> plt.Figure | None:
    """RTE of every operation, seconds on a log axis, mean over forget domains."""
    runs = [r for r in sorted(runs, key=lambda r: r.n) if r.unlearning]
    if not runs:
        return None
    tables = [table for run in runs for table in run.unlearning.values()]
    names = dict.fromkeys(n for t in tables for n in t if n != "original" and not is_seed(n))
    bars = len(runs) * len(names)
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.14 * bars), layout="constrained")
    width = 0.8 / len(runs)
    greys = np.linspace(0.15, 0.85, len(runs))
    floor = 1e-3
    for i, run in enumerate(runs):
        label: str | None = run.label
        for j, name in enumerate(names):
            seconds = _mean_seconds(run, name)
            y = j + (i - (len(runs) - 1) / 2) * width
            if seconds is None:
                axes.text(floor * 1.2, y, "n/a", va="center", fontsize=6)
                continue
            style = {"color": str(greys[i]), "edgecolor": "black", "lw": 0.6}
            axes.barh(y, max(seconds, floor), width * 0.9, label=label, **style)
            label = None
    axes.set_xscale("log")
    axes.set_xlim(left=floor)
    axes.set_yticks(range(len(names)), list(names), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("time to remove one domain (seconds, log; n/a: not applicable)")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _mean_seconds(run: Run, name: str) -> float | None:
    found = [
        read_json(run.of_operation(forget, name, "timings.json"))["RTE_seconds"]
        for forget, operations in run.unlearning.items()
        if "result" not in operations.get(name, {"result": "not run"})
    ]
    return float(np.mean(found)) if found else None


def unlearning_plots(runs: list[Run]) -> dict[str, tuple[str, plt.Figure | None]]:
    """Title -> file name and figure over all forget sets."""
    found = {
        "Utility against the cost of exact removal": ("tradeoff", plot_tradeoff(runs)),
        "Time to remove a domain": ("cost", plot_cost(runs)),
    }
    for run in runs:
        title = f"What the removal of one domain does to the others, {run.label}"
        found[title] = (f"causal_{run.name}", plot_causal(run))
    found["Routing mass that a purge covers, and its cost"] = ("coverage", plot_coverage(runs))
    found["One removal after another"] = ("sequence", plot_sequence(runs))
    return found
