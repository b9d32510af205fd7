"""A pipeline job and a schedule of a program that is not ours, under Pulumi's own engine and without Docker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parameter_template import linear
from vertex_plugin import PROJECT
from vertex_project import Project

from sandbox.testing import RunningSandbox

pytestmark = [pytest.mark.slow, pytest.mark.needs("engine"), pytest.mark.timeout(600)]
PROGRAM = """
import json
import pulumi
import pulumi_vertex as vertex

wanted = json.load(open("wanted.json"))
here = pulumi.ResourceOptions(provider=vertex.Provider("cloud", endpoint=wanted["url"]))
run = {"template": "pipeline.yaml", "pipeline_root": "gs://a-bucket/pipelines", **wanted["run"]}
run["parameters"] = {"text": pulumi.Output.secret(wanted["text"])}
job = vertex.PipelineJob("once", here, **run)
vertex.Schedule("nightly", here, **run, **wanted["schedule"])
pulumi.export("tasks", job.tasks)
"""


class Pipelines(Project):
    """A project with a pipeline job and a schedule; the template is a file beside its program."""

    def __init__(self, folder: Path, sandbox: RunningSandbox) -> None:
        super().__init__(folder, sandbox.url)
        self.sandbox = sandbox.project(PROJECT)
        (folder / "__main__.py").write_text(PROGRAM)

    def declare(self, text: str = "hello", cron: str = "0 3 1 1 *", comment: str = "", **schedule: Any) -> None:
        (self.folder / "pipeline.yaml").write_text(f"# {comment}\n{linear()}")
        wanted = {"url": self.url, "text": text, "run": {}, "schedule": {"cron": cron, **schedule}}
        (self.folder / "wanted.json").write_text(json.dumps(wanted))

    def names(self, collection: str) -> list[str]:
        return [one["name"] for one in self.sandbox.do("GET", collection).get(collection, [])]


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Pipelines]:
    with RunningSandbox() as running:
        project = Pipelines(tmp_path, running)
        project.sandbox.ask_api("storage", "POST", f"v1/b?project={PROJECT}", {"name": "a-bucket"})
        yield project
        project.destroy()
        assert (project.names("pipelineJobs"), project.names("schedules")) == ([], [])
        assert running.violations() == []


def test_up_again_changed_and_refused(project: Pipelines) -> None:
    project.declare()
    assert project.counts(project.up()) == {"created": 4}
    assert [task["state"] for task in project.outputs()["tasks"]] == ["SUCCEEDED", "SUCCEEDED"]
    state = "".join(path.read_text() for path in (project.folder / "state").rglob("*.json"))
    assert "vertex:index:Schedule" in state
    assert '"hello"' not in state, "a parameter that is a secret is encrypted"
    project.declare(comment="another comment")
    assert project.counts(project.up("--refresh")) == {"unchanged": 4}

    (job,), (schedule,) = project.names("pipelineJobs"), project.names("schedules")
    project.declare(cron="0 4 1 1 *", paused=True)
    assert project.counts(project.up()) == {"updated": 1, "unchanged": 3}
    assert (project.names("pipelineJobs"), project.names("schedules")) == ([job], [schedule])

    project.declare(cron="0 4 31 2 *")
    said = project.pulumi("preview", fails=True)
    assert "cron" in said
    assert "never fires: no month of '0 4 31 2 *' has such a day." in said

    project.declare(text="bye", cron="0 4 1 1 *")
    assert project.counts(project.up()) == {"updated": 1, "replaced": 1, "changes": 2, "unchanged": 2}
    assert project.names("pipelineJobs") != [job]
    assert project.names("schedules") == [schedule]
