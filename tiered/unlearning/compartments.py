"""How far a run keeps its domains apart: Level 1 by partitions, Level 2 by experts, and what the
removal of one domain does to every other (the causal matrix), beside random removals.

Shapes: D domains, n partitions, G router groups, X = E^2 experts per group.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tiered.config import plain
from tiered.data import Rows
from tiered.evaluation import score_cache
from tiered.experts import (
    block_expert_weights,
    divergences,
    effective_numbers,
    experts_of,
    first_leaf,
    joint_of,
    normalised_information,
    permuted_information,
)
from tiered.metrics import NONE, UNDEFINED, maximal_nmi
from tiered.modeling_tiered import TieredForCausalLM
from tiered.record import SCORING_CODE, training_environment
from tiered.router import load_models, load_router, tiered_model
from tiered.store import code_hash, content_hash, digest, read_json, seed_of, write_json
from tiered.unlearning.controls import masked_hashes, removal_bpb
from tiered.unlearning.protocol import Scorer, readable
from tiered.unlearning.purge import calibration_scores, purged_mass, random_masks, skew_masks
from tiered.unlearning.sequence import sequence
from tiered.unlearning.systems import Context, Forget, NotApplicable

SHUFFLES = 20
SKEWS = (1.2, 1.5, 2.0, 4.0)
SETTINGS = ("retain_rows", "mask_ratio", "random_masks", "sequence")
CODE = (
    *SCORING_CODE,
    "tiered/experts.py",
    *(f"tiered/unlearning/{name}.py" for name in ("compartments", "controls", "sequence")),
)


def compartments(
    context: Context, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """compartments.json of a run: `level1`, `level2` (partition -> groups), `causal`, and
    `sequence` where unlearn.sequence names domains."""
    config = context.config
    path = config.run_dir / "unlearn" / "compartments.json"
    key = digest(
        {
            "models": {str(k): content_hash(p) for k, p in context.models.items()},
            "router": content_hash(context.router),
            "settings": [
                {name: plain(getattr(config.unlearn, name)) for name in SETTINGS},
                plain(config.router),
                config.seed,
            ],
            "data": {
                d: [context.data.split_hash(d, split) for split in ("test", "calibration")]
                for d in context.data.domains
            },
            "environment": training_environment(config),
            "code": code_hash(*CODE, "tiered/unlearning/purge.py"),
        }
    )
    if path.is_file() and not config.overwrite and read_json(path)["key"] == key:
        return read_json(path)
    router = load_router(context.router, "python train_det_router.py CONFIG")
    model = tiered_model(config, context.partitions, router, load_models(context.models))
    rows = {
        d: context.data.rows(d, "test", config.unlearn.retain_rows) for d in context.data.domains
    }
    rows = {d: found for d, found in rows.items() if readable(found)}
    say("partitions")
    found = {"key": key, "domains": list(rows), "level1": level1(context, model, rows)}
    say("experts")
    found["level2"] = {str(k): level2(context, k) for k in context.models}
    found["causal"] = causal(context, model, rows, say)
    if config.unlearn.sequence:
        found["sequence"] = sequence(context, model, rows, say)
    write_json(path, found)
    return found


def level1(context: Context, model: TieredForCausalLM, rows: dict[str, Rows]) -> dict[str, Any]:
    """Confusion C[d, k] in tokens, its information with a baseline, tokens routed into others'."""
    cache = score_cache(context.config, masked_hashes(context, {}))
    scorer = Scorer(context, model, cache, None)
    n, counts, labels = context.partitions.n, [], []
    for domain, found in rows.items():
        chosen = scorer.tokens(found.input_ids)[1].numpy()
        for row in chosen:
            counts.append(np.bincount(row[row >= 0], minlength=n))
            labels.append(domain)
    weights, labels = np.array(counts, dtype=float), np.array(labels)
    table = np.stack([weights[labels == d].sum(0) for d in rows])  # (D, n)
    joint = table / table.sum(1, keepdims=True)
    generator = np.random.default_rng(seed_of(context.config.seed, "compartments"))
    shuffled = permuted_information(weights, labels, SHUFFLES, generator)
    touched = {d: list(context.partitions.touched(d)) for d in rows}
    into = {
        f: float(np.mean([joint[i, touched[f]].sum() for i, d in enumerate(rows) if d != f]))
        for f in rows
        if len(rows) > 1
    }
    return {
        "confusion_tokens": table.astype(int).tolist(),
        "nmi": _round(normalised_information(joint)),
        "nmi_shuffled": _round(shuffled.mean()),
        "nmi_maximal": _round(maximal_nmi(n, len(rows))),
        # retained text whose output may change when f's partitions go
        "retained_tokens_routed_into": {f: _round(v) for f, v in into.items()},
    }


