"""Endpoints: the models deployed on them, their replicas and their traffic.

https://cloud.google.com/vertex-ai/docs/predictions/deploy-model-api
An `endpoint` document is the Endpoint resource as it is stored; what depends on the moment (available
replicas, the dedicated address) is added when it is read.
"""

import random
import re
import time
from collections.abc import Callable

from sandbox import vertex_models
from sandbox.clock import now
from sandbox.context import Call, Cloud
from sandbox.conventions import check_display_name, check_labels, etag, page, update_mask
from sandbox.errors import GoogleError, invalid, not_found, precondition
from sandbox.fleet import Serving, serving
from sandbox.iam import check_act_as
from sandbox.operations import Kind
from sandbox.store import JSON

# A letter first: up to 63 of [a-z0-9-], the last not a hyphen; a digit first: up to 9 digits, no leading
# zero (discovery document, endpoints.create, endpointId).
ENDPOINT_ID = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?|[1-9][0-9]{0,8}")
DEPLOYED_ID = re.compile(r"[0-9]{1,10}")
# MachineSpec.machine_type: "For DeployedModel this field is optional, and the default value is …".
DEFAULT_MACHINE = "n1-standard-2"

MUTABLE = ("displayName", "description", "labels", "trafficSplit")
UNSUPPORTED = (
    "network",
    "encryptionSpec",
    "enablePrivateServiceConnect",
    "privateServiceConnectConfig",
    "predictRequestResponseLoggingConfig",
    "gdcConfig",
    "genAiAdvancedFeaturesConfig",
)
DEPLOYED_UNSUPPORTED = (
    "automaticResources",
    "sharedResources",
    "explanationSpec",
    "fasterDeploymentConfig",
    "rolloutOptions",
    "fullFineTunedResources",
    "speculativeDecodingSpec",
    "gdcConnectedModel",
)
RESOURCES_UNSUPPORTED = (
    "spot",
    "scaleToZeroSpec",
    "flexStart",
    "initialReplicaCount",
    "requiredReplicaCount",
)


def find(cloud: Cloud, name: str) -> JSON:
    """The stored endpoint. Raises NOT_FOUND."""
    endpoint = cloud.store.get("endpoint", name)
    if endpoint is None:
        raise not_found(f"Endpoint {name} is not found.")
    return endpoint


def find_deployed(endpoint: JSON, deployed_id: str) -> JSON:
    for deployed in endpoint.get("deployedModels", []):
        if deployed["id"] == deployed_id:
            return dict(deployed)
    raise not_found(f'DeployedModel with ID "{deployed_id}" is not found on Endpoint {endpoint["name"]}.')


def render(cloud: Cloud, endpoint: JSON) -> JSON:
    """The Endpoint resource as it is read."""
    answer = dict(endpoint)
    if endpoint.get("deployedModels"):
        answer["deployedModels"] = [render_deployed(cloud, endpoint["name"], d) for d in endpoint["deployedModels"]]
    if endpoint.get("dedicatedEndpointEnabled"):
        # On Google a DNS name of the endpoint's own; here the sandbox's address serves both.
        answer["dedicatedEndpointDns"] = f"127.0.0.1:{cloud.settings.port}"
    answer["etag"] = etag(endpoint, MUTABLE)
    return answer


def render_deployed(cloud: Cloud, endpoint: str, deployed: JSON) -> JSON:
    available = cloud.fleet.available(endpoint, deployed["id"])
    return {**deployed, "status": {"availableReplicaCount": available, "lastUpdateTime": now()}}


def save(cloud: Cloud, endpoint: JSON, event: str) -> None:
    """Stores an endpoint, and a snapshot of its traffic in the history. Inside a transaction."""
    endpoint["updateTime"] = now()
    for name in ("deployedModels", "trafficSplit", "labels"):
        if not endpoint.get(name):
            endpoint.pop(name, None)  # as JSON of a protocol buffer leaves out what is empty
    cloud.store.put("endpoint", endpoint["name"], endpoint)
    snapshot(cloud, endpoint, event)


