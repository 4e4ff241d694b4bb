"""Train one model on blocks: the Hugging Face Trainer with exact resume and a fixed data order.

The order of blocks is one permutation per epoch, a function of the seed; the seed is a function of
(config seed, stage, the partition's configured members). So no partition's model depends on any
other's data, on the order of training, or on how often the run was killed.
"""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tiered import branching, checkpoint
from tiered.config import CANARY, Config, plain
from tiered.data import ProcessedData, position_ids
from tiered.methods import MODELS, model_section
from tiered.partition import PartitionMap, make_partition_map
from tiered.record import (
    device_of,
    environment,
    is_main_process,
    peak_memory_bytes,
    set_up_process,
)
from tiered.store import (
    TIMINGS,
    TOKENIZER_RECORD,
    UserError,
    atomic_folder,
    digest,
    is_complete,
    read_json,
    seed_of,
    verify,
    write_json,
)
from tiered.workers import Call, in_worker, processes, run_all


class OrderedBlocks(torch.utils.data.Dataset):
    """Blocks (rows, T) in training order: one seeded permutation per pass over them."""

    def __init__(self, blocks: np.ndarray, epochs: float, seed: int, separator: int | None) -> None:
        total = max(1, round(epochs * len(blocks)))
        passes = math.ceil(total / len(blocks))
        order = [np.random.default_rng([seed, i]).permutation(len(blocks)) for i in range(passes)]
        self.order = np.concatenate(order)[:total]
        self.blocks = blocks
        self.separator = separator

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = np.asarray(self.blocks[self.order[index]], dtype=np.int64)
        labels = ids.copy()
        item = {"input_ids": torch.from_numpy(ids)}
        if self.separator is not None:
            positions = position_ids(ids[None], self.separator)[0]
            # the first token of a document has no context of its own: it is not predicted.
            labels[positions == 0] = -100
            item["position_ids"] = torch.from_numpy(positions.astype(np.int64))
        return {**item, "labels": torch.from_numpy(labels)}


class ProgressBar(TrainerCallback):
    """One bar per model, in optimizer steps, on the main process and on a terminal only."""

    def __init__(self, label: str) -> None:
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.label,
            unit="step",
            disable=None if state.is_world_process_zero and not in_worker() else True,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class LossGuard(TrainerCallback):
    """Logs the last step too; raises UserError where the loss is no longer a number."""

    def __init__(self, label: str) -> None:
        self.label = label

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step == state.max_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise UserError(
                f"{self.label}: the training loss is {loss} at step {state.global_step}; nothing"
                " was published (lower the learning rate?)"
            )


class LossRestorer(TrainerCallback):
    """After a resume, put back the loss summed since the last log line: logs stay identical."""

    def __init__(self, values: dict[str, float]) -> None:
        self.values = values
        self.trainer: ResumableTrainer | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer._tr_loss += self.values["running"]
        trainer._total_loss_scalar = self.values["total"]
        trainer._globalstep_last_logged = int(self.values["last_logged_step"])


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints are atomic, hashed and free of pickle."""

    checkpoints: Path
    seconds_before: float = 0.0

    def loss_accumulator(self) -> dict[str, float]:
        """The running loss that the Trainer itself forgets in a checkpoint."""
        return {
            "running": self._tr_loss.item(),
            "total": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
        }

    def _save_checkpoint(self, model, trial) -> None:
        average_statistics(self.model)
        if not self.args.should_save:
            return
        folder = self.checkpoints / f"checkpoint-{self.state.global_step:08d}"
        seconds = self.seconds_before + time.perf_counter() - self.begin
        checkpoint.save(folder, self, seconds)
        checkpoint.prune(self.checkpoints)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        checkpoint.load_weights(Path(resume_from_checkpoint), model or self.model)

    def _load_optimizer_and_scheduler(self, checkpoint_folder) -> None:
        if checkpoint_folder is not None:
            checkpoint.load_optimizer(Path(checkpoint_folder), self)

    def _load_rng_state(self, checkpoint_folder) -> None:
        if checkpoint_folder is not None:
            checkpoint.load_random_state(Path(checkpoint_folder))


@torch.no_grad()
def average_statistics(model: torch.nn.Module) -> None:
    """Average running statistics over ranks: each has seen its own rows; weights are equal."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for name, buffer in model.named_buffers():
        if name in model.state_dict() and buffer.is_floating_point():
            torch.distributed.all_reduce(buffer)
            buffer /= torch.distributed.get_world_size()


@dataclass
class Fit:
    """One training job: where it is kept, from which seed, with which arguments."""

    folder: Path
    label: str
    seed: int
    arguments: dict[str, Any]
    epochs: float
    separator: int | None = None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """Resume state; removed when the model is published."""
        return self.folder.parent / ".checkpoints" / self.folder.name


