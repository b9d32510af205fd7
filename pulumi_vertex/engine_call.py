"""One call of the engine: whom it concerns, how long it may take, whom it tells, and when it must stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .errors import StoppedError, TimedOutError


@dataclass(frozen=True)
class EngineCall:
    """`seconds` is the time for all of it; `custom` says that the user has set it (`custom_timeouts`).

    `say` writes the status line of the resource, `log` and `warn` write lines that stay.
    """

    urn: str
    seconds: float
    stop: threading.Event
    say: Callable[[str], None] = lambda _: None
    log: Callable[[str], None] = lambda _: None
    warn: Callable[[str], None] = lambda _: None
    custom: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def check(self) -> None:
        """Raises StoppedError or TimedOutError where the work has to end."""
        if self.stop.is_set():
            raise StoppedError("Stopped.")
        if self.left <= 0:
            raise TimedOutError(
                f"Not done within {duration(self.seconds)}. If it only needs longer, set "
                "opts=pulumi.ResourceOptions(custom_timeouts=…)."
            )

    def pause(self, seconds: float) -> None:
        self.check()
        self.stop.wait(max(0.01, min(seconds, self.left)))
        self.check()

    def limited(self, seconds: float) -> EngineCall:
        """The same call with a limit of its own for one step; the user's own timeout goes before it."""
        if self.custom:
            return self
        return replace(self, seconds=min(self.left, seconds), started=time.monotonic())

    def tidying(self, seconds: float, *, stoppable: bool = True) -> EngineCall:
        """The same call with time to tidy up after a failure, however much of its own time is gone."""
        stop = self.stop if stoppable else threading.Event()
        return replace(self, seconds=seconds, stop=stop, started=time.monotonic())


def duration(seconds: float) -> str:
    """A time in words, such as 2 h 5 min, 90 min or 12 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    if hours >= 2:
        return f"{hours} h {minutes_of_hour} min" if minutes_of_hour else f"{hours} h"
    return f"{minutes} min {rest} s" if minutes and rest else f"{minutes} min" if minutes else f"{rest} s"
