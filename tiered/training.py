"""Train one model on blocks: the Hugging Face Trainer with exact resume and a fixed data order.

The order of blocks is one permutation per epoch, a function of the seed; the seed is a function of
(config seed, stage, the partition's configured members). So no partition's model depends on any
other's data, on the order of training, or on how often the run was killed.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from tiered import branching
from tiered.config import CANARY, Config, plain
from tiered.data import ProcessedData
from tiered.fitting import Fit, OrderedBlocks, fit
from tiered.methods import MODELS, model_section
from tiered.partition import PartitionMap, make_partition_map
from tiered.record import environment, set_up_process
from tiered.store import (
    TOKENIZER_RECORD,
    UserError,
    digest,
    is_complete,
    read_json,
    seed_of,
    verify,
)
from tiered.workers import Call, processes, run_all


def batch_rows(config: Config, share: float) -> int:
    """Rows per micro-batch of a partition that holds `share` of the configured domains.

    constant_steps keeps the number of optimizer steps: the batch shrinks with the partition, down
    to min_batch_rows. It depends on the configuration only, never on present data.
    """
    rows = config.training.per_device_train_batch_size
    if config.training.schedule == "constant_steps":
        rows = max(config.training.min_batch_rows, round(rows * share))
    return rows


def training_arguments(config: Config, share: float) -> dict[str, Any]:
    """TrainingArguments of one partition's model."""
    own = {
        *("schedule", "min_batch_rows", "num_train_epochs", "split", "documents", "dropout"),
        *("num_proc", "save_steps", "report_to", "arguments"),
    }
    section = plain(config.training)
    values = {k: v for k, v in section.items() if k not in own}
    values["per_device_train_batch_size"] = batch_rows(config, share)
    return {**values, **config.training.arguments}


def partition_blocks(
    config: Config,
    data: ProcessedData,
    partitions: PartitionMap,
    k: int,
    domains: Iterable[str] | None = None,
) -> tuple[np.ndarray | None, dict[str, int]]:
    """Training blocks (rows, T) of partition k from present domains, and how many each gave.

    domains: only those of them (None: all).

    Domains follow one another by name, not in the order of the map: maps that agree on a
    partition's members train the same model. None if no present domain has data there.
    """
    split, parts, counts = config.training.split, [], {}
    for domain in sorted(partitions.members[k]):
        if domain not in (data.domains if domains is None else domains):
            continue
        ids = data.document_ids(domain, split)
        keep = branching.used(config, domain, ids)
        if partitions.by_document:
            own = partitions.assign(domain, ids) == k
            keep = own if keep is None else keep & own
        part = data.blocks(domain, split, keep=keep)
        if split == "train":
            canaries = kept_canaries(config, data, partitions, k, domain)
            part = np.concatenate([part, data.canary_blocks(domain, canaries)])
        if len(part):
            parts.append(part)
            counts[domain] = len(part)
    return (np.concatenate(parts) if parts else None), counts


def kept_canaries(
    config: Config, data: ProcessedData, partitions: PartitionMap, k: int, domain: str
) -> np.ndarray:
    """Canaries (canaries,) bool of a domain that partition k is trained on, references too."""
    ids = data.document_ids(domain, CANARY)
    keep = branching.used(config, domain, ids)
    keep = np.ones(len(ids), dtype=bool) if keep is None else keep
    return keep & (partitions.assign(domain, ids) == k) if ids else keep


def trained_rows(
    config: Config, data: ProcessedData, partitions: PartitionMap, domain: str
) -> np.ndarray:
    """Documents (documents,) bool of the train split whose first row stands in a block that a
    partition model or the seed LM was trained on (repeats beyond the first do not count)."""
    ids = data.document_ids(domain, "train")
    found = np.zeros(len(ids), dtype=bool)
    jobs = [(config, partitions)]
    if branching.has_own_seed(config):
        own = branching.seed_config(config)
        jobs.append((own, make_partition_map(own)))
    for made, assigned in jobs:
        if made.training.split == "train" and assigned.touched(domain):
            keep = branching.used(made, domain, ids)
            keep = np.ones(len(ids), dtype=bool) if keep is None else keep
            groups = np.where(keep, assigned.assign(domain, ids), -1)
            found |= keep & data.packed(domain, "train", groups)
    return found


def excluded_in(config: Config, partitions: PartitionMap, k: int) -> dict[str, list[str]]:
    """Documents that data.exclude_documents takes from partition k, by domain."""
    found = {}
    for domain, names in branching.excluded_documents(config).items():
        if domain in partitions.members[k]:
            ids = sorted(names)
            own = partitions.assign(domain, ids) == k
            if own.any():
                found[domain] = [name for name, here in zip(ids, own, strict=True) if here]
    return found


def model_inputs(
    config: Config, data: ProcessedData, partitions: PartitionMap, k: int
) -> str | None:
    """Hash of what config and data say of partition k's model, the environment apart.

    None for a partition without data (all its domains are excluded).
    """
    present = [d for d in partitions.members[k] if d in data.domains]
    if not present:
        return None
    arguments, split = training_arguments(config, partitions.share(k)), config.training.split
    excluded = excluded_in(config, partitions, k)
    return digest(
        {
            **({"excluded": excluded} if excluded else {}),
            "model": model_section(config),
            "training": plain({n: v for n, v in arguments.items() if n != "logging_steps"}),
            "epochs": config.training.num_train_epochs,
            "dropout": config.training.dropout,
            "seed": config.seed,
            "seed_lm": seed_inputs(config, data),
            "partition": partitions.identity(k),
            "data": {d: [split, data.split_hash(d, split)] for d in present},
            "documents": branching.document_interval(config),
            "block_size": config.data.block_size,
            "separate_documents": config.data.separate_documents,
            "tokenizer": data.tokenizer_hash,
        }
    )


