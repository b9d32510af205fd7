"""The lines that a run of a pipeline prints: one for each task, and the end of the log of one that failed."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

SHOWN_LINES = 15  # of a failed task's log
# `training.files.UsageError: …`, as Python prints an exception.
_EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception|Exit): ")


@dataclass
class Step:
    """A task that runs. taken_from: the run whose outputs it got from the cache, or "". why: it failed, or ""."""

    name: str
    log: Path
    taken_from: str = ""
    why: str = ""
    began: float = field(default_factory=time.monotonic)


class Report:
    """Prints to a stream; on a terminal also the task that runs now."""

    def __init__(self, out: TextIO, width: int) -> None:
        """width: of the longest task's name."""
        self._out, self._width = out, width
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self.failed: list[str] = []

    def start(self, step: Step) -> None:
        self._seen.add(step.name)
        if self._out.isatty():
            with self._lock:
                print(f"{step.name:{self._width}}  running", end="\r", file=self._out, flush=True)

    def success(self, step: Step, summary: str) -> None:
        if step.taken_from:
            state = f"unchanged, taken from the run of {step.taken_from}"
        else:
            state = f"done in {_elapsed(step)}"
        self._line(step.name, f"{state}{': ' if summary else ''}{summary}")

    def failure(self, step: Step) -> None:
        """Prints why a task failed: by its own last words, if it has written some."""
        self.failed.append(step.name)
        lines = _lines(step.log)
        said = _EXCEPTION.sub("", lines[-1]) if lines else ""
        self._line(step.name, f"failed after {_elapsed(step)}: {': '.join(filter(None, (step.why, said)))}")
        if len(lines) > 1:
            text = "".join(f"  | {line}\n" for line in lines[-SHOWN_LINES:])
            self._print(f"  the end of its log, {step.log}:\n{text}")

    def end(self, tasks: Sequence[str]) -> None:
        """Prints a line for each of the pipeline's tasks that did not run."""
        state = "not run, because another step failed" if self.failed else "not run, because its condition is not met"
        for task in tasks:
            if task not in self._seen:
                self._line(task, state)
        if self.failed:
            self._print("The same command goes on from the failed step.\n")

    def _line(self, name: str, text: str) -> None:
        self._print(f"{name:{self._width}}  {text}\n")

    def _print(self, text: str) -> None:
        with self._lock:
            erase = "\r\x1b[K" if self._out.isatty() else ""
            print(f"{erase}{text}", end="", file=self._out, flush=True)


def _elapsed(step: Step) -> str:
    return f"{time.monotonic() - step.began:.1f} s"


def _lines(log: Path) -> list[str]:
    """Returns the last lines of a log that are not blank, without what a terminal would take for commands."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 100_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = ("".join(one for one in line if one.isprintable() or one == "\t") for line in text.splitlines())
    return [line for line in lines if line.strip()][-SHOWN_LINES - 1 :]
