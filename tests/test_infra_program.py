"""The program under Pulumi's mocks: what each stack asks for, in which order, and what it never asks for."""

import asyncio
import json
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pulumi
import pytest
import yaml

from infra import foundation, image

ROOT = Path(__file__).resolve().parent.parent
SECRET = pulumi.runtime.rpc._special_sig_key
DIGEST = "sha256:" + "1" * 64
PINNED = "sha256:" + "2" * 64
REPOSITORY = "europe-west4-docker.pkg.dev/my-project/headcount"


class Recorder(pulumi.runtime.Mocks):
    """Answers as Google would, and notes what was asked for, in order."""

    def __init__(self) -> None:
        self.asked: list[pulumi.runtime.MockResourceArgs] = []

    def new_resource(self, args: pulumi.runtime.MockResourceArgs) -> tuple[str, dict[str, Any]]:
        self.asked.append(args)
        outputs = dict(args.inputs)
        match args.typ:
            case "docker-build:index:Image":
                outputs |= {"digest": DIGEST, "ref": f"{args.inputs['tags'][0]}@{DIGEST}"}
            case "gcp:artifactregistry/repository:Repository":
                outputs |= {"registryUri": REPOSITORY, "name": args.inputs["repositoryId"]}
            case "gcp:serviceaccount/account:Account":
                email = f"{args.inputs['accountId']}@my-project.iam.gserviceaccount.com"
                outputs |= {"email": email, "member": f"serviceAccount:{email}"}
            case "gcp:storage/bucket:Bucket":
                outputs |= {"url": f"gs://{args.inputs['name']}"}
            case "gcp:vertex/aiEndpoint:AiEndpoint":
                outputs |= {"dedicatedEndpointDns": "1.europe-west4-1.prediction.vertexai.goog"}
                return f"projects/my-project/locations/europe-west4/endpoints/{args.inputs['name']}", outputs
            case "vertex:index:ModelVersion":
                return f"projects/my-project/locations/europe-west4/models/{args.inputs['modelId']}@1", outputs
        return f"{args.name}_id", outputs

    def call(self, args: pulumi.runtime.MockCallArgs) -> tuple[dict[Any, Any], list[tuple[str, str]] | None]:
        return {"accessToken": "ya29.token"}, []

    def inputs(self, kind: str) -> list[dict[str, Any]]:
        return [a.inputs for a in self.asked if a.typ.endswith(kind)]

    def one(self, kind: str) -> dict[str, Any]:
        (found,) = self.inputs(kind)
        return found


@dataclass
class Program:
    """One run: what was asked for, what was exported, the engine's registrations, the APIs waited for."""

    recorder: Recorder
    outputs: dict[str, Any]
    registered: list[Any]
    waited: list[str]

    def request(self, kind: str) -> Any:
        """The engine's registration of the one resource of a kind, with its options."""
        (found,) = [r for r in self.registered if r.type.endswith(kind)]
        return found


Run = Callable[..., Program]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the program with a stack's committed file and further settings."""
    waited: list[str] = []

    async def usable(service: str, *_: object) -> None:
        waited.append(service)

    monkeypatch.setattr(foundation, "until_usable", usable)
    monkeypatch.setattr(image, "fetch_weights", lambda root, weights: weights)
    monkeypatch.setattr(image, "stage", lambda root, to, weights: "0123456789abcdef")

    def program(stack: str, preview: bool = False, **settings: Any) -> Program:
        config: dict[str, Any] = yaml.safe_load((ROOT / f"Pulumi.{stack}.yaml").read_text())["config"]
        config = {"gcp:project": "my-project"} | config | {f"headcount:{k}": v for k, v in settings.items()}
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in config.items()}
        monkeypatch.setenv("PULUMI_CONFIG", json.dumps(texts))
        recorder, registered, outputs = Recorder(), [], dict[str, Any]()
        asyncio.set_event_loop(asyncio.new_event_loop())
        pulumi.runtime.set_mocks(recorder, project="headcount", stack=stack, preview=preview)
        monitor: Any = pulumi.runtime.settings.get_monitor()
        register = monitor.RegisterResource

        def noting(request: Any) -> Any:
            registered.append(request)
            return register(request)

        monkeypatch.setattr(monitor, "RegisterResource", noting)
        monkeypatch.setattr(pulumi, "export", lambda name, value: outputs.__setitem__(name, value))

        @pulumi.runtime.test  # type: ignore[untyped-decorator]
        def whole() -> pulumi.Output[Any]:
            runpy.run_module("infra.__main__")
            return pulumi.Output.all(**outputs).apply(lambda known: outputs.update(known))

        whole()
        return Program(recorder, outputs, registered, waited)

    return program


