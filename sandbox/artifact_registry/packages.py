"""Artifact Registry's packages of the format KFP: compiled pipelines, their versions and their tags.

https://cloud.google.com/artifact-registry/docs/kfp/quickstart
On Google a repository is at https://LOCATION-kfp.pkg.dev/PROJECT/REPOSITORY, here at /kfp/LOCATION/PROJECT/REPOSITORY.
kfp.registry.RegistryClient uploads and downloads there, and asks the API for the rest; where it knows this address
alone, it asks for the rest below it, at …/packages.
A version is a document of the kind `kfp-version`, a tag one of the kind `kfp-tag`, both by their resource names. A
package is there as long as it has a version.
"""

import hashlib
import re
import uuid
from collections.abc import Callable
from typing import Any

import yaml
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sandbox import clock, oauth2
from sandbox.context import Call, Cloud
from sandbox.conventions import cut
from sandbox.errors import GoogleError, invalid, not_found, precondition
from sandbox.store import JSON

ROOT = "kfp"  # first segment of the paths
FORMAT = "KFP"
PACKAGE = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?")
TAG = re.compile(r"[a-z](?:[a-z0-9-]{0,126}[a-z0-9])?")
VERSION = re.compile(r"sha256:[0-9a-f]{64}")
ADDRESS = re.compile(r"https://(?P<location>[a-z0-9-]+)-kfp\.pkg\.dev/(?P<rest>[^/]+/[^/]+/[^/]+/[^/]+)")


def address(name: str) -> str:
    """The path of a repository here, without a slash in front."""
    _, project, _, location, _, repository = name.split("/")
    return f"{ROOT}/{location}/{project}/{repository}"


def api_path(path: str) -> str:
    """The path in the API of what is asked for below a repository's address; other paths stay as they are."""
    parts = path.split("/")
    if parts[0] != ROOT or len(parts) < 5 or parts[4] != "packages":
        return path
    _, location, project, repository, *rest = parts
    return f"artifactregistry/v1/projects/{project}/locations/{location}/repositories/{repository}/{'/'.join(rest)}"


def quoted(path: str) -> str:
    """A path in which the colon of a version does not look like that of a method."""
    return path.replace("sha256:", "sha256%3A")


def fetch(cloud: Cloud, uri: str) -> bytes:
    """The template at an address of Google's, https://LOCATION-kfp.pkg.dev/PROJECT/REPOSITORY/PACKAGE/VERSION-OR-TAG.

    Raises NOT_FOUND, or INVALID_ARGUMENT for another address.
    """
    if not (found := ADDRESS.fullmatch(uri)):
        raise invalid(f"Invalid template_uri {uri}: https://LOCATION-kfp.pkg.dev/PROJECT/REPOSITORY/PACKAGE/VERSION.")
    return _download(cloud, f"{found['location']}/{found['rest']}")


# ------------------------------------------------------------------------------------ uploads and downloads


async def answer(cloud: Cloud, request: Request) -> Response:
    """Answers an upload to a repository's address, or a download below it."""
    oauth2.check(request)
    path = request.url.path.lstrip("/").partition("/")[2].rstrip("/")
    if request.method == "POST":
        return PlainTextResponse(await _upload(cloud, path, request))
    if request.method != "GET":
        raise GoogleError("UNIMPLEMENTED", f"{request.method} of a package.", http=405)
    return Response(_download(cloud, path), media_type="application/octet-stream")


def _repository(cloud: Cloud, location: str, project: str, repository: str) -> str:
    """The resource name of a repository for pipelines. Raises NOT_FOUND."""
    name = cloud.projects.by_id(f"projects/{project}/locations/{location}/repositories/{repository}")
    found = cloud.store.get("repository", name)
    if not found or found["format"] != FORMAT:
        raise not_found(f"Repository {name} of the format {FORMAT} is not found.")
    return name


