"""eval/experts.json: what the experts of a run's models did with the scored rows, for its pages.

Shapes: D domains, G groups (layers; a Monet's router groups), X experts of a group.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiered.config import Config
from tiered.data import ProcessedData, Rows
from tiered.evaluation import EXPERT_SETTINGS
from tiered.experts import evaluating, expert_masks, experts_of, experts_shape, routing_of
from tiered.partition import PartitionMap
from tiered.record import device_of, training_environment
from tiered.recorder import RoutingRecorder, path_coverage
from tiered.router import load_models
from tiered.scoring import score_prefixes
from tiered.store import code_hash, content_hash, digest, read_json, write_json

CODE = tuple(f"tiered/{name}.py" for name in ("experts", "inspection", "recorder", "scoring"))
SHOWN = 64  # experts of a group that get a place on a page, the busiest
BEFORE, AFTER = 12, 6  # tokens around one that an expert was used for
SKEWS = (1.2, 1.5, 2.0, 4.0)
TOPS = 4  # experts of a token that the way through the layers names

Progress = Callable[[Iterable, str, str], Iterable]


def write_experts(
    config: Config,
    data: ProcessedData,
    partitions: PartitionMap,
    folders: dict[int, Path],
    progress: Progress,
) -> None:
    """Write eval/experts.json of a run, unless one of equal inputs is there."""
    path, section = config.run_dir / "eval" / "experts.json", config.eval
    key = digest(
        {
            "models": {str(k): content_hash(folder) for k, folder in folders.items()},
            "map": partitions.as_json()["hash"],
            "data": {d: data.split_hash(d, section.split) for d in data.domains},
            "settings": [
                getattr(section, name) for name in (*EXPERT_SETTINGS, "split", "batch_rows")
            ],
            "environment": [training_environment(config), config.seed],
            "code": code_hash(*CODE),
        }
    )
    if not config.overwrite and path.is_file() and read_json(path)["key"] == key:
        return
    models = load_models(folders)
    found = inspect_experts(config, data, partitions, models, progress)
    write_json(path, {"key": key, "partitions": found})


def inspect_experts(
    config: Config,
    data: ProcessedData,
    partitions: PartitionMap,
    models: dict[int, torch.nn.Module],
    progress: Progress,
) -> dict[str, Any]:
    """partition -> what its model's experts did with the rows of its domains."""
    found, section = {}, config.eval
    for k, model in models.items():
        model = model.to(device_of(config))
        domains = [d for d in data.domains if d in partitions.members[k]]
        rows = {d: data.rows(d, section.split, section.expert_rows) for d in domains}
        rows = {d: r for d, r in rows.items() if len(r.input_ids)}
        if not rows:
            continue
        recorder = RoutingRecorder(rows, data.vocab_size)
        for domain in progress(rows, f"experts of partition {k}", "domain"):
            recorder.read(model, domain, rows[domain].input_ids, section.batch_rows)
        found[str(k)] = {
            **recorder.summary(config.seed),
            "skewed": skewed_sets(recorder),
            "shown": [_shown(recorder, g, rows, data) for g in range(recorder.weights.shape[1])],
            "flow": {
                d: flow(model, r.input_ids[:1], section.flow_tokens, data) for d, r in rows.items()
            },
            "ablation": ablations(config, recorder, model, rows, progress),
        }
    return found


def skewed_sets(recorder: RoutingRecorder) -> dict[str, dict[str, dict[str, Any]]]:
    """ratio -> domain -> size of its skewed set in every group, and coverage kappa: the share of
    the domain's weight that the set holds, mean over groups."""
    if len(recorder.domains) < 2:
        return {}
    means = recorder.weights / recorder.tokens[:, None, None]
    scores = dict(zip(recorder.domains, means, strict=True))
    sets: dict[str, dict[str, dict[str, Any]]] = {}
    for ratio in SKEWS:
        for domain, own in scores.items():
            chosen = experts_of(scores, domain, ratio)
            held = (own * chosen).sum(1) / own.sum(1).clamp(min=1e-12)
            entry = {
                "experts": chosen.sum(1).tolist(),
                "coverage": round(held.mean().item(), 6),
            }
            sets.setdefault(str(ratio), {})[domain] = entry
    return sets


