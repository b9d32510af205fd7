"""The model archive is made without a trace beside it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from serving.archive import make_archive


def test_a_folder_of_somebody_s_with_the_model_s_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archiver deletes the folder of that name in the temporary folder."""
    shared, out = tmp_path / "shared", tmp_path / "archive" / "people"
    (shared / "people").mkdir(parents=True)
    (shared / "people" / "picture.jpg").write_bytes(b"a picture")
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    (tmp_path / "people.pt").write_bytes(b"weights")
    for _ in range(2):  # the second replaces the first
        make_archive(tmp_path / "people.pt", out)
    assert [path.name for path in shared.rglob("*")] == ["people", "picture.jpg"]
    assert {"people.pt", "handler.py", "MAR-INF"} <= {path.name for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["people"]
