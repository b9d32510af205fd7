"""Artifact Registry in the sandbox: its API, asked by Google's own client, and its Docker registry with its tokens."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import re
import shutil
import ssl
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import images
import pytest
import trustme
from google.api_core import exceptions
from google.cloud.artifactregistry_v1 import ArtifactRegistryClient, Repository
from google.iam.v1 import policy_pb2  # type: ignore[import-untyped]
from google_clients import artifact_registry

from sandbox.artifact_registry import registry as registries
from sandbox.docker_runner import DockerRunner
from sandbox.testing import RunningSandbox

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
KEY = "projects/p/locations/europe-west4/keyRings/ring/cryptoKeys/key"


@pytest.fixture
def client(stub_sandbox: RunningSandbox) -> Iterator[ArtifactRegistryClient]:
    with artifact_registry(stub_sandbox) as client:
        yield client


@pytest.fixture
def rest(stub_sandbox: RunningSandbox) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{stub_sandbox.url}/artifactregistry/v1/", trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture
def parent(project: str) -> str:
    return f"projects/{project}/locations/europe-west4"


@pytest.fixture
def repository(client: ArtifactRegistryClient, parent: str) -> Iterator[Repository]:
    """A repository that is there while the test runs."""
    made = create(client, parent, "images")
    yield made
    client.delete_repository(name=made.name).result(timeout=60)


def create(client: ArtifactRegistryClient, parent: str, name: str, **fields: Any) -> Repository:
    wanted = Repository(format_=Repository.Format.DOCKER, **fields)
    operation = client.create_repository(parent=parent, repository_id=name, repository=wanted)
    made: Repository = operation.result(timeout=60)
    return client.get_repository(name=made.name)


def basic(token: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"oauth2accesstoken:{token}".encode()).decode()}


def push(client: httpx.Client, name: str, tag: str) -> str:
    """Pushes an image without layers, by the distribution protocol; returns its digest."""
    config = b"{}"
    digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    upload = client.post(f"{name}/blobs/uploads/").headers["location"]
    assert client.put(f"{upload}&digest={digest}", content=config).status_code == 201
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": len(config)},
        "layers": [],
    }
    answer = client.put(f"{name}/manifests/{tag}", content=json.dumps(manifest), headers={"content-type": MANIFEST})
    assert answer.status_code == 201, answer.text
    return str(answer.headers["docker-content-digest"])


# -------------------------------------------------------------------------------------- repositories


@pytest.mark.needs("registry")
def test_a_repository_is_where_images_can_be_pushed_and_leaves_nothing(tmp_path: Path, parent: str) -> None:
    running = RunningSandbox("--registry-port", "0", state=tmp_path / "state")
    with running, artifact_registry(running) as client:
        made = create(client, parent, "images", labels={"stack": "dev"})
        assert made.name == f"{parent}/repositories/images"
        assert [r.name for r in client.list_repositories(parent=parent)] == [made.name]
        address = made.registry_uri.partition("/")[0]
        with httpx.Client(base_url=f"http://{address}/v2/", headers=basic("sandbox"), trust_env=False) as pushes:
            digest = push(pushes, f"{made.registry_uri.removeprefix(address + '/')}/headcount", "latest")
            (found,) = client.list_docker_images(parent=made.name)
            assert found.uri == f"{made.registry_uri}/headcount@{digest}"
            assert found.tags == ["latest"]

            client.delete_repository(name=made.name).result(timeout=60)
            with pytest.raises(exceptions.NotFound):
                client.get_repository(name=made.name)
            with pytest.raises(httpx.ConnectError):
                pushes.get("")
        assert not (running.state / "registry").exists()
        assert running.violations() == []


@pytest.mark.needs("registry")
def test_a_new_repository_and_its_operation_are_as_google_answers_them(rest: httpx.Client, parent: str) -> None:
    body = {"format": "DOCKER", "mode": "MODE_UNSPECIFIED", "kmsKeyName": KEY}
    started = rest.post(f"{parent}/repositories", params={"repositoryId": "images"}, json=body).json()
    assert re.fullmatch(rf"{parent}/operations/[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}", started["name"])
    assert set(started) == {"name", "metadata"}
    assert set(started["metadata"]) == {"@type"}
    ended = rest.get(started["name"]).json()
    name = f"{parent}/repositories/images"
    shown = rest.get(name).json()
    assert {k: v for k, v in ended["response"].items() if k != "@type"} == {
        k: v for k, v in shown.items() if k not in ("createTime", "updateTime", "registryUri")
    }
    assert (shown["mode"], shown["kmsKeyName"], shown["satisfiesPzi"]) == ("STANDARD_REPOSITORY", KEY, True)
    assert shown["vulnerabilityScanningConfig"] == {
        "enablementState": "SCANNING_DISABLED",
        "enablementStateReason": "API containerscanning.googleapis.com is not enabled.",
        "lastEnableTime": shown["createTime"],
    }
    assert rest.delete(name).status_code == 200
    gone = rest.get(name)
    assert gone.status_code == 404
    assert gone.json() == {"error": {"code": 404, "message": "Requested entity was not found.", "status": "NOT_FOUND"}}


@pytest.mark.needs("registry")
def test_images_are_scanned_where_the_scanner_is_enabled_and_not_declined(
    stub_sandbox: RunningSandbox, rest: httpx.Client, client: ArtifactRegistryClient, repository: Repository
) -> None:
    project = repository.name.split("/")[1]
    service = f"projects/{project}/services/containerscanning.googleapis.com"
    httpx.post(f"{stub_sandbox.url}/serviceusage/v1/{service}:enable", json={}, trust_env=False).raise_for_status()
    config = Repository.VulnerabilityScanningConfig
    assert client.get_repository(name=repository.name).vulnerability_scanning_config.enablement_state == (
        config.EnablementState.SCANNING_ACTIVE
    )
    declined = {"vulnerabilityScanningConfig": {"enablementConfig": "DISABLED"}}
    query = {"updateMask": "vulnerabilityScanningConfig"}
    shown = rest.patch(repository.name, params=query, json=declined).json()["vulnerabilityScanningConfig"]
    assert (shown["enablementConfig"], shown["enablementState"]) == ("DISABLED", "SCANNING_DISABLED")


@pytest.mark.needs("registry")
def test_a_repository_has_a_policy_of_its_own(client: ArtifactRegistryClient, repository: Repository) -> None:
    request: Any = {"resource": repository.name}
    policy = client.get_iam_policy(request=request)
    assert (policy.version, list(policy.bindings)) == (0, [])
    reader = "serviceAccount:service-123456789012@gcp-sa-aiplatform.iam.gserviceaccount.com"
    policy.bindings.append(policy_pb2.Binding(role="roles/artifactregistry.reader", members=[reader]))
    client.set_iam_policy(request={**request, "policy": policy})
    held = client.get_iam_policy(request=request)
    assert held.version == 1
    assert [(b.role, list(b.members)) for b in held.bindings] == [("roles/artifactregistry.reader", [reader])]
    with pytest.raises(exceptions.Conflict):
        client.set_iam_policy(request={**request, "policy": policy})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"format": "PYTHON"}, "repositories.create with format PYTHON"),
        ({"format": "DOCKER", "mode": "VIRTUAL_REPOSITORY"}, "repositories.create with mode VIRTUAL_REPOSITORY"),
    ],
)
def test_other_kinds_of_repositories_are_not_pretended(rest: httpx.Client, parent: str, body: Any, says: str) -> None:
    answer = rest.post(f"{parent}/repositories", params={"repositoryId": "x"}, json=body)
    assert answer.status_code == 501
    assert says in answer.json()["error"]["message"]


# ------------------------------------------------------------------------------------------- tokens


@pytest.fixture
def expiring(tmp_path: Path, parent: str) -> Iterator[tuple[RunningSandbox, str]]:
    """A sandbox whose clock a test may put forward, and the address of a repository in it."""
    options = ("--registry-port", "0", "--token-lifetime", "3600")
    with RunningSandbox(*options, state=tmp_path / "state") as running, artifact_registry(running) as client:
        made = create(client, parent, "images")
        yield running, made.registry_uri
        client.delete_repository(name=made.name).result(timeout=60)


def issue(sandbox: RunningSandbox) -> str:
    """A new access token, as an OAuth client gets it."""
    form = {"grant_type": "refresh_token", "refresh_token": "any"}
    answer = httpx.post(f"{sandbox.url}/oauth2/token", data=form, trust_env=False).json()
    assert (answer["expires_in"], answer["token_type"]) == (3600, "Bearer")
    return str(answer["access_token"])


@pytest.mark.needs("registry")
def test_the_registry_takes_a_token_until_it_expires(expiring: tuple[RunningSandbox, str]) -> None:
    sandbox, uri = expiring
    address, _, folder = uri.partition("/")
    token = issue(sandbox)
    with httpx.Client(base_url=f"http://{address}/v2/", trust_env=False) as client:
        asked = client.get("")
        assert asked.status_code == 401
        realm = re.fullmatch(r'Bearer realm="(.*)",service="(.*)"', asked.headers["www-authenticate"])
        assert realm
        assert realm[2] == address
        assert client.get(realm[1]).status_code == 403  # nobody is anonymous
        assert client.post(realm[1]).status_code == 404  # after which BuildKit asks by GET
        assert client.get(realm[1], headers=basic("wrong")).status_code == 401
        bearer = client.get(realm[1], headers=basic(token)).json()["token"]
        client.headers["authorization"] = f"Bearer {bearer}"
        digest = push(client, f"{folder}/headcount", "latest")

        manifest, accept = f"{folder}/headcount/manifests/{digest}", {"accept": MANIFEST}
        sandbox.advance(1800)
        assert client.head(manifest, headers=accept).status_code == 200
        sandbox.advance(1801)
        assert client.head(manifest, headers=accept).status_code == 401
        assert client.get(realm[1], headers=basic(token)).status_code == 401
        for later in (issue(sandbox), "sandbox"):
            assert client.head(manifest, headers=accept | basic(later)).status_code == 200


@pytest.mark.needs("registry")
def test_the_registry_speaks_https_too_where_it_has_a_certificate(tmp_path: Path, parent: str) -> None:
    authority, pem = trustme.CA(), tmp_path / "registry.pem"
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(pem)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    options = ("--registry-port", "0", "--registry-certificate", str(pem))
    with RunningSandbox(*options, state=tmp_path / "state") as running, artifact_registry(running) as client:
        made = create(client, parent, "images")
        address, _, folder = made.registry_uri.partition("/")
        for scheme in ("http", "https"):
            with httpx.Client(base_url=f"{scheme}://{address}/v2/", verify=trusting, trust_env=False) as one:
                assert f'realm="{scheme}://{address}/v2/token"' in one.get("").headers["www-authenticate"]
                one.headers.update(basic("sandbox"))
                push(one, f"{folder}/{scheme}", "latest")
        assert len(list(client.list_docker_images(parent=made.name))) == 2
        client.delete_repository(name=made.name).result(timeout=60)


@pytest.mark.needs("registry", "crane")
def test_crane_pushes_copies_and_lists_until_its_token_expires(
    expiring: tuple[RunningSandbox, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox, uri = expiring
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    layer = tmp_path / "layer.tar"
    layer.write_bytes(tar({"hello": uuid.uuid4().bytes}))

    def crane(*arguments: str) -> str:
        done = subprocess.run(["crane", *arguments], capture_output=True, text=True, timeout=120)
        return done.stdout.strip() if not done.returncode else f"failed: {done.stderr}"

    assert "DENIED" in crane("append", "-f", str(layer), "-t", f"{uri}/one:1")
    crane("auth", "login", uri.partition("/")[0], "-u", "oauth2accesstoken", "-p", issue(sandbox))
    assert crane("append", "-f", str(layer), "-t", f"{uri}/one:1").startswith(f"{uri}/one@sha256:")
    crane("copy", f"{uri}/one:1", f"{uri}/two:1")
    assert crane("digest", f"{uri}/two:1") == crane("digest", f"{uri}/one:1")
    assert crane("ls", f"{uri}/two") == "1"
    crane("pull", f"{uri}/two:1", str(tmp_path / "pulled.tar"))
    assert crane("validate", "--remote", f"{uri}/two:1").startswith("PASS")
    sandbox.advance(3601)
    assert "UNAUTHORIZED: The access token has expired" in crane("digest", f"{uri}/one:1")


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.needs("docker", "registry")
def test_docker_pushes_with_a_token_and_the_sandbox_pulls_with_its_own(
    expiring: tuple[RunningSandbox, str], docker_engine: docker.DockerClient
) -> None:
    sandbox, uri = expiring
    name = f"{uri}/headcount"
    login = {"username": "oauth2accesstoken", "password": issue(sandbox)}
    content = tar({"large": b"x" * 3 * 2**20, "salt": uuid.uuid4().bytes})
    docker_engine.api.import_image_from_data(content, repository=name, tag="1")
    try:
        refused = docker_engine.images.push(name, tag="1", auth_config={**login, "password": "wrong"})
        assert "error" in refused
        pushed = docker_engine.images.push(name, tag="1", auth_config=login)
        digest = re.search(r"sha256:[0-9a-f]{64}", pushed.splitlines()[-1])
        assert digest, pushed
        sandbox.advance(3601)
        assert "error" in docker_engine.images.push(name, tag="1", auth_config=login)
        docker_engine.images.remove(f"{name}:1")

        async def pull() -> str:
            runner = DockerRunner(sandbox.port)
            await runner.fetch(f"{name}@{digest[0]}")
            resolved = await runner.resolve(f"{name}:1")
            await runner.close()
            return resolved

        assert asyncio.run(pull()) == f"{name}@{digest[0]}"
    finally:
        images.forget_images(uri.partition("/")[0])


@pytest.mark.slow
@pytest.mark.needs("docker", "registry_image")
@pytest.mark.parametrize("gated", [False, True])
def test_without_the_program_the_registry_is_a_container_that_a_kill_does_not_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docker_engine: docker.DockerClient, gated: bool
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    state, project = uuid.uuid4().hex[:12], "my-project"
    first = registries.RegistryServer(tmp_path, 0, state)
    first.start()
    with httpx.Client(base_url=f"http://{first.address}/v2/", trust_env=False) as client:
        for repository in ("one", "two"):
            push(client, f"{project}/{repository}/headcount", "latest")

    second = registries.RegistryServer(tmp_path, 0, state, gated=gated)  # what a killed sandbox's successor does
    second.start()
    assert httpx.get(f"http://{second.address}/v2/", trust_env=False).status_code == (401 if gated else 200)
    assert len(second.images(f"{project}/two")) == 1
    second.remove(f"{project}/one")
    assert second.images(f"{project}/one") == []
    assert len(second.images(f"{project}/two")) == 1
    second.remove("")
    names = docker_engine.volumes.list(), docker_engine.containers.list(all=True)
    assert state not in "".join(str(item.name) for items in names for item in items)