def seed_inputs(config: Config, data: ProcessedData) -> str | None:
    """Hash of what makes the model that partition models start from; None for random weights."""
    if branching.has_own_seed(config):
        own = branching.seed_config(config)
        return model_inputs(own, data, make_partition_map(own), 0)
    return branching.outside_hash(config) if config.model.init_from else None


def train_seed(config: Config, data: ProcessedData) -> Path | None:
    """Folder of the model that partition models start from, trained if need be; None for none."""
    if branching.has_own_seed(config):
        own = branching.seed_config(config)
        return train_partition(own, data, make_partition_map(own), 0, "seed LM")
    if not config.model.init_from:
        return None
    folder = branching.outside_folder(config)
    branching.check_tokenizer(folder, data)
    return folder


def model_folder(
    config: Config, data: ProcessedData, partitions: PartitionMap, k: int
) -> Path | None:
    """Partition k's place in the store: its inputs and the environment that computes it, hashed.

    None for a partition without data.
    """
    inputs = model_inputs(config, data, partitions, k)
    if inputs is None:
        return None
    return config.store_dir / "models" / digest([inputs, environment(config)])


def check_models(
    config: Config, data: ProcessedData, partitions: PartitionMap, folders: dict[int, Path]
) -> None:
    """Raise UserError if a published model was trained from another config or other data.

    What computed it (machine, versions, code) may differ: its record says what did.
    """
    for k, folder in folders.items():
        made = read_json(folder / "record.json").get("inputs")
        if made != model_inputs(config, data, partitions, k):
            raise UserError(
                f"{folder}: trained from another config or other data than this config's; run:"
                f" python run_clm.py CONFIG partition.index={k}"
            )


def train_partition(
    config: Config, data: ProcessedData, partitions: PartitionMap, k: int, label: str = ""
) -> Path | None:
    """Folder of partition k's model in the store, trained if it is not there yet (or None).

    The seed LM it starts from, if any, is trained before; `overwrite` does not reach it.
    """
    folder = model_folder(config, data, partitions, k)
    if folder is None:
        return None
    if is_complete(folder) and not config.overwrite:
        verify(folder)
        return folder
    blocks, counts = partition_blocks(config, data, partitions, k)
    label = label or f"partition {k}"
    if blocks is None:
        raise UserError(f"{label}: fewer training tokens than one block of its domains")
    kind = MODELS[config.model.type]
    start = train_seed(replace(config, overwrite=False), data)
    model_config = kind.config_from(config, data)
    job = Fit(
        folder=folder,
        label=f"{config.name} {label} [{' '.join(partitions.members[k])[:40]}]",
        seed=seed_of(config.seed, "train", partitions.identity(k)),
        arguments=training_arguments(config, partitions.share(k)),
        record={
            "inputs": model_inputs(config, data, partitions, k),
            "partition": {"members": sorted(partitions.members[k]), "present": sorted(counts)},
            "seed": start and {"from": start.name, "domains": branching.seed_domains(start)},
            "blocks": counts,
            "batch_rows": batch_rows(config, partitions.share(k)),
            "environment": environment(config),
        },
    )

    def make() -> PreTrainedModel:
        model = kind.build(model_config)
        if start is not None:
            branching.initialise(model, start)
        branching.add_dropout(model, config.training.dropout)
        return model

    def finish(model: PreTrainedModel, path: Path) -> dict[str, Any]:
        data.tokenizer.save_pretrained(path)
        shutil.copy(data.folder / "tokenizer" / TOKENIZER_RECORD, path)  # what trained it
        return {"parameters": kind.card(model, blocks)}

    ordered = OrderedBlocks(
        blocks,
        config.training.num_train_epochs,
        job.seed,
        data.separator_id if config.data.separate_documents else None,
    )
    fit(config, job, make, ordered, finish)
    return folder


def forget_other_partitions(config: Config) -> None:
    """Remove from the run folder the models of an earlier config with more partitions."""
    for path in (config.run_dir / "models").glob("[0-9]*"):
        if int(path.name) >= config.num_partitions:
            shutil.rmtree(path)


def missing_seeds(config: Config) -> dict[Path, Call]:
    """The call that trains the seed LM the store lacks, by the folder it makes."""
    if not branching.has_own_seed(config):
        return {}
    own = branching.seed_config(config)
    return missing_models(own, [0])


def missing_models(config: Config, wanted: Iterable[int]) -> dict[Path, Call]:
    """Calls that train the partitions whose models the store lacks, by the folder they make."""
    data, partitions = ProcessedData(config), make_partition_map(config)
    folders = {k: model_folder(config, data, partitions, k) for k in wanted}
    return {
        folder: (train_apart, config, k)
        for k, folder in folders.items()
        if folder is not None and not is_complete(folder)
    }


def train_apart(config: Config, k: int) -> None:
    """train_partition in a process of its own."""
    set_up_process(config)
    train_partition(config, ProcessedData(config), make_partition_map(config), k)


def train_at_once(configs: list[Config], missing: Callable[[Config], dict[Path, Call]]) -> None:
    """Make what the configs' stores lack, training.num_proc calls at a time.

    With one process, under `overwrite` or under torchrun nothing is done: each is made where it
    is needed.
    """
    calls: dict[Path, Call] = {}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    for config in configs:
        if config.training.num_proc > 1 and not config.overwrite:
            calls |= missing(config)
    if len(calls) > 1:
        count = max(config.training.num_proc for config in configs)
        with processes(min(count, len(calls))) as pool:
            run_all(list(calls.values()), pool, "train", "model")