def snapshot(cloud: Cloud, endpoint: JSON, event: str) -> None:
    """Records the traffic and who could serve it, for the admin route's history."""
    name = endpoint["name"]
    cloud.store.record(
        {
            "time": now(),
            "endpoint": name,
            "event": event,
            "trafficSplit": endpoint.get("trafficSplit", {}),
            "available": {d["id"]: cloud.fleet.available(name, d["id"]) for d in endpoint.get("deployedModels", [])},
        }
    )


def replicas_changed(cloud: Cloud, name: str) -> None:
    endpoint = cloud.store.get("endpoint", name)
    if endpoint and endpoint.get("deployedModels"):
        with cloud.store.transaction():
            snapshot(cloud, endpoint, "replicas")


def serving_of(cloud: Cloud, endpoint: str, deployed: JSON) -> Serving:
    name, version = vertex_models.find_version(cloud, f"{deployed['model']}@{deployed['modelVersionId']}")
    return serving(cloud.store.id, endpoint, deployed, name, version)


def check_traffic(split: JSON, ids: set[str]) -> None:
    """Raises INVALID_ARGUMENT unless a traffic split is empty or sums to 100 over `ids`."""
    if not split:
        return
    if unknown := sorted(set(split) - ids):
        raise invalid(f"traffic_split names deployed models that are not on the Endpoint: {', '.join(unknown)}.")
    if any(not 0 <= percent <= 100 for percent in split.values()):
        raise invalid("Every traffic percentage must be between 0 and 100.")
    if sum(split.values()) != 100:
        raise invalid(f"The traffic percentage values must add up to 100; they add up to {sum(split.values())}.")


# ------------------------------------------------------------------------------------------ endpoints


def _check_supported(call: Call, resource: JSON, fields: tuple[str, ...], where: str) -> None:
    for name in fields:
        if resource.get(name):
            raise GoogleError("UNIMPLEMENTED", f"The sandbox does not implement {call.method.id} with {where}.{name}.")


async def create(call: Call) -> JSON:
    cloud, endpoint = call.cloud, call.body
    check_display_name(endpoint)
    check_labels(endpoint.get("labels", {}))
    _check_supported(call, endpoint, UNSUPPORTED, "endpoint")
    if endpoint.get("trafficSplit"):
        raise invalid("traffic_split can not be set at creation: no model is deployed on the Endpoint yet.")
    given = call.query.get("endpointId", call.query.get("endpoint_id", ""))
    if given and not ENDPOINT_ID.fullmatch(given):
        raise invalid(
            f'Invalid endpoint_id "{given}": up to 63 of [a-z0-9-] beginning with a letter and ending with a '
            "letter or digit, or up to 9 digits without a leading zero."
        )
    name = f"{call.location}/endpoints/{given or random.randrange(10**18, 9 * 10**18)}"
    if cloud.store.get("endpoint", name) or cloud.operations.on(name):
        raise GoogleError("ALREADY_EXISTS", f"Endpoint {name} already exists.")
    return cloud.operations.start(call, "createEndpoint", name, name, {**endpoint, "name": name})


def _create_kind(cloud: Cloud) -> Kind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        def finish() -> JSON:
            endpoint = {k: v for k, v in operation["request"].items() if k != "etag"}
            endpoint["createTime"] = now()
            save(cloud, endpoint, "created")
            return render(cloud, endpoint)

        return finish

    return Kind("CreateEndpointOperationMetadata", "Endpoint", work)


async def get(call: Call) -> JSON:
    return render(call.cloud, find(call.cloud, call.name))


async def list_(call: Call) -> JSON:
    endpoints = [render(call.cloud, e) for _, e in call.cloud.store.list("endpoint", call.name + "/")]
    return page(call, "endpoints", endpoints, "endpoint")


async def patch(call: Call) -> JSON:
    cloud, body = call.cloud, call.body
    mask = update_mask(call.query)
    for path in mask:
        if path not in MUTABLE and not path.startswith("labels."):
            raise invalid(f'Field "{path}" of an Endpoint can not be updated; these can: {", ".join(MUTABLE)}.')
    with cloud.store.transaction():
        endpoint = find(cloud, call.name)
        cloud.operations.check_alone("Endpoint", call.name)
        if body.get("etag") and body["etag"] != etag(endpoint, MUTABLE):
            raise GoogleError("ABORTED", "The etag does not match the Endpoint's: read it again and repeat the change.")
        if "trafficSplit" in mask:
            check_traffic(body.get("trafficSplit", {}), {d["id"] for d in endpoint.get("deployedModels", [])})
        vertex_models.apply_mask(endpoint, body, mask)
        check_display_name(endpoint)
        check_labels(endpoint.get("labels", {}))
        save(cloud, endpoint, "patched")
    return render(cloud, endpoint)


