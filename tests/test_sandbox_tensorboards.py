"""Tensorboards in the sandbox, as Pulumi's google provider and Google's client use them."""

from __future__ import annotations

import pytest
from google.api_core.exceptions import NotFound
from google.cloud import aiplatform
from google_clients import anonymous
from sandbox_jobs import job, pool, run, stubbed

from sandbox.testing import RunningSandbox


@pytest.fixture
def sandbox(stub_sandbox: RunningSandbox, project: str) -> RunningSandbox:
    return stub_sandbox.project(project)


def test_the_life_of_a_tensorboard(sandbox: RunningSandbox, project: str) -> None:
    body = {"displayName": "runs", "labels": {"stack": "dev"}, "encryptionSpec": {}}
    made = sandbox.do("POST", "tensorboards", body)["response"]
    path = f"tensorboards/{made['name'].rpartition('/')[2]}"
    read = sandbox.do("GET", path)
    assert made == {"@type": made["@type"], **read}
    assert (read["displayName"], read["labels"]) == ("runs", {"stack": "dev"})
    assert read["blobStoragePathPrefix"].startswith("cloud-ai-platform-")
    mask = {"updateMask": "displayName,labels"}
    sandbox.do("PATCH", path, {"displayName": "more", "labels": {"a": "b"}}, **mask)
    changed = sandbox.do("GET", path)
    assert (changed["displayName"], changed["labels"]) == ("more", {"a": "b"})
    assert changed["createTime"] == read["createTime"] < changed["updateTime"]
    assert changed["etag"] != read["etag"]
    assert sandbox.ask("PATCH", path, {"displayName": "x", "etag": read["etag"]}, **mask)[0] == 409
    assert sandbox.ask("PATCH", path, {"name": "x"}, updateMask="name")[0] == 400
    listed = sandbox.do("GET", "tensorboards", filter='display_name="more"')["tensorboards"]
    assert [one["name"] for one in listed] == [read["name"]]
    sandbox.do("DELETE", path)
    assert sandbox.ask("GET", path)[0] == 404


def test_its_contents_are_not_implemented_by_name(sandbox: RunningSandbox) -> None:
    status, body = sandbox.ask("POST", "tensorboards/1/experiments", {})
    assert status == 501
    assert "tensorboards.experiments.create" in body["error"]["message"]


def test_a_job_may_name_one(sandbox: RunningSandbox, project: str) -> None:
    made = sandbox.do("POST", "tensorboards", {"displayName": "runs"})["response"]
    spec = {"tensorboard": made["name"], "serviceAccount": "trainer@a-project.iam.gserviceaccount.com"}
    done = run(sandbox, job(pool(stubbed()), **spec))
    assert (done["state"], done["jobSpec"]["tensorboard"]) == ("JOB_STATE_SUCCEEDED", made["name"])
    missing = {**spec, "tensorboard": made["name"] + "1"}
    assert sandbox.ask("POST", "customJobs", job(pool(stubbed()), **missing))[0] == 404


def test_googles_client_manages_them(sandbox: RunningSandbox, project: str) -> None:
    aiplatform.init(
        project=project,
        location="europe-west4",
        api_endpoint=sandbox.url,
        api_transport="rest",
        credentials=anonymous(),
    )
    board = aiplatform.Tensorboard.create(display_name="runs", labels={"stack": "dev"}, description="of training")
    board.update(display_name="more")
    assert aiplatform.Tensorboard(board.resource_name).display_name == "more"
    assert [one.name for one in aiplatform.Tensorboard.list()] == [board.name]
    board.delete()
    with pytest.raises(NotFound):
        aiplatform.Tensorboard(board.resource_name)
