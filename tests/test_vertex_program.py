"""The README's program, settings taken from the google provider, and the steps of the live check."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pulumi
import pytest
from vertex_plugin import IMAGE, OTHER_IMAGE, PROJECT

import pulumi_vertex as vertex
from pulumi_vertex.provider import RESOURCES
from pulumi_vertex.wire import unwrapped
from sandbox.testing import RunningSandbox

TEMPLATE = json.dumps(
    {
        "pipelineInfo": {"name": "digits"},
        "schemaVersion": "2.1.0",
        "root": {"inputDefinitions": {"parameters": {"epochs": {"parameterType": "NUMBER_INTEGER"}}}},
    }
)
README = Path(vertex.__file__).parent / "README.md"


class RecordingMocks(pulumi.runtime.Mocks):
    """Answers every registration with its own inputs, and keeps them."""

    def __init__(self) -> None:
        self.made: dict[str, pulumi.runtime.MockResourceArgs] = {}

    def new_resource(self, args: pulumi.runtime.MockResourceArgs) -> tuple[str | None, dict[Any, Any]]:
        self.made[args.typ] = args
        return f"{args.name}-id", dict(args.inputs)

    def call(self, args: pulumi.runtime.MockCallArgs) -> tuple[dict[Any, Any], list[tuple[str, str]] | None]:
        return {}, None


@pytest.fixture
def mocks() -> Iterator[RecordingMocks]:
    """Mocks of Pulumi's engine, which are gone after the test, as is the configuration."""
    mocks = RecordingMocks()
    asyncio.set_event_loop(asyncio.new_event_loop())
    pulumi.runtime.set_mocks(mocks, project="digits", stack="dev")
    yield mocks
    pulumi.runtime.set_all_config({})
    pulumi.runtime.settings.reset_options()


def run_readme_s(number: int) -> None:
    """Runs one of the README's programs in Python."""
    program = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[number]
    pulumi.runtime.set_all_config(
        {"digits:image": IMAGE, "digits:trainingImage": OTHER_IMAGE, "digits:template": TEMPLATE}
    )

    @pulumi.runtime.test  # type: ignore[untyped-decorator]
    def run() -> None:
        exec(compile(program, str(README), "exec"), {})

    run()


@pytest.mark.parametrize(("number", "token"), [(1, "vertex:index:CustomJob"), (2, "vertex:index:TuningJob")])
def test_the_readme_s_jobs_pass_the_checks_of_a_preview(mocks: RecordingMocks, number: int, token: str) -> None:
    run_readme_s(number)
    inputs = unwrapped(mocks.made[token].inputs)
    assert inputs["image"] == OTHER_IMAGE
    assert RESOURCES[token].check(inputs) == []
    if token.endswith("TuningJob"):
        assert inputs["parameters"]["learning-rate"]["scaleType"] == "UNIT_LOG_SCALE"


def test_the_readme_s_pipeline_passes_the_checks_of_a_preview(mocks: RecordingMocks) -> None:
    run_readme_s(3)
    for token in ("vertex:index:PipelineJob", "vertex:index:Schedule"):
        inputs = unwrapped(mocks.made[token].inputs)
        assert inputs["parameters"] == {"epochs": 3}
        assert RESOURCES[token].check(RESOURCES[token].resolve(inputs)) == []


def test_the_readme_s_program_registers_what_it_says(mocks: RecordingMocks) -> None:
    pytest.importorskip("pulumi_gcp")
    run_readme_s(0)
    version = mocks.made["vertex:index:ModelVersion"].inputs
    assert version["modelId"] == "digits"
    assert version["env"] == {"WORKERS": "2"}
    assert version["aliases"] == ["live"]
    rollout = mocks.made["vertex:index:Rollout"].inputs
    assert rollout["endpoint"] == "digits-id"
    assert rollout["models"]["main"] == {
        "model": "digits-id",
        "traffic": 100,
        "machineType": "n1-standard-2",
        "minReplicas": 1,
        "maxReplicas": 3,
    }


def test_names_are_translated_but_never_a_user_s_own_keys(mocks: RecordingMocks) -> None:
    @pulumi.runtime.test  # type: ignore[untyped-decorator]
    def run() -> None:
        vertex.ModelVersion(
            "a",
            model_id="a",
            image=IMAGE,
            env={"model_id": "x", "MY_VAR": "y"},
            labels={"health_route": "z"},
            health_probe=vertex.Probe(path="/", period_seconds=3),
        )

    run()
    inputs = mocks.made["vertex:index:ModelVersion"].inputs
    assert inputs["env"] == {"model_id": "x", "MY_VAR": "y"}
    assert inputs["labels"] == {"health_route": "z"}
    assert inputs["healthProbe"] == {"path": "/", "periodSeconds": 3}


def test_a_provider_takes_over_the_google_provider_s_settings(mocks: RecordingMocks) -> None:
    pulumi.runtime.set_all_config({"gcp:project": "p", "gcp:region": "europe-west4"})

    @pulumi.runtime.test  # type: ignore[untyped-decorator]
    def run() -> None:
        vertex.Provider("cloud", location="us-central1")

    run()
    inputs = mocks.made["pulumi:providers:vertex"].inputs
    assert inputs["project"] == "p"
    assert inputs["location"] == "us-central1"


def live(sandbox: RunningSandbox, *more: str) -> int | str | None:
    """The exit status of `make live` against a sandbox, after which nothing may be left there."""
    import live_vertex

    where = [PROJECT, "--image", IMAGE, "--url", sandbox.url, "--health-route", "/health"]
    with pytest.raises(SystemExit) as ended:
        live_vertex.main([*where, *more])
    sandbox.clear_faults()
    assert [v for v in sandbox.violations() if v["part"] == "response"] == []
    return ended.value.code


@pytest.fixture
def live_sandbox() -> Iterator[RunningSandbox]:
    with RunningSandbox("--idle-seconds", "0.2") as sandbox:
        yield sandbox.project(PROJECT)


def there(sandbox: RunningSandbox) -> list[str]:
    """The kinds of resources that there are."""
    return [kind for kind in ("models", "endpoints") if sandbox.do("GET", kind)]


@pytest.mark.timeout(300)
def test_the_live_check_goes_through_on_the_sandbox(
    live_sandbox: RunningSandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    live_sandbox.fault("endpoints.deployModel", "slow", seconds=2)
    assert live(live_sandbox, "--predictor", "user:me@example.com") == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "All of it went as it should, and nothing is left." in said
    assert "canary at 10 %" in said
    assert "while it ran: running operation, state BEING_DEPLOYED" in said
    assert "not yet ready" in said
    assert there(live_sandbox) == []


@pytest.mark.timeout(300)
def test_the_live_check_says_what_is_wrong_and_what_is_left(
    live_sandbox: RunningSandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    live_sandbox.fault("endpoints.deployModel", "slow", seconds=2)
    for method in ("models.delete", "models.deleteVersion"):
        refused = {"status": "PERMISSION_DENIED", "message": "not today"}
        live_sandbox.fault(method, "refuse", count=100, **refused)
    assert live(live_sandbox, "--count", "3") == 1
    said = capsys.readouterr().out
    assert "Not as expected: the count: 4, not 3" in said
    assert "not today" in said
    (left,) = re.findall(r"LEFT: .*", said)
    assert "models/pulumi-vertex-live" in left
    assert there(live_sandbox) == ["models"], "the endpoint, which costs, is gone"
