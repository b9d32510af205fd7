"""Model Registry: models, their versions and the aliases of those.

https://cloud.google.com/vertex-ai/docs/model-registry/versioning
Stored apart: `model` documents hold what belongs to the model (display name, description, labels, the
next version number), `version` documents (named models/ID@N) the rest.
"""

import random
import re
import time
from collections.abc import Callable

from sandbox.clock import now
from sandbox.context import Call, Cloud
from sandbox.conventions import check_display_name, check_encryption, check_labels, etag, page, update_mask
from sandbox.errors import GoogleError, invalid, not_found, precondition
from sandbox.iam import check_act_as
from sandbox.operations import OperationKind
from sandbox.store import JSON

MODEL_ID = re.compile(r"[a-z_][a-z0-9_-]{0,62}")
ALIAS = re.compile(r"[a-z][a-zA-Z0-9-]{0,126}[a-z0-9]")
MODEL_MUTABLE = ("displayName", "description", "labels")
VERSION_MUTABLE = ("versionDescription", "labels")
MODEL_FIELDS = ("displayName", "description", "createTime", "updateTime")

# What the sandbox can not serve is refused at upload, where Vertex AI would take it.
UNSUPPORTED = ("explanationSpec", "baseModelSource")


# ------------------------------------------------------------------------------------------- finding


def find_version(cloud: Cloud, name: str) -> tuple[str, JSON]:
    """(`…/models/ID@N`, document) of `…/models/ID`, `…/models/ID@N` or `…/models/ID@alias`.

    Without a version, the one that holds the alias `default`. Raises NOT_FOUND.
    """
    base, _, wanted = name.partition("@")
    for key, version in versions(cloud, base):
        aliases = version["resource"]["versionAliases"]
        if (wanted or "default") in (*aliases, version["resource"]["versionId"]):
            return key, version
    what = "Model version" if wanted else "Model"
    raise not_found(f"{what} {name} is not found.")


def versions(cloud: Cloud, model: str) -> list[tuple[str, JSON]]:
    """The versions of a model, oldest first."""
    return sorted(cloud.store.list("version", model + "@"), key=lambda item: int(item[1]["resource"]["versionId"]))


def deployments(cloud: Cloud, version: str) -> list[JSON]:
    """DeployedModelRefs to a version, from the endpoints."""
    model, _, number = version.partition("@")
    return [
        {"endpoint": name, "deployedModelId": deployed["id"]}
        for name, endpoint in cloud.store.list("endpoint")
        for deployed in endpoint.get("deployedModels", [])
        if deployed["model"] == model and deployed["modelVersionId"] == number
    ]


def render(cloud: Cloud, key: str, version: JSON, *, versioned: bool = False) -> JSON:
    """The Model resource as one version shows it: labels of the model and of the version merged.

    `versioned` puts the version into the name, as only listVersions does (ListModelVersionsResponse).
    """
    name = key.partition("@")[0]
    model = cloud.store.get("model", name) or {}
    answer = {
        **version["resource"],
        **{f: model["resource"][f] for f in MODEL_FIELDS if f in model["resource"]},
    }
    answer["name"] = key if versioned else name
    if labels := {**model["resource"].get("labels", {}), **version["resource"].get("labels", {})}:
        answer["labels"] = labels
    if deployed := deployments(cloud, key):
        answer["deployedModels"] = deployed
    answer["supportedDeploymentResourcesTypes"] = ["DEDICATED_RESOURCES"]
    # One part each, because an update is of the model or of a version.
    answer["etag"] = f"{etag(model['resource'], MODEL_MUTABLE)}-{etag(version['resource'], VERSION_MUTABLE)}"
    return answer


# -------------------------------------------------------------------------------------------- upload


