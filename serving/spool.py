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
from typing import NamedTuple

from serving.contract import RequestError

BODY = "headcount.body"  # the ASGI extension that holds the Body of a request
SPOOLED_NAME = r"[0-9a-f]{32}"
REUSED_BYTES, REUSED_FILES, REUSED_SECONDS = 4_000_000, 16, 1


class SpoolFile(NamedTuple):
    """An open file in the spool's folder."""

    name: str
    descriptor: int


class Spool:
    """The folder of bodies.

    request_bytes: the largest body. capacity: bytes of all bodies together. slow_seconds: when the spool is full,
    bodies that have been arriving for longer than this give way to others, the oldest first. So a few slow uploads
    cannot block all others, and an upload may be slow while there is room.
    """

    def __init__(self, folder: Path, request_bytes: int, capacity: int, slow_seconds: float = 5) -> None:
        self.folder, self.request_bytes, self.capacity = folder, request_bytes, capacity
        self.slow_seconds = slow_seconds
        self.used = 0
        self.arriving: dict[Body, float] = {}  # when the first byte of each incomplete body came, oldest first
        self._idle: list[tuple[SpoolFile, float]] = []  # files to use again, and when each was released
        self._sweeping = False

    def body(self, declared: int = 0) -> Body:
        """Returns the body of a request that arrives. declared: its length in bytes, if that is known."""
        return Body(self, declared > self.request_bytes)

    def make_room(self, size: int) -> None:
        """Makes room for `size` bytes. Raises RequestError where there is none."""
        while self.used + size > self.capacity:
            oldest, began = next(iter(self.arriving.items()), (None, 0.0))
            if oldest is None or time.monotonic() - began < self.slow_seconds:
                raise RequestError("too many pictures are on their way at once; try again", 429)
            oldest.give_way()

    def open(self) -> SpoolFile:
        """Opens a file that nobody reads. Raises OSError."""
        if self._idle:
            return self._idle.pop()[0]
        name = secrets.token_hex(16)
        return SpoolFile(name, os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

    def release(self, file: SpoolFile, reusable: bool) -> None:
        """Takes a file back, to use it again or to remove it."""
        if reusable and len(self._idle) < REUSED_FILES:
            self._idle.append((file, time.monotonic()))
            if not self._sweeping:
                self._sweep_later()
        else:
            os.close(file.descriptor)
            (self.folder / file.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the files that wait to be used again."""
        while self._idle:
            self.release(self._idle.pop()[0], reusable=False)

    def _sweep_later(self) -> None:
        self._sweeping = True
        asyncio.get_running_loop().call_later(REUSED_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Removes the files that were not used again in time. The list begins with the oldest one."""
        self._sweeping = False
        old = time.monotonic() - REUSED_SECONDS
        while self._idle and self._idle[0][1] <= old:
            self.release(self._idle.pop(0)[0], reusable=False)
        if self._idle:
            self._sweep_later()


class Body:
    """The body of one request.

    write() does not raise, because it runs inside the HTTP parser; finish() raises what went wrong. size: bytes that
    arrived. refused: the body is too large, and is only read so that the client sees the answer. failed: the reason why
    reading on is of no use. deadline: the time limit of the task that waits for the body.
    """

    def __init__(self, spool: Spool, refused: bool) -> None:
        self.spool, self.refused = spool, refused
        self.failed: Exception | None = None
        self.deadline: asyncio.Timeout | None = None
        self._file: SpoolFile | None = None
        self.size, self._kept = 0, 0

    @property
    def name(self) -> str:
        """The name of the body's file in the spool's folder; "" before the first byte and after discard()."""
        return self._file.name if self._file else ""

    def write(self, chunk: bytes) -> None:
        """Appends a part of the body."""
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
        """Marks the body as complete. Raises RequestError and OSError."""
        if self.refused:
            raise self._too_large()
        if self.failed is not None:
            raise self.failed
        self.spool.arriving.pop(self, None)
        if self._file is None:
            self._file = self.spool.open()

    def give_way(self) -> None:
        """Leaves the room to others, and wakes the task that waits for this body."""
        self.failed = self.failed or RequestError(
            "the body was slow to arrive, and others needed the room; try again", 408
        )
        self.discard()
        if self.deadline is not None and not self.deadline.expired():
            self.deadline.reschedule(asyncio.get_running_loop().time())

    def discard(self, read: bool = False) -> None:
        """Removes the body; further parts are not kept. read: a worker has read it, so its file can be used again."""
        self.spool.arriving.pop(self, None)
        if self._file is not None:
            self.spool.release(self._file, read and self._kept <= REUSED_BYTES)
        self.spool.used -= self._kept
        self.failed, self._file, self._kept = self.failed or RequestError("discarded", 499), None, 0

    def _store(self, chunk: bytes) -> None:
        self.spool.make_room(len(chunk))
        if self.failed is not None:  # make_room() made this body give way
            return
        if self._file is None:
            self._file = self.spool.open()
        if os.pwrite(self._file.descriptor, chunk, self._kept) < len(chunk):
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
