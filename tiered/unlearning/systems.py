"""A system: a router and partition models in a folder of their own, with its provenance.

system/router/, system/models/<k>/ are hard links of what is unchanged; system/system.json says
what is exact, what the claim rests on, and what the operation does not touch.
"""

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tiered import shared_trunk
from tiered.blocks import trained_rows
from tiered.config import Config
from tiered.data import ProcessedData, Rows
from tiered.modeling_tiered import TieredForCausalLM
from tiered.partition import PartitionMap
from tiered.record import device_of, training_environment
from tiered.router import load_models, load_router, tiered_model
from tiered.store import (
    TIMINGS,
    UserError,
    atomic_folder,
    code_hash,
    content_hash,
    digest,
    is_complete,
    link_tree,
    read_json,
    verify,
    write_json,
)
from tiered.training import model_inputs


class NotApplicable(Exception):
    """An operation that makes no sense for this run and forget set; its text is printed."""


@dataclass(frozen=True)
class Forget:
    """What is removed: a domain, or (documents) some train documents of it, listed in a file."""

    name: str
    domain: str
    documents: frozenset[str] = frozenset()
    path: str = ""

    def identity(self) -> list[Any]:
        """What is removed, for hashes and seeds."""
        return [self.domain, sorted(self.documents)]


@dataclass(frozen=True)
class Context:
    """What every operation starts from: one finished run."""

    config: Config
    data: ProcessedData
    partitions: PartitionMap
    models: dict[int, Path]
    router: Path

    def without(self, forget: Forget) -> Config:
        """The config of a world in which nobody had the forget set."""
        if not forget.documents:
            return self.config.without(forget.domain)
        return replace(self.config, data=replace(self.config.data, exclude_documents=forget.path))

    def standing(self, config: Config) -> dict[int, Path]:
        """Models of the run that a training under `config` would make again: they agree in every
        input, though another machine or number of processes may have computed them."""
        if config.overwrite:
            return {}
        data = ProcessedData(config)
        inputs = {k: model_inputs(config, data, self.partitions, k) for k in self.models}
        return {
            k: path
            for k, path in self.models.items()
            if inputs[k] and read_json(path / "record.json").get("inputs") == inputs[k]
        }

    def touched(self, forget: Forget) -> tuple[int, ...]:
        """Partitions that hold at least one document of the forget set."""
        if not forget.documents:
            return self.partitions.touched(forget.domain)
        found = self.partitions.assign(forget.domain, sorted(forget.documents))
        return tuple(sorted(set(found.tolist())))

    def retrained(self, forget: Forget) -> tuple[int, ...]:
        """Partitions whose models have seen the forget set, or were chosen by one that has: where a
        trunk is shared and holds it, all; those of added domains that start from the nearest."""
        touched = set(self.touched(forget))
        founding = set(shared_trunk.founding(self.partitions))
        if touched & founding:
            if shared_trunk.is_shared(self.config):
                touched = set(self.models)
            elif self.config.training.added_from:
                touched |= set(self.models) - founding
        return tuple(sorted(touched))

    def trained(self, domain: str) -> np.ndarray:
        """Train documents (documents,) bool whose first row a model of the run was trained on."""
        return trained_rows(self.config, self.data, self.partitions, domain)

    def members(self, forget: Forget, count: int) -> Rows:
        """M_f: at most `count` trained rows of the forget set (0: all), most repeated first."""
        chosen = self.trained(forget.domain)
        if forget.documents:
            ids = self.data.document_ids(forget.domain, "train")
            chosen &= np.isin(ids, sorted(forget.documents))
        return self.data.rows(forget.domain, "train", count, chosen)

    def retained_members(self, forget: Forget, domain: str, count: int) -> Rows:
        """M_d: trained rows of a retained domain, those of the forget set left out."""
        chosen = self.trained(domain)
        if forget.documents and domain == forget.domain:
            chosen &= ~np.isin(self.data.document_ids(domain, "train"), sorted(forget.documents))
        return self.data.rows(domain, "train", count, chosen)

    def retained(self, forget: Forget) -> list[str]:
        """Present domains of which anything is left."""
        return [d for d in self.data.domains if forget.documents or d != forget.domain]

    def neighbours(self, forget: Forget) -> tuple[list[str], list[str]]:
        """Retained domains that share a partition with the forget set (near), and others (far)."""
        touched, retained = set(self.touched(forget)), self.retained(forget)
        near = [d for d in retained if touched & set(self.partitions.touched(d))]
        return near, [d for d in retained if d not in near]


