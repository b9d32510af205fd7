"""The build context of the image: its files, and the inputs of its hash."""

import os
from pathlib import Path

import pulumi
import pytest

from infra import image

SERVING = (*image.SERVING.files, ".headcount/weights/yolov5n.pt")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("Dockerfile", ".dockerignore", "serving/a.py", ".headcount/weights/yolov5n.pt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".dockerignore").write_text(
        "*\n!serving/**/*.py\n!training\n!requirements\n!headcount/data.py\n!.headcount/weights/*.pt\n"
    )
    for name in ("training/c.py", "requirements/training.txt", "headcount/data.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("of the training image")
    for name in ("serving/b.txt", "secret", ".headcount/weights/yolov5s.pt"):
        (root / name).write_text("no")
    return root


def test_only_what_is_allowed_enters_the_image(sources: Path, tmp_path: Path) -> None:
    image.stage(sources, tmp_path / "to", SERVING)
    found = {str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*") if p.is_file()}
    assert found == {"Dockerfile", ".dockerignore", "serving/a.py", ".headcount/weights/yolov5n.pt"}
    image.stage(sources, tmp_path / "training", image.TRAINING.files)
    found = {str(p.relative_to(tmp_path / "training")) for p in (tmp_path / "training").rglob("*") if p.is_file()}
    assert found == {"Dockerfile", ".dockerignore", "training/c.py", "requirements/training.txt", "headcount/data.py"}


def test_a_checkout_s_modes_and_times_do_not_enter_it(sources: Path, tmp_path: Path) -> None:
    def seen() -> dict[str, tuple[int, float]]:
        to = tmp_path / "to"
        return {str(p.relative_to(to)): (p.stat().st_mode, p.stat().st_mtime) for p in to.rglob("*")}

    first = image.stage(sources, tmp_path / "to", SERVING), seen()
    (sources / "serving/a.py").chmod(0o600)
    os.utime(sources / "serving/a.py", (1, 1))
    assert (image.stage(sources, tmp_path / "to", SERVING), seen()) == first


def test_a_change_of_the_same_size_has_another_hash_and_another_time(sources: Path, tmp_path: Path) -> None:
    first, to = image.stage(sources, tmp_path / "to", SERVING), tmp_path / "to/serving/a.py"
    time = to.stat().st_mtime
    (sources / "serving/a.py").write_text("serving/b.py")
    assert image.stage(sources, tmp_path / "to", SERVING) != first
    assert to.stat().st_mtime != time


def test_a_file_that_cannot_be_fetched_is_an_error_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(pulumi.RunError, match="nothing"):
        image.fetch(tmp_path, "nothing")
