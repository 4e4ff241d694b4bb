"""Training one model of all partitions, a part of which is each partition's own.

Steps are balanced: every optimizer step holds as many rows of each partition, one partition after
another (DEMix, arXiv:2108.05036, section 3.2). Under torchrun the micro-batches of a step go to the
ranks in turn, so that a rank reads the same partitions in every step; a partition's own parameters
are synchronised among the ranks that read it, shared ones among all.

Shapes: B rows of a micro-batch, T tokens, K partitions with data, m rows of each per step.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tiered.fitting import OrderedBlocks, ResumableTrainer
from tiered.store import UserError


class BalancedBlocks(OrderedBlocks):
    """Blocks (rows, T) in steps of m rows of every partition (or domain).

    partition (rows,): whose each block is. Each partition's blocks come in seeded permutations of
    their own, whatever others have. An epoch is a pass over the largest, so that every block is
    trained on; one with few blocks begins them anew meanwhile.
    """

    def __init__(
        self,
        blocks: np.ndarray,
        partition: np.ndarray,
        rows_of_each: int,
        epochs: float,
        seed: int,
        separator: int | None = None,
    ) -> None:
        super().__init__(blocks, epochs, seed, separator)
        self.partition = partition
        self.names = np.unique(partition)
        largest = np.unique(partition, return_counts=True)[1].max()
        steps = max(1, math.ceil(epochs * largest / rows_of_each))
        columns = [self._column(k, steps * rows_of_each, seed) for k in self.names]
        stacked = np.stack([c.reshape(steps, rows_of_each) for c in columns], 1)  # (steps, K, m)
        self.order = stacked.ravel()

    def _column(self, k: int, count: int, seed: int) -> np.ndarray:
        rows = np.flatnonzero(self.partition == k)
        passes = -(-count // len(rows))
        order = [np.random.default_rng([seed, int(k), i]).permutation(rows) for i in range(passes)]
        return np.concatenate(order)[:count]


class LabelledBlocks(BalancedBlocks):
    """Balanced blocks whose items name their partition (`domain_ids`)."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        own = torch.tensor(int(self.partition[self.order[index]]))
        return super().__getitem__(index) | {"domain_ids": own}


def micro_batch_rows(rows_per_step: int, configured: int, present: int, parts: int, of: str) -> int:
    """B: rows of each of the `parts` micro-batches of a step of rows_per_step rows, of
    `configured` partitions (or domains: `of`), where `present` of them have data. UserError where
    they, or the micro-batches, cannot have as many rows each.
    """
    if rows_per_step % configured:
        raise UserError(
            f"training.per_device_train_batch_size: {rows_per_step} rows per optimizer step (with"
            f" gradient_accumulation_steps) are no multiple of the {configured} {of}"
        )
    rows = rows_per_step // configured * present
    if rows % parts:
        raise UserError(
            f"training.gradient_accumulation_steps: {rows} rows per optimizer step (of {present}"
            f" {of}) cannot be {parts} equal micro-batches"
        )
    return rows // parts


def holders(
    names: Iterable[int], rows_of_each: int, micro_rows: int, ranks: int
) -> dict[int, tuple[int, ...]]:
    """Which ranks read rows of each partition: micro-batches go to them in turn."""
    step = np.repeat(list(names), rows_of_each).reshape(-1, micro_rows)
    found: dict[int, set[int]] = {}
    for place, rows in enumerate(step):
        for k in np.unique(rows).tolist():
            found.setdefault(k, set()).add(place % ranks)
    return {k: tuple(sorted(found[k])) for k in sorted(found)}


class JointTrainer(ResumableTrainer):
    """Trainer of a model that names each partition's own parameters (`part_parameters(k)`)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.own: dict[int, list[torch.nn.Parameter]] = {}
        self.held_by: dict[int, tuple[int, ...]] = {}
        if distributed.is_available() and distributed.is_initialized():
            self._share_out()

    def _share_out(self) -> None:
        """Decide which ranks hold which partition; DDP leaves their own parameters alone."""
        data, ranks = self.train_dataset, distributed.get_world_size()
        micro = self.args.per_device_train_batch_size
        step = micro * ranks * self.args.gradient_accumulation_steps
        names = data.names.tolist()
        self.held_by = holders(names, step // len(names), micro, ranks)
        self.own = {k: list(self.model.part_parameters(k)) for k in self.held_by}
        # a group for every set of ranks; all ranks have to make all of them, in one order
        sets = sorted({h for h in self.held_by.values() if len(h) > 1})
        self.groups = {h: distributed.new_group(h) for h in sets}
        ids = {id(p) for parameters in self.own.values() for p in parameters}
        ignored = [name for name, p in self.model.named_parameters() if id(p) in ids]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, ignored)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One micro-batch; after the last of a step, partitions' own gradients are made one."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.held_by and self.accelerator.sync_gradients:
            self._average_own()
        return loss

    @torch.no_grad()
    def _average_own(self) -> None:
        """The mean over all ranks, as DDP's: ranks that do not hold a partition add nothing."""
        ranks, here = distributed.get_world_size(), distributed.get_rank()
        for k, parameters in self.own.items():
            if here not in self.held_by[k]:
                continue
            for parameter in parameters:
                if self.held_by[k] in self.groups:
                    distributed.all_reduce(parameter.grad, group=self.groups[self.held_by[k]])
                parameter.grad /= ranks

    def _clip_grad_norm(self, model) -> torch.Tensor:
        """Clip by the norm over all ranks' parameters, each counted once."""
        if not self.held_by:
            return super()._clip_grad_norm(model)
        here, ids = distributed.get_rank(), {id(p) for ps in self.own.values() for p in ps}
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        shared = sum(p.grad.float().square().sum() for p in parameters if id(p) not in ids)
        own = torch.zeros((), device=self.args.device)
        for k, group in self.held_by.items():
            if here == group[0]:  # all that hold it have the same
                own += sum(p.grad.float().square().sum() for p in self.own[k])
        distributed.all_reduce(own)
        norm = (shared + own).sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def unite_ranks(self) -> None:
        """Weights and moments of every partition, from the first rank that holds it to all."""
        super().unite_ranks()
        state = self.optimizer.optimizer.state if self.held_by else {}
        for k, parameters in self.own.items():
            source = self.held_by[k][0]
            for parameter in parameters:
                distributed.broadcast(parameter.data, source)
                entry = state.get(parameter) or _zero_state(parameter)
                for name in sorted(entry):
                    distributed.broadcast(entry[name], source)
                state[parameter] = entry


def _zero_state(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter that this rank has never stepped."""
    moments: Mapping[str, torch.Tensor] = {
        name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")
    }
    return {**moments, "step": torch.zeros(())}
