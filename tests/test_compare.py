"""`headcount compare`: counts and costs of several weights, and of Cloud Vision by its discovery document."""

from __future__ import annotations

import base64
import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from googleapiclient.discovery_cache import get_static_doc
from pytest_httpserver import HTTPServer
from typer.testing import CliRunner, Result
from werkzeug import Request, Response

from headcount import cloud_vision, compare_command
from headcount.cli import app
from headcount.compare import (
    CLOUD_VISION,
    CompareError,
    Counted,
    Hour,
    Outcome,
    hour,
    judged,
    labels_of,
    plot,
    table_text,
    verdict,
)
from headcount.counters import Answer, CountError
from headcount.data import DataError
from review.prices import load
from serving.contract import Parameters

HOUR = Hour(3.6, "3.6 USD an hour")


def outcome(name: str, usd: float, error: float | None, people: int = 10, looks: float = 1.0) -> Outcome:
    model, _, detail = name.partition(" ")
    return Outcome(name, model, detail, people, looks, 1.0, usd, error, error)


def test_the_error_and_the_cost_are_those_of_the_pictures_that_all_counted() -> None:
    counted = [
        Counted("n", "fast", {"a": 1, "b": 5, "c": 9}, seconds=0.5),
        Counted("s", "full", {"a": 2, "b": 2}, seconds=2.0, looks=3),
        Counted(CLOUD_VISION, "", {"a": 2, "b": 4, "c": 9}),
    ]
    first, second, third = judged(counted, {"a": 2, "b": 4}, HOUR, vision=0.00225)
    assert [first.people, first.error, first.bias, first.rate] == [6, 1.0, 0.0, 4.0]
    assert first.usd == pytest.approx(0.25)  # 1,000 pictures, 4 a second, 3.6 USD an hour
    assert [second.people, second.error, second.bias] == [4, 1.0, -1.0]
    assert second.usd == pytest.approx(1.0)
    assert [third.name, third.error, third.usd, third.rate] == ["Cloud Vision", 0.0, 2.25, None]
    assert all(one.error is None for one in judged(counted, {}, HOUR, 0.1))


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (
            [outcome("n fast", 1, 0.5), outcome("s fast", 3, 0.46), outcome("s full", 9, 0.3, looks=5)],
            "s full is worth its price: 0.300 people a picture off for 9.00 USD, 0.200 people better than n fast for "
            "9.0 times the price.",
        ),
        (
            [outcome("n fast", 1, 0.5), outcome("s fast", 3, 0.46)],
            "n fast is worth its price: 0.500 people a picture off for 1.00 USD; s fast is 0.040 people better for "
            "3.0 times the price.",
        ),
        (
            [outcome("n fast", 0.0101, 0.5), outcome("n auto", 0.01, 0.5), outcome("n full", 0.0102, 0.5)],
            "n fast is worth its price: 0.500 people a picture off for 0.0101 USD, and none is better or cheaper.",
        ),
        (
            [outcome("n fast", 1, None, 10), outcome("n full", 5, None, 15, looks=5)],
            "Without labels nobody knows which count is right: n fast is the cheapest, and n full finds 50 % more "
            "people for 5.0 times the price.",
        ),
        (
            [outcome("n fast", 1, None, 0), outcome("n full", 5, None, 0, looks=5)],
            "n fast is worth its price: it is the cheapest, and none finds more people.",
        ),
    ],
)
def test_the_verdict_is_a_sentence(outcomes: list[Outcome], said: str) -> None:
    assert verdict(outcomes) == said
    assert verdict(outcomes[::-1]) == said


def test_the_table_begins_with_the_cheapest() -> None:
    rows = table_text([outcome("s full", 9, 0.25, 12, 5.5), outcome("n fast", 0.0123, None)]).splitlines()
    assert [row.split() for row in rows[1:]] == [
        ["n", "fast", "10", "-", "-", "1.0", "1.0", "0.0123"],
        ["s", "full", "12", "0.250", "+0.250", "5.5", "1.0", "9.00"],
    ]


