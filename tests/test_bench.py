"""The bench measures: a contender against itself is even, more work takes longer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZES = ["--hidden=32", "--experts=8", "--layers=2", "--heads=2", "--topk=2"]


def race_of(case: str, *options: str, folder: Path) -> tuple[list[dict], str]:
    """Rows of a bench's one race on one thread, and what it printed."""
    command = [sys.executable, ROOT / "scripts/bench.py", case, "--threads=1", *options]
    done = subprocess.run(
        [*command, "--json", folder / "x.json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (race,) = json.loads((folder / "x.json").read_text())["races"]
    return race["rows"], done.stdout


def test_a_contender_against_itself_is_even_and_all_logits_cost_memory(tmp_path):
    """`reference` is our own file here: another process, the same work. The bound is wide for
    machines that others share."""
    options = [*SIZES, "--vocab=20000", "--tokens=1024", "--rounds=9", "--only", "plain loss"]
    options += ["--reference", str(ROOT / "modeling_monet.py")]
    found, printed = race_of("train-step", *options, folder=tmp_path)
    rows = {row["contender"]: row for row in found}
    assert list(rows) == ["ours", "plain loss", "reference"]
    assert rows["ours"]["time_ratio"] == 1
    assert 0.6 < rows["reference"]["time_ratio"] < 1.6
    assert 0.9 < rows["reference"]["memory_ratio"] < 1.1
    # 1,023 x 20,000 logits in float32 are 82 MB
    more = rows["plain loss"]["peak_bytes"] - rows["ours"]["peak_bytes"]
    assert more > 82e6
    assert "| plain loss |" in printed


def test_paths_are_timed_by_number_of_partitions(tmp_path):
    """Rows of 64 partitions are scored a model at a time, with what that costs beside the models:
    it takes longer than for one."""
    options = ["--path=score", "--partitions", "1", "64", "--tokens=4096", "--length=64"]
    rows, _ = race_of("scaling", *options, "--rounds=5", folder=tmp_path)
    assert [row["contender"] for row in rows] == ["1", "64"]
    assert rows[1]["time_ratio"] > 1.2


def test_the_recorder_and_the_pass_without_it_take_turns_in_one_process(tmp_path):
    """Peak memory tells that it is one process: it is that of both."""
    options = [*SIZES, "--vocab=500", "--tokens=1024", "--rounds=5"]
    rows, _ = race_of("recorder", *options, folder=tmp_path)
    assert [row["contender"] for row in rows] == ["ours", "forward"]
    assert rows[1]["memory_ratio"] == pytest.approx(1, abs=0.02)
    assert rows[1]["time_ratio"] < 1


@pytest.mark.parametrize("path", ["route", "mix", "score", "documents", "clusters"])
def test_every_path_runs(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench_scaling import scaling_step

    sizes = {"path": path, "tokens": 64, "length": 16, "hidden": 8, "vocab": 50}
    for n in ("1", "4"):
        scaling_step(n, sizes)()
