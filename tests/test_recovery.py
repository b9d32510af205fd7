"""A stack whose Pulumi was killed is repaired."""

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from headcount import recovery, stacks
from headcount.stacks import StackError


def state(*pending: dict[str, Any]) -> dict[str, Any]:
    operations = [{"type": "creating", "resource": resource} for resource in pending]
    return {"version": 3, "deployment": {"resources": [], "pending_operations": operations}}


def test_what_was_being_created_counts_as_created_until_a_refresh_has_looked() -> None:
    def pending(kind: str, resource: str, **inputs: str) -> dict[str, Any]:
        return {"urn": f"urn:pulumi:dev::headcount::{kind}::{resource}", "type": kind, "inputs": inputs}

    before = state(
        pending("gcp:storage/bucket:Bucket", "bucket", name="b"),
        pending("gcp:artifactregistry/repository:Repository", "images", repositoryId="r"),
        pending("gcp:serviceaccount/account:Account", "serving", accountId="a"),
        pending("gcp:vertex/aiEndpoint:AiEndpoint", "endpoint", name="7"),
        pending("vertex:index:ModelVersion", "main"),
    )
    after, names = recovery.promote_pending(before, "my-project", "europe-west4")
    assert names == ["bucket", "images", "serving", "endpoint", "main"]
    assert "pending_operations" not in after["deployment"]
    assert {one["urn"].rpartition("::")[2]: one["id"] for one in after["deployment"]["resources"]} == {
        "bucket": "my-project/b",
        "images": "projects/my-project/locations/europe-west4/repositories/r",
        "serving": "projects/my-project/serviceAccounts/a@my-project.iam.gserviceaccount.com",
        "endpoint": "projects/my-project/locations/europe-west4/endpoints/7",
    }
    assert all(one["outputs"] == {} for one in after["deployment"]["resources"])


def test_a_pending_create_whose_resource_was_saved_already_is_no_second_resource() -> None:
    endpoint = {
        "urn": "urn:pulumi:dev::headcount::gcp:vertex/aiEndpoint:AiEndpoint::endpoint",
        "type": "gcp:vertex/aiEndpoint:AiEndpoint",
        "inputs": {"name": "7"},
    }
    saved = endpoint | {"id": "projects/my-project/locations/europe-west4/endpoints/7", "outputs": {"name": "7"}}
    pending = [{"resource": endpoint, "type": "creating"}]
    before: dict[str, Any] = {"deployment": {"resources": [saved], "pending_operations": pending}}
    after, names = recovery.promote_pending(before, "my-project", "europe-west4")
    assert (after, names) == ({"deployment": {"resources": [saved]}}, ["endpoint"])
    before["deployment"]["resources"] = [saved | {"delete": True}]
    after, _ = recovery.promote_pending(before, "my-project", "europe-west4")
    assert [one.get("delete", False) for one in after["deployment"]["resources"]] == [True, False]


