"""`headcount history`: which version served when, from recorded histories and states."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from recorded_stack import HISTORY, STATES
from typer.testing import CliRunner

from headcount import history, stacks
from headcount.cli import app
from headcount.history import Period, Update, Version, checkpoints, deployed, periods, updates
from headcount.stacks import StackError

MAIN, NEXT = "sha256:dced14d3b613", "sha256:c878fe1d049f"


def recorded() -> list[Period]:
    return periods(zip(updates(HISTORY), map(deployed, STATES), strict=True))


def update(number: int, message: str = "", result: str = "succeeded") -> Update:
    return Update(number, "update", f"2026-01-0{number}T00:00:00Z", f"2026-01-0{number}T01:00:00Z", result, message, "")


def test_a_recorded_history_has_a_period_for_each_change_of_what_serves() -> None:
    found = recorded()
    shares = [{version.release: version.traffic for version in period.versions} for period in found]
    assert shares == [{}, {"main": 100}, {"main": 90, "next": 10}, {"main": 0, "next": 100}]
    assert [period.until for period in found] == [*(period.since for period in found[1:]), ""]
    leader = found[-1].leader
    assert leader
    assert (leader.version, leader.digest[:19], leader.model) == ("headcount-local@2", NEXT, "")


def test_updates_that_change_nothing_that_serves_make_no_period() -> None:
    one, two = (Version("main", "m@1", digest, "", 100) for digest in ("a", "b"))
    found = periods([(update(1), (one,)), (update(2), (one,)), (update(3), (two,)), (update(4), ())])
    assert [(period.update.number, period.versions) for period in found] == [(1, (one,)), (3, (two,)), (4, ())]
    assert found[0].until == update(3).end
    assert periods([(update(1), ())]) == [], "never served"


def test_the_table_is_as_a_stranger_reads_it() -> None:
    table = history.table_text(recorded())
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["SINCE", "UNTIL", "TRAFFIC", "RELEASE", "VERSION", "IMAGE", "UPDATE"], "no empty column"
    assert lines[1][1:] == ["now", "100", "%", "next", "headcount-local@2", NEXT, "4"]
    assert [line[2:5] for line in lines[2:4]] == [["90", "%", "main"], ["10", "%", "next"]]


def test_a_failed_update_and_the_commit_are_named() -> None:
    entry = {"kind": "update", "startTime": "s", "endTime": "2026-01-01T00:00:00Z", "result": "failed", "version": 7}
    environment = {"git.head": "0123456789abcdef", "git.dirty": "true"}
    (found,) = updates([entry | {"environment": environment, "message": "try"}])
    assert (found.number, found.commit) == (7, "0123456789ab+")
    table = history.table_text(periods([(found, (Version("main", "m@1", "sha256:a", "gs://b/m", 100),))]))
    assert "7 try (failed)" in table
    assert "gs://b/m" in table
    assert updates([{"kind": "update", "startTime": "s"}]) == [], "one that still runs"


def kept(*states: dict[str, Any] | None, packed: bool = False) -> dict[str, bytes]:
    """The files of a backend's history; a state of None has no checkpoint."""
    files = {}
    for number, state in enumerate(states):
        files[f"dev-{number}.history.json"] = b"{}"
        content = json.dumps({"checkpoint": {"latest": state}}).encode()
        if state is not None:
            files[f"dev-{number}.checkpoint.json"] = gzip.compress(content) if packed else content
    return files


@pytest.mark.parametrize("packed", [False, True])
def test_checkpoints_are_paired_with_the_history_by_their_names(packed: bool) -> None:
    files = kept({"resources": []}, None, {"resources": [1]}, packed=packed) | {"dev-0.history.json.attrs": b"x"}
    files["dev-3.history.json.gz"] = files["dev-3.checkpoint.json.gz"] = b"\x28\xb5\x2f\xfd zstd"
    assert checkpoints({name: lambda c=content: c for name, content in files.items()}) == [  # type: ignore[misc]
        {"resources": []}, None, {"resources": [1]}, None,
    ]  # fmt: skip


@pytest.fixture
def pulumi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Pulumi whose backend is a folder with the recorded history."""
    folder = tmp_path / ".pulumi/history/headcount/local"
    folder.mkdir(parents=True)
    for name, content in kept(*STATES).items():
        (folder / name.replace("dev-", "local-")).write_bytes(content)
    answers: dict[str, Any] = {"history": HISTORY, "export": {"deployment": STATES[-1]}, "url": f"file://{tmp_path}"}
    monkeypatch.setattr(stacks, "pulumi", lambda stack, *arguments: json.dumps(answers[arguments[1]]))
    monkeypatch.setattr(stacks, "backend", lambda stack: answers["url"])
    return answers


def test_the_command_reads_a_backend_of_files(pulumi: dict[str, Any]) -> None:
    run = CliRunner().invoke(app, ["history", "local"])
    assert (run.exit_code, run.stdout) == (0, history.table_text(recorded()))
    run = CliRunner().invoke(app, ["history", "local", "--json"])
    assert json.loads(run.stdout)[0]["versions"] == []


def test_pulumi_cloud_is_asked_for_each_state_by_its_number(
    pulumi: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pulumi["url"] = "https://app.pulumi.com/somebody"
    asked = []

    def answer(stack: str, *arguments: str) -> str:
        if arguments[1] == "export" and len(arguments) > 2:
            asked.append(arguments[3])
            return json.dumps({"deployment": STATES[int(arguments[3]) - 1]})
        return json.dumps(pulumi[arguments[1]])

    monkeypatch.setattr(stacks, "pulumi", answer)
    assert history.read("local") == recorded()
    assert asked == ["1", "2", "3", "4"]


def test_without_a_history_or_with_an_unknown_backend_it_says_so(pulumi: dict[str, Any]) -> None:
    pulumi["url"] = "s3://bucket"
    run = CliRunner().invoke(app, ["history", "local"])
    assert (run.exit_code, run.stdout) == (1, "")
    assert "cannot be read from s3://bucket" in run.stderr
    pulumi["history"] = []
    with pytest.raises(StackError, match="was never deployed"):
        history.read("local")
