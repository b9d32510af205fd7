"""Predictions: one deployed model chosen by the traffic split, one of its replicas, the limits, the errors.

https://cloud.google.com/vertex-ai/docs/predictions/get-online-predictions
"""

import json
import random

from starlette.responses import Response

from sandbox import vertex_endpoints
from sandbox.context import Call
from sandbox.discovery import read_request
from sandbox.errors import STATUS_OF_HTTP, GoogleError, invalid, precondition
from sandbox.fleet import ColdError
from sandbox.projects import project_number
from sandbox.runner import ContainerResponse, UnreachableError
from sandbox.store import JSON

# Bytes of a request and of a response, and seconds: "Choose an endpoint type",
# https://cloud.google.com/vertex-ai/docs/predictions/choose-endpoint-type
SHARED_BYTES, SHARED_SECONDS = 1_572_864, 60.0
DEDICATED_BYTES, DEDICATED_SECONDS = 10 * 2**20, 600.0
# The answer of a model that is scaled to zero, as recorded from Vertex AI.
COLD = (
    "Model is not yet ready for inference. Please wait while model completes scale-up from zero, then try your "
    "request again."
)


async def _ask(call: Call) -> tuple[JSON, ContainerResponse]:
    """(deployed model, its answer). Raises GoogleError for the limits and for replicas that fail."""
    cloud = call.cloud
    endpoint = vertex_endpoints.find(cloud, call.name)
    dedicated = endpoint.get("dedicatedEndpointEnabled")
    limit = DEDICATED_BYTES if dedicated else SHARED_BYTES
    seconds = SHARED_SECONDS
    if dedicated:
        own = endpoint.get("clientConnectionConfig", {}).get("inferenceTimeout", "")
        seconds = float(own.removesuffix("s") or DEDICATED_SECONDS)
    if len(call.raw) > limit:
        raise invalid(f"Request payload size exceeds the limit: {limit} bytes.")
    split: JSON = endpoint.get("trafficSplit", {})
    if not split:
        raise precondition(f"Endpoint {call.name} doesn't have traffic_split.")
    (chosen,) = random.choices(list(split), weights=list(split.values()))
    deployed = vertex_endpoints.find_deployed(endpoint, chosen)
    route = vertex_endpoints.serving_of(cloud, call.name, deployed).predict_route
    content_type = call.request.headers.get("content-type", "application/json")
    try:
        answer = await cloud.fleet.predict(call.name, chosen, route, call.raw, content_type, seconds)
    except UnreachableError as error:
        if error.timeout:
            raise GoogleError("DEADLINE_EXCEEDED", f"The model server gave no answer in {seconds:g} s.") from None
        raise GoogleError("UNAVAILABLE", f"The model server of DeployedModel {chosen} broke off: {error}") from None
    except ColdError:
        raise GoogleError("RESOURCE_EXHAUSTED", COLD) from None
    if answer is None:
        raise GoogleError("UNAVAILABLE", f"DeployedModel {chosen} has no available replica.")
    if len(answer.body) > limit:
        raise invalid(f"Response size too large. Received at least {len(answer.body)} bytes; max is {limit}.")
    return deployed, answer


async def predict(call: Call) -> JSON:
    if len(call.raw) <= DEDICATED_BYTES:  # otherwise its size is the error to report
        try:
            request = read_request(call.method, list(call.query), json.loads(call.raw or b"{}"))
        except ValueError as error:
            raise invalid(f"Invalid JSON payload received. {error}") from None
        if "instances" not in request:
            raise invalid("Required field instances is not set.")
    deployed, answer = await _ask(call)
    if answer.status != 200:
        # The container's own words, under its own status.
        status = STATUS_OF_HTTP.get(answer.status, "INVALID_ARGUMENT" if answer.status < 500 else "INTERNAL")
        code = answer.status if answer.status >= 400 else 500
        raise GoogleError(status, answer.body.decode(errors="replace"), http=code)
    try:
        said = json.loads(answer.body)
        predictions = said["predictions"]
        assert isinstance(predictions, list)
    except (ValueError, TypeError, KeyError, AssertionError):
        start = answer.body[:200].decode(errors="replace")
        raise GoogleError(
            "INTERNAL",
            f'The model server must answer a JSON object with a list "predictions"; it answered: {start}',
        ) from None
    model = call.cloud.store.get("model", deployed["model"])
    response: JSON = {
        "predictions": predictions,
        "deployedModelId": deployed["id"],
        "model": deployed["model"],
        "modelVersionId": deployed["modelVersionId"],
        "modelDisplayName": model["resource"]["displayName"] if model else deployed["displayName"],
    }
    if "metadata" in said:
        response["metadata"] = said["metadata"]
    return response


async def raw_predict(call: Call) -> Response:
    """Any body in, the container's status, content type and body out."""
    deployed, answer = await _ask(call)
    project = call.name.split("/")[1]
    headers = {
        "x-vertex-ai-endpoint-id": call.name.rpartition("/")[2],
        "x-vertex-ai-deployed-model-id": deployed["id"],
        "x-vertex-ai-model": deployed["model"].replace(f"/{project}/", f"/{project_number(project)}/", 1),
        "x-vertex-ai-model-version-id": deployed["modelVersionId"],
    }
    return Response(answer.body, answer.status, headers, media_type=answer.content_type or None)


METHODS = {
    "aiplatform.projects.locations.endpoints.predict": predict,
    "aiplatform.projects.locations.endpoints.rawPredict": raw_predict,
}
