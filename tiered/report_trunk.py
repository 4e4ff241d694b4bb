"""Tables of systems that share a trunk or a seed LM: novel domains, adaptation, experts inside."""

from typing import Any

import numpy as np

from tiered.runs import Run, cell
from tiered.store import read_json

INSIDE = {  # how an expert of a token is found, in the order of the table
    "base": "none: the seed LM alone",
    "parameter_average": "merged: the mean of all experts",
    "average_activation": "average activation, per token and linear map",
    "arrow": "Arrow, per token and linear map",
    "phatgoose": "PHATGOOSE, per token and linear map",
    "glider": "Glider, per token and linear map, and per query",
    "average": "average of all experts' probabilities",
    "bayes_cached": "Bayes, cached prior",
}


def trunk_tables(runs: list[Run]) -> dict[str, list[dict[str, str]]]:
    """Title -> rows; empty where no run has what a table is about."""
    return {
        "Novel domains (T7, bits per byte)": novel_table(runs),
        "Adaptation to added domains (T7, perplexity)": adaptation_table(runs),
        "LoRA experts, held in and held out (T8, bits per byte)": inside_table(runs),
    }


def _bpb(value: Any) -> str:
    return cell(value["bpb"] if isinstance(value, dict) else value)


def novel_table(runs: list[Run]) -> list[dict[str, str]]:
    """What every run makes of domains that no model was trained on, and of the others."""
    rows = []
    for run in runs:
        if "novel_macro" not in run.utility:
            continue
        found = {f"{run.scope} routing": (run.utility["macro"], run.utility["novel_macro"])}
        found = {label: (a[run.scope], b[run.scope]) for label, (a, b) in found.items()}
        mixtures = run.utility.get("mixtures", {})
        for label, figures in mixtures.get("novel_macro", {}).items():
            found[label] = mixtures["macro"][label], figures
        for label, (held_in, novel) in found.items():
            row = {"experiment": run.name, "n": str(run.n), "mixture": label}
            row |= {"trained domains": _bpb(held_in), "novel domains": _bpb(novel)}
            for domain in run.utility["novel_domains"]:
                entry = run.utility["domains"][domain]["scopes"][run.scope]
                if label in mixtures.get("novel_macro", {}):
                    entry = mixtures["domains"][domain][label]
                row[domain] = _bpb(entry)
            rows.append(row)
    return rows


def adaptation_table(runs: list[Run]) -> list[dict[str, str]]:
    """A model that went on from the nearest one with a new domain: what it gained there, and what
    it has lost of the domains of the model that it began as (which stays beside it)."""
    rows = []
    for run in runs:
        tables = run.utility.get("mixtures", {}).get("expert_perplexity", {})
        for k in range(run.n):
            path = run.folder / "models" / str(k) / "record.json"
            record = read_json(path) if path.is_file() else {}
            if "started_from" not in record or not tables:
                continue
            (domain,) = record["partition"]["members"]
            start = record["started_from"]["partition"]
            perplexity = tables["domain"]
            before = [d for d in run.utility["partitions"][start] if d in perplexity]
            old = {j: _geometric([perplexity[d][j] for d in before]) for j in (start, k)}
            rows.append(
                {
                    "experiment": run.name,
                    "added": domain,
                    "started from": " ".join(before),
                    "posterior": cell(record["started_from"]["posterior"][str(start)]),
                    "added domain, before": cell(perplexity[domain][start], 1),
                    "added domain, after": cell(perplexity[domain][k], 1),
                    "old domains, model it began as": cell(old[start], 1),
                    "old domains, adapted model": cell(old[k], 1),
                    "trained parameters": cell(_trained(record)),
                }
            )
    return rows


def _geometric(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _trained(record: dict[str, Any]) -> int:
    return record["parameters"].get("own", record["parameters"]["total"])


def inside_table(runs: list[Run]) -> list[dict[str, str]]:
    """Ways to choose LoRA experts, on the domains that they were trained on and on others."""
    rows = []
    for run in runs:
        mixtures = run.utility.get("mixtures", {}).get("macro", {})
        if not {"phatgoose", "glider", "arrow", "average_activation"} & set(mixtures):
            continue
        novel = run.utility["mixtures"].get("novel_macro", {})
        found = {
            text: (mixtures[m], novel.get(m, "none")) for m, text in INSIDE.items() if m in mixtures
        }
        for scope, text in (("sample", "retrieval, per row"), ("oracle", "oracle")):
            figures = run.utility["macro"].get(scope, "none")
            found[text] = figures, run.utility.get("novel_macro", {}).get(scope, "none")
        for text, (held_in, held_out) in found.items():
            rows.append(
                {
                    "experiment": run.name,
                    "experts chosen by": text,
                    "held-in domains": _bpb(held_in),
                    "held-out domains": _bpb(held_out),
                }
            )
    return rows
