"""Gradient methods: approximate unlearning of the models whose partitions hold the domain.

Every method edits a partition's model with that partition's own blocks: the forget set's, and
(retain) those of everything else that the partition was trained on. Models stay in evaluation
mode: the router's BatchNorm statistics must not move. None removes weights, none is exact.

Shapes: B blocks, T tokens per block, S = T - 1 predicted positions.
"""

import copy
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tiered.blocks import partition_blocks
from tiered.branching import used
from tiered.data import Rows
from tiered.metrics import NOT_APPLICABLE
from tiered.router import load_models
from tiered.scoring import score_prefixes
from tiered.statistics import auc
from tiered.store import content_hash, seed_of
from tiered.unlearning.deletion import models_without
from tiered.unlearning.systems import Context, Forget, NotApplicable, Outcome, edited

# What decides a model that a gradient method edited: scoring and statistics decide when it stops.
GRADIENT_CODE = tuple(f"tiered/{n}.py" for n in ("scoring", "statistics", "unlearning/gradient"))


@dataclass
class Task:
    """One partition's model to be edited: blocks (rows, T), and gold's model of the partition."""

    context: Context
    forget_set: Forget
    k: int
    forget: np.ndarray
    retain: np.ndarray
    gold: Path | None

    @functools.cached_property
    def stop(self) -> "EarlyStop":
        """What the early stop looks at; only an edit that is made has to score gold for it."""
        gold = None if self.gold is None else load_models({self.k: self.gold})[self.k]
        return early_stop(self.context, self.forget_set, self.k, gold)

    @property
    def section(self) -> Any:
        """The unlearn section of the config."""
        return self.context.config.unlearn

    def generator(self, name: str) -> np.random.Generator:
        """Numbers that depend on the seed, the method, the forget set and the partition alone."""
        identity = self.context.partitions.identity(self.k)
        forget = self.forget_set.identity()
        return np.random.default_rng(
            seed_of(self.context.config.seed, "unlearn", name, forget, identity)
        )


# --- when to stop ------------------------------------------------------------------------------


@dataclass
class EarlyStop:
    """Stop at AUC <= gold's, or when retained members lose more accuracy than allowed.

    members, others, retain: token rows (R, T) of the forget set, of its validation split (scored
    by nothing else) and of what is retained (may be empty); gold_auc: LOSS AUC of the gold model of
    the partition, 0.5 where gold has none.
    """

    members: np.ndarray
    others: np.ndarray
    retain: np.ndarray
    gold_auc: float
    max_loss: float
    batch_rows: int
    first_accuracy: float | None = None

    def reason(self, model: torch.nn.Module) -> str | None:
        """Why to stop now, or None."""
        if loss_auc(model, self.members, self.others, self.batch_rows) <= self.gold_auc:
            return "AUC at gold's"
        if not len(self.retain):
            return None
        hits = _scores(model, self.retain, self.batch_rows)["correct"]
        accuracy = hits.float().mean().item()
        if self.first_accuracy is None:
            self.first_accuracy = accuracy
        lost = self.first_accuracy - accuracy
        return "retain accuracy lost" if lost > self.max_loss else None


def _scores(model: torch.nn.Module, rows: np.ndarray, batch_rows: int) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(np.ascontiguousarray(rows))
    return score_prefixes(model, ids, ids.shape[1] - 1, batch_rows)


def loss_auc(
    model: torch.nn.Module, members: np.ndarray, others: np.ndarray, batch_rows: int
) -> float:
    """LOSS AUC of rows (R, T) under one model."""
    losses = [_scores(model, r, batch_rows)["nll"].double().mean(1) for r in (members, others)]
    return auc(losses[0].numpy(), losses[1].numpy())


