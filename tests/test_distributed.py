"""Two ranks on gloo: the loss under DDP, and run_clm.py under torchrun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.ranks import balanced_model, balancing_steps, model, rows
from tiered.store import verify


def torchrun(folder: Path, port: int, *arguments: str) -> str:
    """Output of a script on two ranks; fails with it if they fail or hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(folder, 29546, ROOT / "tests/ranks.py", folder)
    return folder


def test_biases_of_two_ranks_follow_the_loads_of_both(ranks):
    moe = balanced_model()
    alone = balancing_steps(moe, moe, rows())
    found = [load_file(ranks / f"balance.{rank}.safetensors") for rank in (0, 1)]
    assert len(alone) == 14
    for name, value in alone.items():
        if name.startswith("load."):  # each counted its own rows
            assert torch.equal(found[0][name] + found[1][name], value), name
            assert not torch.equal(found[0][name], found[1][name])
        else:
            assert all(torch.equal(own[name], value) for own in found), name
    assert alone["5.0"].unique().numel() > 2  # they have not all gone one way


def test_gradients_of_two_ranks_are_those_of_all_rows(ranks):
    alone = model()
    alone(input_ids=rows(), labels=rows()).loss.backward()
    found = load_file(ranks / "gradients.safetensors")
    expected = {name: p.grad for name, p in alone.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-7, rtol=1e-5), name


def test_run_clm_trains_under_torchrun(tiny, tmp_path):
    """Twice the rows per step, half the steps, one published model that loads and is finite."""
    for name in ("configs", "processed"):
        shutil.copytree(tiny / name, tmp_path / name)
    output = torchrun(
        tmp_path, 29547, ROOT / "run_clm.py", "configs/n1.yaml", "training.save_steps=20"
    )
    assert output.count("n1 partition 0:") == 1
    (folder,) = Path(tmp_path / "runs/n1/models").iterdir()
    verify(folder)
    records = [
        json.loads((f / "record.json").read_text()) for f in (folder, tiny / "runs/n1/models/0")
    ]
    assert records[0]["tokens"] == records[1]["tokens"]
    assert abs(records[0]["optimizer_steps"] - records[1]["optimizer_steps"] / 2) <= 1
    assert records[0]["final_training_loss_nats"] < 6.0  # ln 400 is 5.99
    statistics = [t for n, t in load_file(folder / "model.safetensors").items() if "running" in n]
    assert statistics and all(t.isfinite().all() for t in statistics)