@dataclass
class Outcome:
    """What an operation makes, and what it cost.

    tokens: training tokens x passes; seconds: with the recorded time of what was reused;
    allowed: partitions that may be routed to (None: all); removed / rebuilt: names of artefacts;
    changed: models that were edited; reused: artefacts that equal inputs had already made;
    is_gold: never saw the domain, though its parts are not those of the run's own gold (another
    seed, or a partition map fitted anew).
    """

    models: dict[int, Path]
    router: Path
    allowed: list[int] | None = None
    weights_removed: bool = False
    tokens: int = 0
    seconds: float = 0.0
    reused: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    rebuilt: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    is_gold: bool = False

    @classmethod
    def of_edits(cls, context: Context, edits: dict[int, tuple[Path, bool]]) -> "Outcome":
        """The run with some models edited: partition -> (folder, whether it was there before)."""
        tokens, seconds = recorded_cost(path for path, _ in edits.values())
        return cls(
            models=context.models | {k: path for k, (path, _) in edits.items()},
            router=context.router,
            tokens=tokens,
            seconds=seconds,
            changed=[f"model/{k}" for k in edits],
            reused=[f"model/{k}" for k, (_, there) in edits.items() if there],
        )

    def identity(self) -> dict[str, Any]:
        """Content hashes of the system's parts."""
        return {
            "models": {str(k): content_hash(path) for k, path in sorted(self.models.items())},
            "router": content_hash(self.router),
            "allowed": self.allowed,
        }


def edited(
    context: Context,
    k: int,
    inputs: dict[str, Any],
    edit: Callable[[PreTrainedModel], dict[str, Any]],
    code: tuple[str, ...],
    begin: float,
) -> tuple[Path, bool]:
    """Folder of partition k's model after an edit in place, and whether the store had it already.

    inputs: what decides the edit besides the model; edit: returns entries of record.json, with
    `tokens` (those trained on); code: files that decide what it does; begin: when the operation
    began, as time.perf_counter() says it.
    """
    source, config = context.models[k], context.config
    made_from = {"model": content_hash(source), **inputs}
    key = digest([made_from, training_environment(config), code_hash(*code)])
    folder = config.store_dir / "edited" / key
    if is_complete(folder) and not config.overwrite:
        verify(folder)
        return folder, True
    model = load_models({k: source})[k].to(device_of(config))
    shared_trunk.freeze_shared(model, source)
    shared = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    record = edit(model)
    changed = [n for n, p in shared.items() if not torch.equal(model.get_parameter(n), p)]
    assert not changed, f"{changed[0]} is shared by all partitions"
    for name, values in model.state_dict().items():
        if values.is_floating_point() and not values.isfinite().all():
            raise UserError(
                f"{inputs['operation']}: {name} is not finite after it; lower its rate?"
            )
    with atomic_folder(folder) as path:
        model.to("cpu").eval().save_pretrained(path)
        for name in source.iterdir():
            if "tokenizer" in name.name:
                shutil.copy(name, path)
        write_json(path / "record.json", {"inputs": made_from, **record})
        write_json(path / TIMINGS, {"seconds": time.perf_counter() - begin})
    return folder, False


def write_system(folder: Path, outcome: Outcome, description: dict[str, Any]) -> float:
    """Make the system folder of an outcome by hard links, unless it is there and undamaged;
    returns the seconds that it took to make. Nothing of the original is changed."""
    value, begin = {**description, **outcome.identity()}, time.perf_counter()
    if _stands(folder, value):
        return read_json(folder / TIMINGS)["seconds"]
    for source in (outcome.router, *outcome.models.values()):
        verify(source)  # the system's own hash list is of what it gets
    with atomic_folder(folder) as path:
        link_tree(outcome.router, path / "router")
        for k, source in sorted(outcome.models.items()):
            link_tree(source, path / "models" / str(k))
        write_json(path / "system.json", value)
        write_json(path / TIMINGS, {"seconds": time.perf_counter() - begin})
    return time.perf_counter() - begin


def _stands(folder: Path, value: dict[str, Any]) -> bool:
    """Whether a system folder of this description is there, every file as it was written."""
    try:
        verify(folder)
        return read_json(folder / "system.json") == value and (folder / TIMINGS).is_file()
    except UserError:
        return False


def load_system(context: Context, folder: Path) -> tuple[TieredForCausalLM, dict[int, str]]:
    """The tiered model of a system folder and the content hash of each partition model."""
    indices = sorted(int(p.name) for p in (folder / "models").iterdir())
    folders = {k: folder / "models" / str(k) for k in indices}
    router = load_router(folder / "router", "python unlearn_benchmarks.py CONFIG overwrite=true")
    model = tiered_model(context.config, context.partitions, router, load_models(folders))
    return model, {k: content_hash(path) for k, path in folders.items()}


def recorded_cost(folders: Iterable[Path]) -> tuple[int, float]:
    """Training tokens x passes and seconds of published artefacts, from their own records."""
    tokens, seconds = 0, 0.0
    for path in folders:
        record = path / "record.json"
        tokens += read_json(record)["tokens"] if record.is_file() else 0
        seconds += read_json(path / TIMINGS)["seconds"]
    return tokens, seconds
