"""Deployed models: deployment, undeployment and changes in place, each a long-running operation.

https://cloud.google.com/vertex-ai/docs/predictions/deploy-model-api
"""

import random
import re
import time
from collections.abc import Callable

from sandbox import vertex_models
from sandbox.clock import now
from sandbox.context import Call, Cloud
from sandbox.conventions import update_mask
from sandbox.errors import GoogleError, invalid, precondition
from sandbox.iam import check_act_as
from sandbox.operations import OperationKind
from sandbox.store import JSON
from sandbox.vertex_endpoints import (
    ACCELERATOR,
    BETA_RESOURCES,
    CPU,
    DEFAULT_TARGET,
    check_alone,
    check_supported,
    check_traffic,
    deploying,
    find,
    find_deployed,
    of_v1,
    save,
    serving_of,
)

DEPLOYED_ID = re.compile(r"[0-9]{1,10}")
# MachineSpec.machine_type: "For DeployedModel this field is optional, and the default value is …".
DEFAULT_MACHINE = "n1-standard-2"

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
RESOURCES_UNSUPPORTED = ("flexStart", "requiredReplicaCount")
# Periods of scale to zero: ScaleToZeroSpec of the discovery document; the default of an hour and the conditions:
# https://docs.cloud.google.com/gemini-enterprise-agent-platform/machine-learning/predictions/autoscaling
IDLE_PERIODS = ("minScaleupPeriod", "idleScaledownPeriod")
IDLE_DEFAULT = "3600s"


def _check_resources(call: Call, resources: JSON, endpoint: JSON, others: int) -> None:
    """Raises for replica counts that Vertex AI refuses; sets its defaults.

    `others` is the number of other models on the endpoint.
    """
    check_supported(call, resources, RESOURCES_UNSUPPORTED, "dedicated_resources")
    least = resources.setdefault("minReplicaCount", 0)
    if least < 1 and call.version == "v1":
        raise invalid(f"dedicated_resources.min_replica_count must be greater than or equal to 1; it is {least}.")
    most = resources.setdefault("maxReplicaCount", least) or max(least, 1)
    if most < least:
        raise invalid(f"max_replica_count ({most}) must not be less than min_replica_count ({least}).")
    resources["maxReplicaCount"] = most
    for metric in resources.get("autoscalingMetricSpecs", []):
        target = metric.get("target", DEFAULT_TARGET)
        if target < 1 or (target > 100 and metric.get("metricName") in (CPU, ACCELERATOR)):
            raise invalid("The target of a utilization metric must be between 1 and 100, of another at least 1.")
    if least:
        if beta := [name for name in BETA_RESOURCES if resources.get(name)]:
            raise invalid(f"dedicated_resources.{beta[0]} needs a min_replica_count of 0.")
    else:
        _check_scale_to_zero(resources, endpoint, others)


def _check_scale_to_zero(resources: JSON, endpoint: JSON, others: int) -> None:
    """Raises where scale to zero is not offered (IDLE_DEFAULT has the source); sets its defaults."""
    if not endpoint.get("dedicatedEndpointEnabled"):
        raise invalid("Scale to zero can not be enabled on shared public endpoints.")
    if others:
        raise invalid("Scale to zero is only compatible with one model per endpoint.")
    if not 1 <= resources.setdefault("initialReplicaCount", 1) <= resources["maxReplicaCount"]:
        raise invalid("initial_replica_count must be between 1 and max_replica_count.")
    spec: JSON = resources.setdefault("scaleToZeroSpec", {})
    for period in IDLE_PERIODS:
        if not 300 <= float(spec.setdefault(period, IDLE_DEFAULT).removesuffix("s")) <= 28800:
            raise invalid(f"scale_to_zero_spec.{period} must be between 300 and 28800 seconds.")


