"""The bench measures: a contender against itself is even, more work takes longer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_a_contender_against_itself_is_even_and_all_logits_cost_memory(tmp_path):
    """`reference` is our own file here: another process, the same work. The bound is wide for
    machines that others share."""
    sizes = {"hidden": 32, "experts": 8, "vocab": 20_000, "layers": 2, "heads": 2, "topk": 2}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    options += ["--tokens=1024", "--threads=1", "--rounds=9", "--only", "plain loss"]
    options += ["--reference", ROOT / "modeling_monet.py", "--json", tmp_path / "x.json"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/bench.py", "train-step", *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (race,) = json.loads((tmp_path / "x.json").read_text())["races"]
    rows = {row["contender"]: row for row in race["rows"]}
    assert list(rows) == ["ours", "plain loss", "reference"]
    assert rows["ours"]["time_ratio"] == 1
    assert 0.6 < rows["reference"]["time_ratio"] < 1.6
    assert 0.9 < rows["reference"]["memory_ratio"] < 1.1
    # 1,023 x 20,000 logits in float32 are 82 MB
    more = rows["plain loss"]["peak_bytes"] - rows["ours"]["peak_bytes"]
    assert more > 82e6
    assert "| plain loss |" in done.stdout


def test_paths_are_timed_by_number_of_partitions(tmp_path):
    """Rows of 64 partitions are scored a model at a time, with what that costs beside the models:
    it takes longer than for one."""
    options = ["--path=score", "--partitions", "1", "64", "--tokens=4096", "--length=64"]
    options += ["--rounds=5", "--threads=1", "--json", tmp_path / "x.json"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/bench.py", "scaling", *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (race,) = json.loads((tmp_path / "x.json").read_text())["races"]
    assert [row["contender"] for row in race["rows"]] == ["1", "64"]
    assert race["rows"][1]["time_ratio"] > 1.2


def test_the_recorder_and_the_pass_without_it_take_turns_in_one_process(tmp_path):
    """Peak memory tells that it is one process: it is that of both."""
    sizes = {"hidden": 32, "experts": 8, "vocab": 500, "layers": 2, "heads": 2, "topk": 2}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    options += ["--tokens=1024", "--threads=1", "--rounds=5", "--json", tmp_path / "x.json"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/bench.py", "recorder", *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (race,) = json.loads((tmp_path / "x.json").read_text())["races"]
    assert [row["contender"] for row in race["rows"]] == ["ours", "forward"]
    assert race["rows"][1]["memory_ratio"] == pytest.approx(1, abs=0.02)
    assert race["rows"][1]["time_ratio"] < 1


@pytest.mark.parametrize("path", ["route", "mix", "score", "documents", "clusters"])
def test_every_path_runs(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench_scaling import scaling_step

    sizes = {"path": path, "tokens": 64, "length": 16, "hidden": 8, "vocab": 50}
    for n in ("1", "4"):
        scaling_step(n, sizes)()
