"""Train one model on blocks: the Hugging Face Trainer with exact resume and a fixed data order.

The order of blocks is one permutation per epoch, a function of the seed; the seed is a function of
(config seed, stage, the partition's configured members). So no partition's model depends on any
other's data, on the order of training, or on how often the run was killed.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tiered import branching, shared_trunk
from tiered.blocks import (
    batch_rows,
    excluded_in,
    partition_blocks,
    training_arguments,
    training_facts,
)
from tiered.config import HAVE_EXPERTS, Config
from tiered.data import ProcessedData
from tiered.fitting import Fit, OrderedBlocks, fit, is_trained
from tiered.joint import BalancedBlocks, micro_batch_rows
from tiered.methods import MODELS
from tiered.nearest import nearest_partition
from tiered.partition import PartitionMap, make_partition_map
from tiered.record import (
    device_of,
    environment,
    set_up_process,
    training_environment,
    world_size,
)
from tiered.recorder import RoutingRecorder
from tiered.shared_trunk import founding
from tiered.store import (
    HASHES,
    TOKENIZER_RECORD,
    UserError,
    code_hash,
    digest,
    is_complete,
    read_json,
    seed_of,
    verify,
)
from tiered.workers import Call, processes, run_all


def adapts(config: Config, partitions: PartitionMap, k: int) -> bool:
    """Whether partition k is an added domain's whose model starts from the nearest one."""
    return bool(config.training.added_from) and k >= partitions.n - partitions.added


def model_inputs(
    config: Config, data: ProcessedData, partitions: PartitionMap, k: int
) -> str | None:
    """Hash of what config and data say of partition k's model, the environment apart.

    None for a partition without data (all its domains are excluded).
    """
    present = [d for d in partitions.members[k] if d in data.domains]
    if not present:
        return None
    if shared_trunk.is_shared(config) and not adapts(config, partitions, k):
        return shared_trunk.part_inputs(config, data, partitions, k)
    excluded = excluded_in(config, partitions, k)
    own = {
        **({"excluded": excluded} if excluded else {}),
        **({"balanced": True} if config.training.balanced else {}),
        **({"routing": config.training.routing_steps} if watches_routing(config) else {}),
        **({"devices": config.training.expert_devices} if spreads_experts(config) else {}),
        **training_facts(config, data, partitions.share(k), present),
        "seed_lm": seed_inputs(config, data),
        "partition": partitions.identity(k),
    }
    if adapts(config, partitions, k):
        own |= {
            "from": [model_inputs(config, data, partitions, j) for j in founding(partitions)],
            "chosen_by": data.split_hash(present[0], "validation"),
            "choice": config.eval.cached_rows,
            "learning_rate": config.training.added_learning_rate,
        }
    return digest(own)


WATCHED_ROWS = 4  # validation rows per domain whose routing is noted while a model is trained


def watches_routing(config: Config) -> bool:
    """Whether training notes what experts do."""
    return config.training.routing_steps > 0 and config.model.type in HAVE_EXPERTS


def spreads_experts(config: Config) -> bool:
    """Whether a layer's experts are shared out over devices."""
    return config.training.expert_devices > 1


def expert_devices(config: Config) -> list[torch.device]:
    """The devices that experts are shared out over. UserError where there are fewer, or ranks."""
    count, device = config.training.expert_devices, device_of(config)
    if world_size() > 1:
        raise UserError("training.expert_devices: one process drives them; run without torchrun")
    if device.type == "cpu":
        return [device] * count
    if torch.cuda.device_count() < count:
        raise UserError(
            f"training.expert_devices: {count}, but torch sees {torch.cuda.device_count()} GPUs"
        )
    return [torch.device(device.type, i) for i in range(count)]


def watch(job: Fit, config: Config, data: ProcessedData, domains: Iterable[str]) -> None:
    """Have a training job note what experts do, where the config asks for it."""
    if watches_routing(config):
        job.observe = routing_observer(data, domains)
        job.observe_steps = config.training.routing_steps


def routing_observer(
    data: ProcessedData, domains: Iterable[str]
) -> Callable[[PreTrainedModel], dict[str, Any]]:
    """What is noted of a model in training: loads and shares of its experts, on a few validation
    rows of every domain."""
    rows = {d: data.rows(d, "validation", WATCHED_ROWS).input_ids for d in sorted(domains)}
    rows = {d: found for d, found in rows.items() if len(found)}
    if not rows:
        raise UserError(
            "training.routing_steps: the validation split has no row to watch; set it to 0"
        )

    def observe(model: PreTrainedModel) -> dict[str, Any]:
        recorder = RoutingRecorder(rows, data.vocab_size)
        for domain, found in rows.items():
            recorder.read(model, domain, found)
        return recorder.snapshot()

    return observe


