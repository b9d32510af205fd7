"""The spool by itself: in any sequence of operations no file has two owners and no byte is counted twice."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from serving import spool as spool_module
from serving.contract import RequestError
from serving.spool import Body, Spool

LIMIT, CAPACITY = 1000, 2500


class SpoolMachine(RuleBasedStateMachine):
    """Uploads that arrive side by side, of which some end, some fail, and some are read by a worker."""

    arriving: Bundle[Body] = Bundle("arriving")
    complete: Bundle[Body] = Bundle("complete")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.spool = Spool(self.folder, LIMIT, CAPACITY, slow_seconds=0)
        self.spool._sweep_later = lambda: None  # type: ignore[method-assign]  # nothing here depends on time
        self.written: dict[Body, bytes] = {}
        self.done: set[Body] = set()

    def teardown(self) -> None:
        self.spool.close()
        shutil.rmtree(self.folder)

    @rule(target=arriving, declared=st.sampled_from((0, 10, LIMIT, LIMIT + 1)))
    def begins(self, declared: int) -> Body:
        body = self.spool.body(declared)
        self.written[body] = b""
        return body

    @rule(body=arriving, size=st.sampled_from((0, 1, 10, 400, LIMIT)), letter=st.integers(0, 255))
    def writes(self, body: Body, size: int, letter: int) -> None:
        if body in self.done:
            return
        body.write(bytes([letter]) * size)
        if body.failed is None and not body.refused:
            self.written[body] += bytes([letter]) * size

    @rule(target=complete, body=consumes(arriving))
    def ends(self, body: Body) -> Body:
        failed = None
        try:
            body.finish()
        except RequestError as error:
            failed = error
            body.discard()
            self.done.add(body)
        assert (failed is not None and failed.code == 413) == body.refused
        assert failed is None or failed.code in (408, 413, 429)
        return body

    @rule(body=consumes(arriving))
    def leaves(self, body: Body) -> None:
        body.discard()
        self.done.add(body)

    @rule(body=consumes(complete), read=st.booleans())
    def is_answered(self, body: Body, read: bool) -> None:
        if body not in self.done:
            body.discard(read)
            self.done.add(body)

    @rule()
    def sweeps(self) -> None:
        spool_module.REUSED_SECONDS, kept = 0, spool_module.REUSED_SECONDS
        self.spool._sweep()
        spool_module.REUSED_SECONDS = kept
        assert self.spool._idle == []

    @invariant()
    def the_room_is_counted_right(self) -> None:
        held = [body for body in self.written if body._file]
        assert self.spool.used == sum(body._kept for body in held)
        assert 0 <= self.spool.used <= CAPACITY

    @invariant()
    def no_file_is_in_two_hands(self) -> None:
        names = [body.name for body in self.written if body._file] + [idle[0].name for idle in self.spool._idle]
        assert len(names) == len(set(names))
        assert set(names) == {file.name for file in self.folder.iterdir()}
        descriptors = [body._file.descriptor for body in self.written if body._file]
        assert len(descriptors) == len(set(descriptors))

    @invariant()
    def what_was_taken_is_in_the_file(self) -> None:
        for body, content in self.written.items():
            if body._file and body.failed is None and not body.refused:
                assert (self.folder / body.name).read_bytes()[: body._kept] == content


TestSpool = SpoolMachine.TestCase


def test_a_disk_that_is_full_is_told_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, LIMIT, CAPACITY)
    body = spool.body()
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: len(data) // 2)
    body.write(bytes(100))
    with pytest.raises(OSError, match="no room"):
        body.finish()
    body.discard()
    assert spool.used == 0
    assert not any(tmp_path.iterdir())


def test_large_files_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "REUSED_BYTES", 100)

    async def use() -> list[int]:
        spool, kept = Spool(tmp_path, LIMIT, CAPACITY), []
        for size in (100, 101):
            body = spool.body()
            body.write(bytes(size))
            body.finish()
            body.discard(read=True)
            kept.append(len(list(tmp_path.iterdir())))
        return kept

    assert asyncio.run(use()) == [1, 0]
