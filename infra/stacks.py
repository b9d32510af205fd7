"""Pulumi's command line as this project calls it: which program, which state, what a stack put out.

python -m infra.stacks endpoint STACK   where the stack counts pictures, as JSON
python -m infra.stacks recover STACK    takes up what a Pulumi that was killed left
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
HOME: Final = ROOT / ".headcount"
CLI: Final = HOME / "pulumi" / "cli"
LOCAL: Final = "local"
# The state of the sandbox's stack holds nothing secret: its token is the word "sandbox". A passphrase that is known
# lets Pulumi.local.yaml be the same for everybody.
LOCAL_STATE: Final = {
    "PULUMI_BACKEND_URL": f"file://{HOME / 'pulumi' / 'state'}",
    "PULUMI_CONFIG_PASSPHRASE": "headcount",
    # The google provider makes one call to Compute Engine at its start, whatever endpoint is set.
    "PULUMI_GCP_SKIP_REGION_VALIDATION": "true",
}
INSTALL: Final = (
    "Pulumi's command line is not installed. See https://www.pulumi.com/docs/install/, put `pulumi` on the PATH "
    "and repeat."
)


class StackError(Exception):
    """Something the user can repair; its text says how."""


class BusyError(StackError):
    """Another Pulumi is at work on the stack."""


@dataclass(frozen=True)
class Endpoint:
    """Where a stack's pictures are counted."""

    url: str  # without `:predict` or `:rawPredict`
    needs_token: bool  # Application Default Credentials; the sandbox wants none
    max_bytes: int  # of a request: https://cloud.google.com/vertex-ai/docs/predictions/choose-endpoint-type


def environment(stack: str) -> dict[str, str]:
    """The environment of Pulumi's process: this Python first on the PATH, `local`'s state in .headcount."""
    given = dict(os.environ)
    folders = [str(Path(sys.executable).parent), str(CLI / "bin"), given.get("PATH", "")]
    given |= {"PATH": os.pathsep.join(folders), "PULUMI_SKIP_UPDATE_CHECK": "true"}
    return given | LOCAL_STATE if stack == LOCAL else given


def pulumi(stack: str, *arguments: str) -> str:
    """What Pulumi prints. Raises StackError with its own words."""
    done = _called(stack, *arguments, "--non-interactive", "--stack", stack)
    if done.returncode:
        raise StackError(done.stderr.strip() or done.stdout.strip())
    return done.stdout


def _called(stack: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["pulumi", *arguments], cwd=ROOT, env=environment(stack), capture_output=True, text=True)
    except FileNotFoundError:
        raise StackError(INSTALL) from None


def run(stack: str, *arguments: str) -> int:
    """Runs Pulumi on this terminal and returns its exit status.

    Ctrl-C reaches Pulumi, which ends in its own time; if it then failed, KeyboardInterrupt is raised.
    """
    interrupted = False

    def note(*_: object) -> None:
        nonlocal interrupted
        interrupted = True

    try:
        process = subprocess.Popen(["pulumi", *arguments, "--stack", stack], cwd=ROOT, env=environment(stack))
    except FileNotFoundError:
        raise StackError(INSTALL) from None
    before = signal.signal(signal.SIGINT, note)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if status and interrupted:
        raise KeyboardInterrupt
    return status


def outputs(stack: str) -> dict[str, Any]:
    """What the stack exports. Raises StackError when it was never deployed."""
    how = "make up" if stack == LOCAL else f"pulumi up -s {stack}"
    missing = StackError(f"Stack {stack} is not deployed. Deploy it: {how}")
    if stack == LOCAL and not exists(LOCAL):
        raise missing
    try:
        found: dict[str, Any] = json.loads(pulumi(stack, "stack", "output", "--json"))
    except StackError as error:
        if "no stack named" in str(error):
            raise StackError(f"There is no stack {stack}: `pulumi stack ls` lists those that there are.") from None
        if "PULUMI_ACCESS_TOKEN" in str(error):
            raise StackError("Pulumi does not know where the state is: `pulumi login` first.") from None
        raise
    if not found:
        raise missing
    return found


def endpoint(stack: str) -> Endpoint:
    """Where `stack` counts pictures. Raises StackError."""
    return endpoint_of(outputs(stack))


def endpoint_of(found: Mapping[str, Any]) -> Endpoint:
    url = str(found["url"])
    return Endpoint(url, needs_token=url.startswith("https://"), max_bytes=int(found["maxRequestBytes"]))


def exists(stack: str) -> bool:
    """Whether the state knows `stack`. Raises StackError without Pulumi."""
    listed = _called(stack, "stack", "ls", "--json", "--project", "headcount")
    return listed.returncode == 0 and any(s["name"] == stack for s in json.loads(listed.stdout))


# ---------------------------------------------------------------------------------------- after a kill