async def delete(call: Call) -> JSON:
    cloud = call.cloud
    endpoint = find(cloud, call.name)
    busy = [o["request"]["deployedModel"]["id"] for o in cloud.operations.on(call.name) if o["kind"] == "deployModel"]
    if ids := [d["id"] for d in endpoint.get("deployedModels", [])] + busy:
        raise precondition(
            f'The Endpoint "{call.name}" has deployed or being-deployed DeployedModel(s) with ID(s): '
            f"{', '.join(ids)}. Please undeploy them before retry."
        )
    cloud.operations.check_alone("Endpoint", call.name)
    return cloud.operations.start(call, "deleteEndpoint", call.location, call.name, {})


def _delete_kind(cloud: Cloud) -> Kind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        def finish() -> JSON:
            cloud.store.delete("endpoint", operation["target"])
            return {}

        return finish

    return Kind("DeleteOperationMetadata", "google.protobuf.Empty", work)


# ------------------------------------------------------------------------------------------ deploying


def _check_resources(call: Call, resources: JSON) -> None:
    """Raises for replica counts that Vertex AI refuses; sets what it defaults."""
    _check_supported(call, resources, RESOURCES_UNSUPPORTED, "dedicated_resources")
    least = resources.get("minReplicaCount", 0)
    if least < 1:
        raise invalid(f"dedicated_resources.min_replica_count must be greater than or equal to 1; it is {least}.")
    most = resources.setdefault("maxReplicaCount", least) or least
    if most < least:
        raise invalid(f"max_replica_count ({most}) must not be less than min_replica_count ({least}).")
    resources["maxReplicaCount"] = most
    for metric in resources.get("autoscalingMetricSpecs", []):
        if not 1 <= metric.get("target", 60) <= 100:
            raise invalid("The target of an autoscaling metric must be between 1 and 100.")


async def deploy_model(call: Call) -> JSON:
    cloud, name = call.cloud, call.name
    deployed: JSON = dict(call.body.get("deployedModel") or {})
    endpoint = find(cloud, name)
    if not deployed.get("model"):
        raise invalid("Required field deployed_model.model is not set.")
    _check_supported(call, deployed, DEPLOYED_UNSUPPORTED, "deployed_model")
    if "dedicatedResources" not in deployed:
        raise invalid("Required field deployed_model.dedicated_resources is not set: the Model supports no other.")
    resources: JSON = deployed["dedicatedResources"]
    _check_resources(call, resources)
    machine: JSON = resources.setdefault("machineSpec", {})
    machine.setdefault("machineType", DEFAULT_MACHINE)
    if machine.get("acceleratorCount", 0) > 0 and not machine.get("acceleratorType"):
        raise invalid("machine_spec.accelerator_count needs machine_spec.accelerator_type.")
    check_act_as(cloud, deployed.get("serviceAccount"))
    key, version = vertex_models.find_version(cloud, deployed["model"])
    taken = {d["id"] for d in endpoint.get("deployedModels", [])}
    if given := deployed.get("id"):
        if not DEPLOYED_ID.fullmatch(given) or int(given) == 0:
            raise invalid(f'Invalid deployed_model.id "{given}": 1-10 characters of [0-9], and not 0.')
        if given in taken:
            raise GoogleError("ALREADY_EXISTS", f'DeployedModel with ID "{given}" already exists on Endpoint {name}.')
    check_traffic(call.body.get("trafficSplit", {}), taken | {"0"})
    cloud.operations.check_alone("Endpoint", name)
    deployed.setdefault("id", str(random.randrange(10**8, 10**10)))
    deployed["model"], _, deployed["modelVersionId"] = key.partition("@")
    model = vertex_models.render(cloud, key, version)
    if not deployed.get("displayName"):
        deployed["displayName"] = model["displayName"]
    deployed.pop("enableContainerLogging", None)  # v1beta1 only, and without meaning here
    request = {"deployedModel": deployed, "trafficSplit": call.body.get("trafficSplit", {}), "version": key}
    return cloud.operations.start(call, "deployModel", name, name, request)


