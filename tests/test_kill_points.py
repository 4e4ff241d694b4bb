"""SIGKILL at random points of every stage: what is made in the end is what a calm run makes.

More of them: `KILL_POINTS=60 python -m pytest tests/test_kill_points.py -m slow -s`.
"""

import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import STAGES, run_stages, start_stages, tiny_project
from tests.forks import Forked, fork
from tiered.store import TIMINGS, file_hash, is_complete

CONFIG = "configs/n2.yaml"
WORK = ("training.num_train_epochs=2", "training.save_steps=5", "router.num_train_epochs=4")
POOLED = {"process_dset": "data.num_proc=2", "run_clm": "training.num_proc=2"}
RESUMED = "resuming from step"


@dataclass
class Calm:
    """A stage of an undisturbed run: the project before and after it, seconds, operations."""

    before: Path
    after: dict[str, str]
    seconds: float
    operations: int


def made(folder: Path) -> dict[str, str]:
    """Hash of every file that the stages made, by path; what may differ between equal runs is left
    out: times, and whose turn it is."""
    return {
        path.relative_to(folder).as_posix(): file_hash(path)
        for root in ("processed", "runs")
        for path in sorted((folder / root).rglob("*"))
        if path.is_file() and path.name != TIMINGS and ".locks" not in path.parts
    }


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> dict[str, Calm]:
    """Every stage, undisturbed."""
    folder = tmp_path_factory.mktemp("calm") / "project"
    folder.mkdir()
    tiny_project(folder)
    found = {}
    for stage in STAGES:
        before = folder.with_name(f"before-{stage}")
        shutil.copytree(folder, before)
        begin = time.monotonic()
        process = fork(folder, [stage], [CONFIG, *WORK], count_to=str(before / "operations"))
        output, _ = process.communicate()
        assert process.returncode == 0, output
        seconds = time.monotonic() - begin
        found[stage] = Calm(before, made(folder), seconds, int((before / "operations").read_text()))
    return found


def killed(folder: Path, stage: str, calm: Calm, chance: random.Random) -> str | None:
    """Kill a stage at a random moment, or before a random write; how, None if it was quicker."""
    way = chance.choice(["moment", "operation", *(["pool"] if stage in POOLED else [])])
    if way == "operation":
        at = chance.randrange(calm.operations)
        process = fork(folder, [stage], [CONFIG, *WORK], kill_at=at)
        where = f"operation {at} of {calm.operations}"
    else:
        more = (POOLED[stage],) if way == "pool" else ()
        process = start_stages(folder, (stage,), CONFIG, *WORK, *more)
        at = chance.uniform(0, calm.seconds * (2 if way == "pool" else 1))
        deadline = time.monotonic() + at
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        where = f"{way} {at:.3f} s of {calm.seconds:.3f}"
    output, _ = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), output
    return where if process.returncode else None


def unpublished(checkpoint: Path) -> bool:
    """Whether a whole checkpoint is of a model that is not published yet."""
    model = checkpoint.parents[2] / checkpoint.parent.name
    return is_complete(checkpoint) and not is_complete(model)


def recovered(folder: Path, stage: str, calm: Calm, seed: int) -> int:
    """Kill a stage once or several times, and let it end; how many kills it had. Fails unless what
    is there then is what the calm run made, byte for byte."""
    chance, points = random.Random(seed), []
    shutil.copytree(calm.before, folder)
    while not points or chance.random() < 0.3:  # a recovery can be killed as well
        where = killed(folder, stage, calm, chance)
        points += [where] if where else []
        if not where:  # it had ended: begin again
            shutil.rmtree(folder)
            shutil.copytree(calm.before, folder)
            points.clear()
    saved = any(map(unpublished, folder.glob("runs/.store/*/.checkpoints/*/checkpoint-*")))
    output = run_stages(folder, (stage,), CONFIG, *WORK)
    told = f"{stage}, seed {seed}, killed at {points}\n{output}"
    print(f"{stage}: {'; '.join(points)}")
    assert made(folder) == calm.after, told
    assert (RESUMED in output) == saved, told
    shutil.rmtree(folder)
    return len(points)


def kill_points(calm: dict[str, Calm], folder: Path, count: int, first: int) -> Counter[str]:
    """Kills by stage, at least `count` of them, each stage as often as the others."""
    kills: Counter[str] = Counter()
    seed = first
    while sum(kills.values()) < count or min(kills[s] for s in STAGES) < count // len(STAGES):
        stage = STAGES[seed % len(STAGES)]
        kills[stage] += recovered(folder / f"{seed}", stage, calm[stage], seed)
        seed += 1
    return kills


def test_a_kill_in_every_stage_changes_no_result(calm, tmp_path):
    kills = kill_points(calm, tmp_path, len(STAGES), first=0)
    assert set(kills) == set(STAGES)


@pytest.mark.slow
def test_many_kills_change_no_result(calm, tmp_path):
    count = int(os.environ.get("KILL_POINTS", "30"))
    kills = kill_points(calm, tmp_path, count, first=1000)
    print(f"{sum(kills.values())} kills, all recovered: {dict(kills)}")
    assert sum(kills.values()) >= count


def test_the_injected_kill_kills(calm, tmp_path):
    """Before the first write nothing is there; a count beyond the last one kills nothing."""
    shutil.copytree(calm["process_dset"].before, tmp_path / "a")
    for at, code in ((0, -signal.SIGKILL), (10**9, 0)):
        process: Forked = fork(tmp_path / "a", ["process_dset"], [CONFIG], kill_at=at)
        process.communicate()
        assert process.returncode == code
        assert (tmp_path / "a/processed").exists() == (code == 0)
