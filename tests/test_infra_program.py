"""The program under Pulumi's mocks: the resources of each stack, their order, and what no stack may ask for."""

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
from helpers import ROOT

from infra import image, training
from infra.apis import APIS

SECRET = pulumi.runtime.rpc._special_sig_key
DIGEST = "sha256:" + "1" * 64
PINNED = "sha256:" + "2" * 64
REPOSITORY = "europe-west4-docker.pkg.dev/my-project/headcount"


class Recorder(pulumi.runtime.Mocks):
    """Answers as Google would, and records the requests in order."""

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
            case "gcp:projects/serviceIdentity:ServiceIdentity":
                email = f"service-42@gcp-sa-{args.inputs['service'].partition('.')[0]}.iam.gserviceaccount.com"
                outputs |= {"email": email, "member": f"serviceAccount:{email}"}
            case "gcp:projects/iAMCustomRole:IAMCustomRole":
                outputs |= {"name": f"projects/my-project/roles/{args.inputs['roleId']}"}
            case "gcp:storage/bucket:Bucket":
                outputs |= {"url": f"gs://{args.inputs['name']}"}
            case "gcp:vertex/aiEndpoint:AiEndpoint":
                return f"projects/my-project/locations/europe-west4/endpoints/{args.inputs['name']}", outputs
            case "gcp:vertex/aiTensorboard:AiTensorboard":
                return "projects/my-project/locations/europe-west4/tensorboards/7", outputs
            case "vertex:index:CustomJob" | "vertex:index:TuningJob":
                outputs |= {"artifactUri": f"{args.inputs['baseOutputDirectory']}/0123/model"}
            case "vertex:index:ReleasedImage":
                outputs |= {"image": f"{args.inputs['repository']}@{args.inputs['digest']}"}
            case "vertex:index:ModelVersion":
                return f"projects/my-project/locations/europe-west4/models/{args.inputs['modelId']}@1", outputs
        return f"{args.name}_id", outputs

    def call(self, args: pulumi.runtime.MockCallArgs) -> tuple[dict[Any, Any], list[tuple[str, str]] | None]:
        answers: dict[str, dict[Any, Any]] = {
            "gcp:organizations/getClientConfig:getClientConfig": {"accessToken": "ya29.token"},
            "gcp:storage/getProjectServiceAccount:getProjectServiceAccount": {
                "emailAddress": "service-42@gs-project-accounts.iam.gserviceaccount.com"
            },
        }
        return answers[args.token], []

    def inputs(self, kind: str, name: str = "") -> list[dict[str, Any]]:
        return [a.inputs for a in self.asked if a.typ.endswith(kind) and name in ("", a.name)]

    def one(self, kind: str, name: str = "") -> dict[str, Any]:
        (found,) = self.inputs(kind, name)
        return found


@dataclass
class Program:
    """One run: its requests, its outputs, the engine's registrations, and the APIs that it waited for."""

    recorder: Recorder
    outputs: dict[str, Any]
    registered: list[Any]
    waited: list[str]

    def request(self, kind: str, name: str = "") -> Any:
        """The engine's registration of the one resource of a kind, with its options."""
        (found,) = [r for r in self.registered if r.type.endswith(kind) and name in ("", r.name)]
        return found


Run = Callable[..., Program]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the program with a stack's committed file and further settings."""
    waited: list[str] = []
    data = [tmp_path / "adult.data", tmp_path / "adult.test"]
    for file in data:
        file.write_text(file.name)

    async def usable(service: str, *_: object) -> None:
        waited.append(service)

    async def number(*_: object) -> str:
        return "42"

    monkeypatch.setattr("infra.apis.until_usable", usable)
    monkeypatch.setattr("infra.foundation.project_number", number)
    monkeypatch.setattr(image, "fetch_weights", lambda root, weights: weights)
    monkeypatch.setattr(training, "data_files", lambda job: data)
    monkeypatch.setattr(image, "torch_source", lambda root, say: "cpu")
    monkeypatch.setattr(image, "stage", lambda root, to, files: "0123456789abcdef")

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


