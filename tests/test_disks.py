"""Real file systems that are full or cannot be written, and clocks that are wrong."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import STAGES, run_stages, start_stages, tiny_project
from tests.forks import fork
from tests.test_damage import told
from tests.test_kill_points import made

CONFIG = "configs/n2.yaml"


def mount(*options: str) -> None:
    done = subprocess.run(["mount", *options], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here ({done.stderr.strip()})")


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """A finished run on a disk that has room."""
    folder = tmp_path_factory.mktemp("calm")
    tiny_project(folder)
    run_stages(folder, STAGES, CONFIG)
    return folder


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 MiB with the tiny project's text and configs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
    try:
        tiny_project(folder)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def used(folder: Path) -> int:
    return shutil.disk_usage(folder).used


@pytest.mark.parametrize(
    "share", [0.5, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.05, 0.2, 0.35, 0.7, 0.9))]
)
def test_a_full_disk_is_one_line_and_room_is_all_it_takes(share, calm, disk):
    """The disk has room for a share of what the stages make; then it has more."""
    full = used(disk) + int(share * sum(p.stat().st_size for p in made_files(calm)))
    mount("-o", f"remount,size={full}", str(disk))
    process = start_stages(disk, STAGES, CONFIG)
    output, _ = process.communicate()
    assert process.returncode == 2 and "No space left on device" in told(output), output
    assert "Traceback" not in output
    assert not list(disk.glob("runs/**/*.lock"))
    mount("-o", "remount,size=64m", str(disk))
    run_stages(disk, STAGES, CONFIG)
    check(disk, calm)


def check(folder: Path, calm: Path) -> None:
    """The same files; the record, which has the calls, apart."""
    record = {"runs/n2/record.json": ""}
    assert made(folder) | record == made(calm) | record


def made_files(folder: Path) -> list[Path]:
    """Files of the run that take room: one name of each."""
    found = {
        p.stat().st_ino: p for root in ("processed", "runs/n2") for p in folder.glob(f"{root}/**/*")
    }
    return [p for p in found.values() if p.is_file()]


def test_a_disk_that_cannot_be_written_is_one_line_and_stays_as_it_is(calm, disk):
    """A finished project on a read-only file system: every stage says so; the report, which reads,
    is made elsewhere."""
    for name in ("processed", "runs/n2", "runs/.store"):
        shutil.copytree(calm / name, disk / name)
    before = made(disk)
    mount("-o", "remount,ro", str(disk))
    for stage in STAGES[1:]:
        process = start_stages(disk, (stage,), CONFIG)
        output, _ = process.communicate()
        line = told(output)
        assert process.returncode == 2 and "Read-only file system" in line, output
        assert "runs/n2" in line, line
    # all of its data is there: nothing to write but the manifest
    process = start_stages(disk, STAGES[:1], CONFIG)
    output, _ = process.communicate()
    assert process.returncode == 0 or "Read-only file system" in told(output), output
    assert made(disk) == before
    report = disk.parent / "report"
    process = fork(disk, ["tiered.report"], ["runs/n2", "--output", str(report)])
    output, _ = process.communicate()
    assert process.returncode == 0 and (report / "index.html").is_file(), output


def test_clocks_that_differ_by_years_change_nothing(calm, tmp_path):
    """Each stage in a process whose clock is elsewhere, as tasks on several machines have them."""
    tiny_project(tmp_path)
    day = 86_400
    for stage, off in zip(STAGES, (-4000 * day, 3 * day, -2 * day, 4000 * day, 0), strict=True):
        process = fork(tmp_path, [stage], [CONFIG], clock_off=off)
        output, _ = process.communicate()
        assert process.returncode == 0, output
    check(tmp_path, calm)
    for off in (-4000 * day, 4000 * day):  # nothing is made again, either
        process = fork(tmp_path, list(STAGES), [CONFIG], clock_off=off)
        output, _ = process.communicate()
        assert process.returncode == 0, output
    check(tmp_path, calm)