def seed_inputs(config: Config, data: ProcessedData) -> str | None:
    """Hash of what makes the model that partition models start from; None for random weights."""
    if branching.has_own_seed(config):
        own = branching.seed_config(config)
        return model_inputs(own, _seed_data(own, data), make_partition_map(own), 0)
    return branching.outside_hash(config) if config.model.init_from else None


def _seed_data(own: Config, data: ProcessedData) -> ProcessedData:
    """The data of the domains that the seed LM is trained on."""
    return data if own.present_domains == data.domains else ProcessedData(own)


def train_seed(config: Config, data: ProcessedData) -> Path | None:
    """Folder of the model that partition models start from, trained if need be; None for none."""
    if branching.has_own_seed(config):
        own = branching.seed_config(config)
        return train_partition(own, _seed_data(own, data), make_partition_map(own), 0, "seed LM")
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
    # where a model starts from is chosen by scores of others
    chosen = adapts(config, partitions, k)
    code = [code_hash("tiered/mixtures.py", "tiered/scoring.py")] if chosen else []
    return config.store_dir / "models" / digest([inputs, *training_environment(config), *code])


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
    records = {k: read_json(folder / "record.json") for k, folder in folders.items()}
    seeds = {_seed_weights(config, r["seed"]["from"]) for r in records.values() if r.get("seed")}
    if len(seeds) > 1:
        raise UserError(
            f"{config.run_dir / 'models'}: the partitions' models start from {len(seeds)} different"
            " seed LMs, as machines of several kinds make them; run on one kind:"
            " python run_clm.py CONFIG"
        )
    trunks = {r["shared_trunk"] for r in records.values() if "shared_trunk" in r}
    if len(trunks) > 1:
        raise UserError(
            f"{config.run_dir / 'models'}: the partitions' models are of {len(trunks)} trunks;"
            " run: python run_clm.py CONFIG"
        )


def _seed_weights(config: Config, name: str) -> str:
    """What tells a seed LM of the store from another: its weights; its name where it is not there
    (any more, or one from outside)."""
    path = config.store_dir / "models" / name / HASHES
    hashes = read_json(path) if path.is_file() else {}
    return digest([v for n, v in hashes.items() if n.endswith(".safetensors")] or name)


def train_partition(
    config: Config, data: ProcessedData, partitions: PartitionMap, k: int, label: str = ""
) -> Path | None:
    """Folder of partition k's model in the store, trained if it is not there yet (or None).

    The seed LM it starts from, if any, is trained before; `overwrite` does not reach it.
    """
    folder = model_folder(config, data, partitions, k)
    if folder is None:
        return None
    part = shared_trunk.is_shared(config) and not adapts(config, partitions, k)
    # ranks wait for one another where parts are published: none may pass by that
    if not config.overwrite and not (part and world_size() > 1) and is_trained(folder):
        verify(folder)
        return folder
    if part:
        folders = {j: model_folder(config, data, partitions, j) for j in founding(partitions)}
        folders = {j: path for j, path in folders.items() if path is not None}
        shared_trunk.publish_parts(
            config, data, partitions, folders, lambda path: _copy_tokenizer(data, path)
        )
        return folder
    blocks, counts = partition_blocks(config, data, partitions, k)
    label = label or f"partition {k}"
    if blocks is None:
        raise UserError(f"{label}: fewer training tokens than one block of its domains")
    if adapts(config, partitions, k):
        _adapt(config, data, partitions, k, folder, blocks, counts)
        return folder
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
        sharded=config.training.shard,
    )
    watch(job, config, data, counts)
    if config.model.type == "lora":
        from tiered.baselines.lora_experts import train_expert  # peft takes seconds to import

        ordered = _in_order(config, data, partitions, k, job, blocks, counts)
        train_expert(config, job, start, ordered, lambda path: _copy_tokenizer(data, path))
        return folder

    def make() -> PreTrainedModel:
        model = kind.build(model_config)
        if start is not None:
            branching.initialise(model, start)
        return _prepared(model, config)

    def finish(model: PreTrainedModel, path: Path) -> dict[str, Any]:
        _copy_tokenizer(data, path)
        return {"parameters": kind.card(model, blocks)}

    ordered = _in_order(config, data, partitions, k, job, blocks, counts)
    fit(config, job, make, ordered, finish)
    return folder