def test_what_needs_something_depends_on_it(run: Run) -> None:
    program = run("dev")

    def needs(kind: str, needed: str) -> bool:
        return any(f"{needed}::" in urn for urn in program.request(kind).dependencies)

    assert needs("docker-build:index:Image", "Repository")
    assert needs("index:ReleasedImage", "docker-build:index:Image")
    assert needs("index:ModelVersion", "ReleasedImage")
    assert needs("index:ModelVersion", "RepositoryIamMember"), "the service agent may pull the image"
    assert needs("index:Rollout", "index:ModelVersion")
    assert needs("index:Rollout", "AiEndpoint")
    assert needs("index:Rollout", "BucketIAMMember"), "the account has its grants before it serves"


def test_the_image_is_for_vertex_ai_pushed_and_never_built_in_a_preview(run: Run) -> None:
    program = run("dev")
    build = program.recorder.one("docker-build:index:Image")
    assert build["platforms"] == ["linux/amd64"]
    assert build["push"] is True
    assert build["buildOnPreview"] is False
    assert build["tags"] == [f"{REPOSITORY}/headcount:0123456789abcdef"]
    arguments = build["buildArgs"]
    assert arguments["SOURCES"] == "0123456789abcdef"
    assert "@sha256:" in arguments["BASE"]
    assert (arguments["TORCH"], arguments["REQUIRE"]) == ("cpu", "bfloat16")
    other = run("dev", machineType="n1-standard-4", torch="index").recorder.one("docker-build:index:Image")
    assert (other["buildArgs"]["TORCH"], other["buildArgs"]["REQUIRE"]) == ("index", "float32")
    gpu = run("dev", accelerator="NVIDIA_L4").recorder
    arguments = gpu.one("docker-build:index:Image")["buildArgs"]
    assert (arguments["ACCELERATOR"], arguments["TORCH"], arguments["REQUIRE"]) == ("cuda", "index", "")
    models = gpu.one("Rollout")["models"]
    assert (models["main"]["acceleratorType"], models["main"]["acceleratorCount"]) == ("NVIDIA_L4", 1)
    assert SECRET in build["registries"], "the token is a secret"
    registry = build["registries"]["value"][0]
    assert (registry["address"], registry["username"]) == ("europe-west4-docker.pkg.dev", "oauth2accesstoken")
    assert program.request("docker-build:index:Image").retainOnDelete


def test_nothing_is_public(run: Run) -> None:
    for stack in ("dev", "local"):
        asked = run(stack).recorder
        for bucket in asked.inputs("Bucket"):
            assert bucket["uniformBucketLevelAccess"] is True
            assert bucket["publicAccessPrevention"] == "enforced"
        everything = json.dumps([a.inputs for a in asked.asked])
        assert "allUsers" not in everything
        assert "allAuthenticatedUsers" not in everything


def test_the_serving_account_reads_the_stack_s_buckets_and_the_agent_the_images(run: Run) -> None:
    asked = run("dev").recorder
    grants = [a.inputs for a in asked.asked if "IAM" in a.typ or "Iam" in a.typ]
    (pulls,) = (grant for grant in grants if "bucket" not in grant)
    reads = [grant for grant in grants if "bucket" in grant]
    assert {one["bucket"] for one in reads} == {"my-project-headcount-dev", "my-project-hc-models-dev"}
    assert len(reads) == 2
    for one in reads:
        assert one["role"] == "roles/storage.objectViewer"
        assert asked.one("Rollout")["models"]["main"]["serviceAccount"] in one["member"]
    agent = "serviceAccount:service-42@gcp-sa-aiplatform.iam.gserviceaccount.com"
    assert (pulls["member"], pulls["role"]) == (agent, "roles/artifactregistry.reader")


OWN, FOREIGN = "gs://my-project-hc-models-dev/census/1", "gs://trained-elsewhere/census"


