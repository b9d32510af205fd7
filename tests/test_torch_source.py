"""Where the image's torch comes from: PyTorch's CPU index where it answers, and the same answer for ever after."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.torch_source import torch_source


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "torch.txt").write_text("filelock==3.1\ntorch==2.14.0 \\\n    --hash=sha256:0\n")
    return tmp_path


def uv_that(root: Path, ends_with: int) -> None:
    """Puts a script in uv's place, which writes down how it is called."""
    uv = root / ".tools" / "bin" / "uv"
    uv.parent.mkdir(parents=True, exist_ok=True)
    uv.write_text(f'#!/bin/sh\necho "$UV_HTTP_TIMEOUT" "$@" >> "{root}/asked"\nexit {ends_with}\n')
    uv.chmod(0o755)


@pytest.mark.parametrize(("status", "source", "says"), [(0, "cpu", "about 1.3 GB"), (1, "index", "does not answer")])
def test_the_index_that_answers_is_taken_and_kept(root: Path, status: int, source: str, says: str) -> None:
    uv_that(root, status)
    said: list[str] = []
    assert torch_source(root, said.append) == source
    assert says in said[0]
    asked = (root / "asked").read_text().split()
    assert asked[0] == "10", "seconds, because a closed network may not refuse"
    assert "--dry-run" in asked
    assert asked[-3:] == ["--torch-backend", "cpu", "torch==2.14.0"]
    uv_that(root, 1 - status)
    assert torch_source(root, said.append) == source, "another answer would make another image"
    assert len(said) == len((root / "asked").read_text().splitlines()) == 1
