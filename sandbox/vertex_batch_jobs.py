"""Batch prediction jobs: their methods, and what Vertex AI takes in one.

https://docs.cloud.google.com/vertex-ai/docs/predictions/get-batch-predictions
"""

import datetime
import re

from sandbox import clock, vertex_models
from sandbox.batch_instances import INPUT_FORMATS, INSTANCE_TYPES, OUTPUT_FORMATS, InstanceError, split_uri
from sandbox.batch_jobs import ENDED, KIND
from sandbox.context import Call, Cloud
from sandbox.conventions import page
from sandbox.errors import invalid, not_found, precondition, unimplemented
from sandbox.iam import check_act_as
from sandbox.jobs import new_job
from sandbox.operations import OperationKind
from sandbox.serving import Serving, serving
from sandbox.store import JSON
from sandbox.vertex_custom_jobs import check_common, deletion
from sandbox.vertex_endpoints import check_supported

UNSUPPORTED = ("unmanagedContainerModel", "endpoint", "generateExplanation", "explanationSpec", "modelMonitoringConfig")
RESOURCES_UNSUPPORTED = ("flexStart", "spot")
KNOWN_INPUTS = (*INPUT_FORMATS, "tf-record", "tf-record-gzip", "bigquery")
KNOWN_OUTPUTS = (*OUTPUT_FORMATS, "csv", "bigquery")
MOST_REPLICAS = 10  # BatchDedicatedResources.max_replica_count: "The default value is 10."
LISTED = ("displayName", "state", "modelDisplayName", "createTime")


def find(cloud: Cloud, name: str) -> JSON:
    """The job's document. Raises NOT_FOUND."""
    job = cloud.batches.find(name)
    if not job:
        raise not_found(f"BatchPredictionJob {name} is not found.")
    return job


def _check_format(call: Call, given: str, known: tuple[str, ...], here: tuple[str, ...], field: str) -> None:
    if given not in known:
        raise invalid(f'Invalid {field} "{given}": one of {", ".join(known)}.')
    if given not in here:
        raise unimplemented(f"{call.method.id} with {field} {given}")


def _check_storage(call: Call, resource: JSON) -> None:
    """Raises for an input or an output that the job cannot have. Sets the folder of the output."""
    source, target = resource.get("inputConfig", {}), resource.get("outputConfig", {})
    check_supported(call, source, ("bigquerySource", "vertexMultimodalDatasetSource"), "input_config")
    check_supported(call, target, ("bigqueryDestination", "vertexMultimodalDatasetDestination"), "output_config")
    _check_format(call, source.get("instancesFormat", ""), KNOWN_INPUTS, INPUT_FORMATS, "instances_format")
    _check_format(call, target.get("predictionsFormat", ""), KNOWN_OUTPUTS, OUTPUT_FORMATS, "predictions_format")
    uris = source.get("gcsSource", {}).get("uris", [])
    prefix = target.get("gcsDestination", {}).get("outputUriPrefix", "")
    if not uris:
        raise invalid("Required field input_config.gcs_source.uris is not set.")
    region = call.location.rpartition("/")[2]
    try:
        for uri in [*uris, prefix.rstrip("/") + "/"]:
            name, _ = split_uri(uri)
            bucket = call.cloud.store.get("bucket", name)
            if not bucket:
                raise not_found(f"The bucket {name} of {uri} does not exist.")
            if bucket["locationType"] == "region" and bucket["location"].lower() != region:
                place = bucket["location"].lower()
                raise invalid(f"The bucket {name} is in {place}: input, output and model must be in {region}.")
    except InstanceError as error:
        raise invalid(str(error)) from None


def _check_instances(config: JSON) -> None:
    if config.get("instanceType", "") not in INSTANCE_TYPES:
        raise invalid(f'Invalid instance_type "{config["instanceType"]}": object or array.')
    if config.get("includedFields") and config.get("excludedFields"):
        raise invalid("Only one of included_fields and excluded_fields can be set.")


