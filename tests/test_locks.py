"""Locks between processes: one owner at a time, dead owners, takeovers."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tiered import locks
from tiered.locks import locked
from tiered.store import UserError, machine, read_json

HERE = machine()
COUNTING = """
    import sys
    from pathlib import Path
    from tiered import locks
    for _ in range(25):
        locks.update_json(Path(sys.argv[1]), lambda v: {"count": v.get("count", 0) + 1})
"""
HOLDING = """
    import sys, time
    from pathlib import Path
    from tiered import locks
    with locks.locked(Path(sys.argv[1]), "the work"):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
"""


def start(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def foreign_lock(path: Path, owner: str, **more: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {"owner": owner, "started": "1", "since": "2026-01-01 00:00:00", "what": "their work"}
    path.write_text(json.dumps({**note, "token": "x", **more}))


def test_updates_of_four_processes_are_all_kept(tmp_path):
    path = tmp_path / "notes.json"
    processes = [start(COUNTING, path) for _ in range(4)]
    assert [p.wait(timeout=120) for p in processes] == [0] * 4
    assert read_json(path) == {"count": 100}
    assert [p.name for p in tmp_path.iterdir()] == ["notes.json"]


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    """The last owner removes it between another one's mkdir and its look at what is there."""
    faults, mkdir = [FileExistsError(), FileExistsError()], Path.mkdir
    monkeypatch.setattr(
        Path, "mkdir", lambda *a, **k: raised(faults.pop()) if faults else mkdir(*a, **k)
    )
    with locked(tmp_path / ".locks" / "x.lock", "mine"):
        assert not faults and (tmp_path / ".locks" / "x.lock").is_file()


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path):
    (tmp_path / ".locks").write_text("in the way")
    with pytest.raises(FileExistsError), locked(tmp_path / ".locks" / "x.lock", "mine"):
        pass


@pytest.mark.parametrize("where", ["gone/.locks", "gone/run/.locks"])
def test_a_link_that_leads_nowhere_is_an_error_and_no_waiting_for_ever(where, tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError), locked(tmp_path / where / "x.lock", "mine"):
        pass


def test_a_lock_that_cannot_be_written_is_not_there(tmp_path):
    """A full disk: the next owner does not wait for one who never was."""
    code = """
        import resource, sys
        from pathlib import Path
        from tiered import locks
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with locks.locked(Path(sys.argv[1]), "the work"):
            pass
    """
    path = tmp_path / ".locks" / "x.lock"
    assert start(code, path).wait(timeout=60) == 1
    assert not path.exists()
    with locked(path, "mine", wait=False) as waited:
        assert not waited


def test_an_owner_of_this_machine_that_is_stopped_keeps_its_lock(tmp_path, monkeypatch):
    """However long it gives no sign: its process is there."""
    monkeypatch.setattr(locks, "SILENCE", 0.2)
    path = tmp_path / ".locks" / "stage.lock"
    process = start(HOLDING, path, 0.1)
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    threading.Timer(1.5, process.send_signal, (signal.SIGCONT,)).start()
    with locked(path, "mine") as waited:
        assert waited and time.monotonic() - begin > 1.5
    assert process.wait(timeout=20) == 0 and not path.parent.exists()


def test_an_owner_whose_start_cannot_be_seen_lives_while_its_process_does(monkeypatch):
    """/proc of other users is hidden on some clusters (hidepid)."""
    note = {"owner": f"{os.getpid()}@{HERE}", "started": "1"}
    assert locks._lives_here(note) is False  # the number is another process' now
    monkeypatch.setattr(locks, "_started", lambda process: "")
    assert locks._lives_here(note) is True
    assert locks._lives_here({**note, "owner": f"{os.getpid()}@{HERE}.4026532000"}) is None


def raised(error: Exception) -> None:
    raise error


