"""The whole program under Pulumi's engine, with the google and docker-build providers, against the sandbox.

A tiny image with the same contract stands in for the serving image.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import exported_models
import httpx
import pytest
import yaml
from engine_project import EngineProject
from helpers import ROOT, Load

from serving.exported.model_contract import Contract
from serving.storage import fetch_model

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine", "docker", "registry", "build"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProject]:
    project = EngineProject(tmp_path_factory.mktemp("engine"))
    project.start()
    yield project
    project.close()


@pytest.fixture(scope="module")
def deployed(project: EngineProject) -> EngineProject:
    project.up()
    return project


def test_up_ends_in_a_count_by_a_container_of_the_image_by_digest(deployed: EngineProject) -> None:
    found = deployed.outputs()
    assert deployed.count(found["url"]) == 4
    image = found["images"]["main"]
    assert image.startswith(f"127.0.0.1:{deployed.registry_port}/")
    assert "@sha256:" in image
    assert deployed.containers() == [image]


def test_the_lines_that_up_prints_can_be_pasted(deployed: EngineProject, data: Path) -> None:
    shutil.copy(data / "people" / "bus.jpg", deployed.folder / "picture.jpg")
    said = deployed.up()
    (headcount,) = re.findall(r"^\s+(headcount count .*)$", said, re.MULTILINE)
    (curl,) = re.findall(r"^\s+(curl -.*)$", said, re.MULTILINE)
    assert re.search(r"picture\.jpg\s+4\b", deployed.shell(headcount))
    assert json.loads(deployed.shell(curl))["count"] == 4


def test_the_container_reads_objects_of_the_stack_s_bucket(deployed: EngineProject) -> None:
    found = deployed.outputs()
    bucket = found["bucket"].removeprefix("gs://")
    objects = f"{deployed.sandbox.url}/upload/storage/v1/b/{bucket}/o"
    httpx.post(objects, params={"uploadType": "media", "name": "x.jpg"}, content=b"pixels").raise_for_status()
    answer = httpx.post(f"{found['url']}:rawPredict", content=f"gs://{bucket}/x.jpg".encode())
    assert answer.json()["read"] == "pixels"


def test_a_second_up_is_empty_and_so_is_its_preview(deployed: EngineProject) -> None:
    deployed.pulumi("preview", "-s", "local", "--expect-no-changes")
    deployed.pulumi("up", "-s", "local", "--yes", "--expect-no-changes")


def test_another_checkout_with_other_modes_and_times_sees_no_change(deployed: EngineProject) -> None:
    for path in (deployed.folder / "serving").rglob("*.py"):
        path.chmod(0o600)
        os.utime(path, (1, 1))
    deployed.pulumi("preview", "-s", "local", "--expect-no-changes")


def test_refresh_finds_no_drift(deployed: EngineProject) -> None:
    deployed.pulumi("refresh", "-s", "local", "--yes", "--expect-no-changes")


def test_a_preview_builds_and_writes_nothing(deployed: EngineProject) -> None:
    deployed.handler(5)
    deployed.sandbox.admin("DELETE", "requests")
    try:
        deployed.pulumi("preview", "-s", "local")
    finally:
        deployed.handler(4)
    written = [r for r in deployed.sandbox.requests() if r["http"] != "GET"]
    assert written == []


def test_everything_wrong_is_said_at_once(deployed: EngineProject) -> None:
    (deployed.folder / "Pulumi.wrong.yaml").write_text(
        "config: {gcp:region: moon, headcount:paused: maybe, headcount:minReplicas: many, headcount:machine: x}\n"
    )
    deployed.pulumi("stack", "init", "wrong")
    said = deployed.pulumi("up", "-s", "wrong", "--yes", "--skip-preview", fails=True)
    for repair in (
        "set gcp:project my-project",
        "set gcp:region europe-west4",
        "set headcount:paused false",
        "set headcount:minReplicas 1",
        "rm headcount:machine",
    ):
        assert f"pulumi config {repair} -s wrong" in said, said
    assert "Traceback" not in said
    deployed.pulumi("destroy", "-s", "wrong", "--yes", "--skip-preview", "--remove")


def test_a_changed_handler_is_rolled_out_without_losing_a_request(deployed: EngineProject) -> None:
    before = deployed.outputs()
    deployed.handler(6)
    with Load(f"{before['url']}:rawPredict", b"\xff\xd8picture", "count") as load:
        deployed.up()
        time.sleep(1)
    after = deployed.outputs()
    assert set(load.answers) == {(200, 4), (200, 6)}
    assert load.answers.total() > 50
    assert after["images"]["main"] != before["images"]["main"]
    assert after["models"]["main"] != before["models"]["main"]


def traffic(project: EngineProject) -> dict[str, int]:
    """Percent by the count that the release's container gives, from 200 requests."""
    url = project.outputs()["url"]
    counts = [project.count(url) for _ in range(200)]
    return {str(c): round(counts.count(c) / 2) for c in set(counts)}


