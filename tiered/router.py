"""Level 1, training side: embedder, centroids, the run's router folder, loading a tiered model.

runs/<experiment>/router/: config.json and model.safetensors (embedder), centroids.safetensors,
router.json (domain and partition of every centroid).
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from tiered.clusters import document_vectors, fit_tfidf, fitted_documents, write_clusters
from tiered.config import CANARY, SPLITS, Config, plain
from tiered.data import ProcessedData
from tiered.fitting import Fit, OrderedBlocks, fit, is_trained
from tiered.modeling_tiered import (
    Level1Config,
    Level1Embedder,
    Level1Router,
    TieredConfig,
    TieredForCausalLM,
)
from tiered.partition import PartitionMap
from tiered.record import device_of, environment, set_up_process
from tiered.store import (
    HASHES,
    TIMINGS,
    UserError,
    atomic_folder,
    code_hash,
    content_hash,
    digest,
    is_complete,
    link_tree,
    read_json,
    seed_of,
    verify,
    write_json,
)
from tiered.training import check_models
from tiered.workers import Call


def level1_config(config: Config, data: ProcessedData) -> Level1Config:
    """Embedder configuration of a config."""
    section = config.router
    try:
        return Level1Config(
            embedder=section.embedder,
            vocab_size=data.vocab_size,
            hidden_size=section.hidden_size,
            num_hidden_layers=section.num_hidden_layers,
            num_attention_heads=section.num_attention_heads,
            max_position_embeddings=config.data.block_size,
            ngram_buckets=section.ngram_buckets,
            ngram_max=section.ngram_max,
            tfidf_buckets=section.tfidf_buckets,
            tfidf_ngram_max=section.tfidf_ngram_max,
            tfidf_dimensions=section.tfidf_dimensions,
            tfidf_analyzer=section.tfidf_analyzer,
            tfidf_stop_words=len(ENGLISH_STOP_WORDS) if section.tfidf_analyzer == "word" else 0,
            metric="euclidean" if config.partition.method == "cluster" else "cosine",
            pad_token_id=data.pad_id,
            eos_token_id=data.separator_id,
        )
    except ValueError as error:
        raise UserError(f"router: {error}") from None


def router_blocks(
    config: Config, data: ProcessedData, domain: str, keep: np.ndarray | None = None
) -> np.ndarray:
    """Blocks (rows, T) of a domain's router split, of its kept documents (None: all)."""
    limit = config.router.tokens_per_domain
    blocks = data.blocks(domain, "router", keep=keep, limit_tokens=limit)
    if not len(blocks) and keep is None:
        raise UserError(
            f"domain {domain}: its router split is shorter than one block of"
            f" {config.data.block_size} tokens; lower data.block_size or give it more text"
        )
    return blocks


def embedder_domains(config: Config, data: ProcessedData) -> list[str]:
    """Present domains that the embedder is trained on, by name: the order of the config changes
    nothing, nor do domains that were added later."""
    return sorted(set(data.domains) - set(config.data.added_domains))


def embedder_inputs(config: Config, data: ProcessedData) -> str:
    """Hash of what config and data say of the embedder, the environment apart."""
    fixed = ("scope", "context_tokens", "early_positions")
    return digest(
        {
            "router": {k: v for k, v in plain(config.router).items() if k not in fixed},
            "data": {d: data.split_hash(d, "router") for d in embedder_domains(config, data)},
            "configured": sorted(config.data.domains),
            "block_size": config.data.block_size,
            "tokenizer": data.tokenizer_hash,
            "seed": config.seed,
        }
    )


def embedder_folder(config: Config, data: ProcessedData) -> Path | None:
    """The embedder's place in the store; None for `hashed_ngrams`, which has nothing to train."""
    if config.router.embedder == "hashed_ngrams":
        return None
    code = ("clusters", "tokenization") if config.router.embedder == "tfidf" else ()
    made_by = code_hash(*(f"tiered/{name}.py" for name in code))
    key = digest([embedder_inputs(config, data), environment(config), made_by])
    return config.store_dir / "embedders" / key


def router_inputs(config: Config, data: ProcessedData, partitions: PartitionMap) -> str:
    """Hash of what config and data say of embedder, centroids and map, the environment apart."""
    parts = [embedder_inputs(config, data), partitions.as_json()["hash"]]
    added = [d for d in config.data.added_domains if d in data.domains]
    return digest([*parts, *([d, data.split_hash(d, "router")] for d in added)])


