"""The run folder: the files by which the launcher, the front and TorchServe's workers tell each other their state.

Because they are different processes, they share files. The folder is made at every start and contains

    spool/NAME     the body of a request: the front writes it, one worker reads it
    workers/PID    a worker that has run a picture. Its modification time is the worker's last sign of life, its content
                   says how the worker computes, and the worker locks it for as long as it lives
    busy/PID       a worker that answers a request over gRPC, of which the front does not know
    failed         the reason why a worker could not be set up
    archive/       the model archive of an exported model, which has the handler alone
    models/        TorchServe's model store
    lock           the launcher locks it for as long as it lives

The kernel releases a lock when its process ends, however it ends. A process id says less than a lock, because another
process may have got it since.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PREFIX = "headcount-"
YOUNG_SECONDS = 60  # a lock file of this age may have been made and not yet been locked


class RunFolder:
    """One run folder, as any of the processes sees it."""

    _lock: int  # the descriptor must live as long as its process

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spool, self.models = path / "spool", path / "models"
        self._workers, self._busy, self._failed = path / "workers", path / "busy", path / "failed"

    # The launcher

    @classmethod
    def create(cls, parent: Path | None = None) -> RunFolder:
        """Make a run folder in the folder for temporary files, or in parent, and lock it. Raises OSError."""
        folder = cls(Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)))
        folder._lock = _locked(folder.path / "lock")
        for part in (folder.spool, folder.models, folder._workers, folder._busy):
            part.mkdir()
        return folder

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def failure(self) -> str | None:
        """The reason why a worker could not be set up, if one could not be since this was last asked."""
        try:
            reason = self._failed.read_text()
        except FileNotFoundError:
            return None
        self._failed.unlink()
        return reason

    def answers_grpc(self) -> bool:
        """Whether a living worker answers a request over gRPC at the moment."""
        return any(int(file.name) in self.workers() for file in self._busy.iterdir())

    # The front

    def workers(self) -> dict[int, float]:
        """The process ids of the living workers, and the seconds since the last sign of life of each."""
        now, alive = time.time(), {}
        for file in self._workers.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _is_locked(file):
                    alive[int(file.name)] = now - file.stat().st_mtime
                else:
                    file.unlink()
        return alive

    def worker_facts(self) -> dict[str, Any]:
        """Returns the facts that a living worker reported about its computation. There must be one."""
        facts: dict[str, Any] = json.loads((self._workers / str(min(self.workers()))).read_text())
        return facts

    # A worker

    def register(self, facts: dict[str, Any]) -> None:
        """Report this process as a worker that has run a picture, and say how it computes."""
        self._alive = self._workers / str(os.getpid())
        # The file must be complete and locked before others see it.
        new = self.path / f"{os.getpid()}.worker"
        new.write_text(json.dumps(facts))
        self._lock = _locked(new)
        new.rename(self._alive)

    def sign_of_life(self) -> None:
        os.utime(self._alive)

    @contextlib.contextmanager
    def answering_grpc(self) -> Iterator[None]:
        """Mark this worker as busy with a request of which the front does not know."""
        mark = self._busy / str(os.getpid())
        mark.touch()
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def fail(self, reason: str) -> None:
        """Say why this worker cannot be set up. The file appears complete, because several workers may fail at once."""
        new = self.path / f"{os.getpid()}.failed"
        new.write_text(reason)
        new.rename(self._failed)


def sweep(parent: Path | None = None) -> None:
    """Remove this user's run folders whose launcher was killed: their locks are free."""
    for lock in (parent or Path(tempfile.gettempdir())).glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError):
            folder, facts = lock.parent, lock.lstat()
            if facts.st_uid != os.getuid() or not stat.S_ISREG(facts.st_mode):
                continue
            if time.time() > facts.st_mtime + YOUNG_SECONDS:
                held = _locked(lock)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)


def _locked(path: Path) -> int:
    """A descriptor that holds the lock on a file, which is made if it is missing.

    Raises BlockingIOError where another process holds the lock, and OSError.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _is_locked(path: Path) -> bool:
    with path.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