def _shown(
    recorder: RoutingRecorder, g: int, rows: dict[str, Rows], data: ProcessedData
) -> list[dict[str, Any]]:
    """The busiest experts of a group: load, share of its weight per domain, words, contexts."""
    load = recorder.load(g)
    order = np.argsort(-load, kind="stable")[:SHOWN].tolist()
    share = torch.from_numpy(recorder.joint(g))
    share = share / share.sum(0).clamp(min=1e-12)
    words, contexts = recorder.top_words(g), recorder.contexts(g)
    return [
        {
            "expert": e,
            "load": round(load[e] / load.sum(), 6),
            "domains": {d: round(share[i, e].item(), 4) for i, d in enumerate(recorder.domains)},
            "words": [data.tokenizer.decode([w]) for w in words[e]],
            "contexts": [
                {
                    "weight": round(weight, 4),
                    "domain": domain,
                    "text": _around(rows[domain].input_ids[row], position, data),
                }
                for weight, domain, row, position in contexts[e]
            ],
        }
        for e in order
        if load[e]
    ]


def _around(ids: np.ndarray, position: int, data: ProcessedData) -> list[str]:
    """Text before a token, the token, and what follows."""
    parts = (
        ids[max(0, position - BEFORE) : position],
        ids[position : position + 1],
        ids[position + 1 : position + 1 + AFTER],
    )
    return [data.tokenizer.decode(part.tolist()) for part in parts]


def flow(
    model: torch.nn.Module, input_ids: np.ndarray, tokens: int, data: ProcessedData
) -> dict[str, Any]:
    """The way of one row's first tokens (1, T): per token and group its heaviest experts [expert,
    weight], heaviest first."""
    ids = torch.from_numpy(np.ascontiguousarray(input_ids[:, :tokens], dtype=np.int64))
    with evaluating(model):
        groups = routing_of(model, ids)
    steps = []
    for g in groups:
        # a Monet's heads may name one expert; a tree's path is that of its leaves
        given = torch.zeros(ids.numel(), g.sums.shape[1])
        given = given.scatter_add(1, g.index.cpu(), g.weights.float().cpu())[:, g.first :]
        most = given.topk(min(TOPS, given.shape[1]), 1)
        steps.append(
            [
                [[e + g.first, round(w, 4)] for e, w in zip(*pair, strict=True) if w > 0]
                for pair in zip(most.indices.tolist(), most.values.tolist(), strict=True)
            ]
        )
    texts = [data.tokenizer.decode([i]) for i in ids[0].tolist()]
    return {"tokens": texts, "groups": steps}


def ablations(
    config: Config,
    recorder: RoutingRecorder,
    model: torch.nn.Module,
    rows: dict[str, Rows],
    progress: Progress,
) -> dict[str, Any]:
    """Change of bits per byte on every domain when one expert of a group is left out, for the
    busiest eval.expert_ablations of each; and when all experts of a domain's most frequent path
    are. Empty where none are asked for."""
    count = config.eval.expert_ablations
    if not count:
        return {}
    shape, groups = experts_shape(model), recorder.weights.shape[1]
    left, renormalize = expert_masks(model)  # a model may be a purged one
    before = domain_bpb(model, rows, config.eval.batch_rows)

    def without(places: list[tuple[int, int]]) -> dict[str, float]:
        keep = torch.ones(groups, recorder.weights.shape[-1], dtype=torch.bool)
        for g, e in places:
            keep[g, e] = False
        keep = keep.unflatten(1, shape)
        model.purge_experts(keep if left is None else keep & left.cpu(), renormalize)
        after = domain_bpb(model, rows, config.eval.batch_rows)
        return {d: round(after[d] - before[d], 6) for d in rows}

    loads = [recorder.load(g) for g in range(groups)]
    single = [
        (g, e)
        for g in range(groups)
        for e in np.argsort(-loads[g], kind="stable")[:count].tolist()
        if loads[g][e]
    ]
    try:
        experts = [
            {"group": g, "expert": e, "change_bpb": without([(g, e)])}
            for g, e in progress(single, "ablations", "expert")
        ]
        paths = {}
        for domain, counter in zip(recorder.domains, recorder.paths, strict=True):
            path = path_coverage(counter)["most_frequent"][0][0]
            places = [(g, e) for g, e in enumerate(path) if e >= 0]
            paths[domain] = {"path": path, "change_bpb": without(places)}
    finally:
        model.purge_experts(left, renormalize)
    return {"bpb": {d: round(v, 6) for d, v in before.items()}, "experts": experts, "paths": paths}


def domain_bpb(model: torch.nn.Module, rows: dict[str, Rows], batch_rows: int) -> dict[str, float]:
    """Bits per byte of a model on every domain's rows; position 0 is not scored."""
    found = {}
    with evaluating(model):
        for domain, own in rows.items():
            ids = torch.from_numpy(np.ascontiguousarray(own.input_ids, dtype=np.int64))
            nats = score_prefixes(model, ids, ids.shape[1] - 1, batch_rows)["nll"].double().sum()
            found[domain] = nats.item() / np.log(2) / own.token_bytes[:, 1:].sum()
    return found
