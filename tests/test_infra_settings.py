"""Settings: right ones are read, all wrong ones are reported with their repair; names fit Google's limits."""

import re
import string
from pathlib import Path
from typing import Any

import pulumi
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from infra import BUILD
from infra.names import Names
from infra.nested_settings import Release
from infra.settings import Settings, read
from sandbox import conventions, iam, vertex_endpoints, vertex_models
from sandbox.artifact_registry import repositories
from sandbox.storage import buckets

ROOT = Path(__file__).resolve().parent.parent
GOOD = {"gcp:project": "my-project", "gcp:region": "europe-west4"}
DIGEST = "sha256:" + "a" * 64


def error(config: dict[str, str], stack: str = "dev") -> str:
    with pytest.raises(pulumi.RunError) as caught:
        read(config, stack)
    return str(caught.value)


def test_without_releases_there_is_one_built_from_the_sources() -> None:
    settings = read(GOOD, "dev")
    assert settings.releases == {"main": Release(image=BUILD, traffic=100)}
    assert settings.builds


def test_texts_become_what_they_stand_for() -> None:
    settings = read(
        GOOD
        | {
            "headcount:paused": "true",
            "headcount:minReplicas": "2",
            "headcount:maxReplicas": "3",
            "headcount:releases": f'{{"aa": {{"image": "{DIGEST}", "traffic": 100}}}}',
            "vertex:endpoint": "http://127.0.0.1:1",
        },
        "dev",
    )
    assert (settings.paused, settings.min_replicas, settings.max_replicas) == (True, 2, 3)
    assert settings.releases["aa"].image == DIGEST
    assert not settings.builds
    assert settings.vertex_endpoint == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("config", "named", "repair"),
    [
        ({"gcp:project": ""}, 'gcp:project (id of the Google Cloud project) is ""', "set gcp:project my-project"),
        ({"gcp:region": "Europe"}, 'gcp:region (region of everything) is "Europe"', "set gcp:region europe-west4"),
        ({"headcount:minReplicas": "-1"}, "greater than or equal to 0", "set headcount:minReplicas 1"),
        ({"headcount:minReplicas": "3"}, "1 is less than minReplicas, 3", "set headcount:maxReplicas 3"),
        ({"headcount:paused": "maybe"}, 'is "maybe", neither true nor false', "set headcount:paused false"),
        (
            {"headcount:minReplicas": "many"},
            'is "many": Input should be a valid integer',
            "set headcount:minReplicas 1",
        ),
        ({"headcount:machinetype": "x"}, "Did you mean machineType?", "rm headcount:machinetype"),
        (
            {"headcount:releases": '{"aa": {"image": "build", "traffic": 90}}'},
            "must add up to 100, not 90 (aa 90)",
            "set --path headcount:releases.aa.traffic 100",
        ),
        (
            {"headcount:releases": '{"aa": {"image": "latest", "traffic": 100}}'},
            'is "latest"',
            "set --path headcount:releases.aa.image 'sha256:…'",
        ),
        (
            {"headcount:releases": '{"aa": {"image": "build"}}'},
            "headcount:releases.aa.traffic (percent of the requests) is missing",
            "set --path headcount:releases.aa.traffic 10",
        ),
        (
            {"headcount:releases": '{"default": {"image": "build", "traffic": 100}}'},
            "Vertex AI's own name",
            "rm --path headcount:releases.default",
        ),
        (
            {"headcount:releases": '{"A b": {"image": "build", "traffic": 100}}'},
            "no name for a release",
            "rm --path 'headcount:releases.A b'",
        ),
        (
            {
                "headcount:releases": '{"aa": {"image": "build", "traffic": 50}, '
                '"bb": {"image": "build", "traffic": 50}}'
            },
            "only one release of a model can be built, not aa and bb",
            "set --path headcount:releases.aa.image sha256:…",
        ),
        (
            {"headcount:releases": '{"aa": {"image": "build", "model": "/here", "traffic": 100}}'},
            "headcount:releases.aa.model (folder of the model that is served instead of the image's, as",
            "set --path headcount:releases.aa.model gs://my-project-hc-models-dev/census/0123456789abcdef",
        ),
        (
            {"headcount:production": "true"},
            "production builds nothing: give main the digest",
            "set --path headcount:releases.main.image sha256:…",
        ),
        (
            {
                "headcount:releases": f'{{"aa": {{"image": "{DIGEST}", "traffic": 100, "minReplicas": 3, '
                '"maxReplicas": 2}}'
            },
            "aa has fewer maxReplicas than minReplicas, 3",
            "set --path headcount:releases.aa.maxReplicas 3",
        ),
        (
            {"headcount:labels": '{"Owner": "me"}'},
            "headcount:labels.Owner is no name for a label",
            "rm --path headcount:labels.Owner",
        ),
        (
            {"headcount:autoscaling": '{"memory": 60}'},
            "is no metric; there are cpu, accelerator, requests",
            "rm --path headcount:autoscaling.memory",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_repair(config: dict[str, str], named: str, repair: str) -> None:
    said = error(GOOD | config)
    assert named in said
    assert f"pulumi config {repair} -s dev" in said


def test_a_setting_that_no_command_sets_is_shown_as_it_stands_in_the_file() -> None:
    said = error(GOOD | {"headcount:requestLog": "everything"})
    assert 'in Pulumi.dev.yaml:  headcount:requestLog: {"table": "bq://my-project.headcount.' in said


def test_everything_wrong_is_said_at_once() -> None:
    said = error(
        {
            "gcp:region": "x",
            "headcount:minReplicas": "-1",
            "headcount:releases": '{"aa": {"image": "latest", "traffic": 101}}',
        }
    )
    assert said.startswith("Stack dev cannot be deployed: 5 settings are wrong.")
    for key in ("gcp:project", "gcp:region", "minReplicas", "releases.aa.image", "releases.aa.traffic"):
        assert key in said


@pytest.mark.parametrize("stack", ["dev", "prod", "local"])
def test_the_committed_stack_files_are_right(stack: str) -> None:
    import json

    config = yaml.safe_load((ROOT / f"Pulumi.{stack}.yaml").read_text())["config"]
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in config.items()}
    read({"gcp:project": "my-project"} | texts, stack)


def test_pulumi_yaml_describes_the_settings_as_they_are() -> None:
    schema: dict[str, Any] = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())["config"]
    fields = {f.alias: f for n, f in Settings.model_fields.items() if n not in ("stack", "project", "region")}
    for key, said in schema.items():
        field = fields[key.removeprefix("headcount:")]
        assert "type" not in said, "Pulumi would say the first wrong one, and not how to repair it"
        assert (said["default"], type(said["default"])) == (field.default, type(field.default))
        assert said["description"] == field.description
    # Pulumi's schema has no maps, and a list or a limit that is not set has no useful default there.
    structured = {
        "training", "releases", "imageReaders", "predictors", "buildArgs", "autoscaling", "requestLog", "labels",
        "vertexEndpoint", "machineTypes", "monthlyCostLimit", "pipeline",
    }  # fmt: skip
    assert {k.removeprefix("headcount:") for k in schema} == set(fields) - structured


