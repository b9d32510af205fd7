"""The provider under Pulumi's own engine: up, preview, refresh, import, destroy, a kill and Ctrl-C, against
the sandbox."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, eventually
from vertex_harness import Cloud
from vertex_plugin import IMAGE, LOCATION, OTHER_IMAGE, PARENT, PROJECT
from vertex_project import ENDPOINT, Project

from pulumi_vertex.definition import VERSION
from sandbox.testing import RunningSandbox

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine"), pytest.mark.timeout(900)]
VERSION_URN = "urn:pulumi:dev::digits::vertex:index:ModelVersion::v"
ROLLOUT_URN = "urn:pulumi:dev::digits::vertex:index:Rollout::digits"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[RunningSandbox]:
    with RunningSandbox() as running:
        yield running
        assert running.violations() == []


@pytest.fixture(scope="module")
def cloud(sandbox: RunningSandbox) -> Cloud:
    cloud = Cloud.of(sandbox)
    cloud.endpoint("digits")
    return cloud


def nothing_is_left(cloud: Cloud) -> None:
    assert cloud.deployed(ENDPOINT) == {}
    assert cloud.versions("digits") == []


@pytest.fixture
def project(sandbox: RunningSandbox, cloud: Cloud, tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path, sandbox.url)
    yield project
    sandbox.clear_faults()
    sandbox.release()
    project.destroy()
    nothing_is_left(cloud)
    cloud.check_history(ENDPOINT)


ONE = {"v": {"image": IMAGE, "aliases": ["live"], "env": {"MY_VAR": "x"}}}
TWO = {"v": {"image": OTHER_IMAGE, "aliases": ["live"], "env": {"MY_VAR": "x"}}}
MAIN = {"main": {"version": "v"}}


def test_up_preview_refresh_and_a_new_image(project: Project, cloud: Cloud) -> None:
    project.want(ONE, releases=MAIN)
    preview = project.pulumi("preview")
    assert "1. deploy main: a version that is not known yet on n1-standard-2, 1 replica" in preview
    assert cloud.versions("digits") == []
    assert project.counts(project.up()) == {"created": 4}
    first = project.outputs()
    assert first["v"] == f"{PARENT}/models/digits@1"
    (there,) = cloud.versions("digits")
    assert {variable.name: variable.value for variable in there.container_spec.env}["MY_VAR"] == "x"
    assert project.counts(project.up()) == {"unchanged": 4}
    assert project.counts(project.pulumi("refresh", "--yes", "--skip-preview")) == {"unchanged": 4}

    project.want(TWO, releases=MAIN)
    preview = project.pulumi("preview")
    assert "2. move traffic: main 100 % (was digits@1 100 %)" in preview
    assert "4. undeploy digits@1" in preview
    assert project.counts(project.up()) == {"updated": 1, "replaced": 1, "changes": 2, "unchanged": 2}
    assert list(cloud.deployed(ENDPOINT).values()) == [("digits@2", 100)]
    assert [v.version_id for v in cloud.versions("digits")] == ["2"]


def test_drift_is_shown_by_refresh_and_taken_back_by_up(project: Project, cloud: Cloud) -> None:
    project.want(ONE, releases={"main": {"version": "v", "min_replicas": 2}})
    project.up()
    (deployed,) = cloud.deployed(ENDPOINT)
    cloud.endpoints.undeploy_model(endpoint=ENDPOINT, deployed_model_id=deployed).result(timeout=30)
    cloud.models.merge_version_aliases(name=f"{PARENT}/models/digits@1", version_aliases=["-live"])
    shown = project.pulumi("refresh", "--yes", "--skip-preview", "--diff")
    assert project.counts(shown) == {"updated": 2, "unchanged": 2}
    assert re.search(r"- main *: \{", shown)
    assert '"live"' in shown
    assert project.counts(project.up())["updated"] == 2
    assert list(cloud.deployed(ENDPOINT).values()) == [("digits@1", 100)]
    assert set(cloud.versions("digits")[0].version_aliases) == {"default", "live"}


def test_a_container_that_cannot_start_is_told_in_its_own_words(project: Project, cloud: Cloud) -> None:
    project.want(ONE, releases=MAIN)
    project.up()
    env = {"STUB_HEALTH": "exit", "STUB_LOG": "no such file: model.pt"}
    project.want({"v": {"image": OTHER_IMAGE, "env": env}}, releases=MAIN)
    said = project.up(fails=True)
    problem = said.split("vertex:index:Rollout (digits):")[1].split("pulumi:pulumi:Stack")[0]
    assert "error: Could not deploy main: digits@2 on n1-standard-2" in problem
    assert "The traffic was not touched." in problem
    assert "no such file: model.pt" in problem
    assert "Traceback" not in problem
    assert list(cloud.deployed(ENDPOINT).values()) == [("digits@1", 100)]
    project.want(ONE, releases=MAIN)
    project.up()
    assert list(cloud.deployed(ENDPOINT).values()) == [("digits@1", 100)]
    assert [v.version_id for v in cloud.versions("digits")] == ["1"]
    assert project.counts(project.up()) == {"unchanged": 4}


def test_mistakes_are_told_at_preview_by_property(project: Project, cloud: Cloud) -> None:
    before = cloud.writes()
    project.want({"v": {"image": "digits:latest", "aliases": ["default"]}})
    said = project.pulumi("preview", fails=True)
    assert "property image value {digits:latest} has a problem: must be given by digest" in said
    assert "property aliases[0]" in said
    assert cloud.writes() == before


def test_secrets_are_encrypted_in_the_state(project: Project, cloud: Cloud) -> None:
    project.want({}, secret=IMAGE)
    said = project.up()
    state = "".join(path.read_text() for path in (project.folder / "state").rglob("*.json"))
    assert "vertex:index:ModelVersion" in state
    for secret in ("hunter2", "the-token"):
        assert secret not in state
        assert secret not in said
    project.want({})
    project.up()
    assert cloud.versions("secret") == []


def test_a_killed_up_is_repaired_by_the_next_one(project: Project, cloud: Cloud, sandbox: RunningSandbox) -> None:
    project.want(ONE, releases=MAIN)
    project.up()
    uploads, deploys = cloud.requests("models.upload"), cloud.requests("endpoints.deployModel")
    sandbox.fault("endpoints.deployModel", "hold")
    project.want(TWO, releases=MAIN)
    process = project.start("up", "--yes", "--skip-preview")
    assert eventually(lambda: cloud.requests("endpoints.deployModel") > deploys)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    project.pulumi("cancel", "--yes")
    sandbox.release()
    project.up()
    assert list(cloud.deployed(ENDPOINT).values()) == [("digits@2", 100)]
    assert [v.version_id for v in cloud.versions("digits")] == ["2"]
    assert cloud.requests("models.upload") == uploads + 1
    assert cloud.requests("endpoints.deployModel") == deploys + 1
    assert project.counts(project.up()) == {"unchanged": 4}


def interrupted(project: Project, cloud: Cloud, sandbox: RunningSandbox, method: str) -> str:
    """Returns the output of a `pulumi up` that gets Ctrl-C while an operation runs. The operation goes on."""
    before = cloud.requests(method)
    sandbox.fault(method, "hold")
    process = project.start("up", "--yes", "--skip-preview")
    assert eventually(lambda: cloud.requests(method) > before)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode
    return said


@pytest.mark.parametrize(
    ("method", "resource"), [("endpoints.deployModel", "Rollout"), ("models.upload", "ModelVersion")]
)
@pytest.mark.parametrize("following", [("up",), ("destroy",), ("destroy", "--refresh")])
def test_after_ctrl_c_the_next_run_waits_for_what_runs(
    project: Project, cloud: Cloud, sandbox: RunningSandbox, method: str, resource: str, following: tuple[str, ...]
) -> None:
    project.want(ONE, releases=MAIN)
    before = cloud.requests(method)
    said = interrupted(project, cloud, sandbox, method)
    assert "the next `pulumi up` continues with it, and `pulumi destroy` waits for it" in said
    assert any(resource in r["type"] for r in project.states(VERSION_URN) + project.states(ROLLOUT_URN))
    process = project.start(*following, "--yes", "--skip-preview")
    assert cloud.requests(method) == before + 1
    sandbox.release()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert cloud.requests(method) == before + 1
    if following == ("up",):
        assert list(cloud.deployed(ENDPOINT).values()) == [("digits@1", 100)]
        assert [v.version_id for v in cloud.versions("digits")] == ["1"]
        assert project.counts(project.up()) == {"unchanged": 4}
    else:
        nothing_is_left(cloud)


def test_destroyed_with_a_refresh_nothing_is_left(project: Project, cloud: Cloud) -> None:
    project.want(ONE, releases=MAIN)
    project.up()
    project.destroy("--refresh")
    nothing_is_left(cloud)


def test_an_up_with_a_refresh_changes_nothing_and_takes_back_what_drifted(project: Project, cloud: Cloud) -> None:
    project.want(ONE, releases=MAIN)
    project.up()
    assert project.counts(project.up("--refresh")) == {"unchanged": 4}
    (deployed,) = cloud.deployed(ENDPOINT)
    cloud.endpoints.undeploy_model(endpoint=ENDPOINT, deployed_model_id=deployed).result(timeout=30)
    assert project.counts(project.up("--refresh"))["updated"] == 1
    project.want(TWO, releases=MAIN)
    project.up("--refresh")
    assert list(cloud.deployed(ENDPOINT).values()) == [("digits@2", 100)]
    assert [v.version_id for v in cloud.versions("digits")] == ["2"]


@pytest.mark.parametrize("refresh", [(), ("--refresh",)])
def test_a_forced_replacement_keeps_what_serves(project: Project, cloud: Cloud, refresh: tuple[str, ...]) -> None:
    project.want(ONE, releases=MAIN)
    project.up()
    said = project.up("--replace", VERSION_URN, "--replace", ROLLOUT_URN, *refresh)
    assert project.counts(said)["replaced"] == 2
    assert list(cloud.deployed(ENDPOINT).values()) == [("digits@1", 100)]
    assert [v.version_id for v in cloud.versions("digits")] == ["1"]
    assert project.counts(project.up()) == {"unchanged": 4}
    assert "__claim" not in project.pulumi("preview", "--diff")
    project.destroy(*refresh)
    nothing_is_left(cloud)


@pytest.mark.parametrize(
    "following",
    [
        ("up",),
        ("up", "--refresh"),
        ("up", "--target", ROLLOUT_URN),
        ("destroy",),
        ("destroy", "--refresh"),
        ("destroy", "--target", ROLLOUT_URN),
    ],
    ids=" ".join,
)
def test_what_a_failed_run_left_for_deletion_is_not_what_serves(
    project: Project, cloud: Cloud, sandbox: RunningSandbox, following: tuple[str, ...]
) -> None:
    """Everything is replaced by itself, then the run fails: two states of each resource have one id."""
    project.want(ONE, releases=MAIN)
    project.up()
    project.want(ONE, releases=MAIN, last=IMAGE)
    sandbox.fault("models.upload", "refuse", status="PERMISSION_DENIED", message="Not you.")
    project.up("--replace", VERSION_URN, "--replace", ROLLOUT_URN, fails=True)
    for urn in (VERSION_URN, ROLLOUT_URN):
        states = project.states(urn)
        assert len(states) == 2
        assert len({state["id"] for state in states}) == 1
    project.want(ONE, releases=MAIN)
    project.pulumi(*following, "--yes", "--skip-preview")
    if following[0] == "up":
        assert list(cloud.deployed(ENDPOINT).values()) == [("digits@1", 100)]
        assert [v.version_id for v in cloud.versions("digits")] == ["1"]
        project.up()
        assert [len(project.states(urn)) for urn in (VERSION_URN, ROLLOUT_URN)] == [1, 1]
    elif "--target" not in following:
        nothing_is_left(cloud)
    else:
        assert cloud.deployed(ENDPOINT) == {}
        assert [v.version_id for v in cloud.versions("digits")] == ["1"]


def test_changes_are_ignored_by_the_names_of_the_schema(project: Project, cloud: Cloud) -> None:
    project.want(ONE, releases=MAIN)
    project.up()
    more = {"main": {"version": "v", "min_replicas": 2, "max_replicas": 2}}
    project.want(ONE, releases=more, ignore=["models.main.minReplicas", "models.main.maxReplicas"])
    assert project.counts(project.up()) == {"unchanged": 4}
    project.want(ONE, releases=more)
    assert project.counts(project.up())["updated"] == 1


def test_a_timeout_of_the_program_s_own_ends_a_rollout(project: Project, cloud: Cloud, sandbox: RunningSandbox) -> None:
    sandbox.fault("endpoints.deployModel", "hold")
    project.want(ONE, releases=MAIN, timeouts={"create": "3s"})
    said = project.up(fails=True)
    assert "Not done within 3 s" in said
    sandbox.release()
    project.up()
    assert list(cloud.deployed(ENDPOINT).values()) == [("digits@1", 100)]


def test_a_provider_on_the_path_needs_no_entry_in_the_project(
    sandbox: RunningSandbox, cloud: Cloud, tmp_path: Path
) -> None:
    project = Project(tmp_path, sandbox.url, plugin_on_path=True)
    project.want(ONE, releases=MAIN)
    assert project.counts(project.up()) == {"created": 4}
    project.destroy()
    nothing_is_left(cloud)


def test_the_readme_s_program_in_yaml_is_deployed(sandbox: RunningSandbox, cloud: Cloud, tmp_path: Path) -> None:
    project = Project(tmp_path, sandbox.url, plugin_on_path=True)
    (program,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "pulumi_vertex" / "README.md").read_text(), re.DOTALL)
    program = re.sub(r"image: \S+", f"image: {IMAGE}", re.sub(r"endpoint: \S+", f"endpoint: {ENDPOINT}", program))
    written = f"packages:\n  vertex: vertex@{VERSION} # written by `pulumi package add`\n"
    assert written in program
    (project.folder / "Pulumi.yaml").write_text(program.replace(written, ""))
    for setting, value in ("project", PROJECT), ("location", LOCATION), ("endpoint", sandbox.url), ("accessToken", "x"):
        project.pulumi("config", "set", f"vertex:{setting}", value)
    project.pulumi("package", "add", str(project.folder / "bin" / "pulumi-resource-vertex"))
    assert written.partition(" #")[0] in (project.folder / "Pulumi.yaml").read_text()
    assert project.counts(project.up()) == {"created": 3}
    project.destroy()
    nothing_is_left(cloud)


def test_what_exists_is_imported_and_the_code_that_pulumi_prints_fits(project: Project, cloud: Cloud) -> None:
    project.want(ONE, releases=MAIN)
    project.up()
    for resource in ("vertex:index:Rollout::digits", "vertex:index:ModelVersion::v"):
        project.pulumi("state", "delete", "--yes", f"urn:pulumi:dev::digits::{resource}")
    provider = "cloud=urn:pulumi:dev::digits::pulumi:providers:vertex::cloud"
    for token, name, id_ in (
        ("vertex:index:ModelVersion", "v", f"{PARENT}/models/digits@1"),
        ("vertex:index:Rollout", "digits", ENDPOINT),
    ):
        said = project.pulumi(
            "import", "--yes", "--skip-preview", "--protect=false", "--provider", provider, token, name, id_
        )
        assert "import pulumi_vertex as vertex" in said
        assert f"vertex.{token.rsplit(':', 1)[-1]}(" in said
    preview = project.pulumi("preview", "--diff")
    assert "replace" not in preview
    project.up()
    assert list(cloud.deployed(ENDPOINT).values()) == [("digits@1", 100)]
    assert [v.version_id for v in cloud.versions("digits")] == ["1"]
    assert project.counts(project.up()) == {"unchanged": 4}


def test_the_engine_accepts_the_schema(project: Project) -> None:
    # Given the folder, the engine would first install things into the environment that it names.
    program = project.folder / "pulumi-resource-vertex"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {project.folder / "pulumi_vertex/plugin"} "$@"\n')
    program.chmod(0o755)
    said = project.pulumi("package", "get-schema", str(program))
    text = said[said.index("{") :]
    schema = json.loads(text)
    resources = {
        f"vertex:index:{name}" for name in ("CustomJob", "ModelVersion", "ReleasedImage", "Rollout", "TuningJob")
    }
    assert set(schema["resources"]) == resources
    inputs = schema["resources"]["vertex:index:Rollout"]["inputProperties"]
    assert inputs["models"]["additionalProperties"]["$ref"] == "#/types/vertex:index:Deployed"
    (project.folder / "schema.json").write_text(text)
    checked = project.pulumi("schema", "check", "schema.json")  # against Pulumi's metaschema
    assert "error" not in checked.lower()