def _prepared(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """The model with what training adds to it: dropout, and devices for its experts."""
    branching.add_dropout(model, config.training.dropout)
    if spreads_experts(config):
        model.spread_experts(expert_devices(config))
    return model


def _copy_tokenizer(data: ProcessedData, path: Path) -> None:
    data.tokenizer.save_pretrained(path)
    shutil.copy(data.folder / "tokenizer" / TOKENIZER_RECORD, path)  # what trained it


def _in_order(
    config: Config,
    data: ProcessedData,
    partitions: PartitionMap,
    k: int,
    job: Fit,
    blocks: np.ndarray,
    counts: dict[str, int],
) -> OrderedBlocks:
    """A partition's blocks (rows, T), counted by domain, in training order."""
    separator = data.separator_id if config.data.separate_documents else None
    epochs, section = config.training.num_train_epochs, config.training
    if not section.balanced:
        return OrderedBlocks(blocks, epochs, job.seed, separator)
    micro_batches = section.gradient_accumulation_steps
    per_step = job.arguments["per_device_train_batch_size"] * micro_batches
    configured = len(partitions.members[k])
    rows = micro_batch_rows(per_step, configured, len(counts), micro_batches, "domains")
    job.arguments["per_device_train_batch_size"] = job.record["batch_rows"] = rows
    # a domain's place among the configured: its order does not depend on which others are there
    places = [sorted(partitions.members[k]).index(d) for d in counts]
    labels = np.repeat(places, list(counts.values()))
    return BalancedBlocks(blocks, labels, per_step // configured, epochs, job.seed, separator)


def _adapt(
    config: Config,
    data: ProcessedData,
    partitions: PartitionMap,
    k: int,
    folder: Path,
    blocks: np.ndarray,
    counts: dict[str, int],
) -> None:
    """Domain-adaptive pretraining (DEMix, arXiv:2108.05036, section 5): an added domain's model
    goes on from the nearest partition's; a shared trunk stays as it is."""
    (domain,) = partitions.members[k]
    quiet = replace(config, overwrite=False)
    models = {j: train_partition(quiet, data, partitions, j) for j in founding(partitions)}
    models = {j: path for j, path in models.items() if path is not None}
    if not models:
        raise UserError(f"training.added_from: no partition is left that {domain} could start from")
    near, posterior = nearest_partition(config, data, domain, models)
    start = models[near]
    before = read_json(start / "record.json")
    arguments = training_arguments(config, partitions.share(k))
    arguments["learning_rate"] *= config.training.added_learning_rate
    job = Fit(
        folder=folder,
        label=f"{config.name} partition {k} [{domain}, from {near}]",
        seed=seed_of(config.seed, "train", partitions.identity(k)),
        arguments=arguments,
        record={
            "inputs": model_inputs(config, data, partitions, k),
            "partition": {
                "members": [domain],
                "present": sorted({*before["partition"]["present"], *counts}),
            },
            "seed": before["seed"],
            "started_from": {"partition": near, "posterior": posterior},
            "blocks": counts,
            "batch_rows": batch_rows(config, partitions.share(k)),
            "environment": environment(config),
        },
        sharded=config.training.shard,
    )
    watch(job, config, data, counts)

    def make() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(start)
        shared_trunk.freeze_shared(model, start)
        return _prepared(model, config)

    def finish(model: PreTrainedModel, path: Path) -> dict[str, Any]:
        _copy_tokenizer(data, path)
        own = shared_trunk.own_weights(start)
        parameters = MODELS[config.model.type].card(model, blocks)
        if own is not None:
            shared_trunk.split_checkpoint(path, own, start / shared_trunk.SHARED)
            parameters["own"] = before["parameters"]["own"]
        return {"parameters": parameters}

    fit(config, job, make, _in_order(config, data, partitions, k, job, blocks, counts), finish)


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
    # models that start from others wait for them
    folders = {k: path for k, path in folders.items() if not adapts(config, partitions, k)}
    if shared_trunk.is_shared(config):
        if all(path is None or is_complete(path) for path in folders.values()):
            return {}
        whole = shared_trunk.whole_folder(config, data, partitions)
        return {} if is_complete(whole) else {whole: (train_whole_apart, config)}
    return {
        folder: (train_apart, config, k)
        for k, folder in folders.items()
        if folder is not None and not is_complete(folder)
    }


def train_apart(config: Config, k: int) -> None:
    """train_partition in a process of its own."""
    set_up_process(config)
    train_partition(config, ProcessedData(config), make_partition_map(config), k)


def train_whole_apart(config: Config) -> None:
    """shared_trunk.train_whole in a process of its own."""
    set_up_process(config)
    shared_trunk.train_whole(config, ProcessedData(config), make_partition_map(config))


def train_at_once(configs: list[Config], missing: Callable[[Config], dict[Path, Call]]) -> None:
    """Make what the configs' stores lack, training.num_proc calls at a time.

    With one process, under `overwrite` or under torchrun nothing is done: each is made where it
    is needed.
    """
    calls: dict[Path, Call] = {}
    if world_size() > 1:
        return
    for config in configs:
        if config.training.num_proc > 1 and not config.overwrite:
            calls |= missing(config)
    if len(calls) > 1:
        count = max(config.training.num_proc for config in configs)
        with processes(min(count, len(calls))) as pool:
            run_all(list(calls.values()), pool, "train", "model")