def check_container(spec: JSON) -> None:
    """Raises INVALID_ARGUMENT for a container spec that Vertex AI refuses."""
    if not spec.get("imageUri"):
        raise invalid("Required field model.container_spec.image_uri is not set.")
    for port in [*spec.get("ports", []), *spec.get("grpcPorts", [])]:
        if not 1 <= port.get("containerPort", 0) <= 65535:
            raise invalid("container_port must be between 1 and 65535, inclusive.")
    for route in ("predictRoute", "healthRoute"):
        if spec.get(route) and not spec[route].startswith("/"):
            raise invalid(f'{route} "{spec[route]}" must begin with "/".')
    for variable in spec.get("env", []):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable.get("name", "")):
            raise invalid(f'Environment variable name "{variable.get("name", "")}" is not a C identifier.')
    if float(spec.get("deploymentTimeout", "0s").removesuffix("s")) > 2 * 60 * 60:
        raise invalid("Limit for deployment timeout is 2 hours.")
    for probe in ("startupProbe", "healthProbe", "livenessProbe"):
        if "grpc" in spec.get(probe, {}):
            raise GoogleError("UNIMPLEMENTED", f"The sandbox has no gRPC probes (container_spec.{probe}.grpc).")


async def upload(call: Call) -> JSON:
    cloud, body = call.cloud, call.body
    model: JSON = body.get("model") or {}
    check_display_name(model)
    check_labels(model.get("labels", {}))
    check_act_as(cloud, body.get("serviceAccount"))
    for name in UNSUPPORTED:
        if model.get(name):
            raise GoogleError("UNIMPLEMENTED", f"The sandbox does not implement {call.method.id} with model.{name}.")
    check_encryption(model, call.location)
    if "containerSpec" not in model:
        raise invalid("Required field model.container_spec is not set.")
    check_container(model["containerSpec"])
    for alias in model.get("versionAliases", []):
        if not ALIAS.fullmatch(alias):
            raise invalid(f'Invalid version alias "{alias}": it must match {ALIAS.pattern}.')
    if parent := body.get("parentModel", "").partition("@")[0]:
        if body.get("modelId"):
            raise invalid("Only one of parent_model and model_id can be set.")
        if not cloud.store.get("model", parent):
            raise not_found(f"Model {parent} is not found.")
        name = parent
    else:
        model_id = body.get("modelId") or str(random.randrange(10**18, 9 * 10**18))
        if body.get("modelId") and not MODEL_ID.fullmatch(model_id):
            raise invalid(f'Invalid model_id "{model_id}": up to 63 of [a-z0-9_-], the first not a digit or a hyphen.')
        name = f"{call.location}/models/{model_id}"
        if cloud.store.get("model", name) or cloud.operations.on(name):
            raise GoogleError("ALREADY_EXISTS", f"Model {name} already exists.")
    return cloud.operations.start(call, "uploadModel", name, name, {**body, "name": name})


def _upload_work(cloud: Cloud) -> OperationKind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        request = operation["request"]
        image = request["model"]["containerSpec"]["imageUri"]
        # Vertex AI copies the image at upload: a tag that moves later changes nothing.
        ingested = await cloud.fleet.runner.resolve(image)

        def finish() -> JSON:
            name, uploaded, time_ = request["name"], request["model"], now()
            model = cloud.store.get("model", name)
            if model is None:
                if request.get("parentModel"):
                    raise not_found(f"Model {name} is not found.")
                own = {f: uploaded[f] for f in ("displayName", "description") if f in uploaded}
                model = {"resource": {**own, "createTime": time_}, "next": 1}
            number = str(model["next"])
            aliases = {*uploaded.get("versionAliases", []), *(["default"] if number == "1" else [])}
            model["next"] += 1
            model["resource"]["updateTime"] = time_
            cloud.store.put("model", name, model)
            _give_aliases(cloud, name, aliases)
            drop = ("displayName", "description", "name", "etag")
            resource = {k: v for k, v in uploaded.items() if k not in drop}
            resource |= {
                "versionId": number,
                "versionAliases": sorted(aliases),
                "versionCreateTime": time_,
                "versionUpdateTime": time_,
            }
            cloud.store.put("version", f"{name}@{number}", {"resource": resource, "image": ingested})
            return {"model": name, "modelVersionId": number}

        return finish

    return OperationKind("UploadModelOperationMetadata", "UploadModelResponse", work)


