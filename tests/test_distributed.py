"""Two ranks on gloo: the loss under DDP, and run_clm.py under torchrun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_monet import MonetConfig, MonetForCausalLM
from tests.conftest import ROOT
from tiered.store import verify


def model() -> MonetForCausalLM:
    """All experts are kept, so that no rank's batch statistics decide anything."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "moe_groups": 1}
    sizes |= {"num_attention_heads": 2, "moe_experts": 4, "moe_topk": 4, "moe_heads": 2}
    made = MonetConfig(**sizes, moe_dim=4, uniformity_loss_coef=0.0, ambiguity_loss_coef=0.0)
    return MonetForCausalLM(made).train()


def rows() -> torch.Tensor:
    return torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(1))


def rank_gradients(rank: int, folder: str) -> None:
    """One of two ranks: DDP gradients of its half of the rows, saved by rank 0."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    wrapped = torch.nn.parallel.DistributedDataParallel(model(), broadcast_buffers=False)
    half = rows()[2 * rank : 2 * rank + 2]
    wrapped(input_ids=half, labels=half).loss.backward()
    if rank == 0:
        torch.save([p.grad for p in wrapped.module.parameters()], f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()


def test_gradients_of_two_ranks_are_those_of_all_rows(tmp_path):
    torch.multiprocessing.start_processes(
        rank_gradients, (str(tmp_path),), nprocs=2, start_method="spawn"
    )
    alone = model()
    alone(input_ids=rows(), labels=rows()).loss.backward()
    for found, parameter in zip(
        torch.load(tmp_path / "gradients.pt"), alone.parameters(), strict=True
    ):
        assert torch.allclose(found, parameter.grad, atol=1e-7, rtol=1e-5)


def test_run_clm_trains_under_torchrun(tiny, tmp_path):
    """Twice the rows per step, half the steps, one published model that loads and is finite."""
    for name in ("configs", "processed"):
        shutil.copytree(tiny / name, tmp_path / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_addr=127.0.0.1", "--master_port=29547"]
    done = subprocess.run(
        [*command, ROOT / "run_clm.py", "configs/n1.yaml", "training.save_steps=20"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("n1 partition 0:") == 1
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
