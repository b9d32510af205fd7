"""Compiled pipelines in the sandbox's Artifact Registry, by KFP's own client."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kfp.registry
import pytest
import requests
from google.cloud.artifactregistry_v1 import Repository
from google_clients import artifact_registry
from kfp.registry.registry_client import ApiAuth, RegistryClient
from parameter_template import template

from sandbox.testing import RunningSandbox

PACKAGE = "count-people"


@pytest.fixture
def repository(stub_sandbox: RunningSandbox, project: str) -> Iterator[Repository]:
    """A repository for pipelines that is there while the test runs."""
    with artifact_registry(stub_sandbox) as client:
        made = client.create_repository(
            parent=f"projects/{project}/locations/europe-west4",
            repository_id="pipelines",
            repository=Repository(format_=Repository.Format.KFP),
        ).result(timeout=60)
        yield client.get_repository(name=made.name)
        client.delete_repository(name=made.name).result(timeout=60)


@pytest.fixture(params=["address alone", "Google's paths"])
def client(
    request: pytest.FixtureRequest, stub_sandbox: RunningSandbox, repository: Repository, tmp_path: Path
) -> RegistryClient:
    """KFP's client, which knows the address alone, or the paths that it has for Google, on another host."""
    host, config = f"http://{repository.registry_uri}", None
    if request.param == "Google's paths":
        paths = Path(kfp.registry.__file__).parent / "context" / "kfp_pkg_dev.json"
        text = paths.read_text().replace(
            "https://artifactregistry.googleapis.com", f"{stub_sandbox.url}/artifactregistry"
        )
        known = json.loads(text) | {"regex": r".*/kfp/(?P<location>[^/]+)/(?P<project_id>[^/]+)/(?P<repo_id>[^/]+)"}
        config = tmp_path / "context.json"
        config.write_text(json.dumps(known))
    return RegistryClient(host=host, auth=ApiAuth("sandbox"), config_file=config and str(config))


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text(template().replace("name: count-people", f"name: {PACKAGE}"))
    return path


def test_a_pipeline_is_uploaded_found_by_tag_and_by_version_and_downloaded(
    client: RegistryClient, compiled: Path, tmp_path: Path
) -> None:
    name, version = client.upload_pipeline(str(compiled), tags=["v1", "latest"])
    assert (name, version) == (PACKAGE, f"sha256:{hashlib.sha256(compiled.read_bytes()).hexdigest()}")
    for one in ({"tag": "latest"}, {"version": version}):
        to = tmp_path / "downloaded.yaml"
        client.download_pipeline(name, file_name=str(to), **one)
        assert to.read_bytes() == compiled.read_bytes()
    (package,) = client.list_packages()
    assert package == client.get_package(name)
    assert package["name"].endswith(f"/repositories/pipelines/packages/{PACKAGE}")
    (found,) = client.list_versions(name)
    assert found["name"] == client.get_version(name, version)["name"] == f"{package['name']}/versions/{version}"
    assert {tag["name"].rpartition("/")[2] for tag in client.list_tags(name)} == {"v1", "latest"}


def test_a_tag_moves_and_a_version_goes_with_its_last_tag(client: RegistryClient, compiled: Path) -> None:
    name, first = client.upload_pipeline(str(compiled), tags="latest")
    compiled.write_text(compiled.read_text().replace("folder", "directory"))
    _, second = client.upload_pipeline(str(compiled))
    assert first != second
    assert client.get_tag(name, "latest")["version"].endswith(first)
    assert client.update_tag(name, second, "latest")["version"].endswith(second)
    assert client.create_tag(name, first, "old")["version"].endswith(first)
    with pytest.raises(requests.HTTPError, match="409"):
        client.create_tag(name, first, "old")
    with pytest.raises(requests.HTTPError, match="400"):
        client.delete_version(name, first)
    client.delete_tag(name, "old")
    assert client.delete_version(name, first) is True
    assert len(client.list_versions(name)) == 1
    assert client.delete_package(name) is True
    assert client.list_packages() == {}
    with pytest.raises(requests.HTTPError, match="404"):
        client.get_tag(name, "latest")


def test_what_is_no_template_and_what_is_not_there_is_refused(client: RegistryClient, tmp_path: Path) -> None:
    picture = tmp_path / "picture.yaml"
    picture.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(requests.HTTPError, match="400"):
        client.upload_pipeline(str(picture))
    with pytest.raises(requests.HTTPError, match="404"):
        client.download_pipeline("nothing", tag="latest")


def test_a_repository_takes_its_packages_along(
    stub_sandbox: RunningSandbox, repository: Repository, compiled: Path
) -> None:
    client = RegistryClient(host=f"http://{repository.registry_uri}", auth=ApiAuth("sandbox"))
    name, version = client.upload_pipeline(str(compiled))
    again: dict[str, Any] = {"parent": repository.name.partition("/repositories")[0], "repository_id": "pipelines"}
    again["repository"] = Repository(format_=Repository.Format.KFP)
    with artifact_registry(stub_sandbox) as google:
        google.delete_repository(name=repository.name).result(timeout=60)
        with pytest.raises(requests.HTTPError, match="404"):
            client.list_tags(name)
        with pytest.raises(requests.HTTPError, match="404"):
            client.upload_pipeline(str(compiled))
        google.create_repository(**again).result(timeout=60)
        assert client.list_packages() == {}
        with pytest.raises(requests.HTTPError, match="404"):
            client.download_pipeline(name, version=version)


def test_a_token_that_has_expired_is_refused(stub_sandbox: RunningSandbox, repository: Repository) -> None:
    answer = httpx.post(f"http://{repository.registry_uri}", headers={"authorization": "Bearer sandbox-expires-1"})
    assert answer.status_code == 401
