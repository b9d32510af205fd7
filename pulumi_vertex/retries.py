"""Which refusals pass by themselves, and the loop that waits for them: look, do one step, look again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from .engine_call import EngineCall
from .errors import PassingError, RefusedError

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
TRIES: Final = 10  # of one request, about a minute in all


@dataclass(frozen=True)
class Wait:
    """A refusal that passes by itself: how it is recognised, how long it is waited out, and who says so."""

    status: frozenset[str]
    text: str
    seconds: float
    why: str
    source: str


WAITED_OUT: Final = (
    Wait(
        frozenset({"PERMISSION_DENIED"}),
        "has not been used in project",
        300,
        "the Vertex AI API was enabled a moment ago",
        "the answer itself: 'If you enabled this API recently, wait a few minutes'",
    ),
    Wait(
        frozenset({"FAILED_PRECONDITION"}),
        "Service agents are being provisioned",
        600,
        "Google is making the Vertex AI service agent of this project",
        "the answer itself, and https://cloud.google.com/vertex-ai/docs/general/access-control#service-agents",
    ),
    Wait(
        frozenset({"FAILED_PRECONDITION"}),
        "other operations running",
        600,
        "another operation is running there",
        "Vertex AI's words for a RagCorpus; for models and endpoints they are assumed",
    ),
    Wait(
        frozenset({"FAILED_PRECONDITION"}),
        "rolling update",
        7200 + 1800,
        "a deployment is running there",
        "Vertex AI's words for a model that is being deployed, as recorded: docs/unverified.md",
    ),
    Wait(
        frozenset({"ABORTED"}),
        "",
        600,
        "somebody else changed it at the same time",
        "https://google.aip.dev/193 and google.rpc.Code: ABORTED is to be tried again from the reading on",
    ),
)
HELD_AFTER_UNDEPLOY: Final = Wait(
    frozenset({"FAILED_PRECONDITION", "INVALID_ARGUMENT"}),
    "deployed",
    180,
    "it is still held by the endpoint that it was undeployed from",
    "https://github.com/googleapis/python-aiplatform/issues/2807",
)


def pauses() -> Iterator[float]:
    """Growing pauses: 0.2 s at first, 10 s at most."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(pause * 1.6, LONGEST_PAUSE)


def repeated(call: EngineCall, send: Callable[[], T]) -> T:
    """The result of `send`, which changes nothing or may be done twice: repeated while its fault may pass."""
    delays = pauses()
    for _ in range(TRIES - 1):
        call.check()
        try:
            return send()
        except PassingError:
            call.pause(next(delays))
    return send()


def converge(call: EngineCall, step: Callable[[], bool], also: tuple[Wait, ...] = ()) -> None:
    """Calls `step` until it says that nothing is left to do.

    Each step looks at what is there first, so it is safe after any failure: passing faults are tried again with growing
    pauses, the refusals of WAITED_OUT (and `also`) are waited out, and everything else is raised at once.
    """
    faults, delays = 0, pauses()
    refused: dict[Wait, float] = {}
    while True:
        call.check()
        try:
            if step():
                return
        except PassingError:
            faults += 1
            if faults >= TRIES:
                raise
        except RefusedError as error:
            waits = (w for w in (*also, *WAITED_OUT) if error.status in w.status and w.text in str(error))
            wait = next(waits, None)
            if wait is None or time.monotonic() - refused.setdefault(wait, time.monotonic()) > wait.seconds:
                raise
            call.say(f"waiting: {wait.why}")
        else:
            faults, delays = 0, pauses()
            continue
        call.pause(next(delays))
