"""Something that is stored loses a bit, its end, or is gone: the next call says so or makes it
anew, and never uses it.

More of it: `BIT_FLIPS=500 SEED=2 python -m pytest tests/test_damage.py -m slow -s -k flip`;
`REPORT_FILES=240 ... -k report_says` damages every kind of file of a run for the report alone.
"""

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import STAGES, copied, run_stages, start_stages, tiny_project
from tests.forks import fork
from tests.test_kill_points import made
from tiered.store import file_hash

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
REPORT = (("tiered.report",), ("runs/n2", "runs/k4", "--output", "report"))


@dataclass
class Calm:
    """A finished project, and the calls that made it: hashes of what they made and of the report,
    and all names of each file."""

    folder: Path
    calls: Sequence
    made: dict[str, str]
    report: dict[str, str]
    names: dict[str, set[Path]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Calm:
    """Two finished runs, one of clusters of documents, with all that a run can hold."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    folder.mkdir()
    tiny_project(folder)
    return calm_of(folder, SETTINGS)


def calm_of(folder: Path, settings: Sequence[str]) -> Calm:
    calls = ((STAGES, (*CONFIGS, *settings)), REPORT)
    for stages, arguments in calls:
        run_stages(folder, stages, *arguments)
    by_inode: dict[int, set[Path]] = {}
    for path in folder.rglob("*"):
        by_inode.setdefault(path.stat().st_ino, set()).add(path.relative_to(folder))
    names = {p.as_posix(): paths for paths in by_inode.values() for p in paths}
    return Calm(folder, calls, made(folder), hashed(folder / "report"), names)


def hashed(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): file_hash(p) for p in folder.rglob("*") if p.is_file()
    }


def kind(path: Path, folder: Path) -> str:
    """A file's place in the layout, without what tells it from others of its kind."""
    name = path.relative_to(folder).as_posix()
    name = re.sub(r"[0-9a-f]{16}", "H", name)
    name = re.sub(r"/(hi|si|de|en)([/.])", r"/D\2", name)
    return re.sub(r"\d+", "0", name)


def by_kind(folder: Path, *roots: str) -> dict[str, list[Path]]:
    """Files that are not empty, one name of each, by kind."""
    found: dict[str, list[Path]] = {}
    seen = set()
    for root in roots or ("processed", "runs"):
        for path in sorted((folder / root).rglob("*")):
            state = path.lstat()
            if path.is_file() and state.st_size and state.st_ino not in seen:
                if ".locks" not in path.parts:
                    found.setdefault(kind(path, folder), []).append(path)
                seen.add(state.st_ino)
    return found


def flip(path: Path, chance: random.Random) -> str:
    """Change one bit of a file in place."""
    content = bytearray(path.read_bytes())
    byte, bit = chance.randrange(len(content)), chance.randrange(8)
    content[byte] ^= 1 << bit
    path.write_bytes(bytes(content))
    return f"bit {bit} of byte {byte} of {len(content)}"


def cut(path: Path, chance: random.Random) -> str:
    """Leave a file's beginning, as a copy that was broken off does."""
    length = path.stat().st_size
    left = chance.randrange(length)
    os.truncate(path, left)
    return f"{left} of {length} bytes left"


def remove(path: Path, chance: random.Random) -> str:
    """Remove a file, as a copy that left it out does; under one name of several."""
    path.unlink()
    return "removed"


def told(output: str) -> str | None:
    """The error line of a call that ended with one."""
    (line,) = [x for x in output.splitlines() if ": error: " in x] or [None]
    return line


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def outcome(folder: Path, path: Path, calm: Calm, calls: Sequence) -> str:
    """What calls make of a damaged file: `named` in an error, `made anew`, `not read` (the damage
    is still there, all else is right), or what is wrong. A report names what is missing and has the
    rest."""
    damage, place = content(path), path.relative_to(folder)
    # every name of the file; or a published folder that it lies in
    names = {place, *calm.names[place.as_posix()]}
    names |= {p for n in names for p in n.parents if (calm.folder / p / "hashes.json").is_file()}
    for stages, arguments in calls:
        process = fork(folder, list(stages), list(arguments))
        output, _ = process.communicate()
        if process.returncode == 2:
            line = told(output)
            return "named" if any(str(n) in line for n in names) else f"WRONG NAME: {line}"
        if process.returncode:
            return f"CRASH: {output[-3000:]}"
    found = made(folder)
    wrong = {n for n in calm.made | found if calm.made.get(n) != found.get(n)}
    if calls == (REPORT,):
        if any(f"{n} is missing: what it holds is not in the report" in output for n in names):
            return "named"
        pages = {n for n, h in calm.report.items() if h != hashed(folder / "report").get(n)}
        return f"SILENT: {place}: {sorted(pages)[:5]}" if pages else "not read"
    if content(path) == damage and {Path(n) for n in wrong} <= names:
        return "not read"
    return "made anew" if not wrong else f"SILENT: {place}: {sorted(wrong)[:5]}"


def rebuilt(folder: Path, path: Path, calm: Calm) -> str:
    """What becomes of damage that a rerun does not read when everything that it may have been made
    into is gone: runs and processed data, not the store."""
    for run in ("n2", "k4"):
        shutil.rmtree(folder / "runs" / run)
    for made_of in (folder / "processed").glob("[!.]*"):
        shutil.rmtree(made_of)
    return outcome(folder, path, calm, calm.calls)


def harms(calm: Calm, folder: Path, count: int, seed: int, harm: Callable, *calls) -> Counter[str]:
    """Outcomes of harm done to every kind of file in turn."""
    outcomes: Counter[str] = Counter()
    roots = ("runs/n2", "runs/k4") if calls else ()  # a report reads no store
    kinds = sorted(by_kind(calm.folder, *roots))
    chance = random.Random(seed)
    chance.shuffle(kinds)
    wrong = []
    for i in range(count):
        target = folder / "project"
        copied(calm.folder, target)
        shutil.rmtree(target / "report")
        path = chance.choice(by_kind(target, *roots)[kinds[i % len(kinds)]])
        where = harm(path, chance)
        result = outcome(target, path, calm, calls or calm.calls)
        if result == "not read" and not calls:
            result = f"not read, then {rebuilt(target, path, calm)}"
        print(f"{i}: {path.relative_to(target)}, {where}: {result}", flush=True)
        if any(word in result for word in ("SILENT", "CRASH", "WRONG")):
            wrong.append(f"{path.relative_to(target)}, {where}: {result}")
            result = "wrong"
        outcomes[result] += 1
        shutil.rmtree(target)
    print(f"{harm.__name__}: {count} of {len(kinds)} kinds of files: {dict(outcomes)}")
    assert not wrong, "\n".join(wrong)
    return outcomes


def test_damage_is_noticed(tiny, tmp_path):
    copied(tiny, tmp_path / "tiny")
    calm = calm_of(tmp_path / "tiny", ())
    assert sum(harms(calm, tmp_path, 2, 0, flip).values()) == 2


def test_damaged_shards_are_not_merged(tmp_path):
    """What one machine has read and another merges: each kind of file of a shard, harmed."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    tiny_project(source, languages=("hi", "de"))
    arguments = (CONFIGS[0], "data.domains=[hi,de]", "data.repeat_domains=[]", "unlearn.forget=hi")
    read, merge = ("data.task=read",), ("data.task=merge",)
    run_stages(source, STAGES[:1], *arguments, *read)
    kinds = {k: f for k, f in by_kind(source, "processed").items() if "shards" in k}
    assert len(kinds) > 3, kinds
    for i, files in enumerate(kinds.values()):
        copied(source, target)
        path = target / files[0].relative_to(source)
        harm = (flip, cut, remove)[i % 3] if path.name != "hashes.json" else flip
        harm(path, random.Random(i))
        process = fork(target, ["process_dset"], [*arguments, *merge])
        output, _ = process.communicate()
        assert process.returncode == 2, (path, output)
        assert str(path.parent.relative_to(target)) in told(output), output
        shutil.rmtree(target)


@pytest.mark.slow
@pytest.mark.parametrize(("harm", "count"), [(flip, 200), (cut, 40), (remove, 40)])
def test_much_damage_is_noticed(harm, count, finished, tmp_path):
    count, seed = int(os.environ.get("BIT_FLIPS", count)), int(os.environ.get("SEED", "1"))
    outcomes = harms(finished, tmp_path, count, seed, harm)
    assert sum(outcomes.values()) == count and outcomes["named"] + outcomes["made anew"] > count / 2


@pytest.mark.slow
@pytest.mark.parametrize("harm", [flip, cut, remove])
def test_a_report_says_so_or_shows_what_it_showed(harm, finished, tmp_path):
    """The report alone, as on a machine that a run folder was copied to."""
    count = int(os.environ.get("REPORT_FILES", "40"))
    assert harms(finished, tmp_path, count, 3, harm, REPORT)["named"] > 5


@pytest.mark.slow
def test_changed_bits_of_a_checkpoint_are_noticed(finished, tmp_path):
    """Training goes on from the checkpoint before, or from the beginning, to the same model."""
    begun, calm = tmp_path / "begun", finished.made
    copied(finished.folder, begun)
    shutil.rmtree(begun / "runs")
    run_stages(begun, ("train_det_router",), CONFIGS[0], *SETTINGS)
    process = start_stages(begun, ("run_clm",), CONFIGS[0], *SETTINGS, "training.save_steps=5")
    while len(found := list(begun.glob("runs/.store/models/.checkpoints/*/checkpoint-*"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert found
    chance, outcomes = random.Random(2), Counter()
    for i in range(int(os.environ.get("CHECKPOINT_FLIPS", "24"))):
        folder = tmp_path / f"{i}"
        copied(begun, folder)
        newest = max(folder.glob("runs/.store/models/.checkpoints/*/checkpoint-*"))
        path = chance.choice(sorted(newest.iterdir()))
        where = flip(path, chance)
        output = run_stages(folder, ("run_clm",), CONFIGS[0], *SETTINGS, "training.save_steps=5")
        print(f"{path.name}, {where}")
        assert f"checkpoint skipped: {path.relative_to(folder).parent}" in output, output
        outcomes[path.name] += 1
        now = made(folder)
        models = "runs/n2/models/"
        assert {n: h for n, h in now.items() if n.startswith(models)} == {
            n: h for n, h in calm.items() if n.startswith(models)
        }, f"{path}, {where}"
        shutil.rmtree(folder)
    print(dict(outcomes))
