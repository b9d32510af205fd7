"""Docker on this machine: whether it answers, a builder for Pulumi's provider, and the images of the sandbox."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from headcount import stacks
from headcount.stacks import StackError

BUILDER: Final = "headcount"


def check() -> None:
    """Raises StackError where Docker is missing or does not answer."""
    if not shutil.which("docker"):
        raise StackError("Docker is not installed: https://docs.docker.com/get-docker/. Install it and repeat.")
    if subprocess.run(["docker", "info"], capture_output=True).returncode:
        raise StackError("Docker does not answer. Start it (Docker Desktop, or `systemctl start docker`) and repeat.")


def prepare_builder() -> None:
    """Makes a builder that reaches the registry on this machine's loopback, in a configuration of its own.

    Pulumi's provider cannot use Docker's own builder, and a builder in a container has a loopback of its own unless it
    shares the host's network. Where buildx is missing, the provider finds a builder that is set up already. Raises
    StackError.
    """
    if "BUILDX_CONFIG" in os.environ:
        return
    if subprocess.run(["docker", "buildx", "version"], capture_output=True).returncode:
        known = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "buildx" / "instances"
        if known.is_dir() and any(known.iterdir()):
            return
        raise StackError("Docker has no buildx: install the package docker-buildx-plugin (or docker-buildx).")
    create = ["--driver", "docker-container", "--driver-opt", "network=host", "--name", BUILDER, "--use"]
    if subprocess.run(["docker", "buildx", "inspect", BUILDER], env=_environment(), capture_output=True).returncode:
        done = subprocess.run(
            ["docker", "buildx", "create", *create], env=_environment(), capture_output=True, text=True
        )
        if done.returncode:
            raise StackError(f"Docker cannot make a builder: {done.stderr.strip()}")
    os.environ["BUILDX_CONFIG"] = str(_configuration())


def remove_builder() -> None:
    if _configuration().exists():
        subprocess.run(["docker", "buildx", "rm", BUILDER], env=_environment(), capture_output=True)
        shutil.rmtree(_configuration(), ignore_errors=True)


def forget_images(registry_port: int) -> None:
    """Removes the images that Docker pulled from the sandbox's registry."""
    for id_ in _listed("images", "{{.Repository}}", registry_port):
        subprocess.run(["docker", "rmi", "-f", id_], capture_output=True)


def left(registry_port: int) -> list[str]:
    """Returns the commands that remove the leftovers of stack `local`: containers, volumes and images."""
    if not shutil.which("docker"):
        return []
    found = [f"docker rm -f {id_}" for id_ in _listed("ps", "{{.Image}}", registry_port)]
    found += [f"docker rmi -f {id_}" for id_ in _listed("images", "{{.Repository}}", registry_port)]
    for kind in ("container", "volume"):
        name = f"name=buildx_buildkit_{BUILDER}0"
        listed = subprocess.run(["docker", kind, "ls", "-q", "--filter", name], capture_output=True, text=True)
        found += [f"docker {kind} rm -f {line}" for line in listed.stdout.split()]
    return found


def _listed(what: str, image: str, registry_port: int) -> list[str]:
    """Returns the ids of containers (`ps`) or images (`images`) from the sandbox's registry."""
    every = ["-a"] if what == "ps" else []
    listed = subprocess.run(
        ["docker", what, *every, "--format", f"{{{{.ID}}}} {image}"], capture_output=True, text=True
    )
    lines = [line.split(" ", 1) for line in listed.stdout.splitlines()]
    return [id_ for id_, name in lines if name.startswith(f"127.0.0.1:{registry_port}/")]


def _configuration() -> Path:
    return stacks.home() / "buildx"


def _environment() -> dict[str, str]:
    return {**os.environ, "BUILDX_CONFIG": str(_configuration())}
