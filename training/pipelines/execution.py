"""Runs the command of a step: as a process of this machine, or in a container of the step's image."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from training.files import UsageError
from training.pipelines.cache import code_identity

GRACE_SECONDS = 10  # between the request to stop and the kill


@dataclass(frozen=True)
class Command:
    """A step's command. command replaces the image's entry point, if there is one; args follow it.

    folder: absolute path of the folder for the step's outputs, which exists.
    """

    image: str
    command: Sequence[str]
    args: Sequence[str]
    environment: Mapping[str, str]
    folder: Path


class Execution(Protocol):
    """A way to run commands."""

    def prepare(self, images: Sequence[str]) -> None:
        """Makes the images usable. Raises UsageError."""

    def identity(self, image: str) -> str:
        """Returns a text that changes with the content of an image."""

    def run(self, command: Command, log: IO[bytes]) -> str:
        """Runs a command to its end, and appends its output to `log`. Returns why it failed, or ""."""

    def stop(self) -> None:
        """Asks all commands that run to end."""


class Processes:
    """Runs commands as processes in this environment, which has the packages of the training image.

    `python` and `python3` are the interpreter that runs this; the image is not looked at.
    """

    def __init__(self) -> None:
        self._code = ""
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def prepare(self, images: Sequence[str]) -> None:
        self._code = code_identity()

    def identity(self, image: str) -> str:
        return f"{image} {self._code}"

    def run(self, command: Command, log: IO[bytes]) -> str:
        words = [*command.command, *command.args]
        if not command.command:
            return "it has no command of its own, so that it runs in its image only; use --docker"
        scratch = command.folder / "tmp"  # KFP writes the source of a component there
        scratch.mkdir()
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "TMPDIR": str(scratch),
            **command.environment,
        }
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, process_group=0
            )
        except OSError as error:
            return f"{words[0]} cannot be started: {error.strerror}"
        self._running[process.pid] = process
        try:
            with _ended(process):
                code = process.wait()
        finally:
            del self._running[process.pid]
            shutil.rmtree(scratch, ignore_errors=True)
        if code < 0:
            return f"it was killed by {signal.Signals(-code).name}"
        return f"it ended with the exit code {code}" if code else ""

    def stop(self) -> None:
        for process in list(self._running.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends the process, and those that it started, when the block is left by an exception."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        raise


@dataclass
class Containers:
    """Runs each command in a container of its image, which sees the folders by the same paths.

    folders: absolute paths; those of `read_only` cannot be written. environment: of all containers.
    """

    folders: Sequence[Path]
    read_only: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    _running: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            import docker
        except ImportError:
            raise UsageError("--docker needs the Python package docker; run `make install`") from None
        try:
            self._client = docker.from_env(timeout=600)
        except docker.errors.DockerException as error:
            raise UsageError(f"no Docker engine answers ({error}); start Docker, or run without --docker") from None

    def close(self) -> None:
        self._client.close()

    def stop(self) -> None:
        import docker

        for container in list(self._running):
            with contextlib.suppress(docker.errors.APIError):
                container.kill()

    def prepare(self, images: Sequence[str]) -> None:
        import docker

        for image in images:
            try:
                self._client.images.get(image)
            except docker.errors.ImageNotFound:
                try:
                    self._client.images.pull(image)
                except docker.errors.APIError as error:
                    raise UsageError(
                        f"the image {image} is not here and cannot be pulled ({error.explanation}); build the training "
                        "image: make image TARGET=training IMAGE=headcount-training"
                    ) from None

    def identity(self, image: str) -> str:
        return str(self._client.images.get(image).id)

    def run(self, command: Command, log: IO[bytes]) -> str:
        import docker

        mounts = [
            docker.types.Mount(str(folder), str(folder), "bind", read_only=folder in self.read_only)
            for folder in (*self.folders, *self.read_only)
        ]
        try:
            container = self._client.containers.create(
                command.image,
                entrypoint=list(command.command) or None,
                command=list(command.args) or None,
                environment={**self.environment, **command.environment},
                user=f"{os.getuid()}:{os.getgid()}",
                mounts=mounts,
                init=True,
                labels={"headcount.step": command.folder.name},
            )
        except docker.errors.APIError as error:
            return f"Docker cannot create its container: {error.explanation}"
        self._running.append(container)
        try:
            return _watched(container, log)
        except docker.errors.NotFound:
            return "its container vanished before it ended"
        except docker.errors.APIError as error:
            return f"Docker cannot run its container: {error.explanation}"
        finally:
            self._running.remove(container)
            with contextlib.suppress(docker.errors.APIError):
                container.remove(force=True, v=True)


def _watched(container: Any, log: IO[bytes]) -> str:
    """Runs a container to its end. Returns why it failed, or ""."""
    container.start()
    for part in container.logs(stream=True, follow=True):
        log.write(part)
        log.flush()
    # Unlike KFP's Docker runner, which removes its containers at their end and takes an unknown status for a success.
    ended = container.wait()
    code = int(ended["StatusCode"])
    if code > 128 and code - 128 in {one.value for one in signal.Signals}:
        return f"it was killed by {signal.Signals(code - 128).name}"
    return f"it ended with the exit code {code}" if code else ""