def _give_aliases(cloud: Cloud, model: str, aliases: set[str]) -> None:
    """Removes aliases from the versions that hold them, because each alias names one version."""
    for key, version in versions(cloud, model):
        held = version["resource"]["versionAliases"]
        if aliases & set(held):
            version["resource"]["versionAliases"] = [a for a in held if a not in aliases]
            version["resource"]["versionUpdateTime"] = now()
            cloud.store.put("version", key, version)


# ----------------------------------------------------------------------------------- read and update


async def get(call: Call) -> JSON:
    return render(call.cloud, *find_version(call.cloud, call.name))


async def list_(call: Call) -> JSON:
    models = [
        render(call.cloud, *find_version(call.cloud, name))
        for name, _ in call.cloud.store.list("model", call.name + "/")
    ]
    return page(call, "models", models, "model")


async def list_versions(call: Call) -> JSON:
    name = call.name.partition("@")[0]
    found = [render(call.cloud, *item, versioned=True) for item in versions(call.cloud, name)]
    if not found:
        raise not_found(f"Model {name} is not found.")
    return page(call, "models", found, "model")


async def patch(call: Call) -> JSON:
    """Model fields by `models/ID`, version fields by `models/ID@N`; a request may not mix them.

    https://cloud.google.com/vertex-ai/docs/reference/rpc/google.cloud.aiplatform.v1#updatemodelrequest
    """
    cloud = call.cloud
    key, version = find_version(cloud, call.name)
    name = key.partition("@")[0]
    of_version = "@" in call.name and not call.name.endswith("@-")
    allowed, part = (VERSION_MUTABLE, 1) if of_version else (MODEL_MUTABLE, 0)
    if given := call.body.get("etag"):
        current = render(cloud, key, version)["etag"]
        if given.split("-")[part : part + 1] != current.split("-")[part : part + 1]:
            raise GoogleError("ABORTED", "The etag does not match: read the model again and repeat the change.")
    mask = update_mask(call.query)
    other = MODEL_MUTABLE if of_version else VERSION_MUTABLE
    for path in mask:
        if path in other and path not in allowed:  # "A model name or model version name fields update mismatch"
            raise precondition(
                f'Field "{path}" belongs to {"the model" if of_version else "a version"}: name '
                f"{'models/ID' if of_version else 'models/ID@VERSION'} to update it."
            )
        if path not in allowed and not path.startswith("labels."):
            raise invalid(
                f'Field "{path}" of {"a model version" if of_version else "a model"} can not be updated; '
                f"these can: {', '.join(allowed)}."
            )
    document = version if of_version else cloud.store.get("model", name)
    assert document is not None  # find_version found it
    resource = document["resource"]
    apply_mask(resource, call.body, mask)
    if not of_version:
        check_display_name(resource)
    check_labels(resource.get("labels", {}))
    resource["versionUpdateTime" if of_version else "updateTime"] = now()
    with cloud.store.transaction():
        cloud.store.put(*(("version", key) if of_version else ("model", name)), document)
    return await get(call)


def apply_mask(resource: JSON, body: JSON, mask: list[str]) -> None:
    """Sets the masked fields to the body's, and removes those that the body leaves out."""
    for path in mask:
        field, _, key = path.partition(".")
        if field == "labels" and key:
            labels = resource.setdefault("labels", {})
            if key in body.get("labels", {}):
                labels[key] = body["labels"][key]
            else:
                labels.pop(key, None)
        elif body.get(field) not in (None, "", {}):
            resource[field] = body[field]
        else:
            resource.pop(field, None)


