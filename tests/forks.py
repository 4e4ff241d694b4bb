"""Stages in processes of their own, forked from one that has imported what they need: importing
torch and transformers takes longer than most tiny stages."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = (sys.executable, str(ROOT / "tests/stages.py"))


class Forked:
    """A stage's process, with what tests use of subprocess.Popen; its output is a file."""

    def __init__(self, server: subprocess.Popen, request: dict) -> None:
        self.output = Path(request["output"])
        self.returncode: int | None = None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        self._server = server

    def poll(self) -> int | None:
        code = Path(f"{self.output}.code")
        if self.returncode is None and code.is_file():
            self.returncode = int(code.read_text())
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline or self._server.poll() is not None:
                raise subprocess.TimeoutExpired("stages", timeout, self.text())
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout: float = 900) -> tuple[str, None]:
        self.wait(timeout)
        return self.text(), None

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8") if self.output.is_file() else ""


@functools.cache
def _server() -> tuple[subprocess.Popen, dict[str, str], Path]:
    """The process that forks, its environment, and where outputs go; one per process of tests."""
    environment = dict(os.environ)
    folder = tempfile.TemporaryDirectory()
    server = subprocess.Popen(
        [*STAGES, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert server.stdout.readline() == "ready\n"

    def end() -> None:
        server.stdin.close()
        server.wait(timeout=60)
        folder.cleanup()

    atexit.register(end)
    return server, _settings(environment), Path(folder.name)


def _settings(environment: dict[str, str]) -> dict[str, str]:
    """What of an environment a stage may read."""
    return {k: v for k, v in environment.items() if not k.startswith("PYTEST")}


def fork(folder: Path, stages: list[str], arguments: list[str], **faults) -> Forked | None:
    """Stages in a forked process; None where this process' environment has changed since the first
    call, which a forked one would not see. faults: of `stages.become`."""
    server, settings, outputs = _server()
    if settings != _settings(dict(os.environ)):
        return None
    handle, output = tempfile.mkstemp(dir=outputs)
    os.close(handle)
    request = {"folder": str(folder), "stages": stages, "arguments": arguments, "output": output}
    return Forked(server, {**request, **faults})