def _deploy_kind(cloud: Cloud) -> Kind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        name, request = operation["target"], operation["request"]
        deployed: JSON = request["deployedModel"]
        what = serving_of(cloud, name, deployed)
        cloud.operations.stage(operation, deploymentStage="GETTING_CONTAINER_IMAGE")
        await cloud.fleet.runner.fetch(what.launch.image)
        cloud.operations.stage(operation, deploymentStage="STARTING_MODEL_SERVER")
        await cloud.fleet.bring_up(what, deployed["dedicatedResources"]["minReplicaCount"])

        def finish() -> JSON:
            endpoint = find(cloud, name)
            deployed["createTime"] = now()
            endpoint.setdefault("deployedModels", []).append(deployed)
            if split := request["trafficSplit"]:
                own = {deployed["id"] if k == "0" else k: v for k, v in split.items()}
                endpoint["trafficSplit"] = own
            operation["metadata"] = {"deploymentStage": "SUCCESSFULLY_DEPLOYED"}
            save(cloud, endpoint, "deployed")
            return {"deployedModel": deployed}

        return finish

    async def undo(operation: JSON) -> None:
        operation["metadata"] = {"deploymentStage": "FAILED_TO_DEPLOY"}
        await cloud.fleet.bring_down(operation["target"], operation["request"]["deployedModel"]["id"])

    return Kind("DeployModelOperationMetadata", "DeployModelResponse", work, undo)


async def undeploy_model(call: Call) -> JSON:
    """Takes the traffic away at once and answers; the replicas stop and the entry goes in the operation."""
    cloud, name = call.cloud, call.name
    deployed_id = call.body.get("deployedModelId", "")
    if not deployed_id:
        raise invalid("Required field deployed_model_id is not set.")
    with cloud.store.transaction():
        endpoint = find(cloud, name)
        find_deployed(endpoint, deployed_id)
        cloud.operations.check_alone("Endpoint", name)
        others = {d["id"] for d in endpoint["deployedModels"]} - {deployed_id}
        split = call.body.get("trafficSplit") or endpoint.get("trafficSplit", {})
        if not others:
            split = {}  # "If last DeployedModel is being undeployed, traffic_split will always end up empty"
        elif split.get(deployed_id):
            raise precondition(
                f'DeployedModel "{deployed_id}" has {split[deployed_id]} % of the traffic of Endpoint '
                f"{name}: set a traffic_split that gives it to the others."
            )
        split = {k: v for k, v in split.items() if k != deployed_id}
        check_traffic(split, others)
        if split != endpoint.get("trafficSplit", {}):
            endpoint["trafficSplit"] = split
            save(cloud, endpoint, "undeploying")
        return cloud.operations.start(call, "undeployModel", name, name, {"deployedModelId": deployed_id})


def _undeploy_kind(cloud: Cloud) -> Kind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        name, deployed_id = operation["target"], operation["request"]["deployedModelId"]
        await cloud.fleet.bring_down(name, deployed_id)

        def finish() -> JSON:
            endpoint = find(cloud, name)
            deployed = find_deployed(endpoint, deployed_id)
            endpoint["deployedModels"] = [d for d in endpoint["deployedModels"] if d["id"] != deployed_id]
            save(cloud, endpoint, "undeployed")
            if seconds := cloud.settings.hold_after_undeploy:
                until = {"until": time.time() + seconds, "endpoint": name}
                cloud.store.put("hold", f"{deployed['model']}@{deployed['modelVersionId']}", until)
            return {}

        return finish

    async def undo(operation: JSON) -> None:  # still deployed: then it has its replicas, though no traffic
        _restore(cloud, operation["target"], operation["request"]["deployedModelId"])

    return Kind("UndeployModelOperationMetadata", "UndeployModelResponse", work, undo)


