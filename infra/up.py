"""`make up` and `make down`: the whole of it on this machine, from nothing to a count and back to nothing.

    python -m infra.up [PICTURE]
    python -m infra.up --down

Both look at what is there first, so they may be repeated, interrupted and killed.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from infra import stacks
from infra.stacks import CLI, HOME, LOCAL, ROOT, BusyError, StackError

PORT: Final = 8790  # of the sandbox, as Pulumi.local.yaml has it
REGISTRY_PORT: Final = 8791  # of its Docker registry
SANDBOX: Final = HOME / "sandbox"
PID: Final = HOME / "sandbox.pid"
LOG: Final = HOME / "sandbox.log"
BUILDX: Final = HOME / "buildx"
BUILDER: Final = "headcount"


def up(picture: Path | None) -> None:
    """Deploys stack `local` and counts the people in `picture`. Raises StackError."""
    _check_docker()
    _install_pulumi()
    _prepare_builder()
    _start_sandbox()
    if not stacks.exists(LOCAL):
        (HOME / "pulumi" / "state").mkdir(parents=True, exist_ok=True)
        stacks.pulumi(LOCAL, "stack", "init")
    _recover()
    if stacks.run(LOCAL, "up", "--yes", "--skip-preview"):
        raise StackError("`pulumi up` did not end well; what it says is above. Repeat `make up` when it is repaired.")
    if picture:
        url = str(stacks.outputs(LOCAL)["url"])
        print(f"\n{_people(_count(url, picture))} in {picture.name}")


def down() -> None:
    """Destroys stack `local`, stops the sandbox and removes what both left. Raises StackError."""
    if stacks.installed() and stacks.exists(LOCAL):
        _start_sandbox()
        force = []
        if _recover() or stacks.run(LOCAL, "destroy", "--yes", "--skip-preview"):
            # A killed `up` may have deployed what the state does not know. All of it is in the sandbox.
            print("The sandbox is emptied, with whatever a killed or failed run left in it.", flush=True)
            _stop_sandbox()
            _start_sandbox("--fresh")
            _forget_images()
            force = ["--force"]
        stacks.pulumi(LOCAL, "stack", "rm", "--yes", "--preserve-config", *force)
    _stop_sandbox()
    if BUILDX.exists():
        subprocess.run(["docker", "buildx", "rm", BUILDER], env=_buildx(), capture_output=True)
    for path in (SANDBOX, BUILDX, HOME / "pulumi" / "state", HOME / "context"):
        shutil.rmtree(path, ignore_errors=True)
    print("Nothing of stack local is left: no container, volume, process or port.")


def _recover() -> bool:
    """Takes up what a killed run left; whether there was anything. Its Pulumi may live: that one is waited for."""
    told = False
    while True:
        try:
            lines = stacks.recover(LOCAL)
            print("".join(f"{line}\n" for line in lines), end="", flush=True)
            return bool(lines)
        except BusyError as error:
            if not told:
                print(error, flush=True)
            told = True
            time.sleep(1)


# --------------------------------------------------------------------------------------- what it needs


def _check_docker() -> None:
    if not shutil.which("docker"):
        raise StackError("Docker is not installed: https://docs.docker.com/get-docker/. Install it and repeat.")
    if subprocess.run(["docker", "info"], capture_output=True).returncode:
        raise StackError("Docker does not answer. Start it (Docker Desktop, or `systemctl start docker`) and repeat.")


def _install_pulumi() -> None:
    if stacks.installed():
        return
    from pulumi.automation import PulumiCommand

    print("Installing Pulumi's command line", flush=True)
    try:
        PulumiCommand.install(root=str(CLI))
    except Exception:  # Pulumi's installer raises many kinds; what to do is the same
        raise StackError(f"{stacks.INSTALL} (Its installer could not be fetched.)") from None


def _buildx() -> dict[str, str]:
    return {**os.environ, "BUILDX_CONFIG": str(BUILDX)}


def _prepare_builder() -> None:
    """A builder that reaches the registry on this machine's loopback, in a configuration of its own.

    Docker's own builder cannot be used by Pulumi's provider, and one in a container has a loopback of its own unless
    it shares the host's network. Without buildx, a builder that is set up already is left to the provider to find.
    """
    if "BUILDX_CONFIG" in os.environ:
        return
    if subprocess.run(["docker", "buildx", "version"], capture_output=True).returncode:
        known = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "buildx" / "instances"
        if known.is_dir() and any(known.iterdir()):
            return
        raise StackError("Docker has no buildx: install the package docker-buildx-plugin (or docker-buildx).")
    create = ["--driver", "docker-container", "--driver-opt", "network=host", "--name", BUILDER, "--use"]
    if subprocess.run(["docker", "buildx", "inspect", BUILDER], env=_buildx(), capture_output=True).returncode:
        done = subprocess.run(["docker", "buildx", "create", *create], env=_buildx(), capture_output=True, text=True)
        if done.returncode:
            raise StackError(f"Docker cannot make a builder: {done.stderr.strip()}")
    os.environ["BUILDX_CONFIG"] = str(BUILDX)


# ----------------------------------------------------------------------------------------- the sandbox


def _sandbox_runs() -> bool:
    """Whether a sandbox holds the state folder: it keeps a lock as long as it lives."""
    lock = SANDBOX / "lock"
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _start_sandbox(*options: str) -> None:
    if _sandbox_runs():
        return
    HOME.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "sandbox", "--port", str(PORT), "--state", str(SANDBOX), *options]
    with LOG.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    PID.write_text(str(process.pid))
    for _ in range(300):
        if process.poll() is not None:
            raise StackError(f"The sandbox did not start: {LOG.read_text().strip()}")
        with suppress(urllib.error.HTTPError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/projects/p/locations/l/models", timeout=2)
            return
        time.sleep(0.1)
    raise StackError(f"The sandbox does not answer on port {PORT}; see {LOG}.")


def _stop_sandbox() -> None:
    if not _sandbox_runs():
        return
    if not PID.exists():
        raise StackError("The sandbox was started by hand: stop it there, then repeat `make down`.")
    os.kill(int(PID.read_text()), signal.SIGTERM)
    for _ in range(600):
        if not _sandbox_runs():
            PID.unlink()
            return
        time.sleep(0.1)
    raise StackError(f"The sandbox (process {PID.read_text()}) does not stop; see {LOG}.")


def _forget_images() -> None:
    """Removes what Docker pulled from the sandbox's registry."""
    listed = subprocess.run(["docker", "images", "--format", "{{.ID}} {{.Repository}}"], capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        if f" 127.0.0.1:{REGISTRY_PORT}/" in line:
            subprocess.run(["docker", "rmi", "-f", line.split()[0]], capture_output=True)


# --------------------------------------------------------------------------------------------- a count


def _count(url: str, picture: Path) -> int:
    request = urllib.request.Request(
        f"{url}:rawPredict", data=picture.read_bytes(), headers={"Content-Type": "application/octet-stream"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(json.load(answer)["count"])
    except urllib.error.HTTPError as error:
        said = json.loads(error.read() or b"{}").get("error", {}).get("message", error.reason)
        raise StackError(f"The endpoint answered {error.code}: {said}") from None
    except OSError as error:
        raise StackError(f"The endpoint does not answer: {error}") from None


def _people(count: int) -> str:
    return "1 person" if count == 1 else f"{count} people"


@contextmanager
def _alone() -> Iterator[None]:
    """One `make up` or `make down` of this checkout at a time."""
    HOME.mkdir(exist_ok=True)
    with (HOME / "up.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError("Another `make up` or `make down` is at work here. Wait for it.") from None
        yield


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.up", description=__doc__)
    parser.add_argument("picture", nargs="?", type=Path, help="counted at the end")
    parser.add_argument("--down", action="store_true", help="the opposite")
    args = parser.parse_args(arguments)
    try:
        with _alone():
            if args.down:
                down()
            else:
                up(args.picture)
    except StackError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Repeat it, and it goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
