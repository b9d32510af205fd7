"""Repairs a stack after its Pulumi process was killed: its lock, its state file, and its pending resources."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from headcount import stacks
from headcount.stacks import PROJECT, BusyError


def recover(stack: str) -> list[str]:
    """Repairs a stack whose Pulumi was killed, and returns a line for each repair. Raises StackError.

    Pulumi keeps a list of the resources that it was creating. Without this repair the next `up` would meet names that
    are taken. `pulumi refresh --import-pending-creates` does not do it, because it fails for a resource that Google
    never made; here every pending resource is put into the state, and a refresh removes those that do not exist.
    """
    said = [line for line in (clear_lock(stack), restore_state_file(stack)) if line]
    state = json.loads(stacks.pulumi(stack, "stack", "export"))
    pending = state.get("deployment", {}).get("pending_operations")
    if not pending:
        return said
    config = {
        key: entry.get("value", "") for key, entry in json.loads(stacks.pulumi(stack, "config", "--json")).items()
    }
    names = []
    for pause in (*SETTLING, None):
        promoted, looked_for = promote_pending(state, config["gcp:project"], config["gcp:region"])
        names += [name for name in looked_for if name not in names]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # its secrets stay encrypted
            json.dump(promoted, file)
            file.flush()
            stacks.pulumi(stack, "stack", "import", "--file", file.name)
        stacks.pulumi(stack, "refresh", "--yes", "--skip-preview")
        state = json.loads(stacks.pulumi(stack, "stack", "export"))
        found = {resource["urn"] for resource in state["deployment"].get("resources", [])}
        late = [one for one in pending if one["resource"]["type"] == _ACCOUNT and one["resource"]["urn"] not in found]
        if pause is None or not late:
            break
        time.sleep(pause)
        state["deployment"]["pending_operations"] = late
    return [*said, f"looked whether these were created before Pulumi was killed: {', '.join(names)}"]


def clear_lock(stack: str) -> str:
    """Removes the lock of a Pulumi process that was killed on this machine. Returns a line about the repair, or "".

    Only a state in local files has locks that can be read here. Raises BusyError while the process lives, and for a
    lock of another machine, because its processes cannot be seen from here.
    """
    backend = stacks.environment(stack).get("PULUMI_BACKEND_URL", "")
    if not backend.startswith("file://"):
        return ""
    folder = Path(backend.removeprefix("file://")) / ".pulumi" / "locks"
    for lock in folder.glob(f"organization/{PROJECT}/{stack}/*.json"):
        holder = json.loads(lock.read_text())
        if holder.get("hostname") != os.uname().nodename:
            raise BusyError(
                f"Process {holder['pid']} on {holder.get('hostname')} has the lock of stack {stack}. Run "
                f"`pulumi cancel -s {stack}` if that process is dead."
            )
        if _lives(int(holder["pid"])):
            raise BusyError(f"Another pulumi is updating stack {stack} (process {holder['pid']}). Wait for it.")
        lock.unlink(missing_ok=True)
        _end_orphans()
        return f"cleared the lock of process {holder['pid']}, which was killed"
    return ""


def _lives(pid: int) -> bool:
    """Whether a process runs `pulumi`: its id may have been given to another program since."""
    process = Path(f"/proc/{pid}")
    if Path("/proc/self").exists():
        with suppress(OSError):
            ended = process.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
            return not ended and process.joinpath("comm").read_text().startswith("pulumi")
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


PATIENCE = 10.0  # seconds that a plugin has to end

# Google's reads of a new service account miss it now and then for some seconds. One that a refresh did not find is
# looked for again after so many seconds.
SETTLING = (2.0, 5.0, 10.0)
_ACCOUNT: Final = "gcp:serviceaccount/account:Account"


def _end_orphans() -> None:
    """Ends the plugins of a killed Pulumi that did not notice its end, and waits until they are gone.

    What such a plugin was creating could otherwise come into being after this repair has looked for it. They are
    recognised by their working folder, their name and their parent, which is the first process. A pidfd makes sure
    that the signal reaches the process that was looked at. One that lives on for `PATIENCE` seconds is killed.
    """
    program = stacks.project_folder() / "infra"
    orphans = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError), ExitStack() as unless_orphan:
            descriptor = os.pidfd_open(int(process.name))
            unless_orphan.callback(os.close, descriptor)
            parent = process.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            name = process.joinpath("comm").read_text()
            if parent == "1" and name.startswith("pulumi-") and process.joinpath("cwd").readlink() == program:
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
                unless_orphan.pop_all()
                orphans.append(descriptor)
    deadline = time.monotonic() + PATIENCE
    for orphan in orphans:
        with suppress(OSError):
            if not select.select([orphan], [], [], max(0, deadline - time.monotonic()))[0]:
                signal.pidfd_send_signal(orphan, signal.SIGKILL)
        os.close(orphan)


def restore_state_file(stack: str) -> str:
    """Restores the backup of a state file that a killed Pulumi left incomplete. Returns a line about it, or ""."""
    backend = stacks.environment(stack).get("PULUMI_BACKEND_URL", "")
    file = Path(backend.removeprefix("file://")) / ".pulumi" / "stacks" / PROJECT / f"{stack}.json"
    if not backend.startswith("file://") or not file.exists():
        return ""
    try:
        json.loads(file.read_text())
    except ValueError:
        shutil.copy(file.with_name(f"{file.name}.bak"), file)
        return "took the last whole copy of the state"
    return ""


# The google provider's ids of resources whose names are taken once Google has made them. The other resources are not
# listed, because creating them again does no harm.
_IDS: Final = {
    "gcp:storage/bucket:Bucket": "{project}/{name}",
    "gcp:artifactregistry/repository:Repository": "projects/{project}/locations/{region}/repositories/{repositoryId}",
    _ACCOUNT: ("projects/{project}/serviceAccounts/{accountId}@{project}.iam.gserviceaccount.com"),
    "gcp:vertex/aiEndpoint:AiEndpoint": "projects/{project}/locations/{region}/endpoints/{name}",
}


def promote_pending(state: Mapping[str, Any], project: str, region: str) -> tuple[dict[str, Any], list[str]]:
    """Returns the state with its pending creates promoted to resources, and their names."""
    promoted = json.loads(json.dumps(state))
    deployment, names = promoted["deployment"], []
    known = {resource["urn"] for resource in deployment["resources"] if not resource.get("delete")}
    for operation in deployment.pop("pending_operations", None) or []:
        resource = operation["resource"]
        if operation["type"] != "creating":
            continue
        names.append(resource["urn"].rpartition("::")[2])
        # Pulumi may have been killed after it had saved the resource and before it had removed the pending create.
        if (pattern := _IDS.get(resource["type"])) and resource["urn"] not in known:
            id_ = pattern.format(**{"project": project, "region": region, **resource["inputs"]})
            # Without outputs the google provider reads the whole resource, as for an import.
            deployment["resources"].append({**resource, "id": id_, "outputs": {}})
    return promoted, names