async def deploy_model(call: Call) -> JSON:
    cloud, name = call.cloud, call.name
    deployed: JSON = dict(call.body.get("deployedModel") or {})
    endpoint = find(cloud, name)
    if not deployed.get("model"):
        raise invalid("Required field deployed_model.model is not set.")
    check_supported(call, deployed, DEPLOYED_UNSUPPORTED, "deployed_model")
    if "dedicatedResources" not in deployed:
        raise invalid("Required field deployed_model.dedicated_resources is not set: the Model supports no other.")
    resources: JSON = deployed["dedicatedResources"]
    taken = {d["id"] for d in endpoint.get("deployedModels", [])}
    _check_resources(call, resources, endpoint, len(taken))
    if any(not d["dedicatedResources"]["minReplicaCount"] for d in endpoint.get("deployedModels", [])):
        raise invalid("Scale to zero is only compatible with one model per endpoint.")
    machine: JSON = resources.setdefault("machineSpec", {})
    machine.setdefault("machineType", DEFAULT_MACHINE)
    if machine.get("acceleratorCount", 0) > 0 and not machine.get("acceleratorType"):
        raise invalid("machine_spec.accelerator_count needs machine_spec.accelerator_type.")
    check_act_as(cloud, deployed.get("serviceAccount"))
    key, version = vertex_models.find_version(cloud, deployed["model"])
    if given := deployed.get("id"):
        if "no-own-ids" in cloud.settings.suppose:
            raise invalid("deployed_model.id must not be set.")
        if not DEPLOYED_ID.fullmatch(given) or int(given) == 0:
            raise invalid(f'Invalid deployed_model.id "{given}": 1-10 characters of [0-9], and not 0.')
        if given in taken:
            raise GoogleError("ALREADY_EXISTS", f'DeployedModel with ID "{given}" already exists on Endpoint {name}.')
    split: JSON = call.body.get("trafficSplit", {})
    check_traffic(split, taken | {"0"})
    if not split and not taken and "split-required" in cloud.settings.suppose:
        raise invalid("Required field traffic_split is not set.")
    check_alone(cloud, name)
    deployed.setdefault("id", str(random.randrange(10**8, 10**10)))
    deployed["model"], _, deployed["modelVersionId"] = key.partition("@")
    model = vertex_models.render(cloud, key, version)
    if not deployed.get("displayName"):
        deployed["displayName"] = model["displayName"]
    if "enableContainerLogging" in deployed:  # v1beta1's way to say it
        deployed["disableContainerLogging"] = not deployed.pop("enableContainerLogging")
    request = {"deployedModel": deployed, "trafficSplit": split, "version": key}
    return cloud.operations.start(call, "deployModel", name, name, request)


def _deploy_kind(cloud: Cloud) -> OperationKind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        name, request = operation["target"], operation["request"]
        deployed: JSON = request["deployedModel"]
        what = serving_of(cloud, name, deployed)
        cloud.operations.stage(operation, deploymentStage="GETTING_CONTAINER_IMAGE")
        await cloud.fleet.runner.fetch(what.launch.image)
        cloud.operations.stage(operation, deploymentStage="STARTING_MODEL_SERVER")
        await cloud.fleet.bring_up(what, first_replicas(deployed))

        def finish() -> JSON:
            endpoint = find(cloud, name)
            deployed["createTime"] = now()
            split: JSON = request["trafficSplit"]
            if not split and not endpoint.get("deployedModels") and "no-first-traffic" not in cloud.settings.suppose:
                # The first model on an endpoint gets all traffic: in samples of Google's, predictions work right
                # after a deployment without a split.
                split = {"0": 100}
            endpoint.setdefault("deployedModels", []).append(deployed)
            if split:
                endpoint["trafficSplit"] = {deployed["id"] if k == "0" else k: v for k, v in split.items()}
            endpoint["exposed"] = True
            operation["metadata"] = {"deploymentStage": "SUCCESSFULLY_DEPLOYED"}
            save(cloud, endpoint, "deployed")
            return {"deployedModel": of_v1(deployed)}

        return finish

    async def undo(operation: JSON) -> None:
        operation["metadata"] = {"deploymentStage": "FAILED_TO_DEPLOY"}
        await cloud.fleet.bring_down(operation["target"], operation["request"]["deployedModel"]["id"])

    return OperationKind("DeployModelOperationMetadata", "DeployModelResponse", work, undo, cancellable=False)


def first_replicas(deployed: JSON) -> int:
    """With how many replicas a deployed model starts, also when it comes back from zero."""
    resources: JSON = deployed["dedicatedResources"]
    return int(resources["minReplicaCount"] or resources["initialReplicaCount"])


async def undeploy_model(call: Call) -> JSON:
    """Takes the traffic away at once and answers; the replicas stop and the entry goes in the operation."""
    cloud, name = call.cloud, call.name
    deployed_id = call.body.get("deployedModelId", "")
    if not deployed_id:
        raise invalid("Required field deployed_model_id is not set.")
    with cloud.store.transaction():
        endpoint = find(cloud, name)
        if any(d["id"] == deployed_id for d in deploying(cloud, name)):
            raise precondition(
                f'DeployedModel with ID "{deployed_id}" remains involved in the rolling update on Endpoint {name}.'
            )
        find_deployed(endpoint, deployed_id)
        check_alone(cloud, name)
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


