"""Google's own client libraries, unchanged, pointed at a sandbox; each is closed when its block ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials, Credentials
from google.cloud import storage  # type: ignore[attr-defined]
from google.cloud.artifactregistry_v1 import ArtifactRegistryClient
from googleapiclient import discovery

from sandbox.testing import RunningSandbox


def anonymous() -> Any:
    return AnonymousCredentials()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def service(sandbox: RunningSandbox, name: str, version: str, credentials: Credentials | None = None) -> Iterator[Any]:
    """The client that takes every address and field from a discovery document."""
    with discovery.build(
        name,
        version,
        credentials=credentials or anonymous(),
        client_options=ClientOptions(api_endpoint=f"{sandbox.url}/{name}/"),
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
