"""Requests to end, two calls at once, damaged artefacts: nothing lost, nothing half-written."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import STAGES, run_stages, start_stages, tiny_project
from tiered import checkpoint
from tiered.fitting import is_trained
from tiered.locks import locked
from tiered.store import (
    file_hash,
    is_complete,
    machine,
    read_json,
    tree_hashes,
    verify,
    write_json,
)

# Enough work per stage that a poll of a few milliseconds finds it under way.
WORK = ("training.num_train_epochs=4", "training.save_steps=5", "router.num_train_epochs=6")
WORK += ("training.dataloader_num_workers=1",)
CONFIG = "configs/n2.yaml"


def begun(folder: Path, stage: str, under_way: Callable[[], bool], *more: str) -> subprocess.Popen:
    """Start a stage and wait until it is demonstrably at work."""
    process = start_stages(folder, (stage,), CONFIG, *WORK, *more)
    deadline = time.monotonic() + 240
    while not under_way():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{stage}: no sign of work"
        time.sleep(0.002)
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    tiny_project(folder)
    run_stages(folder, STAGES, CONFIG, *WORK, forked=False)  # another hash seed than the others'
    return folder


def with_router(uninterrupted: Path, folder: Path) -> Callable[[], bool]:
    """A project that is processed and has its router; whether a model of it is in training."""
    for name in ("configs", "processed", "runs/n2/router", "runs/n2/partition"):
        shutil.copytree(uninterrupted / name, folder / name)
    return lambda: any(folder.glob("runs/.store/models/.checkpoints/*/checkpoint-*/hashes.json"))


@pytest.mark.parametrize(
    ("processes", "anew"), [(1, True), pytest.param(2, False, marks=pytest.mark.slow)]
)
def test_a_training_that_is_asked_to_end_saves_and_goes_on_from_there(
    processes, anew, uninterrupted, tmp_path
):
    """SIGTERM to all processes, those that load the batches and wandb's too, as Slurm sends it at a
    job's end. Also where a model stands that is made anew: its resume state is then no leftover."""
    under_way = with_router(uninterrupted, tmp_path)
    if anew:
        shutil.copytree(uninterrupted / "runs", tmp_path / "runs", dirs_exist_ok=True)
    more = (f"training.num_proc={processes}", "training.save_steps=30", f"overwrite={anew}".lower())
    process = begun(tmp_path, "run_clm", under_way, *more, "training.report_to=[wandb]")
    others = psutil.Process(process.pid).children(recursive=True)
    recorded = any("wandb-core" in " ".join(other.cmdline()) for other in others)
    assert recorded, process.text()
    for other in (*others, process):
        os.kill(other.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert "Traceback" not in output.rsplit("state saved", 1)[0]  # later: what wandb does at exit
    saved = re.findall(r"asked to end; state saved at step (\d+)", output)
    assert saved and all(int(step) % 30 for step in saved), output
    assert not list(tmp_path.rglob("*.lock"))
    output = run_stages(tmp_path, ("run_clm",), CONFIG, *WORK, *more)
    # two processes resume in any order
    assert sorted(re.findall(r"resuming from step (\d+)", output)) == sorted(saved)
    for k in ("0", "1"):
        found = tree_hashes(tmp_path / "runs/n2/models" / k)
        assert found == tree_hashes(uninterrupted / "runs/n2/models" / k)


def test_two_calls_on_one_run_are_told_apart_by_owner_and_age(uninterrupted, tmp_path):
    """The second call of a stage is refused with the first one's name; the first loses nothing."""
    process = begun(tmp_path, "run_clm", with_router(uninterrupted, tmp_path))
    line = failing(tmp_path, ("run_clm",), CONFIG, *WORK)
    where = f"runs/n2: run_clm/0: process {process.pid}@{machine()} is at it since "
    assert where in line and "(lock: runs/n2/.locks/run_clm-0.lock)" in line
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for k in ("0", "1"):
        found = tree_hashes(tmp_path / "runs/n2/models" / k)
        assert found == tree_hashes(uninterrupted / "runs/n2/models" / k)


def test_two_runs_that_want_one_model_train_it_once(uninterrupted, tmp_path):
    """The second one waits for the first one's end and takes what it made."""
    process = begun(tmp_path, "run_clm", with_router(uninterrupted, tmp_path))
    other = run_stages(tmp_path, ("run_clm",), CONFIG, *WORK, "name=other")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"waiting for {process.pid}@" in other and "resuming" not in other
    for k in ("0", "1"):
        one, two = (tmp_path / f"runs/{name}/models/{k}" for name in ("n2", "other"))
        inodes = [(p / "model.safetensors").stat().st_ino for p in (one, two)]
        assert inodes[0] == inodes[1]


def test_resume_state_that_a_killed_trainer_left_beside_its_model_goes(uninterrupted, tmp_path):
    """But for that of a model that another process is at."""
    for name in ("configs", "processed", "runs"):
        shutil.copytree(uninterrupted / name, tmp_path / name)
    store = tmp_path / "runs/.store"
    hashes = {
        file_hash(path)
        for part in ("router", "models")
        for path in (tmp_path / "runs/n2" / part).rglob("*.safetensors")
    }
    trained = [
        path.parent
        for kind in ("embedders", "models")
        for path in sorted(store.glob(f"{kind}/*/model.safetensors"))
        if file_hash(path) in hashes  # not of a gold, which these stages do not look at
    ]
    assert len(trained) == 3
    left = [path.parent / ".checkpoints" / path.name for path in trained]
    for path in left:
        (path / "checkpoint-00000005").mkdir(parents=True)
    held = trained[-1]
    with locked(held.parent / ".locks" / f"{held.name}.lock", "test"):
        run_stages(tmp_path, ("train_det_router", "run_clm"), CONFIG, *WORK)
    assert [path for path in left if path.exists()] == left[-1:]
    assert is_trained(held)
    assert not left[-1].exists()


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, capsys):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step:08d}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * step)
        hashes = tree_hashes(folder)
        write_json(folder / "hashes.json", hashes)
        write_json(folder / "timings.json", {"seconds": 1.0})
    assert checkpoint.newest(tmp_path).name == "checkpoint-00000010"
    timings = tmp_path / "checkpoint-00000010/timings.json"
    timings.write_text(timings.read_text().replace("1.0", "3.0"))
    assert checkpoint.newest(tmp_path).name == "checkpoint-00000005"
    write_json(timings, {"seconds": 1.0})
    assert checkpoint.newest(tmp_path).name == "checkpoint-00000010"
    (tmp_path / "checkpoint-00000010/model.safetensors").write_bytes(b"y" * 10)
    assert checkpoint.newest(tmp_path).name == "checkpoint-00000005"
    assert "checkpoint skipped" in capsys.readouterr().out
    half = tmp_path / "checkpoint-00000015"  # no hash list: never published
    half.mkdir()
    assert checkpoint.newest(tmp_path).name == "checkpoint-00000005"


