"""Changes as pull requests make them, previewed by Pulumi's engine on the sandbox.

`RECORD_REVIEWS=1 pytest tests/test_engine_review.py` writes their event logs to tests/reviews/, from which
tests/test_review.py renders reviews on every machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml
from engine_project import EngineProject
from helpers import ROOT

RECORDS: Final = ROOT / "tests" / "reviews"
MACHINE: Final = re.compile(r"from \$PATH|resource plugin \S+ is expected")
CONFIG: Final = {"gcp:project", "gcp:region"}
PUBLIC: Final = """
        gcp.storage.BucketIAMMember(
            "everybody-reads-pictures",
            bucket=self.bucket.name,
            role="roles/storage.objectViewer",
            member="allUsers",
            opts=self._parent,
        )
        self.register_outputs({})
"""


class Recorder:
    """A project with the stacks dev and prod, as docs/deploy.md sets them up."""

    def __init__(self, project: EngineProject) -> None:
        self.project = project
        self.folder = project.folder
        self.past: dict[str, Any] = {}  # of dev, before the rollback
        mine = r"  (gcp|vertex):(accessToken|\w*[eE]ndpoint)"
        endpoints = [line for line in project.stack_file.splitlines(True) if re.match(mine, line)]
        for stack in ("dev", "prod"):
            text = (ROOT / f"Pulumi.{stack}.yaml").read_text() + "".join(endpoints)
            self.file(stack).write_text(text + "  gcp:project: my-project\n  headcount:drainSeconds: 1\n")
            project.pulumi("stack", "init", stack)

    def file(self, stack: str) -> Path:
        return self.folder / f"Pulumi.{stack}.yaml"

    def up(self, stack: str) -> None:
        self.project.pulumi("up", "-s", stack, "--yes", "--skip-preview")

    def release(self, stack: str, *arguments: str) -> None:
        self.project.python("headcount.cli", "release", "-s", stack, *arguments)

    def set(self, stack: str, **settings: Any) -> None:
        document = yaml.safe_load(self.file(stack).read_text())
        document["config"] |= {f"headcount:{key}": value for key, value in settings.items()}
        self.file(stack).write_text(yaml.safe_dump(document))

    def digest(self, stack: str, release: str) -> str:
        return str(self.asked(stack, "stack", "output", "--json")["images"][release]).partition("@")[2]

    def preview(self, stack: str, *, fails: bool = False) -> list[dict[str, Any]]:
        """The events of a preview."""
        log = self.folder.parent / "events.json"
        log.unlink(missing_ok=True)
        self.project.environment["PULUMI_DEBUG_COMMANDS"] = "true"
        self.project.pulumi("preview", "-s", stack, "--event-log", str(log), fails=fails)
        return [json.loads(line) for line in log.read_text().splitlines()]

    def tidy(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The events without what differs between machines and runs."""
        text = json.dumps(events)
        for pattern, plain in (
            (re.escape(str(self.folder.parent)), "/home/me"),
            (re.escape(str(ROOT)), "/home/me/headcount"),
            (rf"127\.0\.0\.1:{self.project.registry_port}", "127.0.0.1:5000"),
            (rf"127\.0\.0\.1:{self.project.sandbox.port}", "127.0.0.1:8790"),
        ):
            text = re.sub(pattern, plain, text)
        return trimmed(json.loads(text))

    def scenarios(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Each change with the events of its preview, in the order of a stack's life."""
        yield "first-deployment", self.preview("dev")
        self.up("dev")
        yield "nothing", self.preview("dev")
        yield "new-handler-line", self.undone("dev", lambda: self.project.handler(5))
        yield "machine-type", self.undone("dev", lambda: self.set("dev", machineType="c3-highcpu-8"))
        yield "replicas", self.undone("dev", lambda: self.set("dev", minReplicas=2, maxReplicas=4))
        yield "bucket-public", self.undone("dev", self.make_public)
        yield "endpoint-kind", self.undone("dev", lambda: self.set("dev", dedicated=False))
        predictors = ["group:analysts@example.com"]
        yield "new-predictor", self.undone("dev", lambda: self.set("dev", predictors=predictors))
        yield "paused", self.undone("dev", lambda: self.release("dev", "pause"))
        proved = self.digest("dev", "main")
        releases = {"main": {"image": proved, "traffic": 100}}
        self.set("prod", imageSource=self.repository("dev"), releases=releases)
        self.up("prod")
        yield "prod-below-two", self.undone("prod", lambda: self.set("prod", minReplicas=1))
        yield "prod-endpoint-kind", self.undone("prod", lambda: self.set("prod", dedicated=False), fails=True)

        self.release("dev", "canary", "next", "10")
        self.project.handler(8)
        yield "canary", self.preview("dev")
        self.up("dev")
        self.release("dev", "promote", "next")
        yield "promotion", self.preview("dev")
        self.up("dev")
        self.release("dev", "promote", "main")
        yield "rollback", self.preview("dev")
        self.past = past(self.asked("dev", "stack", "export"), self.asked("dev", "stack", "history", "--json"))
        newer = self.digest("dev", "next")
        straight = {"main": {"image": proved, "traffic": 0}, "next": {"image": newer, "traffic": 100}}
        yield "prod-without-canary", self.undone("prod", lambda: self.set("prod", releases=straight))
        limits = {"monthlyCostLimit": 1000, "maxReplicas": 8}
        yield "prod-over-limit", self.undone("prod", lambda: self.set("prod", **limits))

    def asked(self, stack: str, *command: str) -> Any:
        return json.loads(self.project.pulumi(*command, "-s", stack))

    def repository(self, stack: str) -> str:
        return str(self.asked(stack, "stack", "output", "--json")["repository"])

    def make_public(self) -> None:
        file = self.folder / "infra" / "foundation.py"
        text = file.read_text().replace('public_access_prevention="enforced"', 'public_access_prevention="inherited"')
        first, _, rest = text.partition("        self.register_outputs({})\n")
        file.write_text(first.rstrip("\n") + PUBLIC + rest)

    def undone(self, stack: str, change: Callable[[], None], *, fails: bool = False) -> list[dict[str, Any]]:
        """The events of the preview of a change, which is undone afterwards."""
        foundation = self.folder / "infra" / "foundation.py"
        server = self.folder / "serving" / "server.py"
        kept = {path: path.read_text() for path in (self.file(stack), foundation, server)}
        try:
            change()
            return self.preview(stack, fails=fails)
        finally:
            for path, text in kept.items():
                path.write_text(text)


def trimmed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a review reads of the events."""
    kept = []
    for event in events:
        if found := event.get("preludeEvent"):
            config = {k: v for k, v in found["config"].items() if k.startswith("headcount:") or k in CONFIG}
            kept.append({"preludeEvent": {"config": config}})
        elif found := event.get("resourcePreEvent"):
            kept.append({"resourcePreEvent": {"metadata": resource(found["metadata"])}})
        elif found := event.get("diagnosticEvent"):
            if found["severity"] != "debug" and not MACHINE.search(found["message"]):
                names = ("urn", "message", "severity")
                kept.append({"diagnosticEvent": {name: found[name] for name in names if name in found}})
        elif found := event.get("summaryEvent"):
            kept.append({"summaryEvent": {name: found[name] for name in ("resourceChanges", "result")}})
    return [json.loads(json.dumps(event, sort_keys=True)) for event in kept]


def resource(metadata: dict[str, Any]) -> dict[str, Any]:
    kept = {name: metadata[name] for name in ("op", "urn", "type")}
    kept |= {name: metadata[name] for name in ("keys", "diffs", "detailedDiff") if metadata.get(name)}
    serves = metadata["type"].endswith((":Rollout", ":ModelVersion"))
    for side in ("old", "new"):
        if (state := metadata.get(side)) is not None:
            names = ["protect", "retainOnDelete"]
            names += ["inputs"] if serves or metadata["op"] != "same" else []
            names += ["outputs"] if metadata["type"].endswith(":Rollout") else []
            kept[side] = {name: state[name] for name in names if state.get(name)}
    return kept


def past(deployment: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
    """What tells which versions have served, of a stack's state and history."""
    versions = [r for r in deployment["deployment"]["resources"] if r["type"].endswith(":ModelVersion")]
    settings = ("headcount:releases", "headcount:paused")
    return {
        "deployment": {"resources": [{k: r[k] for k in ("urn", "type", "id", "created")} for r in versions]},
        "history": [
            {k: u[k] for k in ("kind", "result", "endTime")}
            | {"config": {k: {"value": u["config"][k]["value"]} for k in settings if k in u["config"]}}
            for u in history
        ],
    }


def write(name: str, lines: list[str]) -> None:
    """Writes the events of a change, one a line."""
    (RECORDS / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
