"""Compiling fails in a sentence where the image would otherwise be slow in silence."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
import yolo_checkpoint

from serving import compile as compiling
from serving.detector import FromPictures, dtype_name
from serving.network import load_network


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The precisions that would be compiled for, on a processor with AVX2 and without bfloat16."""
    done: list[str] = []
    flags = set(compiling.TARGETS[torch.float32][2])
    monkeypatch.setattr(compiling, "cpu_flags", lambda: flags)
    monkeypatch.setattr(compiling, "best_precision", lambda _: torch.float32)
    monkeypatch.setattr(compiling, "compile_network", lambda *a: done.append(dtype_name(a[2])))
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


def test_for_this_machine_alone_it_compiles_one_precision_and_checks_it(
    monkeypatch: pytest.MonkeyPatch, compiled: list[str]
) -> None:
    checked: list[str] = []
    monkeypatch.setattr(
        compiling, "cpu_flags", lambda: {flag for _, _, needs in compiling.TARGETS.values() for flag in needs}
    )
    monkeypatch.setattr(compiling, "best_precision", lambda _: torch.bfloat16)
    monkeypatch.setattr(compiling, "check_network", lambda *a: checked.append(dtype_name(a[2])))
    run(monkeypatch, "--here")
    assert compiled == checked == ["bfloat16"]
    run(monkeypatch)
    assert compiled == ["bfloat16", "float32", "bfloat16"]
    assert len(checked) == 1, "the build machine may be another one than the one that loads the libraries"


@pytest.mark.parametrize("apart", [0.0, 1.0, float("nan")])
def test_a_library_that_computes_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, apart: float
) -> None:
    """On the network of a small checkpoint; its logits plus a number stand for the library's."""
    checkpoint = yolo_checkpoint.save(tmp_path / "own.pt", ["person", "hen"])
    network = load_network(checkpoint)
    network.keep_only("person")
    eager = FromPictures(network.on(torch.device("cpu"), torch.float32)).eval()
    library = lambda pictures: [level + apart for level in eager(pictures)]  # noqa: E731
    monkeypatch.setattr(compiling, "compiled_network", lambda *_: library)
    with pytest.raises(RuntimeError, match="differs from the eager network") if apart else contextlib.nullcontext():
        compiling.check_network(checkpoint, "person", torch.float32, tmp_path)