PROJECTS = st.from_regex(r"[a-z][a-z0-9-]{4,28}[a-z0-9]", fullmatch=True)
REGIONS = st.from_regex(r"[a-z]{2,12}-[a-z]{4,12}[0-9]{1,2}", fullmatch=True)
STACKS = st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=100)


@given(PROJECTS.filter(lambda p: not re.search("g[o0]{2}g", p)), REGIONS, STACKS)
def test_names_fit_googles_limits(project: str, region: str, stack: str) -> None:
    names = Names(project, region, stack)
    for bucket in (names.bucket, names.model_bucket):
        assert buckets.BUCKET.fullmatch(bucket)
        assert len(bucket) <= 63
    assert repositories.REPOSITORY_ID.fullmatch(names.repository)
    for account in (names.service_account, names.training_account, names.pipeline_account):
        assert iam.ACCOUNT_ID.fullmatch(account)
    assert vertex_models.MODEL_ID.fullmatch(names.model)
    assert vertex_models.MODEL_ID.fullmatch(names.pipeline_model)
    assert vertex_endpoints.ENDPOINT_ID.fullmatch(names.endpoint)
    assert names.endpoint.isdigit()
    assert len(names.endpoint) <= 10
    conventions.check_labels(names.labels)


@given(STACKS, STACKS)
@example("dev", "Dev")
@example("a.b", "a-b")
@example("x" * 60, "x" * 61)
def test_different_stacks_have_different_names(one: str, other: str) -> None:
    if one != other:
        a, b = Names("my-project", "europe-west4", one), Names("my-project", "europe-west4", other)
        for name in vars(a).keys() - {"labels"}:
            assert getattr(a, name) != getattr(b, name)


def test_names_stay_as_they_are() -> None:
    """Other names would replace what serves, and lose the endpoint's URL. Long names of stacks end in a hash."""
    assert vars(Names("my-project", "europe-west4", "dev")) == {
        "bucket": "my-project-headcount-dev",
        "model_bucket": "my-project-hc-models-dev",
        "repository": "headcount-dev",
        "service_account": "headcount-dev",
        "predictor_role": "headcount_predictor_dev",
        "training_account": "hc-training-dev",
        "training_role": "headcount_training_dev",
        "pipeline_account": "hc-pipeline-dev",
        "pipeline_role": "headcount_pipeline_dev",
        "pipeline_model": "headcount-pipeline-dev",
        "model": "headcount-dev",
        "endpoint": "817808147",
        "labels": {"project": "headcount", "stack": "dev"},
    }
    long = Names("my-project", "europe-west4", "x" * 80)
    lengths = [len(getattr(long, name)) for name in ("bucket", "repository", "service_account", "predictor_role")]
    assert lengths == [43, 60, 30, 50]


@pytest.mark.parametrize(
    ("setting", "least", "most"),
    [("maxReplicas", 1, None), ("drainSeconds", 0, 3600), ("pictureDays", 1, 3650), ("keepDeletedDays", 0, 3650)],
)
def test_numbers_have_limits(setting: str, least: int, most: int | None) -> None:
    for right in (least, most):
        if right is not None:
            read(GOOD | {f"headcount:{setting}": str(right)}, "dev")
    assert f"greater than or equal to {least}" in error(GOOD | {f"headcount:{setting}": str(least - 1)})
    if most is not None:
        assert f"less than or equal to {most}" in error(GOOD | {f"headcount:{setting}": str(most + 1)})


def test_a_request_log_stores_all_requests_unless_told_otherwise() -> None:
    table = "bq://my-project.headcount.requests"
    settings = read(GOOD | {"headcount:requestLog": f'{{"table": "{table}"}}'}, "dev")
    assert settings.request_log
    assert settings.request_log.sampling == 1
    said = error(GOOD | {"headcount:requestLog": f'{{"table": "{table}", "sampling": 2}}'})
    assert "fraction of the requests that is stored" in said
    assert "set --path headcount:requestLog.sampling 0.1" in said
