"""The whole program without Pulumi's engine: each resource is made by Google's own client, or by the provider's
protocol, in the order in which the program asks for it, against the sandbox. It ends in the same count.
"""

import asyncio
import contextlib
import json
import os
import re
import runpy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import google.cloud.storage as storage
import httpx
import images
import pulumi
import pytest
import yaml
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform_v1, artifactregistry_v1
from googleapiclient import discovery
from helpers import ROOT, free_port
from images import forget_images, write_tiny_sources
from pulumi.runtime.proto import provider_pb2
from vertex_plugin import Plugin, struct, unstruct

from infra import image
from infra.apis import APIS
from sandbox.testing import RunningSandbox

PROJECT, REGION = "headcount-local", "europe-west4"
LOCATION = f"projects/{PROJECT}/locations/{REGION}"
ANYBODY = AnonymousCredentials()  # type: ignore[no-untyped-call]


pytestmark = [pytest.mark.slow, pytest.mark.needs("docker", "registry", "build")]


class Maker(pulumi.runtime.Mocks):
    """Creates the resources that the program registers."""

    def __init__(self, url: str, plugin: Plugin) -> None:
        self.url, self.plugin = url, plugin
        self.made: list[str] = []
        self._lock = threading.Lock()
        self.clients = contextlib.ExitStack()
        self.buckets = storage.Client(PROJECT, ANYBODY, client_options={"api_endpoint": url})
        self.clients.callback(self.buckets.close)

    def new_resource(self, args: pulumi.runtime.MockResourceArgs) -> tuple[str, dict[str, Any]]:
        kind = args.typ.rpartition(":")[2]
        make = getattr(self, kind, None)
        if make is None:  # components and providers
            return f"{args.name}_id", dict(args.inputs)
        with self._lock:
            self.made.append(kind)
            id_, outputs = make(plain(args.inputs), args)
            return id_, {**args.inputs, **outputs}

    def call(self, args: pulumi.runtime.MockCallArgs) -> tuple[dict[Any, Any], list[tuple[str, str]]]:
        return {"accessToken": "sandbox"}, []

    def _service(self, name: str, version: str) -> Any:
        options = ClientOptions(api_endpoint=f"{self.url}/{name}/")
        service = discovery.build(name, version, credentials=ANYBODY, client_options=options, static_discovery=True)
        self.clients.callback(service.close)
        return service

    def Service(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        name = f"projects/{PROJECT}/services/{inputs['service']}"
        self._service("serviceusage", "v1").services().enable(name=name, body={}).execute()
        return f"{PROJECT}/{inputs['service']}", {}

    def Bucket(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        bucket = self.buckets.bucket(inputs["name"])
        bucket.labels = inputs["labels"]
        bucket.versioning_enabled = inputs["versioning"]["enabled"]
        bucket.iam_configuration.uniform_bucket_level_access_enabled = inputs["uniformBucketLevelAccess"]
        bucket.iam_configuration.public_access_prevention = inputs["publicAccessPrevention"]
        bucket.create(location=inputs["location"])
        return inputs["name"], {"url": f"gs://{inputs['name']}"}

    def Repository(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        client = artifactregistry_v1.ArtifactRegistryClient(
            credentials=ANYBODY,
            transport="rest",
            client_options=ClientOptions(api_endpoint=f"{self.url}/artifactregistry"),
        )
        self.clients.enter_context(client)
        wanted = artifactregistry_v1.Repository(
            format_=getattr(artifactregistry_v1.Repository.Format, inputs["format"]), labels=inputs["labels"]
        )
        operation = client.create_repository(parent=LOCATION, repository_id=inputs["repositoryId"], repository=wanted)
        name = operation.result(timeout=60).name
        made = client.get_repository(name=name)
        return name, {"registryUri": made.registry_uri, "name": inputs["repositoryId"]}

    def ServiceIdentity(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        parent = f"projects/{PROJECT}/services/{inputs['service']}"
        answer = httpx.post(f"{self.url}/serviceusage/v1beta1/{parent}:generateServiceIdentity", json={}).json()
        email = answer["response"]["email"]
        return parent, {"email": email, "member": f"serviceAccount:{email}"}

    def RepositoryIamMember(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        name = f"{LOCATION}/repositories/{inputs['repository']}"
        binding = {"role": inputs["role"], "members": [inputs["member"]]}
        repositories = self._service("artifactregistry", "v1").projects().locations().repositories()
        repositories.setIamPolicy(resource=name, body={"policy": {"bindings": [binding]}}).execute()
        return name, {}

    def Account(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        body = {"accountId": inputs["accountId"], "serviceAccount": {"displayName": inputs["displayName"]}}
        accounts = self._service("iam", "v1").projects().serviceAccounts()
        made = accounts.create(name=f"projects/{PROJECT}", body=body).execute()
        return made["name"], {"email": made["email"], "member": f"serviceAccount:{made['email']}"}

    def BucketIAMMember(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        bucket = self.buckets.bucket(inputs["bucket"])
        policy = bucket.get_iam_policy(requested_policy_version=3)
        policy.bindings.append({"role": inputs["role"], "members": {inputs["member"]}})
        bucket.set_iam_policy(policy)
        return f"{inputs['bucket']}/{inputs['role']}/{inputs['member']}", {}

    def Image(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        if args.typ != "docker-build:index:Image":  # the component of that name
            self.made.pop()
            return f"{args.name}_id", {}
        tag = inputs["tags"][0]
        images.build(Path(inputs["context"]["location"]), tag, **inputs["buildArgs"])
        login = {"username": inputs["registries"][0]["username"], "password": inputs["registries"][0]["password"]}
        with contextlib.closing(docker.from_env(version="auto", timeout=120)) as engine:
            pushed = engine.images.push(tag, auth_config=login)
        digest = re.findall("sha256:[0-9a-f]{64}", pushed)[-1]
        images.docker("rmi", tag)
        return digest, {"digest": digest, "ref": f"{tag}@{digest}"}

    def AiEndpoint(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        client = aiplatform_v1.EndpointServiceClient(
            credentials=ANYBODY, transport="rest", client_options=ClientOptions(api_endpoint=self.url)
        )
        self.clients.enter_context(client)
        wanted = aiplatform_v1.Endpoint(
            display_name=inputs["displayName"],
            labels=inputs["labels"],
            dedicated_endpoint_enabled=inputs["dedicatedEndpointEnabled"],
        )
        client.create_endpoint(parent=LOCATION, endpoint=wanted, endpoint_id=inputs["name"]).result(timeout=60)
        name = f"{LOCATION}/endpoints/{inputs['name']}"
        return name, {"dedicatedEndpointDns": client.get_endpoint(name=name).dedicated_endpoint_dns}

    def ModelVersion(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        return self._vertex("ModelVersion", args.name, inputs)

    def ReleasedImage(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        return self._vertex("ReleasedImage", args.name, inputs)

    def Rollout(self, inputs: dict[str, Any], args: Any) -> tuple[str, dict[str, Any]]:  # noqa: N802
        return self._vertex("Rollout", args.name, inputs)

    def _vertex(self, kind: str, name: str, inputs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """As the engine does: Check, then Create with Check's answer."""
        urn = f"urn:pulumi:local::headcount::vertex:index:{kind}::{name}"
        checked = self.plugin.call("Check", provider_pb2.CheckRequest(urn=urn, news=struct(inputs)))
        assert not checked.failures, checked.failures
        made = self.plugin.call("Create", provider_pb2.CreateRequest(urn=urn, properties=checked.inputs))
        return made.id, unstruct(made.properties)


def plain(value: Any) -> Any:
    """Without the wrappings of secrets."""
    if isinstance(value, dict):
        return (
            plain(value["value"])
            if pulumi.runtime.rpc._special_sig_key in value
            else {k: plain(v) for k, v in value.items()}
        )
    return [plain(v) for v in value] if isinstance(value, list) else value


@pytest.fixture
def sandbox() -> Iterator[RunningSandbox]:
    port = free_port()
    with RunningSandbox("--registry-port", str(port), "--api-delay", "0.5", runner="docker") as running:
        yield running
        assert running.violations() == []
    forget_images(f"127.0.0.1:{port}")


def test_the_same_resources_in_the_same_order_end_in_the_same_count(
    sandbox: RunningSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_sources(tmp_path)
    monkeypatch.setattr(image, "ROOT", tmp_path)
    monkeypatch.setattr(image, "torch_source", lambda root, say: "index")
    text = (ROOT / "Pulumi.local.yaml").read_text().replace(":8790", f":{sandbox.port}")
    config = {k: v if isinstance(v, str) else json.dumps(v) for k, v in yaml.safe_load(text)["config"].items()}
    monkeypatch.setenv("PULUMI_CONFIG", json.dumps(config))
    outputs: dict[str, Any] = {}
    monkeypatch.setattr(pulumi, "export", lambda name, value: outputs.__setitem__(name, value))
    asyncio.set_event_loop(asyncio.new_event_loop())
    settings = {"project": PROJECT, "location": REGION, "accessToken": "sandbox"}
    with Plugin(sandbox.url, settings=settings) as plugin, contextlib.ExitStack() as clients:
        maker = Maker(sandbox.url, plugin)
        clients.enter_context(maker.clients)
        pulumi.runtime.set_mocks(maker, project="headcount", stack="local", preview=False)

        @pulumi.runtime.test  # type: ignore[untyped-decorator]
        def whole() -> pulumi.Output[Any]:
            runpy.run_module("infra.__main__")
            return pulumi.Output.all(**outputs).apply(lambda known: outputs.update(known))

        whole()
    order = maker.made
    once = [
        *["Bucket", "BucketIAMMember"] * 2, "Repository", "RepositoryIamMember", "ServiceIdentity", "Account", "Image",
        "ReleasedImage", "ModelVersion", "AiEndpoint", "Rollout",
    ]  # fmt: skip
    assert sorted(order) == sorted([*once, *("Service" for _ in APIS)])
    for first, then in (
        ("Repository", "Image"),
        ("Image", "ReleasedImage"),
        ("ReleasedImage", "ModelVersion"),
        ("ModelVersion", "Rollout"),
        ("AiEndpoint", "Rollout"),
        ("BucketIAMMember", "Rollout"),
    ):
        assert order.index(first) < order.index(then)
    answer = httpx.post(f"{outputs['url']}:rawPredict", content=b"\xff\xd8picture", timeout=30)
    assert answer.json().get("count") == 4, answer.text
    assert os.fspath(tmp_path) not in json.dumps(outputs, default=str)
