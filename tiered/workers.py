"""Work spread over processes; no result depends on how many there are."""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

from tqdm import tqdm

from tiered import stopping
from tiered.store import UserError

# A function and its arguments.
Call = tuple[Callable[..., Any], *tuple[Any, ...]]


@contextmanager
def processes(count: int) -> Iterator[Executor | None]:
    """A pool of worker processes; None (this process does the work) for one."""
    if count <= 1:
        yield None
        return
    # spawn: a forked copy of a process whose tokenizer or OpenMP threads run can lock up.
    with ProcessPoolExecutor(count, get_context("spawn"), _end_with_parent) as pool:
        yield pool


def _end_with_parent() -> None:
    """Make a worker end when its parent is killed (it would wait for work for ever), and when it is
    asked to."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    stopping.install()


def in_worker() -> bool:
    """Whether this process is a worker (whose progress the parent shows)."""
    return parent_process() is not None


def run_all(calls: list[Call], pool: Executor | None, label: str, unit: str) -> None:
    """Run calls, in the pool's processes if there is one; the first error ends it.

    Raises UserError if a worker dies (killed, out of memory).
    """
    with tqdm(total=len(calls), desc=label, unit=unit, disable=None) as bar:
        if pool is None:
            for function, *arguments in calls:
                function(*arguments)
                bar.update()
            return
        futures: list[Future] = []
        with _ended(futures, label):
            futures += [pool.submit(*call) for call in calls]
            for future in as_completed(futures):
                future.result()
                bar.update()


def run_queue(
    take: Callable[[], tuple[Any, Call] | None],
    give: Callable[[Any, Future], None],
    pool: Executor,
    ahead: int,
    label: str,
) -> None:
    """Run calls that depend on the results of earlier ones, at most `ahead` at a time.

    take() is the next call with a key, or None while there is none; give(key, future) gets what has
    ended. Raises what give raises; UserError if a worker dies.
    """
    running: dict[Future, Any] = {}
    with _ended(running, label):
        while True:
            while len(running) < ahead and (more := take()):
                key, call = more
                running[pool.submit(*call)] = key
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                if isinstance(future.exception(), BrokenExecutor):
                    raise future.exception()
                give(key, future)


def in_order(
    pool: Executor | None,
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    ahead: int,
) -> Iterator[Any]:
    """Results of a function in the order of its arguments, which are drawn a few calls ahead.

    Raises UserError if a worker dies.
    """
    if pool is None:
        yield from itertools.starmap(function, arguments)
        return
    waiting: deque[Future] = deque()
    with _ended(waiting, function.__name__):
        for given in arguments:
            waiting.append(pool.submit(function, *given))
            if len(waiting) > 2 * ahead:  # one at work and one that waits for every process
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _ended(futures: Iterable[Future], label: str) -> Iterator[None]:
    """Futures that are left are cancelled; a worker that died is a UserError."""
    try:
        yield
    except BrokenExecutor:
        raise UserError(
            f"{label}: a worker process died (out of memory?); finished work is kept, run again"
        ) from None
    finally:
        for future in futures:
            future.cancel()
