"""A system: a router and partition models in a folder of their own, with its provenance.

system/router/, system/models/<k>/ are hard links of what is unchanged; system/system.json says
what is exact, what the claim rests on, and what the operation does not touch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiered.config import Config
from tiered.data import ProcessedData
from tiered.modeling_tiered import TieredForCausalLM
from tiered.partition import PartitionMap
from tiered.router import load_models, load_router, tiered_model
from tiered.store import TIMINGS, atomic_folder, content_hash, link_tree, read_json, write_json


@dataclass(frozen=True)
class Context:
    """What every operation starts from: one finished run."""

    config: Config
    data: ProcessedData
    partitions: PartitionMap
    models: dict[int, Path]
    router: Path


@dataclass
class Outcome:
    """What an operation makes, and what it cost.

    tokens: training tokens x passes; seconds: with the recorded time of what was reused;
    allowed: partitions that may be routed to (None: all); removed / rebuilt: names of artefacts;
    reused: those rebuilt that equal inputs had already made; own_map: the partition map was fitted
    anew as well, so that gold is no measure of its parts.
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
    own_map: bool = False

    def identity(self) -> dict[str, Any]:
        """Content hashes of the system's parts."""
        return {
            "models": {str(k): content_hash(path) for k, path in sorted(self.models.items())},
            "router": content_hash(self.router),
            "allowed": self.allowed,
        }


def write_system(folder: Path, outcome: Outcome, description: dict[str, Any]) -> None:
    """Make the system folder of an outcome by hard links; nothing of the original is changed."""
    with atomic_folder(folder) as path:
        link_tree(outcome.router, path / "router")
        for k, source in sorted(outcome.models.items()):
            link_tree(source, path / "models" / str(k))
        write_json(path / "system.json", {**description, **outcome.identity()})


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
