"""Images in real registries, made and looked at with httpx."""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from vertex_plugin import LOCATION, PROJECT

from pulumi_vertex.registry import MEDIA_TYPES
from sandbox.testing import RunningSandbox

INDEX, MANIFEST = MEDIA_TYPES[:2]


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass(frozen=True)
class Remote:
    """An image's path in a real registry, asked with httpx."""

    path: str

    @property
    def http(self) -> httpx.Client:
        host, _, name = self.path.partition("/")
        password = base64.b64encode(b"oauth2accesstoken:sandbox").decode()
        headers = {"authorization": f"Basic {password}", "accept": ", ".join(MEDIA_TYPES)}
        return httpx.Client(base_url=f"http://{host}/v2/{name}/", headers=headers, trust_env=False, timeout=60)

    def blob(self, content: bytes) -> dict[str, Any]:
        with self.http as client:
            upload = client.post("blobs/uploads/").headers["location"]
            done = client.put(f"{upload}&digest={digest_of(content)}", content=content)
        assert done.status_code == 201, done.text
        return {"mediaType": "application/octet-stream", "digest": digest_of(content), "size": len(content)}

    def manifest(self, reference: str, media_type: str, body: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps({"schemaVersion": 2, "mediaType": media_type, **body}).encode()
        with self.http as client:
            answer = client.put(
                f"manifests/{reference or digest_of(content)}", content=content, headers={"content-type": media_type}
            )
        assert answer.status_code == 201, answer.text
        return {"mediaType": media_type, "digest": digest_of(content), "size": len(content)}

    def image(self, tag: str = "", layers: tuple[int, ...] = (10, 3 * 2**20)) -> dict[str, Any]:
        """An image with layers of these sizes, in bytes."""
        made = [self.blob(uuid.uuid4().bytes[:1] * size + uuid.uuid4().bytes) for size in layers]
        config = self.blob(uuid.uuid4().bytes) | {"mediaType": "application/vnd.oci.image.config.v1+json"}
        return self.manifest(tag, MANIFEST, {"config": config, "layers": made})

    def index(self, tag: str) -> str:
        """An index as buildx pushes one: an image and its attestation. Returns its digest."""
        image = self.image() | {"platform": {"os": "linux", "architecture": "amd64"}}
        said = {"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": image["digest"]}
        unknown = {"os": "unknown", "architecture": "unknown"}
        attested = self.image(layers=(100,)) | {"platform": unknown, "annotations": said}
        return str(self.manifest(tag, INDEX, {"manifests": [image, attested]})["digest"])

    def tags(self) -> dict[str, str]:
        """The digest of each tag."""
        with self.http as client:
            names = client.get("tags/list").json().get("tags") or []
            return {name: client.head(f"manifests/{name}").headers["docker-content-digest"] for name in names}

    def untag(self, tag: str) -> None:
        with self.http as client:
            assert client.delete(f"manifests/{tag}").status_code == 202

    def check(self, digest: str) -> None:
        """Everything below a digest is there, byte by byte."""
        with self.http as client:
            answer = client.get(f"manifests/{digest}")
            assert answer.status_code == 200, answer.text
            assert digest_of(answer.content) == digest
            body = answer.json()
            for part in body.get("manifests", []):
                self.check(part["digest"])
            for blob in [*([body["config"]] if "config" in body else []), *body.get("layers", [])]:
                assert digest_of(client.get(f"blobs/{blob['digest']}").content) == blob["digest"]


class Repositories:
    """Artifact Registry of a sandbox: paths in repositories that are made when they are first asked for."""

    def __init__(self, sandbox: RunningSandbox) -> None:
        self.sandbox = sandbox
        self._api = f"{sandbox.url}/artifactregistry/v1/projects/{PROJECT}/locations/{LOCATION}/repositories"
        self.create("kept")  # the registry stops with its last repository

    def create(self, name: str) -> Remote:
        httpx.post(self._api, params={"repositoryId": name}, json={"format": "DOCKER"}, trust_env=False)
        uri = httpx.get(f"{self._api}/{name}", trust_env=False).json()["registryUri"]
        return Remote(f"{uri}/people")

    def new(self) -> Remote:
        return self.create(f"r{uuid.uuid4().hex[:8]}")

    def need_to_remove_tags(self) -> None:
        """Skips the test where the registry is older than 3.0, which cannot remove a tag."""
        remote = self.create("kept")
        remote.image("1", layers=())
        with remote.http as client:
            if client.delete("manifests/1").status_code == 400:
                pytest.skip("needs a registry that removes tags: the reference registry from 3.0 on")

    def delete(self, remote: Remote) -> None:
        answer = httpx.delete(f"{self._api}/{remote.path.split('/')[2]}", trust_env=False, timeout=60)
        assert answer.status_code == 200, answer.text
