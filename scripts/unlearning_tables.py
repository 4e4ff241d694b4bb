"""Tables of docs/results/unlearning.md from finished runs, as Markdown.

Reads   RUN/metrics.json, unlearn/
Writes  standard output

    python scripts/unlearning_tables.py runs/unlearning-n01 runs/unlearning-n04 runs/unlearning-n16

Cells are means over forget sets, with the least and the largest where they differ.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tiered.report import markdown  # noqa: E402
from tiered.report_unlearning import is_seed, most_repeated  # noqa: E402
from tiered.runs import Run, load_run, point  # noqa: E402
from tiered.store import UserError, read_json  # noqa: E402


def spread(values: Iterable[float], form: str) -> str:
    """Mean (least, largest) of the numbers there are."""
    known = [v for v in values if not np.isnan(v)]
    if not known:
        return ""
    mean, *ends = (format(v, form) for v in (np.mean(known), min(known), max(known)))
    return mean if ends[0] == ends[1] else f"{mean} ({', '.join(ends)})"


def board(run: Run) -> Iterator[dict[str, str]]:
    """Every operation over all forget sets; golds of other seeds are one row."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for forget in run.unlearning:
        for name, r in run.measured(forget).items():
            seeds = run.config["unlearn"]["gold_seeds"] - 1
            label = f"gold, {seeds} other seeds" if is_seed(name) else name
            found.setdefault(label, []).append((name, r))
    for label, entries in found.items():
        results = [r for _, r in entries]
        words = Counter(r["verdict"] for r in results).most_common()
        files = [run.of_operation(r["forget"], name, "timings.json") for name, r in entries]
        exposed = [r["exposure"] for r in results if isinstance(r["exposure"], dict)]
        row = {
            "operation": label,
            "UA_norm": spread((point(r["UA_norm"]) for r in results), ".2f"),
            "gap to gold": spread((point(r["gap_to_gold"]) for r in results), ".3f"),
            "bpb on f": spread((point(r["bpb"]["test"]) for r in results), ".2f"),
            "change near": spread((point(r["bpb_change"]["near"]) for r in results), "+.3f"),
            "change far": spread((point(r["bpb_change"]["far"]) for r in results), "+.3f"),
            "AUC, 16x": spread(
                (point(r["AUC"]["LOSS"][most_repeated(r["AUC"]["LOSS"])]) for r in results), ".2f"
            ),
            "exposure 16x": spread((point(e["16"]) for e in exposed), ".1f"),
            "relearn advantage": spread((_advantage(r) for r in results), "+.2f"),
            "verdicts": ", ".join(f"{word} {count}" for word, count in words),
            "exact": "yes" if all(r["exact"] for r in results) else "no",
            "tokens / gold": spread((r["cost"]["tokens_relative_to_gold"] for r in results), ".2f"),
            "seconds": spread((read_json(path)["RTE_seconds"] for path in files), ".2f"),
        }
        yield {k: v for k, v in row.items() if v or k not in ("change near", "change far")}


def _advantage(r: dict[str, Any]) -> float:
    """Relearn advantage of an operation; NaN where no curve was asked for."""
    curve = r.get("robustness", {}).get("relearn")
    return point(curve["advantage_bpb"]) if curve else np.nan


def purges(run: Run) -> Iterator[dict[str, str]]:
    """The purge of each forget set beside the draws of its random controls."""
    for forget in run.unlearning:
        known = run.measured(forget)
        if "mask-skew" not in known:
            continue
        own = known["mask-skew"]["bpb_change"]
        row = {"n": str(run.n), "f": forget, "purged experts' share of f's mass": "-"}
        coverage = run.compartments.get("causal", {}).get("coverage", {}).get(forget)
        if coverage is not None:
            row["purged experts' share of f's mass"] = f"{np.mean(list(coverage.values())):.3f}"
        for group, label in (("test", "f"), ("near", "others (near)")):
            cell = own[group]
            row[label] = f"{cell['value']:+.3f} [{cell['low']:+.3f}, {cell['high']:+.3f}]"
            for name, kind in (("mask-random", "random"), ("mask-massmatched", "of equal mass")):
                draws = known[name]["draws"][group]
                row[f"{label}, {kind}"] = f"{min(draws):+.3f} to {max(draws):+.3f}"
        yield row