def check_clusters(config: Config, data: ProcessedData) -> None:
    """Raise UserError if the run's cluster map was fitted by another config or on other data."""
    if config.partition.method != "cluster":
        return
    folder = config.run_dir / "partition" / "clusters"
    if read_json(folder / "clusters.json")["inputs"] != cluster_inputs(config, data):
        raise UserError(
            f"{folder}: fitted by another config or on other data than this config's; run:"
            " python train_det_router.py CONFIG"
        )


def check_router(config: Config, data: ProcessedData, partitions: PartitionMap) -> None:
    """Raise UserError if the run's router was made from another config or other data."""
    check_clusters(config, data)
    folder = config.run_dir / "router"
    if read_json(folder / "router.json")["inputs"] != router_inputs(config, data, partitions):
        raise UserError(
            f"{folder}: made from another config or other data than this config's; run:"
            " python train_det_router.py CONFIG"
        )


def train_embedder(config: Config, data: ProcessedData) -> Path | None:
    """Folder of the Level-1 embedder (LM or tf-idf), fitted on the present router split."""
    folder = embedder_folder(config, data)
    if folder is None:
        return None
    if not config.overwrite and is_trained(folder):
        verify(folder)
        return folder
    if config.router.embedder == "tfidf":
        begin = time.perf_counter()
        domains = embedder_domains(config, data)
        embedder = fit_tfidf(config, level1_config(config, data), data, domains)
        with atomic_folder(folder) as path:
            save_file(embedder.state_dict(), path / "model.safetensors")
            write_json(path / TIMINGS, {"seconds": time.perf_counter() - begin})
        return folder
    domains = embedder_domains(config, data)
    blocks = np.concatenate([router_blocks(config, data, d) for d in domains])
    job = Fit(
        folder=folder,
        label=f"{config.name} level-1 embedder",
        seed=seed_of(config.seed, "router", sorted(config.data.domains)),
        arguments={
            "per_device_train_batch_size": config.router.batch_rows,
            "learning_rate": config.router.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "logging_steps": config.training.logging_steps,
        },
        record={"domains": domains},
    )
    model_config = level1_config(config, data)
    ordered = OrderedBlocks(blocks, config.router.num_train_epochs, job.seed)
    fit(config, job, lambda: Level1Embedder(model_config), ordered, lambda model, path: {})
    return folder


def missing_embedder(config: Config) -> dict[Path, Call]:
    """The call that trains the embedder the store lacks, by the folder it makes."""
    folder = embedder_folder(config, ProcessedData(config))
    missing = folder is not None and not is_complete(folder)
    return {folder: (train_embedder_apart, config)} if missing else {}


def train_embedder_apart(config: Config) -> None:
    """train_embedder in a process of its own."""
    set_up_process(config)
    train_embedder(config, ProcessedData(config))


def make_router(
    config: Config, data: ProcessedData, partitions: PartitionMap, embedder: Path | None
) -> tuple[Level1Router, list[str | None]]:
    """Router with one centroid per present domain (per partition for maps by document).

    A centroid is the mean embedding of its router-split blocks. Returns the router and each
    centroid's domain (None: a partition's).
    """
    if partitions.method == "cluster":
        return _cluster_router(config, data, partitions, embedder)
    groups = _centroid_groups(config, data, partitions)
    router = Level1Router(level1_config(config, data), partitions.n, len(groups))
    load_embedder(router, embedder)
    router.eval().to(device_of(config))
    for c, (_, k, blocks) in enumerate(groups):
        router.centroids[c] = _mean_embedding(router, blocks, config.router.batch_rows)
        router.centroid_partition[c] = k
    return router.cpu(), [domain for domain, _, _ in groups]


def load_embedder(router: Level1Router, folder: Path | None) -> None:
    """Give a router the fitted embedder of a folder (None: it needs no fit)."""
    if folder is None:
        return
    config = router.embedder.config
    if config.embedder == "transformer":
        router.embedder = Level1Embedder.from_pretrained(folder)
        router.embedder.config.metric = config.metric  # a router's own, its embedder is shared
    else:
        router.embedder.load_state_dict(load_file(folder / "model.safetensors"))


