"""Files that hold the hash of their content: whatever bit changes, they never read as another."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from tiered.sealed import read_table, read_tensors, write_table, write_tensors
from tiered.store import (
    UserError,
    read_json,
    read_sealed,
    write_json,
    write_json_once,
    write_sealed,
)

VALUE = {"bpb": 2.25, "of": {"hi": [1, None, "é"], "12": True}, "empty": {}}
TABLE = pa.table(
    {
        "domain": ["hi", "hi", "de"],
        "loss": [0.5, np.nan, 2.0],
        "tokens": pa.array([3, 4, 5], pa.int64()),
        "extra": pa.array([None, 1.5, None], pa.float64()),
    }
)
TENSORS = {
    "nll": torch.tensor([[0.25, 1.5], [3.0, 0.0]]),
    "correct": torch.tensor([True, False]),
    "half": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
    "one": torch.tensor(7),
}


def same_tensors(found: dict, value: dict) -> bool:
    return found.keys() == value.keys() and all(
        found[n].dtype == v.dtype and torch.equal(found[n], v) for n, v in value.items()
    )


def same_tables(found: pa.Table, value: pa.Table) -> bool:
    return found.replace_schema_metadata(None).schema.equals(value.schema) and np.array_equal(
        found.to_pandas().to_numpy(), value.to_pandas().to_numpy(), equal_nan=False
    ) | (str(found.to_pylist()) == str(value.to_pylist()))


CASES = {
    "json": (write_json, read_json, VALUE, dict.__eq__, 1),
    "text": (write_sealed, read_sealed, "name: é\nn: 2\n", str.__eq__, 1),
    "tensors": (write_tensors, read_tensors, TENSORS, same_tensors, 1),
    "table": (write_table, read_table, TABLE, same_tables, 13),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_and_no_bit_changes_it(case, tmp_path):
    """Every bit in turn (of the table's file every 13th): refused by name, or the same value."""
    write, read, value, same, step = CASES[case]
    path = tmp_path / "x"
    write(path, value)
    assert same(read(path), value) and [p.name for p in tmp_path.iterdir()] == ["x"]
    content, refused = path.read_bytes(), 0
    for bit in range(0, 8 * len(content), step):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(changed))
        try:
            assert same(read(path), value), bit
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.5 * len(range(0, 8 * len(content), step))
    for length in (0, 1, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="x: "):
            read(path)
    path.unlink()
    with pytest.raises(UserError, match="x: file is missing"):
        read(path)


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (lambda path: save_file(TENSORS, path), read_tensors),
        (lambda path: pq.write_table(TABLE, path), read_table),
        (lambda path: path.write_text("name: a\n"), read_sealed),
    ],
)
def test_what_has_no_seal_is_not_ours(write: Callable[[Path], None], read: Callable, tmp_path):
    write(tmp_path / "x")
    with pytest.raises(UserError, match="changed since it was written"):
        read(tmp_path / "x")


def test_json_from_elsewhere_has_no_seal_and_is_read_as_it_is(tmp_path):
    for value in (VALUE, [1, 2], "text", {}):
        (tmp_path / "x.json").write_text(json.dumps(value))
        assert read_json(tmp_path / "x.json") == value


def test_keys_that_are_numbers_and_a_second_writing_keep_the_seal(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {1: "a", 10: "b", 2: (1, 2)})
    first = path.read_bytes()
    found = read_json(path)
    assert found == {"1": "a", "10": "b", "2": [1, 2]}
    write_json(path, found)
    assert path.read_bytes() == first
    assert write_json_once(path, {"other": 1}) == found
    assert write_json_once(tmp_path / "y.json", {"other": 1}) == {"other": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "y.json"]


def test_columns_of_a_table_are_chosen_after_all_are_checked(tmp_path):
    path = tmp_path / "x"
    write_table(path, TABLE)
    assert read_table(path, ["tokens", "domain"]).column_names == ["tokens", "domain"]
    other = TABLE.set_column(1, "loss", [[0.5, np.nan, 2.5]])
    pq.write_table(other.replace_schema_metadata(pq.read_table(path).schema.metadata), path)
    with pytest.raises(UserError, match="changed since it was written"):
        read_table(path, ["tokens"])
