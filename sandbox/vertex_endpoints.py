"""Endpoints: the models deployed on them, their replicas and their traffic.

https://cloud.google.com/vertex-ai/docs/predictions/deploy-model-api
An `endpoint` document is the Endpoint resource as it is stored; what depends on the moment (available
replicas, the dedicated address) is added when it is read.
"""

import random
import re
from collections.abc import Callable

from sandbox import vertex_models
from sandbox.clock import now
from sandbox.context import Call, Cloud
from sandbox.conventions import check_display_name, check_labels, etag, page, update_mask
from sandbox.errors import GoogleError, invalid, not_found, precondition
from sandbox.iam import policy_methods
from sandbox.operations import OperationKind
from sandbox.serving import Serving, serving
from sandbox.store import JSON

# A letter first: up to 63 of [a-z0-9-], the last not a hyphen; a digit first: up to 9 digits, no leading
# zero (discovery document, endpoints.create, endpointId).
ENDPOINT_ID = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?|[1-9][0-9]{0,8}")
# Where records of Vertex AI's own behaviour are thin, the sandbox can behave either way (`--suppose NAME`), so that
# tests can show that the provider copes with both. docs/unverified.md has the evidence for each.
SUPPOSITIONS = {
    "no-first-traffic": "a first deployment without a traffic split gets no traffic",
    "split-required": "a first deployment without a traffic split is refused",
    "no-own-ids": "a deployed-model id of the caller's choice is refused",
    "concurrent": "an endpoint's mutations may run at the same time",
    "versioned-models": "a deployed model names its model with the version",
    "no-status": "deployed models have no status",
    "default-targets": "default autoscaling targets are written into deployed models",
    "partial-success": "a batch prediction job of which some instances failed is partially succeeded",
    "dns-scheme": "the DNS name of a dedicated endpoint begins with https://",
}

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
# Fields of dedicatedResources that only v1beta1 has.
BETA_RESOURCES = ("scaleToZeroSpec", "initialReplicaCount")
# Default targets, and metrics whose target is a percentage. The target of request_count is a number of requests a
# minute and replica: `gcloud ai endpoints deploy-model --help`, --autoscaling-metric-specs.
METRIC = "aiplatform.googleapis.com/prediction/online/"
CPU, ACCELERATOR = METRIC + "cpu/utilization", METRIC + "accelerator/duty_cycle"
DEFAULT_TARGET = 60


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


def render(cloud: Cloud, endpoint: JSON, version: str = "v1") -> JSON:
    """The Endpoint resource as one version of the API shows it."""
    answer = {key: value for key, value in endpoint.items() if key != "exposed"}
    if endpoint.get("deployedModels"):
        answer["deployedModels"] = [
            render_deployed(cloud, endpoint["name"], d, version) for d in endpoint["deployedModels"]
        ]
    # A dedicated endpoint has no DNS name before a deployment on it has succeeded. On Google the name is the
    # endpoint's own; here the sandbox's address serves all of them.
    if endpoint.get("dedicatedEndpointEnabled") and endpoint.get("exposed"):
        scheme = "https://" if "dns-scheme" in cloud.settings.suppose else ""
        answer["dedicatedEndpointDns"] = f"{scheme}127.0.0.1:{cloud.settings.port}"
    answer["etag"] = etag(endpoint, MUTABLE)
    return answer


def of_v1(deployed: JSON) -> JSON:
    """A deployed model without the fields that only v1beta1 has."""
    resources = {key: value for key, value in deployed["dedicatedResources"].items() if key not in BETA_RESOURCES}
    return {**deployed, "dedicatedResources": resources}


def render_deployed(cloud: Cloud, endpoint: str, deployed: JSON, version: str) -> JSON:
    """A deployed model; a count of zero is left out, as JSON of a protocol buffer does."""
    suppose, answer = cloud.settings.suppose, {**deployed}
    resources: JSON = dict((of_v1(deployed) if version == "v1" else deployed)["dedicatedResources"])
    if not resources.get("minReplicaCount"):
        resources.pop("minReplicaCount", None)
    if "default-targets" in suppose and not resources.get("autoscalingMetricSpecs"):
        metrics = [CPU, ACCELERATOR] if resources["machineSpec"].get("acceleratorCount") else [CPU]
        resources["autoscalingMetricSpecs"] = [{"metricName": m, "target": DEFAULT_TARGET} for m in metrics]
    answer["dedicatedResources"] = resources
    if "versioned-models" in suppose:
        answer["model"] = f"{deployed['model']}@{deployed['modelVersionId']}"
    if "no-status" not in suppose:
        available = cloud.fleet.available(endpoint, deployed["id"])
        answer["status"] = {"lastUpdateTime": now()} | ({"availableReplicaCount": available} if available else {})
    return answer


def save(cloud: Cloud, endpoint: JSON, event: str) -> None:
    """Stores an endpoint, and a snapshot of its traffic in the history. Inside a transaction."""
    endpoint["updateTime"] = now()
    for name in ("deployedModels", "trafficSplit", "labels"):
        if not endpoint.get(name):
            endpoint.pop(name, None)  # because JSON of a protocol buffer leaves empty fields out
    cloud.store.put("endpoint", endpoint["name"], endpoint)
    snapshot(cloud, endpoint, event)