def failing(folder: Path, stages, *arguments: str, **limits: int) -> str:
    """The one error line of stages that must end with exit code 2."""
    process = start_stages(folder, stages, *arguments, **limits)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    (line,) = [x for x in output.splitlines() if ": error: " in x]
    assert "Traceback" not in output
    return line


def test_stages_out_of_order_say_which_command_to_run(uninterrupted, tmp_path):
    tiny_project(tmp_path)
    assert "python process_dset.py CONFIG" in failing(tmp_path, ("run_clm",), CONFIG)
    shutil.copytree(uninterrupted / "processed", tmp_path / "processed")
    line = failing(tmp_path, ("eval_det_router",), CONFIG)
    assert "python train_det_router.py CONFIG" in line
    shutil.copytree(uninterrupted / "runs/n2/router", tmp_path / "runs/n2/router")
    line = failing(tmp_path, ("unlearn_benchmarks",), CONFIG, *WORK)
    assert "python run_clm.py CONFIG partition.index=0" in line
    assert not (tmp_path / "runs/n2/models").exists()


def test_a_damaged_model_is_refused_and_named(uninterrupted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted, folder)
    path = folder / "runs/n2/models/1/model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(bytes(content))
    line = failing(folder, ("eval_det_router",), CONFIG, *WORK)
    assert "models/1/model.safetensors: changed since it was written" in line


