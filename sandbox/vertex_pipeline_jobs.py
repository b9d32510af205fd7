"""Pipeline jobs: their methods, and the templates that they name.

https://docs.cloud.google.com/vertex-ai/docs/pipelines/run-pipeline
"""

import hashlib
import random
import re
from collections.abc import Callable
from typing import Any

import yaml

from sandbox import clock, vertex_contexts
from sandbox.artifact_registry import packages
from sandbox.context import Call, Cloud
from sandbox.conventions import check_encryption, check_labels, page
from sandbox.errors import GoogleError, invalid, not_found, precondition
from sandbox.iam import check_act_as
from sandbox.operations import OperationKind
from sandbox.pipelines.details import task_details
from sandbox.pipelines.runs import BILLING, ENDED
from sandbox.pipelines.templates import FOLDER, check_arguments, check_template, output_folder
from sandbox.projects import project_number
from sandbox.storage.contents import content_file, live_object
from sandbox.store import JSON
from sandbox.vertex_custom_jobs import NETWORK, deletion

UNSUPPORTED = ("reservedIpRanges", "pscInterfaceConfig")
RUNTIME_UNSUPPORTED = ("parameters", "inputArtifacts")
MOST_IN_BATCH = 32
JOB_ID = re.compile(r"[a-z][-a-z0-9]{0,127}")
# Fields that a filter of the list may name; pipelineName is in none of the resource's own.
LISTED = ("displayName", "state", "createTime", "updateTime", "endTime", "pipelineName", "scheduleName", "templateUri")
ORDERED = ("createTime", "updateTime", "startTime", "endTime", "displayName")


# -------------------------------------------------------------------------------------------------------- templates


def read_template(cloud: Cloud, uri: str) -> tuple[JSON, JSON]:
    """The PipelineSpec at a URI, and the templateMetadata of one in Artifact Registry. Raises where there is none."""
    metadata: JSON = {}
    if found := re.fullmatch(r"gs://([^/]+)/(.+)", uri):
        item = live_object(cloud.store, found[1], found[2]) if cloud.store.get("bucket", found[1]) else None
        if not item:
            raise not_found(f"The template {uri} is not found.")
        content = content_file(cloud.store, item["file"]).read_bytes()
    else:
        content = packages.fetch(cloud, uri)
        metadata = {"version": f"sha256:{hashlib.sha256(content).hexdigest()}"}
    try:
        spec = next(iter(yaml.safe_load_all(content)), None)  # a second document is for Kubernetes
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise invalid(f"The template {uri} is no YAML: {error}") from None
    if not isinstance(spec, dict):
        raise invalid(f"The template {uri} is no pipeline; compile one with kfp.compiler.Compiler().compile().")
    return spec.get("pipelineSpec", spec), metadata


def prepare(cloud: Cloud, location: str, resource: JSON) -> tuple[JSON, JSON]:
    """A new job's resource with its template, and its arguments. Raises for what Vertex AI refuses or is not done."""
    for where, part, names in (
        ("pipeline_job", resource, UNSUPPORTED),
        ("pipeline_job.runtime_config", resource.get("runtimeConfig", {}), RUNTIME_UNSUPPORTED),
    ):
        check_supported_in(part, names, where)
    if len(resource.get("displayName", "")) > 128:
        raise invalid(f"display_name can be up to 128 characters long; it has {len(resource['displayName'])}.")
    check_labels(resource.get("labels", {}))
    check_encryption(resource, location)
    if (network := resource.get("network")) and not NETWORK.fullmatch(network):
        raise invalid(f'Invalid network "{network}": projects/PROJECT_NUMBER/global/networks/NAME is expected.')
    check_act_as(cloud, resource.get("serviceAccount"))
    resource = dict(resource)
    if not resource.get("pipelineSpec"):
        if not resource.get("templateUri"):
            raise invalid("Required field pipeline_spec or template_uri is not set.")
        resource["pipelineSpec"], metadata = read_template(cloud, resource["templateUri"])
        if metadata:
            resource["templateMetadata"] = metadata
    check_template(resource["pipelineSpec"])
    arguments = check_arguments(resource["pipelineSpec"], resource.get("runtimeConfig", {}).get("parameterValues", {}))
    folder = FOLDER.fullmatch(output_folder(resource))
    assert folder is not None
    bucket, number = cloud.store.get("bucket", folder[1]), project_number(location.split("/")[1])
    if not bucket or bucket["projectNumber"] != number:
        account = resource.get("serviceAccount") or f"{number}-compute@developer.gserviceaccount.com"
        raise precondition(
            f"Failed to create pipeline job. Error: Service account `{account}` does not have `[storage.objects.get, "
            f"storage.objects.create]` IAM permission(s) to the bucket `{folder[1]}`. (The project has no such bucket "
            "in the sandbox: create it.)"
        )
    return resource, arguments


def check_supported_in(part: JSON, names: tuple[str, ...], where: str) -> None:
    for name in names:
        if part.get(name):
            raise GoogleError("UNIMPLEMENTED", f"The sandbox does not implement {where} with {name}.")


def begin(cloud: Cloud, location: str, job_id: str, prepared: tuple[JSON, JSON], **more: Any) -> JSON:
    """Stores a job and starts it. `more` is the fault of the call, and the schedule and its time."""
    resource, arguments = prepared
    now = clock.now()
    labels = {**resource.get("labels", {}), BILLING: str(random.randrange(10**17, 9 * 10**17))}
    made = {
        **{k: v for k, v in resource.items() if v not in ({}, [])},
        "name": f"{location}/pipelineJobs/{job_id}",
        "state": "PIPELINE_STATE_PENDING",
        "createTime": now,
        "updateTime": now,
        "labels": labels,
        **({"scheduleName": more["schedule"]} if more.get("schedule") else {}),
    }
    with cloud.store.transaction():
        cloud.pipelines.put(made, arguments, more.get("fault", {}), more.get("scheduled", ""))
    cloud.pipelines.start(made["name"])
    return made