def power(runs: list[Run], measure: str) -> Iterator[dict[str, str]]:
    """AUC or TPR on the original of every attack: range over the forget sets where it has power."""
    for attack in runs[0].config["unlearn"]["attacks"]:
        row = {"attack": attack}
        for run in runs:
            originals = [run.measured(f)["original"][measure][attack] for f in run.unlearning]
            if measure == "AUC":
                row[f"n = {run.n}, all members"] = _range([c["all"] for c in originals])
                row[f"n = {run.n}, 16x"] = _range([c[most_repeated(c)] for c in originals])
            else:
                row[f"n = {run.n}"] = _range(originals)
        yield row


def _range(cells: list[Any]) -> str:
    values = [c["value"] for c in cells if isinstance(c, dict)]
    if not values:
        return ", ".join(sorted(set(cells)))
    ends = [format(v, ".2f") for v in (min(values), max(values))]
    text = ends[0] if ends[0] == ends[1] else " to ".join(ends)
    return text + (f" ({len(values)} of {len(cells)})" if len(values) < len(cells) else "")


def claims(run: Run) -> Iterator[dict[str, str]]:
    """Claims, those that say the same of several forget sets together."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for claim in run.checks:
        grouped.setdefault(claim["claim"], []).append(claim)
    for text, entries in grouped.items():
        measured = list(dict.fromkeys(e["measured"] for e in entries))
        holds = [e["holds"] for e in entries]
        yield {
            "n": str(run.n),
            "claim": text,
            "f": ", ".join(e["forget"] for e in entries),
            "measured": "; ".join(measured),
            "holds": "yes" if all(h is True for h in holds) else ", ".join(map(str, holds)),
        }


def compartments(run: Run) -> str:
    """One line: Level 1, Level 2 by router group, selectivity."""
    level1, level2 = run.compartments["level1"], run.compartments["level2"]
    into = level1["retained_tokens_routed_into"].values()
    parts = [
        f"n = {run.n}: NMI {level1['nmi']:.3f} ({level1['nmi_shuffled']:.3f} shuffled,"
        f" {level1['nmi_maximal']:.3f} largest)",
        f"retained tokens routed into f's partition: mean {np.mean(list(into)):.4f}, from"
        f" {min(into):.4f} to {max(into):.4f}",
    ]
    for k, found in level2.items():
        for group in found["groups"] if isinstance(found, dict) else ():
            keys = ("nmi_above_chance", "effective_domains_per_expert")
            keys += ("effective_experts_per_domain",)
            values = " ".join(f"{group[key]:.3f}" for key in keys)
            parts.append(f"partition {k}: NMI above chance, domains, experts {values}")
    chosen = run.compartments["causal"]["selectivity"].items()
    parts.append("selectivity " + ", ".join(f"{k} {v}" for k, v in chosen))
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs with unlearning")
    try:
        runs = [load_run(folder) for folder in parser.parse_args(arguments).runs]
        for run in runs:
            if not run.unlearning:
                raise UserError(f"{run.folder}: run python unlearn_benchmarks.py CONFIG first")
    except UserError as error:
        sys.exit(str(error))
    for run in runs:
        print(f"## n = {run.n}\n\n{markdown(list(board(run)))}")
    print(markdown([row for run in runs for row in purges(run)]))
    for measure in ("AUC", "TPR_at_1_FPR"):
        print(f"{measure}\n\n{markdown(list(power(runs, measure)))}")
    print(markdown([row for run in runs for row in claims(run)]))
    for run in (r for r in runs if r.compartments):
        print(compartments(run) + "\n")


if __name__ == "__main__":
    main()
