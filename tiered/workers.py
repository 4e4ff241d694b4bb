"""Work spread over processes; no result depends on how many there are."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

from tqdm import tqdm

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
    """Make a worker end when its parent is killed; it would wait for work for ever."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


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
        futures = [pool.submit(*call) for call in calls]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BrokenExecutor:
            raise UserError(
                f"{label}: a worker process died (out of memory?); finished work is kept, run again"
            ) from None
        finally:
            for future in futures:
                future.cancel()