def level2(context: Context, k: int) -> Any:
    """Per router group of partition k's model: information, effective numbers, divergences, skewed
    sets; a word where there is nothing to tell apart."""
    try:
        domains = [d for d in context.data.domains if d in context.partitions.members[k]]
        scores = calibration_scores(context, Forget("", domains[0] if domains else ""), k)
    except NotApplicable as reason:
        return str(reason)
    model = load_models({k: context.models[k]})[k]
    weights, labels = [], []
    for domain in scores:
        blocks = context.data.blocks(domain, "calibration")
        for batch in np.array_split(blocks, max(1, len(blocks) // context.config.eval.batch_rows)):
            ids = torch.from_numpy(np.ascontiguousarray(batch, dtype=np.int64))
            weights.append(block_expert_weights(model, ids).flatten(2))  # (B, G, X)
            labels += [domain] * len(batch)
    first = first_leaf(model)  # a tree's weight stands once on every level
    by_block, names = torch.cat(weights)[..., first:].numpy(), np.array(labels)
    sizes = {str(r): {d: _per_group(experts_of(scores, d, r)) for d in scores} for r in SKEWS}
    groups = []
    for group, joint in enumerate(joint_of(scores, first)):
        seed = seed_of(context.config.seed, "compartments", k, group)
        generator = np.random.default_rng(seed)
        shuffled = permuted_information(by_block[:, group], names, SHUFFLES, generator)
        information = normalised_information(joint)
        per_expert, per_domain = effective_numbers(joint)
        groups.append(
            {
                "nmi": _round(information),
                "nmi_shuffled": _round(shuffled.mean()),
                "nmi_above_chance": _round(information - shuffled.mean()),
                "effective_domains_per_expert": _round(per_expert),
                "effective_experts_per_domain": _round(per_domain),
                "js_bits": np.round(divergences(joint), 6).tolist(),
                "skewed_experts": {
                    r: {d: counts[group] for d, counts in found.items()}
                    for r, found in sizes.items()
                },
            }
        )
    return {"domains": list(scores), "experts_per_group": by_block.shape[-1], "groups": groups}


def causal(
    context: Context,
    model: TieredForCausalLM,
    rows: dict[str, Rows],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """A[a, b], change of bits per byte on b after the removal of a: by dropping a's partitions, by
    mask-skew, and by random masks of its size or mass (mean over draws); words where none."""
    before = removal_bpb(context, model, rows, {}, None)
    found: dict[str, Any] = {
        name: {} for name in ("delete", "mask-skew", "mask-random", "mask-massmatched")
    }
    coverage: dict[str, Any] = {}
    count = context.config.unlearn.random_masks
    by_draw = {kind: [{} for _ in range(count)] for kind in ("mask-random", "mask-massmatched")}
    for domain in rows:
        say(f"removal of {domain}")
        forget = Forget(domain, domain)
        touched = context.partitions.touched(domain)
        left = [k for k in context.models if k not in touched]
        after = removal_bpb(context, model, rows, {}, left) if left else None
        found["delete"][domain] = NONE if after is None else _changes(before, after)
        try:
            skew = skew_masks(context, forget)
        except NotApplicable as reason:
            for name in ("mask-skew", "mask-random", "mask-massmatched"):
                found[name][domain] = str(reason)
            continue
        masks = {k: purged for k, (_, purged) in skew.items()}
        coverage[domain] = {
            str(k): _round(purged_mass(scores, domain, purged))
            for k, (scores, purged) in skew.items()
        }
        found["mask-skew"][domain] = _changes(
            before, removal_bpb(context, model, rows, masks, None)
        )
        for kind, matrices in by_draw.items():
            draws = [
                _changes(before, removal_bpb(context, model, rows, masks, None))
                for masks in (random_masks(context, forget, kind, i) for i in range(count))
            ]
            for matrix, changes in zip(matrices, draws, strict=True):
                matrix[domain] = changes
            found[kind][domain] = {b: _round(np.mean([d[b] for d in draws])) for b in rows}
    found["coverage"] = coverage
    found["selectivity"] = {
        name: selectivity(found[name], list(rows)) for name in ("delete", "mask-skew")
    }
    # of every draw: in a mean over draws what random masks do to others cancels out
    for kind, matrices in by_draw.items():
        values = [selectivity(matrix, list(rows)) for matrix in matrices]
        words = [v for v in values if isinstance(v, str)]
        found["selectivity"][kind] = words[0] if words else _round(np.mean(values))
    return found


def selectivity(changes: dict[str, Any], domains: list[str]) -> Any:
    """Mean of the diagonal over the mean absolute rest of a causal matrix; rows without numbers are
    left out; `undefined` where nothing else changed."""
    known = {a: row for a, row in changes.items() if isinstance(row, dict)}
    if not known:
        return NONE
    diagonal = np.mean([row[a] for a, row in known.items()])
    rest = np.mean([abs(row[b]) for a, row in known.items() for b in domains if b != a])
    return _round(diagonal / rest) if rest else UNDEFINED


def _changes(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {d: _round(after[d] - before[d]) for d in before}


def _per_group(experts: torch.Tensor) -> list[int]:
    return experts.flatten(1).sum(1).tolist()


def _round(value: float) -> float:
    return round(float(value), 6)
