"""`make up` and `make down`: the processes and files that they start, find again and remove on this machine."""

import fcntl
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, free_port

from headcount.stacks import StackError
from infra import training
from infra.settings import read
from laptop import __main__ as verbs
from laptop import docker, sandbox, workloads


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the project's files, whose sandbox has a port of its own."""
    port = free_port()
    (tmp_path / "Pulumi.yaml").write_text("name: headcount\n")
    (tmp_path / "Pulumi.local.yaml").write_text(f"config:\n  vertex:endpoint: http://127.0.0.1:{port}\n")
    monkeypatch.chdir(tmp_path)
    assert (sandbox.port(), sandbox.registry_port()) == (port, port + 1)
    yield tmp_path
    sandbox.stop()


def test_the_committed_stack_names_one_port_in_every_address() -> None:
    text = (ROOT / "Pulumi.local.yaml").read_text()
    assert len(set(re.findall(r"http://127\.0\.0\.1:(\d+)", text))) == 1


def test_the_sandbox_is_started_once_found_again_and_stopped(project: Path) -> None:
    sandbox.start()
    pid = (project / ".headcount/sandbox.pid").read_text()
    sandbox.start()
    assert (project / ".headcount/sandbox.pid").read_text() == pid
    assert sandbox.left() == [f"end the process that listens on port {sandbox.port()}"]
    sandbox.stop()
    assert sandbox.left() == []
    assert not (project / ".headcount/sandbox.pid").exists()
    sandbox.stop()


def test_a_sandbox_that_was_started_by_hand_is_not_ended(project: Path) -> None:
    command = [sys.executable, "-m", "sandbox", "--port", str(sandbox.port()), "--state", str(sandbox.state_folder())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as by_hand:
        assert by_hand.stdout
        by_hand.stdout.readline()
        with pytest.raises(StackError, match="started by hand: stop it in its terminal"):
            sandbox.stop()
        assert by_hand.poll() is None
        by_hand.terminate()


def test_no_signal_reaches_a_process_that_has_the_sandbox_s_id_now(project: Path) -> None:
    sandbox.state_folder().mkdir(parents=True)
    with (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other,
        (sandbox.state_folder() / "lock").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)  # a sandbox that runs
        (project / ".headcount/sandbox.pid").write_text(str(other.pid))
        with pytest.raises(StackError, match="started by hand"):
            sandbox.stop()
        assert other.poll() is None
        other.kill()
        fcntl.flock(lock, fcntl.LOCK_UN)


def test_a_sandbox_that_cannot_start_says_why(project: Path) -> None:
    with sandbox.socket.socket() as holder:  # type: ignore[attr-defined]
        holder.bind(("127.0.0.1", sandbox.port()))
        holder.listen()
        with pytest.raises(StackError, match=r"The sandbox did not start: .*in use"):
            sandbox.start()


def test_one_verb_at_a_time(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / ".headcount").mkdir()
    with (project / ".headcount/up.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert verbs.main(["down"]) == 1
    assert (
        "Another `make up`, `make deploy` or `make down` is running in this checkout. Wait for it."
        in capsys.readouterr().err
    )


def test_down_says_that_nothing_is_left_only_where_it_looked(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / ".headcount/sandbox").mkdir(parents=True)
    (project / ".headcount/pulumi/state").mkdir(parents=True)
    assert verbs.main(["down"]) == 0
    assert "Nothing of stack local is left: no container, volume, process or port." in capsys.readouterr().out
    assert not (project / ".headcount/sandbox").exists()
    monkeypatch.setattr(docker, "left", lambda port: ["docker rm -f 0123456789ab"])
    assert verbs.main(["down"]) == 1
    said = capsys.readouterr()
    assert "Nothing of stack local" not in said.out
    assert "Something is left. To remove it:\n  docker rm -f 0123456789ab" in said.err


def test_a_workload_s_stack_is_stack_local_with_a_job_and_its_release(project: Path) -> None:
    shutil.copy(ROOT / "Pulumi.local.yaml", project)
    assert workloads.write_stack("digits", ["--train-steps", "9"]) == "local-digits"
    file = project / "Pulumi.local-digits.yaml"
    config = yaml.safe_load(file.read_text())["config"]
    local = yaml.safe_load((ROOT / "Pulumi.local.yaml").read_text())
    assert config | local["config"] == config
    read({key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}, "local-digits")
    assert config["headcount:training"] == {"digits": {"workload": "digits", "args": ["--train-steps", "9"]}}
    assert config["headcount:releases"]["main"]["model"] == "training/digits"
    before = file.read_text()
    workloads.write_stack("digits", ["--train-steps", "9"])
    assert file.read_text() == before
    file.write_text(before.replace("traffic: 100", "traffic: 40"))  # a canary beside it
    workloads.write_stack("digits", [])
    config = yaml.safe_load(file.read_text())["config"]
    assert config["headcount:releases"]["main"]["traffic"] == 40
    assert config["headcount:training"]["digits"]["args"] == []
    workloads.remove_files()
    assert not file.exists()
    assert (project / "Pulumi.local.yaml").exists()


def test_the_workloads_are_those_of_the_program() -> None:
    (makefile,) = re.findall(r"^deploy:.*WORKLOAD=([\w|]+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert makefile.split("|") == list(workloads.STACKS) == list(training.WORKLOADS)


def fake_docker(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    command = folder / "bin" / "docker"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (None, "Docker is not installed"),
        ("exit 1", "Docker does not answer. Start it"),
        ('[ "$1" = info ]', "Docker has no buildx: install the package docker-buildx-plugin"),
        ('[ "$1 $2 $3" != "buildx inspect headcount" ] && [ "$2" != create ] || { echo no room >&2; exit 1; }',
         "Docker cannot make a builder: no room"),
    ],
    ids=["none", "silent", "without buildx", "no builder"],
)  # fmt: skip
def test_what_is_missing_of_docker_is_said(
    project: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, says: str
) -> None:
    monkeypatch.setenv("HOME", str(project))
    monkeypatch.delenv("BUILDX_CONFIG", raising=False)
    if script is None:
        monkeypatch.setenv("PATH", str(project))
    else:
        fake_docker(project, monkeypatch, script)

    def prepare() -> None:
        docker.check()
        docker.prepare_builder()

    with pytest.raises(StackError, match=says):
        prepare()
