"""Objects of buckets: complete or an error, the token goes to Cloud Storage alone, and the words of every refusal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_storage import FakeStorage

from serving import storage
from serving.storage import StorageError, fetch_model, read_object

CONTENT = bytes(range(256)) * 100


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStorage]:
    """Cloud Storage itself, with the metadata server beside it."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(storage, "_token", ("", 0.0))
    with FakeStorage({"ours/a b/ü.jpg": CONTENT}) as fake:
        monkeypatch.setattr(storage, "HOST", fake.url)
        monkeypatch.setenv("GCE_METADATA_HOST", fake.url.removeprefix("http://"))
        yield fake


def refused(uri: str = "gs://ours/a b/ü.jpg", limit: int = 1_000_000) -> tuple[int, str]:
    with pytest.raises(StorageError) as caught:
        read_object(uri, limit)
    return caught.value.code, str(caught.value)


def test_an_object_is_read_with_the_service_account_s_token(google: FakeStorage) -> None:
    assert read_object("gs://ours/a b/ü.jpg", len(CONTENT)) == CONTENT
    assert google.asked == [
        ("/computeMetadata/v1/instance/service-accounts/default/token", None),
        ("/storage/v1/b/ours/o/a%20b%2F%C3%BC.jpg?alt=media", "Bearer secret"),
    ]


def test_a_token_is_used_again_until_it_is_about_to_expire(
    google: FakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for at, sent in ((1000, "secret"), (1000 + 3539, "secret"), (1000 + 3540, "second"), (1000 + 7079, "second")):
        now = float(at)
        read_object("gs://ours/a b/ü.jpg", 1_000_000)
        assert google.asked[-1][1] == f"Bearer {sent}"
        google.token = "second"


def test_a_token_that_is_not_accepted_is_asked_for_anew(google: FakeStorage) -> None:
    google.status = 401
    code, says = refused()
    assert code == 503
    assert "did not accept" in says
    google.status, google.token = 200, "second"
    assert read_object("gs://ours/a b/ü.jpg", 1_000_000) == CONTENT
    assert google.asked[-1][1] == "Bearer second"


def test_no_token_is_sent_to_an_emulator(google: FakeStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url.removeprefix("http://"))
    assert read_object("gs://ours/a b/ü.jpg", 1_000_000) == CONTENT
    assert [token for _, token in google.asked] == [None]


def test_no_token_follows_a_redirect(google: FakeStorage) -> None:
    with FakeStorage({"ours/a b/ü.jpg": CONTENT}) as elsewhere:
        google.status = 302
        google.headers = {"Location": elsewhere.url + "/storage/v1/b/ours/o/a%20b%2F%C3%BC.jpg?alt=media"}
        assert read_object("gs://ours/a b/ü.jpg", 1_000_000) == CONTENT
        assert google.asked[-1][1] == "Bearer secret"
        assert [token for _, token in elsewhere.asked] == [None]


def test_without_a_metadata_server_it_says_so(google: FakeStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    code, says = refused()
    assert code == 503
    assert "no token of a service account" in says


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (404, 400, "does not exist"), (403, 400, "grant it roles/storage.objectViewer"), (401, 503, "did not accept"),
        (400, 400, "failed"), (408, 503, "failed"), (429, 503, "failed"), (500, 503, "failed"), (503, 503, "failed"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_to_do(google: FakeStorage, status: int, code: int, says: str) -> None:
    google.status = status
    assert refused()[0] == code
    assert says in refused()[1]
    assert "gs://ours/a b/ü.jpg" in refused()[1]


def test_an_object_that_breaks_off_is_worth_another_try(google: FakeStorage) -> None:
    for cut in (0, 1, len(CONTENT) - 1):
        google.cut = cut
        assert refused() == (503, f"reading gs://ours/a b/ü.jpg broke off after {cut} of {len(CONTENT)} bytes")


def test_chunks_that_break_off_are_worth_another_try(google: FakeStorage) -> None:
    """An object that Cloud Storage decompresses comes without a length."""
    google.headers = {"Transfer-Encoding": "chunked", "X-Goog-Stored-Content-Encoding": "gzip"}
    google.objects["ours/a b/ü.jpg"] = b"5\r\nhello\r\n0\r\n\r\n"
    assert read_object("gs://ours/a b/ü.jpg", 100) == b"hello"
    google.cut = 10
    assert refused()[0] == 503


def test_an_object_that_arrives_damaged_is_worth_another_try(google: FakeStorage) -> None:
    google.headers = {"X-Goog-Hash": "crc32c=AAAAAA==,md5=AAAAAAAAAAAAAAAAAAAAAA=="}
    code, says = refused()
    assert code == 503
    assert "MD5" in says
    google.headers = {"X-Goog-Hash": "crc32c=AAAAAA=="}  # a composed object has no MD5
    assert read_object("gs://ours/a b/ü.jpg", 1_000_000) == CONTENT


def test_an_object_over_the_limit_is_refused_before_it_is_read(google: FakeStorage) -> None:
    assert read_object("gs://ours/a b/ü.jpg", len(CONTENT)) == CONTENT
    assert refused(limit=len(CONTENT) - 1) == (400, "gs://ours/a b/ü.jpg is larger than 0.025599 MB")
    google.cut = 0
    assert refused(limit=10)[0] == 400, "it was not read"
    google.cut, google.headers = None, {"Transfer-Encoding": "chunked", "X-Goog-Stored-Content-Encoding": "gzip"}
    google.objects["ours/a b/ü.jpg"] = b"b\r\nhello world\r\n0\r\n\r\n"
    assert refused(limit=10)[0] == 400, "also where the length is not said"


# The model


def test_the_one_checkpoint_below_a_prefix_is_found_on_any_page(google: FakeStorage, tmp_path: Path) -> None:
    google.objects |= {f"ours/models/{i:02}.txt": b"" for i in range(25)}
    google.objects |= {"ours/models/zz/own.pt": CONTENT, "ours/models-of-others/x.pt": b"", "theirs/models/y.pt": b""}
    google.page_size = 10
    for uri in ("gs://ours/models", "gs://ours/models/"):
        assert fetch_model(uri, tmp_path) == tmp_path / "own.pt"
        assert (tmp_path / "own.pt").read_bytes() == CONTENT
    assert all(token == "Bearer secret" for path, token in google.asked if path.startswith("/storage/"))


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["a.txt"], "0 .pt files"),
        (["a.pt", "b.pt"], "2 .pt files"),
        (["model.pt2"], "0 .pt files and model.pt2"),
        (["contract.json"], "0 .pt files and contract.json"),
        (["a.pt", "contract.json", "model.pt2"], "1 .pt files and contract.json and model.pt2"),
    ],
)
def test_a_folder_without_one_model_is_told(google: FakeStorage, tmp_path: Path, files: list[str], found: str) -> None:
    google.objects |= {f"ours/folder/{name}": b"" for name in files}
    says = rf"folder has no model: there are {found}. Put exactly one .pt file there, or model.pt2 and contract.json"
    with pytest.raises(StorageError, match=says):
        fetch_model("gs://ours/folder", tmp_path)
    (tmp_path / "folder").mkdir()
    for name in files:
        (tmp_path / "folder" / name).touch()
    with pytest.raises(StorageError, match=says):
        fetch_model(str(tmp_path / "folder"), tmp_path)


