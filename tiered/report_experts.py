"""The report's part on experts: tables over runs, plots, and a page for every model of a run.

Reads eval/experts.json and, where training was watched, models/<k>/observed.jsonl.
"""

import html
import json
import math
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from tiered.runs import Run, cell
from tiered.store import EXPERTS_FORMAT, HASHES, OBSERVED, UserError, read_json, verified

LINES = ("-", "--", ":", "-.")
BANDS = 64  # experts of a layer whose load through training is drawn
SATURATION = "router saturation"
VISIBLE = 5e-4  # change of bits per byte that three decimals show
FLOWS = 4  # texts whose flow is drawn as a plot, chosen ones first; the page has every text's table


def experts_of_run(run: Run) -> dict[str, dict[str, Any]]:
    """partition -> what its experts did; empty where a run has no expert pages. UserError where
    another version of the project wrote them."""
    path = run.folder / "eval" / "experts.json"
    if not path.is_file():
        return {}
    stored = read_json(path)
    if stored.get("format") != EXPERTS_FORMAT:
        raise UserError(
            f"{path}: written by another version of this project; run: python eval_det_router.py"
            " CONFIG"
        )
    return stored["partitions"]


def observed(run: Run, k: str) -> list[dict[str, Any]]:
    """What was noted while partition k's model was trained, in order of steps."""
    folder = run.folder / "models" / k
    if OBSERVED not in read_json(folder / HASHES):
        return []
    lines = verified(folder, OBSERVED).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- tables


def expert_tables(runs: list[Run]) -> dict[str, list[dict[str, str]]]:
    """T9: title -> rows, over all runs; empty where none has expert pages."""
    pages = [(run, k, found) for run in runs for k, found in experts_of_run(run).items()]
    tables = {
        "Experts (T9, mean over layers)": [_mean_row(*page) for page in pages],
        "The expert that costs a domain most (change of bits per byte)": [
            _costliest_row(*page) for page in pages if page[2]["ablation"].get("most")
        ],
    }
    return {title: rows for title, rows in tables.items() if rows}


def _costliest_row(run: Run, k: str, found: dict[str, Any]) -> dict[str, str]:
    most = found["ablation"]["most"]
    others = {d: v["value"] for d, v in most["change_bpb"].items() if d != most["domain"]}
    worst = max(others, key=others.get) if others else None
    return {
        "experiment": run.name,
        "partition": k,
        "left out": f"{layer_name(found, most['group'])}, expert {most['expert']}",
        "domain": most["domain"],
        "rows that it was found on": cell(most["found_bpb"]),
        "the other rows": cell(most["change_bpb"][most["domain"]]),
        "other domains there, mean": cell(
            float(np.mean(list(others.values()))) if others else None
        ),
        "largest of them": f"{others[worst]:.3f} ({worst})" if others else "none",
    }


def measures(found: dict[str, Any]) -> dict[str, tuple[float | None, int]]:
    """A model's measures, means over its layers (paths: over domains), and their decimals."""
    groups, steps = found["groups"], found["continuity"].get("1", {})

    def mean(entries: Iterable[dict[str, Any]], name: str) -> float | None:
        values = [entry[name] for entry in entries if entry[name] is not None]
        return float(np.mean(values)) if values else None

    paths = found["paths"].values()
    return {
        "MaxVio": (mean(groups, "max_violation"), 3),
        "MaxVio, layers pooled": (found["max_violation_pooled"], 3),
        "load entropy": (mean(groups, "load_entropy"), 3),
        "NMI": (mean(groups, "nmi"), 3),
        "NMI, shuffled": (mean(groups, "nmi_shuffled"), 3),
        "effective domains per expert": (mean(groups, "effective_domains_per_expert"), 2),
        "effective experts per domain": (mean(groups, "effective_experts_per_domain"), 1),
        "TIS": (mean(groups, "tis"), 3),
        "TIS by chance": (mean(groups, "tis_by_chance"), 3),
        "TIS attainable": (mean(groups, "tis_attainable"), 3),
        "TIS, words": (mean(groups, "tis_words"), 0),
        "ICS": (mean(groups, "ics"), 3),
        "ICS by chance": (mean(groups, "ics_by_chance"), 3),
        "ICS attainable": (mean(groups, "ics_attainable"), 3),
        "ICS, words": (mean(groups, "ics_words"), 0),
        "EC(1)": (steps.get("observed"), 3),
        "EC(1) by chance": (steps.get("by_chance"), 3),
        "top-1 path": (mean(paths, "top_1"), 3),
        "top-4 paths": (mean(paths, "top_4"), 3),
    }