def test_a_release_may_serve_a_model_of_a_bucket_that_the_serving_account_reads(run: Run) -> None:
    releases = {
        "census": {"image": "build", "model": OWN, "traffic": 100},
        "other": {"image": "build", "model": FOREIGN, "traffic": 0},
        "people": {"image": PINNED, "traffic": 0},
    }
    program = run("dev", releases=releases)
    asked = program.recorder
    artifacts = {one["aliases"][0]: one.get("artifactUri") for one in asked.inputs("ModelVersion")}
    assert artifacts == {"census": OWN, "other": FOREIGN, "people": None}
    grants = {one["bucket"]: one["member"] for one in asked.inputs("BucketIAMMember")}
    assert set(grants) == {"my-project-headcount-dev", "my-project-hc-models-dev", "trained-elsewhere"}
    assert asked.one("Rollout")["models"]["census"]["serviceAccount"] in grants["trained-elsewhere"]
    needed = program.request("index:Rollout").dependencies
    assert any(urn.endswith("::serving-reads-trained-elsewhere") for urn in needed)
    assert program.outputs["modelBucket"] == "gs://my-project-hc-models-dev"


def test_models_are_kept(run: Run) -> None:
    bucket = run("dev").recorder.one("Bucket", "models")
    assert "lifecycleRules" not in bucket
    assert bucket["softDeletePolicy"] == {"retentionDurationSeconds": 0}


def test_predictors_may_predict_on_the_endpoint_and_nothing_else(run: Run) -> None:
    analysts = "group:analysts@example.com"
    program = run("dev", predictors=[analysts])
    asked = program.recorder
    role = asked.one("IAMCustomRole")
    assert role["permissions"] == ["aiplatform.endpoints.predict"]
    grant = asked.one("AiEndpointIamMember")
    assert (grant["member"], grant["role"]) == (analysts, f"projects/my-project/roles/{role['roleId']}")
    assert grant["endpoint"] == asked.one("AiEndpoint")["name"]


KEY = "projects/my-project/locations/europe-west4/keyRings/r/cryptoKeys/k"


def test_a_key_encrypts_all_that_is_stored_and_its_agents_may_use_it(run: Run) -> None:
    program = run("dev", kmsKey=KEY)
    asked = program.recorder
    for kind, agent in (
        ("storage/bucket:Bucket", "storage"),
        ("Repository", "artifactregistry"),
        ("index:ModelVersion", "aiplatform"),
        ("AiEndpoint", "aiplatform"),
    ):
        requests = [one for one in program.registered if one.type.endswith(kind)]
        assert requests
        for one in requests:
            assert any(urn.endswith(f"::key-{agent}") for urn in one.dependencies), kind
    assert [one["encryption"] for one in asked.inputs("Bucket")] == [{"defaultKmsKeyName": KEY}] * 2
    assert asked.one("Repository")["kmsKeyName"] == KEY
    assert asked.one("AiEndpoint")["encryptionSpec"] == {"kmsKeyName": KEY}
    assert asked.one("ModelVersion")["encryptionKey"] == KEY
    members = {grant["member"].partition("@")[2] for grant in asked.inputs("CryptoKeyIAMMember")}
    agents = {"gs-project-accounts", "gcp-sa-artifactregistry", "gcp-sa-aiplatform"}
    assert members == {f"{agent}.iam.gserviceaccount.com" for agent in agents}
    assert "CryptoKey" not in json.dumps([a.typ for a in run("dev").recorder.asked])


def test_pictures_of_people_are_not_kept(run: Run) -> None:
    bucket = run("dev", pictureDays=5).recorder.one("Bucket", "bucket")
    assert bucket["versioning"] == {"enabled": False}
    assert bucket["softDeletePolicy"] == {"retentionDurationSeconds": 0}
    assert {"action": {"type": "Delete"}, "condition": {"age": 5, "withState": "LIVE"}} in bucket["lifecycleRules"]
    kept = run("dev", keepDeletedDays=7).recorder.one("Bucket", "bucket")
    assert kept["versioning"] == {"enabled": True}
    old = {"daysSinceNoncurrentTime": 7, "withState": "ARCHIVED"}
    assert {"action": {"type": "Delete"}, "condition": old} in kept["lifecycleRules"]