def test_what_another_config_made_is_not_scored(uninterrupted, tmp_path):
    """Each changed section names the stage to run again; nothing in the folder is touched."""
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted, folder)
    before = tree_hashes(folder / "runs/n2")
    line = failing(folder, ("eval_det_router",), CONFIG, *WORK, "router.learning_rate=1e-3")
    assert "runs/n2/router: made from another config" in line and "train_det_router.py" in line
    line = failing(folder, ("unlearn_benchmarks",), CONFIG, *WORK, "training.learning_rate=1e-3")
    assert "runs/n2/models/0: trained from another config" in line
    assert "python run_clm.py CONFIG partition.index=0" in line
    assert tree_hashes(folder / "runs/n2") == before


def test_a_diverged_model_is_one_line_and_never_published(uninterrupted, tmp_path):
    for name in ("processed", "configs"):
        shutil.copytree(uninterrupted / name, tmp_path / name)
    hot = ("training.learning_rate=1e30", "training.max_grad_norm=1e30")
    line = failing(tmp_path, ("run_clm",), CONFIG, *hot)
    assert "n2 partition 0" in line and "the training loss is nan at step" in line
    assert not (tmp_path / "runs/n2/models").exists()
    assert not [p for p in tmp_path.glob("runs/.store/models/*/model.safetensors")]


def test_a_vocabulary_beyond_the_embedding_is_refused(uninterrupted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted / "processed", folder / "processed")
    shutil.copytree(uninterrupted / "configs", folder / "configs")
    line = failing(folder, ("run_clm",), CONFIG, "model.vocab_size=100")
    assert "model.vocab_size: 100 is smaller than the tokenizer (400 tokens)" in line
    line = failing(folder, ("run_clm",), CONFIG, "model.moe_topk=9")
    assert "moe_topk" in line and "9" in line


def test_an_unwritable_folder_is_one_line_and_keeps_what_was_there(uninterrupted, tmp_path):
    """Even root cannot write below a file that stands where a folder should be."""
    folder = tmp_path / "copy"
    shutil.copytree(uninterrupted, folder)
    before = (folder / "runs/n2/eval/utility.json").read_bytes()
    shutil.rmtree(folder / "runs/.store/scores")
    (folder / "runs/.store/scores").write_text("in the way")
    line = failing(folder, ("eval_det_router",), CONFIG, *WORK, "overwrite=true")
    assert "scores" in line
    assert (folder / "runs/n2/eval/utility.json").read_bytes() == before


def test_a_full_disk_while_saving_leaves_nothing_half_written(uninterrupted, tmp_path):
    """Model, then router: one line, no folder under the final name, and the next run is whole."""
    for name in ("processed", "configs"):
        shutil.copytree(uninterrupted / name, tmp_path / name)
    store = tmp_path / "runs/.store"
    whole = uninterrupted / "runs/n2"
    size = (whole / "models/0/model.safetensors").stat().st_size
    work = (*WORK, "training.save_steps=0")
    for stage, kind in (("run_clm", "models"), ("train_det_router", "embedders")):
        line = failing(tmp_path, (stage,), CONFIG, *work, largest_file=size // 2)
        assert "File too large" in line
        assert [p for p in (store / kind).rglob("*") if p.is_file()] == []
    run_stages(tmp_path, ("run_clm",), CONFIG, *work)
    for k in ("0", "1"):
        found = tree_hashes(tmp_path / "runs/n2/models" / k)
        assert found == tree_hashes(whole / "models" / k)


def test_published_folders_verify(uninterrupted):
    found = [p.parent for p in uninterrupted.rglob("hashes.json") if is_complete(p.parent)]
    assert len(found) > 10
    for folder in found:
        verify(folder)
    assert (
        read_json(uninterrupted / "runs/n2/record.json")["run_clm"]["environment"]["threads"] == 1
    )