def _mean_row(run: Run, k: str, found: dict[str, Any]) -> dict[str, str]:
    row = {"experiment": run.name, "partition": k, "experts per layer": str(found["experts"])}
    return row | {name: cell(value, digits) for name, (value, digits) in measures(found).items()}


def layer_name(found: dict[str, Any], g: int) -> str:
    """`layer 2`, or of a router group that serves several `layers 0-3`."""
    layers = found["layers"][g]
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"


def _layer_number(found: dict[str, Any], g: int) -> str:
    return layer_name(found, g).split()[1]


TERMS = {
    "MaxVio": "largest load over the mean load, less 1; a load is how often an expert is used. At"
    " most experts / those that a token (of a Monet: a head) uses - 1; pooled: of the loads of all"
    " layers together",
    "load entropy": "of the loads, over that of equal ones: 1 is balanced",
    "NMI": "normalised mutual information of domain and expert, by weight: 0 where experts do not"
    " tell domains apart, 1 where they are the domains; shuffled: with the labels of rows dealt"
    " out anew, what few rows and many experts give",
    "effective domains per expert, experts per domain": "exp of the conditional entropy: between"
    " how many an expert's (a domain's) weight is divided",
    "Jensen-Shannon divergence": "of the experts of two domains, in bits: 0 the same, 1 none in"
    " common",
    "TIS, ICS": "mean Jensen-Shannon distance (0 to 1) between a frequent word's experts and those"
    " of all tokens; and between its experts in a domain and in all, over words that are frequent"
    " in two domains or more. Between languages few are, often signs and single letters: mind"
    " their number. By chance: with words, or domains, dealt out anew; attainable: did no word, or"
    " domain, share an expert with the rest",
    "EC(s)": "expert continuity: share of uses of an expert that last for s more layers; by chance:"
    " did layers choose on their own",
    "used together": "of the tokens that use an expert, the share that uses the other as well",
    SATURATION: "of the experts that tokens use at the end of training, the share that"
    " they used at a step before",
    "path": "a token's heaviest expert in every layer; top-1, top-4: share of a domain's tokens on"
    " its most frequent path, on its four most frequent ones",
    "ratio": "a domain's experts are those with at least so many times as much of its weight as of"
    " any other domain's; coverage: share of the domain's weight that they hold, mean over layers",
    "left out": "change of bits per byte on these rows without an expert, or without all experts of"
    " a domain's most frequent path. They have no interval: mind the number of rows. The largest of"
    " many is too large on the rows on which it was found: the expert that costs a domain most is"
    " found on every other row and measured on the rest, with a paired t interval over rows",
}


def how_read(found: dict[str, Any]) -> str:
    """What the measures of a model's page are of."""
    rows = found["rows"].values()
    some = f"{min(rows)}" if min(rows) == max(rows) else f"{min(rows)} to {max(rows)}"
    tokens = sum(found["tokens"].values())
    parts = [f"Read: {some} rows of the {found['split']} split per domain, {tokens:,} tokens."]
    named = [g["weight_named"] for g in found["groups"] if g["weight_named"] is not None]
    if named and min(named) < 0.999:  # a Monet
        parts.append(
            "A use is an expert that a head keeps; paths, EC, TIS, ICS and words are of the"
            f" heaviest expert of every head, which hold {min(named):.1%} to {max(named):.1%} of"
            " the weight. A model in training is read as evaluation would read it: until its"
            " running statistics have settled, in the first 60 steps or so, a head keeps one or"
            " two experts."
        )
    if found["first_leaf"]:
        parts.append(
            "Experts are a tree's edges, level by level; all measures are of its leaves, the edges"
            f" from {found['first_leaf']} on, but for what can be left out, by ratio or one at a"
            " time: edges of every level."
        )
    if any(g["nmi"] is not None and g["nmi_shuffled"] is None for g in found["groups"]):
        parts.append("Rows times experts were too many to be kept: NMI has no shuffled baseline.")
    return " ".join(parts)


