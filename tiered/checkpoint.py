"""Resume state of a training run: complete or absent, hashed, without pickle.

A checkpoint folder holds model.safetensors, optimizer.safetensors + optimizer.json,
scheduler.json, rng.safetensors (each rank's torch generators) + rng.json, trainer_state.json,
hashes.json and, of several ranks, statistics.safetensors: each one's running statistics, whose mean
the model has. It is written under a temporary name and renamed; the newest one whose hashes agree
is resumed.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from tiered.store import (
    TIMINGS,
    UserError,
    atomic_folder,
    is_complete,
    read_json,
    seed_of,
    verify,
    write_json,
)

STATISTICS = "statistics.safetensors"
KEPT = 2  # the newest may be damaged by the disk: keep the one before it


def newest(folder: Path) -> Path | None:
    """Newest checkpoint whose hashes agree; damaged ones are named on stdout and skipped."""
    candidates = sorted(p for p in folder.glob("checkpoint-*") if is_complete(p))
    for path in reversed(candidates):
        try:
            verify(path)
            read_json(path / TIMINGS)  # in no hash list: equal runs differ there
            return path
        except UserError as error:
            print(f"checkpoint skipped: {error}")
    return None


def prune(folder: Path) -> None:
    """Remove all but the newest checkpoints."""
    for path in sorted(p for p in folder.glob("checkpoint-*") if is_complete(p))[:-KEPT]:
        shutil.rmtree(path)


def of_ranks(own: torch.Tensor) -> torch.Tensor:
    """A tensor as each rank has it, (ranks, ...), of one process (1, ...); all ranks have to call
    it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own[None]
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own.contiguous())
    return torch.stack(parts)


def whole(state: Any) -> Any:
    """A state with its tensors on the CPU, and whole where they are shards of ranks (FSDP2); all
    ranks have to call it then."""
    if isinstance(state, dict):
        return {k: whole(v) for k, v in state.items()}
    if not isinstance(state, torch.Tensor):
        return state
    state = state.full_tensor() if isinstance(state, DTensor) else state
    return state.detach().cpu().contiguous()


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers of a model on the CPU, tied ones once; all ranks have to call it."""
    return {name: whole(tensor) for name, tensor in _without_shared(model.state_dict()).items()}


def save(
    folder: Path, trainer: Any, seconds: float, statistics: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the whole state of a transformers Trainer as one atomic folder; all ranks have to call
    it, the one with args.should_save writes.

    seconds: training time so far, kept in the timings file, which no hash covers. statistics:
    running statistics of ranks, (ranks, ...).
    """
    weights, optimizer = whole_weights(trainer.model), trainer.optimizer.state_dict()
    optimizer = {**optimizer, "state": whole(optimizer["state"])}
    losses, generators = trainer.loss_accumulator(), _generators(trainer.model)
    if not trainer.args.should_save:
        return
    with atomic_folder(folder) as path:
        save_file(weights, path / "model.safetensors")
        if statistics:
            save_file({k: v.cpu() for k, v in statistics.items()}, path / STATISTICS)
        _save_optimizer(optimizer, path)
        _write(path / "scheduler.json", _plain(trainer.lr_scheduler.state_dict()))
        _save_random_state(generators, path)
        _write(path / "loss_accumulator.json", losses)
        trainer.state.save_to_json(str(path / "trainer_state.json"))
        write_json(path / TIMINGS, {"seconds": seconds})


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Load model.safetensors into a model, buffers included; every tensor must be there."""
    set_weights(model, load_file(folder / "model.safetensors"), str(folder))


def set_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Give a model all its weights and buffers, tied ones once. UserError, naming the origin, where
    they are another model's."""
    state = model.state_dict()
    weights = {name: _as(tensor, state.get(name)) for name, tensor in weights.items()}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # torch's way to report another shape
        raise UserError(f"{origin}: checkpoint of another model ({error})") from None
    # of tied tensors one is stored: the others have its memory
    stored = {_place(state[name]) for name in weights if name in state}
    lacking = [n for n in missing if not state[n].numel() or _place(state[n]) not in stored]
    if unexpected or lacking:
        raise UserError(f"{origin}: checkpoint of another model ({(lacking + unexpected)[0]})")


