"""The sandbox of stack `local` as a process of this machine: started, found again and stopped."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from headcount import stacks
from headcount.stacks import StackError

#: Sandboxes that this process started. They outlive it; a Popen that is collected before its process ends would warn.
_started: list[subprocess.Popen[bytes]] = []


def port() -> int:
    """The sandbox's port, which the stack's file has in each address."""
    text = (stacks.project_folder() / f"Pulumi.{stacks.LOCAL}.yaml").read_text()
    found = re.search(r"^  vertex:endpoint: http://127\.0\.0\.1:(\d+)$", text, re.MULTILINE)
    if found is None:
        raise StackError(
            f"Pulumi.{stacks.LOCAL}.yaml has no line `vertex:endpoint: http://127.0.0.1:PORT`: restore it."
        )
    return int(found[1])


def registry_port() -> int:
    return port() + 1


def state_folder() -> Path:
    return stacks.home() / "sandbox"


def start(*options: str) -> None:
    """Returns when the sandbox answers. Raises StackError."""
    if _runs():
        return
    stacks.home().mkdir(exist_ok=True)
    command = [sys.executable, "-m", "sandbox", "--port", str(port()), "--registry-port", str(registry_port()),
               "--state", str(state_folder()), *options]  # fmt: skip
    with _log().open("wb") as log:
        process = subprocess.Popen(
            command, cwd=stacks.project_folder(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    _started.append(process)
    _pid_file().write_text(str(process.pid))
    for _ in range(300):
        if process.poll() is not None:
            raise StackError(f"The sandbox did not start: {_log().read_text().strip()}")
        with suppress(urllib.error.HTTPError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port()}/v1/projects/p/locations/l/models", timeout=2)
            return
        time.sleep(0.1)
    raise StackError(f"The sandbox does not answer on port {port()}; see {_log()}.")


def stop() -> None:
    """Returns when the sandbox has ended, if it ran. Raises StackError."""
    if not _runs():
        return
    pid = _pid()
    if pid is None:
        raise StackError("The sandbox was started by hand: stop it in its terminal, then repeat `make down`.")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    for _ in range(600):
        if not _runs():
            _pid_file().unlink()
            while _started:
                _started.pop().wait()
            return
        time.sleep(0.1)
    raise StackError(f"The sandbox (process {pid}) does not stop; see {_log()}.")


def left() -> list[str]:
    """Returns a line for each port of a stopped sandbox on which a process still listens."""
    found = []
    for number in (port(), registry_port()):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", number)) == 0:
                found.append(f"end the process that listens on port {number}")
    return found


def _runs() -> bool:
    """Whether a sandbox uses the state folder: it keeps a lock there as long as it lives."""
    lock = state_folder() / "lock"
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _pid() -> int | None:
    """The process that `start` started, if it is still that one: its id may belong to another program since."""
    try:
        pid = int(_pid_file().read_text())
    except (OSError, ValueError):
        return None
    command = _command(pid)
    return pid if "-m sandbox" in command and str(state_folder()) in command else None


def _command(pid: int) -> str:
    """The command line of a process, or "" if there is none."""
    if Path("/proc/self").exists():
        with suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return ""
    return subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True).stdout


def _pid_file() -> Path:
    return stacks.home() / "sandbox.pid"


def _log() -> Path:
    return stacks.home() / "sandbox.log"
