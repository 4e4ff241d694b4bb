"""A bit changes in something that is stored: the next call says so or makes it anew, never uses it.

More of them: `BIT_FLIPS=500 python -m pytest tests/test_bit_flips.py -m slow -s`.
"""

import os
import random
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import STAGES, run_stages, start_stages, tiny_project
from tests.forks import fork
from tests.test_kill_points import made

SETTINGS = (
    "eval.expert_rows=2",
    "training.routing_steps=10",
    "unlearn.operations=[original,gold,delete-S1,mask-skew,GA]",
    "unlearn.robustness=[relearn,int4]",
    "unlearn.compartments=true",
    "unlearn.relearn_steps=2",
    "unlearn.max_steps=4",
)
CONFIGS = ("configs/n2.yaml", "configs/k4.yaml")
REPORT = ("tiered.report", ["runs/n2", "runs/k4", "--output", "report"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Two finished runs, one of clusters of documents, with all that a run can hold."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    folder.mkdir()
    tiny_project(folder)
    run_stages(folder, STAGES, *CONFIGS, *SETTINGS)
    run_stages(folder, [REPORT[0]], *REPORT[1])
    return folder


def kind(path: Path, folder: Path) -> str:
    """A file's place in the layout, without what tells it from others of its kind."""
    name = path.relative_to(folder).as_posix()
    name = re.sub(r"[0-9a-f]{16}", "H", name)
    name = re.sub(r"/(n2|k4)/", "/RUN/", re.sub(r"/(hi|si|de|en)([/.])", r"/D\2", name))
    return re.sub(r"\d+", "0", name)


def by_kind(folder: Path, roots: tuple[str, ...] = ("processed", "runs")) -> dict[str, list[Path]]:
    """Files that are not empty, one name of each, by kind."""
    found: dict[str, list[Path]] = {}
    seen = set()
    for root in roots:
        for path in sorted((folder / root).rglob("*")):
            state = path.lstat()
            if path.is_file() and state.st_size and state.st_ino not in seen:
                if ".locks" not in path.parts:
                    found.setdefault(kind(path, folder), []).append(path)
                seen.add(state.st_ino)
    return found


def copied(source: Path, target: Path) -> None:
    """A copy whose files are as many, under as many names, as the original's."""
    subprocess.run(["cp", "-a", source, target], check=True)


def flip(path: Path, chance: random.Random) -> str:
    """Change one bit of a file in place."""
    content = bytearray(path.read_bytes())
    byte, bit = chance.randrange(len(content)), chance.randrange(8)
    content[byte] ^= 1 << bit
    path.write_bytes(bytes(content))
    return f"bit {bit} of byte {byte} of {len(content)}"


def told(output: str) -> str | None:
    """The error line of a call that ended with one."""
    (line,) = [x for x in output.splitlines() if ": error: " in x] or [None]
    return line


def outcome(folder: Path, path: Path, calm: dict[str, str]) -> str:
    """What a rerun of everything makes of a damaged file: `named` in an error, `made anew`, `not
    read` (the damage is still there, the results are right), or what is wrong."""
    damage = path.read_bytes()
    for stages, arguments in ((list(STAGES), [*CONFIGS, *SETTINGS]), ([REPORT[0]], REPORT[1])):
        process = fork(folder, stages, arguments)
        output, _ = process.communicate()
        if process.returncode == 2:
            line, place = told(output), path.relative_to(folder)
            # by its name, or by that of one of the folders it lies in
            names = [place.as_posix(), *(p.as_posix() for p in list(place.parents)[:-2])]
            inode = path.stat().st_ino
            names += [
                p.relative_to(folder).as_posix()
                for p in folder.rglob(place.name)
                if p.stat().st_ino == inode
            ]
            return "named" if any(f"{name}" in line for name in names) else f"WRONG NAME: {line}"
        if process.returncode:
            return f"CRASH: {output[-3000:]}"
    found, name = made(folder), path.relative_to(folder).as_posix()
    same = path.is_file() and path.read_bytes() == damage
    wrong = sorted(n for n in calm | found if calm.get(n) != found.get(n))
    if same and all(os.path.samefile(folder / n, path) for n in wrong if (folder / n).exists()):
        return "not read"
    return "made anew" if not wrong else f"SILENT: {name}: {wrong[:5]}"


def rebuilt(folder: Path, path: Path, calm: dict[str, str]) -> str:
    """What becomes of damage that a rerun does not read when everything that it may have been made
    into is gone: runs and processed data, not the store."""
    for run in ("n2", "k4"):
        shutil.rmtree(folder / "runs" / run, ignore_errors=path.is_relative_to(folder / "runs"))
    for made_of in (folder / "processed").glob("[!.]*"):
        shutil.rmtree(made_of)
    return outcome(folder, path, calm) if path.exists() else "removed"


def flips(finished: Path, folder: Path, count: int, seed: int) -> Counter[str]:
    """Outcomes of flips, over every kind of file in turn."""
    calm, outcomes = made(finished), Counter()
    kinds = sorted(by_kind(finished))
    chance = random.Random(seed)
    chance.shuffle(kinds)
    wrong = []
    for i in range(count):
        place = kinds[i % len(kinds)]
        target = folder / "project"
        copied(finished, target)
        path = chance.choice(by_kind(target)[place])
        where = flip(path, chance)
        result = outcome(target, path, calm)
        if result == "not read":
            result = f"not read, then {rebuilt(target, path, calm)}"
        print(f"{i}: {path.relative_to(target)}, {where}: {result}", flush=True)
        if any(word in result for word in ("SILENT", "CRASH", "WRONG")):
            wrong.append(f"{path.relative_to(target)}, {where}: {result}")
            result = "wrong"
        outcomes[result] += 1
        shutil.rmtree(target)
    print(f"{count} flips in {len(kinds)} kinds of files: {dict(outcomes)}")
    assert not wrong, "\n".join(wrong)
    return outcomes


def test_changed_bits_are_noticed(finished, tmp_path):
    assert sum(flips(finished, tmp_path, 8, seed=0).values()) == 8


@pytest.mark.slow
def test_many_changed_bits_are_noticed(finished, tmp_path):
    count = int(os.environ.get("BIT_FLIPS", "200"))
    outcomes = flips(finished, tmp_path, count, seed=1)
    assert sum(outcomes.values()) == count and outcomes["named"] > count // 4


@pytest.mark.slow
def test_changed_bits_of_a_checkpoint_are_noticed(finished, tmp_path):
    """Training goes on from the checkpoint before, or from the beginning, to the same model."""
    begun, calm = tmp_path / "begun", made(finished)
    copied(finished, begun)
    shutil.rmtree(begun / "runs")
    run_stages(begun, ("train_det_router",), CONFIGS[0], *SETTINGS)
    process = start_stages(begun, ("run_clm",), CONFIGS[0], *SETTINGS, "training.save_steps=5")
    while len(found := list(begun.glob("runs/.store/models/.checkpoints/*/checkpoint-*"))) < 2:
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert found
    chance, outcomes = random.Random(2), Counter()
    for i in range(int(os.environ.get("CHECKPOINT_FLIPS", "24"))):
        folder = tmp_path / f"{i}"
        copied(begun, folder)
        files = sorted(folder.glob("runs/.store/models/.checkpoints/*/checkpoint-*/*"))
        path = chance.choice(files)
        where = flip(path, chance)
        output = run_stages(folder, ("run_clm",), CONFIGS[0], *SETTINGS, "training.save_steps=5")
        result = "skipped" if "checkpoint skipped" in output else "not used"
        print(f"{path.name}, {where}: {result}")
        assert result == "skipped" or path.name == "timings.json", output
        outcomes[result] += 1
        now = made(folder)
        assert {n: h for n, h in now.items() if "/models/" in n} == {
            n: h for n, h in calm.items() if n in now and "/models/" in n
        }, f"{path}, {where}"
        shutil.rmtree(folder)
    print(dict(outcomes))
