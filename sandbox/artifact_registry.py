"""Artifact Registry: Docker repositories, each a folder of the registry that runs beside the sandbox.

https://cloud.google.com/artifact-registry/docs/reference/rest
A repository's `registryUri` is what images are pushed to. On Google it is LOCATION-docker.pkg.dev/…; here it is
the registry's own address, so whoever takes it from there needs to know nothing of the sandbox.
"""

import asyncio
import random
import re
from typing import Any

from sandbox.cloud import Call, check_labels, update_mask
from sandbox.errors import GoogleError, invalid, not_found
from sandbox.iam import policy_methods
from sandbox.store import JSON, now

REPOSITORY_ID = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
PROJECT_ID = re.compile(r"[a-z][a-z0-9-]{4,28}[a-z0-9]")  # a folder's name
MUTABLE = ("description", "labels", "cleanupPolicies", "cleanupPolicyDryRun", "dockerConfig")


def _find(call: Call) -> JSON:
    repository = call.cloud.store.get("repository", call.name)
    if not repository:
        raise not_found(f"Requested entity was not found: {call.name}.")
    return repository


def folder(name: str) -> str:
    """PROJECT/REPOSITORY of a repository's name: where its images are in the registry."""
    parts = name.split("/")
    return f"{parts[1]}/{parts[5]}"


def _operation(call: Call, location: str, response: JSON, kind: str) -> JSON:
    """An operation that is done when it is next asked for."""
    version = call.method.version
    prefix = "type.googleapis.com/"
    full = kind if "." in kind else f"google.devtools.artifactregistry.{version}.{kind}"
    operation: JSON = {
        "name": f"{location}/operations/{random.randrange(10**18, 9 * 10**18)}",
        "metadata": {"@type": f"{prefix}google.devtools.artifactregistry.{version}.OperationMetadata"},
    }
    done = {**operation, "done": True, "response": {"@type": prefix + full, **response}}
    with call.cloud.store.transaction():
        call.cloud.store.put("artifact-operation", operation["name"], done)
    return operation


async def create(call: Call) -> JSON:
    cloud, repository = call.cloud, dict(call.body)
    wanted = call.query.get("repositoryId", call.query.get("repository_id", ""))
    if not REPOSITORY_ID.fullmatch(wanted):
        raise invalid(f'Invalid repository id "{wanted}": at most 63 of a-z, 0-9 and -, a letter first.')
    if not PROJECT_ID.fullmatch(call.name.split("/")[1]):
        raise invalid(f"Invalid project in {call.name}.")
    if repository.get("format") != "DOCKER":
        raise GoogleError(
            "UNIMPLEMENTED",
            f"The sandbox does not implement {call.method.id} with format {repository.get('format')}.",
        )
    check_labels(repository.get("labels", {}))
    name = f"{call.name}/{wanted}"
    if cloud.store.get("repository", name):
        raise GoogleError("ALREADY_EXISTS", "the repository already exists")
    await asyncio.to_thread(cloud.registry.start)
    time = now()
    repository |= {
        "name": name,
        "createTime": time,
        "updateTime": time,
        "mode": repository.get("mode", "STANDARD_REPOSITORY"),
        "registryUri": f"{cloud.registry.address}/{folder(name)}",
        "vulnerabilityScanningConfig": {"enablementState": "SCANNING_DISABLED"},
    }
    with cloud.store.transaction():
        cloud.store.put("repository", name, repository)
    return _operation(call, call.name.rpartition("/")[0], repository, "Repository")


async def get(call: Call) -> JSON:
    return _find(call)


async def list_(call: Call) -> JSON:
    found = [r for _, r in call.cloud.store.list("repository", call.name + "/")]
    return {"repositories": found} if found else {}


async def patch(call: Call) -> JSON:
    repository = _find(call)
    for path in update_mask(call.query):
        name = path.partition(".")[0]
        if name not in MUTABLE:
            raise invalid(f"Field {path} of a repository can not be updated.")
        repository.pop(name, None)
        if name in call.body:
            repository[name] = call.body[name]
    check_labels(repository.get("labels", {}))
    repository["updateTime"] = now()
    with call.cloud.store.transaction():
        call.cloud.store.put("repository", call.name, repository)
    return repository


async def delete(call: Call) -> JSON:
    cloud = call.cloud
    _find(call)
    with cloud.store.transaction():
        cloud.store.delete("repository", call.name)
        cloud.store.delete("policy", call.name)
    last = not cloud.store.list("repository")
    await asyncio.to_thread(cloud.registry.remove, "" if last else folder(call.name))
    return _operation(call, "/".join(call.name.split("/")[:4]), {}, "google.protobuf.Empty")


async def get_operation(call: Call) -> JSON:
    operation = call.cloud.store.get("artifact-operation", call.name)
    if not operation:
        raise not_found(f"Operation {call.name} is not found.")
    return operation


async def docker_images(call: Call) -> JSON:
    """What is tagged in the repository, by digest."""
    parent = call.name.removesuffix("/dockerImages")
    repository = call.cloud.store.get("repository", parent)
    if not repository:
        raise not_found(f"Requested entity was not found: {parent}.")
    found: dict[str, list[str]] = {}
    for image, tag, digest in await asyncio.to_thread(call.cloud.registry.images, folder(parent)):
        found.setdefault(f"{image}@{digest}", []).append(tag)
    images = [
        {"name": f"{call.name}/{image}", "uri": f"{repository['registryUri']}/{image}", "tags": sorted(tags)}
        for image, tags in sorted(found.items())
    ]
    return {"dockerImages": images} if images else {}


_PREFIX = "artifactregistry.projects.locations"
METHODS: dict[str, Any] = {
    f"{_PREFIX}.repositories.create": create,
    f"{_PREFIX}.repositories.get": get,
    f"{_PREFIX}.repositories.list": list_,
    f"{_PREFIX}.repositories.patch": patch,
    f"{_PREFIX}.repositories.delete": delete,
    f"{_PREFIX}.repositories.dockerImages.list": docker_images,
    f"{_PREFIX}.operations.get": get_operation,
    **policy_methods(f"{_PREFIX}.repositories", _find),
}
