"""Which model version served when, from the history of updates that Pulumi keeps.

`pulumi stack history` lists the updates. What was deployed after an update is in the state that Pulumi kept with it:
Pulumi Cloud gives it out by the update's number, and a backend of files or of a bucket keeps it beside the history.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from headcount import stacks
from headcount.results import printable
from headcount.stacks import PROJECT, StackError

ROLLOUT: Final = "vertex:index:Rollout"
MODEL_VERSION: Final = "vertex:index:ModelVersion"
LATEST: Final = 100  # updates whose states are asked of Pulumi Cloud, with a command for each


@dataclass(frozen=True)
class Version:
    """A model version that is deployed. version: ID@NUMBER. digest: of its image. model: the gs:// folder, or "".

    traffic: percent.
    """

    release: str
    version: str
    digest: str
    model: str
    traffic: int

    @property
    def key(self) -> tuple[str, str]:
        """What it serves: the same image and model under another number count the same."""
        return self.digest, self.model


@dataclass(frozen=True)
class Update:
    """A finished update of a stack. start, end: RFC 3339. number: 1 is the stack's first. commit: of the checkout."""

    number: int
    kind: str
    start: str
    end: str
    result: str
    message: str
    commit: str


@dataclass(frozen=True)
class Period:
    """A time with the same versions deployed and the same traffic. until: "" for the last one.

    update: the one that it began with.
    """

    since: str
    until: str
    versions: tuple[Version, ...]
    update: Update

    @property
    def leader(self) -> Version | None:
        """The version with most traffic."""
        best = max(self.versions, key=lambda version: version.traffic, default=None)
        return best if best and best.traffic else None


def updates(listed: Sequence[dict[str, Any]]) -> list[Update]:
    """The finished updates in the output of `pulumi stack history --json`, the oldest first."""
    found = []
    for number, entry in enumerate(reversed(listed), 1):
        if "endTime" not in entry:
            continue
        around = entry.get("environment") or {}
        commit = str(around.get("git.head", ""))[:12] + ("+" if around.get("git.dirty") == "true" else "")
        found.append(
            Update(
                int(entry.get("version") or number),  # only Pulumi Cloud counts
                str(entry["kind"]),
                str(entry["startTime"]),
                str(entry["endTime"]),
                str(entry.get("result", "")),
                str(entry.get("message", "")),
                commit,
            )
        )
    return found


def deployed(state: dict[str, Any]) -> tuple[Version, ...]:
    """The versions that a state's rollout has deployed, by the names of their releases. state: a `deployment`."""
    resources = [one for one in state.get("resources") or [] if not one.get("delete")]
    versions = {one.get("id"): one for one in state.get("resources") or [] if one["type"] == MODEL_VERSION}
    found = []
    for rollout in (one for one in resources if one["type"] == ROLLOUT):
        for release, wanted in sorted((rollout.get("outputs", {}).get("models") or {}).items()):
            inputs = versions.get(wanted["model"], {}).get("inputs", {})
            found.append(
                Version(
                    release,
                    str(wanted["model"]).rpartition("/")[2],
                    str(inputs.get("image", "")).partition("@")[2],
                    str(inputs.get("artifactUri") or ""),
                    int(wanted.get("traffic") or 0),
                )
            )
    return tuple(found)


def periods(found: Iterable[tuple[Update, tuple[Version, ...]]]) -> list[Period]:
    """The times with the same versions and traffic, the oldest first. found: in the order of time."""
    result: list[Period] = []
    for update, versions in found:
        if result and result[-1].versions == versions:
            continue
        if result:
            last = result[-1]
            result[-1] = Period(last.since, update.end, last.versions, last.update)
        result.append(Period(update.end, "", versions, update))
    return result if any(period.versions for period in result) else []


