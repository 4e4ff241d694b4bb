"""One training job: the Hugging Face Trainer with exact resume, atomic and hashed checkpoints.

What is trained in which order is the caller's: a dataset in training order, a seed, a folder.
"""

import contextlib
import copy
import functools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations import WandbCallback

from tiered import checkpoint, stopping
from tiered.config import Config, own_micro_batches
from tiered.data import position_ids
from tiered.locks import locked
from tiered.record import (
    device_of,
    is_main_process,
    peak_memory_bytes,
    wait_for_ranks,
    world_size,
)
from tiered.store import (
    OBSERVED,
    TIMINGS,
    UserError,
    atomic_folder,
    is_complete,
    read_json,
    write_json,
)
from tiered.workers import in_worker

EMPTY = -1  # place of a block in the order of training that stands for none


class OrderedBlocks(torch.utils.data.Dataset):
    """Blocks (rows, T) in training order: one seeded permutation per pass over them."""

    def __init__(
        self, blocks: np.ndarray, epochs: float, seed: int, separator: int | None = None
    ) -> None:
        total = max(1, round(epochs * len(blocks)))
        passes = math.ceil(total / len(blocks))
        order = [np.random.default_rng([seed, i]).permutation(len(blocks)) for i in range(passes)]
        self.order = np.concatenate(order)[:total]
        self.blocks = blocks
        self.separator = separator

    def for_ranks(self, rows: int, ranks: int, drop_last: bool = False) -> "OrderedBlocks":
        """These blocks for micro-batches of `rows`: with empty blocks behind them, so that all
        ranks have as many. Without these accelerate has ranks train on the first blocks again.
        drop_last: without the blocks of a last micro-batch of fewer rows."""
        blocks = copy.copy(self)
        if drop_last:
            blocks.order = self.order[: len(self.order) // rows * rows]
        if ranks > 1:
            empty = -len(blocks.order) % (rows * ranks)
            blocks.order = np.concatenate([blocks.order, np.full(empty, EMPTY)])
        return blocks

    @property
    def tokens(self) -> int:
        """Tokens to train on; those of empty blocks are not."""
        return int((self.order != EMPTY).sum()) * self.blocks.shape[1]

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
        if self.order[index] == EMPTY:  # which has the last block's tokens, and predicts none
            labels[:] = -100
            item["empty"] = torch.tensor([True])
        return {**item, "labels": torch.from_numpy(labels)}


def without_empty(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A micro-batch of the rows that are not empty; if all are, of two tokens: the least that a
    model has a loss of."""
    batch = default_data_collator([row for row in rows if "empty" not in row] or rows[:1])
    return {n: t[:, :2] for n, t in batch.items()} if "empty" in batch else batch


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


class AfterStep(TrainerCallback):
    """Lets a model that has something to do after every optimizer step do it, before the step is
    logged or saved: loss-free balancing moves its biases."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        getattr(model, "after_optimizer_step", lambda: None)()


class Observer(TrainerCallback):
    """Notes what job.observe says of the model at the start and every so many steps; in the
    Trainer's log, which a resume restores."""

    def __init__(self, observe: Callable[[PreTrainedModel], dict[str, Any]], steps: int) -> None:
        self.observe, self.steps = observe, steps

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self._note(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            self._note(state, model)

    def _note(self, state, model) -> None:
        if state.is_world_process_zero:
            noted = {"step": state.global_step, "observed": self.observe(model)}
            state.log_history.append(noted)


class Stopper(TrainerCallback):
    """Ends the training after the step in which this process, or any rank, was asked to end; its
    state is saved."""

    stopped = False

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if _any_rank(stopping.asked(), args.device):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True


def _any_rank(said: bool, device: torch.device) -> bool:
    """Whether something holds on any rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return said
    flag = torch.tensor(float(said), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


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


class Wandb(WandbCallback):
    """wandb's record of a training, which goes on where wandb's own process has ended: Slurm's
    SIGTERM to a job goes to that one, too."""

    lost = False

    def on_log(self, *arguments, **more):
        self._tell(super().on_log, arguments, more)

    def on_save(self, *arguments, **more):
        self._tell(super().on_save, arguments, more)

    def on_train_end(self, *arguments, **more):
        self._tell(super().on_train_end, arguments, more)
        if not self.lost:
            self._tell(self._wandb.finish, (), {})  # the next model gets a run of its own

    def _tell(self, event: Callable, arguments: tuple, more: dict[str, Any]) -> None:
        if self.lost:
            return
        try:
            event(*arguments, **more)
        except ConnectionError as error:
            self.lost = True
            print(f"wandb has ended ({error}); the training goes on without it")


class LossRestorer(TrainerCallback):
    """After a resume, put back the loss summed since the last log line: logs stay identical."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.trainer: ResumableTrainer | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        running = self.values["running"]
        if len(running) == args.world_size:
            trainer._tr_loss += running[args.process_index]
        else:  # what is logged is the mean over the ranks
            trainer._tr_loss += sum(running) / len(running)
        trainer._total_loss_scalar = self.values["total"]
        trainer._globalstep_last_logged = int(self.values["last_logged_step"])


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints are atomic, hashed and free of pickle."""

    checkpoints: Path
    seconds_before: float = 0.0

    def loss_accumulator(self) -> dict[str, Any]:
        """The running loss, each rank's, that the Trainer itself forgets in a checkpoint; all ranks
        have to call it."""
        return {
            "running": checkpoint.of_ranks(self._tr_loss.detach()).tolist(),
            "total": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
        }

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        loader = super().get_train_dataloader()
        own = getattr(loader, "base_dataloader", loader)  # what accelerate has wrapped
        own.worker_init_fn = functools.partial(stopping.outlast, own.worker_init_fn)
        return loader

    def compute_loss(self, model, inputs, *arguments, **more) -> torch.Tensor:
        """Of an empty micro-batch, 0 with gradients 0: the other ranks wait for its rank's."""
        if inputs.pop("empty", None) is None:
            return super().compute_loss(model, inputs, *arguments, **more)
        model.eval()  # which counts no loads, keeps running statistics and drops out nothing
        # a mean over its own tokens: the step's count may be of this rank alone, then 0
        loss = super().compute_loss(model, {**inputs, "labels": inputs["input_ids"]})
        model.train()
        return 0 * loss

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Of a model in shards (FSDP2), gradients are summed over ranks after every micro-batch:
        they stay in shards, which is what it is split for. The Trainer's own would keep them whole
        until a step's last, and asks for a DistributedConfig that such a model does not have."""
        yield

    def unite_ranks(self) -> None:
        """Give every rank what the others alone know; before anything is saved."""
        average_statistics(self.model)

    def _save_checkpoint(self, model, trial) -> None:
        own = statistics_of_ranks(self.model)
        self.unite_ranks()
        folder = self.checkpoints / f"checkpoint-{self.state.global_step:08d}"
        seconds = self.seconds_before + time.perf_counter() - self.begin
        checkpoint.save(folder, self, seconds, own)
        _take_statistics(self.model, own)  # as if nothing had been saved
        if self.args.should_save:
            checkpoint.prune(self.checkpoints)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        folder, model = Path(resume_from_checkpoint), model or self.model
        checkpoint.load_weights(folder, model)
        _take_statistics(model, checkpoint.statistics(folder))

    def _load_optimizer_and_scheduler(self, checkpoint_folder) -> None:
        if checkpoint_folder is not None:
            checkpoint.load_optimizer(Path(checkpoint_folder), self)

    def _load_rng_state(self, checkpoint_folder) -> None:
        if checkpoint_folder is not None:
            rank, ranks = self.args.process_index, self.args.world_size
            checkpoint.load_random_state(Path(checkpoint_folder), rank, ranks)


def _statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Running statistics: what a rank learns of its own rows alone. Weights are equal."""
    kept, buffers = model.state_dict(), model.named_buffers()
    return {name: b for name, b in buffers if name in kept and b.is_floating_point()}


def statistics_of_ranks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Running statistics by name, (ranks, ...); all ranks have to call it. Without ranks: none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    return {name: checkpoint.of_ranks(own) for name, own in _statistics(model).items()}


def _take_statistics(model: torch.nn.Module, of_ranks: dict[str, torch.Tensor]) -> None:
    """Give a model this rank's own running statistics, if they are of as many ranks."""
    buffers = _statistics(model) if of_ranks else {}
    for name, parts in of_ranks.items():
        if len(parts) == world_size():
            buffers[name].copy_(parts[torch.distributed.get_rank()])


@torch.no_grad()
def average_statistics(model: torch.nn.Module) -> None:
    """Average running statistics over ranks."""
    buffers = _statistics(model)
    for name, parts in statistics_of_ranks(model).items():
        buffers[name].copy_(parts.mean(0))


def shard(model: PreTrainedModel) -> None:
    """Split weights, gradients and what the optimizer keeps of them over all ranks, layer by layer
    (FSDP2: torch's fully_shard)."""
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (world_size(),))
    # a layer's weights are whole while it computes, and split again behind it
    if getattr(model, "layers_stand_alone", True):
        for layer in list(model.modules()):
            if type(layer).__name__ in (model._no_split_modules or ()):
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@dataclass
class Fit:
    """One training job: where it is kept, from which seed, with which arguments; earlier_seconds:
    what the training that it goes on from took; observe, observe_steps: what is noted of the model
    (JSON-ready, changing nothing) at the start and every so many steps (0: never); sharded: whether
    ranks hold a share of the model each (FSDP2) instead of a copy (DDP)."""

    folder: Path
    label: str
    seed: int
    arguments: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    earlier_seconds: float = 0.0
    observe: Callable[[PreTrainedModel], dict[str, Any]] | None = None
    observe_steps: int = 0
    sharded: bool = False

    @property
    def checkpoints(self) -> Path:
        """Resume state; removed when the model is published."""
        return _checkpoints(self.folder)


def _checkpoints(folder: Path) -> Path:
    return folder.parent / ".checkpoints" / folder.name


def _lock(folder: Path) -> Path:
    return folder.parent / ".locks" / f"{folder.name}.lock"


def is_trained(folder: Path) -> bool:
    """Whether a model is published in a folder of the store.

    The resume state of a trainer that was killed just then is removed, unless another process is
    training the model anew or the store may only be read. Not to be asked under `overwrite`: there
    the state may be that of the new training.
    """
    if not is_complete(folder):
        return False
    left = _checkpoints(folder)
    if is_main_process() and left.is_dir():
        with (
            contextlib.suppress(UserError, OSError),
            locked(_lock(folder), f"what is left of training {folder.name}", wait=False),
        ):
            shutil.rmtree(left)
    return True


def fit(
    config: Config,
    job: Fit,
    make_model: Callable[[], PreTrainedModel],
    blocks: OrderedBlocks,
    finish: Callable[[PreTrainedModel, Path], dict[str, Any]],
    trainer_class: type[ResumableTrainer] | None = None,
) -> None:
    """Train a model from scratch (or from its newest checkpoint) and publish it in job.folder.

    `finish` writes what else belongs into the folder and returns entries of its record.json. Of
    processes that want the same model one trains it and the others wait. A process that is asked to
    end (tiered/stopping.py) saves a checkpoint first.
    """
    with _only_trainer(config, job) as made, stopping.patiently_ended():
        if not made:
            _train(config, job, make_model, blocks, finish, trainer_class or ResumableTrainer)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # no rank goes on before the model stands


@contextlib.contextmanager
def _only_trainer(config: Config, job: Fit) -> Iterator[bool]:
    """Hold the lock of a job's folder; yields whether another process has just made the folder."""
    with contextlib.ExitStack() as stack:
        made = [False]
        if is_main_process():
            waited = stack.enter_context(locked(_lock(job.folder), job.label))
            made = [waited and is_complete(job.folder)]
            if made[0]:  # by one that was killed then, perhaps
                shutil.rmtree(job.checkpoints, ignore_errors=True)
        wait_for_ranks(config)
        if world_size() > 1:
            torch.distributed.broadcast_object_list(made, device=device_of(config))
        yield made[0]


def _train(
    config: Config,
    job: Fit,
    make_model: Callable[[], PreTrainedModel],
    blocks: OrderedBlocks,
    finish: Callable[[PreTrainedModel, Path], dict[str, Any]],
    trainer_class: type[ResumableTrainer],
) -> None:
    torch.manual_seed(job.seed)
    model = make_model()
    trainer = _make_trainer(config, job, model, blocks, trainer_class)
    if job.sharded and world_size() > 1:
        shard(trainer.model)
        # so the Trainer's own for models that look after their placement and their gradients
        trainer.is_distributed_loading_by_transformers = True
    resume = checkpoint.newest(job.checkpoints)
    if resume is not None:
        if is_main_process():
            print(f"{job.label}: resuming from step {int(resume.name.split('-')[1])}")
        trainer.seconds_before = read_json(resume / TIMINGS)["seconds"]
        restorer = LossRestorer(read_json(resume / "loss_accumulator.json"))
        restorer.trainer = trainer
        trainer.add_callback(restorer)
    else:
        checkpoint.seed_rank(job.seed, trainer.args.process_index)
    stopper = Stopper()
    trainer.add_callback(stopper)
    trainer.begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = trainer.seconds_before + time.perf_counter() - trainer.begin
    if stopper.stopped:
        if is_main_process():
            print(f"{job.label}: asked to end; state saved at step {trainer.state.global_step}")
        raise SystemExit(stopping.ENDED)
    trainer.unite_ranks()
    trained = trainer.model
    if trainer.is_distributed_loading_by_transformers:
        weights, trained = checkpoint.whole_weights(trainer.model), make_model()
        checkpoint.set_weights(trained, weights, job.label)
    if trainer.args.should_save:
        _publish(job, trainer, trained, finish, seconds)


def _publish(
    job: Fit,
    trainer: ResumableTrainer,
    model: PreTrainedModel,
    finish: Callable[[PreTrainedModel, Path], dict[str, Any]],
    seconds: float,
) -> None:
    """Write the trained model, its log and its record to job.folder; drop the checkpoints."""
    model = model.to("cpu").eval()
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise UserError(f"{job.label}: {name} is not finite after training; nothing published")
    with atomic_folder(job.folder) as path:
        model.save_pretrained(path)
        losses = [e for e in trainer.state.log_history if "loss" in e]
        (path / "metrics.jsonl").write_text(
            "".join(json.dumps(e, sort_keys=True) + "\n" for e in losses)
        )
        observed = [e for e in trainer.state.log_history if "observed" in e]
        if observed:
            lines = (
                json.dumps({"step": e["step"], **e["observed"]}, sort_keys=True) + "\n"
                for e in observed
            )
            (path / OBSERVED).write_text("".join(lines))
        record = {
            **job.record,
            "optimizer_steps": trainer.state.global_step,
            "tokens": trainer.train_dataset.tokens,
            "final_training_loss_nats": losses[-1]["loss"] if losses else None,
            **finish(model, path),
        }
        write_json(path / "record.json", record)
        seconds += job.earlier_seconds
        timings = {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}
        write_json(path / TIMINGS, timings)
    shutil.rmtree(job.checkpoints, ignore_errors=True)


def _make_trainer(
    config: Config,
    job: Fit,
    model: PreTrainedModel,
    blocks: OrderedBlocks,
    trainer_class: type[ResumableTrainer],
) -> ResumableTrainer:
    save_steps, cuda = config.training.save_steps, device_of(config).type == "cuda"
    callbacks = [ProgressBar(job.label), LossGuard(job.label)]
    if job.observe is not None and job.observe_steps:
        callbacks.append(Observer(job.observe, job.observe_steps))
    arguments = {
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 500,
        "ddp_broadcast_buffers": False,
        "dataloader_pin_memory": cuda,
        # the one place that chooses a precision: float32 on a CPU, whose bfloat16 is far slower;
        # router and loss stay in float32 under autocast
        "bf16": cuda,
        "logging_nan_inf_filter": False,  # it would log a diverged model's loss as 0
        **job.arguments,
    }
    count = arguments.get("gradient_accumulation_steps", 1)
    arguments["gradient_accumulation_steps"] = own_micro_batches(count, world_size())
    try:
        others, trackers = _trackers(config, job)
        training_arguments = TrainingArguments(
            output_dir=str(job.checkpoints),
            run_name=f"{config.name}-{job.label}",
            seed=job.seed,
            use_cpu=not cuda,
            num_train_epochs=1,  # OrderedBlocks spells the passes out
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=others or "none",
            **arguments,
        )
        if training_arguments.fp16:
            raise ValueError("fp16: not supported (its loss scaler is not resumed); use bf16")
        # one process drives one GPU (more of them: torchrun); DataParallel would multiply the batch
        training_arguments._n_gpu = min(1, training_arguments.n_gpu)
        rows = training_arguments.per_device_train_batch_size
        trainer = trainer_class(
            model=model,
            args=training_arguments,
            data_collator=without_empty,
            train_dataset=blocks.for_ranks(
                rows, world_size(), training_arguments.dataloader_drop_last
            ),
            callbacks=[*trackers, AfterStep(), *callbacks],
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
        names.remove("wandb")
        callbacks.append(Wandb())
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter  # a second to import
        from transformers.integrations import TensorBoardCallback

        names.remove("tensorboard")
        folder = config.run_dir / "tensorboard" / "-".join(re.findall(r"[\w.]+", job.label))
        if is_main_process():
            callbacks.append(TensorBoardCallback(SummaryWriter(str(folder))))
    return names, callbacks
