"""Jobs that run to an end: queued for CPUs, started, watched, retried, and cancelled.

https://docs.cloud.google.com/vertex-ai/docs/training/understanding-training-service
A job is a document of the kind `customJob`: `resource`, as the API shows it, and what the sandbox needs to carry it on
after a kill: `attempt`, `cpus`, `cursors` (how far each replica's output was read), `trial`, `outputs` (the files that
are expected of a task of a pipeline), `cancelled`, `fault`.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from sandbox import clock
from sandbox.cloud_logging import entries
from sandbox.errors import GoogleError, invalid
from sandbox.runner import LABEL, Container, ContainerRunner
from sandbox.storage.mounts import Mounts
from sandbox.store import JSON, Store
from sandbox.training import (
    METRIC_FILE,
    PRIMARY,
    RETRIES,
    TRACEBACK_LINES,
    TRANSIENT,
    Trial,
    cpus_needed,
    failure_message,
    first_failure,
    launches,
)

log = logging.getLogger("sandbox")

ENDED = ("JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED")
PERIOD = 0.5  # seconds between two looks at a job's containers
# From SIGTERM to SIGKILL: Kubernetes' terminationGracePeriodSeconds, and less where the sandbox itself ends.
STOP_GRACE = 30.0
LAST_GRACE = 10.0
# Scheduling.timeout of the discovery document.
TIMEOUT = "604800s"


class CancelledJobError(Exception):
    """Somebody has cancelled the job."""


def new_job(parent: str, collection: str, resource: JSON) -> JSON:
    """The resource of a job as it is right after its creation."""
    now = clock.now()
    return {
        **{k: v for k, v in resource.items() if v not in ({}, [])},  # as JSON of a protocol buffer leaves them out
        "name": f"{parent}/{collection}/{random.randrange(10**18, 9 * 10**18)}",
        "state": "JOB_STATE_QUEUED",
        "createTime": now,
        "updateTime": now,
    }


class Jobs:
    def __init__(self, store: Store, runner: ContainerRunner) -> None:
        self._store = store
        self._runner = runner
        self.mounts = Mounts(store)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._queue: list[str] = []
        self._taken: dict[str, tuple[int, ...]] = {}
        self._containers: dict[str, dict[str, Container]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[None]] = set()
        #: Held by those who change tuning jobs.
        self.lock = asyncio.Lock()
        # Wakes those who wait for CPUs, for an end, or for a cancellation.
        self._changed = asyncio.Condition()
        #: Called with a job's name after it has ended.
        self.ended: Callable[[str], None] = lambda name: None

    # --------------------------------------------------------------------------------------------- documents

    def find(self, name: str) -> JSON | None:
        return self._store.get("customJob", name)

    def put(self, resource: JSON, fault: JSON, trial: JSON | None = None, outputs: JSON | None = None) -> None:
        """Stores a new job. Inside a transaction; then `start`."""
        document = {"resource": resource, "fault": fault, "attempt": 0, "cpus": [], "cursors": {}, "trial": trial}
        self._store.put("customJob", resource["name"], {**document, "outputs": outputs or {}})

    async def wait(self, name: str) -> JSON | None:
        """The job's resource after its end; None where somebody has deleted it."""

        def resource() -> JSON | None:
            job = self.find(name)
            return job["resource"] if job else None

        async with self._changed:
            await self._changed.wait_for(lambda: not (found := resource()) or found["state"] in ENDED)
        return resource()

    def _update(self, name: str, change: JSON | None = None, **fields: object) -> None:
        """Changes a job's resource by `fields` and the rest of its document by `change`. A deleted job stays so."""
        with self._store.transaction():
            if job := self.find(name):
                job["resource"] |= {**fields, "updateTime": clock.now()}
                self._store.put("customJob", name, {**job, **(change or {})})

    def say(self, name: str, text: str, severity: str = "INFO") -> None:
        """Writes entries of the training service into a job's log; of a trial's job the errors only."""
        job = self.find(name)
        trial = job["trial"] if job else None
        about = trial["job"] if trial else name
        if trial and severity == "INFO":
            return
        said = [entries.of_service(about, line, severity) for line in text.split("\n")]
        with self._store.transaction():
            self._store.log(*_log_of(about), said)

    # ------------------------------------------------------------------------------------- start, end and cancellation

    def start(self, name: str) -> None:
        """Begins a job whose document is in the store, or goes on with it."""
        self._queue.append(name)
        self._tasks[name] = asyncio.create_task(self._run(name))

    def cancel(self, name: str) -> None:
        """Asks a job to end; one that has ended stays as it is."""
        job = self.find(name)
        if job and job["resource"]["state"] not in ENDED:
            self._update(name, {"cancelled": True}, state="JOB_STATE_CANCELLING")
            self._wake()

    def release(self) -> None:
        """Lets go of the jobs that a fault holds."""
        for name in self._tasks:
            job = self.find(name)
            if job and job["fault"].get("kind") == "hold":
                self._update(name, {"fault": {}})
        for name, document in self._store.list("tuningJob"):  # a fault holds its first trial, which may not exist yet
            if document["fault"].get("kind") == "hold":
                self._store.put("tuningJob", name, {**document, "fault": {}})
        self._wake()

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs something beside the jobs until the sandbox stops."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._report)

    def _report(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("tuning job", exc_info=error)

    def _wake(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.create_task(notify())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def resume(self) -> None:
        """At start: goes on with the jobs of before, with the containers that they still have."""
        unfinished = {name: job for name, job in self._store.list("customJob") if job["resource"]["state"] not in ENDED}
        for container in await self._runner.find(self._store.id):
            job = container.labels.get(LABEL + "job")
            if job is None:
                continue
            attempt = container.labels[LABEL + "attempt"]
            if job in unfinished and attempt == str(unfinished[job]["attempt"]):
                self._containers.setdefault(job, {})[container.labels[LABEL + "replica"]] = container
            else:
                task = asyncio.create_task(container.stop(0))
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
        await self.mounts.tidy({name.split("/")[1] for name in unfinished})
        # Those that had CPUs keep them, and the others wait in the order of their creation.
        self._taken = {name: tuple(job["cpus"]) for name, job in unfinished.items() if job.get("cpus")}
        for name in sorted(unfinished, key=lambda name: str(unfinished[name]["resource"]["createTime"])):
            self.start(name)

    async def stop(self) -> None:
        """Ends the containers. The next start begins the jobs that ran again, as after a restart of their machines."""
        tasks = [*self._background, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(name, LAST_GRACE) for name in list(self._containers)), return_exceptions=True)
        if self._leaving:
            await asyncio.wait(self._leaving)
        for project in {name.split("/")[1] for name in self._tasks}:
            await self.mounts.sync(project, final=True)
        await self.mounts.stop()

    # ------------------------------------------------------------------------------------------------- one job

    async def _run(self, name: str) -> None:
        project = name.split("/")[1]
        try:
            folder_open = False
            try:
                cpus = await self._claim(name)
                await self.mounts.open(project)
                folder_open = True
                await self._attempts(name, cpus)
                outcome: JSON = {"state": "JOB_STATE_SUCCEEDED"}
            except CancelledJobError:
                outcome = {"state": "JOB_STATE_CANCELLED", "error": {"code": 1, "message": "CANCELED"}}
            except GoogleError as error:
                state = "JOB_STATE_CANCELLED" if error.status == "CANCELLED" else "JOB_STATE_FAILED"
                outcome = {"state": state, "error": error.rpc_status()}
            except Exception as error:
                log.exception("job %s", name)
                internal = GoogleError("INTERNAL", f"Internal error occurred for the current attempt: {error!r}")
                outcome = {"state": "JOB_STATE_FAILED", "error": internal.rpc_status()}
            try:
                await self._end(name, STOP_GRACE)
                if folder_open:
                    await self.mounts.close(project)
            except Exception:  # of Docker or the disk; the job ends all the same
                log.exception("end of job %s", name)
        except asyncio.CancelledError:
            return  # the sandbox is stopping, and the next start takes the job up
        self.announce(name, outcome)
        self._update(name, {"cpus": []}, **outcome, endTime=clock.now())
        self._taken.pop(name, None)
        self._tasks.pop(name, None)
        self.ended(name)
        async with self._changed:
            self._changed.notify_all()

    def announce(self, name: str, outcome: JSON) -> None:
        """Says in a job's log how it has ended."""
        match outcome["state"]:
            case "JOB_STATE_SUCCEEDED":
                self.say(name, "Job completed successfully.")
            case "JOB_STATE_CANCELLED":
                self.say(name, "Job cancelled.")
            case _:
                self.say(name, outcome["error"]["message"], "ERROR")
                self.say(name, "Job failed.")

    async def _claim(self, name: str) -> tuple[int, ...]:
        """The CPUs that the job may use, once they are free and it is the first in the queue."""
        everything = await self._runner.cpus()
        job = self.find(name)
        assert job is not None
        needed = cpus_needed(job["resource"]["jobSpec"], len(everything))

        def free() -> tuple[int, ...]:
            taken = {cpu for cpus in self._taken.values() for cpu in cpus}
            return tuple(cpu for cpu in everything if cpu not in taken)

        def ready() -> bool:
            first = next(n for n in self._queue if n not in self._taken) if name not in self._taken else name
            return self._is_cancelled(name) or name in self._taken or (first == name and len(free()) >= needed)

        try:
            async with self._changed:
                await self._changed.wait_for(ready)
                if self._is_cancelled(name):
                    raise CancelledJobError
                if name not in self._taken:
                    self._taken[name] = free()[:needed]
                    self._update(name, {"cpus": list(self._taken[name])}, state="JOB_STATE_PENDING")
        finally:
            self._queue.remove(name)
        self._wake()  # the next may fit too
        return self._taken[name]

    def _is_cancelled(self, name: str) -> bool:
        job = self.find(name)
        return job is None or bool(job.get("cancelled"))

    async def _attempts(self, name: str, cpus: tuple[int, ...]) -> None:
        """Runs a job until it succeeds. Raises GoogleError when it fails, CancelledJobError when it is cancelled."""
        while True:
            job = self.find(name)
            if not job or job.get("cancelled"):
                raise CancelledJobError
            fault = job["fault"]
            ordered = GoogleError(fault.get("status", "INTERNAL"), fault.get("message", "Ordered by a fault."))
            if fault.get("kind") == "operation_error" and fault["when"] == "before":
                raise ordered
            await self._launch(name, job, cpus)
            replica, code = await self._watch(name)
            if not replica:
                await self._linger(name, fault)
                if fault.get("kind") == "operation_error":
                    raise ordered
                return
            container = self._containers[name][replica]
            message = failure_message(
                job["trial"]["job"] if job.get("trial") else name,
                replica,
                code,
                out_of_memory=container.out_of_memory,
                last_lines=await container.logs(TRACEBACK_LINES, only_errors=True),
            )
            retries = 0 if job["resource"]["jobSpec"].get("scheduling", {}).get("disableRetries") else RETRIES
            if code not in TRANSIENT or job["attempt"] >= retries:
                raise invalid(message)
            self.say(name, message, "ERROR")
            await self._end(name, STOP_GRACE)
            self._update(name, {"attempt": job["attempt"] + 1, "cursors": {}})

    async def _linger(self, name: str, fault: JSON) -> None:
        """What an ordered fault does to the end of a job."""
        until = clock.time() + (fault.get("seconds", 0) if fault.get("kind") == "slow" else 0)

        def over() -> bool:
            job = self.find(name)
            held = job is not None and job["fault"].get("kind") == "hold"
            return self._is_cancelled(name) or (not held and clock.time() >= until)

        while not over():
            await self._pause()
        if self._is_cancelled(name):
            raise CancelledJobError

    async def _pause(self) -> None:
        """Waits for the next look, or for a change."""
        try:
            async with asyncio.timeout(PERIOD), self._changed:
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _launch(self, name: str, job: JSON, cpus: tuple[int, ...]) -> None:
        """Starts the job's containers, but those that run since before a kill."""
        spec: JSON = job["resource"]["jobSpec"]
        trial = Trial(**job["trial"]) if job.get("trial") else None
        folder = self.mounts.folder(name.split("/")[1])
        more: JSON = {"attempt": job["attempt"], "cpus": cpus, "trial": trial, "outputs": job.get("outputs")}
        wanted = launches(self._store.id, name, spec, folder, **more)
        there = self._containers.setdefault(name, {})
        if there.keys() != wanted.keys():
            if there and spec.get("scheduling", {}).get("restartJobOnWorkerRestart"):
                await self._end(name, STOP_GRACE)
                there = self._containers.setdefault(name, {})
            if not there:
                self.say(name, "Vertex AI is setting up this job.")
                self.say(name, "Waiting for training program to start.")
            for image in {launch.image for launch in wanted.values()}:
                await self._runner.fetch(image)
            for replica, launch in wanted.items():
                if self._is_cancelled(name):
                    raise CancelledJobError
                if replica not in there:
                    there[replica] = await self._runner.start(launch)
        if job["resource"]["state"] != "JOB_STATE_RUNNING" and not self._is_cancelled(name):
            self._update(name, state="JOB_STATE_RUNNING", startTime=job["resource"].get("startTime", clock.now()))
            self.say(name, "Job is running.")

    async def _watch(self, name: str) -> tuple[str, int]:
        """Waits for the end of an attempt: ("", 0) when the primary replica has succeeded, else who failed and how."""
        while True:
            job = self.find(name)
            if not job or job.get("cancelled"):
                raise CancelledJobError
            containers = self._containers[name]
            codes = {replica: await container.exit_code() for replica, container in containers.items()}
            await self._collect(name)
            if codes[PRIMARY] == 0:
                return "", 0
            if replica := first_failure(codes):
                return replica, codes[replica] or 0
            scheduling = job["resource"]["jobSpec"].get("scheduling", {})
            timeout = float(scheduling.get("timeout", TIMEOUT).removesuffix("s")) or float(TIMEOUT[:-1])
            if clock.time() > clock.seconds(job["resource"]["startTime"]) + timeout:
                raise GoogleError("CANCELLED", f"The job ran longer than its timeout of {timeout:g} s.")
            await self._pause()

    async def _collect(self, name: str) -> None:
        """Writes what the job's containers have said since the last time into its log."""
        for replica, container in self._containers.get(name, {}).items():
            job = self.find(name)
            if not job:
                return
            cursor: dict[str, str] = job["cursors"].get(replica, {})
            lines = await container.output(cursor)
            if not lines:
                continue
            cursor = cursor | {line.stream: line.time for line in lines}
            trial = job.get("trial") or {"job": name, "id": ""}
            said = [entries.of_line(trial["job"], replica, line, trial["id"]) for line in lines]
            with self._store.transaction():
                self._store.log(*_log_of(trial["job"]), said)
                self._update(name, {"cursors": {**job["cursors"], replica: cursor}})

    async def _end(self, name: str, grace: float) -> None:
        """Stops and removes the job's containers; between, their last lines and a trial's metrics are read."""
        containers = self._containers.get(name, {})
        await asyncio.gather(*(container.halt(grace) for container in containers.values()))
        await self._collect(name)
        job = self.find(name)
        if job and job.get("trial") and PRIMARY in containers:
            content = await containers[PRIMARY].read_file(METRIC_FILE)
            self._update(name, {"metrics": content.decode(errors="replace")})
        await asyncio.gather(*(container.stop(0) for container in containers.values()))
        self._containers.pop(name, None)


def _log_of(name: str) -> tuple[str, str]:
    """Project and job of the log of a resource, as the store has them."""
    return "/".join(name.split("/")[:2]), name.rpartition("/")[2]
