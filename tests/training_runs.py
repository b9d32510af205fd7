"""Runs workloads in processes of their own, which a test may kill at a chosen moment.

`python training_runs.py` imports torch once and forks a process for each request, a line of JSON on its standard input
with the fields of `Runner.run`. It answers with a line: the exit code, negative for a signal.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Done:
    """A run that has ended: its exit code (negative for a signal) and its output."""

    code: int
    output: str

    def lines(self) -> list[dict[str, Any]]:
        """Returns the log, a JSON object for each line."""
        return [json.loads(line) for line in self.output.splitlines()]


class Runner:
    """Starts the runs. `folder` receives their output."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "output"
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, workload: str, *arguments: object, kill: tuple[str, int] | None = None, terminal: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> Done:  # fmt: skip
        """Runs `python -m training.WORKLOAD ARGUMENTS`.

        kill: the dotted name of a function and a number; the process kills itself when it calls the function that
        often. terminal: whether standard output and error are a terminal.
        """
        request = {
            "workload": workload, "arguments": list(map(str, arguments)), "kill": kill, "terminal": terminal,
            "environment": dict(environment or {}), "log": str(self._log),
        }  # fmt: skip
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Done(int(self._process.stdout.readline()), self._log.read_text())

    def close(self) -> None:
        self._process.communicate(timeout=60)


def _kill_at(name: str, number: int) -> None:
    """Makes the process kill itself when it calls a function for the `number`-th time."""
    owner, _, function = name.rpartition(".")
    place = pkgutil.resolve_name(owner)
    original, calls = getattr(place, function), iter(range(1, number))

    def replacement(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(place, function, replacement)


def _work(request: dict[str, Any]) -> None:
    """Runs the workload in this process and ends it."""
    code = 1
    try:
        os.environ |= request["environment"]
        sys.argv = [f"{request['workload']}.py", *request["arguments"]]
        if request["kill"]:
            _kill_at(*request["kill"])
        common, workload = (importlib.import_module(f"training.{name}") for name in ("common", request["workload"]))
        common.command(workload.main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forked(request: dict[str, Any]) -> int:
    """Returns the exit code of a forked process that does the work, after its output was written to the log."""
    with open(request["log"], "wb") as log:  # noqa: PTH123
        child, terminal = pty.fork() if request["terminal"] else (os.fork(), -1)
        if not child:
            if request["terminal"]:
                termios.tcsetwinsize(1, (24, 100))
            else:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            _work(request)
        while request["terminal"]:
            try:
                log.write(os.read(terminal, 65536))
            except OSError:  # the other end is closed
                os.close(terminal)
                break
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _serve() -> None:
    import tempfile

    import torch

    from serving.exported.program import save

    with tempfile.NamedTemporaryFile() as file:  # so that no forked process has to load the exporter
        save(torch.nn.Linear(2, 2), [torch.zeros(2, 2)], Path(file.name))
    for line in sys.stdin:
        print(_forked(json.loads(line)), flush=True)


if __name__ == "__main__":
    _serve()
