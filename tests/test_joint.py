"""Joint training: balanced steps, and ranks that share what they must and nothing else."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import joint_ranks
from tests.conftest import ROOT
from tests.test_distributed import torchrun
from tiered.joint import BalancedBlocks, LabelledBlocks, holders, micro_batch_rows
from tiered.store import UserError

BLOCKS = np.arange(80).reshape(20, 4)
PARTITION = np.array([0] * 8 + [2] * 8 + [5] * 4)


def test_every_step_has_as_many_rows_of_every_partition_in_order():
    data = LabelledBlocks(BLOCKS, PARTITION, 2, 1.0, 7)
    assert len(data) == 24  # the largest has eight rows, two a step
    assert set(data.order) == set(range(20))  # every block is trained on
    labels = PARTITION[data.order].reshape(4, 6)
    assert (labels == [0, 0, 2, 2, 5, 5]).all()
    items = [data[i] for i in range(6)]
    assert [item["domain_ids"].item() for item in items] == [0, 0, 2, 2, 5, 5]
    assert items[4]["input_ids"].tolist() == BLOCKS[data.order[4]].tolist()


def test_a_partition_with_few_blocks_begins_them_anew():
    order = BalancedBlocks(BLOCKS, PARTITION, 2, 2.0, 7).order  # 8 steps: 16 rows of each
    by_label = {k: order[PARTITION[order] == k] for k in (0, 2, 5)}
    assert {k: len(rows) for k, rows in by_label.items()} == {0: 16, 2: 16, 5: 16}
    for k, passes in ((0, 2), (2, 2), (5, 4)):
        rows = np.flatnonzero(k == PARTITION)
        for i in range(passes):
            chosen = by_label[k][i * len(rows) : (i + 1) * len(rows)]
            assert sorted(chosen) == rows.tolist()


def test_a_partitions_order_does_not_depend_on_the_others():
    whole = BalancedBlocks(BLOCKS, PARTITION, 2, 2.0, 7).order
    kept = PARTITION != 2
    without = BalancedBlocks(BLOCKS[kept], PARTITION[kept], 2, 2.0, 7).order
    own = [PARTITION[whole] == 5, PARTITION[kept][without] == 5]
    first = BLOCKS[whole[own[0]]][:12], BLOCKS[kept][without[own[1]]][:12]
    assert np.array_equal(*first)


def test_rows_of_a_micro_batch_by_hand():
    assert micro_batch_rows(16, 16, 16, 1, "partitions") == 16
    assert micro_batch_rows(16, 16, 15, 1, "partitions") == 15  # gold: a partition has no data
    assert micro_batch_rows(32, 4, 4, 8, "domains") == 4
    with pytest.raises(UserError, match=r"per_device_train_batch_size: 24 rows .* 16 partitions"):
        micro_batch_rows(24, 16, 16, 1, "partitions")
    with pytest.raises(UserError, match=r"15 rows .* cannot be 2 equal micro-batches"):
        micro_batch_rows(16, 16, 15, 2, "partitions")


def test_ranks_that_hold_a_partition_by_hand():
    assert holders([0, 1, 2, 3], 2, 4, 2) == {0: (0,), 1: (0,), 2: (1,), 3: (1,)}
    # three rows a micro-batch: 001 122
    assert holders([0, 1, 2], 2, 3, 2) == {0: (0,), 1: (0, 1), 2: (1,)}
    assert holders([0, 1], 4, 2, 2) == {0: (0, 1), 1: (0, 1)}
    assert holders([0, 1], 2, 4, 1) == {0: (0,), 1: (0,)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    joint_ranks.train(folder, 8, 1)
    return folder


def losses(folder) -> list[float]:
    lines = (folder / "model/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def agree(first, second) -> None:
    a, b = (load_file(folder / "model/model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert losses(second) == pytest.approx(losses(first), abs=1e-4)


@pytest.mark.parametrize(("micro", "accumulation", "port"), [(4, 2, 29561), (1, 8, 29562)])
def test_two_ranks_train_what_one_process_does(alone, tmp_path, micro, accumulation, port):
    """Experts on one rank each; then, one row a micro-batch, all of them on both."""
    script = ROOT / "tests/joint_ranks.py"
    torchrun(tmp_path, port, script, tmp_path, str(micro), str(accumulation))
    agree(alone, tmp_path)


def test_accumulation_trains_what_one_batch_does(alone, tmp_path):
    joint_ranks.train(tmp_path, 4, 2)
    agree(alone, tmp_path)