def test_labels_are_read_in_both_formats(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    names = [str(tmp_path / "images" / f"{name}.jpg") for name in "abc"]
    assert labels_of(names, None) == {}
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "a.txt").write_text("0 .5 .5 .1 .1\n0 .2 .2 .1 .1\n16 .5 .5 .1 .1\n")
    expected = dict(zip(names, [2, 0, 0], strict=True))
    assert labels_of(names, None) == expected
    assert labels_of(names, folder) == expected
    table = tmp_path / "person_counts.csv"
    table.write_text("file,persons,label_file\na.jpg,2,1\nsome/b.jpg,7,1\n")
    assert labels_of(names, table) == {names[0]: 2, names[1]: 7}  # and c has none
    with pytest.raises(CompareError, match=r"labels/a\.txt has no line for any|has no line for any of these pictures"):
        labels_of(["/z.jpg"], table)
    table.write_text("a.jpg,2\nb.jpg,many\n")
    with pytest.raises(CompareError, match=r"person_counts\.csv, line 2: 'b\.jpg,many' is not PICTURE,PEOPLE"):
        labels_of(names, table)
    with pytest.raises(CompareError, match=r"has no label of these pictures, such as a\.txt"):
        labels_of(names, tmp_path / "images")
    with pytest.raises(CompareError, match=r"cannot be read: .*No such file"):
        labels_of(names, tmp_path / "nothing.csv")


def test_the_price_is_the_user_s_or_one_on_record() -> None:
    known = hour(load(), "c3-highcpu-4", "europe-west4")
    assert known.usd == pytest.approx(4 * 0.0363825 + 8 * 0.0041349)
    assert "Compute Engine, which asks less than Vertex AI, europe-west4, 2025-03-06, https://" in known.origin
    assert hour(load(), "z9-huge-1", "mars", 5.0).usd == 5.0
    with pytest.raises(CompareError, match="price of z9-huge-1 in mars is not on record: give it with --node-hour"):
        hour(load(), "z9-huge-1", "mars")


# --- the plot


def test_the_plot_shows_each_way_of_counting(tmp_path: Path) -> None:
    """The texts of the picture are looked at before they are drawn; points that lie on each other share a text."""
    from matplotlib.figure import Figure
    from PIL import Image

    drawn: list[Any] = []
    keep = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:

        def kept(figure: Figure, *arguments: Any, **options: Any) -> None:
            drawn.append(figure)
            keep(figure, *arguments, **options)

        patch.setattr(Figure, "savefig", kept)
        outcomes = [
            outcome("n fast", 0.01, 0.5), outcome("n auto", 0.0101, 0.5), outcome("n full", 0.05, 0.4, looks=5),
            outcome("Cloud Vision", 2.25, 0.45),
        ]  # fmt: skip
        vision = Outcome("Cloud Vision", "Cloud Vision", "", 10, 1.0, None, 2.25, 0.45, 0.0)
        plot(tmp_path / "a.png", [*outcomes[:3], vision], 8, "c3-highcpu-4")
        plot(tmp_path / "b.png", [outcome("n fast", 0.01, None)], 8, "c3-highcpu-4")
    (labelled,), (plain,) = drawn[0].axes, drawn[1].axes
    assert [text.get_text() for text in labelled.texts] == ["fast, auto", "full", "Cloud Vision"]
    assert labelled.get_ylabel().startswith("mean absolute count error")
    assert plain.get_ylabel() == "people found"
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (960, 600)


# --- Cloud Vision

VISION = json.loads(get_static_doc("vision", "v1"))


def fits(kind: str, value: Any) -> bool:
    """Whether all fields of a message are in Google's discovery document."""
    known = VISION["schemas"][kind]["properties"]
    for name, inner in value.items():
        of = known[name]
        ref = of.get("$ref") or of.get("items", {}).get("$ref")
        if "enum" in of:
            assert inner in of["enum"]
        for one in (inner if isinstance(inner, list) else [inner]) if ref else []:
            assert fits(ref, one)
    return True


def localized(*names: str) -> dict[str, Any]:
    found = [{"mid": "/m/01g317", "name": name, "score": 0.9, "boundingPoly": {}} for name in names]
    answer = {"responses": [{"localizedObjectAnnotations": found} if found else {}]}
    assert fits("BatchAnnotateImagesResponse", answer)
    return answer


