"""Long-running operations: started in a transaction, carried on after a kill, finished in a transaction."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from sandbox.clock import now
from sandbox.errors import GoogleError, not_found, precondition
from sandbox.store import JSON, Store

log = logging.getLogger("sandbox")

#: Does the work of an operation and returns a function that makes the effect visible and returns the response. That
#: function runs in the transaction that marks the operation done. After a kill the work is begun again, so it looks
#: first at what is there.
OperationBody = Callable[[JSON], Awaitable[Callable[[], JSON]]]


@dataclass(frozen=True)
class OperationKind:
    """The work of one kind of operation, and the types that clients expect in it."""

    metadata: str
    response: str  # a message of google.cloud.aiplatform, or google.protobuf.Empty
    work: OperationBody
    undo: Callable[[JSON], Awaitable[None]] | None = None  # after a failure or a cancellation
    cancellable: bool = True


class Starter(Protocol):
    """The call that starts an operation: its API version, and the fault that was ordered for it."""

    @property
    def version(self) -> str: ...
    @property
    def fault(self) -> JSON: ...


class Operations:
    def __init__(self, store: Store, minimum_seconds: float) -> None:
        self.store = store
        self.minimum_seconds = minimum_seconds
        self.kinds: dict[str, OperationKind] = {}
        # Unfinished operations by name. The store has them too; this saves reading it for every rule.
        self.running: dict[str, JSON] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()
        self._released = asyncio.Event()

    def release(self) -> None:
        """Lets go of the operations that a fault holds now."""
        for operation in self.running.values():
            if operation["fault"].get("kind") == "hold":
                operation["fault"]["kind"] = "released"
                self._save(operation)
        self._released.set()
        self._released = asyncio.Event()

    def resume(self) -> None:
        """Resumes the operations that ran when the sandbox last ended."""
        for name, operation in self.store.list("operation"):
            if not operation.get("done"):
                self.running[name] = operation
                self._tasks[name] = asyncio.create_task(self._run(operation))

    def start(self, call: Starter, kind: str, parent: str, target: str, request: JSON) -> JSON:
        """Begins an operation on `target` (a resource name) and answers it as it is then: not done.

        Called last in a handler, inside its transaction if it has one.
        """
        time = now()
        operation: JSON = {
            "name": f"{parent}/operations/{random.randrange(10**18, 9 * 10**18)}",
            "kind": kind,
            "version": call.version,
            "target": target,
            "request": request,
            "createTime": time,
            "updateTime": time,
            "fault": call.fault,
        }
        with self.store.transaction():
            self.store.put("operation", operation["name"], operation)
        self.running[operation["name"]] = operation
        self._tasks[operation["name"]] = asyncio.create_task(self._run(operation))
        return self.render(operation, call.version)

    def on(self, target: str) -> list[JSON]:
        """The unfinished operations on a resource."""
        return [o for o in self.running.values() if o["target"] == target]

    def check_alone(self, kind: str, target: str) -> None:
        """One mutation of a resource at a time.

        Vertex AI's words are known for its RagCorpus ("There are other operations running on the
        RagCorpus … Operation IDs are: […]", FAILED_PRECONDITION); for others they are assumed.
        """
        if others := self.on(target):
            ids = ", ".join(o["name"].rpartition("/")[2] for o in others)
            raise precondition(
                f'There are other operations running on the {kind} "{target}". Operation IDs are: [{ids}].'
            )

    def stage(self, operation: JSON, **metadata: str) -> None:
        """Shows progress in the operation's metadata."""
        operation.setdefault("metadata", {}).update(metadata)
        self._save(operation)

    def _save(self, operation: JSON) -> None:
        operation["updateTime"] = now()
        with self.store.transaction():
            self.store.put("operation", operation["name"], operation)

    def render(self, operation: JSON, version: str) -> JSON:
        """google.longrunning.Operation, its types those of the API version that asks."""
        kind = self.kinds[operation["kind"]]
        prefix = f"type.googleapis.com/google.cloud.aiplatform.{version}."
        answer: JSON = {
            "name": operation["name"],
            "metadata": {
                "@type": prefix + kind.metadata,
                "genericMetadata": {
                    "createTime": operation["createTime"],
                    "updateTime": operation["updateTime"],
                },
                **operation.get("metadata", {}),
            },
        }
        if operation.get("done"):
            answer["done"] = True
            if "error" in operation:
                answer["error"] = operation["error"]
            elif kind.response.startswith("google."):
                answer["response"] = {"@type": f"type.googleapis.com/{kind.response}"}
            else:
                answer["response"] = {"@type": prefix + kind.response, **operation["response"]}
        return answer

    async def _run(self, operation: JSON) -> None:
        kind = self.kinds[operation["kind"]]
        fault = operation["fault"]
        ordered = GoogleError(fault.get("status", "INTERNAL"), fault.get("message", "Ordered by a fault."))
        try:
            await asyncio.sleep(self.minimum_seconds + fault.get("seconds", 0))
            while fault.get("kind") == "hold":
                await self._released.wait()
            if fault.get("kind") == "operation_error" and fault["when"] == "before":
                raise ordered
            finish = await kind.work(operation)
            with self.store.transaction():
                operation["response"] = finish()
                if fault.get("kind") == "operation_error":
                    operation["error"] = ordered.rpc_status()
                operation["done"] = True
                self._save(operation)
            if fault.get("when") == "half" and kind.undo:
                await kind.undo(operation)
        except asyncio.CancelledError:
            if not operation.get("cancelled"):
                return  # the sandbox is stopping: the next start takes it up
            await self._fail(operation, kind, GoogleError("CANCELLED", "The operation was cancelled."))
        except GoogleError as error:
            await self._fail(operation, kind, error)
        except Exception as error:
            log.exception("operation %s", operation["name"])
            await self._fail(operation, kind, GoogleError("INTERNAL", f"Internal error encountered: {error}"))
        del self.running[operation["name"]]
        del self._tasks[operation["name"]]
        # Wakes the callers that wait for it.
        async with self._changed:
            self._changed.notify_all()

    async def _fail(self, operation: JSON, kind: OperationKind, error: GoogleError) -> None:
        if kind.undo:
            try:
                await kind.undo(operation)
            except Exception:  # the operation ends all the same; the next start removes containers without an owner
                log.exception("undoing operation %s", operation["name"])
        operation.pop("response", None)
        operation["error"] = error.rpc_status()
        operation["done"] = True
        self._save(operation)

    def find(self, name: str) -> JSON:
        """The operation of a name. Raises NOT_FOUND."""
        operation = self.running.get(name) or self.store.get("operation", name)
        if not operation:
            raise not_found(f"Operation {name} is not found.")
        return operation

    async def wait(self, name: str, seconds: float) -> JSON:
        """The operation once it is done, or as it is after `seconds`."""
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: name not in self.running)
        except TimeoutError:
            pass
        return self.find(name)

    def cancel(self, name: str) -> None:
        operation = self.find(name)
        if not operation.get("done"):
            if not self.kinds[operation["kind"]].cancellable:
                raise precondition(f"Operation {name} is not cancellable.")
            operation["cancelled"] = True
            self._save(operation)
            self._tasks[name].cancel()

    async def stop(self) -> None:
        """Leaves the unfinished to the next start."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
