"""Claims that a finished benchmark must bear out, each with what was measured.

Attacks on golds and exact deletions must be at chance; over forget sets x operations x attacks
some of many cells leave their band by luck, so their p-values are adjusted together (Holm).
"""

import json
from typing import Any

from tiered.metrics import NO_POWER, UNDEFINED
from tiered.statistics import holm
from tiered.unlearning.measures import is_gold_name

LEVEL = 0.05
Results = dict[str, dict[str, dict[str, Any]]]  # forget set -> operation -> measures


def chance_cells(results: Results) -> list[dict[str, Any]]:
    """AUC of every attack with power on golds and exact systems, p against 0.5 and Holm's p.

    Systems that are the same (sisa and gold, say) are one: cells that repeat others would make
    every p-value's adjustment too large.
    """
    cells, seen = [], set()
    for forget, operations in results.items():
        for name, r in operations.items():
            if "result" in r or not (r["exact"] or is_gold_name(name)):
                continue
            system = (forget, json.dumps(r["system"], sort_keys=True))
            if system in seen:
                continue
            seen.add(system)
            for attack, by_times in r["AUC"].items():
                cell = by_times["all"]
                if isinstance(cell, dict):
                    row = {"forget": forget, "operation": name, "attack": attack}
                    cells.append(row | {"AUC": cell["value"], "p": cell["p"]})
    for cell, p in zip(cells, holm([c["p"] for c in cells]), strict=True):
        cell["p_holm"] = round(p, 6)
    return cells


def checks(results: Results) -> list[dict[str, Any]]:
    """Claims of the protocol: what was measured, and whether it holds (a bool, or a word)."""
    cells = chance_cells(results)
    found = [_claim_chance(cells)]
    for forget, operations in results.items():
        known = {name: r for name, r in operations.items() if "result" not in r}
        found += [_claim_power(forget, known), _claim_purge(forget, known)]
        found += [_claim_deletion(forget, known), _claim_relearn(forget, known)]
    return [claim for claim in found if claim is not None]


def _row(claim: str, forget: str, measured: str, holds: Any) -> dict[str, Any]:
    return {"claim": claim, "forget": forget, "measured": measured, "holds": holds}


def _claim_chance(cells: list[dict[str, Any]]) -> dict[str, Any]:
    claim = "attacks on gold and exact systems are at chance (Holm over all cells)"
    if not cells:
        return _row(claim, "all", "no attack has power", NO_POWER)
    worst = min(cells, key=lambda c: c["p_holm"])
    where = f"{worst['operation']} {worst['forget']} {worst['attack']}"
    text = f"{len(cells)} cells, least p {worst['p_holm']:.4f} ({where}, AUC {worst['AUC']:.3f})"
    return _row(claim, "all", text, worst["p_holm"] >= LEVEL)


def _claim_power(forget: str, known: dict[str, Any]) -> dict[str, Any] | None:
    cells = known["original"]["AUC"].get("LOSS", {})
    repeated = [int(t) for t in cells if t not in ("all", "1")]
    if not repeated:
        return None
    cell = cells[str(max(repeated))]
    text = cell if isinstance(cell, str) else f"AUC {cell['value']:.3f}"
    claim = f"LOSS has power on members that occur {max(repeated)} times"
    return _row(claim, forget, text, cell not in (NO_POWER, UNDEFINED))


def _claim_purge(forget: str, known: dict[str, Any]) -> dict[str, Any] | None:
    if "mask-skew" not in known or "mask-random" not in known:
        return None
    own = known["mask-skew"]["bpb_change"]["test"]["value"]
    draws = known["mask-random"]["draws"]["test"]
    text = f"{own:.4f} bpb; {len(draws)} random masks {min(draws):.4f} to {max(draws):.4f}"
    claim = "mask-skew costs the forget domain more than every random mask of its size"
    return _row(claim, forget, text, own > max(draws))


def _claim_deletion(forget: str, known: dict[str, Any]) -> dict[str, Any] | None:
    if "delete-S1" not in known:
        return None
    tokens = known["delete-S1"]["cost"]["tokens"]
    return _row("delete-S1 trains nothing", forget, f"{tokens} tokens", tokens == 0)


def _claim_relearn(forget: str, known: dict[str, Any]) -> dict[str, Any] | None:
    # S2 of a partition that held others too is exact, but lacks a model that gold has
    whole = [n for n in ("delete-S2", "sisa") if n in known and known[n]["complete"]]
    exact = [n for n in whole if known[n]["exact"]]
    curves = {n: known[n].get("robustness", {}).get("relearn") for n in ("gold", *exact)}
    if not exact or any(curve is None for curve in curves.values()):
        return None
    largest = max(abs(curves[n]["advantage_bpb"]["value"]) for n in exact)
    same = all(curves[n]["bpb"] == curves["gold"]["bpb"] for n in exact)
    claim = "exact systems with a model for every partition relearn as gold does, step by step"
    return _row(claim, forget, f"{', '.join(exact)}: advantage {largest:.6f} bpb", same)
