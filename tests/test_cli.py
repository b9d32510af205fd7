"""The command: against a small server that misbehaves, and with the real network."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from counting_stub import Stub, pictures, prediction, stub, waits
from helpers import eventually
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from headcount.cli import app, main
from headcount.count_command import in_order, parse_region
from headcount.files import Input, annotated_paths, find_inputs
from serving.contract import Parameters, RequestError

__all__ = ["pictures", "stub", "waits"]  # fixtures
COMMAND = [sys.executable, "-m", "headcount.cli", "count"]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60, env=os.environ | environment)


# Output and exit code


def test_without_a_package_a_verb_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["headcount", "review", "dev"])
    monkeypatch.setitem(sys.modules, "review", None)  # an import of it raises ModuleNotFoundError
    with pytest.raises(SystemExit, match=r"^This needs the package review.*: run `make install` and repeat\.$"):
        main()


@pytest.mark.parametrize("verb", ["", "count", "predict", "register", "recover", "logs", "release", "jobs"])
def test_a_verb_alone_prints_its_help(verb: str) -> None:
    done = CliRunner().invoke(app, [verb] if verb else [])
    assert done.output.strip().startswith("Usage: ")
    assert "--help" in done.output
    assert "Missing" not in done.output


def test_a_table_has_every_picture_the_total_and_nothing_else(stub: Stub, pictures: Path) -> None:
    done = run(pictures, "--url", stub.url)
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    assert lines == [
        ["Picture", "People", "Confidence", "Size"],
        [f"{pictures}/a.jpg", "3", "0.90", "30x20"],
        [f"{pictures}/b.png", "-"],
        [f"{pictures}/below/A.JPG", "2", "0.90", "30x20"],
        ["3", "pictures,", "1", "not", "counted", "5"],
    ]
    assert done.stderr.decode() == f"headcount: {pictures}/b.png: this is not a picture\n"
    assert done.returncode == 1


def test_json_is_one_object_with_boxes_errors_and_total(stub: Stub, pictures: Path) -> None:
    done = run(pictures, "--json", "--url", stub.url)
    content = json.loads(done.stdout)
    assert content["pictures"] == [
        {"file": f"{pictures}/a.jpg", **prediction(3)},
        {"file": f"{pictures}/b.png", "error": {"message": "this is not a picture"}},
        {"file": f"{pictures}/below/A.JPG", **prediction(2)},
    ]
    assert content["total"] == {"pictures": 3, "failed": 1, "people": 5}
    assert done.returncode == 1


def test_csv_has_a_row_for_each_picture(stub: Stub, pictures: Path) -> None:
    done = run(pictures, "nowhere.jpg", "--csv", "--url", stub.url)
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode())))
    assert [(row["count"], row["error"]) for row in rows] == [
        ("3", ""),
        ("", "this is not a picture"),
        ("2", ""),
        ("", "cannot be read: No such file or directory"),
    ]


def test_all_good_is_exit_code_0_and_silent(stub: Stub, pictures: Path) -> None:
    done = run(pictures / "a.jpg", pictures / "below", "--url", stub.url)
    assert (done.returncode, done.stderr) == (0, b"")


def test_file_names_of_any_bytes_come_through(stub: Stub, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/[red]\xff\n\x1b[31m.jpg"
    Path(os.fsdecode(name)).write_bytes(b"1")
    rows = list(csv.reader(io.StringIO(os.fsdecode(run(tmp_path, "--csv", "--url", stub.url).stdout))))
    assert os.fsencode(rows[1][0]) == name
    content = json.loads(run(tmp_path, "--json", "--url", stub.url).stdout)
    assert os.fsencode(content["pictures"][0]["file"]) == name
    table = run(tmp_path, "--url", stub.url).stdout.decode().splitlines()
    assert table[1].startswith(rf"{tmp_path}/[red]\xff\n\x1b[31m.jpg")


def test_a_long_name_is_whole_where_the_table_is_no_terminals(stub: Stub, tmp_path: Path) -> None:
    name = "w" * 200 + ".jpg"
    (tmp_path / name).write_bytes(b"1")
    assert name in run(tmp_path, "--url", stub.url).stdout.decode()


def test_the_progress_bar_is_on_stderr_only(stub: Stub, pictures: Path) -> None:
    controller, terminal = pty.openpty()
    done = subprocess.run(
        [*COMMAND, str(pictures), "--json", "--url", stub.url],
        stdout=subprocess.PIPE, stderr=terminal, timeout=60, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    shown = os.read(controller, 1 << 16).decode()
    os.close(controller)
    assert "counting" in shown
    assert "b.png: this is not a picture" in re.sub(r"\s+", " ", shown)
    assert json.loads(done.stdout)["total"]["people"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: "),
        (["a.jpg", "--confidence", "2"], "confidence is 2.0; it must be a number from 0.01 to 1"),
        (["a.jpg", "--confidence", "nan"], "confidence is nan"),
        (["a.jpg", "--confidence", "high"], "'--confidence'"),
        (["a.jpg", "--iou", "-1"], "iou is -1.0"),
        (["a.jpg", "--max-people", "-1"], "max_people is -1"),
        (["a.jpg", "--region", "0,0 1,1"], "region has 2 points; it must be a list of at least three points"),
        (["a.jpg", "--region", "0,0 1,1 0,1 1,0"], "region crosses itself"),
        (["a.jpg", "--region", "here"], "region is 'here'; write it as 'x,y x,y x,y' or as JSON"),
        (["a.jpg", "--region", "[[0,0],"], "region is '[[0,0],'; it must be a list"),
        (["a.jpg", "--detail", "close"], "detail is 'close'; it must be fast, full or auto"),
        (["a.jpg", "--grid", "4", "--json"], "grid is '4'; it must be COLUMNSxROWS"),
        (["a.jpg", "--grid", "4x3"], "--grid needs --json"),
        (["a.jpg", "--json", "--csv"], "--json and --csv are two formats"),
        (["a.jpg", "--url", "ftp://x"], "'ftp://x' is not a server's URL; give one such as http://"),
        (["a.jpg", "--url", ""], "'' is not a server's URL"),
        (["a.jpg", "--grpc", "http://localhost:7070"], "is not a gRPC address; give HOST:PORT"),
        (["a.jpg", "--url", "http://x", "--grpc", "x:1"], "different servers; give one of them"),
        (["a.jpg", "--annotate", "/dev/null/x"], "--annotate /dev/null/x: Not a directory; name a folder"),
    ],
)
def test_a_command_that_is_not_understood_is_exit_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["count", *arguments])
    assert result.exit_code == 2
    assert message in (result.stderr if arguments else result.output)
    assert result.stdout == "" or not arguments  # without any argument the help is on stdout


def test_help_needs_none_of_the_heavy_libraries() -> None:
    check = """
