"""The stacks of this project, through Pulumi's command line and Automation API."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pulumi.automation import PulumiCommand

PROJECT: Final = "headcount"
LOCAL: Final = "local"  # the stack of `make up` on the sandbox
TRAINED: Final = ("local-census", "local-digits")  # those of `make deploy`
INSTALL: Final = (
    "Pulumi's command line is not installed. See https://www.pulumi.com/docs/install/, put `pulumi` on the PATH "
    "and repeat."
)


class StackError(Exception):
    """An operation on a stack failed; the message says how to repair it."""


class BusyError(StackError):
    """Another Pulumi process is updating the stack."""


def project_folder() -> Path:
    """The folder of the project's Pulumi.yaml: the working folder or one above it, else the checkout of this file.

    Raises StackError.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        file = folder / "Pulumi.yaml"
        if file.is_file() and f"name: {PROJECT}\n" in file.read_text():
            return folder
    raise StackError(
        f"There is no Pulumi.yaml of the project {PROJECT} in {here} or above it. Go to a checkout and repeat, or name "
        "an endpoint by --endpoint."
    )


def home() -> Path:
    """The folder of the checkout's own state: Pulumi's command line and the state of stack `local`."""
    return project_folder() / ".headcount"


def cli_folder() -> Path:
    """The folder in which `make up` installs Pulumi's command line."""
    return home() / "pulumi" / "cli"


def state_folder() -> Path:
    """The folder with the state of the stacks on the sandbox."""
    return home() / "pulumi" / "state"


def is_local(stack: str) -> bool:
    """Whether a stack is deployed on the sandbox of this machine."""
    return stack in (LOCAL, *TRAINED)


def environment(stack: str) -> dict[str, str]:
    """The environment of Pulumi's process: this Python is first on the PATH, and local stacks have their own state."""
    folders = [str(Path(sys.executable).parent), str(cli_folder() / "bin"), os.environ.get("PATH", "")]
    changed = {**os.environ, "PATH": os.pathsep.join(folders), "PULUMI_SKIP_UPDATE_CHECK": "true"}
    if is_local(stack):
        changed |= {
            "PULUMI_BACKEND_URL": f"file://{state_folder()}",
            # The state holds no secret, because the sandbox's token is the word "sandbox". With a public passphrase
            # Pulumi.local.yaml is the same for everybody.
            "PULUMI_CONFIG_PASSPHRASE": "headcount",
            # The google provider asks Compute Engine for its regions at its start, whatever endpoint is set.
            "PULUMI_GCP_SKIP_REGION_VALIDATION": "true",
        }
    return changed


def installed() -> bool:
    return shutil.which("pulumi", path=environment(LOCAL)["PATH"]) is not None


def pulumi(stack: str, *arguments: str, **variables: str) -> str:
    """Returns the output of a Pulumi command on a stack. Raises StackError with Pulumi's message.

    variables: of the environment, besides the stack's own.
    """
    return _output(stack, *arguments, "--stack", stack, **variables)


def backend(stack: str) -> str:
    """The URL of the backend that keeps the stack's state, such as gs://BUCKET. Raises StackError."""
    return str(json.loads(_output(stack, "whoami", "--json"))["url"])


def digest(stack: str, *arguments: str) -> dict[str, Any]:
    """Returns the steps of a preview, as Pulumi prints them with `--json`: secrets are blinded in it.

    Raises StackError with the errors of the preview.
    """
    try:
        found: dict[str, Any] = json.loads(pulumi(stack, *arguments, "--json"))
    except _OutputError as error:
        with contextlib.suppress(ValueError):
            raise StackError(errors_of(json.loads(error.output)) or str(error)) from None
        raise
    return found


def errors_of(digest: dict[str, Any]) -> str:
    """The errors that a preview reports, each once; "" where there are none."""
    lines = [
        re.sub(r"^error: +", "", line["message"]).strip()
        for line in digest.get("diagnostics") or []
        if line.get("severity") == "error"
    ]
    said = list(dict.fromkeys(lines))
    return "\n".join([line for line in said if line != "preview failed"] or said)


class _OutputError(StackError):
    """A Pulumi command failed after it had printed something."""

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


def _output(stack: str, *arguments: str, **variables: str) -> str:
    command = _command()
    from pulumi.automation.errors import CommandError, StackNotFoundError

    try:
        done = command.run([*arguments], str(project_folder()), environment(stack) | variables)
    except StackNotFoundError:
        raise StackError(f"There is no stack {stack}: `pulumi stack ls` lists the existing stacks.") from None
    except CommandError as error:
        printed, _, complained = str(error).partition("\n stderr: ")
        said = complained.strip() or str(error)
        if "PULUMI_ACCESS_TOKEN" in said:
            raise StackError("Pulumi does not know where the state is: run `pulumi login` first.") from None
        raise _OutputError(said, printed.partition("\n stdout: ")[2]) from None
    return str(done.stdout)


def _command() -> PulumiCommand:
    try:
        from pulumi.automation import PulumiCommand
    except ImportError as error:
        raise StackError(f"A stack needs the package {error.name}: run `make install` and repeat.") from None
    try:
        on_path = shutil.which("pulumi")
        return PulumiCommand(root=None if on_path else str(cli_folder()))
    except FileNotFoundError:
        raise StackError(INSTALL) from None


def run(stack: str, *arguments: str) -> int:
    """Runs Pulumi on this terminal and returns its exit status.

    The Automation API would run it without its live display. Ctrl-C reaches Pulumi, which ends in its own time;
    KeyboardInterrupt is raised if it then failed.
    """
    interrupted = False

    def note(*_: object) -> None:
        nonlocal interrupted
        interrupted = True

    try:
        process = subprocess.Popen(
            ["pulumi", *arguments, "--stack", stack], cwd=project_folder(), env=environment(stack)
        )
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


def local_stacks() -> list[str]:
    """The stacks on the sandbox. Raises StackError where Pulumi is not installed."""
    try:
        listed = pulumi(LOCAL, "stack", "ls", "--json")
    except StackError as error:
        if str(error) == INSTALL:
            raise
        return []
    return [found["name"] for found in json.loads(listed) if is_local(found["name"])]


def outputs(stack: str) -> dict[str, Any]:
    """Returns the stack's outputs. Raises StackError if it was never deployed."""
    workload = stack.removeprefix(f"{LOCAL}-")
    make = "make up" if stack == LOCAL else f"make deploy WORKLOAD={workload}"
    how = make if is_local(stack) else f"pulumi up -s {stack}"
    missing = StackError(f"Stack {stack} is not deployed. Deploy it: {how}")
    if is_local(stack) and not state_folder().is_dir():
        raise missing
    # Not LocalWorkspace.stack_outputs, because that decrypts secrets too, for which a reader may have no key.
    found: dict[str, Any] = json.loads(pulumi(stack, "stack", "output", "--json"))
    if not found:
        raise missing
    return found