@pytest.mark.parametrize("misses", [0, 1, 9])
def test_an_account_that_the_refresh_missed_is_looked_for_again(misses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"serving": "gcp:serviceaccount/account:Account", "bucket": "gcp:storage/bucket:Bucket"}
    pending = [
        {"urn": f"urn:pulumi:dev::headcount::{kind}::{name}", "type": kind, "inputs": {"accountId": "a", "name": "b"}}
        for name, kind in kinds.items()
    ]
    there, refreshes, waited = state(*pending), itertools.count(), list[float]()

    def pulumi(stack: str, *command: str) -> str:
        deployment = there["deployment"]
        if command[:2] == ("stack", "import"):
            there.update(json.loads(Path(command[-1]).read_text()))
        elif command[0] == "refresh":  # the bucket was never made; the account is seen late
            kept = ["serving"] if next(refreshes) >= misses else []
            deployment["resources"] = [one for one in deployment["resources"] if one["urn"].split("::")[-1] in kept]
        elif command[0] == "config":
            return '{"gcp:project": {"value": "p"}, "gcp:region": {"value": "r"}}'
        return json.dumps(there)

    monkeypatch.setattr(stacks, "environment", lambda stack: {})
    monkeypatch.setattr(stacks, "pulumi", pulumi)
    monkeypatch.setattr("time.sleep", waited.append)
    assert recovery.recover("dev") == ["looked whether these were created before Pulumi was killed: serving, bucket"]
    assert waited == list(recovery.SETTLING[:misses])
    assert [one["urn"].split("::")[-1] for one in there["deployment"]["resources"]] == ["serving"] * (misses < 9)
    assert "pending_operations" not in there["deployment"]


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a lock of stack dev, whose state is in files."""
    monkeypatch.setattr(stacks, "environment", lambda stack: {"PULUMI_BACKEND_URL": f"file://{tmp_path}"})
    file = tmp_path / ".pulumi/locks/organization/headcount/dev/1.json"
    file.parent.mkdir(parents=True)
    return file


def test_the_lock_of_a_living_pulumi_stays(lock: Path, tmp_path: Path) -> None:
    shutil.copy(shutil.which("sleep") or "", tmp_path / "pulumi")  # a process of this name
    with subprocess.Popen([tmp_path / "pulumi", "600"]) as living:
        lock.write_text(json.dumps({"pid": living.pid, "hostname": os.uname().nodename}))
        with pytest.raises(StackError, match=f"process {living.pid}"):
            recovery.clear_lock("dev")
        assert lock.exists()
        living.kill()


def test_the_lock_of_a_dead_pulumi_is_cleared(lock: Path) -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    lock.write_text(json.dumps({"pid": child, "hostname": os.uname().nodename}))
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # ended, but still in the table of processes
    assert str(child) in recovery.clear_lock("dev")
    assert not lock.exists()
    os.waitpid(child, 0)


def test_a_plugin_that_does_not_notice_the_end_of_its_pulumi_is_gone_before_anybody_looks(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "project_folder", lambda: tmp_path)
    monkeypatch.setattr(recovery, "PATIENCE", 0.2)
    plugin, program = tmp_path / "pulumi-deaf", tmp_path / "infra"
    program.mkdir()
    shutil.copy(shutil.which("sleep") or "", plugin)
    # It ignores SIGTERM, and its parent ends at once.
    script = f"trap '' TERM; cd {program}; {plugin} 600 > {tmp_path}/output 2>&1 & echo $!"
    pid = int(subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, check=True).stdout)
    orphan = os.pidfd_open(pid)
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] != "1":
            pytest.skip("another process than the first takes orphans here")
        lock.write_text(json.dumps({"pid": 2**22, "hostname": os.uname().nodename}))
        recovery.clear_lock("dev")
        assert select.select([orphan], [], [], 10)[0], "it lives"
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(orphan, signal.SIGKILL)
        os.close(orphan)


def test_a_process_id_that_another_program_has_now_is_no_living_pulumi(lock: Path) -> None:
    lock.write_text(json.dumps({"pid": os.getpid(), "hostname": os.uname().nodename}))
    assert str(os.getpid()) in recovery.clear_lock("dev")
    assert not lock.exists()


def test_the_lock_of_another_machine_stays(lock: Path) -> None:
    lock.write_text(json.dumps({"pid": 2**22, "hostname": "elsewhere"}))
    with pytest.raises(StackError, match=r"Process 4194304 on elsewhere .*`pulumi cancel -s dev`"):
        recovery.clear_lock("dev")
    assert lock.exists()


def test_a_state_that_was_cut_off_is_taken_from_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "environment", lambda stack: {"PULUMI_BACKEND_URL": f"file://{tmp_path}"})
    file = tmp_path / ".pulumi/stacks/headcount/dev.json"
    file.parent.mkdir(parents=True)
    file.with_name("dev.json.bak").write_text('{"version": 3}')
    file.write_text('{"vers')
    assert recovery.restore_state_file("dev")
    assert json.loads(file.read_text()) == {"version": 3}
    assert recovery.restore_state_file("dev") == ""
