"""Contexts of Vertex ML Metadata, as far as experiments of pipelines need them; executions and artifacts are not here.

An experiment is a context, each pipeline and each of its runs has one, and a run is in an experiment if its context is
a child of the experiment's: https://docs.cloud.google.com/vertex-ai/docs/experiments/intro-vertex-ai-experiments
"""

import re
from collections.abc import Callable

from sandbox import clock
from sandbox.context import Call, Cloud
from sandbox.conventions import page
from sandbox.errors import GoogleError, invalid, not_found
from sandbox.operations import OperationKind
from sandbox.store import JSON

ID = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")
PARENTS = 10  # of one context, by the discovery document
VERSION = "0.0.1"  # of the schemas
FILTERED = ("displayName", "schemaTitle", "createTime", "updateTime", "parentContexts")


def of_job(cloud: Cloud, job: JSON) -> JSON:
    """The fields of a PipelineJob's jobDetail with its contexts, which it has from its start on."""
    if "startTime" not in job:
        return {}
    location, _, job_id = job["name"].rpartition("/pipelineJobs/")
    contexts = f"{location}/metadataStores/default/contexts"
    pipeline = f"{contexts}/{job['pipelineSpec']['pipelineInfo']['name']}"
    run = f"{contexts}/{job_id}"
    times = {"createTime": job["startTime"], "updateTime": job.get("endTime", job["startTime"])}
    mine = {"name": pipeline, "schemaTitle": "system.Pipeline", "schemaVersion": VERSION, **times}
    run_context = {"name": run, "displayName": job_id, "schemaTitle": "system.PipelineRun", "schemaVersion": VERSION}
    return {
        "pipelineContext": mine,
        "pipelineRunContext": {**run_context, **times, "parentContexts": [pipeline, *_added(cloud, run)]},
    }


def _added(cloud: Cloud, name: str) -> list[str]:
    found: list[str] = (cloud.store.get("context-parents", name) or {}).get("names", [])
    return found


def find(cloud: Cloud, name: str) -> JSON:
    """A context, also that of a pipeline job. Raises NOT_FOUND."""
    if found := cloud.store.get("context", name):
        parents = _added(cloud, name)
        return {**found, **({"parentContexts": parents} if parents else {})}
    store, _, context = name.rpartition("/contexts/")
    location = store.removesuffix("/metadataStores/default")
    document = cloud.pipelines.find(f"{location}/pipelineJobs/{context}")
    if document and (shown := of_job(cloud, document["resource"])):
        run: JSON = shown["pipelineRunContext"]
        return run
    raise not_found(f"Context {name} is not found.")


def _check_store(cloud: Cloud, name: str) -> JSON:
    """The metadata store, which a pipeline job makes, too. Raises NOT_FOUND."""
    if found := cloud.store.get("metadata-store", name):
        return found
    jobs = cloud.store.list("pipelineJob", name.removesuffix("metadataStores/default") + "pipelineJobs/")
    first = min((document["resource"]["createTime"] for _, document in jobs), default="")
    if not first or not name.endswith("/default"):
        raise not_found(f"MetadataStore {name} is not found.")
    return {"name": name, "createTime": first, "updateTime": first, "state": {}}


async def get_store(call: Call) -> JSON:
    return _check_store(call.cloud, call.name)


async def create_store(call: Call) -> JSON:
    store_id = call.query.get("metadataStoreId", "default")
    if store_id != "default":
        raise GoogleError("UNIMPLEMENTED", "The sandbox implements the metadata store `default` only.")
    name = f"{call.location}/metadataStores/{store_id}"
    if call.cloud.store.get("metadata-store", name):
        raise GoogleError("ALREADY_EXISTS", f"MetadataStore {name} already exists.")
    return call.cloud.operations.start(call, "createMetadataStore", name, name, {**call.body, "name": name})


async def create(call: Call) -> JSON:
    _check_store(call.cloud, call.name.removesuffix("/contexts"))
    context_id = call.query.get("contextId", "")
    if not ID.fullmatch(context_id):
        raise invalid(f'Invalid context_id "{context_id}": at most 128 of a-z, 0-9 and -, no - first.')
    name = f"{call.name}/{context_id}"
    if call.cloud.store.get("context", name):
        raise GoogleError("ALREADY_EXISTS", f"Context {name} already exists.")
    now = clock.now()
    made = {**call.body, "name": name, "createTime": now, "updateTime": now}
    call.cloud.store.put("context", name, made)
    return made


async def get(call: Call) -> JSON:
    return find(call.cloud, call.name)


async def list_(call: Call) -> JSON:
    cloud, location = call.cloud, call.location
    _check_store(cloud, call.name.removesuffix("/contexts"))
    names = [name for name, _ in cloud.store.list("context", call.name + "/")]
    jobs = cloud.store.list("pipelineJob", f"{location}/pipelineJobs/")
    names += [f"{call.name}/{name.rpartition('/')[2]}" for name, job in jobs if of_job(cloud, job["resource"])]
    return page(call, "contexts", [find(cloud, name) for name in names], "context_id", FILTERED, ("createTime",))


async def add_children(call: Call) -> JSON:
    find(call.cloud, call.name)
    children = [call.cloud.projects.by_id(name) for name in call.body.get("childContexts", [])]
    for child in children:
        find(call.cloud, child)
        if child == call.name:
            raise invalid(f"Context {child} can not be its own child.")
        if len({*_added(call.cloud, child), call.name}) > PARENTS:
            raise invalid(f"Context {child} has {PARENTS} parents already.")
    with call.cloud.store.transaction():
        for child in children:
            names = list(dict.fromkeys([*_added(call.cloud, child), call.name]))
            call.cloud.store.put("context-parents", child, {"names": names})
    return {}


def kinds(cloud: Cloud) -> dict[str, OperationKind]:
    async def made(operation: JSON) -> Callable[[], JSON]:
        def finish() -> JSON:
            now = clock.now()
            store: JSON = {**operation["request"], "createTime": now, "updateTime": now}
            cloud.store.put("metadata-store", store["name"], store)
            return store

        return finish

    return {"createMetadataStore": OperationKind("CreateMetadataStoreOperationMetadata", "MetadataStore", made)}


METHODS = {
    "aiplatform.projects.locations.metadataStores.get": get_store,
    "aiplatform.projects.locations.metadataStores.create": create_store,
    "aiplatform.projects.locations.metadataStores.contexts.create": create,
    "aiplatform.projects.locations.metadataStores.contexts.get": get,
    "aiplatform.projects.locations.metadataStores.contexts.list": list_,
    "aiplatform.projects.locations.metadataStores.contexts.addContextChildren": add_children,
}
