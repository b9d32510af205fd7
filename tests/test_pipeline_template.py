"""Compiled pipelines as `headcount pipelines` reads them, and the values of their parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_jobs import compiled, spec
from typer.testing import CliRunner

from headcount.cli import app
from headcount.pipeline_template import Template, TemplateError, read, values


@pytest.fixture
def template() -> Template:
    return read(compiled().encode(), "pipeline.yaml")


def test_parameters_have_the_types_of_the_template(template: Template) -> None:
    given = [
        "source=gs://b/a=b",
        "steps=-3",
        "share=1e-3",
        "augment=TRUE",
        "rates=[1, 0.5]",
        'labels={"a": {}}',
        "note=",
    ]
    assert values(template, given) == {
        "source": "gs://b/a=b", "steps": -3, "share": 0.001, "augment": True, "rates": [1, 0.5], "labels": {"a": {}},
        "note": "",
    }  # fmt: skip
    assert values(template, ["source=a"]) == {"source": "a"}  # the defaults are in the template
    preset = {"source": "gs://b/data", "steps": 7, "unknown": 1}  # as a stack has them
    assert values(template, ["steps=8"], preset) == {"source": "gs://b/data", "steps": 8}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["source=a", "stpes=3"], "digits-weekly has no parameter stpes. Do you mean steps?"),
        (["source=a", "zzz=3"], "digits-weekly has no parameter zzz. It has: augment, labels, note, rates, share, "),
        ([], "digits-weekly needs source: add --param source=…."),
        (["source"], "--param source has no value; write --param NAME=VALUE."),
        (["source=a", "source=b"], "--param source is given twice."),
        (["source=a", "steps=1.5"], "steps is '1.5', and has to be an integer of at most 2^53, such as steps=10."),
        (["source=a", "steps=9007199254740993"], "steps is '9007199254740993', and has to be an integer of at most"),
        (["source=a", "share=nan"], "share is 'nan', and has to be a number, such as share=0.1."),
        (["source=a", "augment=1"], "augment is '1', and has to be true or false, such as augment=true."),
        (["source=a", "rates={}"], "rates is '{}', and has to be a list in JSON, such as rates='[1, 2]'."),
        (["source=a", "labels=a"], "labels is 'a', and has to be an object in JSON, such as labels='{\"a\": 1}'."),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused_with_its_repair(
    template: Template, given: list[str], said: str
) -> None:
    with pytest.raises(TemplateError, match=f"^{re.escape(said)}"):
        values(template, given)


def with_inputs(**changed: Any) -> Template:
    found = spec()
    found["root"]["inputDefinitions"] = changed
    return Template(found)


def test_a_literal_has_to_be_one_of_its_values() -> None:
    """As kfp compiles typing.Literal."""
    choice = {"parameterType": "STRING", "literals": ["cnn", "linear"]}
    assert values(with_inputs(parameters={"model": choice}), ["model=cnn"]) == {"model": "cnn"}
    with pytest.raises(TemplateError, match='model is \'deep\', and has to be one of "cnn", "linear"'):
        values(with_inputs(parameters={"model": choice}), ["model=deep"])


def test_what_the_command_cannot_give_is_said() -> None:
    artifact = {"artifactType": {"schemaTitle": "system.Dataset"}}
    with pytest.raises(TemplateError, match="takes the artifact data, which this command cannot give"):
        values(with_inputs(artifacts={"data": artifact}), [])
    assert values(with_inputs(artifacts={"data": {**artifact, "isOptional": True}}), []) == {}
    # What kfp fills in itself is no parameter.
    assert values(with_inputs(parameters={"status": {"parameterType": "TASK_FINAL_STATUS"}}), []) == {}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.yaml", b"", "a.yaml is not a compiled pipeline: it has no fields. Name the YAML file that kfp's compiler"),
        ("a.yaml", b"a: 1", "a.yaml is not a compiled pipeline: it has no pipelineInfo.name."),
        ("a.yaml", b"pipelineInfo: {name: a}\nroot: 3", "a.yaml is not a compiled pipeline: it has no root.dag.tasks."),
        ("a.yaml", b"a: [1\nb: 2", "a.yaml is not YAML, line 2, hence no compiled pipeline."),
        ("a.yaml", b"\xff\xd8\xff\xe0picture", "a.yaml is not YAML, hence no compiled pipeline."),
        ("pipeline.py", b"import kfp", "pipeline.py is a program, not a compiled pipeline."),
        ("a.yaml", b"apiVersion: argoproj.io/v1alpha1\nkind: Workflow", "a.yaml is a workflow of Argo, which KFP 1"),
    ],
)
def test_a_file_that_is_no_template_is_said_to_be_none(name: str, content: bytes, said: str) -> None:
    with pytest.raises(TemplateError, match=f"^{re.escape(said)}"):
        read(content, name)


def test_templates_are_read_as_kfp_writes_them(template: Template) -> None:
    assert template.name == "digits-weekly"
    two = compiled().encode() + b"---\nplatforms: {}\n"  # what only Kubernetes has
    assert read(two, "a.yaml").spec == template.spec
    job = json.dumps({"pipelineSpec": template.spec, "runtimeConfig": {}}).encode()
    assert read(job, "a.json").spec == template.spec
    with pytest.raises(TemplateError, match=r"has the schema 2\.0\.0; compile the pipeline with KFP 2"):
        read(yaml.dump({**template.spec, "schemaVersion": "2.0.0"}).encode(), "a.yaml")


def test_a_text_that_looks_like_a_number_stays_a_text() -> None:
    """kfp writes the text 1e5 without quotes, because it is no number in YAML 1.1."""
    found = spec()
    found["root"]["inputDefinitions"]["parameters"]["source"]["defaultValue"] = "1e5"
    text = yaml.dump(found)
    assert "defaultValue: 1e5\n" in text
    kept = read(text.encode(), "a.yaml").parameters["source"]["defaultValue"]
    assert kept == "1e5"


def test_nothing_is_taken_from_the_cache_if_asked(template: Template) -> None:
    before = json.dumps(template.spec)
    tasks = [
        task
        for component in (template.uncached().spec["root"], *template.uncached().spec["components"].values())
        for task in component.get("dag", {}).get("tasks", {}).values()
    ]
    assert len(tasks) == 8
    assert all(task["cachingOptions"] == {"enableCache": False} for task in tasks)
    assert json.dumps(template.spec) == before


@pytest.mark.parametrize("arguments", [["--param", "stpes=1"], []])
def test_nothing_is_asked_before_the_parameters_fit(tmp_path: Path, arguments: list[str]) -> None:
    """A stack that does not exist is not noticed."""
    file = tmp_path / "pipeline.yaml"
    file.write_text(compiled())
    done = CliRunner().invoke(app, ["pipelines", "run", str(file), "--stack", "nowhere", *arguments])
    assert done.exit_code == 2
    assert "Do you mean steps?" in done.stderr if arguments else "needs source" in done.stderr
    missing = CliRunner().invoke(app, ["pipelines", "run", str(tmp_path / "a.yaml"), "--stack", "nowhere"])
    assert missing.exit_code == 2
    assert "cannot be read: No such file or directory" in missing.stderr