async def merge_version_aliases(call: Call) -> JSON:
    cloud = call.cloud
    key, version = find_version(cloud, call.name)
    add: set[str] = set()
    remove: set[str] = set()
    for alias in call.body.get("versionAliases", []):
        if not ALIAS.fullmatch(alias.removeprefix("-")):
            raise invalid(f'Invalid version alias "{alias}": it must match {ALIAS.pattern}, after a "-" to remove it.')
        (remove if alias.startswith("-") else add).add(alias.removeprefix("-"))
    if not add | remove:
        raise invalid("Required field version_aliases is not set.")
    add, remove = add - remove, remove - add  # both in one request cancel out
    if "default" in remove and "default" in version["resource"]["versionAliases"]:
        raise precondition(
            'The alias "default" can not be removed: exactly one version holds it. Give it to another version instead.'
        )
    with cloud.store.transaction():
        held = set(version["resource"]["versionAliases"])
        _give_aliases(cloud, key.partition("@")[0], add - held)
        version["resource"]["versionAliases"] = sorted((held | add) - remove)
        version["resource"]["versionUpdateTime"] = now()
        cloud.store.put("version", key, version)
    return render(cloud, key, version)


# -------------------------------------------------------------------------------------------- delete


def _check_free(cloud: Cloud, keys: list[str]) -> None:
    """Raises FAILED_PRECONDITION while a version is deployed, being deployed, or just was."""
    for key in keys:
        name, _, number = key.partition("@")
        refs = {d["endpoint"] for d in deployments(cloud, key)}
        refs |= {o["target"] for o in cloud.operations.running.values() if o["request"].get("version") == key}
        if refs:
            raise precondition(
                f'The Model "{name}" (version {number}) is deployed or being deployed at the following '
                f"Endpoint(s): {', '.join(sorted(refs))}. Please undeploy the model before retry."
            )
        # A minute on Vertex AI, https://github.com/googleapis/python-aiplatform/issues/2807; an option here.
        held = cloud.store.get("hold", key)
        if held and held["until"] > time.time():
            raise precondition(
                f'The Model "{name}" (version {number}) is deployed or being deployed at the following '
                f"Endpoint(s): {held['endpoint']}. Please undeploy the model before retry."
            )


async def delete_version(call: Call) -> JSON:
    cloud = call.cloud
    if "@" not in call.name:
        raise invalid(f"The name {call.name} has no version: models/ID@VERSION is needed.")
    key, version = find_version(cloud, call.name)
    if len(versions(cloud, key.partition("@")[0])) == 1:
        raise precondition(
            f"Deleting the only version in the Model is not allowed ({key}). Use DeleteModel for deleting the Model."
        )
    if "default" in version["resource"]["versionAliases"]:
        raise precondition(
            f"The default version of a Model can not be deleted ({key}): "
            'give the alias "default" to another version first.'
        )
    _check_free(cloud, [key])
    return cloud.operations.start(call, "deleteModelVersion", key.partition("@")[0], key, {})


async def delete(call: Call) -> JSON:
    cloud, name = call.cloud, call.name
    if "@" in name:
        raise invalid(f"The name {name} has a version: use DeleteModelVersion to delete one.")
    if not cloud.store.get("model", name):
        raise not_found(f"Model {name} is not found.")
    cloud.operations.check_alone("Model", name)
    _check_free(cloud, [key for key, _ in versions(cloud, name)])
    return cloud.operations.start(call, "deleteModel", name, name, {})


def _delete_work(cloud: Cloud) -> OperationKind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        def finish() -> JSON:
            target = operation["target"]
            keys = [target] if "@" in target else [k for k, _ in versions(cloud, target)]
            _check_free(cloud, keys)  # a deployment may have begun meanwhile
            for key in keys:
                cloud.store.delete("version", key)
                cloud.store.delete("hold", key)
            if "@" not in target:
                cloud.store.delete("model", target)
            return {}

        return finish

    return OperationKind("DeleteOperationMetadata", "google.protobuf.Empty", work)


def kinds(cloud: Cloud) -> dict[str, OperationKind]:
    return {
        "uploadModel": _upload_work(cloud),
        "deleteModel": _delete_work(cloud),
        "deleteModelVersion": _delete_work(cloud),
    }


METHODS = {
    f"aiplatform.projects.locations.models.{name}": handler
    for name, handler in {
        "upload": upload,
        "get": get,
        "list": list_,
        "listVersions": list_versions,
        "patch": patch,
        "mergeVersionAliases": merge_version_aliases,
        "deleteVersion": delete_version,
        "delete": delete,
    }.items()
}
