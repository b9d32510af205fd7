"""The fetcher against a real HTTP server that misbehaves in every way a download can."""

from __future__ import annotations

import fcntl
import hashlib
import random
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from serving import weights
from serving.weights import Asset, WeightsError

NAME = "yolov5n"
CONTENT = random.Random(5).randbytes(300_000)


class Mirror(ThreadingHTTPServer):
    """Serves `content` under any path. The switches say how it misbehaves; `ranges` what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = CONTENT
        self.knows_ranges = True
        self.cut_after: list[int] = []  # bytes of each next answer, then the connection is closed
        self.statuses: list[int] = []  # of the next answers
        self.slow = 0.0  # seconds before the body
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/releases"


class _Handler(BaseHTTPRequestHandler):
    server: Mirror

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        if self.server.statuses:
            self.send_error(self.server.statuses.pop(0))
            return
        content, start = self.server.content, 0
        if wanted and self.server.knows_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        time.sleep(self.server.slow)
        if self.server.cut_after:
            body = body[: self.server.cut_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    with Mirror() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HEADCOUNT_WEIGHTS_MIRROR", server.url)
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    asset = Asset(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(weights, "ASSETS", {NAME: asset})
    monkeypatch.setattr(weights, "PAUSES", (0.0, 0.0))


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


WHOLE = {f"{NAME}.pt": len(CONTENT)}


def test_a_fetch_leaves_the_whole_file_and_a_second_asks_for_nothing(mirror: Mirror, tmp_path: Path) -> None:
    into = tmp_path / "new" / "weights"
    assert weights.fetch(NAME, into).read_bytes() == CONTENT
    assert weights.fetch(NAME, into) == into / f"{NAME}.pt"
    assert files(into) == WHOLE
    assert mirror.ranges == [None]


def test_a_folder_is_a_mirror_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "a mirror #1%20"  # characters that mean something in a URL
    folder.mkdir()
    (folder / f"{NAME}.pt").write_bytes(CONTENT)
    monkeypatch.setenv("HEADCOUNT_WEIGHTS_MIRROR", str(folder))
    assert weights.fetch(NAME, tmp_path / "weights").read_bytes() == CONTENT


def test_a_cut_connection_is_taken_up_where_it_broke(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after = [100_000, 70_000]
    assert weights.fetch(NAME, tmp_path).read_bytes() == CONTENT
    assert mirror.ranges == [None, "bytes=100000-", "bytes=170000-"]
    assert files(tmp_path) == WHOLE


def test_what_arrived_before_the_last_cut_is_kept_for_the_next_run(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after = [100_000, 0, 0]
    with pytest.raises(WeightsError, match=r"broke off after 0.1 MB of 0.3 MB .*run it again to go on"):
        weights.fetch(NAME, tmp_path)
    assert files(tmp_path) == {f"{NAME}.pt.part": 100_000}
    assert weights.fetch(NAME, tmp_path).read_bytes() == CONTENT
    assert mirror.ranges[-1] == "bytes=100000-"
    assert files(tmp_path) == WHOLE


def test_a_busy_server_is_asked_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.statuses = [503, 429]
    assert weights.fetch(NAME, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT[:1000], CONTENT, CONTENT + b"more"], ids=["begun", "whole", "long"])
def test_a_server_without_ranges_starts_over(mirror: Mirror, tmp_path: Path, part: bytes) -> None:
    mirror.knows_ranges = False
    (tmp_path / f"{NAME}.pt.part").write_bytes(part)
    assert weights.fetch(NAME, tmp_path).read_bytes() == CONTENT
    assert files(tmp_path) == WHOLE
    assert len(mirror.ranges) == (part != CONTENT)  # no second request, and none for a part that is whole


def test_a_part_of_another_file_starts_over(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.pt.part").write_bytes(b"x" * 1000)
    assert weights.fetch(NAME, tmp_path).read_bytes() == CONTENT
    assert mirror.ranges == ["bytes=1000-", None]


def test_a_wrong_checksum_leaves_nothing_and_says_what_to_do(mirror: Mirror, tmp_path: Path) -> None:
    mirror.content = CONTENT[:-1] + b"?"
    with pytest.raises(WeightsError, match=r"not the published file \(SHA-256 .*HEADCOUNT_WEIGHTS_MIRROR"):
        weights.fetch(NAME, tmp_path)
    assert files(tmp_path) == {}


def test_a_file_of_another_size_is_refused_before_it_is_read(mirror: Mirror, tmp_path: Path) -> None:
    mirror.content = b"<html>Please log in</html>"
    with pytest.raises(WeightsError, match="has 26 bytes, the published file 300000"):
        weights.fetch(NAME, tmp_path)
    assert files(tmp_path) == {}


def test_a_damaged_target_is_replaced_only_by_a_whole_one(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.pt").write_bytes(b"damaged")
    mirror.statuses = [404]
    with pytest.raises(WeightsError, match="HTTP 404"):
        weights.fetch(NAME, tmp_path)
    assert (tmp_path / f"{NAME}.pt").read_bytes() == b"damaged"
    assert weights.fetch(NAME, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "http://127.0.0.1:9/x",
            "cannot reach http://127.0.0.1:9/x/yolov5n.pt: Connection refused; check the",
        ),
        ("http://no-such-host.invalid", "cannot reach http://no-such-host.invalid/yolov5n.pt: "),
        ("gs://bucket", "HEADCOUNT_WEIGHTS_MIRROR is 'gs://bucket'; set it to a folder or"),
        ("/no/such/folder", "/no/such/folder/yolov5n.pt cannot be read: No such file or directory; set HEAD"),
    ],
)
def test_an_unreachable_place_says_what_to_do_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, message: str
) -> None:
    monkeypatch.setenv("HEADCOUNT_WEIGHTS_MIRROR", place)
    with pytest.raises(WeightsError) as raised:
        weights.fetch(NAME, tmp_path)
    assert str(raised.value).startswith(message)
    assert files(tmp_path) == {}


def test_a_full_disk_leaves_nothing_and_says_so(mirror: Mirror, tmp_path: Path) -> None:
    """The kernel refuses to write beyond 100,000 bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(WeightsError, match=r"cannot write .*free some room there and run it again"):
            weights.fetch(NAME, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == {}


def test_a_folder_that_is_a_file_is_explained(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"cannot write .*Not a directory"):
        weights.fetch(NAME, tmp_path / "file")


def fetching(into: Path, before: str = "") -> subprocess.Popen[str]:
    """Another process that fetches the same file."""
    asset = weights.ASSETS[NAME]
    script = f"""
from pathlib import Path
from serving import weights
weights.ASSETS = {{{NAME!r}: weights.Asset({asset.size}, {asset.sha256!r})}}
{before}
weights.fetch({NAME!r}, Path({str(into)!r}))
"""
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


def test_processes_that_fetch_at_once_fetch_once(mirror: Mirror, tmp_path: Path) -> None:
    mirror.slow = 0.5
    processes = [fetching(tmp_path) for _ in range(3)]
    said = [process.communicate(timeout=30)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert mirror.ranges == [None]
    assert (tmp_path / f"{NAME}.pt").read_bytes() == CONTENT
    assert files(tmp_path) == WHOLE


def test_a_part_that_another_process_removes_is_not_written_to(mirror: Mirror, tmp_path: Path) -> None:
    waiting = threading.Event()

    class Report(weights.Lines):
        def line(self, text: str) -> None:
            if text.startswith("waiting for another process"):
                waiting.set()

    part = tmp_path / f"{NAME}.pt.part"
    with part.open("wb") as other, ThreadPoolExecutor() as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        fetched = pool.submit(weights.fetch, NAME, tmp_path, Report())
        assert waiting.wait(10)
        part.unlink()
        fcntl.flock(other, fcntl.LOCK_UN)
        assert fetched.result(10).read_bytes() == CONTENT
    assert files(tmp_path) == WHOLE


def test_a_killed_fetch_is_gone_on_from(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after = [100_000]
    process = fetching(tmp_path, "weights.PAUSES = (60,)")
    deadline = time.monotonic() + 20
    while files(tmp_path) != {f"{NAME}.pt.part": 100_000}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=20)
    assert weights.fetch(NAME, tmp_path).read_bytes() == CONTENT
    assert mirror.ranges == [None, "bytes=100000-"]


def test_a_file_of_ones_own_is_found_by_its_path(tmp_path: Path) -> None:
    own = tmp_path / "own.pt"
    own.write_bytes(b"a checkpoint")
    assert weights.find(str(own), tmp_path) == own
    with pytest.raises(WeightsError, match="neither a file nor one of yolov5n; give one of these or a path"):
        weights.find(str(tmp_path / "none.pt"), tmp_path)


def test_home_is_the_checkout_or_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HEADCOUNT_HOME", raising=False)
    assert weights.home() == Path(weights.__file__).resolve().parent.parent / ".headcount"
    monkeypatch.setattr(weights, "__file__", str(tmp_path / "site-packages" / "serving" / "weights.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert weights.home() == tmp_path / "cache" / "headcount"
    monkeypatch.setenv("HEADCOUNT_HOME", str(tmp_path / "elsewhere"))
    assert weights.home() == tmp_path / "elsewhere"


def test_the_command_prints_paths_on_stdout_and_all_else_on_stderr(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serving.weights", "yolov5q", "--into", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("headcount: 'yolov5q' is not a published checkpoint; there are yolov5n, ")