def snapshot(cloud: Cloud, endpoint: JSON, event: str) -> None:
    """Records the traffic and the available replicas, for the admin route's history."""
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
    return serving(cloud.store.id, endpoint, deployed, name, version, cloud.settings.idle_seconds)


def check_alone(cloud: Cloud, name: str) -> None:
    """One mutation of an endpoint at a time, unless that is supposed to be no rule of Vertex AI's."""
    if "concurrent" not in cloud.settings.suppose:
        cloud.operations.check_alone("Endpoint", name)


def deploying(cloud: Cloud, name: str) -> list[JSON]:
    """The models that are being deployed on an endpoint."""
    return [o["request"]["deployedModel"] for o in cloud.operations.on(name) if o["kind"] == "deployModel"]


def check_traffic(split: JSON, ids: set[str]) -> None:
    """Raises INVALID_ARGUMENT unless a traffic split is empty or sums to 100 over `ids`."""
    if not split:
        return
    if unknown := sorted(set(split) - ids):
        raise invalid(f"The following DeployedModel ID(s) [{', '.join(unknown)}] do not exist.")
    if any(not 0 <= percent <= 100 for percent in split.values()):
        raise invalid("Every traffic percentage must be between 0 and 100.")
    if sum(split.values()) != 100:
        raise invalid(f"The traffic percentage values must add up to 100; they add up to {sum(split.values())}.")


# ------------------------------------------------------------------------------------------ endpoints


def check_supported(call: Call, resource: JSON, fields: tuple[str, ...], where: str) -> None:
    for name in fields:
        if resource.get(name):
            raise GoogleError("UNIMPLEMENTED", f"The sandbox does not implement {call.method.id} with {where}.{name}.")


async def create(call: Call) -> JSON:
    cloud, endpoint = call.cloud, call.body
    check_display_name(endpoint)
    check_labels(endpoint.get("labels", {}))
    check_supported(call, endpoint, UNSUPPORTED, "endpoint")
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


def _create_kind(cloud: Cloud) -> OperationKind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        def finish() -> JSON:
            endpoint = {k: v for k, v in operation["request"].items() if k != "etag"}
            endpoint["createTime"] = now()
            save(cloud, endpoint, "created")
            return render(cloud, endpoint)

        return finish

    return OperationKind("CreateEndpointOperationMetadata", "Endpoint", work)


async def get(call: Call) -> JSON:
    cloud = call.cloud
    answer = render(cloud, find(cloud, call.name), call.version)
    # https://docs.cloud.google.com/vertex-ai/docs/predictions/rolling-deployment shows this parameter and the state.
    if call.query.get("allDeploymentStates") == "true":
        unfinished = [{**d, "state": "BEING_DEPLOYED"} for d in deploying(cloud, call.name)]
        if unfinished:
            answer["deployedModels"] = answer.get("deployedModels", []) + unfinished
    return answer


async def list_(call: Call) -> JSON:
    endpoints = [render(call.cloud, e, call.version) for _, e in call.cloud.store.list("endpoint", call.name + "/")]
    return page(call, "endpoints", endpoints, "endpoint")


async def patch(call: Call) -> JSON:
    cloud, body = call.cloud, call.body
    mask = update_mask(call.query)
    for path in mask:
        if path not in MUTABLE and not path.startswith("labels."):
            raise invalid(f'Field "{path}" of an Endpoint can not be updated; these can: {", ".join(MUTABLE)}.')
    with cloud.store.transaction():
        endpoint = find(cloud, call.name)
        check_alone(cloud, call.name)
        if body.get("etag") and body["etag"] != etag(endpoint, MUTABLE):
            raise GoogleError("ABORTED", "The etag does not match the Endpoint's: read it again and repeat the change.")
        if "trafficSplit" in mask:
            check_traffic(body.get("trafficSplit", {}), {d["id"] for d in endpoint.get("deployedModels", [])})
        vertex_models.apply_mask(endpoint, body, mask)
        check_display_name(endpoint)
        check_labels(endpoint.get("labels", {}))
        save(cloud, endpoint, "patched")
    return render(cloud, endpoint, call.version)


async def delete(call: Call) -> JSON:
    cloud = call.cloud
    endpoint = find(cloud, call.name)
    busy = [d["id"] for d in deploying(cloud, call.name)]
    if ids := [d["id"] for d in endpoint.get("deployedModels", [])] + busy:
        raise precondition(
            f'The Endpoint "{call.name}" has deployed or being-deployed DeployedModel(s) with ID(s): '
            f"{', '.join(ids)}. Please undeploy them before retry."
        )
    cloud.operations.check_alone("Endpoint", call.name)
    return cloud.operations.start(call, "deleteEndpoint", call.location, call.name, {})


def _delete_kind(cloud: Cloud) -> OperationKind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        def finish() -> JSON:
            cloud.store.delete("endpoint", operation["target"])
            cloud.store.delete("policy", operation["target"])
            return {}

        return finish

    return OperationKind("DeleteOperationMetadata", "google.protobuf.Empty", work)


def kinds(cloud: Cloud) -> dict[str, OperationKind]:
    return {"createEndpoint": _create_kind(cloud), "deleteEndpoint": _delete_kind(cloud)}


METHODS = {
    f"aiplatform.projects.locations.endpoints.{name}": handler
    for name, handler in {"create": create, "get": get, "list": list_, "patch": patch, "delete": delete}.items()
} | policy_methods("aiplatform.projects.locations.endpoints", lambda call: find(call.cloud, call.name))
