"""When a schedule fires: cron expressions of five fields, in a time zone.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.schedules says "cron" and links to
Wikipedia's five fields, with `TZ=` before them. cronsim reads more than that, so this module refuses the rest.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from typing import Any, Final
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from ..checks import Failures
from ..wire import UNKNOWN, Wire

FIELDS: Final = "minute, hour, day of the month, month, day of the week"
EXAMPLE: Final = "such as 0 3 * * 1-5, at 3:00 from Monday to Friday"
DEFAULT_ZONE: Final = "UTC"
_PLAIN: Final = re.compile(r"[0-9A-Za-z*,/-]+")
_EXTENSION: Final = re.compile(r"(?i)(?<![a-z])(l|lw|w|\d*l|\d*w)(?![a-z])")  # L and W: of Quartz, not of Unix
_ZONED: Final = re.compile(r"(?:CRON_)?TZ=(\S+)\s+(.+)")


def problem(cron: str) -> str:
    """What is wrong with a cron expression and how to repair it; "" where it fires some day."""
    if cron.startswith(("TZ=", "CRON_TZ=")):
        return "must not begin with a time zone. Give the zone as timeZone."
    fields = cron.split()
    if len(fields) != 5:
        seconds = " Vertex AI has none for seconds." if len(fields) == 6 else ""
        return f"must have five fields ({FIELDS}), {EXAMPLE}, and {cron!r} has {len(fields)}.{seconds}"
    if any(not _PLAIN.fullmatch(field) or _EXTENSION.search(field) for field in fields):
        return f"may have numbers, names, and * , - / in its fields, {EXAMPLE}, not {cron!r}."
    try:
        next(CronSim(cron, datetime(2000, 1, 1)))
    except CronSimError as error:
        return _impossible(cron, str(error))
    except StopIteration:
        return f"never fires: no day of fifty years fits {cron!r}."
    return ""


def _impossible(cron: str, said: str) -> str:
    minute, hour, day, _, _ = cron.split()
    try:
        CronSim(f"{minute} {hour} {day} * *", datetime(2000, 1, 1))
    except CronSimError:
        return f"is {cron!r}, and its {said.removeprefix('Bad ').replace('-', ' ')} makes no sense: {EXAMPLE}."
    if "day" not in said or "week" in said:
        return f"is {cron!r}, and its {said.removeprefix('Bad ').replace('-', ' ')} makes no sense: {EXAMPLE}."
    return f"never fires: no month of {cron!r} has such a day."


def zone_problem(name: str) -> str:
    """What is wrong with the name of a time zone, or ""."""
    try:
        ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        near = difflib.get_close_matches(name, available_timezones(), 1)
        hint = f"Did you mean {near[0]}?" if near else "Give one such as Europe/Amsterdam."
        return f"must be a name of the IANA time zone database, not {name!r}. {hint}"
    return ""


def fires(cron: str, zone: str, after: datetime) -> Iterator[datetime]:
    """The times of a schedule after a moment, in its zone. after: with a time zone."""
    return iter(CronSim(cron, after.astimezone(ZoneInfo(zone))))


def in_words(cron: str) -> str:
    """A right expression in words, such as "At 03:00 every day"."""
    return CronSim(cron, datetime(2000, 1, 1)).explain()


def shortest_pause(inputs: Wire) -> timedelta:
    """The shortest time between two runs of a schedule; timedelta.max where it starts none, or that is not known."""
    if inputs.get("paused") or not _readable(inputs) or check_times(inputs):
        return timedelta.max
    times = fires(inputs["cron"], inputs.get("timeZone") or DEFAULT_ZONE, datetime.now(UTC))
    moments = [moment.astimezone(UTC) for moment in islice(times, 100)]
    return min((later - earlier for earlier, later in pairwise(moments)), default=timedelta.max)


def zoned(cron: str, zone: str) -> str:
    """An expression with its time zone, as Vertex AI has it."""
    return f"TZ={zone} {cron}"


def unzoned(cron: str) -> tuple[str, str]:
    """The expression and the time zone of what Vertex AI has."""
    found = _ZONED.fullmatch(cron.strip())
    return (found[2], found[1]) if found else (cron, DEFAULT_ZONE)


def moment(text: str) -> datetime:
    """A time in RFC 3339. Raises ValueError, also where it has no offset."""
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError(text)
    return found


def check_times(inputs: Wire) -> Failures:
    """What is wrong with the times of a schedule, whenever one looks at it."""
    failures: Failures = []
    for name, problem_of in (("cron", problem), ("timeZone", zone_problem)):
        value = inputs.get(name)
        if isinstance(value, str) and value != UNKNOWN and (said := problem_of(value)):
            failures.append((name, said))
    for name in ("startTime", "endTime"):
        value = inputs.get(name)
        if isinstance(value, str) and value != UNKNOWN and _moment(value) is None:
            failures.append((name, f"must be a time such as 2026-12-31T23:59:00Z, not {value!r}."))
    start, end = (_moment(inputs.get(name)) for name in ("startTime", "endTime"))
    if start and end and not failures and _readable(inputs) and (said := never(inputs, start)):
        failures.append(("endTime", said))
    return failures


def never(inputs: Wire, now: datetime) -> str:
    """Why a schedule does not fire after a moment, or "". The cron expression and the times have to be right."""
    if not _readable(inputs):
        return ""
    end = _moment(inputs.get("endTime"))
    if end is None:
        return ""
    start = _moment(inputs.get("startTime"))
    first = next(fires(inputs["cron"], inputs.get("timeZone") or DEFAULT_ZONE, max(now, start) if start else now), None)
    if first and first <= end:
        return ""
    when = f"its first time is {first.isoformat()}, " if first else ""
    return f"the schedule never fires: {when}and it ends at {inputs['endTime']}. Set a later endTime, or leave it out."


def next_time(inputs: Wire, now: datetime | None = None) -> datetime | None:
    """When a schedule of right inputs fires next; None where it never does."""
    now = now or datetime.now(UTC)
    if never(inputs, now):
        return None
    start = _moment(inputs.get("startTime"))
    return next(fires(inputs["cron"], inputs.get("timeZone") or DEFAULT_ZONE, max(now, start) if start else now), None)


def _readable(inputs: Wire) -> bool:
    """Whether a preview knows the times, and they are right."""
    values = [inputs.get(name) for name in ("cron", "timeZone", "startTime", "endTime")]
    return isinstance(values[0], str) and UNKNOWN not in values


def _moment(text: Any) -> datetime | None:
    try:
        return moment(text)
    except (ValueError, TypeError):
        return None
