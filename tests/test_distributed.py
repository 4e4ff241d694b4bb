"""Two ranks on gloo: the loss under DDP, and run_clm.py under torchrun."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.ranks import balanced_model, balancing_steps, model, rows
from tiered.config import own_micro_batches
from tiered.store import UserError, verify


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


FAMILIES = ("monet", "moe", "loss_free", "bank", "stream")
WAYS = {
    "ddp": {},
    "fsdp": {"sharded": True},
    "recomputed": {"sharded": True, "checkpointing": True},
}

# rows of a training: the last step has micro-batches of two, two and one row, or one of three
SHORT = {45: {"micro_rows": 2, "accumulation": 4}, 43: {}}
SHORTER = [(f, "ddp", rows) for f in FAMILIES for rows in SHORT]
SHORTER += [(f, w, rows) for f in FAMILIES[:2] for w in ("fsdp", "recomputed") for rows in SHORT]


def fit_job(folder: Path, family: str, name: str, **more) -> str:
    """One training of tests/fit_ranks.py, as JSON."""
    path = str(folder / f"{family}-{name}")
    return json.dumps(
        {"family": family, "folder": path, "micro_rows": 4, "accumulation": 2, **more}
    )


def fit_alone(folder: Path, *trainings: str) -> str:
    """Output of trainings of tests/fit_ranks.py in one process."""
    command = [sys.executable, str(ROOT / "tests/fit_ranks.py"), str(folder / "alone.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *trainings], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def fits(tmp_path_factory) -> Path:
    """Six steps of eight rows: by one process in two micro-batches, by two ranks in one each; and
    trainings that were killed at step 5 under one number of processes and resumed, from step 4
    between two lines of the log, under another or (ddp-ddp, fsdp-fsdp) the same."""
    folder = tmp_path_factory.mktemp("fits")
    log = {"logging": 3}
    half = {"stop": 5, **log}
    jobs = [fit_job(folder, f, "one") for f in FAMILIES]
    jobs += [fit_job(folder, f, f"one-{r}", rows=r, **SHORT[r]) for f in FAMILIES for r in SHORT]
    jobs += [fit_job(folder, f, f"one-{w}", **half) for f in FAMILIES[:2] for w in ("ddp", "fsdp")]
    fit_alone(folder, *jobs)
    jobs = [fit_job(folder, f, w, **WAYS[w]) for f in FAMILIES for w in WAYS]
    for family in FAMILIES[:2]:
        for way in ("ddp", "fsdp"):
            jobs.append(fit_job(folder, family, f"{way}-one", **half, **WAYS[way]))
            jobs.append(fit_job(folder, family, f"one-{way}", **log, **WAYS[way]))
    jobs += [fit_job(folder, f, f"{w}-{r}", rows=r, **SHORT[r], **WAYS[w]) for f, w, r in SHORTER]
    jobs.append(fit_job(folder, "monet", "own", rows=43, own_mean=True))
    jobs += [fit_job(folder, "dropout", w, **WAYS[w]) for w in ("ddp", "fsdp")]
    for family in (*FAMILIES[:2], "dropout"):
        for way in ("ddp", "fsdp"):
            same = {"saving": 4, **WAYS[way]}
            jobs += [fit_job(folder, family, f"{way}-{way}", **m, **same) for m in (half, log)]
    output = torchrun(folder, 29548, ROOT / "tests/fit_ranks.py", folder / "ranks.json", *jobs)
    names = [fit_job(folder, f, f"{w}-one", **log) for f in FAMILIES[:2] for w in WAYS]
    output += fit_alone(folder, *(n for n in names if "recomputed" not in n))
    (folder / "output.txt").write_text(output)
    return folder


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "model/metrics.jsonl").open()]


def same_training(folder: Path, family: str, name: str, alone: str = "one") -> float:
    """Losses, gradient norms and weights of a training are those of one process, to 1e-5; returns
    by how much running statistics differ, at most."""
    one, other = (log_of(folder / f"{family}-{n}") for n in (alone, name))
    assert len(one) == 6 and other[-1]["step"] == 6
    before = 0
    for line in other:  # of one step, or the mean loss since the line before
        same = one[before : line["step"]]
        assert abs(sum(a["loss"] for a in same) / len(same) - line["loss"]) < 1e-5
        assert abs(same[-1]["grad_norm"] - line["grad_norm"]) < 1e-5 and line["grad_norm"] > 0.3
        before = line["step"]
    files = [folder / f"{family}-{n}/model/model.safetensors" for n in (alone, name)]
    weights = [load_file(path) for path in files]
    assert weights[0].keys() == weights[1].keys()
    apart = 0.0
    for key, value in weights[0].items():
        distance = float((value.float() - weights[1][key].float()).abs().max())
        if "running" in key:
            apart = max(apart, distance)
        elif "num_batches_tracked" in key:  # a rank sees half of the micro-batches
            assert value in (11, 12, 23) and weights[1][key] in (6, 8, 10, 12)
        else:
            assert distance < 1e-5, key
    return apart


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_share_the_micro_batches_of_a_step(fits, family, way):
    """As one process with twice the accumulation trains, under DDP, FSDP2 and FSDP2 with gradient
    checkpointing. Running statistics are the mean of the ranks', each over its own rows: they
    alone differ."""
    apart = same_training(fits, family, way)
    assert (apart > 1e-3) == (family == "monet")


@pytest.mark.parametrize(("family", "way", "rows"), SHORTER)
def test_ranks_train_on_every_row_once(fits, family, way, rows):
    """Also where the last step has too few rows for all ranks (accelerate would have them train on
    the first rows again), and where each has several micro-batches of a step."""
    same_training(fits, family, f"{way}-{rows}", f"one-{rows}")
    records = [fits / f"{family}-{n}-{rows}/model/record.json" for n in ("one", way)]
    assert [json.loads(r.read_text())["tokens"] for r in records] == [rows * 12] * 2


def test_a_rank_without_rows_changes_nothing_where_each_takes_its_own_mean(fits):
    """It counts no tokens then: nothing is divided by them."""
    losses = [line["loss"] for line in log_of(fits / "monet-own")]
    assert len(losses) == 6 and all(3 < loss < 5 for loss in losses[:-1]) and 0 < losses[-1] < 5
    weights = load_file(fits / "monet-own/model/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_fsdp_holds_shards_and_publishes_the_whole(fits):
    shards = json.loads((fits / "ranks.json").read_text())[: len(FAMILIES) * len(WAYS)]
    for i, seen in enumerate(shards):
        assert seen and set(seen) == {i % len(WAYS) > 0}  # DDP's are plain tensors
    whole = load_file(fits / "monet-fsdp/model/model.safetensors")
    expected = load_file(fits / "monet-one/model/model.safetensors")
    assert {n: t.shape for n, t in whole.items()} == {n: t.shape for n, t in expected.items()}


OTHERS = ["ddp-one", "fsdp-one", "one-ddp", "one-fsdp", "ddp-ddp", "fsdp-fsdp"]


@pytest.mark.parametrize("way", OTHERS)
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_a_checkpoint_of_one_number_of_processes_goes_on_under_another(fits, family, way):
    """Killed at step 5 under the first, resumed from step 4 under the second; the loss of the line
    that is logged next is that of all ranks since the line before."""
    assert not list((fits / f"{family}-{way}").glob(".checkpoints/*/*"))  # done
    same_training(fits, family, way)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("family", [*FAMILIES[:2], "dropout"])
def test_saving_and_resuming_change_no_bit_of_what_ranks_train(fits, family, way):
    """Each goes on with its own running statistics and its own random numbers."""
    files = (fits / f"{family}-{w}/model/model.safetensors" for w in (way, f"{way}-{way}"))
    one, other = map(load_file, files)
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_every_killed_training_was_resumed_and_not_begun_anew(fits):
    """Ten by two ranks and four by one process; one of the ranks says so. Ranks that were killed
    had random numbers of their own."""
    output = (fits / "output.txt").read_text()
    assert re.findall(r"resuming from step (\d+)", output) == ["4"] * 14
    assert re.findall(r"generators: (\d) of 2", output) == ["2"] * 20  # ten, said by both


def test_micro_batches_that_processes_cannot_share_are_refused():
    """The rows of a step are the config's: more GPUs are no other experiment."""
    assert [own_micro_batches(6, ranks) for ranks in (1, 2, 6)] == [6, 3, 1]
    with pytest.raises(UserError, match=r"6 micro-batches .* cannot be shared by 4 processes"):
        own_micro_batches(6, 4)


@pytest.mark.parametrize("shard", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_run_clm_trains_under_torchrun(shard, tiny, tmp_path):
    """As many rows per step as one process, one published model that loads and is finite."""
    for name in ("configs", "processed"):
        shutil.copytree(tiny / name, tmp_path / name)
    halves = ("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2")
    more = ("training.save_steps=20", f"training.shard={shard}", *halves)
    output = torchrun(tmp_path, 29547, ROOT / "run_clm.py", "configs/n1.yaml", *more)
    assert output.count("n1 partition 0:") == 1
    (folder,) = Path(tmp_path / "runs/n1/models").iterdir()
    verify(folder)
    records = [
        json.loads((f / "record.json").read_text()) for f in (folder, tiny / "runs/n1/models/0")
    ]
    assert records[0]["tokens"] == records[1]["tokens"]
    assert records[0]["optimizer_steps"] == records[1]["optimizer_steps"]
    assert records[0]["final_training_loss_nats"] < 6.0  # ln 400 is 5.99
    statistics = [t for n, t in load_file(folder / "model.safetensors").items() if "running" in n]
    assert statistics and all(t.isfinite().all() for t in statistics)
