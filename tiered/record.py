"""The run record: what was run, on what, with which versions; written first, before any work."""

import dataclasses
import functools
import gc
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from tiered.config import Config, as_yaml
from tiered.locks import locked, update_json
from tiered.store import TIMINGS, UserError, code_hash, write_sealed

# What decides a trained model besides its config and data; what scores it.
TRAINING_CODE = (
    "modeling_monet.py",
    *(f"tiered/{name}.py" for name in ("blocks", "branching", "data", "fitting", "joint")),
    *(f"tiered/{name}.py" for name in ("methods", "modeling_tiered", "nearest", "partition")),
    *(f"tiered/{name}.py" for name in ("router", "shared_trunk", "training")),
)
FAMILY_CODE = {  # model.type -> files that decide its models alone
    "moe": ("tiered/baselines/modeling_moe.py",),
    "demix": ("tiered/baselines/modeling_demix.py",),
    "domain_token": ("tiered/baselines/modeling_domain_token.py",),
    "lora": ("tiered/baselines/modeling_lora_experts.py", "tiered/baselines/lora_experts.py"),
}
SCORING_CODE = tuple(
    f"tiered/{name}.py"
    for name in (
        *("scoring", "evaluation", "mixtures", "metrics", "baselines/glider"),
        *("unlearning/protocol", "unlearning/attacks", "unlearning/verbatim"),
    )
)
GROUP_SECONDS = 7 * 24 * 3600  # that ranks wait for one another: the longest training
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy")


def set_up_process(config: Config) -> None:
    """Fix torch's CPU thread count (some sums depend on it: it is part of every hash), and silence
    transformers' progress bars: ours say what is being done, in units."""
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    disable_progress_bar()


def is_main_process() -> bool:
    """Whether this process writes: rank 0 under torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Processes of this call: torchrun's ranks, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_ranks(config: Config) -> None:
    """Under torchrun: go on when every rank has come this far."""
    if world_size() > 1:
        from accelerate import PartialState  # makes the process group where nothing has yet

        # ranks wait here while the main one waits for another process that trains the same model
        patience = config.training.arguments.get("ddp_timeout", GROUP_SECONDS)
        PartialState(
            cpu=device_of(config).type == "cpu", timeout=timedelta(seconds=patience)
        ).wait_for_everyone()


def leave_ranks() -> None:
    """End the process group, if there is one, when all ranks are done: a rank whose peers are gone
    can wait for them for ever while it tears its group down."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # models that hold the group
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def device_of(config: Config) -> torch.device:
    """The device of a config: cuda when present and allowed, else cpu.

    Raises UserError where cuda is asked for and not there: no silent run on the CPU.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is asked for, but torch sees no GPU here; use auto or cpu")
    return torch.device(config.device)


def environment(config: Config) -> dict[str, Any]:
    """What a result depends on besides its inputs; part of every artefact's hash.

    The number of processes is in it: sums run in another order, and running statistics see other
    rows.
    """
    device = device_of(config)
    return {
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "scikit-learn": _version("scikit-learn"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": config.threads or os.cpu_count(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "processes": world_size(),
        "code": code_hash(*TRAINING_CODE),
    }


def training_environment(config: Config) -> list[Any]:
    """What a trained model depends on besides its inputs: `environment`, and its family's code."""
    own = FAMILY_CODE.get(config.model.type)
    found = [environment(config), *([code_hash(*own)] if own else [])]
    found += ["sharded"] if config.training.shard and world_size() > 1 else []
    return [*found, _version("peft")] if config.model.type == "lora" else found


@functools.cache
def _version(library: str) -> str:
    """A library's version, read once: a rerun asks hundreds of times."""
    return importlib.metadata.version(library)


def start(config: Config, stage: str) -> None:
    """Write config.yaml and record.json of the run folder, before the stage does any work."""
    set_up_process(config)
    if stage != "run_clm" and world_size() > 1:
        raise UserError(f"{stage}: runs in one process; torchrun is for run_clm.py")
    if not is_main_process():
        return
    folder = config.run_dir
    write_sealed(folder / "config.yaml", as_yaml(config))
    entry = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": _git_state(),
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "environment": environment(config),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
    }
    update_json(folder / "record.json", lambda record: {**record, stage: entry})


def _git_state() -> str:
    """Commit of the code, with `+changes` if the tree differs from it; `unknown` outside git."""
    root = Path(__file__).parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclasses.dataclass
class Timer:
    """Wall seconds of a block, filled in when it ends."""

    seconds: float = 0.0


@contextmanager
def timed(config: Config, stage: str, wait: bool = False) -> Iterator[Timer]:
    """Time a stage, or a part of one, and note seconds, date and peak memory in timings.json.

    Each run folder has one writer of a part at a time: UserError where another process is at it, or
    with `wait` its end is waited for.
    """
    timer, begin = Timer(), time.perf_counter()
    if not is_main_process():
        yield timer
        return
    lock = config.run_dir / ".locks" / f"{stage.replace('/', '-')}.lock"
    with locked(lock, f"{config.run_dir}: {stage}", wait):
        yield timer
    timer.seconds = time.perf_counter() - begin
    entry = {
        "seconds": round(timer.seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "peak_memory_bytes": peak_memory_bytes(),
        "host": platform.node(),
    }
    update_json(config.run_dir / TIMINGS, lambda timings: {**timings, stage: entry})


def note_provenance(config: Config, artefacts: dict[str, Any]) -> None:
    """Note in provenance.json which domains' data touched which artefact of the run."""
    models = {f"model/{k}" for k in range(config.num_partitions)}

    def change(known: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in known.items() if k in models or not k.startswith("model/")}
        if not config.model.init_from:
            kept.pop("seed_lm", None)
        return {**kept, **artefacts}

    update_json(config.run_dir / "provenance.json", change)
