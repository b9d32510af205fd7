"""The network: checkpoints of every kind load, hostile ones do not, and counts are right."""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yolo_checkpoint
from PIL import Image
from torch import nn

from headcount import Client
from headcount.data import labelled_people
from serving.contract import Limits, Parameters
from serving.detector import Detector, FromPictures
from serving.network import CheckpointError, load_network


def count(detector: Detector, picture: bytes | Path, **parameters: object) -> int:
    data = picture.read_bytes() if isinstance(picture, Path) else picture
    box = detector.prepare(data, Limits())
    return len(detector.count([box], [Parameters.parse(parameters)])[0].people)


@pytest.fixture(scope="module")
def detector(checkpoint: Path) -> Detector:
    return Detector(checkpoint)


@pytest.mark.parametrize(("picture", "people"), [("bus", 4), ("zidane", 2)])
def test_known_counts(detector: Detector, data: Path, picture: str, people: int) -> None:
    assert count(detector, data / "people" / f"{picture}.jpg") == people
    assert count(detector, data / "people" / f"{picture}.jpg", iou=1) > people, "each is found several times"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as a worker has: more of them wait for each other by spinning, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("one_thread")
def test_count_error_on_coco128(checkpoint: Path, coco128: Path) -> None:
    """Mean absolute error at most 0.55 people, bfloat16 within 0.02 of float32.

    A GPU computes in float16, pictures of one shape together. Here that takes a CPU ten times as long as bfloat16, so a
    quarter of the pictures has to do, and one of them may have a person more or less.
    """
    pictures = sorted((coco128 / "images").iterdir())
    detector = Detector(checkpoint)
    boxes = [detector.prepare(picture.read_bytes(), Limits()) for picture in pictures]
    truth = np.array([labelled_people(picture) for picture in pictures])

    def counts(precision: torch.dtype, some: int) -> np.ndarray:
        network = load_network(checkpoint)
        network.keep_only("person")
        detector._forward = FromPictures(network.on(torch.device("cpu"), precision)).eval()
        return np.array([len(one.people) for one in detector.count(boxes[:some], [Parameters()] * some)])

    single, half = (counts(precision, len(boxes)) for precision in (torch.float32, torch.bfloat16))
    errors = [np.abs(found - truth).mean() for found in (single, half)]
    assert max(errors) <= 0.55
    assert abs(errors[0] - errors[1]) <= 0.02
    detector.batches = True
    assert np.abs(counts(torch.float16, 32) - single[:32]).sum() <= 1


@pytest.mark.parametrize("era", ["v6.0", "v7.0"])
def test_a_checkpoint_of_ones_own_counts_what_it_was_made_for(tmp_path: Path, era: str) -> None:
    """Other classes, fewer levels; this network sees white squares."""
    path = tmp_path / "own.pt"
    yolo_checkpoint.write(path, yolo_checkpoint.make_seeing(["cat", "hen", "dog"], "hen", era))
    hens, cats = Detector(path, "hen"), Detector(path, "cat")
    assert hens.head.strides == (8, 16)
    for squares, size in ((0, 640), (1, 640), (9, 640), (5, 1280), (5, 320)):
        picture = yolo_checkpoint.squares(squares, size)
        assert count(hens, picture) == squares
        assert count(cats, picture) == 0
    with pytest.raises(CheckpointError, match="no class 'person'; it has: cat, hen, dog"):
        Detector(path)


def test_a_program_counts_in_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.pt"
    yolo_checkpoint.write(path, yolo_checkpoint.make_seeing(["cat", "hen"], "hen"))
    monkeypatch.setenv("HEADCOUNT_WEIGHTS", str(path))
    monkeypatch.setenv("HEADCOUNT_CLASS", "hen")
    with Client() as client:
        answer = client.count(yolo_checkpoint.squares(5), annotate=True)
        assert answer.count == 5
        first = answer.people[0].box
        assert ((first[0] + first[2]) / 2, (first[1] + first[3]) / 2) == pytest.approx(yolo_checkpoint.centre(0), abs=8)
        assert Image.open(io.BytesIO(answer.annotated or b"")).size == (640, 640)


def test_head_cut_to_one_class_says_the_same(tmp_path: Path) -> None:
    path = yolo_checkpoint.save(tmp_path / "own.pt", ["cat", "hen", "dog"])
    whole, cut = load_network(path), load_network(path)
    cut.keep_only("hen")
    picture = torch.randint(0, 255, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        for full, small in zip(whole(picture), cut(picture), strict=True):
            rows = [a * 8 + r for a in range(3) for r in (0, 1, 2, 3, 4, 6)]
            torch.testing.assert_close(full[:, rows], small)


def test_batch_normalisation_is_folded_right(tmp_path: Path) -> None:
    path = yolo_checkpoint.save(tmp_path / "own.pt", ["hen"])
    original = yolo_checkpoint.make(["hen"])["model"].float().eval().model[0]
    ours = load_network(path).layers[0]
    picture = torch.randint(0, 255, (1, 3, 32, 32)).float()
    with torch.inference_mode():
        expected = original.act(original.bn(original.conv(picture / 255)))
        torch.testing.assert_close(ours(picture), expected, rtol=1e-4, atol=1e-4)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {shlex.quote(str(self.mark))}",)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    mark, path = tmp_path / "was-run", tmp_path / "evil.pt"
    yolo_checkpoint.save(path, ["person"], extra=Evil(mark))
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.system"):
        load_network(path)
    assert not mark.exists()
    with yolo_checkpoint.importable():
        torch.load(path, weights_only=False)
    assert mark.exists(), "it would have run"


def test_foreign_layers_are_refused_by_name(tmp_path: Path) -> None:
    path = yolo_checkpoint.save(tmp_path / "old.pt", ["person"], strange_layer=True)
    with pytest.raises(CheckpointError, match=r"models\.common\.Focus"):
        load_network(path)
    other = tmp_path / "other.pt"
    torch.save(nn.Linear(2, 2), other)
    with pytest.raises(CheckpointError, match="Linear"):
        load_network(other)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.pt"):
        load_network(path)