def _cluster_router(
    config: Config, data: ProcessedData, partitions: PartitionMap, embedder: Path | None
) -> tuple[Level1Router, list[str | None]]:
    """Router of a cluster map: a cluster's centroid is the mean of the unit vectors of its present
    router-split documents. One that has none left is left out."""
    router = Level1Router(level1_config(config, data), partitions.n, partitions.n)
    load_embedder(router, embedder)
    router.eval()
    sums = torch.zeros(router.centroids.shape, dtype=torch.float64)
    counts = torch.zeros(partitions.n, dtype=torch.long)
    for domain in sorted(data.domains):
        documents = fitted_documents(config, data, domain)
        vectors = torch.from_numpy(document_vectors(config, router.embedder, documents)).double()
        labels = partitions.assign(domain, data.document_ids(domain, "router")[: len(vectors)])
        labels = torch.from_numpy(labels)
        sums.index_add_(0, labels, vectors)
        counts += torch.bincount(labels, minlength=partitions.n)
    present = counts.nonzero()[:, 0]
    router.centroids = (sums[present] / counts[present, None]).float()
    router.centroid_partition = present
    return router.cpu(), [None] * len(present)


def build_clusters(config: Config, data: ProcessedData) -> Path:
    """Store folder of a config's cluster map, fitted if it is not there yet."""
    if config.router.embedder == "hashed_ngrams":
        raise UserError(
            "router.embedder: hashed_ngrams cannot be clustered; use transformer, tfidf"
        )
    embedder = train_embedder(config, data)
    inputs = cluster_inputs(config, data)
    code = code_hash("tiered/clusters.py", "tiered/kmeans.py")
    folder = config.store_dir / "clusters" / digest([inputs, environment(config), code])
    if is_complete(folder) and not config.overwrite:
        verify(folder)
        return folder
    level1 = level1_config(config, data)
    router = Level1Router(level1, config.partition.n, 0)
    load_embedder(router, embedder)
    write_clusters(config, data, router.embedder.eval(), level1, folder, inputs)
    return folder


def cluster_inputs(config: Config, data: ProcessedData) -> str:
    """Hash of what config and data say of a cluster map, environment and code apart."""
    splits = {d: [data.split_hash(d, s) for s in (*SPLITS, CANARY)] for d in data.domains}
    section = config.partition
    chosen = [section.n, section.seed, section.fit_documents]
    return digest([embedder_inputs(config, data), chosen, splits])


def _centroid_groups(
    config: Config, data: ProcessedData, partitions: PartitionMap
) -> list[tuple[str | None, int, np.ndarray]]:
    """(domain or None, partition, router-split blocks) of every centroid."""
    if not partitions.by_document:
        return [
            (d, partitions.partition_of(d), router_blocks(config, data, d)) for d in data.domains
        ]
    groups = []
    for k in range(partitions.n):
        parts = []
        for domain in data.domains:
            keep = partitions.assign(domain, data.document_ids(domain, "router")) == k
            parts.append(router_blocks(config, data, domain, keep))
        blocks = np.concatenate(parts)
        if not len(blocks):
            raise UserError(f"partition {k}: no router-split block; lower partition.n")
        groups.append((None, k, blocks))
    return groups


@torch.inference_mode()
def _mean_embedding(router: Level1Router, blocks: np.ndarray, batch_rows: int) -> torch.Tensor:
    device = router.centroids.device
    ids = torch.from_numpy(blocks.astype(np.int64))
    total = sum(
        router.embedder.row_embeddings(batch.to(device)).double().sum(0)
        for batch in ids.split(batch_rows)
    )
    return (total / len(ids)).float()


def build_router(config: Config, data: ProcessedData, partitions: PartitionMap) -> Path:
    """Store folder of a config's router (embedder and centroids), built if it is not there yet."""
    embedder = train_embedder(config, data)
    inputs = router_inputs(config, data, partitions)
    trained = content_hash(embedder) if embedder else None
    key = digest([inputs, trained, environment(config)])
    folder = config.store_dir / "routers" / key
    if is_complete(folder) and not config.overwrite:
        verify(folder)
        return folder
    begin = time.perf_counter()
    router, domains = make_router(config, data, partitions, embedder)
    save_router(folder, router, {"domains": domains, "inputs": inputs}, embedder, begin)
    return folder