def _check_resources(call: Call, resource: JSON) -> None:
    """Raises for machines that the job cannot have; sets the defaults."""
    machines: JSON = resource.get("dedicatedResources", {})
    machine = machines.get("machineSpec", {})
    if not machine.get("machineType"):
        raise invalid("Required field dedicated_resources.machine_spec.machine_type is not set.")
    check_supported(call, machines, RESOURCES_UNSUPPORTED, "dedicated_resources")
    if machine.get("acceleratorCount", 0) > 0 and not machine.get("acceleratorType"):
        raise invalid("machine_spec.accelerator_count needs machine_spec.accelerator_type.")
    most = machines.setdefault("maxReplicaCount", MOST_REPLICAS)
    starting = machines.setdefault("startingReplicaCount", 1)
    if not 1 <= starting <= most:
        raise invalid(f"starting_replica_count must be between 1 and max_replica_count ({most}); it is {starting}.")
    tuning: JSON = resource.setdefault("manualBatchTuningParameters", {})
    if tuning.setdefault("batchSize", 64) < 0:
        raise invalid("manual_batch_tuning_parameters.batch_size must be positive.")
    tuning["batchSize"] = tuning["batchSize"] or 64


async def create(call: Call) -> JSON:
    resource: JSON = call.body
    check_common(call)
    check_supported(call, resource, UNSUPPORTED, "batch_prediction_job")
    if not resource.get("model"):
        raise invalid("Required field model is not set.")
    key, version = vertex_models.find_version(call.cloud, resource["model"])
    _check_storage(call, resource)
    _check_instances(resource.get("instanceConfig", {}))
    _check_resources(call, resource)
    check_act_as(call.cloud, resource.get("serviceAccount"))
    made = new_job(call.location, "batchPredictionJobs", resource)
    made["modelVersionId"] = key.partition("@")[2]
    model = vertex_models.render(call.cloud, key, version)["displayName"]
    moment = datetime.datetime.fromtimestamp(clock.time(), datetime.UTC).strftime("%Y_%m_%dT%H_%M_%S_%f")[:-3] + "Z"
    prefix = resource["outputConfig"]["gcsDestination"]["outputUriPrefix"].rstrip("/")
    # The name as records have it: prediction-creditcards_xgb-2023_07_07T09_47_04_838Z
    folder = f"{prefix}/prediction-{re.sub(r'[^A-Za-z0-9_-]', '_', model)}-{moment}"
    made["outputInfo"] = {"gcsOutputDirectory": folder}
    with call.cloud.store.transaction():
        call.cloud.store.put(KIND, made["name"], {"resource": made, "fault": call.fault})
    call.cloud.batches.start(made["name"])
    return made


def serving_of(cloud: Cloud, resource: JSON) -> Serving:
    """How a job's replicas are started: as those of a deployed model, on an endpoint of the job's own."""
    model = resource["model"].partition("@")[0]
    name, version = vertex_models.find_version(cloud, f"{model}@{resource['modelVersionId']}")
    machines = {"machineSpec": resource["dedicatedResources"]["machineSpec"], "minReplicaCount": 1}
    deployed = {"id": resource["name"].rpartition("/")[2], "dedicatedResources": machines}
    return serving(cloud.store.id, resource["name"], deployed, name, version)


async def get(call: Call) -> JSON:
    resource: JSON = find(call.cloud, call.name)["resource"]
    return resource


async def list_(call: Call) -> JSON:
    """The newest first."""
    jobs = [job["resource"] for _, job in call.cloud.store.list(KIND, call.name + "/")]
    jobs.sort(key=lambda job: str(job["createTime"]), reverse=True)
    return page(call, "batchPredictionJobs", jobs, "batch_prediction_job", LISTED)


async def cancel(call: Call) -> JSON:
    find(call.cloud, call.name)
    call.cloud.batches.cancel(call.name)
    return {}


async def delete(call: Call) -> JSON:
    state = find(call.cloud, call.name)["resource"]["state"]
    if state not in ENDED:
        raise precondition(f"BatchPredictionJob {call.name} is in state {state}: cancel it before its deletion.")
    return call.cloud.operations.start(call, "deleteBatchPredictionJob", call.location, call.name, {})


def kinds(cloud: Cloud) -> dict[str, OperationKind]:
    return {"deleteBatchPredictionJob": deletion(cloud, KIND)}


METHODS = {
    f"aiplatform.projects.locations.batchPredictionJobs.{name}": handler
    for name, handler in {"create": create, "get": get, "list": list_, "cancel": cancel, "delete": delete}.items()
}
