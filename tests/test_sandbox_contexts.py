"""Experiments of pipelines on the sandbox, by Google's own client and by `headcount pipelines run --experiment`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipeline_templates as templates
import pytest
import yaml
from google.cloud import aiplatform
from google.cloud.aiplatform.utils import resource_manager_utils
from google_clients import anonymous
from typer.testing import CliRunner

from headcount import pipelines
from headcount.cli import app
from sandbox.projects import project_number
from sandbox.testing import RunningSandbox

pytestmark = [
    pytest.mark.xdist_group("pipelines"),
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),  # Google's client warns so
]


@pytest.fixture
def sandbox(stub_sandbox: RunningSandbox, project: str, monkeypatch: pytest.MonkeyPatch) -> RunningSandbox:
    there = stub_sandbox.project(project)
    status, _ = there.ask_api("storage", "POST", f"v1/b?project={project}", {"name": f"models-{project}"})
    assert status == 200
    # Google's client asks whose the bucket of the outputs is, and has no option for the address of Resource Manager.
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", there.url)
    monkeypatch.setattr(resource_manager_utils, "get_project_number", lambda project, *_: project_number(project))
    aiplatform.init(
        project=project, location="europe-west4", api_endpoint=there.url, api_transport="rest", credentials=anonymous()
    )
    return there


@pytest.fixture
def template(tmp_path: Path) -> str:
    file = tmp_path / "linear.yaml"
    file.write_text(yaml.safe_dump(templates.linear()))
    return str(file)


def test_google_s_client_and_the_command_put_runs_into_one_experiment(
    sandbox: RunningSandbox, template: str, project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {
        "endpoint": f"{sandbox.location}/endpoints/1",
        "url": f"{sandbox.url}/v1/e/1",
        "modelBucket": f"gs://models-{project}",
    }
    monkeypatch.setattr("headcount.stacks.outputs", lambda _: found)
    monkeypatch.setattr(pipelines, "POLL_SECONDS", 0.05)
    arguments = ["pipelines", "run", template, "-s", "local", "--param", "times=1", "--experiment", "weekly"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    ours = aiplatform.PipelineJob.get(done.stdout.splitlines()[0])
    # Google's client does not see the context of a run that ends before it looks: this one lasts until it is cancelled.
    (lasting := tmp_path / "lasting.yaml").write_text(yaml.safe_dump(templates.linear(seconds="600")))
    theirs = aiplatform.PipelineJob(
        display_name="theirs",
        template_path=str(lasting),
        pipeline_root=f"gs://models-{project}/runs",
        parameter_values={"times": 1},
    )
    theirs.submit(experiment="weekly")
    theirs.cancel()
    (experiment,) = aiplatform.Experiment.list()
    assert experiment.name == "weekly"
    for job in (ours, theirs):
        again = aiplatform.PipelineJob.get(job.resource_name).get_associated_experiment()
        assert again is not None
        assert again.resource_name == experiment.resource_name


def test_what_is_wrong_is_said(sandbox: RunningSandbox) -> None:
    store, experiment = "metadataStores/default", {"schemaTitle": "system.Experiment"}

    def status(http: str, path: str, body: Any = None, **query: str) -> int:
        return sandbox.ask(http, path, body, **query)[0]

    assert status("GET", store) == 404
    assert status("POST", f"{store}/contexts", experiment, contextId="a") == 404
    assert status("POST", "metadataStores", {}, metadataStoreId="other") == 501
    made = sandbox.done(sandbox.do("POST", "metadataStores", {}, metadataStoreId="default"))
    assert made["response"]["name"].endswith(store)
    assert status("POST", "metadataStores", {}, metadataStoreId="default") == 409
    assert status("POST", f"{store}/contexts", experiment, contextId="a") == 200
    assert status("POST", f"{store}/contexts", experiment, contextId="a") == 409
    assert status("POST", f"{store}/contexts", experiment, contextId="A") == 400
    for child, expected in (("b", 404), ("a", 400)):
        children = {"childContexts": [f"{sandbox.location}/{store}/contexts/{child}"]}
        assert status("POST", f"{store}/contexts/a:addContextChildren", children) == expected
    assert status("DELETE", f"{store}/contexts/a") == 501
