"""Tensorboards: the resources only. Experiments, runs and time series, into which logs are uploaded, are not here.

https://docs.cloud.google.com/vertex-ai/docs/experiments/tensorboard-setup
"""

import random
import uuid
from collections.abc import Callable

from sandbox import clock
from sandbox.context import Call, Cloud
from sandbox.conventions import check_display_name, etag, page, update_mask
from sandbox.errors import GoogleError, invalid, not_found
from sandbox.operations import OperationKind
from sandbox.store import JSON
from sandbox.vertex_custom_jobs import check_common, deletion
from sandbox.vertex_models import apply_mask

MUTABLE = ("displayName", "description", "labels", "isDefault")


def find(cloud: Cloud, name: str) -> JSON:
    """The stored tensorboard. Raises NOT_FOUND."""
    tensorboard = cloud.store.get("tensorboard", name)
    if not tensorboard:
        raise not_found(f"Tensorboard {name} is not found.")
    return tensorboard


def _render(tensorboard: JSON) -> JSON:
    return {**tensorboard, "etag": etag(tensorboard, MUTABLE)}


async def create(call: Call) -> JSON:
    check_common(call)
    name = f"{call.location}/tensorboards/{random.randrange(10**18, 9 * 10**18)}"
    given = {key: value for key, value in call.body.items() if key != "etag" and value not in ({}, False)}
    # Both names are made here, so that they are the same after a kill.
    made = {**given, "name": name, "blobStoragePathPrefix": f"cloud-ai-platform-{uuid.uuid4()}"}
    return call.cloud.operations.start(call, "createTensorboard", name, name, made)


async def get(call: Call) -> JSON:
    return _render(find(call.cloud, call.name))


async def list_(call: Call) -> JSON:
    found = [_render(one) for _, one in call.cloud.store.list("tensorboard", call.name + "/")]
    return page(call, "tensorboards", found, "tensorboard")


async def patch(call: Call) -> JSON:
    mask = update_mask(call.query)
    for path in mask:
        if path not in MUTABLE and not path.startswith("labels."):
            raise invalid(f'Field "{path}" of a Tensorboard can not be updated; these can: {", ".join(MUTABLE)}.')
    tensorboard = find(call.cloud, call.name)
    if call.body.get("etag") and call.body["etag"] != etag(tensorboard, MUTABLE):
        raise GoogleError("ABORTED", "The etag does not match the Tensorboard's: read it again and repeat the change.")
    apply_mask(tensorboard, call.body, mask)
    check_display_name(tensorboard)
    call.cloud.operations.check_alone("Tensorboard", call.name)
    return call.cloud.operations.start(call, "updateTensorboard", call.name, call.name, tensorboard)


async def delete(call: Call) -> JSON:
    find(call.cloud, call.name)
    call.cloud.operations.check_alone("Tensorboard", call.name)
    return call.cloud.operations.start(call, "deleteTensorboard", call.name, call.name, {})


def _saving(cloud: Cloud, metadata: str) -> OperationKind:
    async def work(operation: JSON) -> Callable[[], JSON]:
        def finish() -> JSON:
            now = clock.now()
            tensorboard = {"createTime": now, **operation["request"], "updateTime": now}
            cloud.store.put("tensorboard", tensorboard["name"], tensorboard)
            return _render(tensorboard)

        return finish

    return OperationKind(metadata, "Tensorboard", work)


def kinds(cloud: Cloud) -> dict[str, OperationKind]:
    return {
        "createTensorboard": _saving(cloud, "CreateTensorboardOperationMetadata"),
        "updateTensorboard": _saving(cloud, "UpdateTensorboardOperationMetadata"),
        "deleteTensorboard": deletion(cloud, "tensorboard"),
    }


METHODS = {
    f"aiplatform.projects.locations.tensorboards.{name}": handler
    for name, handler in {"create": create, "get": get, "list": list_, "patch": patch, "delete": delete}.items()
}
