"""Stages in processes of their own, forked from one that has imported what they need: importing
torch and transformers takes longer than most tiny stages."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = (sys.executable, str(ROOT / "tests/stages.py"))
READ_ONCE = ("HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "MKL_", "MALLOC_", "PYTHON")


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


class Server:
    """The process that forks, and where outputs go; made anew where what libraries read of this
    process' environment has changed."""

    process: subprocess.Popen | None = None
    environment: tuple[tuple[str, str], ...] = ()
    outputs: tempfile.TemporaryDirectory | None = None

    @classmethod
    def get(cls) -> subprocess.Popen:
        environment = tuple(
            sorted((k, v) for k, v in os.environ.items() if k.startswith(READ_ONCE))
        )
        if cls.process is None or cls.environment != environment:
            cls.end()
            cls.outputs = cls.outputs or tempfile.TemporaryDirectory()
            cls.environment = environment
            cls.process = subprocess.Popen(
                [*STAGES, "--serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            assert cls.process.stdout.readline() == "ready\n"
        return cls.process

    @classmethod
    def end(cls) -> None:
        if cls.process is not None:
            cls.process.stdin.close()
            cls.process.wait(timeout=60)
            cls.process = None


atexit.register(Server.end)


def fork(folder: Path, stages: list[str], arguments: list[str], **faults) -> Forked:
    """Stages in a forked process. faults: of `stages.become`."""
    server = Server.get()
    handle, output = tempfile.mkstemp(dir=Server.outputs.name)
    os.close(handle)
    request = {"folder": str(folder), "stages": stages, "arguments": arguments, "output": output}
    request["environment"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    return Forked(server, {**request, **faults})
