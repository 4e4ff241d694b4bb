"""Runs that differ in nothing but their seed, as one row: means, and differences seed by seed."""

import json
import re
from itertools import takewhile

import matplotlib.pyplot as plt
import numpy as np

from tiered.report_experts import experts_of_run, measures
from tiered.runs import Run, cell
from tiered.statistics import mean_difference

# of a config: what utility does not depend on, and the seed
APART = ("name", "output_dir", "overwrite", "seed", "threads", "unlearn")
EXPERT_PAGES = ("expert_", "flow_")  # beginnings of the fields of eval that concern those alone


def seed_groups(runs: list[Run]) -> list[list[Run]]:
    """Runs by all that their utility depends on but the seed, where there are two seeds or more;
    in order of the first of each."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        kept = {name: part for name, part in run.config.items() if name not in APART}
        kept["eval"] = {n: v for n, v in kept["eval"].items() if not n.startswith(EXPERT_PAGES)}
        groups.setdefault(json.dumps(kept, sort_keys=True), []).append(run)
    found = (sorted(group, key=lambda r: r.config["seed"]) for group in groups.values())
    return [group for group in found if group[0].config["seed"] != group[-1].config["seed"]]


def seed_tables(runs: list[Run], first: Run) -> dict[str, list[dict[str, str]]]:
    """Title -> rows; empty where no two runs differ in their seed alone.

    A table per split that was scored. Differences are against the runs of `first`'s settings where
    the table has them, else against its first row; their interval is a paired t test's, the pairs
    being seeds."""
    groups, tables = seed_groups(runs), {}
    for split in dict.fromkeys(map(_split, groups)):
        own = [group for group in groups if _split(group) == split]
        reference = next((g for g in own if any(run is first for run in g)), own[0])
        title = f"Over seeds (bits per byte, {split}, macro over domains)"
        tables[title] = [_utility_row(group, reference) for group in own]
    rows = [row for group in groups if (row := _expert_row(group))]
    return tables | ({"Experts over seeds (T9, mean over layers, ± SD)": rows} if rows else {})


def _split(group: list[Run]) -> str:
    return group[0].config["eval"]["split"]


def group_name(group: list[Run]) -> str:
    """What the names of a group's runs begin with, without what leads to the seed."""
    letters = zip(*(run.name for run in group), strict=False)
    shared = "".join(found[0] for found in takewhile(lambda c: len(set(c)) == 1, letters))
    return re.sub(r"[-_.](s|seed)?\d*$", "", shared) or group[0].name


def _by_seed(group: list[Run]) -> dict[int, float]:
    """seed -> macro bits per byte under the run's scope; of several runs of a seed their mean, no
    entry where it is undefined."""
    found: dict[int, list[float]] = {}
    for run in group:
        figures = run.utility["macro"][run.scope]
        if not isinstance(figures, str):
            found.setdefault(run.config["seed"], []).append(figures["bpb"])
    return {seed: float(np.mean(values)) for seed, values in found.items()}


def _utility_row(group: list[Run], reference: list[Run]) -> dict[str, str]:
    found, base = _by_seed(group), _by_seed(reference)
    values = np.array(list(found.values()))
    both = [seed for seed in found if seed in base]
    row = {
        "experiment": group_name(group),
        "n": str(group[0].n),
        "routing": group[0].scope,
        "seeds": " ".join(map(str, found)) or "none",
        "mean": cell(values.mean()) if found else "undefined",
        "SD": cell(values.std(ddof=1), 4) if len(found) > 1 else "undefined",
        "each seed": " ".join(f"{v:.3f}" for v in values),
        f"less {group_name(reference)}": "",
        "lower with": "",
    }
    if group is not reference:
        row["lower with"] = f"{sum(found[s] < base[s] for s in both)} of {len(both)} seeds"
        differences = np.array([found[s] for s in both]), np.array([base[s] for s in both])
        row[f"less {group_name(reference)}"] = (
            cell(mean_difference(*differences).as_json()) if len(both) > 1 else "undefined"
        )
    return row


def _expert_row(group: list[Run]) -> dict[str, str]:
    """Mean and standard deviation over a group's runs with expert pages of the measures that all
    of them have, each first averaged over a run's partitions; empty where fewer than two have."""
    every = ([measures(f) for f in experts_of_run(run).values()] for run in group)
    runs = [tables for tables in every if tables]
    if len(runs) < 2:
        return {}
    row = {"experiment": group_name(group), "runs": str(len(runs))}
    for name, (_, digits) in runs[0][0].items():
        values = [[table[name][0] for table in tables] for tables in runs]
        row[name] = "none"
        if not any(None in of_run for of_run in values):
            means = [np.mean(of_run) for of_run in values]
            row[name] = f"{np.mean(means):.{digits}f} ± {np.std(means, ddof=1):.{digits}f}"
    return row


# ---------------------------------------------------------------- plot


def plot_seeds(runs: list[Run]) -> plt.Figure | None:
    """Bits per byte of every seed and their mean, experiments in order of that."""
    found = [(group, values) for group in seed_groups(runs) if (values := _by_seed(group))]
    if not found:
        return None
    found.sort(key=lambda entry: np.mean(list(entry[1].values())))
    seeds = sorted({seed for _, values in found for seed in values})
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.3 * len(found)), layout="constrained")
    places = range(len(found))
    style = {"ls": "", "color": "black", "mfc": "white", "ms": 6}
    for seed, marker in zip(seeds, "os^Dv<>phX" * len(seeds), strict=False):
        points = [values.get(seed, np.nan) for _, values in found]
        axes.plot(points, places, marker=marker, label=f"seed {seed}", **style)
    means = [np.mean(list(values.values())) for _, values in found]
    axes.plot(means, places, marker="|", ms=16, mew=2, ls="", color="gray", label="mean", zorder=1)
    axes.set_yticks(places, [group_name(group) for group, _ in found])
    axes.invert_yaxis()
    axes.grid(axis="y", color="lightgray", lw=0.6)
    splits = ", ".join(dict.fromkeys(_split(group) for group, _ in found))
    axes.set_xlabel(f"{splits} loss, macro mean (bits per byte)")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
