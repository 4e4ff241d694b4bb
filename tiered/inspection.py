"""eval/experts.json: what the experts of a run's models did with the scored rows, for its pages.

Shapes: D domains, G groups (layers; a Monet's router groups), X experts of a group.
"""

import codecs
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiered.config import Config
from tiered.data import ProcessedData, Rows
from tiered.evaluation import EXPERT_SETTINGS
from tiered.experts import (
    evaluating,
    expert_masks,
    experts_of,
    experts_shape,
    group_layers,
    routing_of,
)
from tiered.partition import PartitionMap
from tiered.record import device_of, training_environment
from tiered.recorder import RoutingRecorder, path_coverage
from tiered.router import load_models
from tiered.scoring import score_prefixes
from tiered.statistics import mean_difference
from tiered.store import (
    EXPERTS_FORMAT,
    UserError,
    code_hash,
    content_hash,
    digest,
    read_json,
    write_json,
)
from tiered.tokenization import Encoder

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
            "code": [code_hash(*CODE), EXPERTS_FORMAT],
        }
    )
    if not config.overwrite and path.is_file() and read_json(path)["key"] == key:
        return
    models = load_models(folders)
    found = inspect_experts(config, data, partitions, models, progress)
    write_json(path, {"format": EXPERTS_FORMAT, "key": key, "partitions": found})