def test_canary_promotion_rollback_and_pause_are_changes_of_the_stack_file(deployed: EngineProject) -> None:
    running = deployed.count(deployed.outputs()["url"])
    old = deployed.outputs()["models"]["main"]
    diff = deployed.release("canary", "next", "10")
    assert "+    next:" in diff or "+  headcount:releases:" in diff
    deployed.handler(8)
    deployed.up()
    found = deployed.outputs()
    assert found["models"]["main"] == old, "what runs is not uploaded again"
    shares = traffic(deployed)
    assert 2 <= shares["8"] <= 22
    assert shares[str(running)] + shares["8"] == 100

    deployed.release("promote", "next")
    deployed.up()
    assert traffic(deployed) == {"8": 100}

    deployed.release("promote", "main")
    deployed.sandbox.admin("DELETE", "requests")
    deployed.up()
    assert traffic(deployed) == {str(running): 100}
    called = {r["method"].rpartition(".")[2] for r in deployed.sandbox.requests()}
    assert "deployModel" not in called, "a rollback only moves traffic"

    deployed.release("pause")
    deployed.up()
    assert deployed.containers() == []
    deployed.release("resume")
    deployed.up()
    assert traffic(deployed) == {str(running): 100}
    deployed.pulumi("preview", "-s", "local", "--expect-no-changes")


def test_prod_serves_the_digest_that_was_proved_builds_nothing_and_is_protected(deployed: EngineProject) -> None:
    proved = deployed.outputs()
    config = deployed.stack_file + (
        f"  headcount:production: true\n  headcount:releases: {{}}\n  headcount:imageSource: {proved['repository']}\n"
    )
    lines = [line for line in config.splitlines(True) if not line.startswith(("encryptionsalt", "#"))]
    (deployed.folder / "Pulumi.prod.yaml").write_text("".join(lines))
    deployed.pulumi("stack", "init", "prod")
    said = deployed.pulumi("up", "-s", "prod", "--yes", "--skip-preview")
    deployed.python("headcount.cli", "release", "-s", "prod", "add", "main", "--from", "local")
    said += deployed.pulumi("up", "-s", "prod", "--yes", "--skip-preview")
    assert "docker-build:index:Image" not in said
    found = json.loads(deployed.pulumi("stack", "output", "-s", "prod", "--json"))
    assert found["images"]["main"] != proved["images"]["main"], "a repository of its own"
    assert found["images"]["main"].partition("@")[2] == proved["images"]["main"].partition("@")[2]
    assert deployed.count(found["url"]) == deployed.count(proved["url"])
    assert "protect" in deployed.pulumi("destroy", "-s", "prod", "--yes", "--skip-preview", fails=True)
    deployed.pulumi("state", "unprotect", "--all", "-s", "prod", "--yes")
    deployed.pulumi("destroy", "-s", "prod", "--yes", "--skip-preview", "--remove")


def typed(text: str, start: str, end: str) -> list[str]:
    """The command lines of one section of a document."""
    section = text[text.index(start) :].partition(end)[0]
    return [line.strip() for line in section.splitlines() if re.match(r"(    |)(pulumi|headcount|python) ", line)]


def test_what_the_documents_tell_people_to_type_works_as_it_stands_there(deployed: EngineProject) -> None:
    """From `pulumi stack init dev` to prod and back to nothing, in a project of its own."""
    deployed.handler(4)
    # What a user with an account does not need.
    mine = r"  (gcp|vertex):(accessToken|\w*[eE]ndpoint)"
    endpoints = [line for line in deployed.stack_file.splitlines(True) if re.match(mine, line)]
    for stack in ("dev", "prod"):
        file = deployed.folder / f"Pulumi.{stack}.yaml"
        file.write_text((ROOT / file.name).read_text() + "".join(endpoints))
    guide = (ROOT / "docs" / "deploy.md").read_text()
    first = typed((ROOT / "README.md").read_text(), "## In the cloud", "\n## ")
    assert first == [
        line.partition("  #")[0].strip() for line in typed(guide, "## dev,", "\n## ") if line.split()[1] != "login"
    ]
    *before, destroy = first
    assert destroy == "pulumi destroy -s dev"
    for line in before:
        said = deployed.shell(line)
        if line.startswith("headcount count"):
            assert re.search(r"picture\.jpg\s+4\b", said), said
    releases = typed(guide, "## Releases", "\n## ")
    assert len(releases) == 5
    for line in releases:
        assert "+" in deployed.shell(line), "the diff"
        deployed.shell("pulumi up -s dev")
    deployed.shell("headcount release -s dev resume")
    deployed.shell("pulumi up -s dev")
    deployed.shell("headcount count --stack dev picture.jpg")
    prod = typed(guide, "## prod", "\n## ")
    assert prod[-1] == "pulumi up -s prod"
    for line in (*prod, "headcount count --stack prod picture.jpg"):
        deployed.shell(line)
    (unprotect,) = re.findall(r"`(pulumi state unprotect [^`]*)`", guide)
    for line in (unprotect, "pulumi destroy -s prod", destroy):
        deployed.shell(line)
    left = httpx.get(f"{deployed.sandbox.url}/v1/projects/my-project/locations/europe-west4/endpoints").json()
    assert left == {}


