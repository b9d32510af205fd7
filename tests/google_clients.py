"""Google's own client libraries, unchanged, pointed at a sandbox; each is closed when its block ends."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import google.cloud.storage as storage
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials, Credentials
from google.cloud.artifactregistry_v1 import ArtifactRegistryClient
from googleapiclient import discovery

from sandbox.testing import RunningSandbox


def anonymous() -> Any:
    return AnonymousCredentials()  # type: ignore[no-untyped-call]


def service_account_key(sandbox: RunningSandbox, email: str = "deployer@a-project.iam.gserviceaccount.com") -> str:
    """A service account's key as JSON. The sandbox issues its access tokens, which end after --token-lifetime."""
    private = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key = {"type": "service_account", "client_email": email, "private_key_id": "1", "client_id": "1"}
    return json.dumps(key | {"private_key": private.decode(), "token_uri": f"{sandbox.url}/oauth2/token"})


@contextlib.contextmanager
def service(sandbox: RunningSandbox, name: str, version: str, credentials: Credentials | None = None) -> Iterator[Any]:
    """The client that takes every address and field from a discovery document."""
    prefix = "" if name == "aiplatform" else f"{name}/"  # on one host, every API but Vertex AI's has its name in front
    with discovery.build(
        name,
        version,
        credentials=credentials or anonymous(),
        client_options=ClientOptions(api_endpoint=f"{sandbox.url}/{prefix}"),
        static_discovery=True,
    ) as client:
        yield client


@contextlib.contextmanager
def storage_client(sandbox: RunningSandbox, project: str) -> Iterator[storage.Client]:
    client = storage.Client(project, anonymous(), client_options={"api_endpoint": sandbox.url})
    yield client
    client.close()


@contextlib.contextmanager
def artifact_registry(sandbox: RunningSandbox) -> Iterator[ArtifactRegistryClient]:
    options = ClientOptions(api_endpoint=f"{sandbox.url}/artifactregistry")
    with ArtifactRegistryClient(credentials=anonymous(), transport="rest", client_options=options) as client:
        yield client