def group_table(found: dict[str, Any]) -> list[dict[str, str]]:
    """A model's measures, layer by layer."""
    names = {
        **{"max_violation": "MaxVio", "load_entropy": "load entropy", "nmi": "NMI"},
        **{"nmi_shuffled": "NMI, labels shuffled", "nmi_shuffled_sd": "its SD"},
        "effective_domains_per_expert": "effective domains per expert",
        "effective_experts_per_domain": "effective experts per domain",
        **{"tis": "TIS", "tis_by_chance": "TIS by chance", "tis_attainable": "TIS attainable"},
        "tis_words": "TIS, words",
        **{"ics": "ICS", "ics_by_chance": "ICS by chance", "ics_attainable": "ICS attainable"},
        **{"ics_words": "ICS, words", "ics_pairs": "ICS, words in domains"},
        "weight_named": "weight of named experts",
    }
    return [
        {"layer": _layer_number(found, g)} | {text: cell(group[n]) for n, text in names.items()}
        for g, group in enumerate(found["groups"])
    ]


def continuity_table(found: dict[str, Any]) -> list[dict[str, str]]:
    """EC(s) beside what chance gives."""
    return [
        {"measure": f"EC({s})", "observed": cell(v["observed"]), "by chance": cell(v["by_chance"])}
        for s, v in found["continuity"].items()
    ]


def skew_table(found: dict[str, Any]) -> list[dict[str, str]]:
    """Sizes of every domain's skewed sets (all layers together) and what they cover."""
    rows = []
    for domain in found["domains"]:
        row = {"domain": domain}
        for ratio, sets in found["skewed"].items():
            row[f"experts, ratio {ratio}"] = str(sum(sets[domain]["experts"]))
            row[f"coverage, ratio {ratio}"] = cell(sets[domain]["coverage"])
        paths = found["paths"][domain]
        row |= {"top-1 path": cell(paths["top_1"]), "top-4 paths": cell(paths["top_4"])}
        row["paths"] = cell(paths["paths"])
        if paths["uncounted"]:
            row["paths"] += f" and others of {paths['uncounted']:.1%}"
        rows.append(row)
    return rows


def ablation_table(found: dict[str, Any]) -> list[dict[str, str]]:
    """Change of bits per byte on every domain when an expert, or a whole path, is left out."""
    ablation = found["ablation"]
    if not ablation:
        return []
    named = [
        (f"{layer_name(found, e['group'])}, expert {e['expert']}", e) for e in ablation["experts"]
    ]
    for domain, entry in ablation["paths"].items():
        named.append((f"path of {domain}: {' '.join(map(str, entry['path']))}", entry))
    rows = []
    for text, entry in named:
        change = entry["change_bpb"]
        worst = max(change, key=change.get)
        hit = worst if change[worst] >= VISIBLE else "none"
        row = {"left out": text, "hits most": hit}
        rows.append(row | {d: f"{v:+.3f}" for d, v in change.items()})
    return rows


# ---------------------------------------------------------------- plots