def save_router(
    folder: Path,
    router: Level1Router,
    meta: dict[str, Any],
    embedder: Path | None,
    begin: float,
) -> None:
    """Write a router folder atomically; embedder weights are hard links into the store.

    meta: each centroid's domain under `domains`, and the router's `inputs`; begin:
    time.perf_counter() when making it began (the embedder's training apart).
    """
    with atomic_folder(folder) as path:
        if embedder is not None:
            link_tree(embedder, path / "embedder")
        router.embedder.config.save_pretrained(path)
        tensors = {
            "centroids": router.centroids.contiguous(),
            "centroid_partition": router.centroid_partition.contiguous(),
        }
        save_file(tensors, path / "centroids.safetensors")
        write_json(path / "router.json", {**meta, "num_partitions": router.num_partitions})
        write_json(path / TIMINGS, {"seconds": time.perf_counter() - begin})


def router_content(folder: Path) -> str:
    """Hash of what a router is (embedder, centroids, domains), not of the config it came from."""
    files = read_json(folder / HASHES)
    del files["router.json"]
    meta = read_json(folder / "router.json")
    return digest([files, meta["domains"], meta["num_partitions"]])


def load_router(folder: Path, command: str) -> tuple[Level1Router, list[str | None]]:
    """Router and centroid domains of a router folder, verified against its hash list."""
    if not is_complete(folder):
        raise UserError(f"{folder}: no router here yet; run: {command}")
    verify(folder)
    disable_progress_bar()  # of transformers: one flash per model says nothing
    meta = read_json(folder / "router.json")
    tensors = load_file(folder / "centroids.safetensors")
    config = Level1Config.from_pretrained(folder)
    router = Level1Router(config, meta["num_partitions"], len(meta["domains"]))
    trained = folder / "embedder"
    load_embedder(router, trained if trained.is_dir() else None)
    router.centroids, router.centroid_partition = (
        tensors["centroids"],
        tensors["centroid_partition"],
    )
    return router.eval(), meta["domains"]


def load_models(folders: dict[int, Path]) -> dict[int, torch.nn.Module]:
    """Partition models of published folders, each verified against its hash list."""
    models = {}
    for k, folder in sorted(folders.items()):
        verify(folder)
        models[k] = AutoModelForCausalLM.from_pretrained(folder).eval()
    return models


def tiered_model(
    config: Config,
    partitions: PartitionMap,
    router: tuple[Level1Router, list[str | None]],
    models: dict[int, torch.nn.Module],
) -> TieredForCausalLM:
    """One HF model of router and partition models, on the config's device."""
    module, domains = router
    first = next(iter(models.values()))
    tiered = TieredConfig(
        partitions=[list(group) for group in partitions.members],
        level1=module.embedder.config.to_dict(),
        centroid_domains=list(domains),
        scope=config.router.scope,
        context_tokens=config.router.context_tokens,
        early_positions=config.router.early_positions,
        vocab_size=first.config.vocab_size,
        max_position_embeddings=min(m.config.max_position_embeddings for m in models.values()),
        pad_token_id=first.config.pad_token_id,
        eos_token_id=first.config.eos_token_id,
    )
    return TieredForCausalLM.from_parts(tiered, module, models).to(device_of(config))


def run_models(config: Config, partitions: PartitionMap, data: ProcessedData) -> dict[int, Path]:
    """Published model folders of a run; UserError naming the command if one is missing or was
    trained from another config."""
    folders: dict[int, Path] = {}
    for k in range(partitions.n):
        if not any(d in data.domains for d in partitions.members[k]):
            continue
        folder = config.run_dir / "models" / str(k)
        if not is_complete(folder):
            raise UserError(
                f"{folder}: partition {k} is not trained yet; run: python run_clm.py CONFIG"
                f" partition.index={k}"
            )
        folders[k] = folder
    check_models(config, data, partitions, folders)
    return folders


def write_partition_map(config: Config, partitions: PartitionMap) -> dict[str, Any]:
    """Store the map in runs/<experiment>/partition/map.json and return it."""
    value = partitions.as_json()
    write_json(config.run_dir / "partition" / "map.json", value)
    return value