def test_requests_are_stored_and_images_scanned_only_where_a_setting_says_so(run: Run) -> None:
    plain = run("dev").recorder
    assert "predictRequestResponseLoggingConfig" not in plain.one("AiEndpoint")
    assert plain.one("Repository")["vulnerabilityScanningConfig"] == {"enablementConfig": "DISABLED"}
    table = "bq://my-project.headcount.requests"
    program = run("dev", requestLog={"table": table, "sampling": 0.1}, scanImages=True)
    assert program.recorder.one("AiEndpoint")["predictRequestResponseLoggingConfig"] == {
        "enabled": True, "samplingRate": 0.1, "bigqueryDestination": {"outputUri": table},
    }  # fmt: skip
    assert program.recorder.one("Repository")["vulnerabilityScanningConfig"] == {"enablementConfig": "INHERITED"}
    assert "containerscanning.googleapis.com" in program.waited


def test_the_container_has_time_to_start(run: Run) -> None:
    version = run("dev").recorder.one("ModelVersion")
    assert version["startupProbe"]["path"] == version["healthRoute"]
    assert version["deploymentTimeoutSeconds"] == 1800


def test_images_of_releases_are_tagged_and_pinned_ones_copied_from_where_they_were_proved(run: Run) -> None:
    source = "europe-west4-docker.pkg.dev/my-project/headcount-dev"
    releases = {"main": {"image": PINNED, "traffic": 90}, "next": {"image": "build", "traffic": 10}}
    program = run("dev", releases=releases, imageSource=source)
    images = {i["tag"]: i for i in program.recorder.inputs("index:ReleasedImage")}
    assert set(images) == {"release-main", "release-next"}
    assert {i["repository"] for i in images.values()} == {f"{REPOSITORY}/headcount"}
    assert (images["release-main"]["digest"], images["release-main"]["sources"]) == (PINNED, [f"{source}/headcount"])
    assert (images["release-next"]["digest"], images["release-next"].get("sources", [])) == (DIGEST, [])
    policies = {p["id"]: p for p in program.recorder.one("Repository")["cleanupPolicies"]}
    kept = policies["keep-released"]
    assert kept["action"] == "KEEP"
    assert all(tag.startswith(tuple(kept["condition"]["tagPrefixes"])) for tag in images)


def test_prod_protects_what_serves_and_builds_nothing(run: Run) -> None:
    releases = {"main": {"image": PINNED, "traffic": 100}, "old": {"image": DIGEST, "traffic": 0}}
    program = run("prod", releases=releases, predictors=["user:me@example.com"])
    asked = program.recorder
    assert asked.inputs("docker-build:index:Image") == []
    assert [one["forceDestroy"] for one in asked.inputs("Bucket")] == [False, False]
    assert asked.one("Rollout")["models"]["main"]["minReplicas"] == 2
    protected = {request.name: request.protect for request in program.registered if request.custom}
    assert [name for name, protect in protected.items() if not protect] == ["vertex", "old"], (
        "what does not serve can be removed"
    )


def test_production_s_endpoint_is_replaced_only_where_a_setting_says_so(run: Run) -> None:
    program = run("prod", replaceEndpoint=True, predictors=["user:me@example.com"])
    protected = [program.request(kind).protect for kind in ("AiEndpoint", "index:Rollout", "AiEndpointIamMember")]
    assert protected == [False, False, False]
    assert program.request("storage/bucket:Bucket", "bucket").protect
    assert program.request("storage/bucket:Bucket", "models").protect
    assert program.request("AiEndpoint").replaceOnChanges == ["dedicatedEndpointEnabled"]


