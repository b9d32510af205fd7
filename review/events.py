"""A preview as typed records, from the events of Pulumi's engine.

Secrets and the values of environment variables are replaced here, so that nothing after this can show them.
https://github.com/pulumi/pulumi/blob/master/sdk/go/common/apitype/events.go
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pulumi_vertex.wire import UNKNOWN, Wire

SIGNATURE: Final = "4dabf18193072939515e22adb298388d"  # the key that marks a wrapped value in Pulumi's JSON
SECRET: Final = "[secret]"
HIDDEN: Final = "[not shown]"
# Properties whose values are not shown, because people put passwords there: environments, and arguments of a build.
ENVIRONMENTS: Final = {"env", "envs", "environment", "environmentVariables", "buildArgs"}
# The program's own arguments of the build, which hold no password and tell a reviewer what changes.
SHOWN_ARGUMENTS: Final = {"ACCELERATOR", "BASE", "REQUIRE", "SOURCES", "TORCH", "WEIGHTS"}
PASSWORD: Final = re.compile(r"passw(or)?d|token$|secret|credential|private_?key", re.IGNORECASE)

# The engine's operations by what they come to, the gravest last: a resource that is replaced has several.
OPERATIONS: Final = {
    "same": "same",
    "read": "same",
    "refresh": "same",
    "import": "create",
    "create": "create",
    "update": "update",
    "delete": "delete",
    "discard": "delete",
    "replace": "replace",
    "create-replacement": "replace",
    "delete-replaced": "replace",
    "discard-replaced": "replace",
    "import-replacement": "replace",
    "read-replacement": "replace",
    "remove-pending-replace": "delete",
}
# Warnings about this machine and not about the change.
_MACHINE: Final = re.compile(r"^(using pulumi-\S+ from \$PATH|resource plugin \S+ is expected to have version)")


@dataclass(frozen=True)
class State:
    """A resource before or after the change. Unknown values are UNKNOWN; secrets are replaced."""

    inputs: Wire
    outputs: Wire = field(default_factory=dict)
    protect: bool = False
    retain: bool = False  # stays in the cloud when it leaves the stack


@dataclass(frozen=True)
class Change:
    """What happens to one resource: `same`, `create`, `update`, `replace` or `delete`.

    paths: the properties that differ for the provider, each with whether it makes the replacement necessary.
    """

    urn: str
    type: str
    operation: str
    old: State | None
    new: State | None
    paths: Mapping[str, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.urn.rpartition("::")[2]

    @property
    def changes(self) -> bool:
        """Whether anything changes; a resource whose protection changes is the same for the engine."""
        before, after = self.old and self.old.protect, self.new and self.new.protect
        return self.operation != "same" or bool(before) != bool(after)


@dataclass(frozen=True)
class Message:
    """A warning or an error of the preview. resource: its name, or empty."""

    severity: str
    resource: str
    text: str


@dataclass(frozen=True)
class PolicyFinding:
    """What a policy says of a resource. level: mandatory, advisory or remediate."""

    policy: str
    level: str
    resource: str
    text: str


@dataclass(frozen=True)
class Preview:
    """Everything that a preview says about a stack. config: the settings by key, as texts."""

    stack: str
    config: Mapping[str, str]
    changes: tuple[Change, ...]
    messages: tuple[Message, ...] = ()
    policies: tuple[PolicyFinding, ...] = ()
    rollout_log: tuple[str, ...] = ()  # the steps that the provider logged, from the endpoint as it is now
    complete: bool = True

    def of_type(self, type_: str) -> list[Change]:
        return [change for change in self.changes if change.type == type_]


def read(stack: str, lines: Iterable[str]) -> Preview:
    """The preview in an event log, one JSON object a line. Raises ValueError for a log that is not one."""
    changes: dict[str, Change] = {}
    messages: list[Message] = []
    policies: list[PolicyFinding] = []
    config: dict[str, str] = {}
    log: list[str] = []
    complete = False
    for line in filter(str.strip, lines):
        event = json.loads(line)
        if found := event.get("preludeEvent"):
            config = {key: str(value) for key, value in (found.get("config") or {}).items()}
        elif found := event.get("resourcePreEvent"):
            change = _change(found["metadata"])
            known = changes.get(change.urn)
            changes[change.urn] = _merged(known, change) if known else change
        elif found := event.get("diagnosticEvent"):
            log += _steps(found)
            messages += _message(found)
        elif found := event.get("policyEvent"):
            policies.append(_policy(found))
        elif found := event.get("summaryEvent"):
            complete = found.get("result", "succeeded") == "succeeded"
    return Preview(
        stack, config, tuple(changes.values()), tuple(dict.fromkeys(messages)), tuple(policies), tuple(log), complete
    )


def shown(value: Any, name: str = "") -> Any:
    """A value as a review may show it. name: of the property."""
    if value and value != UNKNOWN and not isinstance(value, bool) and PASSWORD.search(name):
        return SECRET
    if isinstance(value, dict):
        if SIGNATURE in value:
            return SECRET
        if name in ENVIRONMENTS:
            return {key: item if key in SHOWN_ARGUMENTS else HIDDEN for key, item in value.items()}
        # A container's environment is also written as a list of names and values.
        if set(value) == {"name", "value"}:
            return {"name": value["name"], "value": HIDDEN}
        return {key: shown(item, key) for key, item in value.items() if not key.startswith("__")}  # Pulumi's own
    if isinstance(value, list):
        if name in ENVIRONMENTS:
            return [HIDDEN for _ in value] if not all(isinstance(v, dict) for v in value) else list(map(shown, value))
        return [shown(item, name) for item in value]
    return value


# ------------------------------------------------------------------------------------------------ single events


def _change(metadata: Wire) -> Change:
    detailed = metadata.get("detailedDiff") or {}
    paths = {path: str(diff.get("diffKind", "")).endswith("replace") for path, diff in detailed.items()}
    for name in metadata.get("diffs") or ():
        if not any(re.split(r"[.\[]", path)[0] == name for path in paths):
            paths[name] = name in (metadata.get("keys") or ())
    return Change(
        urn=metadata["urn"],
        type=metadata["type"],
        operation=OPERATIONS.get(metadata["op"], "update"),
        old=_state(metadata.get("old")),
        new=_state(metadata.get("new")),
        paths=paths,
    )


def _state(state: Wire | None) -> State | None:
    if state is None:
        return None
    inputs, outputs = (shown(state.get(key) or {}) for key in ("inputs", "outputs"))
    return State(inputs, outputs, bool(state.get("protect")), bool(state.get("retainOnDelete")))


def _merged(known: Change, also: Change) -> Change:
    """A resource that is replaced has one event for its new self and one for its old self."""
    operation = max(known.operation, also.operation, key=list(OPERATIONS.values()).index)
    return Change(
        known.urn, known.type, operation, known.old or also.old, known.new or also.new, {**known.paths, **also.paths}
    )


def _steps(event: Wire) -> list[str]:
    """The steps that a rollout logs as its plan."""
    of_rollout = ":Rollout::" in str(event.get("urn"))
    if event.get("severity") != "info" or not of_rollout:
        return []
    return re.findall(r"^\d+\. (.*)$", event["message"], re.MULTILINE)


def _message(event: Wire) -> list[Message]:
    text = str(event.get("message", "")).strip()
    if event.get("severity") not in ("warning", "error") or not text or _MACHINE.match(text):
        return []
    return [Message(event["severity"], str(event.get("urn") or "").rpartition("::")[2], text)]


def _policy(event: Wire) -> PolicyFinding:
    return PolicyFinding(
        policy=str(event.get("policyName", "")),
        level=str(event.get("enforcementLevel", "")),
        resource=str(event.get("resourceUrn") or "").rpartition("::")[2],
        text=str(event.get("message", "")).strip(),
    )
