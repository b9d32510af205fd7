"""The weights: the published YOLOv5 checkpoints, and a fetcher that leaves a whole file or says what to do.

`python -m serving.weights [NAME…] --into FOLDER` prints the path of each file. Standard library only, so that
it runs before anything is installed; rich draws the progress bar where it happens to be there.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Protocol

RELEASE = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
DEFAULT = "yolov5n"


@dataclass(frozen=True)
class Asset:
    """A file of the release: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


# GitHub shows no checksums for releases of 2022. n was hashed from the file itself; for s, m and l two public
# records that know nothing of each other agree; x has one record, which is right about the other four.
ASSETS = {
    "yolov5n": Asset(4_062_133, "4f180cf23ba0717ada0badd6c685026d73d48f184d00fc159c2641284b2ac0a3"),
    "yolov5s": Asset(14_808_437, "8b3b748c1e592ddd8868022e8732fde20025197328490623cc16c6f24d0782ee"),
    "yolov5m": Asset(42_806_829, "61d933360ba5a7733a36764996c800287d973889d875227f5beedd2473a97a56"),
    "yolov5l": Asset(93_622_629, "2f603b7354c25454d1270663a14d8ddc1eea98e5eebc1d84ce0c6e3150fa155f"),
    "yolov5x": Asset(174_114_333, "9f27a794fa0308e2606f90565164571d6f0a0ba18a3ce2e5e5d323b71c157859"),
}
CHUNK = 1 << 16
TIMEOUT = 30  # seconds without a byte
PAUSES = (1.0, 2.0, 4.0)  # seconds before each further try after a cut connection


class WeightsError(Exception):
    """The weights cannot be had; the message says what to do."""


class _CutError(Exception):
    """The transfer ended early; what has arrived may be gone on from."""


class Report(Protocol):
    """Told what a fetch does: `line` in words, `progress` in bytes so far."""

    def line(self, text: str) -> None: ...
    def progress(self, name: str, done: int, total: int) -> None: ...


def home() -> Path:
    """Where Headcount keeps what it fetched and built on this machine.

    HEADCOUNT_HOME; else `.headcount` of the checkout this file is in, which the Makefile uses too; else the
    user's cache folder (XDG base directory specification).
    """
    if chosen := os.environ.get("HEADCOUNT_HOME"):
        return Path(chosen).expanduser().absolute()
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / ".headcount"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headcount"


def find(wanted: str, into: Path, report: Report | None = None) -> Path:
    """The checkpoint for what a user asked for: a published name, fetched if need be, or a file of one's own.

    Raises WeightsError.
    """
    if wanted.removesuffix(".pt") in ASSETS and not Path(wanted).is_file():
        return fetch(wanted.removesuffix(".pt"), into, report)
    path = Path(wanted).expanduser()
    if not path.is_file():
        raise WeightsError(f"{wanted} is neither a file nor one of {', '.join(ASSETS)}; give one of these or a path")
    return path


def fetch(name: str, into: Path, report: Report | None = None) -> Path:
    """The published checkpoint `name`, whole, in the folder `into`; nothing is fetched if it is there.

    From HEADCOUNT_WEIGHTS_MIRROR (a folder or a URL prefix), else from the release page. What has arrived
    when a connection is cut stays beside the target as `.part`, and the next call goes on from there. Any
    number of processes may fetch the same file at once: one does, the others wait. Raises WeightsError.
    """
    report = report or Lines()
    if name not in ASSETS:
        raise WeightsError(
            f"{name!r} is not a published checkpoint; there are {', '.join(ASSETS)}. "
            "A file of your own is given by its path, in HEADCOUNT_WEIGHTS."
        )
    asset, target = ASSETS[name], into / f"{name}.pt"
    with _disk_errors(target):
        if _is_whole(target, asset):
            return target
        return _fetch(asset, target, report)


def _fetch(asset: Asset, target: Path, report: Report) -> Path:
    url = _url(target.name)
    with _claim(target, report) as part:
        if _is_whole(target, asset):  # by the process this one waited for
            return target
        if target.exists():
            report.line(f"{target} is not the published file; fetching it again")
        resumed = _size(part) > 0
        report.line(f"fetching {target.name} ({megabytes(asset.size)}) from {url}")
        _fill(part, url, asset, target.name, report)
        if resumed and _digest(part) != asset.sha256:
            # The beginning was of another file, or damaged by a crash.
            part.truncate(0)
            report.line(f"what was there of {target.name} does not fit; starting over")
            _fill(part, url, asset, target.name, report)
        if (digest := _digest(part)) != asset.sha256:
            part.truncate(0)
            raise WeightsError(
                f"{url} is not the published file (SHA-256 {digest[:12]}…, not {asset.sha256[:12]}…) and was "
                "removed; try again, or set HEADCOUNT_WEIGHTS_MIRROR to a place that has the right file"
            )
        os.fsync(part.fileno())
        Path(part.name).replace(target)
        _sync_folder(target.parent)
    return target


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _url(file_name: str) -> str:
    mirror = os.environ.get("HEADCOUNT_WEIGHTS_MIRROR") or RELEASE
    if "://" not in mirror:
        return (Path(mirror).expanduser().absolute() / file_name).as_uri()
    if not re.match(r"(https?|file)://", mirror):
        raise WeightsError(f"HEADCOUNT_WEIGHTS_MIRROR is {mirror!r}; set it to a folder or an http(s):// address")
    return f"{mirror.rstrip('/')}/{file_name}"


def _is_whole(path: Path, asset: Asset) -> bool:
    try:
        if path.stat().st_size != asset.size:
            return False
        with path.open("rb") as file:
            return _digest(file) == asset.sha256
    except FileNotFoundError:
        return False


