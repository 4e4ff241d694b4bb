"""Run pipeline scripts one after another in one process (imports cost seconds), as a user would.

usage: python tests/stages.py STAGE[,STAGE...] CONFIG [CONFIG ...] [key=value ...]
       python tests/stages.py --serve      forks a process for every request (`tests.forks`)
"""

import atexit
import importlib
import json
import os
import resource
import runpy
import select
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "process_dset",
    "train_det_router",
    "run_clm",
    "eval_det_router",
    "unlearn_benchmarks",
)
# what the scripts import when they need it
LATER = (
    "transformers.trainer",
    "accelerate",
    "tiered.fitting",
    "tiered.joint",
    "tiered.inspection",
)

# audit events of operations that change files
CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "os.utime")


def run(stages: list[str], arguments: list[str]) -> None:
    """Scripts in order; the first that fails ends the process. `tiered.report` is a module."""
    for stage in stages:
        sys.argv = [f"{stage}.py", *arguments]
        print(f"== {stage}", flush=True)
        if stage.startswith("tiered."):
            runpy.run_module(stage, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")


def serve() -> tuple[list[str], list[str]]:
    """Fork a process for every request line, and note how each ended beside its output.

    Returns in the forked process, with what it is to run; the server itself ends when its input
    does.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    for name in (*SCRIPTS, *LATER):
        importlib.import_module(name)
    answers.write("ready\n")
    outputs: dict[int, Path] = {}
    while True:
        if select.select([0], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line:
                raise SystemExit(0)
            request = json.loads(line)
            process = os.fork()
            if not process:
                return become(request)
            outputs[process] = Path(request["output"])
            answers.write(f"{process}\n")
        while outputs:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                break
            code = Path(f"{outputs.pop(process)}.code")
            code.with_suffix(".part").write_text(str(os.waitstatus_to_exitcode(status)))
            code.with_suffix(".part").rename(code)


def become(request: dict) -> tuple[list[str], list[str]]:
    """Give a forked process what a started one has (session, environment, folder, output), and the
    faults that are asked for: `largest_file` (bytes), `kill_at` (before which operation on files),
    `count_to` (a file that gets the number of operations), `clock_off` (seconds)."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    if largest := request.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if off := request.get("clock_off"):
        clock = time.time
        time.time = lambda: clock() + off
    if "kill_at" in request or "count_to" in request:
        watch(request.get("kill_at"), request.get("count_to"))
    return request["stages"], request["arguments"]


def watch(kill_at: int | None, count_to: str | None) -> None:
    """Count this process' operations that change files: before one of them it is killed, or their
    number is noted when it ends. What libraries write by themselves (safetensors) is not seen."""
    count, main = 0, os.getpid()

    def see(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in CHANGING and not (event == "open" and writes(*arguments)):
            return
        if os.getpid() == main:
            if count == kill_at:
                os.kill(main, signal.SIGKILL)
            count += 1

    def note() -> None:
        Path(count_to).write_text(str(count))

    sys.addaudithook(see)
    if count_to:
        atexit.register(note)


def writes(path: object, mode: str | None, flags: int) -> bool:
    """Whether a file is opened to be changed (the audit event's arguments)."""
    changing = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return changing and str(path) != os.devnull and not str(path).startswith("/proc")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "--serve":
        run(*serve())
    else:
        run(sys.argv[1].split(","), sys.argv[2:])