# ---------------------------------------------------------------------------------------------------------- methods


def find(cloud: Cloud, name: str) -> JSON:
    """The job's document. Raises NOT_FOUND."""
    document = cloud.pipelines.find(name)
    if not document:
        raise not_found(f"PipelineJob {name} is not found.")
    return document


async def create(call: Call) -> JSON:
    wanted = call.query.get("pipelineJobId", call.query.get("pipeline_job_id", ""))
    if wanted and not JOB_ID.fullmatch(wanted):
        raise invalid(f'Invalid pipeline_job_id "{wanted}": at most 128 of a-z, 0-9 and -, a letter first.')
    job_id = wanted or str(random.randrange(10**18, 9 * 10**18))
    if call.cloud.pipelines.find(f"{call.location}/pipelineJobs/{job_id}"):
        raise GoogleError("ALREADY_EXISTS", f"PipelineJob {call.location}/pipelineJobs/{job_id} already exists.")
    prepared = prepare(call.cloud, call.location, call.body)
    return begin(call.cloud, call.location, job_id, prepared, fault=call.fault)


async def get(call: Call) -> JSON:
    document = find(call.cloud, call.name)
    resource: JSON = document["resource"]
    if details := task_details(document, call.cloud.jobs.find):
        return {**resource, "jobDetail": {"taskDetails": details, **vertex_contexts.of_job(call.cloud, resource)}}
    return resource


async def list_(call: Call) -> JSON:
    """The jobs, the newest first, without jobDetail."""
    by_id = call.cloud.projects.by_id
    items = []
    for _, document in call.cloud.store.list("pipelineJob", call.name + "/"):
        resource = document["resource"]
        items.append({**resource, "pipelineName": resource["pipelineSpec"]["pipelineInfo"]["name"]})
    items.sort(key=lambda job: str(job["createTime"]), reverse=True)
    query = dict(call.query)
    if "filter" in query:  # names of schedules may have the project's number
        query["filter"] = re.sub(r"projects/[^/\s\"]+", lambda match: by_id(match[0]), query["filter"])
    answer = page(_Query(query), "pipelineJobs", items, "pipeline_job_user_id", LISTED, ORDERED)
    for item in answer.get("pipelineJobs", []):
        item.pop("pipelineName", None)
    return answer


class _Query:
    def __init__(self, query: dict[str, str]) -> None:
        self.query = query


async def cancel(call: Call) -> JSON:
    find(call.cloud, call.name)
    call.cloud.pipelines.cancel(call.name)
    return {}


def _check_ended(document: JSON, name: str) -> None:
    if (state := document["resource"]["state"]) not in ENDED:
        raise precondition(f"PipelineJob {name} is in state {state}: cancel it before its deletion.")


async def delete(call: Call) -> JSON:
    _check_ended(find(call.cloud, call.name), call.name)
    return call.cloud.operations.start(call, "deletePipelineJob", call.location, call.name, {})


def _batch(call: Call) -> dict[str, JSON]:
    """The documents of the jobs that a batch names, by their names."""
    names = [call.cloud.projects.by_id(name) for name in call.body.get("names", [])]
    if not 1 <= len(names) <= MOST_IN_BATCH:
        raise invalid(f"names must name 1 to {MOST_IN_BATCH} PipelineJobs; there are {len(names)}.")
    return {name: find(call.cloud, name) for name in names}


async def batch_cancel(call: Call) -> JSON:
    names = list(_batch(call))
    for name in names:
        call.cloud.pipelines.cancel(name)
    return call.cloud.operations.start(call, "batchCancelPipelineJobs", call.location, call.name, {"names": names})


async def batch_delete(call: Call) -> JSON:
    found = _batch(call)
    for name, document in found.items():
        _check_ended(document, name)
    return call.cloud.operations.start(call, "batchDeletePipelineJobs", call.location, call.name, {"names": [*found]})


def kinds(cloud: Cloud) -> dict[str, OperationKind]:
    def all_of(operation: JSON) -> list[JSON]:
        found = (cloud.pipelines.find(name) for name in operation["request"]["names"])
        return [document["resource"] for document in found if document]

    async def cancelled(operation: JSON) -> Callable[[], JSON]:
        return lambda: {"pipelineJobs": all_of(operation)}

    async def deleted(operation: JSON) -> Callable[[], JSON]:
        def finish() -> JSON:
            resources = all_of(operation)
            for resource in resources:
                cloud.store.delete("pipelineJob", resource["name"])
            return {"pipelineJobs": resources}

        return finish

    return {
        "deletePipelineJob": deletion(cloud, "pipelineJob"),
        "batchCancelPipelineJobs": OperationKind(
            "BatchCancelPipelineJobsOperationMetadata", "BatchCancelPipelineJobsResponse", cancelled
        ),
        "batchDeletePipelineJobs": OperationKind("DeleteOperationMetadata", "BatchDeletePipelineJobsResponse", deleted),
    }


_HANDLERS = {"create": create, "get": get, "list": list_, "cancel": cancel, "delete": delete}
METHODS = {
    f"aiplatform.projects.locations.pipelineJobs.{name}": handler
    for name, handler in {**_HANDLERS, "batchCancel": batch_cancel, "batchDelete": batch_delete}.items()
}
