"""Run an experiment's jobs on this machine: all cores, or all GPUs, a partition per worker.

    python -m tiered.local_run configs/quickstart/n16.yaml
    python -m tiered.local_run configs/c4/n16.yaml --workers 4

Workers: as many as there are GPUs; without one, cores divided by the config's threads. Each GPU
worker sees its own GPU alone. Output goes to runs/<experiment>/jobs/<job>-<task>.log. A task that
fails ends the run after the tasks beside it (they are asked to end: trainings save their state);
a call that is ended and begun again goes on.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from tiered.config import Config
from tiered.plan import GPU, Job, arguments_of, jobs, parse, table
from tiered.store import UserError

LAST_LINES = 12  # of the log of a task that failed
POLL_SECONDS = 0.1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that end a run
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Workers:
    """Processes that run at a time; which of them sees which GPU."""

    count: int
    gpus: int
    running: dict[int, tuple[subprocess.Popen, str, Path]] = field(default_factory=dict)

    def free(self) -> int | None:
        """A worker that has nothing to do."""
        return next((i for i in range(self.count) if i not in self.running), None)

    def begin(self, worker: int, job: Job, task: int, log: Path) -> None:
        """Start a task of a job."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if self.gpus and job.kind == GPU:
            environment["CUDA_VISIBLE_DEVICES"] = _visible()[worker % self.gpus]
        # configs and runs are looked up where the user stands, the scripts here
        script, *rest = shlex.split(job.commands[task])
        command = [script, *rest] if script == "-m" else [str(ROOT / script), *rest]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,  # Ctrl-C is for this process, which asks them to save and end
            )
        self.running[worker] = (process, f"{job.name} {task}", log)

    def ended(self) -> Iterator[tuple[int, str, Path]]:
        """Exit code, name and log of tasks that have ended."""
        for worker, (process, name, log) in list(self.running.items()):
            code = process.poll()
            if code is not None:
                del self.running[worker]
                yield code, name, log

    def end(self) -> None:
        """Ask all that run to end, and wait for them; a signal does not hurry it."""
        if self.running:
            names = ", ".join(name for _, name, _ in self.running.values())
            print(f"asked to end: {names}; the same command goes on from there", file=sys.stderr)
        for process, _, _ in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process, _, _ in self.running.values():
            process.wait()
        self.running.clear()


_asked: list[int] = []  # signals that have come


def _note(number: int, frame: FrameType | None) -> None:
    # to raise here would lose a task that is just being started, or let a second signal break off
    # the ending of the others
    _asked.append(number)


def listen() -> None:
    """Have signals noted, but for those that the caller (nohup) has this process ignore."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)


def _visible() -> list[str]:
    """Names of the GPUs that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def workers_of(config: Config, count: int) -> Workers:
    """The workers of a config; count: how many, 0: what the machine has room for."""
    gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Workers(count or gpus or max(1, (cores or 1) // (config.threads or cores or 1)), gpus)


def run(found: list[Job], workers: Workers, logs: Path) -> None:
    """Run jobs one after another, their tasks side by side. Raises UserError for one that fails."""
    total = sum(len(job.commands) for job in found)
    with tqdm(total=total, unit="task", disable=None) as bar:
        try:
            for job in found:
                bar.set_description(job.name)
                begin = time.perf_counter()
                _run_job(job, workers, logs, bar)
                bar.write(f"{job.name}: {time.perf_counter() - begin:.0f} s")
        finally:
            workers.end()


def _run_job(job: Job, workers: Workers, logs: Path, bar: tqdm) -> None:
    waiting = list(range(len(job.commands)))
    while waiting or workers.running:
        if _asked:
            raise SystemExit(128 + _asked[0])  # as a shell says it
        while waiting and (worker := workers.free()) is not None:
            task = waiting.pop(0)
            workers.begin(worker, job, task, logs / f"{job.name}-{task}.log")
        for code, name, log in workers.ended():
            if code:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                raise UserError(
                    f"{name}: exit code {code}; the end of {log}:\n"
                    + "\n".join(lines[-LAST_LINES:])
                )
            bar.update()
        time.sleep(POLL_SECONDS)


def main() -> None:
    """Command line."""
    listen()
    try:
        given, config = parse(sys.argv[1:], "tiered.local_run", __doc__)
        found = jobs(config, arguments_of(given), given.reading_tasks)
        workers = workers_of(config, given.workers)
        if given.dry_run:
            print(f"{table(found)}\nworkers: {workers.count} (GPUs: {workers.gpus})")
            return
        run(found, workers, config.run_dir / "jobs")
        print((config.run_dir / "jobs" / "report-0.log").read_text(encoding="utf-8").strip())
    except (UserError, OSError) as error:
        print(f"tiered.local_run: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
