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


class GoogleError(Exception):
    """An answer that is an error: as an HTTP response, or as the error of an operation."""

    def __init__(self, status: str, message: str, *, http: int | None = None, details: list[Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.http = http or CODES[status][1]
        self.details = details

    def body(self) -> dict[str, Any]:
        """The response body, `{"error": {code, message, status}}`."""
        error: dict[str, Any] = {"code": self.http, "message": self.message, "status": self.status}
        if self.details:
            error["details"] = self.details
        return {"error": error}

    def rpc_status(self) -> dict[str, Any]:
        """The same as google.rpc.Status, which operations carry."""
        return {"code": CODES.get(self.status, (2, 500))[0], "message": self.message}


def invalid(message: str) -> GoogleError:
    return GoogleError("INVALID_ARGUMENT", message)


def precondition(message: str) -> GoogleError:
    return GoogleError("FAILED_PRECONDITION", message)


def not_found(message: str) -> GoogleError:
    return GoogleError("NOT_FOUND", message)
