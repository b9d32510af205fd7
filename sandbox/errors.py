"""Errors as Google's REST APIs answer them."""

from typing import Any

# google.rpc.Code: name → (number in an operation's error, HTTP status).
# https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
CODES = {
    "CANCELLED": (1, 499),
    "UNKNOWN": (2, 500),
    "INVALID_ARGUMENT": (3, 400),
    "DEADLINE_EXCEEDED": (4, 504),
    "NOT_FOUND": (5, 404),
    "ALREADY_EXISTS": (6, 409),
    "PERMISSION_DENIED": (7, 403),
    "RESOURCE_EXHAUSTED": (8, 429),
    "FAILED_PRECONDITION": (9, 400),
    "ABORTED": (10, 409),
    "UNIMPLEMENTED": (12, 501),
    "INTERNAL": (13, 500),
    "UNAVAILABLE": (14, 503),
    "UNAUTHENTICATED": (16, 401),
}

# For a status that arrives as a number only (a container's answer, a fault on demand).
STATUS_OF_HTTP = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}

# Three shapes of errors are on record: {code, message, status} is the usual one; IAM adds `errors`; Cloud Storage and
# Compute Engine have `errors` and no status. The reasons in `errors` differ too.
LISTED = {"iam", "storage", "compute"}
WITHOUT_STATUS = {"storage", "compute"}
_REASONS = {
    400: "badRequest",
    401: "authError",
    403: "forbidden",
    404: "notFound",
    409: "conflict",
    412: "conditionNotMet",
    416: "requestedRangeNotSatisfiable",
    429: "rateLimitExceeded",
    501: "notImplemented",
}
_OWN_REASONS = {
    "iam": {"ALREADY_EXISTS": "alreadyExists", "ABORTED": "aborted", "FAILED_PRECONDITION": "failedPrecondition"},
    "storage": {"INVALID_ARGUMENT": "invalid"},
}


class GoogleError(Exception):
    """An answer that is an error: as an HTTP response, or as the error of an operation.

    `reason` and `domain` stand in `errors`, where an API has it; the status decides the reason where none is given.
    """

    def __init__(
        self,
        status: str,
        message: str,
        *,
        http: int | None = None,
        details: list[Any] | None = None,
        reason: str = "",
        domain: str = "global",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.http = http or CODES[status][1]
        self.details = details
        self.reason = reason
        self.domain = domain

    def body(self, api: str) -> dict[str, Any]:
        """The response body, `{"error": …}`, in the shape of an API, such as `storage`."""
        error: dict[str, Any] = {"code": self.http, "message": self.message}
        if api in LISTED:
            own = _OWN_REASONS.get(api, {}).get(self.status)
            reason = self.reason or own or _REASONS.get(self.http, "backendError")
            error["errors"] = [{"message": self.message, "domain": self.domain, "reason": reason}]
        if api not in WITHOUT_STATUS:
            error["status"] = self.status
            if self.details:
                error["details"] = self.details
        return {"error": error}

    def rpc_status(self) -> dict[str, Any]:
        """The same as google.rpc.Status, which operations carry."""
        return {"code": CODES.get(self.status, (2, 500))[0], "message": self.message}


def error_violations(api: str, status: int, body: Any) -> list[str]:
    """The departures of an error's body from the shape of an API's errors; empty if it fits."""
    error = body.get("error") if isinstance(body, dict) else None
    wanted = {"code", "message"} | ({"errors"} if api in LISTED else set())
    wanted |= set() if api in WITHOUT_STATUS else {"status"}
    if (
        isinstance(error, dict)
        and error.get("code") == status
        and set(error) - {"details"} == wanted
        and all(isinstance(error[name], str) for name in wanted & {"message", "status"})
        and all({"message", "domain", "reason"} <= set(entry) for entry in error.get("errors", []))
    ):
        return []
    return [f"not the shape of this API's errors: {str(body)[:200]}"]


def invalid(message: str) -> GoogleError:
    return GoogleError("INVALID_ARGUMENT", message)


def precondition(message: str) -> GoogleError:
    return GoogleError("FAILED_PRECONDITION", message)


def not_found(message: str) -> GoogleError:
    return GoogleError("NOT_FOUND", message)


def unimplemented(what: str) -> GoogleError:
    """501 for a method, field or value that Google supports and the sandbox does not. The message names it."""
    return GoogleError("UNIMPLEMENTED", f"The sandbox does not implement {what}.")