@pytest.mark.parametrize("stack", ["dev", "local"])
def test_a_stack_that_builds_deploys_the_digest_that_it_built(run: Run, stack: str) -> None:
    asked = run(stack).recorder
    assert asked.one("ModelVersion")["image"] == f"{REPOSITORY}/headcount@{DIGEST}"
    models = asked.one("Rollout")["models"]
    assert models["main"]["model"].endswith("@1")
    assert models["main"]["traffic"] == 100


def test_order_is_image_then_version_then_endpoint_then_rollout(run: Run) -> None:
    program = run("dev")
    kinds = [a.typ.rpartition(":")[2] for a in program.recorder.asked]
    assert kinds.index("Repository") < kinds.index("Image", kinds.index("Repository")) < kinds.index("ModelVersion")
    assert kinds.index("ModelVersion") < kinds.index("Rollout")
    assert kinds.index("AiEndpoint") < kinds.index("Rollout")
    waits_for = program.request("index:Rollout").dependencies
    assert any("BucketIAMMember" in urn for urn in waits_for), "the account has its grants before it serves"


def test_the_image_is_for_vertex_ai_pushed_and_never_built_in_a_preview(run: Run) -> None:
    program = run("dev")
    build = program.recorder.one("docker-build:index:Image")
    assert build["platforms"] == ["linux/amd64"]
    assert build["push"] is True
    assert build["buildOnPreview"] is False
    assert build["tags"] == [f"{REPOSITORY}/headcount:0123456789abcdef"]
    assert build["buildArgs"]["SOURCES"] == "0123456789abcdef"
    assert SECRET in build["registries"], "the token is a secret"
    registry = build["registries"]["value"][0]
    assert (registry["address"], registry["username"]) == ("europe-west4-docker.pkg.dev", "oauth2accesstoken")
    assert program.request("docker-build:index:Image").retainOnDelete


def test_nothing_is_public(run: Run) -> None:
    for stack in ("dev", "local"):
        asked = run(stack).recorder
        bucket = asked.one("Bucket")
        assert bucket["uniformBucketLevelAccess"] is True
        assert bucket["publicAccessPrevention"] == "enforced"
        everything = json.dumps([a.inputs for a in asked.asked])
        assert "allUsers" not in everything
        assert "allAuthenticatedUsers" not in everything


def test_the_serving_account_reads_one_bucket_and_nothing_else(run: Run) -> None:
    asked = run("dev").recorder
    grants = [a for a in asked.asked if "IAM" in a.typ or "Iam" in a.typ]
    (grant,) = grants
    assert grant.typ == "gcp:storage/bucketIAMMember:BucketIAMMember"
    assert grant.inputs["role"] == "roles/storage.objectViewer"
    assert asked.one("Rollout")["models"]["main"]["serviceAccount"] in grant.inputs["member"]


def test_prod_is_protected_and_builds_nothing(run: Run) -> None:
    program = run(
        "prod", releases={"main": {"image": PINNED, "traffic": 100}}, imageRepository=f"{REPOSITORY}-dev/images"
    )
    asked = program.recorder
    assert asked.inputs("docker-build:index:Image") == []
    assert asked.one("ModelVersion")["image"] == f"{REPOSITORY}-dev/images/headcount@{PINNED}"
    for kind in ("Bucket", "Repository", "AiEndpoint"):
        assert program.request(kind).protect
    assert asked.one("Bucket")["forceDestroy"] is False
    assert asked.one("Rollout")["models"]["main"]["minReplicas"] == 2


