"""Models that share a trunk (DEMix, domain tokens): one training makes those of all partitions.

The store keeps the whole model; each partition's model is published as a checkpoint of its own, so
that routing, mixing, removal and attacks treat it as any other: `shared.safetensors` (the trunk, a
hard link to one file of all partitions) and `own.safetensors` (what is the partition's alone).
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tiered import branching
from tiered.blocks import excluded_in, partition_blocks, training_arguments, training_facts
from tiered.config import Config
from tiered.data import ProcessedData
from tiered.fitting import Fit, fit, is_trained
from tiered.joint import JointTrainer, LabelledBlocks, micro_batch_rows
from tiered.methods import MODELS
from tiered.partition import PartitionMap
from tiered.record import (
    environment,
    is_main_process,
    training_environment,
    wait_for_ranks,
)
from tiered.store import (
    TIMINGS,
    UserError,
    atomic_folder,
    content_hash,
    digest,
    is_complete,
    read_json,
    seed_of,
    verify,
    write_json,
)

SHARED, OWN = "shared.safetensors", "own.safetensors"
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_renewed: set[Path] = set()  # whole models that this process has trained: `overwrite` is obeyed


def is_shared(config: Config) -> bool:
    """Whether the models of a config's partitions share a trunk."""
    return MODELS[config.model.type].shared


def founding(partitions: PartitionMap) -> range:
    """Partitions that the trunk is trained on: all but those of added domains."""
    return range(partitions.n - partitions.added)


def _present(data: ProcessedData, partitions: PartitionMap) -> list[int]:
    """Founding partitions that have data."""
    members = partitions.members
    return [k for k in founding(partitions) if any(d in data.domains for d in members[k])]


def whole_inputs(config: Config, data: ProcessedData, partitions: PartitionMap) -> str | None:
    """Hash of what config and data say of the whole model, the environment apart; None without
    data."""
    present = _present(data, partitions)
    if not present:
        return None
    domains = sorted({d for k in present for d in partitions.members[k] if d in data.domains})
    excluded = {str(k): found for k in present if (found := excluded_in(config, partitions, k))}
    return digest(
        {
            **training_facts(config, data, 1.0, domains),
            **({"excluded": excluded} if excluded else {}),
            "partitions": [partitions.identity(k) for k in founding(partitions)],
        }
    )


def part_inputs(
    config: Config, data: ProcessedData, partitions: PartitionMap, k: int
) -> str | None:
    """Hash of what config and data say of a founding partition's model; None without data."""
    if k not in _present(data, partitions):
        return None
    return digest([whole_inputs(config, data, partitions), k])


def whole_folder(config: Config, data: ProcessedData, partitions: PartitionMap) -> Path:
    """The whole model's place in the store."""
    inputs = whole_inputs(config, data, partitions)
    return config.store_dir / "models" / digest([inputs, *training_environment(config)])


def train_whole(config: Config, data: ProcessedData, partitions: PartitionMap) -> Path:
    """Folder of the whole model in the store, trained if it is not there yet.

    Every step holds as many rows of each partition that has data. The model is made with a part
    for every configured partition, so that the others begin alike whichever have none.
    """
    folder = whole_folder(config, data, partitions)
    if (folder in _renewed or not config.overwrite) and is_trained(folder):
        verify(folder)
        return folder
    present, blocks, labels, counts = _present(data, partitions), [], [], {}
    for k in present:
        part, found = partition_blocks(config, data, partitions, k)
        if part is None:
            raise UserError(f"partition {k}: fewer training tokens than one block of its domains")
        blocks.append(part)
        labels.append(np.full(len(part), k))
        counts = {d: counts.get(d, 0) + found.get(d, 0) for d in {**counts, **found}}
    kind, section = MODELS[config.model.type], config.training
    micro_batches = section.gradient_accumulation_steps
    configured = len(founding(partitions))
    arguments = training_arguments(config, 1.0)
    per_step = arguments["per_device_train_batch_size"] * micro_batches
    rows = micro_batch_rows(per_step, configured, len(present), micro_batches, "partitions")
    arguments["per_device_train_batch_size"] = rows
    ordered = LabelledBlocks(
        np.concatenate(blocks),
        np.concatenate(labels),
        per_step // configured,
        section.num_train_epochs,
        seed_of(config.seed, "train", [partitions.identity(k) for k in founding(partitions)]),
        data.separator_id if config.data.separate_documents else None,
    )
    job = Fit(
        folder=folder,
        label=f"{config.name} {config.model.type}, {len(present)} partitions",
        seed=seed_of(
            config.seed, "initial", [partitions.identity(k) for k in founding(partitions)]
        ),
        arguments=arguments,
        record={
            "inputs": whole_inputs(config, data, partitions),
            "partitions": {str(k): sorted(partitions.members[k]) for k in present},
            "present": sorted(counts),
            "blocks": counts,
            "batch_rows": rows,
            "environment": environment(config),
        },
    )

    def make() -> PreTrainedModel:
        model = kind.build(kind.config_from(config, data))
        for k in founding(partitions):
            if k not in present:
                model.remove_part(k)
        branching.add_dropout(model, section.dropout)
        return model

    def finish(model: PreTrainedModel, path: Path) -> dict[str, Any]:
        own = {id(p) for k in present for p in model.part_parameters(k)}
        names = [n for n, p in model.named_parameters() if id(p) in own]
        split_checkpoint(path, names)
        return {"parameters": {"total": sum(p.numel() for p in model.parameters())}}

    fit(config, job, make, ordered, finish, JointTrainer)
    _renewed.add(folder)
    return folder