def table_text(found: Sequence[Period]) -> str:
    """A table, the newest period first, a line for each version that had traffic."""
    rows = [("SINCE", "UNTIL", "TRAFFIC", "RELEASE", "VERSION", "IMAGE", "MODEL", "COMMIT", "UPDATE")]
    for period in reversed(found):
        until = period.until[:16] or "now"
        update = f"{period.update.number} {printable(period.update.message)}".strip()
        if period.update.result != "succeeded":
            update += f" ({period.update.result})"
        serving = [version for version in period.versions if version.traffic] or [Version("nothing", "-", "", "", 0)]
        rows += [
            (period.since[:16], until, f"{version.traffic} %", version.release, version.version,
             version.digest[:19] or "-", version.model or "-", period.update.commit or "-", update)
            for version in serving
        ]  # fmt: skip
    keep = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in keep]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in zip(*keep, strict=True)
    )
    return "".join(line.rstrip() + "\n" for line in lines)


def json_text(found: Sequence[Period]) -> str:
    return json.dumps([asdict(period) for period in found], indent=2) + "\n"


# --- reading ------------------------------------------------------------------------------------------------


def read(stack: str) -> list[Period]:
    """The periods of a stack, the oldest first; the last one is what its state says now. Raises StackError."""
    listed = updates(json.loads(stacks.pulumi(stack, "stack", "history", "--json", "--page-size", "0")))
    if not listed:
        raise StackError(f"Stack {stack} was never deployed, so that it has no history.")
    states = _states(stack, listed)
    now = json.loads(stacks.pulumi(stack, "stack", "export")).get("deployment") or {}
    found = [(update, deployed(state)) for update, state in zip(listed[:-1], states[:-1], strict=True) if state]
    return periods([*found, (listed[-1], deployed(now))])


def _states(stack: str, listed: Sequence[Update]) -> list[dict[str, Any] | None]:
    """The state after each update; None where it was not kept."""
    url = stacks.backend(stack)
    if url.startswith("https://"):
        return [
            json.loads(stacks.pulumi(stack, "stack", "export", "--version", str(update.number)))["deployment"]
            if len(listed) - index <= LATEST
            else None
            for index, update in enumerate(listed)
        ]
    folder = f".pulumi/history/{PROJECT}/{stack}"
    if url.startswith("file://"):
        here = Path(url.removeprefix("file://")).expanduser() / folder
        files = {file.name: file.read_bytes for file in here.glob("*")}
    elif url.startswith("gs://"):
        files = _objects(url, folder)
    else:
        raise StackError(
            f"The states of earlier updates cannot be read from {url}: only from gs://, files and Pulumi Cloud."
        )
    kept = checkpoints(files)
    return [kept[update.number - 1] if update.number <= len(kept) else None for update in listed]


def checkpoints(files: dict[str, Callable[[], bytes]]) -> list[dict[str, Any] | None]:
    """The states that a backend keeps beside its history, the oldest first; None where one is missing or unreadable.

    files: the content of each file by its name, STACK-NANOSECONDS.history.json or .checkpoint.json, which may be
    compressed. https://github.com/pulumi/pulumi/blob/master/pkg/backend/diy/state.go, addToHistory
    """
    found: list[dict[str, Any] | None] = []
    for name in sorted(name for name in files if re.search(r"\.history\.json(\.gz|\.zst)?$", name)):
        read = files.get(name.replace(".history.", ".checkpoint."))
        try:
            content = read() if read else b""
            state = json.loads(gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content)
            found.append(state["checkpoint"]["latest"] or {})
        except (OSError, ValueError, KeyError):
            found.append(None)
    return found


def _objects(url: str, folder: str) -> dict[str, Callable[[], bytes]]:
    """The objects of a folder in the bucket of a gs:// backend, by their names. Raises StackError."""
    import google.api_core.exceptions
    import google.auth.exceptions
    from google.cloud import storage

    bucket, _, prefix = url.removeprefix("gs://").partition("?")[0].partition("/")
    path = "/".join(filter(None, (prefix.strip("/"), folder))) + "/"
    try:
        listed = list(storage.Client().list_blobs(bucket, prefix=path))
    except (google.api_core.exceptions.GoogleAPIError, google.auth.exceptions.GoogleAuthError) as error:
        raise StackError(f"The history in {url} cannot be read: {error}") from None
    return {blob.name.rpartition("/")[2]: blob.download_as_bytes for blob in listed}
