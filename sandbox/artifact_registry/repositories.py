"""Artifact Registry's repositories. One for Docker images is a folder of the registry that runs beside the sandbox. The
packages of one for compiled pipelines are in packages.py.

https://cloud.google.com/artifact-registry/docs/reference/rest
A repository's `registryUri` is where images and pipelines are sent to. On Google it is LOCATION-docker.pkg.dev/… or
LOCATION-kfp.pkg.dev/…; here it is an address of this machine, so that a caller who reads it there needs no setting for
the sandbox.
"""

import asyncio
import re
import uuid
from typing import Any

from sandbox import clock
from sandbox.artifact_registry import packages
from sandbox.context import Call
from sandbox.conventions import KMS_KEY, check_labels, cut, update_mask
from sandbox.errors import GoogleError, invalid, not_found, unimplemented
from sandbox.iam import policy_methods
from sandbox.store import JSON

REPOSITORY_ID = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
PROJECT_ID = re.compile(r"[a-z][a-z0-9-]{4,28}[a-z0-9]")  # a folder's name
DOCKER = "DOCKER"
STANDARD = "STANDARD_REPOSITORY"
MUTABLE = (
    "description",
    "labels",
    "cleanupPolicies",
    "cleanupPolicyDryRun",
    "dockerConfig",
    "vulnerabilityScanningConfig",
)
ABSENT_FROM_OPERATIONS = ("createTime", "updateTime", "registryUri")
SCANNER = "containerscanning.googleapis.com"


def _find(call: Call, name: str = "") -> JSON:
    """The repository of a name, which is the path's where none is given. Raises NOT_FOUND."""
    repository = call.cloud.store.get("repository", name or call.name)
    if not repository:
        raise not_found("Requested entity was not found.")
    return repository


def folder(name: str) -> str:
    """PROJECT/REPOSITORY of a repository's name: where its images are in the registry."""
    parts = name.split("/")
    return f"{parts[1]}/{parts[5]}"


def _shown(call: Call, repository: JSON) -> JSON:
    """The repository with its changing fields: its address, and whether its images are scanned."""
    project, location = (repository["name"].split("/")[n] for n in (1, 3))
    wanted = repository.get("vulnerabilityScanningConfig", {}).get("enablementConfig")
    scanner = call.cloud.store.get("service", f"{project}/{SCANNER}")
    scanning: JSON = {"enablementState": "SCANNING_DISABLED", "lastEnableTime": repository["createTime"]}
    if wanted:
        scanning["enablementConfig"] = wanted
    if scanner is None:
        scanning["enablementStateReason"] = f"API {SCANNER} is not enabled."
    elif wanted != "DISABLED":
        scanning |= {"enablementState": "SCANNING_ACTIVE", "lastEnableTime": clock.rfc3339(scanner["time"])}
    return {
        **repository,
        "registryUri": f"127.0.0.1:{call.cloud.settings.port}/{packages.address(repository['name'])}"
        if repository["format"] == packages.FORMAT
        else f"{call.cloud.registry.address}/{folder(repository['name'])}",
        "vulnerabilityScanningConfig": scanning,
        **({"satisfiesPzi": True} if "-" in location else {}),
    }


def _operation(call: Call, location: str, response: JSON, kind: str) -> JSON:
    """An operation that is done when it is next asked for."""
    version = call.method.version
    prefix = "type.googleapis.com/"
    full = kind if "." in kind else f"google.devtools.artifactregistry.{version}.{kind}"
    operation: JSON = {
        "name": f"{location}/operations/{uuid.uuid4()}",
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
    if not PROJECT_ID.fullmatch(call.project):
        raise invalid(f"Invalid project in {call.name}.")
    if repository.get("mode") in (None, "MODE_UNSPECIFIED"):
        repository["mode"] = STANDARD
    for field, known in (("format", (DOCKER, packages.FORMAT)), ("mode", (STANDARD,))):
        if repository.get(field) not in known:
            raise unimplemented(f"{call.method.id} with {field} {repository.get(field)}")
    if (key := repository.get("kmsKeyName", "")) and not KMS_KEY.fullmatch(key):
        raise invalid(f"Invalid kms_key_name {key}: projects/P/locations/L/keyRings/R/cryptoKeys/K.")
    check_labels(repository.get("labels", {}))
    name = f"{call.name}/{wanted}"
    if cloud.store.get("repository", name):
        raise GoogleError("ALREADY_EXISTS", "the repository already exists")
    if repository["format"] == DOCKER:
        await asyncio.to_thread(cloud.registry.start)
    now = clock.now()
    repository |= {"name": name, "createTime": now, "updateTime": now}
    with cloud.store.transaction():
        cloud.store.put("repository", name, repository)
    response = {k: v for k, v in _shown(call, repository).items() if k not in ABSENT_FROM_OPERATIONS}
    return _operation(call, call.location, response, "Repository")


async def get(call: Call) -> JSON:
    return _shown(call, _find(call))


async def list_(call: Call) -> JSON:
    found = [_shown(call, r) for _, r in call.cloud.store.list("repository", call.name + "/")]
    return cut(call, "repositories", found, usual=1000, most=1000)


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
    repository["updateTime"] = clock.now()
    with call.cloud.store.transaction():
        call.cloud.store.put("repository", call.name, repository)
    return _shown(call, repository)


async def delete(call: Call) -> JSON:
    cloud, repository = call.cloud, _find(call)
    with cloud.store.transaction():
        cloud.store.delete("repository", call.name)
        cloud.store.delete("policy", call.name)
        packages.forget_repository(call, call.name)
    if repository["format"] == DOCKER:
        last = not any(one["format"] == DOCKER for _, one in cloud.store.list("repository"))
        await asyncio.to_thread(cloud.registry.remove, "" if last else folder(call.name))
    return _operation(call, call.location, {}, "google.protobuf.Empty")


async def get_operation(call: Call) -> JSON:
    operation = call.cloud.store.get("artifact-operation", call.name)
    if not operation:
        raise not_found(f"Operation {call.name} is not found.")
    return operation


async def docker_images(call: Call) -> JSON:
    """The tagged images of the repository, by digest."""
    parent = call.name.removesuffix("/dockerImages")
    uri = _shown(call, _find(call, parent))["registryUri"]
    found: dict[str, list[str]] = {}
    for image, tag, digest in await asyncio.to_thread(call.cloud.registry.images, folder(parent)):
        found.setdefault(f"{image}@{digest}", []).append(tag)
    images = [
        {"name": f"{call.name}/{image}", "uri": f"{uri}/{image}", "tags": sorted(tags)}
        for image, tags in sorted(found.items())
    ]
    return cut(call, "dockerImages", images, usual=1000, most=1000)


_PREFIX = "artifactregistry.projects.locations"
METHODS: dict[str, Any] = {
    **packages.METHODS,
    f"{_PREFIX}.repositories.create": create,
    f"{_PREFIX}.repositories.get": get,
    f"{_PREFIX}.repositories.list": list_,
    f"{_PREFIX}.repositories.patch": patch,
    f"{_PREFIX}.repositories.delete": delete,
    f"{_PREFIX}.repositories.dockerImages.list": docker_images,
    f"{_PREFIX}.operations.get": get_operation,
    **policy_methods(f"{_PREFIX}.repositories", _find),
}