def inspect_experts(
    config: Config,
    data: ProcessedData,
    partitions: PartitionMap,
    models: dict[int, torch.nn.Module],
    progress: Progress,
) -> dict[str, Any]:
    """partition -> what its model's experts did with the rows of its domains."""
    found, section = {}, config.eval
    pieces, texts = pieces_of(data), chosen_texts(config, data)
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
            "layers": group_layers(model),
            "split": section.split,
            "rows": {d: len(r.input_ids) for d, r in rows.items()},
            "skewed": skewed_sets(recorder),
            "shown": [_shown(recorder, g, rows, pieces) for g in range(recorder.weights.shape[1])],
            "flow": {
                name: flow(model, ids, pieces)
                for name, ids in {
                    **texts,
                    **{d: r.input_ids[:1, : section.flow_tokens] for d, r in rows.items()},
                }.items()
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


def pieces_of(data: ProcessedData) -> list[bytes]:
    """UTF-8 bytes of every token id; a special token's are its name's."""
    pieces = Encoder(data.folder / "tokenizer").pieces()
    names = data.tokenizer.convert_ids_to_tokens(range(len(pieces)))
    return [p or (name or "").encode() for p, name in zip(pieces, names, strict=True)]


def spelled(pieces: Sequence[bytes], ids: Sequence[int]) -> list[tuple[str, str]]:
    """Of every token of a text the characters that end in it, and its bytes of one that later
    tokens end, as `\\xe4\\xbd`: alone, half of the tokens of a Chinese text are no text."""
    decoder, found = codecs.getincrementaldecoder("utf-8")("backslashreplace"), []
    for i in ids:
        text = decoder.decode(pieces[i])
        begun = decoder.getstate()[0]  # earlier tokens' bytes, too
        found.append((text, _escaped(begun[-len(pieces[i]) :])) if pieces[i] else (text, ""))
    return found


def _escaped(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def chosen_texts(config: Config, data: ProcessedData) -> dict[str, np.ndarray]:
    """Ids (1, T) of eval.flow_texts, at most a block of each."""
    encoder, found = Encoder(data.folder / "tokenizer"), {}
    for name, text in config.eval.flow_texts.items():
        ids = encoder.encode([text])[0][0][: config.data.block_size]
        if not len(ids):
            raise UserError(f"eval.flow_texts.{name}: no token in {text!r}")
        found[name] = ids[None]
    return found


def _shown(
    recorder: RoutingRecorder, g: int, rows: dict[str, Rows], pieces: Sequence[bytes]
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
            "words": [_escaped(pieces[w]) for w in words[e]],
            "contexts": [
                {
                    "weight": round(weight, 4),
                    "domain": domain,
                    "text": _around(rows[domain].input_ids[row], position, pieces),
                }
                for weight, domain, row, position in contexts[e]
            ],
        }
        for e in order
        if load[e]
    ]


def _around(ids: np.ndarray, position: int, pieces: Sequence[bytes]) -> list[str]:
    """Text before a token, the token, and what follows."""
    texts = spelled(pieces, ids[: position + 1 + AFTER].tolist())
    before, after = texts[max(0, position - BEFORE) : position], texts[position + 1 :]
    return ["".join(t for t, _ in before), "".join(texts[position]), "".join(t for t, _ in after)]


def flow(model: torch.nn.Module, input_ids: np.ndarray, pieces: Sequence[bytes]) -> dict[str, Any]:
    """The way of a text (1, T): per token and group its heaviest experts [expert, weight], heaviest
    first."""
    ids = torch.from_numpy(np.ascontiguousarray(input_ids, dtype=np.int64))
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
    texts = ["".join(parts) for parts in spelled(pieces, ids[0].tolist())]
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
    are. `most`: the single expert that costs a domain most, which is found on every other row and
    measured on those between. Empty where none are asked for."""
    count = config.eval.expert_ablations
    if not count:
        return {}
    shape, groups = experts_shape(model), recorder.weights.shape[1]
    left, renormalize = expert_masks(model)  # a model may be a purged one
    before = row_nats(model, rows, config.eval.batch_rows)

    def without(places: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        keep = torch.ones(groups, recorder.weights.shape[-1], dtype=torch.bool)
        for g, e in places:
            keep[g, e] = False
        keep = keep.unflatten(1, shape)
        model.purge_experts(keep if left is None else keep & left.cpu(), renormalize)
        after = row_nats(model, rows, config.eval.batch_rows)
        return {d: after[d] - before[d] for d in rows}

    def bpb(nats: dict[str, np.ndarray]) -> dict[str, float]:
        return {
            d: round(nats[d].sum() / np.log(2) / scored_bytes(own), 6) for d, own in rows.items()
        }

    loads = [recorder.load(g) for g in range(groups)]
    single = [
        (g, e)
        for g in range(groups)
        for e in np.argsort(-loads[g], kind="stable")[:count].tolist()
        if loads[g][e]
    ]
    try:
        changes = [without([place]) for place in progress(single, "ablations", "expert")]
        paths = {}
        for domain, counter in zip(recorder.domains, recorder.paths, strict=True):
            path = path_coverage(counter)["most_frequent"][0][0]
            places = [(g, e) for g, e in enumerate(path) if e >= 0]
            paths[domain] = {"path": path, "change_bpb": bpb(without(places))}
    finally:
        model.purge_experts(left, renormalize)
    experts = [
        {"group": g, "expert": e, "change_bpb": bpb(change)}
        for (g, e), change in zip(single, changes, strict=True)
    ]
    most = costliest(changes, rows)
    if most:
        most = dict(zip(("group", "expert"), single[most.pop("index")], strict=True)) | most
    return {"bpb": bpb(before), "experts": experts, "paths": paths, "most": most}


def costliest(changes: list[dict[str, np.ndarray]], rows: dict[str, Rows]) -> dict[str, Any] | None:
    """Which of several changes of every row's nats (domain -> (rows,)) raises the bits per byte of
    a domain most on the rows 0, 2, ...; and what it changes on the rows 1, 3, ..., by domain with
    the interval of a paired t test. The largest of many changes is too large on the rows on which
    it is the largest. None where a domain has less than two rows of each kind."""
    if not changes or min(len(own.input_ids) for own in rows.values()) < 4:
        return None

    def per_byte(domain: str, first: int) -> float:
        return 1 / np.log(2) / scored_bytes(rows[domain], first, 2)

    domains = list(rows)
    found = [[c[d][::2].sum() * per_byte(d, 0) for d in domains] for c in changes]
    index, at = np.unravel_index(np.argmax(found), (len(changes), len(domains)))
    intervals = {}
    for domain, change in changes[index].items():
        own = change[1::2]
        scale = len(own) * per_byte(domain, 1)
        intervals[domain] = mean_difference(own * scale, np.zeros(len(own))).as_json()
    most = {
        "index": int(index),
        "domain": domains[at],
        "found_bpb": round(float(found[index][at]), 6),
    }
    return most | {"change_bpb": intervals}


def scored_bytes(rows: Rows, first: int = 0, step: int = 1) -> int:
    """Bytes of the tokens of every step-th row from `first` on; position 0 is not scored."""
    return int(rows.token_bytes[first::step, 1:].sum())


def row_nats(
    model: torch.nn.Module, rows: dict[str, Rows], batch_rows: int
) -> dict[str, np.ndarray]:
    """domain -> (rows,) loss of a model on every row, nats in float64; position 0 is not scored."""
    found = {}
    with evaluating(model):
        for domain, own in rows.items():
            ids = torch.from_numpy(np.ascontiguousarray(own.input_ids, dtype=np.int64))
            nats = score_prefixes(model, ids, ids.shape[1] - 1, batch_rows)["nll"]
            found[domain] = nats.double().sum(1).numpy()
    return found
