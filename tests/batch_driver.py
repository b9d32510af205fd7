"""Counts in a folder of text files as `headcount batch` does with pictures, and kills itself where it is told.

`python batch_driver.py FOLDER TABLE [POINT[:N]]`: POINT is a key of KILLS, and N the time at which it is passed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headcount import batch_folder
from headcount.counters import Answer, CountError
from headcount.ledger import Ledger
from serving.contract import Parameters


@dataclass
class FileCounter:
    """Counts the number that a file holds, and notes in `log` that it has."""

    log: Path
    parallel = 1

    def __call__(self) -> FileCounter:
        return self

    def count(self, data: bytes, parameters: Parameters) -> Answer:
        text = data.decode()
        with self.log.open("a") as file:
            file.write(text + "\n")
        if text.startswith("crash"):
            os._exit(9)
        if text.startswith("bad"):
            raise CountError("this is no picture")
        return Answer(int(text), [], 1, 1, {})

    def close(self) -> None:
        pass


# Where a kill comes: an object, its function, and whether that has run by then.
KILLS: dict[str, tuple[Any, str, bool]] = {
    "opened": (Ledger, "__init__", True),
    "adding": (batch_folder, "_stamp", False),
    "added": (Ledger, "add", True),
    "answer": (batch_folder.Processes, "_answer", True),
    "recording": (Ledger, "record", False),
    "recorded": (Ledger, "record", True),
    "writing": (Ledger, "write", True),
    "replacing": (Path, "replace", True),
}


def kill_at(point: str) -> None:
    name, _, number = point.partition(":")
    target, function, after = KILLS[name]
    original: Callable[..., Any] = getattr(target, function)
    left = int(number or 1)

    def killing(*args: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        result = original(*args, **more) if after or left else None
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(target, function, killing)


if __name__ == "__main__":
    folder, table = Path(sys.argv[1]), Path(sys.argv[2])
    batch_folder.SECONDS = 0  # type: ignore[misc] # a transaction for each answer
    if len(sys.argv) > 3:
        kill_at(sys.argv[3])
    # Spawned processes import this file under another name, so the counter is that of the module.
    import batch_driver

    counter = batch_driver.FileCounter(table.with_suffix(".log"))
    print(batch_folder.count_folder(folder, table, Parameters(), counter, 2, {"detail": "auto"}))
