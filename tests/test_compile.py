"""Compiling fails in a sentence where the image would otherwise be slow in silence."""

import sys
from pathlib import Path

import pytest
import torch

from serving import compile as compiling
from serving.detector import word


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The precisions that would be compiled for, on a processor with AVX2 and without bfloat16."""
    done: list[str] = []
    flags = set(compiling.TARGETS[torch.float32][2])
    monkeypatch.setattr(compiling, "cpu_flags", lambda: flags)
    monkeypatch.setattr(compiling, "best_precision", lambda _: torch.float32)
    monkeypatch.setattr(compiling, "compile_network", lambda *a: done.append(word(a[2])))
    return done


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compile", "--checkpoint", "x.pt", "--out", "x", *arguments])
    compiling.main()


def test_it_compiles_for_what_the_processor_has(
    monkeypatch: pytest.MonkeyPatch, compiled: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--require", "float32")
    assert compiled == ["float32"]
    assert "not compiling for bfloat16: this processor lacks avx512_bf16" in capsys.readouterr().out


def test_a_precision_that_is_required_and_cannot_be_had_ends_the_build(
    monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    with pytest.raises(SystemExit, match=r"cannot be compiled for bfloat16 here: this processor lacks avx512_bf16.*C3"):
        run(monkeypatch, "--require", "bfloat16")