def test_an_exported_model_is_both_of_its_files(google: FakeStorage, tmp_path: Path) -> None:
    google.objects |= {"ours/m/model.pt2": CONTENT, "ours/m/contract.json": b"{}", "ours/m/notes.txt": b""}
    for uri in ("gs://ours/m", "gs://ours/m/"):
        assert fetch_model(uri, tmp_path) == tmp_path / "model"
        assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == {
            "model.pt2": CONTENT, "contract.json": b"{}",
        }  # fmt: skip
    assert fetch_model(str(tmp_path / "model"), tmp_path / "x") == tmp_path / "model"
    google.cut = 1
    with pytest.raises(StorageError):
        fetch_model("gs://ours/m", tmp_path)
    assert not any((tmp_path / "model").iterdir())


def test_a_local_checkpoint_stays_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "own.pt").touch()
    assert fetch_model(str(tmp_path), tmp_path / "x") == tmp_path / "own.pt"
    assert fetch_model(f"file://{tmp_path}", tmp_path / "x") == tmp_path / "own.pt"


def test_a_checkpoint_that_breaks_off_leaves_nothing(google: FakeStorage, tmp_path: Path) -> None:
    google.objects["ours/models/own.pt"] = CONTENT
    google.cut = 5000
    with pytest.raises(StorageError, match=r"gs://ours/models/own.pt broke off after 5000 of") as caught:
        fetch_model("gs://ours/models", tmp_path)
    assert caught.value.code == 503
    assert not any(tmp_path.iterdir())


def test_a_list_that_is_no_list_is_worth_another_try(google: FakeStorage, tmp_path: Path) -> None:
    google.answer = lambda url, headers: (200, {}, b"[1")  # type: ignore[method-assign]
    storage._token = ("x", time.monotonic() + 60)
    with pytest.raises(StorageError, match="cannot be read") as caught:
        fetch_model("gs://ours/models", tmp_path)
    assert caught.value.code == 503
