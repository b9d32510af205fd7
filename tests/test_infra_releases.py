"""Releases change as their verbs say, and only the stack's file; what a killed Pulumi left is taken up."""

import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import BUILD, image, releases, stacks
from infra.settings import read
from infra.stacks import StackError

ROOT = Path(__file__).resolve().parent.parent
OLD = "sha256:" + "a" * 64
RUNNING = {"main": f"europe-west4-docker.pkg.dev/p/r/headcount@{OLD}"}
MAIN: releases.Releases = {"main": {"image": BUILD, "traffic": 100}}


def test_a_canary_pins_what_runs_and_builds_the_sources() -> None:
    assert releases.canary(MAIN, "next", BUILD, 10, RUNNING) == {
        "main": {"image": OLD, "traffic": 90},
        "next": {"image": BUILD, "traffic": 10},
    }


def test_a_canary_needs_something_that_runs() -> None:
    with pytest.raises(StackError, match="Nothing runs yet as main"):
        releases.canary(MAIN, "next", BUILD, 10, {})


def test_the_first_release_gets_everything() -> None:
    assert releases.canary({}, "main", OLD, 10, {}) == {"main": {"image": OLD, "traffic": 100}}


def test_promotion_and_rollback_are_two_numbers() -> None:
    both = releases.canary(MAIN, "next", BUILD, 10, RUNNING)
    promoted = releases.promote(both, "next")
    assert {n: r["traffic"] for n, r in promoted.items()} == {"main": 0, "next": 100}
    assert {n: r["image"] for n, r in promoted.items()} == {n: r["image"] for n, r in both.items()}
    assert {n: r["traffic"] for n, r in releases.promote(promoted, "main").items()} == {"main": 100, "next": 0}


def test_a_release_with_traffic_is_not_removed_while_there_are_others() -> None:
    both = releases.canary(MAIN, "next", BUILD, 10, RUNNING)
    with pytest.raises(StackError, match="next has 10 % of the traffic"):
        releases.remove(both, "next")
    assert list(releases.remove(releases.promote(both, "main"), "next")) == ["main"]
    assert releases.remove(MAIN, "main") == {}
    with pytest.raises(StackError, match="There is no release other; there are: main"):
        releases.promote(MAIN, "other")


VERBS = st.lists(
    st.one_of(
        st.tuples(st.just("canary"), st.sampled_from(["aa", "bb", "cc"]), st.integers(0, 100)),
        st.tuples(st.just("promote"), st.sampled_from(["aa", "bb", "cc", "main"]), st.just(0)),
        st.tuples(st.just("remove"), st.sampled_from(["aa", "bb", "cc", "main"]), st.just(0)),
    ),
    max_size=12,
)


@given(VERBS)
def test_whatever_is_done_in_whatever_order_the_settings_stay_right(verbs: list[tuple[str, str, int]]) -> None:
    current = MAIN
    running = dict.fromkeys(("aa", "bb", "cc", "main"), f"r/headcount@{OLD}")
    for verb, name, percent in verbs:
        try:
            if verb == "canary":
                current = releases.canary(current, name, BUILD, percent, running)
            else:
                current = {"promote": releases.promote, "remove": releases.remove}[verb](current, name)
        except StackError:
            continue
        config = {"gcp:project": "my-project", "gcp:region": "europe-west4"}
        read(config | {"headcount:releases": json.dumps(current)}, "dev")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for stack in ("dev", "prod"):
        shutil.copy(ROOT / f"Pulumi.{stack}.yaml", tmp_path)
    monkeypatch.setattr(releases, "ROOT", tmp_path)
    monkeypatch.setattr(releases, "outputs", lambda stack: {"images": RUNNING})
    return tmp_path


