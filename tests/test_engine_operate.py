"""Drift, history and rollback under Pulumi's engine, with the google provider and stub containers.

The tests are in the order of a stack's life. Nothing is built: each release is an image by digest in the stack's own
repository.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_project import EngineProject
from helpers import eventually
from registry_images import Remote

from sandbox.testing import RunningSandbox

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine", "registry", "samples"), pytest.mark.timeout(900)]

GOOGLE_PROJECT = "headcount-local"
LOCATION = f"projects/{GOOGLE_PROJECT}/locations/europe-west4"
PICTURES = f"{GOOGLE_PROJECT}-headcount-local"  # the bucket


class Operated(EngineProject):
    """A project whose stack `local` is deployed without a release, and three images in its repository."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sandbox.close()  # the one with containers, which was not started
        port = str(self.registry_port)
        self.sandbox = RunningSandbox("--registry-port", port, runner="stub", state=folder / "sandbox")
        self.environment["HEADCOUNT_HOME"] = str(folder / "data")
        file = self.folder / "Pulumi.local.yaml"
        file.write_text(file.read_text().replace("encryptionsalt:", "  headcount:releases: {}\nencryptionsalt:"))
        self.start()
        self.up()
        repository = Remote(f"{self.outputs()['repository']}/headcount")
        self.digests = [str(repository.image()["digest"]) for _ in range(3)]

    @property
    def file(self) -> str:
        return (self.folder / "Pulumi.local.yaml").read_text()

    def headcount(self, *arguments: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "headcount.cli", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ask(self, http: str, path: str, body: Any = None, *, by: str = "", **query: str) -> Any:
        """The answer of the sandbox to a call of somebody."""
        headers = {"authorization": f"Bearer sandbox:{by}"} if by else {}
        url = f"{self.sandbox.url}/{path}"
        answer = httpx.request(http, url, json=body, params=query, headers=headers, trust_env=False, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    @property
    def endpoint(self) -> str:
        return str(self.outputs()["endpoint"])

    def traffic(self) -> dict[str, int]:
        """Percent by the release that the endpoint gives it to; releases without traffic have none."""
        found, models = self.ask("GET", f"v1/{self.endpoint}"), self.outputs()["models"]
        names = {model.rpartition("@")[2]: name for name, model in models.items()}
        versions = {one["id"]: names.get(one["modelVersionId"], "?") for one in found.get("deployedModels", [])}
        return {versions[id_]: share for id_, share in found.get("trafficSplit", {}).items() if share}

    def state(self) -> Any:
        return json.loads(self.pulumi("stack", "export", "-s", "local"))["deployment"]

    def is_settled(self) -> None:
        """The stack's file, its state and the world agree."""
        self.pulumi("preview", "-s", "local", "--expect-no-changes")
        self.pulumi("refresh", "-s", "local", "--preview-only", "--expect-no-changes")

    def close(self) -> None:
        self.sandbox.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    project = Operated(tmp_path_factory.mktemp("operated"))
    yield project
    project.close()


@pytest.fixture(scope="module")
def deployed(project: Operated) -> Operated:
    """`main` served first, and `next` serves now."""
    for name, digest in zip(("main", "next"), project.digests, strict=False):
        project.release("canary", name, "100", "--image", digest)
        project.up()
    return project


def test_history_says_which_digest_served_when(deployed: Operated) -> None:
    table = deployed.headcount("history", "local").splitlines()
    old, new, _ = (digest[:19] for digest in deployed.digests)
    assert [line.split()[2:7] for line in table[1:3]] == [
        ["100", "%", "next", "headcount-local@2", new],
        ["100", "%", "main", "headcount-local@1", old],
    ]
    assert table[1].split()[1] == "now"


def test_a_rollback_moves_traffic_alone_and_leaves_file_state_and_world_in_agreement(deployed: Operated) -> None:
    deployed.sandbox.admin("DELETE", "requests")
    said = deployed.headcount("rollback", "local", "--yes")
    assert "main: 0 % of the traffic becomes 100 %" in said
    assert "only traffic moves" in said
    assert deployed.traffic() == {"main": 100}
    called = {request["method"].rpartition(".")[2] for request in deployed.sandbox.requests()}
    assert "deployModel" not in called
    assert "predict" in called, "a real prediction"
    deployed.is_settled()
    assert "headcount rollback to headcount-local@1" in deployed.headcount("history", "local")


def test_a_rollback_to_a_version_that_does_not_answer_moves_back(deployed: Operated) -> None:
    before = deployed.file
    deployed.sandbox.fault("endpoints.predict", "status", code=500, count=100)
    try:
        said = deployed.headcount("rollback", "local", "--yes", status=1)
    finally:
        deployed.sandbox.clear_faults()
    assert "The rollback failed: " in said
    assert deployed.traffic() == {"main": 100}
    assert deployed.file == before
    deployed.is_settled()


def test_a_rollback_that_was_killed_is_finished_by_the_same_command(deployed: Operated) -> None:
    deployed.sandbox.fault("endpoints.patch", "latency", seconds=20)
    deployed.sandbox.admin("DELETE", "requests")
    command = [sys.executable, "-m", "headcount.cli", "rollback", "local", "--yes"]
    with subprocess.Popen(
        command, cwd=deployed.folder, env=deployed.environment, start_new_session=True, stdout=subprocess.DEVNULL
    ) as process:
        assert eventually(lambda: not deployed.sandbox.unused_faults(), 240), "traffic is being moved"
        os.killpg(process.pid, signal.SIGKILL)
    said = deployed.headcount("rollback", "local", "--yes")
    assert "was interrupted; it goes on: to headcount-local@2" in said
    assert deployed.traffic() == {"next": 100}
    assert eventually(lambda: not deployed.plugins()), "the plugins of the killed Pulumi have ended"
    deployed.is_settled()


def test_a_version_that_was_removed_is_deployed_again_and_other_changes_wait(deployed: Operated) -> None:
    deployed.release("remove", "main")
    deployed.up()
    file = deployed.folder / "Pulumi.local.yaml"
    file.write_text(file.read_text().replace("config:\n", "config:\n  headcount:pictureDays: 10\n"))
    said = deployed.headcount("rollback", "local", "--yes")
    assert "It is no longer deployed" in said
    assert "update Bucket bucket" in said, "a change that is not part of it"
    assert deployed.traffic() == {"previous": 100}
    assert deployed.outputs()["images"]["previous"].endswith(deployed.digests[0])
    rules = deployed.ask("GET", f"storage/v1/b/{PICTURES}")["lifecycle"]["rule"]
    assert {rule["condition"].get("age") for rule in rules} == {30, 7}
    file.write_text(file.read_text().replace("  headcount:pictureDays: 10\n", ""))
    deployed.is_settled()


def test_drift_of_every_kind_is_found_with_its_author_and_repaired(deployed: Operated) -> None:
    ann, bob = "ann@example.com", "bob@example.com"
    endpoint = deployed.endpoint
    found = deployed.ask("GET", f"v1/{endpoint}")
    versions = {one["modelVersionId"]: one["id"] for one in found["deployedModels"]}
    (serving,) = found["trafficSplit"]
    idle = next(id_ for id_ in versions.values() if id_ != serving)
    number = {id_: version for version, id_ in versions.items()}
    names = {model.rpartition("@")[2]: name for name, model in deployed.outputs()["models"].items()}
    busy, spare = names[number[serving]], names[number[idle]]

    def ask(http: str, path: str, body: Any = None, *, by: str = ann, **query: str) -> Any:
        return deployed.ask(http, path, body, by=by, **query)

    # 1 replicas, 2 a deployed model, 3 the endpoint
    size = {"id": serving, "dedicatedResources": {"maxReplicaCount": 3}}
    mask = "dedicatedResources.maxReplicaCount"
    ask("POST", f"v1/{endpoint}:mutateDeployedModel", {"deployedModel": size, "updateMask": mask})
    ask("POST", f"v1/{endpoint}:undeployModel", {"deployedModelId": idle})
    ask("PATCH", f"v1/{endpoint}", {"description": "by hand"}, by=bob, updateMask="description")
    # 4 the bucket is public, 5 keeps pictures for ever
    open_ = {"iamConfiguration": {"publicAccessPrevention": "inherited"}, "lifecycle": {"rule": []}}
    ask("PATCH", f"storage/v1/b/{PICTURES}", open_)
    policy = ask("GET", f"storage/v1/b/{PICTURES}/iam")
    everybody = {"role": "roles/storage.objectViewer", "members": ["allUsers"]}
    ask("PUT", f"storage/v1/b/{PICTURES}/iam", {**policy, "bindings": [*policy["bindings"], everybody]})
    # 6 an alias, 7 a label
    model = f"v1/{LOCATION}/models/headcount-local"
    ask("POST", f"{model}@{number[serving]}:mergeVersionAliases", {"versionAliases": [f"-{busy}"]})
    ask("PATCH", f"{model}@{number[idle]}", {"labels": {"project": "headcount"}}, updateMask="labels")
    # 8 a member of the repository's policy is gone, 9 another one is there
    repository = f"artifactregistry/v1/{LOCATION}/repositories/headcount-local"
    stranger = {"role": "roles/artifactregistry.reader", "members": ["user:stranger@example.com"]}
    ask("POST", f"{repository}:setIamPolicy", {"policy": {"bindings": [stranger]}}, by=bob)
    # 10 an API
    ask("POST", f"serviceusage/v1/projects/{GOOGLE_PROJECT}/services/iam.googleapis.com:disable", {})

    state, file = deployed.state(), deployed.file
    said = json.loads(deployed.headcount("drift", "local", "--json", status=2))
    assert said["pending"] == []
    assert said["authorsUnknown"] == ""
    drifted = {
        (one["resource"].partition("/roles/")[0], change["path"], one["author"]["who"])
        for one in said["drift"]
        for change in one["changes"] or [{"path": one["kind"]}]
    }
    bucket, images = f"bucket {PICTURES}", "repository repositories/headcount-local"
    assert drifted == {
        ("rollout rollout", f"models.{busy}.maxReplicas", bob),
        ("rollout rollout", f"models.{spare}", bob),
        (f"endpoint endpoints/{endpoint.rpartition('/')[2]}", "description", bob),
        (bucket, "publicAccessPrevention", ann),
        (bucket, "lifecycleRules", ann),
        (bucket, "roles/storage.objectViewer for allUsers", ann),
        ("model version models/headcount-local@" + number[serving], "aliases", ann),
        ("model version models/headcount-local@" + number[idle], "labels.stack", ann),
        (images, "roles/artifactregistry.reader for user:stranger@example.com", bob),
        (f"access to the {images}", "missing", bob),
        (f"API {GOOGLE_PROJECT}/iam.googleapis.com", "missing", ann),
    }
    assert deployed.state() == state, "drift changes nothing"
    assert deployed.file == file

    text = deployed.headcount("drift", "local", status=2)
    assert f"release {busy}: maxReplicas is 3; it was 1" in text
    repairs = [line.strip() for line in text.partition("To repair it:\n")[2].splitlines()]
    assert repairs[0] == "pulumi up --refresh -s local"
    assert [line.split("remove-iam-policy-binding")[0] for line in repairs[1:3]] == [
        "gcloud storage buckets ",
        "gcloud artifacts repositories ",
    ]
    deployed.pulumi("up", "--refresh", "-s", "local", "--yes", "--skip-preview")
    ask("PUT", f"storage/v1/b/{PICTURES}/iam", {"bindings": policy["bindings"]})
    left = ask("GET", f"{repository}:getIamPolicy")
    left["bindings"][0]["members"].remove("user:stranger@example.com")
    ask("POST", f"{repository}:setIamPolicy", {"policy": left})
    said_now = deployed.headcount("drift", "local")
    assert said_now == "Stack local does not drift: the world is as its state says.\n"


def test_what_the_next_up_does_anyway_is_no_drift(deployed: Operated) -> None:
    file = deployed.folder / "Pulumi.local.yaml"
    file.write_text(file.read_text().replace("config:\n", "config:\n  headcount:pictureDays: 10\n"))
    said = deployed.headcount("drift", "local")
    assert "does not drift" in said
    assert "The next `pulumi up` would do this anyway" in said
    assert "    update bucket bucket" in said