def early_stop(context: Context, forget: Forget, k: int, gold: torch.nn.Module | None) -> EarlyStop:
    """What the early stop of partition k looks at: rows that its model was trained on, and
    validation rows like them; nothing of it is scored later but members."""
    data, section, partitions = context.data, context.config.unlearn, context.partitions
    count, batch_rows = section.check_rows, context.config.eval.batch_rows

    def own(rows: Rows, most: int) -> np.ndarray:
        here = partitions.assign(rows.domain, list(rows.document_ids)) == k
        return rows.only(here, most).input_ids

    members = own(context.members(forget, 0), count)
    others = data.rows(forget.domain, "validation")
    # a cluster's text is its own; at random, a document of one partition is as good as another's
    clustered = partitions.clusters is not None
    others = own(others, count) if clustered else others.input_ids[:count]
    near, _ = context.neighbours(forget)
    near = [d for d in near if d in partitions.members[k]]
    share = -(-count // max(1, len(near)))
    parts = [own(context.retained_members(forget, d, 0), share) for d in near]
    retain = np.concatenate(parts) if parts else members[:0]
    if not len(members):
        raise NotApplicable(f"{NOT_APPLICABLE}: a partition has no member row to stop by")
    if not len(others):
        raise NotApplicable(f"{NOT_APPLICABLE}: {forget.domain} has no validation row to stop by")
    gold_auc = 0.5 if gold is None else loss_auc(gold, members, others, batch_rows)
    return EarlyStop(members, others, retain, gold_auc, section.max_retain_loss, batch_rows)


# --- losses ---------------------------------------------------------------------------------------


def sequence_log_probs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """log p(x) of blocks (B, T): the sum over tokens 1..T-1, (B,) float32."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    # rows of the vocabulary one after another: along a strided one a CPU takes four times as long
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return -nll.view(len(ids), -1).sum(1)


def nll(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """L: mean nats per token of blocks (B, T)."""
    return -sequence_log_probs(model, ids).mean() / (ids.shape[1] - 1)


def npo_loss(log_probs: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """(2 / beta) E log(1 + (p / p_o)^beta) of sequence log-probabilities (B,)
    (NPO, arXiv:2404.05868, eq. 3)."""
    return 2 / beta * F.softplus(beta * (log_probs - reference)).mean()


def simnpo_loss(log_probs: torch.Tensor, length: int, beta: float, gamma: float) -> torch.Tensor:
    """-(2 / beta) E log sigma(-(beta / |x|) log p(x) - gamma) of sequence log-probabilities (B,)
    (SimNPO, arXiv:2410.07163)."""
    return -2 / beta * F.logsigmoid(-beta / length * log_probs - gamma).mean()


# (model, forget blocks (B, T), retain blocks (B', T), share of all steps that are done) -> loss
Loss = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, float], torch.Tensor]


# --- the loop --------------------------------------------------------------------------------


def cycled(blocks: np.ndarray, rows: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of blocks for ever, one permutation per pass; empty batches of no blocks."""
    queue = np.zeros(0, dtype=np.int64)
    while True:
        while len(blocks) and len(queue) < rows:
            queue = np.concatenate([queue, generator.permutation(len(blocks))])
        yield np.asarray(blocks[queue[:rows]], dtype=np.int64)
        queue = queue[rows:]


def descend(
    model: torch.nn.Module, task: Task, name: str, loss_of: Loss, uses: str, stops: bool = True
) -> dict[str, Any]:
    """AdamW on a loss until the early stop or max_steps; uses: which blocks, `forget`, `retain`
    or both. Returns entries of the record: steps, tokens, why it stopped."""
    section, generator = task.section, task.generator(name)
    rate = section.learning_rates.get(name, section.learning_rate)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    device = parameters[0].device
    model.eval()
    sides = [
        cycled(blocks if side in uses else blocks[:0], section.batch_rows, generator)
        for side, blocks in (("forget", task.forget), ("retain", task.retain))
    ]
    tokens, step, reason = 0, 0, task.stop.reason(model) if stops else None
    while reason is None and step < section.max_steps:
        batch = [torch.from_numpy(next(side)).to(device) for side in sides]
        loss = loss_of(model, *batch, step / section.max_steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        tokens += sum(ids.numel() for ids in batch)
        step += 1
        if stops and step % section.check_steps == 0:
            reason = task.stop.reason(model)
    return {"steps": step, "tokens": tokens, "stopped": reason or "all steps done"}


# --- methods ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """edit: changes a model in place and returns entries of its record; settings: the fields of
    `unlearn` that decide its result besides those of every method; needs_retain: it is nothing
    without retain blocks; code: files that decide its result besides GRADIENT_CODE."""

    edit: Callable[[torch.nn.Module, Task], dict[str, Any]]
    settings: tuple[str, ...] = ()
    needs_retain: bool = False
    code: tuple[str, ...] = ()


def fine_tune(model: torch.nn.Module, task: Task) -> dict[str, Any]:
    """Train on with what is retained, and hope that the rest is forgotten."""
    return descend(model, task, "fine-tune", lambda m, _, r, __: nll(m, r), "retain")


def l1_sparse(model: torch.nn.Module, task: Task) -> dict[str, Any]:
    """Fine-tune on what is retained with an L1 norm whose weight falls to 0 (arXiv:2304.04934)."""
    weight = task.section.l1_weight

    def loss(m: torch.nn.Module, _: Any, retain: torch.Tensor, done: float) -> torch.Tensor:
        norm = torch.stack([p.abs().sum() for p in m.parameters() if p.requires_grad]).sum()
        return nll(m, retain) + weight * (1 - done) * norm

    return descend(model, task, "l1-sparse", loss, "retain")


def gradient_ascent(model: torch.nn.Module, task: Task) -> dict[str, Any]:
    """GA: minimise E log p on the forget set."""
    return descend(model, task, "GA", lambda m, f, _, __: -nll(m, f), "forget")


def gradient_difference(model: torch.nn.Module, task: Task) -> dict[str, Any]:
    """GradDiff: -L(forget) + alpha L(retain)."""
    weight = task.section.retain_weight
    loss: Loss = lambda m, f, r, _: -nll(m, f) + weight * nll(m, r)  # noqa: E731
    return descend(model, task, "GradDiff", loss, "forget retain")


def npo(model: torch.nn.Module, task: Task) -> dict[str, Any]:
    """Negative preference optimisation against the original model, with a retain loss."""
    original = copy.deepcopy(model).eval()
    section = task.section

    def loss(m: torch.nn.Module, forget: torch.Tensor, retain: torch.Tensor, _: float):
        with torch.no_grad():
            reference = sequence_log_probs(original, forget)
        own = npo_loss(sequence_log_probs(m, forget), reference, section.npo_beta)
        return own + retain_loss(m, retain, section.retain_weight)

    return descend(model, task, "NPO", loss, "forget retain")


def simnpo(model: torch.nn.Module, task: Task) -> dict[str, Any]:
    """NPO without a reference model, normalised by length, with a retain loss."""
    section = task.section

    def loss(m: torch.nn.Module, forget: torch.Tensor, retain: torch.Tensor, _: float):
        log_probs, length = sequence_log_probs(m, forget), forget.shape[1] - 1
        own = simnpo_loss(log_probs, length, section.simnpo_beta, section.simnpo_gamma)
        return own + retain_loss(m, retain, section.retain_weight)

    return descend(model, task, "SimNPO", loss, "forget retain")


def retain_loss(
    model: torch.nn.Module, retain: torch.Tensor, weight: float
) -> torch.Tensor | float:
    """weight * L of retain blocks (B, T); 0 where there are none."""
    return weight * nll(model, retain) if len(retain) and weight else 0.0


@torch.no_grad()
def subtract(model: torch.nn.Module, tuned: torch.nn.Module, scale: float) -> None:
    """o - scale (ft - o), in place on o; buffers stay."""
    for own, other in zip(model.parameters(), tuned.parameters(), strict=True):
        own -= scale * (other - own)


def task_vector(model: torch.nn.Module, task: Task) -> dict[str, Any]:
    """Subtract what fine-tuning on the forget set adds (arXiv:2212.04089)."""
    tuned = copy.deepcopy(model)
    loss: Loss = lambda m, f, _, __: nll(m, f)  # noqa: E731
    record = descend(tuned, task, "task-vector", loss, "forget", stops=False)
    subtract(model, tuned, task.section.task_vector_scale)
    return record


METHODS: dict[str, Method] = {
    "fine-tune": Method(fine_tune, needs_retain=True),
    "l1-sparse": Method(l1_sparse, ("l1_weight",), needs_retain=True),
    "GA": Method(gradient_ascent),
    "GradDiff": Method(gradient_difference, ("retain_weight",), needs_retain=True),
    "NPO": Method(npo, ("retain_weight", "npo_beta")),
    "SimNPO": Method(simnpo, ("retain_weight", "simnpo_beta", "simnpo_gamma")),
    "task-vector": Method(task_vector, ("task_vector_scale",)),
}


# --- an operation ---------------------------------------------------------------------------------


def unlearn(name: str, method: Method, context: Context, forget: Forget) -> Outcome:
    """The run with a method applied to every model whose partition holds the forget set."""
    blocks = {k: forget_and_retain_blocks(context, forget, k) for k in context.touched(forget)}
    blocks = {k: both for k, both in blocks.items() if len(both[0])}
    if not blocks:
        raise NotApplicable(f"{NOT_APPLICABLE}: no model was trained on the forget set")
    if method.needs_retain and any(not len(retain) for _, retain in blocks.values()):
        raise NotApplicable(f"{NOT_APPLICABLE}: its partition holds nothing else to train on")
    golds, _ = models_without(context, forget)
    edits = {}
    for k in blocks:
        task = Task(context, forget, k, *blocks[k], golds.get(k))
        inputs = {
            "operation": name,
            "forget": forget.identity(),
            "settings": settings_of(context, name, method),
            "blocks": [hashlib.sha256(part.astype("<i4")).hexdigest()[:16] for part in blocks[k]],
            "gold": content_hash(golds[k]) if k in golds else None,
            "seed": context.config.seed,
            "partition": context.partitions.identity(k),
        }

        def edit(model: torch.nn.Module, task: Task = task) -> dict[str, Any]:
            return method.edit(model, task)

        code = (*GRADIENT_CODE, *method.code)
        edits[k] = edited(context, k, inputs, edit, code, time.perf_counter())
    return Outcome.of_edits(context, edits)


def settings_of(context: Context, name: str, method: Method) -> dict[str, Any]:
    """The unlearn fields that a method's result depends on."""
    section = context.config.unlearn
    common = ("max_steps", "batch_rows", "check_steps", "check_rows", "max_retain_loss")
    values = {n: getattr(section, n) for n in (*common, *method.settings)}
    return values | {"learning_rate": section.learning_rates.get(name, section.learning_rate)}


def forget_and_retain_blocks(
    context: Context, forget: Forget, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training blocks (rows, T) of partition k: the forget set's, and those of the rest."""
    config, data, partitions = context.config, context.data, context.partitions
    empty = np.zeros((0, data.block_size), dtype=np.int32)
    if forget.documents:
        retain, _ = partition_blocks(context.without(forget), data, partitions, k)
        return document_blocks(context, forget, k), empty if retain is None else retain
    forgotten, _ = partition_blocks(config, data, partitions, k, [forget.domain])
    retain, _ = partition_blocks(config, data, partitions, k, context.retained(forget))
    return (empty if forgotten is None else forgotten), (empty if retain is None else retain)


def document_blocks(context: Context, forget: Forget, k: int) -> np.ndarray:
    """The listed documents that partition k was trained on, packed (rows, T); with less than one
    block of text, that text over and over."""
    data, domain = context.data, forget.domain
    ids = data.document_ids(domain, "train")
    keep = np.isin(ids, sorted(forget.documents)) & (context.partitions.assign(domain, ids) == k)
    trained = used(context.config, domain, ids)
    keep = keep if trained is None else keep & trained
    blocks = data.blocks(domain, "train", keep=keep)
    if len(blocks) or not keep.any():
        return blocks
    texts = [text for text, kept in zip(data.documents(domain, "train"), keep, strict=True) if kept]
    return np.resize(np.concatenate(texts), (1, data.block_size))