def fit(
    config: Config,
    job: Fit,
    make_model: Callable[[], PreTrainedModel],
    blocks: np.ndarray,
    finish: Callable[[PreTrainedModel, Path], dict[str, Any]],
) -> None:
    """Train a model from scratch (or from its newest checkpoint) and publish it in job.folder.

    `finish` writes what else belongs into the folder and returns entries of its record.json.
    """
    torch.manual_seed(job.seed)
    model = make_model()
    trainer = _make_trainer(config, job, model, blocks)
    resume = checkpoint.newest(job.checkpoints)
    if resume is not None:
        print(f"{job.label}: resuming from step {int(resume.name.split('-')[1])}")
        trainer.seconds_before = read_json(resume / TIMINGS)["seconds"]
        restorer = LossRestorer(read_json(resume / "loss_accumulator.json"))
        restorer.trainer = trainer
        trainer.add_callback(restorer)
    trainer.begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = trainer.seconds_before + time.perf_counter() - trainer.begin
    _finish_trackers(config)
    average_statistics(trainer.model)
    if trainer.args.should_save:
        _publish(job, trainer, blocks, finish, seconds)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # no rank goes on before the model stands


def _publish(
    job: Fit,
    trainer: ResumableTrainer,
    blocks: np.ndarray,
    finish: Callable[[PreTrainedModel, Path], dict[str, Any]],
    seconds: float,
) -> None:
    """Write the trained model, its log and its record to job.folder; drop the checkpoints."""
    model = trainer.model.to("cpu").eval()
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise UserError(f"{job.label}: {name} is not finite after training; nothing published")
    with atomic_folder(job.folder) as path:
        model.save_pretrained(path)
        losses = [e for e in trainer.state.log_history if "loss" in e]
        (path / "metrics.jsonl").write_text(
            "".join(json.dumps(e, sort_keys=True) + "\n" for e in losses)
        )
        record = {
            **job.record,
            "optimizer_steps": trainer.state.global_step,
            "tokens": int(len(trainer.train_dataset) * blocks.shape[1]),
            "final_training_loss_nats": losses[-1]["loss"] if losses else None,
            **finish(model, path),
        }
        write_json(path / "record.json", record)
        timings = {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
        write_json(path / TIMINGS, timings)
    shutil.rmtree(job.checkpoints, ignore_errors=True)


def _make_trainer(
    config: Config, job: Fit, model: PreTrainedModel, blocks: np.ndarray
) -> ResumableTrainer:
    save_steps, cuda = config.training.save_steps, device_of(config).type == "cuda"
    trackers, callbacks = _trackers(config, job)
    arguments = {
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 500,
        "report_to": trackers or "none",
        "ddp_broadcast_buffers": False,
        "dataloader_pin_memory": cuda,
        # the one place that chooses a precision: float32 on a CPU, whose bfloat16 is far slower;
        # router and loss stay in float32 under autocast
        "bf16": cuda,
        "logging_nan_inf_filter": False,  # it would log a diverged model's loss as 0
        **job.arguments,
    }
    try:
        training_arguments = TrainingArguments(
            output_dir=str(job.checkpoints),
            run_name=f"{config.name}-{job.label}",
            seed=job.seed,
            use_cpu=not cuda,
            num_train_epochs=1,  # OrderedBlocks spells the passes out
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            disable_tqdm=True,
            **arguments,
        )
        if training_arguments.fp16:
            raise ValueError("fp16: not supported (its loss scaler is not resumed); use bf16")
        # one process drives one GPU (more of them: torchrun); DataParallel would multiply the batch
        training_arguments._n_gpu = min(1, training_arguments.n_gpu)
        trainer = ResumableTrainer(
            model=model,
            args=training_arguments,
            train_dataset=OrderedBlocks(blocks, job.epochs, job.seed, job.separator),
            callbacks=[ProgressBar(job.label), LossGuard(job.label), *callbacks],
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"training: {text[:300]}") from None
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.checkpoints = job.checkpoints
    return trainer


def _trackers(config: Config, job: Fit) -> tuple[list[str], list[TrainerCallback]]:
    """Trackers that the Trainer sets up by name, and those made here: one run per model.

    wandb without a key records offline (`wandb sync` later) instead of asking. TensorBoard's logs
    stand in the run folder: the Trainer would write them beside the checkpoints, which go.
    """
    names, callbacks = list(config.training.report_to), []
    if "wandb" in names:
        os.environ.setdefault("WANDB_PROJECT", "tiered-routing")
        if not os.environ.get("WANDB_API_KEY"):
            os.environ.setdefault("WANDB_MODE", "offline")
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter  # a second to import
        from transformers.integrations import TensorBoardCallback

        names.remove("tensorboard")
        folder = config.run_dir / "tensorboard" / "-".join(re.findall(r"[\w.]+", job.label))
        if is_main_process():
            callbacks.append(TensorBoardCallback(SummaryWriter(str(folder))))
    return names, callbacks


def _finish_trackers(config: Config) -> None:
    if "wandb" in config.training.report_to:
        import wandb  # the next model of this process gets a run of its own

        wandb.finish()


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
        epochs=config.training.num_train_epochs,
        separator=data.separator_id if config.data.separate_documents else None,
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

    fit(config, job, make, blocks, finish)
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