async def _upload(cloud: Cloud, path: str, request: Request) -> str:
    """Stores a template with its tags; returns PACKAGE/VERSION."""
    parts = path.split("/")
    if len(parts) != 3:
        raise not_found(f"No repository is at {path}.")
    repository = _repository(cloud, *parts)
    form = await request.form()
    file = form.get("content")
    content = await file.read() if file is not None and not isinstance(file, str) else b""
    tags = [tag for tag in str(form.get("tags") or "").split(",") if tag]
    if wrong := [tag for tag in tags if not TAG.fullmatch(tag)]:
        raise invalid(f"Invalid tag {wrong[0]}.")
    package = f"{repository}/packages/{_package(content)}"
    version, now = f"{package}/versions/sha256:{hashlib.sha256(content).hexdigest()}", clock.now()
    old = cloud.store.get("kfp-version", version) or {"createTime": now}
    with cloud.store.transaction():
        cloud.store.put("kfp-version", version, {**old, "updateTime": now, "content": content.decode()})
        for tag in tags:
            cloud.store.put("kfp-tag", f"{package}/tags/{tag}", {"version": version})
    return f"{package.rpartition('/')[2]}/{version.rpartition('/')[2]}"


def _package(content: bytes) -> str:
    """The name of the package that a template is a version of: that of its pipeline. Raises INVALID_ARGUMENT."""
    try:
        template = next(iter(yaml.safe_load_all(content.decode())), None)
        name = template["pipelineInfo"]["name"] if isinstance(template, dict) else ""
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        name = ""
    if not isinstance(name, str) or not PACKAGE.fullmatch(name):
        raise invalid("The uploaded file is no compiled pipeline with a name.")
    return name


def _download(cloud: Cloud, path: str) -> bytes:
    """The template LOCATION/PROJECT/REPOSITORY/PACKAGE/VERSION-OR-TAG. Raises NOT_FOUND."""
    parts = path.split("/")
    if len(parts) != 5:
        raise not_found(f"No template is at {path}.")
    *where, package, reference = parts
    name = f"{_repository(cloud, *where)}/packages/{package}"
    if not VERSION.fullmatch(reference):
        tag = cloud.store.get("kfp-tag", f"{name}/tags/{reference}") or {"version": ""}
        reference = tag["version"].rpartition("/")[2]
    found = cloud.store.get("kfp-version", f"{name}/versions/{reference}")
    if not found:
        raise not_found(f"No template is at {path}.")
    return str(found["content"]).encode()


# ------------------------------------------------------------------------------------------------- the API


def _name(call: Call) -> str:
    """The resource that a call names. Raises NOT_FOUND where its repository is not there."""
    name = call.name.replace("%3A", ":")
    if not call.cloud.store.get("repository", name.partition("/packages")[0]):
        raise not_found(f"Repository {name.partition('/packages')[0]} is not found.")
    return name


def _under(call: Call, kind: str, prefix: str) -> list[tuple[str, JSON]]:
    return call.cloud.store.list(kind, prefix)


def _package_resource(name: str, versions: list[JSON]) -> JSON:
    return {
        "name": name,
        "createTime": min(version["createTime"] for version in versions),
        "updateTime": max(version["updateTime"] for version in versions),
    }


def _packages(call: Call, repository: str) -> list[JSON]:
    found: dict[str, list[JSON]] = {}
    for name, version in _under(call, "kfp-version", f"{repository}/packages/"):
        found.setdefault(name.partition("/versions/")[0], []).append(version)
    return [_package_resource(name, versions) for name, versions in sorted(found.items())]


def _tag_resource(name: str, tag: JSON) -> JSON:
    return {"name": name, "version": tag["version"]}


def _version_resource(call: Call, name: str, version: JSON) -> JSON:
    shown: JSON = {"name": name, "createTime": version["createTime"], "updateTime": version["updateTime"]}
    if call.query.get("view") == "FULL":
        tags = _under(call, "kfp-tag", f"{name.partition('/versions/')[0]}/tags/")
        if mine := [_tag_resource(tag, body) for tag, body in tags if body["version"] == name]:
            shown["relatedTags"] = mine
    return shown


async def list_packages(call: Call) -> JSON:
    return cut(call, "packages", _packages(call, _name(call).removesuffix("/packages")), usual=1000, most=1000)


async def get_package(call: Call) -> JSON:
    repository, _, _ = _name(call).partition("/packages/")
    return next((one for one in _packages(call, repository) if one["name"] == _name(call)), None) or _missing(call)


async def delete_package(call: Call) -> JSON:
    await get_package(call)
    _forget(call, _name(call) + "/")
    return _done(call)


async def list_versions(call: Call) -> JSON:
    found = [_version_resource(call, name, body) for name, body in _under(call, "kfp-version", _name(call) + "/")]
    return cut(call, "versions", found, usual=1000, most=1000)