def test_the_file_keeps_its_comments_and_the_diff_is_printed(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (checkout / "Pulumi.dev.yaml").read_text()
    assert releases.main(["-s", "dev", "canary", "next", "10"]) == 0
    diff = capsys.readouterr().out
    assert f"+      image: {OLD}\n+      traffic: 90\n" in diff
    assert not [line for line in diff.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert before.splitlines()[0] in (checkout / "Pulumi.dev.yaml").read_text()

    releases.main(["-s", "dev", "promote", "next"])
    changed = [
        line for line in capsys.readouterr().out.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert changed == ["-      traffic: 90", "+      traffic: 0", "-      traffic: 10", "+      traffic: 100"]


def test_production_takes_the_digest_that_dev_proved(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert releases.main(["-s", "prod", "add", "main", "--from", "dev"]) == 0
    assert f"image: {OLD}" in capsys.readouterr().out


def test_proved_is_what_has_the_traffic_not_what_came_last(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = "r/headcount@sha256:" + "b" * 64
    monkeypatch.setattr(releases, "outputs", lambda stack: {"images": RUNNING | {"next": tried}})
    releases.main(["-s", "dev", "canary", "next", "10"])
    releases.main(["-s", "prod", "add", "main", "--from", "dev"])
    assert OLD in (checkout / "Pulumi.prod.yaml").read_text()
    releases.main(["-s", "dev", "promote", "next"])
    releases.main(["-s", "prod", "add", "main", "--from", "dev"])
    assert tried.partition("@")[2] in (checkout / "Pulumi.prod.yaml").read_text()


def test_pause_and_resume_leave_the_file_as_it_was(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (checkout / "Pulumi.dev.yaml").read_text()
    releases.main(["-s", "dev", "pause"])
    assert "+  headcount:paused: true" in capsys.readouterr().out
    releases.main(["-s", "dev", "resume"])
    assert (checkout / "Pulumi.dev.yaml").read_text() == before


def test_mistakes_are_said_in_a_sentence(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert releases.main(["-s", "nowhere", "pause"]) == 1
    assert "There is no Pulumi.nowhere.yaml: `pulumi stack init nowhere`" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- the build context


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("Dockerfile", ".dockerignore", "serving/a.py", ".headcount/weights/yolov5n.pt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".dockerignore").write_text("*\n!serving/**/*.py\n!.headcount/weights/*.pt\n")
    for name in ("serving/b.txt", "secret", ".headcount/weights/yolov5s.pt"):
        (root / name).write_text("no")
    return root


def test_only_what_is_allowed_enters_the_image(sources: Path, tmp_path: Path) -> None:
    image.stage(sources, tmp_path / "to", "yolov5n")
    found = {str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*") if p.is_file()}
    assert found == {"Dockerfile", ".dockerignore", "serving/a.py", ".headcount/weights/yolov5n.pt"}


def test_a_checkout_s_modes_and_times_do_not_enter_it(sources: Path, tmp_path: Path) -> None:
    def seen() -> dict[str, tuple[int, float]]:
        to = tmp_path / "to"
        return {str(p.relative_to(to)): (p.stat().st_mode, p.stat().st_mtime) for p in to.rglob("*")}

    first = image.stage(sources, tmp_path / "to", "yolov5n"), seen()
    (sources / "serving/a.py").chmod(0o600)
    os.utime(sources / "serving/a.py", (1, 1))
    assert (image.stage(sources, tmp_path / "to", "yolov5n"), seen()) == first


def test_a_change_of_the_same_size_has_another_hash_and_another_time(sources: Path, tmp_path: Path) -> None:
    first, to = image.stage(sources, tmp_path / "to", "yolov5n"), tmp_path / "to/serving/a.py"
    time = to.stat().st_mtime
    (sources / "serving/a.py").write_text("serving/b.py")
    assert image.stage(sources, tmp_path / "to", "yolov5n") != first
    assert to.stat().st_mtime != time


# ------------------------------------------------------------------------------------------ after a kill


def state(*pending: dict[str, Any]) -> dict[str, Any]:
    operations = [{"type": "creating", "resource": resource} for resource in pending]
    return {"version": 3, "deployment": {"resources": [], "pending_operations": operations}}


def test_what_was_being_created_counts_as_created_until_a_refresh_has_looked() -> None:
    bucket = {
        "urn": "urn:pulumi:dev::headcount::gcp:storage/bucket:Bucket::bucket",
        "type": "gcp:storage/bucket:Bucket",
        "inputs": {"name": "b"},
    }
    version = {"urn": "urn:…::main", "type": "vertex:index:ModelVersion", "inputs": {}}
    after, names = stacks.adopted(state(bucket, version), "my-project", "europe-west4")
    assert names == ["bucket", "main"]
    assert "pending_operations" not in after["deployment"]
    (adopted,) = after["deployment"]["resources"]
    assert (adopted["id"], adopted["outputs"]) == ("my-project/b", {})


def test_a_dead_process_s_lock_is_cleared_and_a_living_one_s_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "environment", lambda stack: {"PULUMI_BACKEND_URL": f"file://{tmp_path}"})
    lock = tmp_path / ".pulumi/locks/organization/headcount/dev/1.json"
    lock.parent.mkdir(parents=True)
    host = os.uname().nodename
    lock.write_text(json.dumps({"pid": os.getpid(), "hostname": host}))
    with pytest.raises(StackError, match=f"process {os.getpid()}"):
        stacks.clear_lock("dev")
    child = os.fork()
    if not child:
        os._exit(0)
    lock.write_text(json.dumps({"pid": child, "hostname": host}))
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # ended, but still in the table of processes
    assert str(child) in stacks.clear_lock("dev")
    assert not lock.exists()
    os.waitpid(child, 0)


def test_a_state_that_was_cut_off_is_taken_from_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "environment", lambda stack: {"PULUMI_BACKEND_URL": f"file://{tmp_path}"})
    file = tmp_path / ".pulumi/stacks/headcount/dev.json"
    file.parent.mkdir(parents=True)
    file.with_name("dev.json.bak").write_text('{"version": 3}')
    file.write_text('{"vers')
    assert stacks.mend_file("dev")
    assert json.loads(file.read_text()) == {"version": 3}
    assert stacks.mend_file("dev") == ""


def test_a_stack_that_was_never_deployed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "pulumi", lambda *arguments: "{}")
    with pytest.raises(StackError, match="pulumi up -s dev"):
        stacks.endpoint("dev")


def test_an_endpoint_of_google_needs_a_token_and_the_sandbox_none() -> None:
    google = stacks.endpoint_of({"url": "https://1.prediction.vertexai.goog/v1/e", "maxRequestBytes": 10})
    assert (google.needs_token, google.max_bytes) == (True, 10)
    assert not stacks.endpoint_of({"url": "http://127.0.0.1:8790/v1/e", "maxRequestBytes": 10}).needs_token


@pytest.mark.parametrize(("ends", "raised"), [(1, True), (0, False)])
def test_ctrl_c_reaches_pulumi_and_is_known_when_it_stopped_something(
    ends: int, raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulumi = tmp_path / "pulumi"
    pulumi.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\nsignal.signal(signal.SIGINT, lambda *_: sys.exit({ends}))\n"
        "time.sleep(0.3)\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(0.3)\nos.kill(os.getpid(), signal.SIGINT)\n"
    )
    pulumi.chmod(0o755)
    monkeypatch.setattr(stacks, "environment", lambda stack: {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) if raised else contextlib.nullcontext():
        assert stacks.run("local", "up") == 0
    assert signal.getsignal(signal.SIGINT) is before
