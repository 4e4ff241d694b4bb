"""What a model is trained on, and with which arguments: a function of config, map and data.

Shapes: T tokens per block.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tiered import branching
from tiered.config import CANARY, Config, plain
from tiered.data import ProcessedData
from tiered.methods import model_section
from tiered.partition import PartitionMap, make_partition_map


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
        *("balanced", "added_from", "added_learning_rate", "routing_steps", "expert_devices"),
        "shard",
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
        if domain not in made.present_domains:
            continue  # a seed LM of other domains
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
        if domain in partitions.members[k] and domain in config.present_domains:
            ids = sorted(names)
            own = partitions.assign(domain, ids) == k
            if own.any():
                found[domain] = [name for name, here in zip(ids, own, strict=True) if here]
    return found


def training_facts(
    config: Config, data: ProcessedData, share: float, domains: Iterable[str]
) -> dict[str, Any]:
    """What decides a model besides which partition it is: its family, training arguments (those of
    a partition that holds `share` of the domains), seed and the training data of its domains."""
    arguments, split = training_arguments(config, share), config.training.split
    return {
        "model": model_section(config),
        "training": plain({n: v for n, v in arguments.items() if n != "logging_steps"}),
        "epochs": config.training.num_train_epochs,
        "dropout": config.training.dropout,
        "seed": config.seed,
        "data": {d: [split, data.split_hash(d, split)] for d in domains},
        "documents": branching.document_interval(config),
        "block_size": config.data.block_size,
        "separate_documents": config.data.separate_documents,
        "tokenizer": data.tokenizer_hash,
    }