def _restore(cloud: Cloud, name: str, deployed_id: str) -> None:
    """Brings the replicas of a deployed model to the number that is stored."""
    deployed = find_deployed(find(cloud, name), deployed_id)
    cloud.fleet.restore(serving_of(cloud, name, deployed), deployed["dedicatedResources"]["minReplicaCount"])


# In place only: replica counts, autoscaling targets and container logging (discovery document,
# MutateDeployedModelRequest.deployedModel).
MUTABLE_DEPLOYED = (
    "dedicatedResources.minReplicaCount",
    "dedicatedResources.maxReplicaCount",
    "dedicatedResources.autoscalingMetricSpecs",
    "disableContainerLogging",
)


async def mutate_deployed_model(call: Call) -> JSON:
    cloud, name = call.cloud, call.name
    wanted: JSON = call.body.get("deployedModel") or {}
    paths = update_mask({"updateMask": call.body.get("updateMask", "")})
    endpoint = find(cloud, name)
    deployed = find_deployed(endpoint, wanted.get("id", ""))
    for path in paths:
        if path not in MUTABLE_DEPLOYED:
            raise invalid(
                f'Field "{path}" of a DeployedModel can not be mutated; these can: {", ".join(MUTABLE_DEPLOYED)}.'
            )
        outer, _, inner = path.partition(".")
        source: JSON = wanted.get(outer) or {} if inner else wanted
        into: JSON = deployed.setdefault(outer, {}) if inner else deployed
        if (inner or outer) in source:
            into[inner or outer] = source[inner or outer]
        else:
            into.pop(inner or outer, None)
    _check_resources(call, deployed["dedicatedResources"])
    cloud.operations.check_alone("Endpoint", name)
    return cloud.operations.start(call, "mutateDeployedModel", name, name, {"deployedModel": deployed})


def _mutate_kind(cloud: Cloud) -> Kind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        name, deployed = operation["target"], operation["request"]["deployedModel"]
        count = deployed["dedicatedResources"]["minReplicaCount"]
        await cloud.fleet.bring_up(serving_of(cloud, name, deployed), count)
        await cloud.fleet.bring_down(name, deployed["id"], keep=count)

        def finish() -> JSON:
            endpoint = find(cloud, name)
            own = [deployed if d["id"] == deployed["id"] else d for d in endpoint["deployedModels"]]
            endpoint["deployedModels"] = own
            save(cloud, endpoint, "mutated")
            return {"deployedModel": deployed}

        return finish

    async def undo(operation: JSON) -> None:
        name, deployed_id = operation["target"], operation["request"]["deployedModel"]["id"]
        before = find_deployed(find(cloud, name), deployed_id)
        await cloud.fleet.bring_down(name, deployed_id, keep=before["dedicatedResources"]["minReplicaCount"])
        _restore(cloud, name, deployed_id)

    return Kind("MutateDeployedModelOperationMetadata", "MutateDeployedModelResponse", work, undo)


async def adopt(cloud: Cloud) -> None:
    """At start: brings back the replicas of everything deployed, and removes containers of nothing."""
    wanted = [
        (serving_of(cloud, name, deployed), deployed["dedicatedResources"]["minReplicaCount"])
        for name, endpoint in cloud.store.list("endpoint")
        for deployed in endpoint.get("deployedModels", [])
    ]
    pending = {
        (o["target"], o["request"]["deployedModel"]["id"], o["request"]["version"])
        for _, o in cloud.store.list("operation")
        if o["kind"] == "deployModel" and not o.get("done")
    }
    await cloud.fleet.adopt(wanted, pending)


def kinds(cloud: Cloud) -> dict[str, Kind]:
    return {
        "createEndpoint": _create_kind(cloud),
        "deleteEndpoint": _delete_kind(cloud),
        "deployModel": _deploy_kind(cloud),
        "undeployModel": _undeploy_kind(cloud),
        "mutateDeployedModel": _mutate_kind(cloud),
    }


METHODS = {
    f"aiplatform.projects.locations.endpoints.{name}": handler
    for name, handler in {
        "create": create,
        "get": get,
        "list": list_,
        "patch": patch,
        "delete": delete,
        "deployModel": deploy_model,
        "undeployModel": undeploy_model,
        "mutateDeployedModel": mutate_deployed_model,
    }.items()
}
