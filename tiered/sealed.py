"""Tensor and table files that are not part of a hashed folder: each holds the hash of its content,
so that a changed bit is noticed when it is read (JSON: `tiered.store.write_json`)."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from tiered.store import SEAL, UserError, atomic_file, damaged

if TYPE_CHECKING:  # the report reads tables, and torch costs seconds
    import torch


def write_tensors(path: Path, tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Write tensors, sealed, as a safetensors file, atomically."""
    from safetensors.torch import save_file

    held = {name: value.cpu().contiguous() for name, value in tensors.items()}
    # one entry: the order of several is the library's hash map's, another in every process
    seal = {SEAL: _hash(_of_tensors(held))}
    with atomic_file(path) as temporary:
        save_file(held, temporary, metadata=seal)


def read_tensors(path: Path) -> dict[str, "torch.Tensor"]:
    """Tensors that `write_tensors` wrote; UserError where they are no longer those."""
    try:
        with safe_open(path, "pt") as file:
            seal = (file.metadata() or {}).get(SEAL)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing") from None
    except Exception:  # one changed bit can make anything of a file
        raise damaged(path) from None
    if seal != _hash(_of_tensors(found)):
        raise damaged(path)
    return found


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table, sealed, as a parquet file, atomically."""
    sealed = table.replace_schema_metadata({SEAL: _hash(_of_table(table))})
    with atomic_file(path) as temporary:
        pq.write_table(sealed, temporary)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Some columns (None: all) of a table that `write_table` wrote; UserError where it is no longer
    that one."""
    try:
        table = pq.read_table(path)
        seal = (table.schema.metadata or {}).get(SEAL.encode(), b"").decode(errors="replace")
        same = seal == _hash(_of_table(table))
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing") from None
    except Exception:  # one changed bit can make anything of a file
        raise damaged(path) from None
    if not same:
        raise damaged(path)
    return table if columns is None else table.select(columns)


def _hash(parts: Iterator[Any]) -> str:
    value = hashlib.sha256()
    for part in parts:
        value.update(part if isinstance(part, bytes) else json.dumps(part).encode())
    return value.hexdigest()


def _of_tensors(tensors: Mapping[str, "torch.Tensor"]) -> Iterator[Any]:
    from torch import uint8

    for name in sorted(tensors):
        value = tensors[name]
        yield [name, str(value.dtype), list(value.shape)]
        yield value.reshape(-1).view(uint8).numpy().tobytes()


def _of_table(table: pa.Table) -> Iterator[Any]:
    for name, column in zip(table.column_names, table.columns, strict=True):
        yield [name, str(column.type), len(column)]
        values = column.to_numpy(zero_copy_only=False)
        yield values.tolist() if values.dtype == np.object_ else values.tobytes()
