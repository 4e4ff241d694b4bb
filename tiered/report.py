"""Tables, plots and one self-contained page from finished runs.

    python -m tiered.report runs/quickstart-n01 runs/quickstart-n16 --output runs/report

Reads each run's config.yaml, metrics.json, eval/utility.json, models/<k>/record.json, the timings
and the row scores; writes tables/*.md, tables/*.csv, plots/*.png, plots/*.svg, index.html and a
page per forget set. Nothing is computed here that is not a mean, a ratio or a comparison of stored
numbers.
"""

import argparse
import base64
import csv
import html
import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from tiered.report_experts import (
    EXPERT_STYLE,
    ablation_table,
    continuity_table,
    expert_tables,
    experts_html,
    experts_of_run,
    flow_html,
    group_table,
    how_read,
    model_plots,
    skew_table,
    terms_html,
)
from tiered.report_seeds import plot_seeds, seed_tables
from tiered.report_trunk import trunk_tables
from tiered.report_unlearning import (
    forget_plots,
    forget_tables,
    most_repeated,
    unlearning_plots,
    unlearning_tables,
)
from tiered.runs import Run, cell, load_run, same_columns, tell_apart
from tiered.store import TIMINGS, UserError, read_json, write_text

matplotlib.rcParams["svg.hashsalt"] = "tiered"  # equal figures are equal files
MARKERS = {"oracle": ("o", "-"), "token": ("s", "--"), "sample": ("^", ":")}


# ---------------------------------------------------------------- tables


def size_table(runs: list[Run]) -> list[dict[str, str]]:
    """T1: parameters, tokens and steps of every run, summed over partition models."""
    rows = []
    for run in runs:
        paths = [run.folder / "models" / k / "record.json" for k in run.utility["models"]]
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
                "parameters, all models": cell(_stored(run, counts, "total")),
                "non-embedding": cell(_stored(run, counts, "non_embedding")),
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


def _stored(run: Run, counts: list[dict[str, int]], name: str) -> int:
    """Parameters of all models of a run; what they share counts once."""
    if "own" not in counts[0]:
        return sum(c[name] for c in counts)
    own = sum(c["own"] for c in counts)
    # a part of a trunk has its own share inside, a LoRA expert is merged into the seed's weights
    inside = 0 if run.config["model"]["type"] == "lora" else counts[0]["own"]
    return own + counts[0][name] - inside


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
    return same_columns(rows)


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
    return float(np.mean([sum(d in g for g in groups) for d in run.domains]))


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


def floor_table(runs: list[Run]) -> list[dict[str, str]]:
    """Floors below which a run is a toy: utility, routing, power of the attack."""
    rows = []
    for run in runs:
        cells = run.domains
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
            cells = operations["original"]["AUC"].get("LOSS")
            if cells is None:
                continue
            repeated = cells[most_repeated(cells)]
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


