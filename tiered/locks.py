"""Locks between processes, on one machine or on several that share a file system.

A lock is a file that names its owner; while it is held its time stamp moves. An owner is dead when
its process is gone (on this machine) or, elsewhere (another host or container), when the stamp
has not moved for SILENCE seconds of the waiting process' own clock: no two clocks are compared, so
none of them has to be right. A dead owner's lock is taken over.
"""

import contextlib
import glob
import itertools
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiered.store import (
    UserError,
    machine,
    process_alive,
    read_json,
    remove_abandoned,
    temporary_of,
    write_json,
)

HEARTBEAT = 5.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one after which an owner counts as dead
LONGEST_PAUSE = 1.0  # seconds between two looks at a lock that is waited for
ATTEMPTS = 100  # to make a lock's file where its folder goes again and again
_Sign = tuple[int, int] | None


@contextlib.contextmanager
def locked(path: Path, what: str, wait: bool = True) -> Iterator[bool]:
    """Hold a lock; yields whether another owner's end was waited for.

    what: what it is for, in messages. Without `wait` a living owner is a UserError that says who it
    is and since when. Not for use twice in one process at a time.
    """
    note = {
        "owner": f"{os.getpid()}@{machine()}",
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "what": what,
        "token": uuid.uuid4().hex,
    }
    waited = _acquire(path, note, wait)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, note, ended), daemon=True)
    beat.start()
    try:
        yield waited
    finally:
        ended.set()
        beat.join()
        if _read(path).get("token") == note["token"]:
            path.unlink(missing_ok=True)
        else:
            print(
                f"{what}: the lock went to another process while this one gave no sign of life"
                f" ({path}); both may have done the same work",
                file=sys.stderr,
            )
        with contextlib.suppress(OSError):  # others hold theirs there
            path.parent.rmdir()


def update_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the mapping that a JSON file holds (none: empty) by what `change` makes of it; calls
    of several processes take turns."""
    with locked(path.parent / ".locks" / f"{path.name}.lock", str(path)):
        write_json(path, change(read_json(path) if path.is_file() else {}))


def _acquire(path: Path, note: dict[str, str], wait: bool) -> bool:
    waited, said, pause = False, False, 0.02
    seen, since, moved = None, time.monotonic(), False
    claims: dict[Path, float] = {}  # others' claims on a dead owner's lock, and when they were seen
    while not _create(path, note):
        sign, owner = _sign(path), _read(path)
        if sign != seen:
            moved = moved or (seen is not None and sign is not None and sign[0] == seen[0])
            seen, since = sign, time.monotonic()
            claims.clear()
        here = _lives_here(owner)
        silent = sign is not None and time.monotonic() - since > SILENCE
        if here is False or (here is None and silent):
            if _take_over(path, sign, owner, note, claims):
                return waited
        elif not wait and owner and (here or moved):
            raise UserError(
                f"{owner['what']}: process {owner['owner']} is at it since {owner['since']}; wait"
                f" for it, or end it (lock: {path})"
            )
        if time.monotonic() - since > LONGEST_PAUSE and not said and owner:
            print(f"{note['what']}: waiting for {owner['owner']} (since {owner['since']})")
            said = True
        waited = True
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return waited


def _take_over(
    path: Path, sign: _Sign, owner: dict[str, str], note: dict[str, str], claims: dict[Path, float]
) -> bool:
    """Put one's own lock in a dead owner's place; False while another process may be doing so.

    Who may is decided by claims, files named after the dead owner: each can be made once, and the
    next one only when nothing came of the one before for SILENCE seconds. So of all that find the
    owner dead one at a time acts, and what it replaces is the dead owner's lock.
    """
    name = owner.get("token") or f"{sign}"
    for number in itertools.count():
        claim = path.with_name(f".{path.name}.{name}.{number}")
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            if time.monotonic() - claims.setdefault(claim, time.monotonic()) <= SILENCE:
                return False
        except FileNotFoundError:  # the folder is gone, and the lock with it
            return False
    own = temporary_of(path)
    try:
        remove_abandoned(path.parent, path.name)
        own.write_text(json.dumps(note), encoding="utf-8")
        dead = _read(path) == owner and _sign(path) == sign
        if dead:
            os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)
        for old in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(name)}.*"):
            old.unlink(missing_ok=True)
    return dead


def _create(path: Path, note: dict[str, str]) -> bool:
    """Make the lock's file, whole from the start; False if there is one."""
    own = temporary_of(path)
    for attempt in range(ATTEMPTS):
        if path.exists():
            return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(note), encoding="utf-8")
            return _linked(own, path)
        except (FileExistsError, FileNotFoundError):
            # the folder may go, with its last lock, at any moment; something else may stand there
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.001)
        finally:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)
    raise AssertionError("unreachable")


def _linked(own: Path, path: Path) -> bool:
    """Give a file its name unless there is one of that name; whether it was given."""
    try:
        os.link(own, path)
        return True
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links: what is made there is empty for a moment
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(own, path)
        return True


def _beat(path: Path, note: dict[str, str], ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        if _read(path).get("token") == note["token"]:
            with contextlib.suppress(OSError):
                os.utime(path)


def _sign(path: Path) -> _Sign:
    """What changes when an owner gives a sign of life: (inode, time stamp); None without a lock."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def _read(path: Path) -> dict[str, str]:
    """What a lock says; empty where there is none, or its owner is just writing it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _lives_here(owner: dict[str, str]) -> bool | None:
    """Whether an owner on this machine lives; None for one elsewhere."""
    process, _, where = owner.get("owner", "").partition("@")
    if where != machine():
        return None
    started = _started(int(process))  # empty, too, where another user's process cannot be seen
    known = started and owner["started"]
    return process_alive(int(process)) and (not known or started == owner["started"])


def _started(process: int) -> str:
    """When a process was started, in the system's ticks; empty where the system does not say. A
    number is used again some time after its process has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