def clear_lock(stack: str) -> str:
    """Removes the lock of a Pulumi that was killed on this machine. Returns what it did, or "".

    Raises BusyError when that Pulumi still runs. Only for a state in files, where a lock is a file.
    """
    backend = environment(stack).get("PULUMI_BACKEND_URL", "")
    folder = Path(backend.removeprefix("file://")) / ".pulumi" / "locks"
    for lock in folder.glob(f"organization/headcount/{stack}/*.json"):
        holder = json.loads(lock.read_text())
        if holder.get("hostname") == os.uname().nodename and _runs(int(holder["pid"])):
            raise BusyError(f"Another pulumi is at work on stack {stack} (process {holder['pid']}). Wait for it.")
        lock.unlink(missing_ok=True)
        _end_orphans()
        return f"cleared the lock of process {holder['pid']}, which was killed"
    return ""


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    with suppress(OSError):  # where there is no /proc
        if stat.read_text().rpartition(")")[2].split()[0] == "Z":  # ended, and not yet missed by its parent
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _end_orphans() -> None:
    """Ends the plugins that a killed Pulumi left: some do not notice. Only where there is /proc."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = process.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            ours = process.joinpath("cwd").readlink() == ROOT / "infra"
            name = process.joinpath("comm").read_text()
            if ours and parent == "1" and name.startswith("pulumi-"):
                os.kill(int(process.name), signal.SIGTERM)


# What the google provider calls a resource that Google may have made before Pulumi was killed. The others are not
# listed: making them again does no harm.
_IDS: Final = {
    "gcp:storage/bucket:Bucket": "{project}/{name}",
    "gcp:artifactregistry/repository:Repository": "projects/{project}/locations/{region}/repositories/{repositoryId}",
    "gcp:serviceaccount/account:Account": (
        "projects/{project}/serviceAccounts/{accountId}@{project}.iam.gserviceaccount.com"
    ),
    "gcp:vertex/aiEndpoint:AiEndpoint": "projects/{project}/locations/{region}/endpoints/{name}",
}


def adopted(state: Mapping[str, Any], project: str, region: str) -> tuple[dict[str, Any], list[str]]:
    """The state in which what was being created when Pulumi was killed counts as created, and the names of that.

    Whether it was, `pulumi refresh` finds out: it reads by the id, and forgets what is not there.
    """
    adopted = json.loads(json.dumps(state))
    deployment, names = adopted["deployment"], []
    for operation in deployment.pop("pending_operations", None) or []:
        resource = operation["resource"]
        if operation["type"] != "creating":
            continue
        names.append(resource["urn"].rpartition("::")[2])
        if pattern := _IDS.get(resource["type"]):
            id_ = pattern.format(**{"project": project, "region": region, **resource["inputs"]})
            # Without outputs the google provider reads everything anew, as for an import.
            deployment["resources"].append({**resource, "id": id_, "outputs": {}})
    return adopted, names


def recover(stack: str) -> list[str]:
    """Mends what a killed run left, and returns what it did. Raises StackError.

    Pulumi keeps a list of what it was creating. Without this, the next `up` would meet names that are taken.
    """
    said = [line] if (line := clear_lock(stack)) else []
    said += [line] if (line := mend_file(stack)) else []
    state = json.loads(pulumi(stack, "stack", "export"))
    if not state.get("deployment", {}).get("pending_operations"):
        return said
    config = {key: entry.get("value", "") for key, entry in json.loads(pulumi(stack, "config", "--json")).items()}
    mended, names = adopted(state, config["gcp:project"], config["gcp:region"])
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # its secrets stay encrypted
        json.dump(mended, file)
        file.flush()
        pulumi(stack, "stack", "import", "--file", file.name)
    pulumi(stack, "refresh", "--yes", "--skip-preview")
    return [*said, f"looked whether these were created before Pulumi was killed: {', '.join(names)}"]


def mend_file(stack: str) -> str:
    """Takes the last whole copy of a state in files that was being written when Pulumi was killed."""
    backend = environment(stack).get("PULUMI_BACKEND_URL", "")
    file = Path(backend.removeprefix("file://")) / ".pulumi" / "stacks" / "headcount" / f"{stack}.json"
    if not backend.startswith("file://") or not file.exists():
        return ""
    try:
        json.loads(file.read_text())
    except ValueError:
        shutil.copy(file.with_name(f"{file.name}.bak"), file)
        return "took the last whole copy of the state"
    return ""


def installed() -> bool:
    return shutil.which("pulumi", path=environment(LOCAL)["PATH"]) is not None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m infra.stacks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("endpoint", "recover"))
    parser.add_argument("stack")
    args = parser.parse_args(arguments)
    try:
        if args.what == "endpoint":
            print(json.dumps(asdict(endpoint(args.stack))))
        else:
            print("\n".join(recover(args.stack)) or "nothing to recover")
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
