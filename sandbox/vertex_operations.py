"""Vertex AI's methods on long-running operations: get, list, wait and cancel.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.operations
"""

from sandbox.context import Call
from sandbox.conventions import cut
from sandbox.errors import invalid
from sandbox.store import JSON

# What operations may be listed and read under.
OWNERS = (
    "models",
    "endpoints",
    "customJobs",
    "hyperparameterTuningJobs",
    "tensorboards",
    "pipelineJobs",
    "schedules",
    "metadataStores",
)


async def get(call: Call) -> JSON:
    operations = call.cloud.operations
    operation = operations.find(call.name)
    return operations.render(operation, call.version or operation["version"])


async def list_(call: Call) -> JSON:
    operations = call.cloud.operations
    parent = call.name.removesuffix("/operations")
    found = [o for _, o in call.cloud.store.list("operation", parent + "/")]
    if text := call.query.get("filter", "").replace(" ", "").replace('"', ""):
        wanted = {"done=true": True, "done:true": True, "done=false": False, "done:false": False}
        if text not in wanted:
            raise invalid(f'Invalid filter "{call.query["filter"]}": the sandbox understands done=true and done=false.')
        found = [o for o in found if bool(o.get("done")) == wanted[text]]
    found.sort(key=lambda o: str(o["createTime"]), reverse=True)
    rendered = [operations.render(o, call.version or o["version"]) for o in found]
    return cut(call, "operations", rendered, most=1000)


async def wait(call: Call) -> JSON:
    seconds = float((call.query.get("timeout") or "60s").removesuffix("s"))
    operation = await call.cloud.operations.wait(call.name, min(seconds, 300))
    return call.cloud.operations.render(operation, call.version or operation["version"])


async def cancel(call: Call) -> JSON:
    call.cloud.operations.cancel(call.name)
    return {}


METHODS = {
    f"aiplatform.projects.locations.{owner}operations.{name}": handler
    for owner in ("", *(f"{collection}." for collection in OWNERS))
    for name, handler in (("get", get), ("list", list_), ("wait", wait), ("cancel", cancel))
}
