"""What is scored for a forget domain, and the metrics with their words.

For a forget domain f: members M_f (train rows), holdout H_f, test T_f; for every other domain d
members M_d and test rows T_d. One row per document, so rows are the units of every resampling.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tiered.data import Rows
from tiered.evaluation import RowScores, score_cache, score_domain
from tiered.metrics import (
    NO_POWER,
    NONE,
    NOT_APPLICABLE,
    UNDEFINED,
    auc,
    bootstrap_auc,
    has_power,
    kolmogorov_smirnov,
    median_efficacy,
    normalised_unlearning,
    paired_error,
)
from tiered.modeling_tiered import Level1Embedder, TieredForCausalLM
from tiered.scoring import score_prefixes
from tiered.store import UserError, seed_of
from tiered.training import trained_rows
from tiered.unlearning.systems import Context

Scores = dict[tuple[str, str], RowScores]  # (split, domain) -> row scores
ScoredRows = dict[tuple[str, str], Rows]  # (split, domain) -> rows
Losses = tuple[np.ndarray | None, np.ndarray | None]  # a router's: trained rows, holdout


@dataclass
class Measured:
    """Row scores of one system, and its router's losses on f: trained rows against holdout."""

    scores: Scores
    router_members: np.ndarray | None
    router_holdout: np.ndarray | None


def scored_rows(context: Context, forget: str) -> ScoredRows:
    """The rows of a forget domain's protocol, in a fixed order."""
    unlearn, data = context.config.unlearn, context.data
    rows = {}
    for domain in (forget, *(d for d in data.domains if d != forget)):
        count = unlearn.forget_rows if domain == forget else unlearn.retain_rows
        trained = trained_rows(context.config, data, context.partitions, domain)
        rows["train", domain] = data.rows(domain, "train", count, trained)
        if domain == forget:
            rows["holdout", domain] = data.rows(domain, "holdout", count)
        rows["test", domain] = data.rows(domain, "test", count)
    for (split, domain), found in rows.items():
        if not found.document_ids:
            kind = "member" if split == "train" else split
            raise UserError(
                f"unlearn.forget: domain {domain} has no {kind} row of {data.block_size} tokens;"
                " lower data.block_size or give it more text"
            )
    return rows


def measure(
    context: Context,
    scored: ScoredRows,
    model: TieredForCausalLM,
    hashes: dict[int, str],
    allowed: list[int] | None,
) -> Scores:
    """Row scores of a system under the run's routing scope."""
    config = context.config
    cache = score_cache(config, hashes)
    scores = {}
    for key, rows in scored.items():
        found, _ = score_domain(config, model, rows, (config.router.scope,), None, allowed, cache)
        scores[key] = found[config.router.scope]
    return scores


def router_losses(context: Context, forget: str, model: TieredForCausalLM) -> Losses:
    """Mean nats per row of the Level-1 embedder LM: its training rows of f, holdout rows of f."""
    embedder = model.router.embedder
    losses, data, config = [], context.data, context.config
    if not isinstance(embedder, Level1Embedder) or forget in config.data.added_domains:
        return None, None  # it is no language model, or was not trained on the domain
    trained = data.packed(forget, "router", limit_tokens=config.router.tokens_per_domain)
    for split, only in (("router", trained), ("holdout", None)):
        rows = data.rows(forget, split, config.unlearn.forget_rows, only)
        ids = torch.from_numpy(np.ascontiguousarray(rows.input_ids))
        nll, _ = score_prefixes(embedder, ids, ids.shape[1] - 1, config.eval.batch_rows)
        losses.append(nll.double().mean(1).numpy())
    return losses[0], losses[1]


def neighbours(context: Context, forget: str) -> tuple[list[str], list[str]]:
    """Present domains that share a partition with f (near) and those that do not (far)."""
    touched = set(context.partitions.touched(forget))
    others = [d for d in context.data.domains if d != forget]
    near = [d for d in others if touched & set(context.partitions.touched(d))]
    return near, [d for d in others if d not in near]


def accuracy_over(scores: Scores, split: str, domains: list[str]) -> float | str:
    """Accuracy on the union of the domains' rows; the word `none` without domains."""
    if not domains:
        return NONE
    parts = [scores[split, d] for d in domains]
    return _number(sum(p.correct.sum() for p in parts) / sum(p.tokens.sum() for p in parts))


def bpb_over(scores: Scores, split: str, domains: list[str]) -> float | str:
    """Macro mean of bits per byte over domains; the word `none` without domains."""
    return _number(np.mean([scores[split, d].bpb() for d in domains])) if domains else NONE


