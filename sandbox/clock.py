"""The sandbox's clock. A test can put it forward, so that a period of an hour ends at once."""

import datetime
import time as _time

_ahead = 0.0


def time() -> float:
    """Seconds since 1970."""
    return _time.time() + _ahead


def now(timespec: str = "microseconds") -> str:
    """The time as Google's APIs write it: RFC 3339 with a Z. Cloud Storage has `milliseconds`."""
    return rfc3339(time(), timespec)


def rfc3339(seconds: float, timespec: str = "microseconds") -> str:
    """A time in seconds since 1970, as `now` writes it."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


def seconds(time: str) -> float:
    """A time as `now` writes it, in seconds since 1970."""
    return datetime.datetime.fromisoformat(time).timestamp()


def advance(seconds: float) -> None:
    """Puts the clock forward until the process ends."""
    global _ahead
    _ahead += seconds
