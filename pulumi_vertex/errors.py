"""What can go wrong, by what follows from it."""

from __future__ import annotations

from .wire import Wire


class ProblemError(Exception):
    """Something that users can understand and repair. Its text is what they read."""


class RefusedError(ProblemError):
    """Vertex AI answered with an error. `status` is Google's name of it, such as NOT_FOUND."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class PassingError(ProblemError):
    """429, 503 or a dropped connection: the request may or may not have arrived. Look before repeating it."""


class StoppedError(ProblemError):
    """Ctrl-C, or `pulumi cancel`."""


class TimedOutError(ProblemError):
    """The resource's timeout, or that of one step, is over."""


class HalfMadeError(ProblemError):
    """The resource exists, but not as wanted: Pulumi keeps it, and the next update goes on from there."""

    def __init__(self, message: str, id_: str, outputs: Wire) -> None:
        super().__init__(message)
        self.id, self.outputs = id_, outputs
