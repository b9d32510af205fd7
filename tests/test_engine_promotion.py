"""Production under Pulumi's engine: what it takes from dev, what it refuses, and what it does without dev.

The tests are in the order of a stack's life.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_project import EngineProject
from google_clients import service_account_key
from helpers import Load

from sandbox.testing import RunningSandbox

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine", "docker", "registry", "build"), pytest.mark.timeout(900)]

INSTANCES = {"instances": [{"image": {"b64": "/9hwaWN0dXJl"}}]}


class Stack:
    """One stack of a project."""

    def __init__(self, project: EngineProject, name: str) -> None:
        self.project, self.name = project, name

    def run(self, command: str, *more: str, fails: bool = False) -> str:
        return self.project.pulumi(*command.split(), "-s", self.name, *more, fails=fails)

    def up(self, *more: str, fails: bool = False) -> str:
        return self.run("up", "--yes", "--skip-preview", *more, fails=fails)

    def destroy(self, *more: str, fails: bool = False) -> str:
        return self.run("destroy", "--yes", "--skip-preview", *more, fails=fails)

    def release(self, *arguments: str) -> None:
        self.project.python("headcount.cli", "release", "-s", self.name, *arguments)

    def set(self, key: str, value: str) -> None:
        self.run("config set", key, value)

    @property
    def outputs(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("stack output", "--json"))
        return found

    def count(self) -> int:
        return self.project.count(self.outputs["url"])


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[EngineProject]:
    """A project with a sandbox of these options."""
    project = EngineProject(folder)
    project.sandbox.close()  # the one of test_engine_infra, which was not started
    port = str(project.registry_port)
    project.sandbox = RunningSandbox("--registry-port", port, *options, runner="docker", state=folder / "sandbox")
    try:
        project.start()
        yield project
    finally:
        project.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProject]:
    with running(tmp_path_factory.mktemp("promotion")) as project:
        yield project


@pytest.fixture(scope="module")
def dev(project: EngineProject) -> Stack:
    project.up()
    return Stack(project, "local")


@pytest.fixture(scope="module")
def prod(project: EngineProject, dev: Stack) -> Stack:
    """Production as docs/deploy.md sets it up, with the release that dev proved."""
    lines = [line for line in project.stack_file.splitlines(True) if not line.startswith(("encryptionsalt", "#"))]
    (project.folder / "Pulumi.prod.yaml").write_text("".join([*lines, "  headcount:releases: {}\n"]))
    project.pulumi("stack", "init", "prod")
    prod = Stack(project, "prod")
    prod.set("headcount:production", "true")
    prod.set("imageSource", dev.outputs["repository"])
    prod.run("config set", "--path", "predictors[0]", "group:analysts@example.com")
    prod.release("add", "main", "--from", "local")
    prod.up()
    return prod


def test_a_promotion_copies_the_digest_into_prod_s_own_repository(dev: Stack, prod: Stack) -> None:
    proved, serves = dev.outputs, prod.outputs
    image, _, digest = serves["images"]["main"].partition("@")
    assert digest == proved["images"]["main"].partition("@")[2]
    assert image == f"{serves['repository']}/headcount"
    assert serves["repository"] != proved["repository"]
    assert serves["images"]["main"] in prod.project.containers()
    assert prod.count() == 4
    prod.run("preview", "--expect-no-changes")
    prod.run("refresh", "--yes", "--expect-no-changes")


def test_during_and_after_a_refused_destroy_of_prod_every_request_is_answered(prod: Stack) -> None:
    with Load(f"{prod.outputs['url']}:predict", INSTANCES) as load:
        said = prod.destroy(fails=True)
    assert "protect" in said
    assert {status for status, _ in load.answers} == {200}, load.answers
    assert sum(load.answers.values()) > 20
    assert prod.count() == 4
    prod.up("--expect-no-changes")


def outages(said: str) -> int:
    """How often a preview names an outage, where it sums up what was said."""
    return said.partition("Diagnostics:")[2].count("is replaced, which is an outage")


def test_another_endpoint_is_an_outage_that_the_preview_names_and_prod_refuses(dev: Stack, prod: Stack) -> None:
    dev.set("dedicated", "false")
    assert outages(dev.run("preview")) == 1
    dev.up()
    assert dev.count() == 4

    assert outages(prod.run("preview")) == 0
    prod.set("dedicated", "false")
    with Load(f"{prod.outputs['url']}:predict", INSTANCES) as load:
        for said in (prod.run("preview", fails=True), prod.up(fails=True)):
            assert "unable to replace" in said
            assert "protect" in said
    assert {status for status, _ in load.answers} == {200}, load.answers
    prod.set("dedicated", "true")
    prod.up("--expect-no-changes")


def test_with_dev_destroyed_prod_deploys_again(dev: Stack, prod: Stack) -> None:
    dev.destroy("--remove")
    image = prod.outputs["images"]["main"]

    prod.release("pause")
    prod.up()
    assert prod.project.containers() == []
    subprocess.run(["docker", "rmi", "-f", image], check=True, capture_output=True)  # it has to be pulled again
    prod.release("resume")
    prod.up()
    assert prod.project.containers() == [image]
    assert prod.count() == 4

    prod.set("replaceEndpoint", "true")
    prod.up()
    prod.set("dedicated", "false")
    assert outages(prod.run("preview")) == 1
    prod.up()
    assert prod.project.containers() == [image]
    assert prod.count() == 4
    prod.run("preview", "--expect-no-changes")


def test_prod_leaves_nothing_once_it_is_unprotected(prod: Stack) -> None:
    prod.project.pulumi("state", "unprotect", "--all", "-s", "prod", "--yes")
    prod.destroy("--remove")
    assert prod.project.containers() == []
    repositories = "artifactregistry/v1/projects/headcount-local/locations/europe-west4/repositories"
    assert httpx.get(f"{prod.project.sandbox.url}/{repositories}").json() == {}
    assert prod.project.sandbox.violations() == []


def test_hours_later_the_password_has_ended_and_nothing_is_lost(tmp_path: Path) -> None:
    """The image's inputs have the access token with which it was pushed; Google's end after an hour."""
    with running(tmp_path, "--token-lifetime", "3600") as project:
        file = project.folder / "Pulumi.local.yaml"
        file.write_text(file.read_text().replace("  gcp:accessToken: sandbox\n", ""))
        stack = Stack(project, "local")
        key = service_account_key(project.sandbox, "deployer@headcount-local.iam.gserviceaccount.com")
        stack.set("gcp:credentials", key)
        stack.up()
        exported = stack.run("stack export")
        assert "sandbox-expires-" not in exported, "the token is encrypted"
        (token,) = set(re.findall("sandbox-expires-[0-9]+", stack.run("stack export", "--show-secrets")))

        def later() -> None:
            project.sandbox.advance(2 * 3600)

        later()
        password = base64.b64encode(f"oauth2accesstoken:{token}".encode()).decode()
        registry = f"http://127.0.0.1:{project.registry_port}/v2/"
        assert httpx.get(registry, headers={"authorization": f"Basic {password}"}).status_code == 401
        stack.run("refresh", "--yes", "--skip-preview")
        assert stack.run("stack export").count('"type": "docker-build:index:Image"') == 1
        stack.run("preview", "--expect-no-changes")
        stack.up("--refresh", "--expect-no-changes")
        later()
        project.handler(5)
        stack.up()
        assert stack.count() == 5
        later()
        stack.destroy("--refresh")
        assert project.containers() == []
