"""How requests to Cloud Storage are read: their paths, and the preconditions in their queries."""

import urllib.parse

from starlette.requests import Request

from sandbox.context import Call
from sandbox.errors import GoogleError
from sandbox.store import JSON

# First segments of its paths; uploads and downloads have their own.
ROOTS = ("storage", "upload", "download", "resumable")


def route_of(request: Request) -> tuple[str, str]:
    """(HTTP method, path) of the API method that a request means; the path's segments are still encoded.

    Names of objects may have any character, so they are decoded after the path is split.
    """
    raw: bytes = request.scope["raw_path"]
    path = raw.decode("ascii").partition("?")[0].partition("storage/")[2]
    uploading = request.method == "PUT" and "upload_id" in request.query_params
    return "POST" if uploading else request.method, path.replace(":", "%3A")


def names(call: Call) -> list[str]:
    """`[bucket]` or `[bucket, object]` of the path."""
    return [urllib.parse.unquote(p) for p in call.name.split("/")[1::2]]


def check_conditions(call: Call, resource: JSON | None) -> None:
    """Raises 412 unless the query's preconditions hold for `resource`; None is a resource that does not exist."""
    for name in ("generation", "metageneration"):
        actual = str(resource[name]) if resource and name in resource else "0"
        wanted = call.query.get(f"if{name.capitalize()}Match")
        unwanted = call.query.get(f"if{name.capitalize()}NotMatch")
        if (wanted is not None and wanted != actual) or (unwanted is not None and unwanted == actual):
            raise GoogleError(
                "FAILED_PRECONDITION", "At least one of the pre-conditions you specified did not hold.", http=412
            )