def statistics(folder: Path) -> dict[str, torch.Tensor]:
    """Running statistics of the ranks that wrote a checkpoint, (ranks, ...); of one rank: none."""
    path = folder / STATISTICS
    return load_file(path) if path.exists() else {}


def load_optimizer(folder: Path, trainer: Any) -> None:
    """Load optimizer and scheduler state."""
    tensors = load_file(folder / "optimizer.safetensors")
    stored = read_json(folder / "optimizer.json")
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in stored["state"].items()}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    for index, entry in state.items():  # moments are cut as their weights are
        shaped = {
            k for k, v in entry.items() if getattr(v, "shape", None) == parameters[index].shape
        }
        entry |= {key: _as(entry[key], parameters[index]) for key in shaped}
    trainer.optimizer.load_state_dict({"state": state, "param_groups": stored["param_groups"]})
    trainer.lr_scheduler.load_state_dict(read_json(folder / "scheduler.json"))


def load_random_state(folder: Path, rank: int = 0, ranks: int = 1) -> None:
    """Restore the python, numpy and torch generators; each rank's own torch generators, if as many
    ranks wrote them. Of another number, the first goes on with the first one's, each other with
    one that this seeds."""
    stored, tensors = read_json(folder / "rng.json"), load_file(folder / "rng.safetensors")
    version, numbers, gauss = stored["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, position, has_gauss, cached = stored["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy(), position, has_gauss, cached))
    known = len(tensors["torch"]) == ranks
    # copies: torch reads a generator's state from where a tensor's memory begins, even a view's
    own = {name: tensors[name][rank if known else 0].clone() for name in tensors.keys() - {"numpy"}}
    torch.set_rng_state(own["torch"])
    if torch.cuda.is_available() and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"])
    if rank and not known:
        seed_rank(int(torch.randint(2**62, ())), rank)


def seed_rank(seed: int, rank: int) -> None:
    """Give ranks generators of their own, so that dropout drops elsewhere in each one's rows; the
    first keeps what it has, as one process."""
    if rank:
        torch.manual_seed(seed_of(seed, "rank", rank))


def _save_optimizer(state: dict[str, Any], path: Path) -> None:
    tensors, rest = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                rest.setdefault(str(index), {})[key] = value
    save_file(tensors, path / "optimizer.safetensors")
    _write(path / "optimizer.json", {"state": rest, "param_groups": _plain(state["param_groups"])})


def _generators(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """States of torch's generators by device, (ranks, bytes); all ranks have to call it."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    device = next(model.parameters()).device  # ranks on GPUs send what is on these
    return {name: of_ranks(state.to(device)).cpu() for name, state in states.items()}


def _save_random_state(generators: dict[str, torch.Tensor], path: Path) -> None:
    name, keys, position, has_gauss, cached = np.random.get_state()
    save_file({**generators, "numpy": torch.from_numpy(keys.copy())}, path / "rng.safetensors")
    numpy_state = [name, position, has_gauss, cached]
    _write(path / "rng.json", {"python": random.getstate(), "numpy": numpy_state})


def _as(tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """A whole tensor in shards as another one is, if that is."""
    if not isinstance(like, DTensor):
        return tensor
    # every rank has read the whole: each takes its shard of that, nothing is sent
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def _place(tensor: torch.Tensor) -> int:
    """Where a tensor's memory, or this rank's shard of it, begins."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()


def _without_shared(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied tensors once (safetensors refuses shared memory)."""
    seen: set[tuple[int, bool]] = set()
    unique = {}
    for name, tensor in weights.items():
        # a rank's shard of a small tensor may be empty
        place = (id(tensor), True) if isinstance(tensor, DTensor) else (tensor.data_ptr(), False)
        if tensor.numel() == 0 or place not in seen:
            unique[name] = tensor
        seen.add(place)
    return unique


def _plain(value: Any) -> Any:
    """State as JSON-ready values; functions (a scheduler's lambdas) are rebuilt, not stored."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
