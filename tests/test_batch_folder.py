"""`headcount batch FOLDER`: every picture exactly once, whatever happens on the way."""

from __future__ import annotations

import csv
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_driver import FileCounter
from helpers import ROOT

from headcount import batch_command
from headcount.batch_folder import count_folder
from headcount.ledger import BatchError, Ledger, Row, Totals
from serving.contract import Parameters


def pictures(folder: Path, number: int) -> dict[str, str]:
    """Writes files that hold different numbers, some of them in folders. Returns the counts by the names."""
    found = {}
    for i in range(number):
        name = f"{i % 3}/{i}.jpg" if i % 3 else f"{i}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(str(i))
        found[name] = str(i)
    return found


def read(table: Path) -> list[tuple[str, str, str]]:
    with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert header == ["picture", "count", "error"]
    return [(name, count, error) for name, count, error in rows]


def drive(folder: Path, table: Path, point: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a batch in a process of its own, because multiprocessing leaves a process until its parent ends."""
    arguments = [str(folder), str(table), *([point] if point else [])]
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "batch_driver.py"), *arguments], capture_output=True, text=True
    )


def test_a_batch_that_is_killed_at_ten_points_counts_every_picture_once(tmp_path: Path) -> None:
    expected = pictures(tmp_path / "in", 200)
    table = tmp_path / "out.csv"
    ledger, log = tmp_path / "out.csv.part", tmp_path / "out.log"
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    points = ["opened", "adding:50", "added", f"answer:{chance.randint(2, 5)}", "recording:3", "recorded:3",
              f"answer:{chance.randint(1, 4)}", "recorded:4", "writing", "replacing"]  # fmt: skip
    recorded: set[str] = set()
    for point in points:
        log.write_text("")
        done = drive(tmp_path / "in", table, point)
        assert done.returncode == -signal.SIGKILL, (point, seed, done.stderr)
        counted = log.read_text().split()
        assert len(counted) == len(set(counted)), (point, seed)
        assert not recorded & set(counted), (point, seed)  # what was recorded is not counted again
        with sqlite3.connect(ledger) as database:
            if point not in ("opened", "adding:50"):
                rows = database.execute("SELECT count FROM pictures WHERE count IS NOT NULL")
                recorded = {str(count) for (count,) in rows}
        database.close()
    log.write_text("")
    done = drive(tmp_path / "in", table)
    assert (done.returncode, log.read_text()) == (0, ""), done.stderr
    assert read(table) == sorted((name, count, "") for name, count in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.csv", "out.log"]


def test_what_is_no_picture_has_the_reason_in_its_row(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    pictures(folder, 20)
    (folder / "bad.png").write_text("bad")
    (folder / "crash.JPG").write_text("crash")
    (folder / os.fsdecode(b"\xff.jpg")).write_text("7")
    (folder / "notes.txt").write_text("no picture by its name")
    (folder / ".hidden.jpg").write_text("1")
    assert drive(folder, tmp_path / "out.csv").stdout == "23 pictures, 2 not counted, 197 people\n"
    rows = {name: (count, error) for name, count, error in read(tmp_path / "out.csv")}
    assert len(rows) == 23
    assert rows["bad.png"] == ("", "this is no picture")
    assert rows["crash.JPG"] == ("", "a process that counted it ended (status 9)")
    assert rows[os.fsdecode(b"\xff.jpg")] == ("7", "")


def test_a_picture_that_has_changed_is_counted_again(tmp_path: Path) -> None:
    folder, table = tmp_path / "in", tmp_path / "out.csv"
    pictures(folder, 10)
    assert drive(folder, table, "writing").returncode == -signal.SIGKILL
    (folder / "0.jpg").write_text("100")
    (folder / "new.jpg").write_text("5")
    assert drive(folder, table).stdout == "11 pictures, 150 people\n"


def test_what_cannot_be_counted_is_said_before_anything_is_written(tmp_path: Path) -> None:
    folder, table, counter = tmp_path / "in", tmp_path / "out.csv", FileCounter(tmp_path / "log")
    with pytest.raises(BatchError, match="is no folder"):
        count_folder(folder, table, Parameters(), counter, 1, {})
    folder.mkdir()
    with pytest.raises(BatchError, match="holds no picture"):
        count_folder(folder, table, Parameters(), counter, 1, {})
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(BatchError, match=r"none/out\.csv\.part cannot be used"):
        count_folder(folder, tmp_path / "none" / "out.csv", Parameters(), counter, 1, {})
    table.touch()
    with pytest.raises(BatchError, match="exists: remove it"):
        count_folder(folder, table, Parameters(), counter, 1, {})


def test_a_ledger_is_of_one_batch_and_one_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", {"detail": "fast", "weights": "yolov5n"})
    ledger.add([("a", "1"), ("b", "1")])
    ledger.record([Row("a", 3), Row("b", error="no")])
    ledger.record([Row("a", 4), Row("b", 5)])  # a second answer changes no count, and replaces an error
    with pytest.raises(BatchError, match="another run has it open"):
        Ledger(tmp_path / "ledger", {})
    ledger.close()
    with pytest.raises(BatchError, match="of a batch with detail fast: repeat the command with that"):
        Ledger(tmp_path / "ledger", {"detail": "full", "weights": "yolov5n"})
    again = Ledger(tmp_path / "ledger", {"detail": "fast", "weights": "yolov5n"})
    assert str(again.totals()) == "2 pictures, 8 people"
    again.close()
    (tmp_path / "other").write_text("no database, though it is long enough to be one" * 100)
    with pytest.raises(BatchError, match="remove it to begin anew"):
        Ledger(tmp_path / "other", {})


@pytest.mark.slow  # it loads the network in two processes
def test_the_command_counts_a_folder(data: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "headcount.cli", "batch", str(data / "people"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run("--detail", "fast")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.endswith("2 pictures, 6 people, in people.csv\n")
    assert read(tmp_path / "people.csv") == [("bus.jpg", "4", ""), ("zidane.jpg", "2", "")]
    again = run()
    assert (again.returncode, "people.csv exists" in again.stderr) == (1, True)
    for option, value, reason in (("--out", "table.parquet", "ends with .csv"), ("--machines", "2", "for a bucket")):
        wrong = run(option, value)
        assert (wrong.returncode, reason in wrong.stderr) == (2, True), wrong.stderr


def test_progress_tells_what_an_earlier_run_has_counted_and_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([100.0, 100.0, 105.0, 120.0, 125.0, 140.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    progress = batch_command.Progress()
    for counted in (900, 910, 1000, 1100, 2000):
        progress.tell(Totals(2000, counted - 50, 50, 0))
    assert capsys.readouterr().err.splitlines() == [
        "going on after 900 of 2,000 pictures",
        "1,000 of 2,000 pictures, 5.0 a second, 3 min left",
    ]


def test_totals_grow_by_what_was_counted_and_what_was_not() -> None:
    rows = [Row("a", 2), Row("b", None, "no picture"), Row("c", None, "no picture")]
    assert Totals(10, 2, 3, 7).with_rows(rows) == Totals(10, 3, 5, 9)
