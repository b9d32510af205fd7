"""The world of one test of jobs: what it wants, orders of the sandbox, and sees there."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from helpers import eventually
from vertex_harness import in_background
from vertex_plugin import IMAGE, CallFailed, Plugin, Plugins, Stack, Wire

from sandbox.testing import RunningSandbox

URN = "urn:pulumi:test::people::vertex:index:CustomJob::"
numbers = itertools.count(1)


@dataclass
class JobWorld:
    """One test's job, and those that Vertex AI has under the same name."""

    sandbox: RunningSandbox
    plugin: Plugin
    collection: str = "customJobs"
    name: str = field(default_factory=lambda: f"job{next(numbers)}")

    def stack(self) -> Stack:
        return Stack(URN + self.name)

    def inputs(self, *args: str, env: Wire | None = None, **more: Any) -> Wire:
        return {
            "image": IMAGE,
            "machineType": "n1-standard-2",
            "args": list(args),
            "env": env or {},
            "baseOutputDirectory": "gs://a-bucket/out",
            **more,
        }

    @property
    def there(self) -> list[Wire]:
        """The jobs, oldest first."""
        found = self.sandbox.do("GET", self.collection).get(self.collection, [])
        return [job for job in reversed(found) if job["displayName"] == self.name]

    @property
    def states(self) -> list[str]:
        return [job["state"].rpartition("_STATE_")[2] for job in self.there]

    def hold(self) -> None:
        """The next job runs until it is released."""
        self.sandbox.fault(f"{self.collection}.create", "hold", match=self.name)

    def fail(self, message: str = "no rows") -> None:
        """The next job fails."""
        self.sandbox.fault(
            f"{self.collection}.create", "operation_error", match=self.name, message=message, when="after"
        )

    def drop(self, method: str, when: str) -> None:
        self.sandbox.fault(f"{self.collection}.{method}", "drop", when=when)

    def writes(self) -> list[str]:
        """The methods that changed something, in their order."""
        found = [r["method"].rpartition(".")[2] for r in self.sandbox.requests() if r["http"] != "GET"]
        return [method for method in found if method != "list"]

    def up_held(self, stack: Stack, wanted: Wire, *words: str) -> None:
        """`pulumi up` of a job that runs until a status line has all the words."""

        def said() -> bool:
            lines = [line.message for line in self.plugin.engine.lines if line.urn == stack.urn and line.ephemeral]
            return any(all(word in line for word in words) for line in lines)

        self.hold()
        with in_background(lambda: stack.up(self.plugin, wanted)) as failed:
            try:
                assert eventually(said), [line.message for line in self.plugin.engine.lines]
            finally:
                self.sandbox.release()
        assert failed == []

    def stop(self, plugins: Plugins, stack: Stack, wanted: Wire) -> CallFailed:
        """`pulumi up` that is stopped by Ctrl-C while the job runs. The error that it ends with."""
        stopped = plugins.take()
        with in_background(lambda: stack.up(stopped, wanted)) as failed:
            assert eventually(lambda: "RUNNING" in self.states)
            stopped.cancel()
        (error,) = failed
        assert isinstance(error, CallFailed)
        return error