def test_cloud_vision_is_asked_as_its_document_says(httpserver: HTTPServer) -> None:
    def answer(request: Request) -> Response:
        body = json.loads(request.data)
        assert fits("BatchAnnotateImagesRequest", body)
        (one,) = body["requests"]
        assert [feature["type"] for feature in one["features"]] == ["OBJECT_LOCALIZATION"]
        assert base64.b64decode(one["image"]["content"]) == b"picture"
        assert request.headers["X-Goog-User-Project"] == "p"
        return Response(json.dumps(localized("Person", "Dog", "Person", "Man")))

    path = "/vision/" + VISION["resources"]["images"]["methods"]["annotate"]["flatPath"]
    httpserver.expect_request(path, method="POST").respond_with_handler(answer)
    there = cloud_vision.CloudVision("p", httpserver.url_for("").rstrip("/"))
    assert there.count(b"picture") == 2
    httpserver.clear()
    httpserver.expect_oneshot_request(path).respond_with_json(localized())
    assert there.count(b"picture") == 0
    bad = {"responses": [{"error": {"code": 3, "message": "Bad image data."}}]}
    assert fits("BatchAnnotateImagesResponse", bad)
    httpserver.expect_oneshot_request(path).respond_with_json(bad)
    with pytest.raises(CountError, match=r"Cloud Vision: Bad image data\."):
        there.count(b"picture")
    none: list[dict[str, Any]] = [{}, {"responses": []}]
    for strange in none:
        httpserver.expect_oneshot_request(path).respond_with_json(strange)
        with pytest.raises(CountError, match="has not one response for the picture"):
            there.count(b"picture")
    httpserver.expect_oneshot_request(path).respond_with_json({"error": {"message": "Enable it."}}, 403)
    with pytest.raises(CountError, match=r"answers 403: Enable it\."):
        there.count(b"picture")
    there.close()


# --- the command


class Fake:
    """Counts as many people as the picture has bytes, and more with detail=full; fails on an empty file."""

    def __init__(self, path: Path, parallel: int) -> None:
        self.extra = {"yolov5n": 0, "yolov5s": 1}[path.stem]

    def count(self, data: bytes, parameters: Parameters) -> Answer:
        if not data:
            raise CountError("it is no picture")
        closer = parameters.detail == "full"
        return Answer(len(data) + self.extra + 2 * closer, [], 1, 1, looks=5 if closer else 1)

    def close(self) -> None:
        pass