def test_dev_can_be_destroyed(run: Run) -> None:
    program = run("dev")
    for kind in ("Bucket", "Repository", "AiEndpoint"):
        assert not program.request(kind).protect
    assert program.recorder.one("Bucket")["forceDestroy"] is True
    assert program.recorder.one("Bucket")["softDeletePolicy"] == {"retentionDurationSeconds": 0}


def test_prod_as_committed_has_an_endpoint_without_machines(run: Run) -> None:
    asked = run("prod").recorder
    assert asked.inputs("ModelVersion") == []
    assert asked.one("Rollout")["models"] == {}
    assert len(asked.inputs("AiEndpoint")) == 1


def test_paused_keeps_the_versions_and_deploys_none(run: Run) -> None:
    asked = run("dev", paused=True).recorder
    assert len(asked.inputs("ModelVersion")) == 1
    assert asked.one("Rollout")["models"] == {}


def test_each_release_is_a_version_and_a_share(run: Run) -> None:
    releases = {"stable": {"image": PINNED, "traffic": 90}, "next": {"image": "build", "traffic": 10}}
    asked = run("dev", releases=releases).recorder
    images = {i["aliases"][0]: i["image"] for i in asked.inputs("ModelVersion")}
    assert images == {"stable": f"{REPOSITORY}/headcount@{PINNED}", "next": f"{REPOSITORY}/headcount@{DIGEST}"}
    assert {n: m["traffic"] for n, m in asked.one("Rollout")["models"].items()} == {"stable": 90, "next": 10}


def test_what_can_carry_labels_carries_project_and_stack(run: Run) -> None:
    asked = run("dev").recorder
    for kind in ("Bucket", "Repository", "ModelVersion", "AiEndpoint"):
        assert asked.one(kind)["labels"] == {"project": "headcount", "stack": "dev"}


def test_apis_stay_enabled_and_are_waited_for_but_not_in_a_preview(run: Run) -> None:
    program = run("dev")
    services = program.recorder.inputs("projects/service:Service")
    assert {s["service"] for s in services} == {api.service for api in foundation.APIS}
    assert all(s["disableOnDestroy"] is False for s in services)
    assert set(program.waited) == {api.service for api in foundation.APIS}
    program.waited.clear()
    assert run("dev", preview=True).waited == []


def test_other_readers_may_pull_and_only_that(run: Run) -> None:
    reader = "serviceAccount:service-1@gcp-sa-aiplatform.iam.gserviceaccount.com"
    asked = run("dev", imageReaders=[reader]).recorder
    grant = asked.one("RepositoryIamMember")
    assert (grant["member"], grant["role"]) == (reader, "roles/artifactregistry.reader")


def test_exports_can_be_pasted(run: Run) -> None:
    outputs = run("dev").outputs
    endpoint = outputs["url"]
    assert endpoint.startswith("https://1.europe-west4-1.prediction.vertexai.goog/v1/projects/my-project/")
    assert outputs["curl"].endswith(f"{endpoint}:rawPredict")
    assert "$(gcloud auth print-access-token)" in outputs["curl"]
    assert outputs["count"] == "headcount count --stack dev picture.jpg"
    assert outputs["images"] == {"main": f"{REPOSITORY}/headcount@{DIGEST}"}
    assert outputs["consoleModels"].startswith("https://console.cloud.google.com/vertex-ai/models/")


def test_lines_to_paste_are_said_whole_when_something_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pulumi.log, "info", said.append)
    outputs = run("dev").outputs
    (told,) = said
    assert {outputs["count"], outputs["curl"]} <= {line.strip() for line in told.splitlines()}
    run("dev", preview=True)
    run("dev", paused="true")
    run("prod", imageRepository=REPOSITORY)
    assert len(said) == 1


def test_on_local_the_same_program_asks_the_sandbox(run: Run) -> None:
    program = run("local")
    assert program.outputs["url"].startswith("http://127.0.0.1:8790/v1/projects/headcount-local/")
    assert "console" not in program.outputs
    kinds = {a.typ for a in program.recorder.asked}
    assert kinds == {a.typ for a in run("dev").recorder.asked}