def model_plots(run: Run, k: str, found: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Title -> file name and figure, of one model."""
    name = f"experts_{run.name}_{k}"
    return {
        "Which experts every domain uses": (f"{name}_domains", plot_domains(found)),
        "How far domains use different experts": (f"{name}_js", plot_divergence(found)),
        "Experts that a token uses together": (f"{name}_together", plot_together(found)),
        "The way of a text through the layers": (f"{name}_flow", plot_flow(found)),
        "Experts through training": (f"{name}_training", plot_training(observed(run, k), found)),
    }


def _panels(count: int, width: float, height: float) -> tuple[plt.Figure, list[plt.Axes]]:
    columns = min(count, 2)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        layout="constrained",
    )
    for spare in axes.flat[count:]:
        spare.axis("off")
    return figure, list(axes.flat[:count])


def plot_domains(found: dict[str, Any]) -> plt.Figure:
    """Per layer: share of every domain's weight that goes through every expert, experts in order
    of the domain that uses them most."""
    groups, domains = found["groups"], found["domains"]
    figure, panels = _panels(len(groups), 6.5, max(1.7, 0.9 + 0.2 * len(domains)))
    for g, (axes, group) in enumerate(zip(panels, groups, strict=True)):
        share = np.array(group["share_of_domain"])
        order, experts = np.lexsort((-share.max(0), share.argmax(0))), found["experts"]
        image = axes.imshow(share[:, order] * experts, cmap="Greys", vmin=0, vmax=4, aspect="auto")
        axes.set_yticks(range(len(domains)), domains)
        all_of = f"{len(order)} of {experts} " if len(order) < experts else ""
        axes.set_xlabel(f"{all_of}experts, by the domain that uses them most")
        axes.set_ylabel("domain")
        axes.set_title(layer_name(found, g), fontsize=10)
        if experts <= 32:
            axes.set_xticks(range(len(order)), np.array(group["drawn"])[order], fontsize=7)
    figure.colorbar(image, ax=panels, extend="max")
    figure.suptitle("weight, over an equal share", fontsize=10)  # longer than two domains are high
    return figure


def plot_divergence(found: dict[str, Any]) -> plt.Figure | None:
    """Per layer: Jensen-Shannon divergence of the experts of every two domains, in bits."""
    groups, domains = found["groups"], found["domains"]
    if len(domains) < 2:
        return None
    size = 1.2 + 0.25 * len(domains)
    figure, panels = _panels(len(groups), size + 0.6, size)
    unknown = np.full((len(domains), len(domains)), np.nan)
    tables = [unknown if g["js_bits"] is None else g["js_bits"] for g in groups]
    tables = np.array(tables, dtype=float)  # of a domain that no expert is left to: nan
    most = 1.0 if np.isnan(tables).all() else np.nanmax(tables) or 1.0
    for g, axes in enumerate(panels):
        image = axes.imshow(tables[g], cmap="Greys", vmin=0, vmax=most)
        axes.set_xticks(range(len(domains)), domains, rotation=90)
        axes.set_yticks(range(len(domains)), domains)
        axes.set_title(layer_name(found, g), fontsize=10)
        axes.set_xlabel("domain")
        axes.set_ylabel("domain")
    figure.colorbar(image, ax=panels)
    figure.suptitle("Jensen-Shannon divergence (bits)", fontsize=10)
    return figure


def plot_together(found: dict[str, Any]) -> plt.Figure | None:
    """Per layer: of the tokens that use an expert, the share that uses another as well, busiest
    experts first; None where no token uses two."""
    tables = [np.array(group["together"]["share"]) for group in found["groups"]]
    apart = [np.where(np.eye(len(t), dtype=bool), np.nan, t) for t in tables]
    most = max((np.nanmax(t) for t in apart if len(t) > 1), default=0.0)
    if not most > 0:
        return None
    figure, panels = _panels(len(apart), 4.6, 4.0)
    for g, (axes, table) in enumerate(zip(panels, apart, strict=True)):
        experts = found["groups"][g]["together"]["experts"]
        image = axes.imshow(table, cmap="Greys", vmin=0, vmax=most)
        axes.set_xticks(range(len(experts)), experts, rotation=90, fontsize=6)
        axes.set_yticks(range(len(experts)), experts, fontsize=6)
        axes.set_xlabel("other expert")
        axes.set_ylabel("expert, the busiest first")
        axes.set_title(layer_name(found, g), fontsize=10)
    figure.colorbar(image, ax=panels)
    figure.suptitle("share of an expert's tokens that use the other too", fontsize=10)
    return figure


def saturation(moments: list[dict[str, Any]]) -> np.ndarray:
    """Router saturation (arXiv:2409.02060, section 5), (moments, G): of the experts that tokens
    use at the last moment, the share that they used at each; nan where none is left."""
    last, found = moments[-1]["chosen"], []
    for moment in moments:
        shares = []
        for then, now in zip(moment["chosen"], last, strict=True):
            both = sum(len({*a} & {*b}) for a, b in zip(then, now, strict=True))
            uses = sum(map(len, now))
            shares.append(both / uses if uses else math.nan)
        found.append(shares)
    return np.array(found)


def plot_flow(found: dict[str, Any]) -> plt.Figure | None:
    """The tokens of a text through the experts that they used most, layer by layer: the wider a
    line, the more of them take that step."""
    chosen = list(found["flow"])[:FLOWS]
    if not chosen:
        return None
    figure, panels = _panels(len(chosen), 6.5, 3.6)
    experts, layers = found["experts"], len(found["groups"])
    for axes, name in zip(panels, chosen, strict=True):
        # a token that no expert is left to is drawn below them
        flow = found["flow"][name]["groups"]
        tops = np.array([[t[0][0] if t else -1 for t in group] for group in flow])
        for g in range(layers - 1):
            steps, counts = np.unique(tops[g : g + 2], axis=1, return_counts=True)
            for (a, b), count in zip(steps.T, counts, strict=True):
                width = 0.6 + 5 * count / tops.shape[1]
                axes.plot([g, g + 1], [a, b], color="0.25", linewidth=width, alpha=0.6)
        for g in range(layers):
            used, counts = np.unique(tops[g], return_counts=True)
            axes.scatter([g] * len(used), used, s=15 + 8 * counts, color="black", zorder=3)
        axes.set_xticks(range(layers), [_layer_number(found, g) for g in range(layers)])
        axes.set_ylim(-1.5, experts)
        axes.set_xlabel("layer")
        axes.set_ylabel("expert of a token")
        axes.set_title(f"{name}: {tops.shape[1]} tokens", fontsize=10)
    return figure


def plot_training(moments: list[dict[str, Any]], found: dict[str, Any]) -> plt.Figure | None:
    """Load of every expert against the training step, layer by layer; MaxVio, NMI and router
    saturation beside."""
    if len(moments) < 2:
        return None
    steps = [m["step"] for m in moments]
    loads = np.array([m["load"] for m in moments])  # (moments, G, X)
    layers = loads.shape[1]
    measures = {
        "MaxVio": [m["max_violation"] for m in moments],
        "NMI of domain and expert": [m["nmi"] for m in moments],
    }
    if all("chosen" in m for m in moments):  # older models were not watched so closely
        measures[SATURATION] = saturation(moments)
    figure, panels = _panels(layers + len(measures), 6.0, 2.8)
    for g, axes in enumerate(panels[:layers]):
        order = loads[-1, g].argsort()[::-1][:BANDS]
        stacked = loads[:, g, order].T
        shades = plt.get_cmap("Greys")(np.linspace(0.15, 0.75, len(order)))
        axes.stackplot(steps, stacked, colors=shades, edgecolor="white", linewidth=0.3)
        axes.set_ylim(0, 1)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("share of uses")
        some = f", the {BANDS} busiest of {loads.shape[2]}" if loads.shape[2] > BANDS else ""
        axes.set_title(f"{layer_name(found, g)}: one band per expert{some}", fontsize=10)
    for axes, (text, values) in zip(panels[layers:], measures.items(), strict=True):
        table = np.array(values, dtype=float)  # None: nan
        for g in range(layers):
            style = {"color": "black", "alpha": 1 - 0.15 * (g // 4)}
            axes.plot(steps, table[:, g], LINES[g % len(LINES)], **style)
            at = 0 if text == SATURATION else -1  # where all lines end at 1
            place = {"ha": "right" if at == 0 else "left", "fontsize": 8}
            axes.annotate(f" {_layer_number(found, g)} ", (steps[at], table[at, g]), **place)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(text)
        side = "start" if text == SATURATION else "end"
        axes.set_title(f"one line per layer, numbered at its {side}", fontsize=10)
    return figure


# ---------------------------------------------------------------- pages

EXPERT_STYLE = """
<style>.flow td{text-align:center;white-space:pre;min-width:2.2em}.flow th{font-weight:normal}
.expert{border-top:1px solid #bbb;padding:.3rem 0}.expert b{margin-right:.6rem}
.words span{border:1px solid #bbb;padding:0 .3em;margin-right:.3em;white-space:pre}
.context{font-size:13px;margin:.1rem 0 .1rem 1rem}.context mark{background:#000;color:#fff}
details{margin:.3rem 0}summary{cursor:pointer}</style>
"""


def terms_html() -> str:
    """What the words of a page mean."""
    lines = "".join(f"<li><b>{html.escape(t)}</b>: {html.escape(d)}</li>" for t, d in TERMS.items())
    return f"<details><summary>What the measures are</summary><ul>{lines}</ul></details>"


def flow_html(found: dict[str, Any]) -> str:
    """Per text a table: a column per token, a row per layer; expert, shaded by its weight."""
    parts = []
    for i, (name, flow) in enumerate(found["flow"].items()):
        head = "".join(f"<th><bdi>{_visible(t)}</bdi></th>" for t in flow["tokens"])
        body = []
        most = max((t[0][1] for group in flow["groups"] for t in group if t), default=1.0)
        for g, group in enumerate(flow["groups"]):
            cells = []
            for tops in group:
                if not tops:
                    cells.append("<td>\u2205</td>")
                    continue
                shade = round(255 - 140 * min(1.0, tops[0][1] / most))
                others = ", ".join(f"{e} ({w:.2f})" for e, w in tops)
                style = f"background:rgb({shade},{shade},{shade})"
                cells.append(f'<td style="{style}" title="{others}">{tops[0][0]}</td>')
            body.append(f"<tr><th>{layer_name(found, g)}</th>{''.join(cells)}</tr>")
        table = f"<table><tr><th></th>{head}</tr>{''.join(body)}</table>"
        opened = " open" if i == 0 else ""
        parts.append(
            f"<details{opened}><summary>{html.escape(name)}</summary>"
            f"<div class='scroll flow'>{table}</div></details>"
        )
    return "".join(parts)


def experts_html(found: dict[str, Any]) -> str:
    """Every shown expert: load, domains, words, contexts; layer by layer."""
    parts = []
    for g, experts in enumerate(found["shown"]):
        rows = []
        for expert in experts:
            domains = sorted(expert["domains"].items(), key=lambda i: -i[1])[:4]
            text = ", ".join(f"{html.escape(d)} {v:.0%}" for d, v in domains)
            words = "".join(f"<span><bdi>{_visible(w)}</bdi></span>" for w in expert["words"])
            contexts = "".join(
                f"<div class=context>{html.escape(c['domain'])} {c['weight']:.2f}:"
                f" <bdi>{html.escape(c['text'][0])}<mark>{_visible(c['text'][1])}</mark>"
                f"{html.escape(c['text'][2])}</bdi></div>"
                for c in expert["contexts"]
            )
            rows.append(
                f"<div class=expert><b>expert {expert['expert']}</b> {expert['load']:.1%} of uses;"
                f" {text}<div class=words>{words}</div>"
                f"<details><summary>contexts</summary>{contexts}</details></div>"
            )
        opened = " open" if g == 0 else ""
        some = f"{len(experts)} of {found['experts']} experts, the busiest first"
        shown = f"{layer_name(found, g)}: {some}"
        parts.append(f"<details{opened}><summary>{shown}</summary>{''.join(rows)}</details>")
    return "".join(parts)


def _visible(text: str) -> str:
    """A token as HTML; spaces and line breaks are drawn."""
    return html.escape(text.replace(" ", "\u2423").replace("\n", "\u21b5")) or "\u2205"