async def get_version(call: Call) -> JSON:
    return _version_resource(call, _name(call), _find(call, "kfp-version"))


async def delete_version(call: Call) -> JSON:
    _find(call, "kfp-version")
    name = _name(call)
    tags = _under(call, "kfp-tag", f"{name.partition('/versions/')[0]}/tags/")
    mine = [tag for tag, body in tags if body["version"] == name]
    if mine and call.query.get("force") != "true":
        raise precondition(f"Version {name} has tags: delete them first, or set force.")
    with call.cloud.store.transaction():
        for tag in mine:
            call.cloud.store.delete("kfp-tag", tag)
        call.cloud.store.delete("kfp-version", name)
    return _done(call)


async def list_tags(call: Call) -> JSON:
    found = [_tag_resource(name, body) for name, body in _under(call, "kfp-tag", _name(call) + "/")]
    return cut(call, "tags", found, usual=1000, most=1000)


async def get_tag(call: Call) -> JSON:
    return _tag_resource(_name(call), _find(call, "kfp-tag"))


async def create_tag(call: Call) -> JSON:
    tag = call.query.get("tagId", "")
    name = f"{_name(call)}/{tag}"
    if not TAG.fullmatch(tag):
        raise invalid(f'Invalid tag "{tag}".')
    if call.cloud.store.get("kfp-tag", name):
        raise GoogleError("ALREADY_EXISTS", f"Tag {name} already exists.")
    return _put_tag(call, name)


async def patch_tag(call: Call) -> JSON:
    _find(call, "kfp-tag")
    return _put_tag(call, _name(call))


async def delete_tag(call: Call) -> JSON:
    _find(call, "kfp-tag")
    with call.cloud.store.transaction():
        call.cloud.store.delete("kfp-tag", _name(call))
    return {}


def _put_tag(call: Call, name: str) -> JSON:
    repository, wanted = name.partition("/packages/")[0], str(call.body.get("version", ""))
    # The client names a version below the repository, where it was given no more than the address.
    version = f"{repository}/{wanted}" if wanted.startswith("packages/") else wanted
    package = name.partition("/tags/")[0]
    if not version.startswith(f"{package}/versions/") or not call.cloud.store.get("kfp-version", version):
        raise not_found(f"Version {wanted} is not found.")
    with call.cloud.store.transaction():
        call.cloud.store.put("kfp-tag", name, {"version": version})
    return _tag_resource(name, {"version": version})


def _find(call: Call, kind: str) -> JSON:
    return call.cloud.store.get(kind, _name(call)) or _missing(call)


def _missing(call: Call) -> JSON:
    raise not_found(f"Requested entity {_name(call)} was not found.")


def _forget(call: Call, prefix: str) -> None:
    with call.cloud.store.transaction():
        for kind in ("kfp-version", "kfp-tag"):
            for name, _ in _under(call, kind, prefix):
                call.cloud.store.delete(kind, name)


def forget_repository(call: Call, name: str) -> None:
    """Deletes the packages of a repository."""
    _forget(call, f"{name}/packages/")


def _done(call: Call) -> JSON:
    """An operation that is done: the client looks at this once."""
    operation: JSON = {
        "name": f"{call.location}/operations/{uuid.uuid4()}",
        "metadata": {"@type": "type.googleapis.com/google.devtools.artifactregistry.v1.OperationMetadata"},
        "done": True,
        "response": {"@type": "type.googleapis.com/google.protobuf.Empty"},
    }
    with call.cloud.store.transaction():
        call.cloud.store.put("artifact-operation", str(operation["name"]), operation)
    return operation


_PREFIX = "artifactregistry.projects.locations.repositories.packages"
METHODS: dict[str, Callable[[Call], Any]] = {
    f"{_PREFIX}.list": list_packages,
    f"{_PREFIX}.get": get_package,
    f"{_PREFIX}.delete": delete_package,
    f"{_PREFIX}.versions.list": list_versions,
    f"{_PREFIX}.versions.get": get_version,
    f"{_PREFIX}.versions.delete": delete_version,
    f"{_PREFIX}.tags.list": list_tags,
    f"{_PREFIX}.tags.get": get_tag,
    f"{_PREFIX}.tags.create": create_tag,
    f"{_PREFIX}.tags.patch": patch_tag,
    f"{_PREFIX}.tags.delete": delete_tag,
}