def _accuracy_at(run: Run, length: int) -> float | str:
    """Mean over domains of the routing accuracy of prefixes of a length."""
    found = [d["routing_accuracy"] for d in run.domains.values()]
    if any(isinstance(f, str) or str(length) not in f for f in found):
        return "undefined"
    return float(np.mean([f[str(length)] for f in found]))


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table."""
    if not rows:
        return ""
    lines = [list(rows[0]), *(list(r.values()) for r in rows)]
    lines = ["| " + " | ".join(v.replace("|", r"\|") for v in line) + " |" for line in lines]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


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


def _heat_maps(runs: list[Run]) -> tuple[plt.Figure, list[plt.Axes]]:
    """A figure with a panel per run, at most three side by side, as wide as the widest run of its
    column has partitions."""
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    widths = [max(4, *(run.n for run in runs[i::columns])) for i in range(columns)]
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(2 + 0.34 * sum(widths), 5 * rows),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    for spare in grid.flat[len(runs) :]:
        spare.axis("off")
    return figure, list(grid.flat[: len(runs)])


def plot_routing(runs: list[Run]) -> plt.Figure | None:
    """Which partition each domain's test rows are routed to; None where every run has one."""
    runs = [r for r in sorted(runs, key=lambda r: r.n) if r.n > 1]
    if not runs:
        return None
    figure, panels = _heat_maps(runs)
    for axes, run in zip(panels, runs, strict=True):
        counts = np.array(run.utility["routing"]["confusion"], dtype=float)
        share = counts / counts.sum(1, keepdims=True)
        image = axes.imshow(share, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axes.set_yticks(range(len(share)), list(run.domains))
        axes.set_xticks(range(run.n))
        axes.set_xlabel("partition")
        axes.set_title(run.label, fontsize=10)
    panels[0].set_ylabel("domain of the text")
    figure.colorbar(image, ax=panels, label="share of test rows")
    return figure


def plot_mixtures(runs: list[Run]) -> plt.Figure | None:
    """What distance mixtures change against the run's own top-1: by how many models are mixed, and
    by T."""
    runs = [r for r in runs if r.n > 1 and "mixtures" in r.utility and _distance_mixtures(r)]
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


# ---------------------------------------------------------------- page

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#111}
table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #bbb;padding:2px 6px;
text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}
th{background:#eee}.scroll{overflow-x:auto;margin:1rem 0}img{max-width:100%}
"""


INTRODUCTION = (
    "<p>Utility is bits per byte on test rows (lower is better), against each domain's add-one"
    " smoothed unigram. A removal is exact when every remaining artefact is bit for bit the gold"
    " retrain's; what that claim rests on stands beside it. Words instead of numbers: <i>not"
    " applicable</i> (the operation would remove every model, or has nothing to act on),"
    " <i>none</i> (no such domain), <i>undefined</i>, <i>no power</i> (the attack does not succeed"
    " on the original model, so its failure elsewhere proves nothing).</p>"
)
LEADERBOARD = (
    "<p>Leaderboards order operations by their mean gap to gold over forget sets; every part of"
    " that and every price stands beside it. The aim is closeness to gold: what the golds of other"
    " seeds show is what a difference of seeds alone looks like.</p>"
)


def build(folders: list[Path], output: Path) -> Path:
    """Write the report of runs into a folder; returns the page."""
    loaded = [load_run(folder) for folder in dict.fromkeys(folders)]
    runs = sorted(loaded, key=lambda r: (r.n, r.name))
    tell_apart(runs)
    names = html.escape(", ".join(run.name for run in runs))
    tables = {
        "Sizes": size_table(runs),
        "Utility (macro over domains)": macro_table(runs),
        "Ways to partition": partition_table(runs),
        "Utility per domain (bits per byte, test)": domain_table(runs),
        "Floors": floor_table(runs),
    }
    if any("mixtures" in run.utility for run in runs):
        tables["Mixtures (bits per byte, macro over domains)"] = mixture_table(runs)
    tables |= {title: rows for title, rows in trunk_tables(runs).items() if rows}
    tables |= seed_tables(runs, loaded[0])
    tables |= expert_tables(runs)
    for run in runs:
        if (_clusters(run) or {}).get("top_terms"):
            tables[f"Clusters of {run.name}"] = term_table(run)
    plots = {
        "Bits per byte against the number of partitions": ("utility", plot_utility(runs)),
        "Bits per byte of every seed": ("seeds", plot_seeds(runs)),
        "Where each domain is routed": ("routing", plot_routing(runs)),
        "Mixtures of partition models": ("mixtures", plot_mixtures(runs)),
        "Every model on every cluster or domain": ("experts", plot_experts(runs)),
    }
    page = Page(output, f"Tiered routing: {names}", INTRODUCTION)
    for path in (path for run in runs for path in run.missing):
        text = f"{path} is missing: what it holds is not in the report"
        print(f"tiered.report: {text}", file=sys.stderr)
        page.add(f"<p><strong>{html.escape(text)}.</strong></p>")
    forgets = list(dict.fromkeys(f for run in runs for f in run.unlearning))
    if forgets:
        links = [f'<a href="forget_{f}.html">{html.escape(f)}</a>' for f in forgets]
        page.add(f"<p>A page per forget set: {', '.join(links)}.</p>")
        page.plots(unlearning_plots(runs))
        page.add(LEADERBOARD)
        page.tables(unlearning_tables(runs))
    pages = [
        expert_page(run, k, found, output)
        for run in tqdm(runs, "pages of experts", unit="run", disable=None)  # on a terminal only
        for k, found in experts_of_run(run).items()
    ]
    if pages:
        links = [f'<a href="{path.name}">{html.escape(text)}</a>' for path, text in pages]
        page.add(f"<p>What experts do: {', '.join(links)}.</p>")
    page.plots(plots)
    page.tables(tables)
    for forget in forgets:
        back = '<p><a href="index.html">All runs, all forget sets</a></p>'
        own = Page(output, f"Removing {forget}: {names}", back)
        found = forget_plots(runs, forget).items()
        own.plots({title: (f"{forget}_{name}", figure) for title, (name, figure) in found})
        own.tables(forget_tables(runs, forget))
        own.write(f"forget_{forget}.html")
    return page.write("index.html")


def expert_page(run: Run, k: str, found: dict[str, Any], output: Path) -> tuple[Path, str]:
    """Write the page of one model's experts; its path and title."""
    title = f"experts of {run.name}" + (f", partition {k}" if run.n > 1 else "")
    back = f'<p><a href="index.html">All runs</a></p>{EXPERT_STYLE}'
    page = Page(output, html.escape(title[0].upper() + title[1:]), back)
    page.add(f"<p>{how_read(found)}</p>{terms_html()}")
    page.plots(model_plots(run, k, found))
    page.add(
        "<h2>The way of a text through the layers, token by token</h2>"
        "<p>The expert that a token gave most weight, darker for more; all of its experts are"
        " in the cell's title. A character that several tokens spell stands at the last of them;"
        f" those before show its bytes (\\xe4).</p>{flow_html(found)}"
    )
    tables = {
        "by layer": group_table(found),
        "continuity": continuity_table(found),
        "domains": skew_table(found),
        "left out one at a time (change of bits per byte)": ablation_table(found),
    }
    page.tables({f"{title}: {name}": rows for name, rows in tables.items() if rows})
    page.add(f"<h2>Every expert</h2>{experts_html(found)}")
    return page.write(f"experts_{run.name}_{k}.html"), title


class Page:
    """One self-contained HTML page; its plots and tables are files as well."""

    def __init__(self, output: Path, title: str, introduction: str) -> None:
        self.output = output
        self.parts = [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            f"<title>{title}</title><style>{STYLE}</style>",
            f"<h1>{title}</h1>",
            introduction,
        ]

    def add(self, part: str) -> None:
        """A piece of HTML."""
        self.parts.append(part)

    def plots(self, plots: dict[str, tuple[str, plt.Figure | None]]) -> None:
        """Title -> file name and figure; None: there is nothing to show."""
        for title, (name, figure) in plots.items():
            if figure is not None:
                image = _save_plot(figure, self.output / "plots", name, title)
                self.add(f"<h2>{html.escape(title)}</h2>{image}")

    def tables(self, tables: dict[str, list[dict[str, str]]]) -> None:
        """Title -> rows."""
        for title, rows in tables.items():
            name = "".join(c if c.isalnum() else "_" for c in title.lower()).strip("_")
            write_text(self.output / "tables" / f"{name}.md", markdown(rows))
            write_text(self.output / "tables" / f"{name}.csv", _csv(rows))
            self.add(f"<h2>{html.escape(title)}</h2>{_html_table(rows)}")

    def write(self, name: str) -> Path:
        """The page as a file."""
        write_text(self.output / name, "\n".join(self.parts) + "\n</html>\n")
        return self.output / name


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