def split_checkpoint(folder: Path, own: list[str], shared: Path | None = None) -> None:
    """Split a checkpoint's one file into SHARED and OWN (the named weights).

    shared: a file of the same shared weights, linked in place of a copy (plain copy across file
    systems).
    """
    weights = load_file(folder / WHOLE)
    parts = {OWN: {n: w for n, w in weights.items() if n in own}}
    parts[SHARED] = {n: w for n, w in weights.items() if n not in own}
    for name, part in parts.items():
        if name == SHARED and shared is not None:
            try:
                os.link(shared, folder / name)
            except OSError:
                shutil.copy2(shared, folder / name)
            continue
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
        "weight_map": {n: OWN if n in own else SHARED for n in sorted(weights)},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (folder / WHOLE).unlink()


def own_weights(folder: Path) -> list[str] | None:
    """Names of the weights that are a partition's alone; None where the model shares nothing."""
    if not (folder / SHARED).is_file():
        return None
    found = read_json(folder / INDEX)["weight_map"]
    return sorted(name for name, file in found.items() if file == OWN)


def freeze_shared(model: PreTrainedModel, folder: Path) -> None:
    """Take a model's shared weights out of training: what others share must stay as it is."""
    own = own_weights(folder)
    if own is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in own)


def publish_parts(
    config: Config,
    data: ProcessedData,
    partitions: PartitionMap,
    folders: Mapping[int, Path],
    copy_tokenizer: Callable[[Path], None],
) -> None:
    """Write founding partitions' models to their places in the store (those that lack them; all,
    once per process, under `overwrite`), the whole model trained if need be."""
    renew = config.overwrite and whole_folder(config, data, partitions) not in _renewed
    whole = train_whole(config, data, partitions)
    missing = {k: path for k, path in folders.items() if renew or not is_complete(path)}
    if missing and is_main_process():
        model = AutoModelForCausalLM.from_pretrained(whole)
        for k, folder in missing.items():
            with atomic_folder(folder) as path:
                _write_part(config, data, partitions, k, model, whole, path)
                copy_tokenizer(path)
    wait_for_ranks(config)  # the others may start from a part at once


def _write_part(
    config: Config,
    data: ProcessedData,
    partitions: PartitionMap,
    k: int,
    model: PreTrainedModel,
    whole: Path,
    path: Path,
) -> None:
    """Checkpoint, log, record and timings of partition k in a folder that is being made.

    The record counts the tokens of the partition's own rows, timings its share of the seconds of
    the one training.
    """
    part, record, present = (
        model.part(k),
        read_json(whole / "record.json"),
        _present(data, partitions),
    )
    own = list(model.part_parameters(k))
    names = [n for n, p in part.named_parameters() if any(p is q for q in own)]
    part.save_pretrained(path)
    split_checkpoint(path, names, whole / SHARED)
    shutil.copy(whole / "metrics.jsonl", path)
    blocks, counts = partition_blocks(config, data, partitions, k)
    size = sum(p.numel() for p in own)
    kept = ("optimizer_steps", "final_training_loss_nats", "environment")
    value = {
        **{name: record[name] for name in kept},
        "inputs": part_inputs(config, data, partitions, k),
        # the trunk has seen every domain
        "partition": {"members": sorted(partitions.members[k]), "present": record["present"]},
        "seed": None,
        "shared_trunk": content_hash(whole),
        "blocks": counts,
        "batch_rows": record["batch_rows"] // len(present),
        "tokens": record["tokens"] // len(present),
        "parameters": {**MODELS[config.model.type].card(part, blocks), "own": size},
    }
    write_json(path / "record.json", value)
    timings = read_json(whole / TIMINGS)
    write_json(path / TIMINGS, {**timings, "seconds": timings["seconds"] / len(present)})