def test_a_living_owner_is_waited_for_or_named(tmp_path):
    path = tmp_path / ".locks" / "stage.lock"
    process = start(HOLDING, path, 2)
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=rf"the work: process {process.pid}@{HERE} is at it since"),
        locked(path, "mine", wait=False),
    ):
        pass
    begin = time.monotonic()
    with locked(path, "mine") as waited:
        assert waited and time.monotonic() - begin > 1
        assert json.loads(path.read_text())["owner"] == f"{os.getpid()}@{HERE}"
    assert not path.parent.exists() and process.wait(timeout=20) == 0


def test_a_killed_owner_is_taken_over_at_once(tmp_path):
    path = tmp_path / ".locks" / "stage.lock"
    process = start(HOLDING, path, 600)
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    assert path.exists()
    begin = time.monotonic()
    with locked(path, "mine", wait=False):
        assert time.monotonic() - begin < 10
    # a living process with the number of the owner that died is not the owner
    foreign_lock(path, f"{os.getpid()}@{HERE}")
    with locked(path, "mine", wait=False):
        pass
    assert not path.parent.exists()


@pytest.mark.parametrize("hours", [-48, 0, 48])
def test_another_machines_owner_lives_while_its_stamp_moves_whatever_the_clocks_say(
    hours, tmp_path, monkeypatch
):
    """Stamps that lie two days ahead or behind are signs of life as well as any."""
    monkeypatch.setattr(locks, "SILENCE", 1.0)
    path = tmp_path / "stage.lock"
    foreign_lock(path, "77@elsewhere")
    ended, stamps = threading.Event(), iter(range(10**6))

    def beat() -> None:
        while not ended.wait(0.1):
            moment = time.time() + 3600 * hours + next(stamps)
            os.utime(path, (moment, moment))

    thread = threading.Thread(target=beat)
    thread.start()
    with (
        pytest.raises(UserError, match="their work: process 77@elsewhere is at it since 2026"),
        locked(path, "mine", wait=False),
    ):
        pass
    ended.set()
    thread.join()
    begin = time.monotonic()
    with locked(path, "mine", wait=False):  # now it is silent
        assert 1 <= time.monotonic() - begin < 10


def test_a_lock_whose_owner_died_while_writing_it_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SILENCE", 0.5)
    path = tmp_path / "stage.lock"
    path.write_text("")
    with locked(path, "mine", wait=False):
        pass
    assert not path.exists()


def test_a_claim_whose_maker_died_holds_nobody_up_for_longer_than_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SILENCE", 0.5)
    path = tmp_path / ".locks" / "stage.lock"
    foreign_lock(path, f"99999999@{HERE}")
    (path.parent / ".stage.lock.x.0").touch()
    begin = time.monotonic()
    with locked(path, "mine"):
        assert 0.5 <= time.monotonic() - begin < 10
    assert not path.parent.exists()


def test_an_owner_shows_that_it_lives_and_leaves_what_is_no_longer_its_own(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    path = tmp_path / "stage.lock"
    with locked(path, "mine"):
        before = path.stat().st_mtime_ns
        time.sleep(0.5)
        assert path.stat().st_mtime_ns > before
        path.unlink()
        foreign_lock(path, "77@elsewhere")
    assert json.loads(path.read_text())["owner"] == "77@elsewhere"
    assert "mine: the lock went to another process" in capsys.readouterr().err


def test_of_eight_that_find_a_dead_owner_one_holds_the_lock_at_a_time(tmp_path):
    """Takeovers race: each notes when it came in and when it left, and no two overlap."""
    path = tmp_path / ".locks" / "stage.lock"
    foreign_lock(path, f"99999999@{HERE}")
    code = """
        import sys, time
        from pathlib import Path
        from tiered import locks
        with locks.locked(Path(sys.argv[1]), "x"):
            begin = time.monotonic_ns()
            time.sleep(0.1)
            print(begin, time.monotonic_ns())
    """
    processes = [start(code, path) for _ in range(8)]
    spans = sorted(tuple(map(int, p.communicate(timeout=120)[0].split())) for p in processes)
    assert len(spans) == 8
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), spans
