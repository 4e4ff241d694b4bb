"""Operations that remove a domain exactly, or show what that would take.

Each takes a Context and a forget domain and returns an Outcome; none changes the run it starts
from. `NotApplicable` carries the words that the table prints instead of numbers.
"""

import time
from dataclasses import replace
from pathlib import Path

from tiered.branching import has_own_seed
from tiered.clusters import EmptyClusterError
from tiered.data import ProcessedData
from tiered.metrics import NOT_APPLICABLE
from tiered.partition import cluster_map
from tiered.router import build_clusters, build_router, load_router, save_router
from tiered.store import TIMINGS, content_hash, digest, is_complete, read_json
from tiered.training import model_folder, train_partition, train_seed
from tiered.unlearning.systems import Context, Forget, NotApplicable, Outcome, recorded_cost


def original(context: Context, forget: Forget) -> Outcome:
    """The run as trained, forget domain included."""
    return Outcome(models=dict(context.models), router=context.router)


def gold(context: Context, forget: Forget) -> Outcome:
    """The system trained from scratch without the forget domain, router included.

    Partition models that never saw the domain are bit-identical (isolation), so they are taken
    from the store; cost counts all of them, as a retrain from scratch would.
    """
    models, seed = models_without(context, forget, context.config.overwrite)
    router = _router_without(context, forget, context.config.overwrite)
    outcome = _rebuilt(models, router, models, seed)
    originals = {k: content_hash(path) for k, path in context.models.items()}
    outcome.reused = [
        f"model/{k}" for k, path in models.items() if content_hash(path) == originals[k]
    ]
    return outcome


def gold_recluster(context: Context, forget: Forget) -> Outcome:
    """Gold of a cluster map that is itself fitted without the domain: other clusters, so that no
    model of the run can be compared with it one by one."""
    if context.partitions.method != "cluster":
        raise NotApplicable(f"{NOT_APPLICABLE}: the map was not fitted to data")
    config = context.without(forget)
    data = ProcessedData(config)
    try:
        clusters = build_clusters(config, data)
    except EmptyClusterError as error:
        raise NotApplicable(f"{NOT_APPLICABLE}: {error}") from None
    partitions = cluster_map(config, clusters)
    fitted = replace(context, partitions=partitions)
    models, seed = models_without(fitted, forget, config.overwrite)
    outcome = _rebuilt(models, build_router(config, data, partitions), models, seed)
    outcome.seconds += recorded_cost([clusters])[1]
    outcome.rebuilt.insert(0, "map")
    outcome.is_gold = True
    return outcome


def delete_s0(context: Context, forget: Forget) -> Outcome:
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


def delete_s1(context: Context, forget: Forget) -> Outcome:
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
        embedder = _embedder_of(context.router)
        meta = {"domains": [domains[c] for c in kept], "inputs": None}  # made by no config
        save_router(router, module, meta, embedder, begin)
    models = {k: path for k, path in context.models.items() if k not in touched}
    return Outcome(
        models=models,
        router=router,
        weights_removed=True,
        # the drop itself may have been done by an earlier call: its own record says how long
        seconds=read_json(router / TIMINGS)["seconds"],
        removed=[*(f"model/{k}" for k in touched), *(f"centroid/{k}" for k in touched)],
    )


def delete_s2(context: Context, forget: Forget) -> Outcome:
    """Drop as S1 and rebuild the router without the domain's data."""
    touched = _removable(context, forget)
    models = {k: path for k, path in context.models.items() if k not in touched}
    outcome = _rebuilt(models, _router_without(context, forget), {}, None)
    outcome.reused = outcome.rebuilt  # gold made it
    outcome.removed = [f"model/{k}" for k in touched]
    return outcome


def sisa(context: Context, forget: Forget) -> Outcome:
    """Retrain only the partitions that saw the domain, without it; rebuild the router.

    (Sharded, isolated, sliced, aggregated training: arXiv:1912.03817.) Equal inputs are never
    trained twice: gold's partition models are reused with their recorded seconds. They start from
    a seed LM without the domain; the partitions that stay had started from one with it.
    """
    touched = context.retrained(forget)
    gold_models, seed = models_without(context, forget)
    retrained = {k: gold_models[k] for k in touched if k in gold_models}
    kept = {k: path for k, path in context.models.items() if k not in touched}
    outcome = _rebuilt(
        kept | retrained, _router_without(context, forget), retrained, seed if retrained else None
    )
    outcome.reused = outcome.rebuilt  # gold made them
    outcome.removed = [f"model/{k}" for k in touched]
    return outcome


def _removable(context: Context, forget: Forget) -> tuple[int, ...]:
    """Partitions that a deletion of the domain removes; NotApplicable if none would be left."""
    touched = context.touched(forget)
    if not set(context.models) - set(touched):
        raise NotApplicable(f"{NOT_APPLICABLE}: removes all {context.partitions.n} models")
    return touched


def models_without(
    context: Context, forget: Forget, overwrite: bool = False
) -> tuple[dict[int, Path], Path | None]:
    """Models of a world without the domain and its own seed LM (None: there is none); only gold
    trains anew under `overwrite`.

    Where the run's models were computed elsewhere (another machine, torchrun), those that the
    domain never touched are taken as they are.
    """
    config = replace(context.without(forget), overwrite=overwrite)
    data = ProcessedData(config)
    seed, standing = train_seed(config, data), context.standing(config)
    models = {}
    for k in range(context.partitions.n):
        folder = model_folder(config, data, context.partitions, k)
        if k in standing and not is_complete(folder):
            models[k] = standing[k]
        elif folder is not None:
            models[k] = train_partition(config, data, context.partitions, k)
    return models, seed if has_own_seed(config) else None


def _router_without(context: Context, forget: Forget, overwrite: bool = False) -> Path:
    config = replace(context.without(forget), overwrite=overwrite)
    return build_router(config, ProcessedData(config), context.partitions)


def _rebuilt(
    models: dict[int, Path], router: Path, trained: dict[int, Path], seed: Path | None
) -> Outcome:
    """Outcome of a rebuild of the router, the `trained` models and the seed LM, at their recorded
    cost."""
    parts = [path for path in (_embedder_of(router), seed) if path]
    tokens, seconds = recorded_cost([router, *parts, *trained.values()])
    return Outcome(
        models=models,
        router=router,
        weights_removed=True,
        tokens=tokens,
        seconds=seconds,
        rebuilt=["router", *(["seed_lm"] if seed else []), *(f"model/{k}" for k in trained)],
    )


def _embedder_of(router: Path) -> Path | None:
    folder = router / "embedder"
    return folder if folder.is_dir() else None