def test_releases_have_replicas_of_their_own_and_targets(run: Run) -> None:
    few = {"image": DIGEST, "traffic": 10, "minReplicas": 1, "maxReplicas": 1}
    releases = {"main": {"image": PINNED, "traffic": 90}, "next": few}
    program = run("prod", releases=releases, autoscaling={"requests": 600})
    models = program.recorder.one("Rollout")["models"]
    assert {n: (m["minReplicas"], m["maxReplicas"]) for n, m in models.items()} == {"main": (2, 4), "next": (1, 1)}
    assert [m["autoscalingTargets"] for m in models.values()] == [{"requests": 600}] * 2
    assert "autoscalingTargets" not in run("dev").recorder.one("Rollout")["models"]["main"]


def test_dev_can_be_destroyed(run: Run) -> None:
    program = run("dev")
    assert not any(request.protect for request in program.registered)
    assert [one["forceDestroy"] for one in program.recorder.inputs("Bucket")] == [True, True]


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
    more = run("dev", labels={"owner": "vision", "stack": "other"}).recorder
    for kind in ("Bucket", "Repository", "ModelVersion", "AiEndpoint"):
        for one in asked.inputs(kind):
            assert one["labels"] == {"project": "headcount", "stack": "dev"}
        for one in more.inputs(kind):
            assert one["labels"] == {"project": "headcount", "stack": "dev", "owner": "vision"}


def test_apis_stay_enabled_and_are_waited_for_but_not_in_a_preview(run: Run) -> None:
    program = run("dev")
    services = program.recorder.inputs("projects/service:Service")
    assert {s["service"] for s in services} == {api.service for api in APIS}
    assert all(s["disableOnDestroy"] is False for s in services)
    assert set(program.waited) == {api.service for api in APIS}
    program.waited.clear()
    assert run("dev", preview=True).waited == []


def test_other_readers_may_pull_and_only_that(run: Run) -> None:
    asked = run("dev", imageReaders=["user:me@example.com"]).recorder
    assert {grant["role"] for grant in asked.inputs("RepositoryIamMember")} == {"roles/artifactregistry.reader"}
    assert "user:me@example.com" in {grant["member"] for grant in asked.inputs("RepositoryIamMember")}


def test_exports_can_be_pasted(run: Run) -> None:
    outputs = run("dev").outputs
    endpoint = outputs["url"]
    number = run("dev").recorder.one("AiEndpoint")["name"]
    host = f"https://{number}.europe-west4-42.prediction.vertexai.goog"  # 42 is the project's number
    assert endpoint == f"{host}/v1/projects/my-project/locations/europe-west4/endpoints/{number}"
    shared = run("dev", dedicated=False).outputs["url"]
    assert shared.startswith("https://europe-west4-aiplatform.googleapis.com/v1/projects/my-project/")
    assert outputs["curl"].endswith(f"{endpoint}:rawPredict")
    assert "$(gcloud auth print-access-token)" in outputs["curl"]
    assert outputs["count"] == "headcount count --stack dev picture.jpg"
    assert outputs["images"] == {"main": f"{REPOSITORY}/headcount@{DIGEST}"}
    assert outputs["consoleModels"].startswith("https://console.cloud.google.com/vertex-ai/models/")


def test_up_ends_with_lines_to_paste_and_the_machines_that_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pulumi.log, "info", said.append)
    outputs = run("dev").outputs
    lines = [line.strip() for line in said.pop().splitlines()]
    assert lines == ["Count people with", outputs["count"], outputs["curl"], "Machines: 1 × c3-highcpu-4 for main."]
    run("dev", preview=True)
    assert said == []
    run("dev", paused="true")
    assert said.pop().strip() == "Machines: none, so that nothing is paid for them."
    run("prod", releases={"main": {"image": PINNED, "traffic": 100}, "old": {"image": DIGEST, "traffic": 0}})
    assert said.pop().splitlines()[-1] == "Machines: 2 to 4 × c3-highcpu-4 for main, 2 to 4 × c3-highcpu-4 for old."


def test_on_local_the_same_program_asks_the_sandbox(run: Run) -> None:
    program = run("local")
    assert program.outputs["url"].startswith("http://127.0.0.1:8790/v1/projects/headcount-local/")
    assert "console" not in program.outputs
    kinds = {a.typ for a in program.recorder.asked}
    assert kinds == {a.typ for a in run("dev").recorder.asked}