def _undeploy_kind(cloud: Cloud) -> OperationKind:
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

    return OperationKind("UndeployModelOperationMetadata", "UndeployModelResponse", work, undo)


def _restore(cloud: Cloud, name: str, deployed_id: str) -> None:
    """Brings the replicas of a deployed model to the number that is stored."""
    deployed = find_deployed(find(cloud, name), deployed_id)
    cloud.fleet.restore(serving_of(cloud, name, deployed), first_replicas(deployed))


# In place only: replica counts, autoscaling targets and container logging (discovery document,
# MutateDeployedModelRequest.deployedModel).
MUTABLE_DEPLOYED = (
    "dedicatedResources.minReplicaCount",
    "dedicatedResources.maxReplicaCount",
    "dedicatedResources.autoscalingMetricSpecs",
    "disableContainerLogging",
)
MUTABLE_DEPLOYED_BETA = ("dedicatedResources.scaleToZeroSpec", "dedicatedResources.initialReplicaCount")


async def mutate_deployed_model(call: Call) -> JSON:
    cloud, name = call.cloud, call.name
    wanted: JSON = call.body.get("deployedModel") or {}
    paths = update_mask({"updateMask": call.body.get("updateMask", "")})
    endpoint = find(cloud, name)
    deployed = find_deployed(endpoint, wanted.get("id", ""))
    mutable = (*MUTABLE_DEPLOYED, *(MUTABLE_DEPLOYED_BETA if call.version == "v1beta1" else ()))
    for path in paths:
        if path not in mutable:
            raise invalid(f'Field "{path}" of a DeployedModel can not be mutated; these can: {", ".join(mutable)}.')
        outer, _, inner = path.partition(".")
        source: JSON = wanted.get(outer) or {} if inner else wanted
        into: JSON = deployed.setdefault(outer, {}) if inner else deployed
        if (inner or outer) in source:
            into[inner or outer] = source[inner or outer]
        else:
            into.pop(inner or outer, None)
    resources: JSON = deployed["dedicatedResources"]
    if resources.get("minReplicaCount"):
        resources.pop("initialReplicaCount", None)  # of a model that scaled to zero before
    _check_resources(call, resources, endpoint, len(endpoint["deployedModels"]) - 1)
    check_alone(cloud, name)
    return cloud.operations.start(call, "mutateDeployedModel", name, name, {"deployedModel": deployed})


def _mutate_kind(cloud: Cloud) -> OperationKind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        name, deployed = operation["target"], operation["request"]["deployedModel"]
        what = serving_of(cloud, name, deployed)
        count = first_replicas(deployed)
        await cloud.fleet.bring_up(what, count)
        await cloud.fleet.bring_down(name, deployed["id"], keep=count)

        def finish() -> JSON:
            endpoint = find(cloud, name)
            own = [deployed if d["id"] == deployed["id"] else d for d in endpoint["deployedModels"]]
            endpoint["deployedModels"] = own
            save(cloud, endpoint, "mutated")
            return {"deployedModel": of_v1(deployed)}

        return finish

    async def undo(operation: JSON) -> None:
        name, deployed_id = operation["target"], operation["request"]["deployedModel"]["id"]
        before = find_deployed(find(cloud, name), deployed_id)
        await cloud.fleet.bring_down(name, deployed_id, keep=first_replicas(before))
        _restore(cloud, name, deployed_id)

    return OperationKind("MutateDeployedModelOperationMetadata", "MutateDeployedModelResponse", work, undo)


async def adopt(cloud: Cloud) -> None:
    """At start: brings back the replicas of everything deployed, and removes containers of nothing.

    A model that scales to zero stays there until a request comes.
    """
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


def kinds(cloud: Cloud) -> dict[str, OperationKind]:
    return {
        "deployModel": _deploy_kind(cloud),
        "undeployModel": _undeploy_kind(cloud),
        "mutateDeployedModel": _mutate_kind(cloud),
    }


METHODS = {
    f"aiplatform.projects.locations.endpoints.{name}": handler
    for name, handler in {
        "deployModel": deploy_model,
        "undeployModel": undeploy_model,
        "mutateDeployedModel": mutate_deployed_model,
    }.items()
}
