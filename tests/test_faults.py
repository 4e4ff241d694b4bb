"""SIGKILL during each stage, damaged artefacts, full disks: nothing lost, nothing half-written."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import STAGES, run_stages, start_stages, tiny_project
from tiered import checkpoint
from tiered.store import is_complete, read_json, tree_hashes, verify

# Enough work per stage that a poll of a few milliseconds finds it under way.
WORK = ("training.num_train_epochs=4", "training.save_steps=5", "router.num_train_epochs=6")
CONFIG = "configs/n2.yaml"


def kill_when(folder: Path, stage: str, under_way: Callable[[], bool], *more: str) -> None:
    """Start a stage, wait until it is demonstrably at work, and kill -9 its whole group."""
    process = start_stages(folder, (stage,), CONFIG, *WORK, *more)
    deadline = time.monotonic() + 240
    while not under_way():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"{stage}: no sign of work"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    tiny_project(folder)
    run_stages(folder, STAGES, CONFIG, *WORK)
    return folder


def test_a_kill_in_every_stage_changes_no_result(uninterrupted, tmp_path):
    tiny_project(tmp_path)
    runs, store = tmp_path / "runs/n2", tmp_path / "runs/.store"
    cases = {
        "process_dset": (
            lambda: any(tmp_path.glob("processed/.clean/*/.*.tmp*")),
            lambda: any(tmp_path.glob("processed/*/manifest.json")),
        ),
        "train_det_router": (
            lambda: any(store.glob("embedders/.checkpoints/*/checkpoint-*/hashes.json")),
            lambda: (runs / "router").exists(),
        ),
        "run_clm": (
            lambda: any(store.glob("models/.checkpoints/*/checkpoint-*/hashes.json")),
            lambda: (runs / "models/0").exists(),
        ),
        "eval_det_router": (
            lambda: any(store.glob("scores/*/*.safetensors")),
            lambda: (runs / "eval/utility.json").exists(),
        ),
        "unlearn_benchmarks": (
            lambda: any(store.glob("models/.checkpoints/*/checkpoint-*/hashes.json")),
            lambda: (runs / "metrics.json").exists(),
        ),
    }
    for stage, (under_way, finished) in cases.items():
        # worker processes are killed and resumed as well
        more = ("training.num_proc=2",) if stage == "run_clm" else ()
        kill_when(tmp_path, stage, under_way, *more)
        assert under_way() and not finished(), f"{stage}: killed too late to prove anything"
        output = run_stages(tmp_path, (stage,), CONFIG, *WORK, *more)
        assert finished(), output
        if stage in ("train_det_router", "run_clm", "unlearn_benchmarks"):
            assert "resuming from step" in output, output
    for name in ("models/0", "models/1", "router", "eval", "unlearn/hi/gold/system"):
        assert tree_hashes(runs / name) == tree_hashes(uninterrupted / "runs/n2" / name), name
    assert (runs / "metrics.json").read_bytes() == (
        uninterrupted / "runs/n2/metrics.json"
    ).read_bytes()
    leftovers = [p for p in tmp_path.rglob(".*.tmp*")]
    assert leftovers == []


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, capsys):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step:08d}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * step)
        hashes = tree_hashes(folder)
        (folder / "hashes.json").write_text(json.dumps(hashes))
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
