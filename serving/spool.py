"""The spool: request bodies are written into files, which a worker reads and the front uses again or removes.

Making and removing a file takes longer than writing 0.5 MB into an existing one. A file that is not used again soon is
removed within two seconds, so that no picture stays for long.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import time
from pathlib import Path

from serving.contract import RequestError

BODY = "headcount.body"  # the ASGI extension that holds the Body of a request
SPOOLED_NAME = r"[0-9a-f]{32}"
REUSED_BYTES, REUSED_FILES, REUSED_SECONDS = 4_000_000, 16, 1


class Spool:
    """The folder of bodies.

    request_bytes: the largest body. capacity: bytes of all bodies together. slow_seconds: when the spool is full,
    bodies that have been arriving for longer than this give way to others, the oldest first. So a few slow uploads
    cannot lock everybody out, and nobody has to be fast while there is room.
    """

    def __init__(self, folder: Path, request_bytes: int, capacity: int, slow_seconds: float = 5) -> None:
        self.folder, self.request_bytes, self.capacity = folder, request_bytes, capacity
        self.slow_seconds = slow_seconds
        self.used = 0
        self.arriving: dict[Body, float] = {}  # when the first byte of each incomplete body came, oldest first
        self._idle: list[tuple[str, int, float]] = []
        self._sweeping = False

    def body(self, declared: int = 0) -> Body:
        """A body to come. declared: its length in bytes, if that is known."""
        return Body(self, declared > self.request_bytes)

    def make_room(self, size: int) -> None:
        """Make room for so many bytes. Raises RequestError where there is none."""
        while self.used + size > self.capacity:
            oldest, began = next(iter(self.arriving.items()), (None, 0.0))
            if oldest is None or time.monotonic() - began < self.slow_seconds:
                raise RequestError("too many pictures are on their way at once; try again", 429)
            oldest.give_way()

    def open(self) -> tuple[str, int]:
        """Name and descriptor of a file that nobody reads. Raises OSError."""
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

    def close(self) -> None:
        """Remove the files that wait to be used again."""
        while self._idle:
            name, file, _ = self._idle.pop()
            self.release(name, file, reusable=False)

    def _sweep_later(self) -> None:
        self._sweeping = True
        asyncio.get_running_loop().call_later(REUSED_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Remove the files that nobody needed lately. The last released is used first, so the oldest come first."""
        self._sweeping = False
        old = time.monotonic() - REUSED_SECONDS
        while self._idle and self._idle[0][2] <= old:
            name, file, _ = self._idle.pop(0)
            self.release(name, file, reusable=False)
        if self._idle:
            self._sweep_later()


class Body:
    """The body of one request.

    write() does not raise, because it runs inside the HTTP parser; finish() says what was wrong. name: its file in the
    spool's folder. size: bytes that arrived. refused: it is too large, and only read so that the client sees the
    answer. failed: reading on is of no use. deadline: the time limit under which somebody waits for it.
    """

    def __init__(self, spool: Spool, refused: bool) -> None:
        self.spool, self.refused = spool, refused
        self.failed: Exception | None = None
        self.deadline: asyncio.Timeout | None = None
        self.name, self._file = "", -1
        self.size, self._kept = 0, 0

    def write(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.refused = self.refused or self.size > self.spool.request_bytes
        if self.refused:
            if self.size > 4 * self.spool.request_bytes:
                self.failed = self._too_large()
        elif self.failed is None:
            try:
                self._store(chunk)
            except (RequestError, OSError) as error:
                self.failed = self.failed or error

    def finish(self) -> None:
        """The body is complete. Raises RequestError and OSError."""
        if self.refused:
            raise self._too_large()
        if self.failed is not None:
            raise self.failed
        self.spool.arriving.pop(self, None)
        if self._file < 0:
            self.name, self._file = self.spool.open()

    def give_way(self) -> None:
        """Leave the room to others, and wake whoever waits for this body."""
        self.failed = self.failed or RequestError(
            "the body was slow to arrive, and others needed the room; try again", 408
        )
        self.discard()
        if self.deadline is not None and not self.deadline.expired():
            self.deadline.reschedule(asyncio.get_running_loop().time())

    def discard(self, read: bool = False) -> None:
        """Remove it; what still arrives is not kept. read: a worker has read it, so its file can be used again."""
        self.spool.arriving.pop(self, None)
        if self._file >= 0:
            self.spool.release(self.name, self._file, read and self._kept <= REUSED_BYTES)
        self.spool.used -= self._kept
        self.failed, self._file, self._kept = self.failed or RequestError("discarded", 499), -1, 0

    def _store(self, chunk: bytes) -> None:
        self.spool.make_room(len(chunk))
        if self.failed is not None:  # it gave way itself
            return
        if self._file < 0:
            self.name, self._file = self.spool.open()
        if os.pwrite(self._file, chunk, self._kept) < len(chunk):
            raise OSError(errno.ENOSPC, "no room for the body in the run folder")
        self.spool.arriving.setdefault(self, time.monotonic())
        self._kept += len(chunk)
        self.spool.used += len(chunk)

    def _too_large(self) -> RequestError:
        limit = self.spool.request_bytes / 1e6
        return RequestError(
            f"the body is larger than {limit:g} MB; send a smaller picture or fewer instances, or raise "
            "HEADCOUNT_MAX_REQUEST_BYTES where the server runs", 413,
        )  # fmt: skip
