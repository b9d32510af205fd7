"""Bodies on their way into files, which a worker reads and the front uses again or removes.

Making and removing a file takes longer than writing 0.5 MB into one that is there. A file that is not used again soon
is removed, within two seconds: no picture stays for long.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import time
from pathlib import Path

from serving.contract import RequestError

SPOOLED_NAME = r"[0-9a-f]{32}"
REUSED_BYTES, REUSED_FILES, REUSED_SECONDS = 4_000_000, 16, 1


class Spool:
    """The folder of bodies. request_bytes: the largest body. capacity: bytes of all of them together."""

    def __init__(self, folder: Path, request_bytes: int, capacity: int) -> None:
        self.folder, self.request_bytes, self.capacity = folder, request_bytes, capacity
        self.used = 0
        self._idle: list[tuple[str, int, float]] = []
        self._sweeping = False

    def body(self, declared: int = 0) -> Body:
        """A body to come, of so many bytes if that is known."""
        return Body(self, declared > self.request_bytes)

    def open(self) -> tuple[str, int]:
        """Name and descriptor of a file that nobody reads."""
        if self._idle:
            name, file, _ = self._idle.pop()
            return name, file
        name = secrets.token_hex(16)
        return name, os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def release(self, name: str, file: int, reusable: bool) -> None:
        """Take a file back."""
        if reusable and len(self._idle) < REUSED_FILES:
            self._idle.append((name, file, time.monotonic()))
            if not self._sweeping:
                self._sweep_later()
        else:
            os.close(file)
            (self.folder / name).unlink(missing_ok=True)

    def _sweep_later(self) -> None:
        self._sweeping = True
        asyncio.get_running_loop().call_later(REUSED_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Remove the files that nobody needed lately. The last released is the first used: old ones come first."""
        self._sweeping = False
        old = time.monotonic() - REUSED_SECONDS
        while self._idle and self._idle[0][2] <= old:
            name, file, _ = self._idle.pop(0)
            self.release(name, file, reusable=False)
        if self._idle:
            self._sweep_later()


class Body:
    """One body. write() does not raise: it runs inside the HTTP parser. finish() says what was wrong.

    refused: it is too large, and only read so that the client sees the answer. failed: reading on is of no use.
    """

    def __init__(self, spool: Spool, refused: bool) -> None:
        self.spool, self.refused = spool, refused
        self.failed: Exception | None = None
        self.name, self._file = "", -1
        self.size, self._kept = 0, 0

    def write(self, chunk: bytes) -> None:
        spool = self.spool
        self.size += len(chunk)
        self.refused = self.refused or self.size > spool.request_bytes
        if self.refused:
            if self.size > 4 * spool.request_bytes:
                self.failed = self._too_large()
        elif spool.used + len(chunk) > spool.capacity:
            self.failed = RequestError("too many pictures are on their way at once; try again", 429)
        elif self.failed is None:
            try:
                if self._file < 0:
                    self.name, self._file = spool.open()
                if os.pwrite(self._file, chunk, self._kept) < len(chunk):
                    raise OSError(errno.ENOSPC, "no room for the body in the run folder")
                self._kept += len(chunk)
                spool.used += len(chunk)
            except OSError as error:
                self.failed = error

    def finish(self) -> None:
        """The body is whole. Raises RequestError and OSError."""
        if self.refused:
            raise self._too_large()
        if self.failed is not None:
            raise self.failed
        if self._file < 0:
            self.name, self._file = self.spool.open()

    def discard(self, read: bool = False) -> None:
        """Remove it; what still arrives is not kept. read: a worker has read it, so that its file is free."""
        if self._file >= 0:
            self.spool.release(self.name, self._file, read and self._kept <= REUSED_BYTES)
        self.spool.used -= self._kept
        self.failed, self._file, self._kept = self.failed or RequestError("discarded", 499), -1, 0

    def _too_large(self) -> RequestError:
        limit = self.spool.request_bytes / 1e6
        return RequestError(
            f"the body is larger than {limit:g} MB; send a smaller picture or fewer instances, or raise "
            "HEADCOUNT_MAX_REQUEST_BYTES where the server runs", 413,
        )  # fmt: skip