def kill_up_at(project: EngineProject, method: str) -> None:
    """Starts `pulumi up` and kills it, and its providers, once the sandbox has answered a call of `method`."""
    project.sandbox.admin("DELETE", "requests")
    log = project.folder.parent / "killed.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            ["pulumi", "up", "-s", "local", "--yes", "--skip-preview", "--non-interactive"],
            cwd=project.folder,
            env=project.environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        while not any(r["method"].endswith(method) and r["status"] == 200 for r in project.sandbox.requests()):
            assert process.poll() is None, f"it ended before it called {method}:\n{log.read_text()[-3000:]}"
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_an_up_that_is_killed_again_and_again_is_repeated_to_the_end(deployed: EngineProject) -> None:
    deployed.pulumi("destroy", "-s", "local", "--yes", "--skip-preview")
    # Without what another test may have pinned: that image went with the repository.
    (deployed.folder / "Pulumi.local.yaml").write_text(deployed.stack_file)
    said = ""
    for method in ("repositories.create", "models.upload", "endpoints.deployModel"):
        kill_up_at(deployed, method)
        said += deployed.python("headcount.cli", "recover", "local")
        deadline = time.monotonic() + 10  # they were asked to end
        while deployed.plugins() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert deployed.plugins() == []
    deployed.up()
    found = deployed.outputs()
    deployed.count(found["url"])
    assert "looked whether these were created before Pulumi was killed" in said
    assert len(deployed.containers()) == 1
    location = "v1/projects/headcount-local/locations/europe-west4"
    models = httpx.get(f"{deployed.sandbox.url}/{location}/models").json()["models"]
    assert [m["versionId"] for m in models] == ["1"], "no second copy"
    deployed.pulumi("preview", "-s", "local", "--expect-no-changes")


def test_a_registered_model_is_served_at_the_next_up(deployed: EngineProject) -> None:
    """The tiny image tells where it would find the model; tests/test_container.py serves one from such a folder."""
    model = exported_models.weather(deployed.folder.parent / "weather")
    printed = yaml.safe_load(deployed.python("headcount.cli", "register", str(model), "--stack", "local"))
    file = deployed.folder / "Pulumi.local.yaml"
    document = yaml.safe_load(file.read_text())
    document["config"] |= printed
    file.write_text(yaml.safe_dump(document))
    deployed.up()
    instances = deployed.folder / "instances.json"
    instances.write_text('{"a": 1, "b": 2, "day": "mon"}\n')
    answer = deployed.python(
        "headcount.cli", "predict", "--stack", "local", "--json-instances", str(instances), "--json"
    )
    uri = json.loads(answer)["env"]["AIP_STORAGE_URI"]
    assert uri == printed["headcount:releases"]["weather"]["model"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("STORAGE_EMULATOR_HOST", deployed.sandbox.url)
        assert Contract.load(fetch_model(uri, deployed.folder)).name == "weather"
    deployed.pulumi("preview", "-s", "local", "--expect-no-changes")


def test_destroy_leaves_nothing(deployed: EngineProject) -> None:
    deployed.pulumi("destroy", "-s", "local", "--yes", "--skip-preview")
    url = deployed.sandbox.url
    location = "projects/headcount-local/locations/europe-west4"
    left = {
        "models": httpx.get(f"{url}/v1/{location}/models").json(),
        "endpoints": httpx.get(f"{url}/v1/{location}/endpoints").json(),
        "repositories": httpx.get(f"{url}/artifactregistry/v1/{location}/repositories").json(),
        "accounts": httpx.get(f"{url}/iam/v1/projects/headcount-local/serviceAccounts").json(),
        "buckets": httpx.get(f"{url}/storage/v1/b", params={"project": "headcount-local"}).json().get("items", {}),
    }
    assert left == {name: {} for name in left}
    listed = subprocess.run(["docker", "ps", "-a", "--format", "{{.Image}}"], capture_output=True, text=True).stdout
    assert f":{deployed.registry_port}/" not in listed
    images = subprocess.run(["docker", "images", "--format", "{{.Repository}}"], capture_output=True, text=True).stdout
    assert f":{deployed.registry_port}/" not in images
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{deployed.registry_port}/v2/")
    assert not (deployed.sandbox.state / "registry").exists()
    assert deployed.sandbox.violations() == []