def weights(name: str) -> Path:
    if name == "yolov5m":
        raise DataError("yolov5m.pt could not be fetched")
    return Path(f"{name}.pt")


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two labelled pictures, of 1 and 2 people."""
    monkeypatch.setattr("headcount.counters.InProcess", Fake)
    monkeypatch.setattr("headcount.data.find_weights", weights)
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    (tmp_path / "data" / "labels").mkdir()
    for name in ("a", "bb"):
        (folder / f"{name}.jpg").write_text(name)
        (tmp_path / "data" / "labels" / f"{name}.txt").write_text("0 1 1 1 1\n" * len(name))
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_a_folder_is_compared_and_the_tables_and_the_plot_are_written(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "compared"
    done = run(pictures, "--out", out)
    assert done.exit_code == 0, done.output
    assert "without yolov5m: yolov5m.pt could not be fetched" in done.stderr
    assert done.stdout.startswith("2 pictures, 2 with a label; c3-highcpu-4: 0.178609 USD an hour (Compute Engine")
    errors = {" ".join(row.split()[:2]): row.split()[3] for row in done.stdout.splitlines()[2:8]}
    assert errors == {
        "yolov5n fast": "0.000", "yolov5n auto": "0.000", "yolov5n full": "2.000",
        "yolov5s fast": "1.000", "yolov5s auto": "1.000", "yolov5s full": "3.000",
    }  # fmt: skip
    assert " ".join(done.stdout.splitlines()[-1].split()[:2]) in ("yolov5n fast", "yolov5n auto")
    rows = list(csv.DictReader((out / "counts.csv").read_text().splitlines()))
    assert [(row["label"], row["yolov5n fast"], row["yolov5s full"]) for row in rows] == [
        ("1", "1", "4"),
        ("2", "2", "5"),
    ]
    assert len((out / "compare.csv").read_text().splitlines()) == 7
    assert (out / "compare.png").stat().st_size > 10_000


def test_json_has_the_outcomes_and_the_verdict(pictures: Path) -> None:
    data = json.loads(run(pictures, "--json", "--weights", "yolov5s", "--node-hour", "3.6").stdout)
    assert [one["name"] for one in data["outcomes"]] == ["yolov5s fast", "yolov5s auto", "yolov5s full"]
    assert data["hour"] == "3.6 USD an hour (--node-hour)"
    assert "is worth its price" in data["verdict"]


def test_without_matplotlib_there_is_a_table_and_no_plot(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run(pictures, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "There is no plot, because matplotlib" in done.stderr
    assert "yolov5n full" in done.stdout
    assert (tmp_path / "compare.csv").exists()
    assert not (tmp_path / "compare.png").exists()


def test_cloud_vision_is_asked_only_if_wanted_and_its_price_is_said_first(
    pictures: Path, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_command, "VISION_BASE", httpserver.url_for("").rstrip("/"))
    said: list[str] = []
    monkeypatch.setattr(compare_command, "_say", said.append)

    def answer(_: Request) -> Response:
        assert any("Cloud Vision asks 2.25 USD for 1,000 pictures" in line for line in said)
        return Response(json.dumps(localized("Person")))

    httpserver.expect_request("/vision/v1/images:annotate").respond_with_handler(answer)
    without = run(pictures)
    assert without.exit_code == 0, without.output
    assert "Cloud Vision" not in without.stdout
    assert httpserver.log == []
    done = run(pictures, "--vision")
    assert done.exit_code == 0, done.output
    row = next(line for line in done.stdout.splitlines() if line.startswith("Cloud Vision"))
    assert row.split() == ["Cloud", "Vision", "2", "0.500", "-0.500", "-", "-", "2.25"]
    assert len(httpserver.log) == 2
    httpserver.clear()
    httpserver.expect_request("/vision/v1/images:annotate").respond_with_json({"error": {"message": "Enable it."}}, 403)
    assert run(pictures, "--vision").exit_code == 1
    assert len(httpserver.log) == 1  # what it refuses once, it refuses for all
    assert "answers 403: Enable it.. Nothing was asked after" in said[-1]


def test_a_picture_that_cannot_be_counted_is_left_out(pictures: Path) -> None:
    (pictures / "c.jpg").touch()
    done = run(pictures)
    assert done.exit_code == 1
    assert done.stderr.count("c.jpg: it is no picture") == 1
    assert "2 pictures, 2 with a label" in done.stdout


def test_what_cannot_be_compared_is_said(pictures: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no picture" in run(empty).stderr
    assert "is no folder" in run(pictures / "a.jpg").stderr
    assert "No weights could be had" in run(pictures, "--weights", "yolov5m").stderr
    assert "not on record: give it with --node-hour USD" in run(pictures, "--machine", "z9-huge-1").stderr
    assert run(pictures, "--out", pictures / "a.jpg").exit_code == 2
    for picture in pictures.iterdir():
        picture.write_bytes(b"")
    done = run(pictures)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "Nothing was counted" in done.stderr


@pytest.mark.needs("samples")
def test_real_pictures_are_compared(data: Path, tmp_path: Path) -> None:
    """The smallest of the networks, on the picture with four people."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(next((data / "people").glob("bus*.jpg")), folder / "bus.jpg")
    (tmp_path / "labels.csv").write_text("bus.jpg,4\n")
    done = run(folder, "--weights", "yolov5n", "--labels", tmp_path / "labels.csv", "--json")
    found = {one["detail"]: one for one in json.loads(done.stdout)["outcomes"]}
    assert found["fast"]["error"] == 0
    assert found["full"]["looks"] > found["fast"]["looks"] == 1
    assert found["full"]["usd"] > found["fast"]["usd"] > 0