def metrics(
    context: Context, forget: str, measured: dict[str, Measured], operation: str
) -> dict[str, Any]:
    """All measures of one operation; `measured` holds at least original and gold."""
    u, o = measured[operation].scores, measured["original"].scores
    g = measured["gold"].scores
    near, far = neighbours(context, forget)
    groups = {"all": near + far, "near": near, "far": far}
    result: dict[str, Any] = {
        "UA": _number(1 - u["train", forget].accuracy()),
        "UA_norm": ua_norm(o["train", forget], u["train", forget], g["train", forget]),
        "RA": {name: accuracy_over(u, "train", ds) for name, ds in groups.items()},
        "TA": {name: accuracy_over(u, "test", ds) for name, ds in groups.items()},
        "TA_f": _number(u["test", forget].accuracy()),
        "MIA_efficacy": _efficacy(u, forget),
        "bpb": {
            "members": _number(u["train", forget].bpb()),
            "holdout": _number(u["holdout", forget].bpb()),
            "test": _number(u["test", forget].bpb()),
            "retain": {name: bpb_over(u, "test", ds) for name, ds in groups.items()},
        },
        "far_rows_changed": _changed_rows(o, u, far),
        "rows": {
            "members": len(u["train", forget].tokens),
            "holdout": len(u["holdout", forget].tokens),
        },
    }
    gold_accuracy = {
        "UA": 1 - g["train", forget].accuracy(),
        "RA": accuracy_over(g, "train", near + far),
        "TA": accuracy_over(g, "test", near + far),
        "MIA_efficacy": _efficacy(g, forget),
    }
    own = {**result, "RA": result["RA"]["all"], "TA": result["TA"]["all"]}
    gaps = [abs(own[k] - v) for k, v in gold_accuracy.items() if v != NONE]
    result["gap_to_gold"] = _number(np.mean(gaps))
    d, p = kolmogorov_smirnov(u["train", forget].mean_loss, g["train", forget].mean_loss)
    result["KS_to_gold"] = {"D": _number(d), "p": _number(p)}
    result["AUC"] = membership(context, forget, measured, operation)
    result["router_AUC"] = router_membership(context, forget, measured, operation)
    return result


def ua_norm(original: RowScores, unlearnt: RowScores, gold: RowScores) -> float | str:
    """UA_norm on member rows; `undefined` where original and gold differ by less than 2 SE."""
    row_o, row_g = original.correct / original.tokens, gold.correct / gold.tokens
    if abs(row_o.mean() - row_g.mean()) < 2 * paired_error(row_o, row_g):
        return UNDEFINED
    accuracies = [s.accuracy() for s in (original, unlearnt, gold)]
    return (
        UNDEFINED if accuracies[0] == accuracies[2] else _number(normalised_unlearning(*accuracies))
    )


def membership(
    context: Context, forget: str, measured: dict[str, Measured], operation: str
) -> dict[str, Any]:
    """AUC of attacks within the forget domain, by how often a member occurred in training.

    Every cell passes the power gate on the original system first. `reference` subtracts the
    same-seed gold's loss, so gold's own row is undefined.
    """
    o, u, g = (measured[name].scores for name in ("original", operation, "gold"))
    occurrences = u["train", forget].rows.occurrences
    result: dict[str, Any] = {}
    for attack in ("LOSS", "reference"):
        result[attack] = {}
        for times in ["all", *(int(t) for t in np.unique(occurrences))]:
            chosen = np.full(len(occurrences), True) if times == "all" else occurrences == times
            if attack == "reference" and operation == "gold":
                result[attack][str(times)] = UNDEFINED
                continue
            pairs = [_attack_scores(attack, s, g, forget, chosen) for s in (o, u)]
            seed = seed_of(context.config.seed, "bootstrap", forget, attack, str(times))
            result[attack][str(times)] = _gated_auc(context, pairs[0], pairs[1], seed)
    plain = result["LOSS"]["all"]
    result["PrivLeak"] = _privacy_leak(plain, u, g, forget)
    return result


def router_membership(
    context: Context, forget: str, measured: dict[str, Measured], operation: str
) -> Any:
    """LOSS AUC of the Level-1 embedder: its training rows of f against f's holdout."""
    o, u = measured["original"], measured[operation]
    if o.router_members is None or u.router_members is None:
        return NOT_APPLICABLE
    seed = seed_of(context.config.seed, "bootstrap", forget, "router")
    pairs = [(m.router_members, m.router_holdout) for m in (o, u)]
    return _gated_auc(context, pairs[0], pairs[1], seed)


def _attack_scores(
    attack: str, scores: Scores, gold: Scores, forget: str, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    members, holdout = scores["train", forget].mean_loss, scores["holdout", forget].mean_loss
    if attack == "reference":
        members = members - gold["train", forget].mean_loss
        holdout = holdout - gold["holdout", forget].mean_loss
    return members[chosen], holdout


def _gated_auc(
    context: Context,
    original: tuple[np.ndarray, np.ndarray],
    unlearnt: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> Any:
    """AUC with interval, or `undefined` (no rows) or `no power` (the original is not attacked)."""
    if min(len(original[0]), len(original[1])) < 2:
        return UNDEFINED
    samples = context.config.unlearn.bootstrap_samples
    if not has_power(bootstrap_auc(*original, samples, np.random.default_rng(seed))):
        return NO_POWER
    return bootstrap_auc(*unlearnt, samples, np.random.default_rng(seed)).as_json()


def _privacy_leak(cell: Any, u: Scores, g: Scores, forget: str) -> float | str:
    """PrivLeak = (AUC'_u - AUC'_g) / AUC'_g * 100 with AUC' = 1 - AUC (0: as gold)."""
    if not isinstance(cell, dict):
        return cell
    values = [1 - auc(s["train", forget].mean_loss, s["holdout", forget].mean_loss) for s in (u, g)]
    return _number((values[0] - values[1]) / values[1] * 100) if values[1] else UNDEFINED


def _efficacy(scores: Scores, forget: str) -> float:
    members, holdout = scores["train", forget].mean_loss, scores["holdout", forget].mean_loss
    return _number(median_efficacy(members, holdout))


def _changed_rows(original: Scores, unlearnt: Scores, far: list[str]) -> str:
    """How many far test rows have another loss than before, bit for bit, of how many."""
    if not far:
        return NONE
    before = np.concatenate([original["test", d].loss_nats for d in far])
    after = np.concatenate([unlearnt["test", d].loss_nats for d in far])
    return f"{int((before != after).sum())} of {len(before)}"


def _number(value: float) -> float:
    return round(float(value), 6)
