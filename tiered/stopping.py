"""SIGTERM: a training saves its state and ends, anything else ends at once; exit code 143.

A batch system sends it some time before it kills. What is run again goes on where this ended.
"""

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ENDED = 128 + signal.SIGTERM  # as a shell says it


class _State:
    asked = False
    patient = 0  # nested blocks that end by themselves


def install() -> None:
    """Have this process, and the workers that it starts, end as said above."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_signal)


def asked() -> bool:
    """Whether this process was asked to end."""
    return _State.asked


@contextlib.contextmanager
def patiently_ended() -> Iterator[None]:
    """A block that looks at asked() from time to time, and ends by itself."""
    if _State.asked:
        raise SystemExit(ENDED)
    _State.patient += 1
    try:
        yield
    finally:
        _State.patient -= 1


def outlast(then: Callable[[int], None] | None, worker: int) -> None:
    """Has a process that loads batches (a DataLoader's worker_init_fn, before `then`) end with its
    training only: Slurm sends SIGTERM to all processes of a job."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(worker)


def _on_signal(number: int, frame: FrameType | None) -> None:
    _State.asked = True
    for child in multiprocessing.active_children():
        if not child.daemon:  # those of a DataLoader feed the step that is still to be made
            child.terminate()
    if not _State.patient:
        raise SystemExit(ENDED)