import sys
from headcount.cli import app
app(["count", "--help"], standalone_mode=False)
sys.exit(bool({"torch", "httpx", "grpc", "cv2", "pooch", "requests"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--annotate DIR" in done.stdout


# Being stopped


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    command = [*COMMAND, *map(str, arguments)]
    # A shell that runs the tests in the background makes them, and what they start, ignore Ctrl-C.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_ends_at_once_even_while_the_server_hangs(stub: Stub, pictures: Path) -> None:
    stub.hangs_after = 0
    process = start(pictures, "--json", "--url", stub.url)
    assert eventually(lambda: stub.requests)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)  # the server would hang for longer
    assert (process.returncode, out, err) == (130, b"", b"headcount: stopped\n")


def test_a_reader_that_has_enough_ends_it_quietly(stub: Stub, tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"{i}.jpg").write_bytes(b"1")
    stub.hangs_after = 20  # so that the rows do not all fit into the pipe before it is closed
    process = start(tmp_path, "--csv", "--url", stub.url)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    stub.hangs_after = None
    assert process.stderr
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(60) == 141
    assert len(stub.requests) < 200


def test_a_full_disk_below_stdout_is_told(stub: Stub, pictures: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [*COMMAND, str(pictures / "a.jpg"), "--json", "--url", stub.url]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stderr == b"headcount: the results cannot be written: No space left on device\n"


# Annotated pictures


def test_annotated_pictures_collide_with_nothing(stub: Stub, pictures: Path) -> None:
    before = {path: path.read_bytes() for path in pictures.rglob("*.*")}
    arguments = (pictures, "--annotate", pictures, "--json", "--url", stub.url)
    written = [item.get("annotated") for item in json.loads(run(*arguments).stdout)["pictures"]]
    assert written == [f"{pictures}/a.counted.jpg", None, f"{pictures}/A.counted-2.jpg"]
    assert (pictures / "a.counted.jpg").read_bytes() == b"drawn 3"
    assert (pictures / "A.counted-2.jpg").read_bytes() == b"drawn 2"
    assert before == {path: path.read_bytes() for path in before}
    # Nor are they pictures to count, the next time, and nothing else was left.
    assert len(json.loads(run(*arguments).stdout)["pictures"]) == 3
    assert len(list(pictures.rglob("*.*"))) == len(before) + 2


def test_a_copy_replaces_a_link_and_not_what_it_points_to(stub: Stub, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.counted.jpg").symlink_to(pictures / "notes.txt")
    run(pictures / "a.jpg", "--annotate", out, "--url", stub.url)
    assert (pictures / "notes.txt").read_bytes() == b"7"
    assert (out / "a.counted.jpg").read_bytes() == b"drawn 3"


NAME_PARTS = st.sampled_from([b"a", b"A", b".", b"-2", b".counted", b".jpg", b".png", b"\xff", "ß".encode()])


@given(st.lists(st.lists(NAME_PARTS, min_size=1, max_size=5).map(b"".join), unique=True))
def test_no_two_copies_and_no_original_share_a_path(file_names: list[bytes]) -> None:
    names = [os.fsdecode(b"/pictures/" + name) for name in file_names if name not in (b".", b"..")]
    paths = [str(path).casefold() for path in annotated_paths(names, Path("/pictures"))]
    assert len(set(paths)) == len(names)
    assert not set(paths) & {name.casefold() for name in names}


# Which pictures, which region


def test_what_files_folders_and_patterns_mean(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pictures / "[1].jpg").touch()
    (pictures / ".hidden.jpg").touch()
    (pictures / "empty").mkdir()
    monkeypatch.chdir(pictures)

    def names(*arguments: str) -> list[str]:
        found = find_inputs(arguments)
        assert not any(item.error for item in found)
        return [item.name for item in found]

    assert names(".") == ["./[1].jpg", "./a.jpg", "./b.png", "./below/A.JPG"]
    assert names("notes.txt", ".hidden.jpg", "missing.jpg") == ["notes.txt", ".hidden.jpg", "missing.jpg"]
    assert names("[1].jpg") == ["[1].jpg"]
    assert names("*.jpg", "./a.jpg", str(pictures / "a.jpg")) == ["[1].jpg", "a.jpg"]
    assert names("**/*.JPG", "b*") == ["below/A.JPG", "b.png"]
    assert find_inputs(["*.gif"]) == [Input("*.gif", "matches nothing")]
    assert find_inputs(["empty"])[0].error.startswith("holds no picture (.jpg, ")


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=6))
def test_a_region_reads_the_same_in_both_spellings(points: list[tuple[float, float]]) -> None:
    def meaning(text: str) -> Any:
        try:
            return Parameters.parse({"region": parse_region(text)})
        except RequestError as error:
            return str(error)

    assert meaning(" ".join(f"{x},{y}" for x, y in points)) == meaning(json.dumps(points))


@given(st.text())
def test_any_text_is_a_region_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError, RequestError):
        Parameters.parse({"region": parse_region(text)})


def test_results_keep_their_order_and_few_are_ahead() -> None:
    begun = []

    def work(i: int) -> int:
        begun.append(i)
        time.sleep(0.02 if i == 0 else 0)
        return i

    results = in_order(work, range(100), 4)
    assert next(results) == 0
    time.sleep(0.05)
    assert len(begun) <= 8
    assert list(results) == list(range(1, 100))


# The real thing


def test_without_a_server_it_fetches_the_weights_and_counts_here(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    environment = {
        "HEADCOUNT_HOME": str(tmp_path / "home"), "HEADCOUNT_MIRROR": str(checkpoint.parent.parent),
        "HEADCOUNT_WEIGHTS": "",
    }  # fmt: skip
    (tmp_path / "bad.jpg").write_bytes((data / "people" / "bus.jpg").read_bytes()[:50_000])
    done = run(data / "people", tmp_path / "bad.jpg", "--json", "--annotate", tmp_path / "out", **environment)
    content = json.loads(done.stdout)
    assert {Path(item["file"]).name: item.get("count") for item in content["pictures"]} == {
        "bus.jpg": 4, "zidane.jpg": 2, "bad.jpg": None,
    }  # fmt: skip
    assert content["total"] == {"pictures": 3, "failed": 1, "people": 6}
    assert done.returncode == 1
    assert "bad.jpg: the picture is damaged or cut short" in done.stderr.decode()
    assert (tmp_path / "home" / "weights" / checkpoint.name).is_file()
    # The boxes are drawn: green on the edges of the first one.
    with Image.open(tmp_path / "out" / "bus.counted.jpg") as copy:
        assert copy.size == (810, 1080)
        left, top, _, bottom = content["pictures"][0]["people"][0]["box"]
        red, green, blue = copy.convert("RGB").getpixel((int(left), int(top + bottom) // 2))  # type: ignore[misc]
        assert green > red + 60
        assert green > blue + 60


def test_weights_that_cannot_be_had_are_one_sentence(pictures: Path, tmp_path: Path) -> None:
    done = run(pictures, HEADCOUNT_WEIGHTS=str(tmp_path / "none.pt"))
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(rb"headcount: \S+none.pt is neither a file nor one of .*\n", done.stderr)