def _digest(file: IO[bytes]) -> str:
    """Of what is on the disk, not of what was meant to go there."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed wants a BytesIO


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some room there" if full else "make the folder writable, or choose another"
        raise WeightsError(f"cannot write {target}: {error.strerror or error}; {advice} and run it again") from None


@contextlib.contextmanager
def _claim(target: Path, report: Report) -> Iterator[IO[bytes]]:
    """The part file beside the target, for this process alone; removed at the end if it cannot be resumed."""
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = part.open("ab+", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.line(f"waiting for another process that is fetching {target.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        # While this one waited, the other moved the file into place or removed it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                break
        file.close()
    with file:
        try:
            yield file
        except OSError:  # the disk's: half a block may have been written
            part.unlink(missing_ok=True)
            raise
        finally:
            if not _size(file):
                part.unlink(missing_ok=True)


def _fill(part: IO[bytes], url: str, asset: Asset, name: str, report: Report) -> None:
    """Append to the part file until it has the asset's size, over as many connections as it takes."""
    for pause in (*PAUSES, None):
        try:
            _receive(part, url, asset, lambda done: report.progress(name, done, asset.size))
            return
        except _CutError as cut:
            have = f"{megabytes(_size(part))} of {megabytes(asset.size)}"
            if pause is None:
                raise WeightsError(
                    f"the connection to {url} broke off after {have} ({cut}); run it again to go on"
                ) from None
            report.line(f"the connection broke off after {have} ({cut}); trying again")
            time.sleep(pause)


def _receive(part: IO[bytes], url: str, asset: Asset, progress: Callable[[int], None]) -> None:
    """One connection's worth. Raises _CutError, WeightsError, and OSError for the disk's errors only."""
    have = _size(part)
    if have > asset.size:
        part.truncate(have := 0)
    if have == asset.size:
        return
    with _connect(url, have) as answer:
        start, total = _extent(answer)
        if total not in (None, asset.size):
            raise WeightsError(
                f"{url} has {total} bytes, the published file {asset.size}; "
                "set HEADCOUNT_WEIGHTS_MIRROR to a place that has the right file"
            )
        if start != have:
            part.truncate(have := 0)
        if start > have:
            raise _CutError("the server answered with another range than was asked for")
        while have < asset.size:
            try:
                chunk = answer.read(min(CHUNK, asset.size - have))
            except (OSError, HTTPException) as error:
                raise _CutError(_reason(error)) from None
            if not chunk:
                raise _CutError("the server closed it")
            rest = memoryview(chunk)
            while rest:  # an almost full disk takes less than it is given
                rest = rest[part.write(rest) :]
            progress(have := have + len(chunk))


def _connect(url: str, have: int) -> IO[bytes]:
    """An answer from byte `have` on, or from 0 where the server knows no ranges or has a shorter file."""
    request = urllib.request.Request(url, headers={"User-Agent": "headcount"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    elsewhere = "set HEADCOUNT_WEIGHTS_MIRROR to a folder or URL that has the file"
    try:
        answer: IO[bytes] = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:
            return _connect(url, 0)
        if error.code in (429, 500, 502, 503, 504):
            raise _CutError(f"HTTP {error.code}") from None
        raise WeightsError(f"{url} answered HTTP {error.code} {error.reason}; {elsewhere}") from None
    except (OSError, HTTPException) as error:
        reason = _reason(error)
        if have:  # it was reachable before
            raise _CutError(reason) from None
        if url.startswith("file:"):
            raise WeightsError(f"{url.removeprefix('file://')} cannot be read: {reason}; {elsewhere}") from None
        raise WeightsError(f"cannot reach {url}: {reason}; check the network, or {elsewhere}") from None
    return answer


def _extent(answer: IO[bytes]) -> tuple[int, int | None]:
    """First byte and whole size as an answer declares them (RFC 9110, 14.4)."""
    headers = answer.headers  # type: ignore[attr-defined]  # urllib's answers have them, file: included
    if match := re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", "")):
        return int(match[1]), int(match[2])
    length = headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _reason(error: Exception) -> str:
    """What went wrong, in the system's words without its error numbers."""
    inner = getattr(error, "reason", error)
    return str(getattr(inner, "strerror", None) or inner or type(inner).__name__)


def _sync_folder(folder: Path) -> None:
    """Makes a rename outlast a power cut (fsync(2))."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lines:
    """Plain lines on stderr, for logs: at most one every five seconds while bytes arrive."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 5

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, name: str, done: int, total: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 5
            self.line(f"{name}: {done * 100 // total} %")


@contextlib.contextmanager
def terminal_report() -> Iterator[Report]:
    """A progress bar where stderr is a terminal and rich is installed, else plain lines."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    class Bar:
        def __init__(self) -> None:
            self.tasks: dict[str, TaskID] = {}

        def line(self, text: str) -> None:
            drawn.console.print(text, markup=False, highlight=False, soft_wrap=True)

        def progress(self, name: str, done: int, total: int) -> None:
            if name not in self.tasks:
                self.tasks[name] = drawn.add_task(name, total=total)
            drawn.update(self.tasks[name], completed=done)

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        yield Bar()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serving.weights", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ASSETS)} (default: {DEFAULT})")
    parser.add_argument("--into", type=Path, default=home() / "weights", help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        with terminal_report() as report:
            names = [name.removesuffix(".pt") for name in arguments.names or [DEFAULT]]
            paths = [fetch(name, arguments.into, report) for name in names]
    except WeightsError as error:
        raise SystemExit(f"headcount: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
