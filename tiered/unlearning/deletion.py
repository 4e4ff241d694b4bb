"""Operations that remove a domain exactly, or show what that would take.

Each takes a Context and a forget domain and returns an Outcome; none changes the run it starts
from. `NotApplicable` carries the words that the table prints instead of numbers.
"""

import time
from collections.abc import Callable
from pathlib import Path

from tiered.data import ProcessedData
from tiered.metrics import NOT_APPLICABLE
from tiered.router import load_router, make_router, save_router, train_embedder
from tiered.store import content_hash, digest, is_complete, read_json, verify
from tiered.training import model_key, train_partition
from tiered.unlearning.systems import Context, Outcome, recorded_cost


class NotApplicable(Exception):
    """An operation that makes no sense for this partition map; its text is printed."""


def original(context: Context, forget: str) -> Outcome:
    """The run as trained, forget domain included."""
    return Outcome(models=dict(context.models), router=context.router)


def gold(context: Context, forget: str) -> Outcome:
    """The system trained from scratch without the forget domain, router included.

    Partition models that never saw the domain are bit-identical (isolation), so they are taken
    from the store; cost counts all of them, as a retrain from scratch would.
    """
    models = _models_without(context, forget)
    router = _router_without(context, forget)
    tokens, seconds = recorded_cost(models)
    router_tokens, router_seconds = _router_cost(context, forget)
    return Outcome(
        models=models,
        router=router,
        weights_removed=True,
        tokens=tokens + router_tokens,
        seconds=seconds + router_seconds,
        rebuilt=["router", *(f"model/{k}" for k in models)],
    )


def delete_s0(context: Context, forget: str) -> Outcome:
    """Route-off: the partitions that hold the domain are never chosen; their weights stay."""
    touched = _removable(context, forget)
    begin = time.perf_counter()
    allowed = [k for k in context.models if k not in touched]
    return Outcome(
        models=dict(context.models),
        router=context.router,
        allowed=allowed,
        seconds=time.perf_counter() - begin,
    )


def delete_s1(context: Context, forget: str) -> Outcome:
    """Drop the partitions that hold the domain: their models and centroids."""
    touched = _removable(context, forget)
    begin = time.perf_counter()
    source = context.config.store_dir / "routers"
    key = digest(["drop", content_hash(context.router), list(touched)])
    router = source / key
    if not is_complete(router):
        module, domains = load_router(context.router, "python train_det_router.py CONFIG")
        kept = [c for c, k in enumerate(module.centroid_partition.tolist()) if k not in touched]
        for k in touched:
            module.remove_partition(k)
        save_router(router, module, [domains[c] for c in kept], _embedder_of(context.router))
    models = {k: path for k, path in context.models.items() if k not in touched}
    return Outcome(
        models=models,
        router=router,
        weights_removed=True,
        seconds=time.perf_counter() - begin,
        removed=[*(f"model/{k}" for k in touched), *(f"centroid/{k}" for k in touched)],
    )


def delete_s2(context: Context, forget: str) -> Outcome:
    """Drop as S1 and rebuild the router without the domain's data."""
    touched = _removable(context, forget)
    begin = time.perf_counter()
    models = {k: path for k, path in context.models.items() if k not in touched}
    seconds = time.perf_counter() - begin
    router = _router_without(context, forget)
    router_tokens, router_seconds = _router_cost(context, forget)
    return Outcome(
        models=models,
        router=router,
        weights_removed=True,
        tokens=router_tokens,
        seconds=seconds + router_seconds,
        removed=[f"model/{k}" for k in touched],
        rebuilt=["router"],
    )


def sisa(context: Context, forget: str) -> Outcome:
    """Retrain only the partitions that saw the domain, without it; rebuild the router.

    (Sharded, isolated, sliced, aggregated training: arXiv:1912.03817.) Equal inputs are never
    trained twice: gold's partition model is reused with its recorded seconds.
    """
    touched = context.partitions.touched(forget)
    reused = all(_already_trained(context, forget, k) for k in touched)
    models = _models_without(context, forget)
    router = _router_without(context, forget)
    retrained = {k: models[k] for k in touched if k in models}
    tokens, seconds = recorded_cost(retrained)
    router_tokens, router_seconds = _router_cost(context, forget)
    return Outcome(
        models=models,
        router=router,
        weights_removed=True,
        tokens=tokens + router_tokens,
        seconds=seconds + router_seconds,
        reused=reused,
        removed=[f"model/{k}" for k in touched],
        rebuilt=["router", *(f"model/{k}" for k in retrained)],
    )


OPERATIONS: dict[str, Callable[[Context, str], Outcome]] = {
    "original": original,
    "gold": gold,
    "delete-S0": delete_s0,
    "delete-S1": delete_s1,
    "delete-S2": delete_s2,
    "sisa": sisa,
}


def _removable(context: Context, forget: str) -> tuple[int, ...]:
    """Partitions that a deletion of the domain removes; NotApplicable if none would be left."""
    touched = context.partitions.touched(forget)
    if not set(context.models) - set(touched):
        raise NotApplicable(f"{NOT_APPLICABLE}: removes all {context.partitions.n} models")
    return touched


def _models_without(context: Context, forget: str) -> dict[int, Path]:
    config = context.config.without(forget)
    data = ProcessedData(config)
    models = {}
    for k in range(context.partitions.n):
        folder = train_partition(config, data, context.partitions, k)
        if folder is not None:
            models[k] = folder
    return models


def _already_trained(context: Context, forget: str, k: int) -> bool:
    config = context.config.without(forget)
    data = ProcessedData(config)
    if not any(d in data.domains for d in context.partitions.members[k]):
        return False
    key = model_key(config, data, context.partitions, k)
    return is_complete(config.store_dir / "models" / key)


def _router_without(context: Context, forget: str) -> Path:
    """Router folder built without the forget domain, from the store if it is there."""
    config = context.config.without(forget)
    data = ProcessedData(config)
    embedder = train_embedder(config, data)
    identity = {
        "embedder": content_hash(embedder) if embedder else None,
        "ngrams": [config.router.ngram_buckets, config.router.ngram_max],
        "map": context.partitions.as_json()["hash"],
        "data": {d: data.split_hash(d, "router") for d in data.domains},
        "tokens": config.router.tokens_per_domain,
        "block_size": config.data.block_size,
    }
    folder = config.store_dir / "routers" / digest(identity)
    if is_complete(folder):
        verify(folder)
        return folder
    router, domains = make_router(config, data, context.partitions, embedder)
    save_router(folder, router, domains, embedder)
    return folder


def _router_cost(context: Context, forget: str) -> tuple[int, float]:
    """Tokens x passes and seconds of the router's training without the domain."""
    config = context.config.without(forget)
    embedder = train_embedder(config, ProcessedData(config))
    if embedder is None:
        return 0, 0.0
    tokens = read_json(embedder / "record.json")["tokens"]
    return tokens, read_json(embedder / "timings.json")["seconds"]


def _embedder_of(router: Path) -> Path | None:
    folder = router / "embedder"
    return folder if folder.is_dir() else None
