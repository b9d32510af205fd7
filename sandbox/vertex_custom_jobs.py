"""Custom jobs: their methods, and what Vertex AI takes in a job's specification.

https://docs.cloud.google.com/vertex-ai/docs/training/create-custom-job
"""

import re
from collections.abc import Callable

from sandbox.context import Call, Cloud
from sandbox.conventions import check_display_name, check_encryption, check_labels, page
from sandbox.errors import invalid, not_found, precondition
from sandbox.iam import check_act_as
from sandbox.jobs import ENDED, new_job
from sandbox.operations import OperationKind
from sandbox.store import JSON
from sandbox.vertex_endpoints import check_supported

SPEC_UNSUPPORTED = (
    "persistentResourceId",
    "pscInterfaceConfig",
    "reservedIpRanges",
    "enableWebAccess",
    "enableDashboardAccess",
    "experiment",
    "experimentRun",
    "models",
    "protectedArtifactLocationId",
)
POOL_UNSUPPORTED = ("pythonPackageSpec", "nfsMounts", "lustreMounts")
# "projects/{project}/global/networks/{network}. Where {project} is a project number": CustomJobSpec.network.
NETWORK = re.compile(r"projects/\d+/global/networks/[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
# Environment variables and arguments: ContainerSpec.env, and the page on container settings.
MOST_VARIABLES, LONGEST_ARGUMENTS = 100, 100_000
# The pools: primary replica, workers, parameter servers, evaluators.
MOST_POOLS = 4
# DiskSpec of the discovery document.
DISK = {"bootDiskType": "pd-ssd", "bootDiskSizeGb": 100}
LISTED = ("displayName", "state", "createTime")


def check_spec(call: Call, spec: JSON, where: str = "job_spec") -> None:
    """Raises for a CustomJobSpec that Vertex AI refuses, or the sandbox lacks. Sets its defaults."""
    check_supported(call, spec, SPEC_UNSUPPORTED, where)
    pools: list[JSON] = spec.get("workerPoolSpecs", [])
    if not pools or not pools[0]:
        raise invalid(f"Required field {where}.worker_pool_specs is not set: the first pool has the primary replica.")
    if len(pools) > MOST_POOLS:
        raise invalid(f"At most {MOST_POOLS} worker pools are allowed; there are {len(pools)}.")
    for number, pool in enumerate(pools):
        if pool:  # "All worker pools except the first one are optional and can be skipped by providing an empty value"
            _check_pool(call, pool, number, f"{where}.worker_pool_specs[{number}]")
    if (network := spec.get("network")) and not NETWORK.fullmatch(network):
        raise invalid(f'Invalid network "{network}": projects/PROJECT_NUMBER/global/networks/NAME is expected.')
    prefix = spec.get("baseOutputDirectory", {}).get("outputUriPrefix", "")
    if prefix and not re.fullmatch(r"gs://[^/]+(/.*)?", prefix):
        raise invalid(f'Invalid output_uri_prefix "{prefix}": a Cloud Storage URI (gs://BUCKET/…) is expected.')
    timeout = spec.get("scheduling", {}).get("timeout", "0s")
    if timeout.startswith("-"):
        raise invalid("scheduling.timeout can not be negative.")
    check_act_as(call.cloud, spec.get("serviceAccount"))
    if tensorboard := spec.get("tensorboard"):
        spec["tensorboard"] = tensorboard = call.cloud.projects.by_id(tensorboard)
        if not spec.get("serviceAccount"):
            raise invalid("service_account must be set when tensorboard is.")
        if not call.cloud.store.get("tensorboard", tensorboard):
            raise not_found(f"Tensorboard {tensorboard} is not found.")


def _check_pool(call: Call, pool: JSON, number: int, where: str) -> None:
    check_supported(call, pool, POOL_UNSUPPORTED, where)
    container: JSON = pool.get("containerSpec", {})
    if not container.get("imageUri"):
        raise invalid(f"Required field {where}.container_spec.image_uri is not set.")
    if not pool.get("machineSpec", {}).get("machineType"):
        raise invalid(f"Required field {where}.machine_spec.machine_type is not set.")
    machine: JSON = pool["machineSpec"]
    if machine.get("acceleratorCount", 0) > 0 and not machine.get("acceleratorType"):
        raise invalid(f"{where}.machine_spec.accelerator_count needs machine_spec.accelerator_type.")
    count = int(pool.setdefault("replicaCount", "1"))
    if count < 1 or (number == 0 and count != 1):
        raise invalid(f"{where}.replica_count must be {'1' if number == 0 else 'at least 1'}; it is {count}.")
    if len(container.get("env", [])) > MOST_VARIABLES:
        raise invalid(f"{where}.container_spec.env can have at most {MOST_VARIABLES} variables.")
    if sum(map(len, container.get("args", []))) > LONGEST_ARGUMENTS:
        raise invalid(f"{where}.container_spec.args can have at most {LONGEST_ARGUMENTS} characters.")
    pool["diskSpec"] = {**DISK, **pool.get("diskSpec", {})}


def check_common(call: Call) -> None:
    """Raises for what is wrong in the fields that jobs and tensorboards have in common."""
    check_display_name(call.body)
    check_labels(call.body.get("labels", {}))
    check_encryption(call.body, call.location)


def find(cloud: Cloud, name: str) -> JSON:
    """The job's document. Raises NOT_FOUND."""
    job = cloud.jobs.find(name)
    if not job:
        raise not_found(f"CustomJob {name} is not found.")
    return job


async def create(call: Call) -> JSON:
    resource: JSON = call.body
    check_common(call)
    check_spec(call, resource.setdefault("jobSpec", {}))
    made = new_job(call.location, "customJobs", resource)
    with call.cloud.store.transaction():
        call.cloud.jobs.put(made, call.fault)
        call.cloud.jobs.say(made["name"], "Waiting for job to be provisioned.")
    call.cloud.jobs.start(made["name"])
    return made


async def get(call: Call) -> JSON:
    resource: JSON = find(call.cloud, call.name)["resource"]
    return resource


async def list_(call: Call) -> JSON:
    """The jobs that somebody created, the newest first; those of trials are read by their names only."""
    jobs = [job["resource"] for _, job in call.cloud.store.list("customJob", call.name + "/") if not job["trial"]]
    jobs.sort(key=lambda job: str(job["createTime"]), reverse=True)
    return page(call, "customJobs", jobs, "custom_job", LISTED)


async def cancel(call: Call) -> JSON:
    find(call.cloud, call.name)
    call.cloud.jobs.cancel(call.name)
    return {}


async def delete(call: Call) -> JSON:
    job = find(call.cloud, call.name)
    if job["resource"]["state"] not in ENDED:
        raise precondition(
            f"CustomJob {call.name} is in state {job['resource']['state']}: cancel it before its deletion."
        )
    return call.cloud.operations.start(call, "deleteCustomJob", call.location, call.name, {})


def deletion(cloud: Cloud, kind: str, also: Callable[[JSON], None] = lambda document: None) -> OperationKind:
    """The operation that deletes a document of a kind, such as `customJob`; `also` deletes what belongs to it."""

    async def work(operation: JSON) -> Callable[[], JSON]:
        def finish() -> JSON:
            if document := cloud.store.get(kind, operation["target"]):
                also(document)
            cloud.store.delete(kind, operation["target"])
            return {}

        return finish

    return OperationKind("DeleteOperationMetadata", "google.protobuf.Empty", work)


def kinds(cloud: Cloud) -> dict[str, OperationKind]:
    return {"deleteCustomJob": deletion(cloud, "customJob")}


METHODS = {
    f"aiplatform.projects.locations.customJobs.{name}": handler
    for name, handler in {"create": create, "get": get, "list": list_, "cancel": cancel, "delete": delete}.items()
}
