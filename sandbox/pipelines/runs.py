"""Pipeline jobs while they run: a process for each DAG, and a custom job for each container, as on Vertex AI.

A job is a document of the kind `pipelineJob`: `resource`, as the API shows it but for `jobDetail`; `tasks` by their
taskUniqueName, from which `sandbox.pipelines.details` makes it; `arguments`, `scheduled`, `cancelled` and `fault`.
After a restart of the sandbox a job's process begins anew, and a container that was already started is answered from
its custom job.
"""

import asyncio
import json
import logging
import multiprocessing
import shutil
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from sandbox import clock
from sandbox.cloud_logging import entries
from sandbox.errors import GoogleError
from sandbox.jobs import Jobs, new_job
from sandbox.pipelines.templates import machine, output_folder
from sandbox.projects import project_number
from sandbox.store import JSON, Store

log = logging.getLogger("sandbox")

ENDED = ("PIPELINE_STATE_SUCCEEDED", "PIPELINE_STATE_FAILED", "PIPELINE_STATE_CANCELLED")
TASK_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "SKIPPED", "NOT_TRIGGERED")
CANCELLED: JSON = {"code": 1, "message": "CANCELED"}
# On the resources of a run, for its costs: PipelineJob.labels of the discovery document.
BILLING = "vertex-ai-pipelines-run-billing-id"
PRELOADED = ["sandbox.pipelines.child", "sandbox.pipelines.runs"]


class Pipelines:
    def __init__(self, store: Store, jobs: Jobs) -> None:
        self._store = store
        self._jobs = jobs
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: dict[str, asyncio.Event] = {}
        self._stopping = False
        # Importing kfp takes two seconds: one process does it, and is forked for each job.
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(PRELOADED)
        #: Called with a job's name after it has ended.
        self.ended: Callable[[str], None] = lambda name: None

    # --------------------------------------------------------------------------------------------- documents

    def find(self, name: str) -> JSON | None:
        return self._store.get("pipelineJob", name)

    def put(self, resource: JSON, arguments: JSON, fault: JSON, scheduled: str = "") -> None:
        """Stores a new job. Inside a transaction; then `start`. `scheduled`: when a schedule wanted it."""
        document = {"resource": resource, "arguments": arguments, "tasks": {}, "fault": fault, "cancelled": False}
        document["scheduled"] = scheduled or resource["createTime"]
        self._store.put("pipelineJob", resource["name"], document)
        self._say(resource)

    def _change(self, name: str, change: Callable[[JSON], None]) -> None:
        """Changes a job's document, which must be there, and says a new state in its log."""
        with self._store.transaction():
            document = self.find(name)
            assert document is not None
            before = document["resource"]["state"]
            change(document)
            document["resource"]["updateTime"] = clock.now()
            self._store.put("pipelineJob", name, document)
            if document["resource"]["state"] != before:
                self._say(document["resource"])

    def _say(self, resource: JSON) -> None:
        name = resource["name"]
        entry = entries.of_pipeline(name, resource["state"], resource.get("error", {}).get("message", ""))
        self._store.log("/".join(name.split("/")[:2]), name.rpartition("/")[2], [entry])

    # ------------------------------------------------------------------------------------- start, end and cancellation

    def start(self, name: str) -> None:
        """Begins a job whose document is in the store, or goes on with it."""
        if self._stopping:
            return  # the next start begins it
        self._cancelled[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._run(name))

    def cancel(self, name: str) -> None:
        """Asks a job to end; one that has ended stays as it is."""
        document = self.find(name)
        if not document or document["resource"]["state"] in ENDED:
            return

        def change(document: JSON) -> None:
            document["cancelled"] = True
            document["resource"]["state"] = "PIPELINE_STATE_CANCELLING"

        self._change(name, change)
        if name in self._cancelled:
            self._cancelled[name].set()

    def release(self) -> None:
        """Lets go of the jobs whose first container a fault would hold, and that have none yet."""
        for name, document in self._store.list("pipelineJob"):
            if document["fault"].get("kind") == "hold":
                self._store.put("pipelineJob", name, {**document, "fault": {}})

    def resume(self) -> None:
        """At start, after the custom jobs: goes on with the jobs of before."""
        for name, document in self._store.list("pipelineJob"):
            if document["resource"]["state"] not in ENDED:
                self.start(name)

    async def stop(self) -> None:
        """Ends the processes. The next start goes on with their jobs."""
        self._stopping = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # It would end by itself a moment after this process.
        await asyncio.to_thread(forkserver._forkserver._stop)  # type: ignore[attr-defined]
        # The folder of its socket goes at a normal end only, and uvicorn ends by the signal that it got.
        config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
        if folder := config.pop("tempdir", None):
            shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------- one job

    async def _run(self, name: str) -> None:
        project = name.split("/")[1]
        try:
            # Held from the first to the last task: opening it copies every object of the project.
            folder = await self._jobs.mounts.open(project)
            try:
                error = await self._carry_out(name, str(folder))
            except Exception as problem:
                log.exception("pipeline job %s", name)
                error = GoogleError("INTERNAL", f"Internal error occurred: {problem!r}").rpc_status()
            await self._end_containers(name)
            try:
                await self._jobs.mounts.close(project)
            except Exception:  # of the disk; the job ends all the same
                log.exception("end of pipeline job %s", name)
        except asyncio.CancelledError:
            return  # the sandbox is stopping, and the next start takes the job up
        self._finish(name, error)
        del self._tasks[name], self._cancelled[name]
        self.ended(name)

    def _finish(self, name: str, error: JSON | None) -> None:
        def change(document: JSON) -> None:
            resource, now = document["resource"], clock.now()
            state = "SUCCEEDED"
            if document["cancelled"]:
                state = "CANCELLED"
                resource["error"] = CANCELLED
            elif error:
                state = "FAILED"
                resource["error"] = error
            for task in document["tasks"].values():
                if task["state"] not in TASK_ENDED:
                    task |= {"state": "CANCELLED", "endTime": now, "error": CANCELLED}
            resource |= {"state": f"PIPELINE_STATE_{state}", "endTime": now}

        if self.find(name):
            self._change(name, change)

    async def _carry_out(self, name: str, folder: str) -> JSON | None:
        """Runs the job's process, and returns the job's error or None."""
        document = self.find(name)
        assert document is not None
        fault = document["fault"]
        ordered = GoogleError(fault.get("status", "INTERNAL"), fault.get("message", "Ordered by a fault.")).rpc_status()
        if fault.get("kind") == "operation_error" and fault["when"] == "before":
            return ordered
        if document["cancelled"]:
            return CANCELLED
        ours, theirs = self._processes.Pipe()
        order = self._order(document, folder)
        process = self._processes.Process(target=_child, args=(theirs, order), daemon=True)
        messages: asyncio.Queue[JSON | None] = asyncio.Queue()
        waiting: set[asyncio.Task[Any]] = set()
        cancelled = asyncio.create_task(self._cancelled[name].wait())
        try:
            await asyncio.to_thread(process.start)
            theirs.close()
            self._change(name, _running)
            asyncio.get_running_loop().add_reader(ours.fileno(), _receive, ours, messages)
            while True:
                message = asyncio.create_task(messages.get())
                waiting.add(message)
                await asyncio.wait({message, cancelled}, return_when=asyncio.FIRST_COMPLETED)
                if cancelled.done():
                    return CANCELLED
                waiting.discard(message)
                received = message.result()
                if received is None:
                    return GoogleError("INTERNAL", "The process of the pipeline has ended early.").rpc_status()
                if received["kind"] == "end":
                    error: JSON | None = received["error"]
                    return ordered if fault.get("kind") == "operation_error" else self._job_error(name, error)
                self._handle(name, received, ours, waiting)
        finally:
            for task in (cancelled, *waiting):
                task.cancel()
            asyncio.get_running_loop().remove_reader(ours.fileno())
            if process.pid:
                process.kill()
                await asyncio.shield(asyncio.to_thread(process.join))
            ours.close()
            theirs.close()

    def _order(self, document: JSON, folder: str) -> JSON:
        """All that the process of a job needs; see `sandbox.pipelines.child`."""
        resource = document["resource"]
        parts = resource["name"].split("/")
        number = project_number(parts[1])
        return {
            "spec": resource["pipelineSpec"],
            "arguments": document["arguments"],
            "name": "/".join(["projects", number, *parts[2:]]),
            "job": parts[-1],
            "uid": resource["labels"][BILLING],
            "root": f"{output_folder(resource)}/{number}/{parts[-1]}",
            "buckets": folder,
            "created": resource["createTime"],
            "scheduled": document["scheduled"],
            "failFast": resource.get("runtimeConfig", {}).get("failurePolicy") == "PIPELINE_FAILURE_POLICY_FAIL_FAST",
        }

    def _job_error(self, name: str, error: JSON | None) -> JSON | None:
        """The error of a job as Vertex AI words it, around that of the DAG."""
        if not error:
            return None
        project, job = name.split("/")[1], name.rpartition("/")[2]
        said = (
            f"{error['message']}; Job (project_id = {project}, job_id = {job}) is failed due to the above error.; "
            f"Failed to handle the job: {{project_number = {project_number(project)}, job_id = {job}}}"
        )
        return {**error, "message": said}

    # ------------------------------------------------------------------------------------ messages of the process

    def _handle(self, name: str, message: JSON, connection: Connection, waiting: set[asyncio.Task[Any]]) -> None:
        def answer(**fields: Any) -> None:
            connection.send_bytes(json.dumps({"id": message["id"], **fields}).encode())

        async def run() -> None:
            try:
                error = await self._run_container(name, message)
            except GoogleError as problem:
                error = problem.rpc_status()
            answer(error=error)

        match message["kind"]:
            case "task":
                self._change(name, lambda document: _note(document, message))
            case "run":
                task = asyncio.create_task(run())
                waiting.add(task)
                task.add_done_callback(waiting.discard)
            case "cached":
                answer(outputs=self._cached(name, message))
            case "cache":
                with self._store.transaction():
                    self._store.put("pipelineCache", self._cache_name(name, message["key"]), message["outputs"])

    def _cache_name(self, name: str, key: str) -> str:
        """Runs share results where project, region and pipeline are the same."""
        document = self.find(name)
        assert document is not None
        pipeline = document["resource"]["pipelineSpec"]["pipelineInfo"]["name"]
        return f"{'/'.join(name.split('/')[:4])}/{pipeline}/{key}"

    def _cached(self, name: str, message: JSON) -> JSON | None:
        document = self.find(name)
        task = (document or {"tasks": {}})["tasks"].get(message["task"], {})
        if task.get("jobs"):  # before a restart it was carried out
            return None
        return self._store.get("pipelineCache", self._cache_name(name, message["key"]))

    async def _run_container(self, name: str, message: JSON) -> JSON | None:
        """Runs a container as a custom job, and returns its error or None."""
        document = self.find(name)
        assert document is not None
        started: list[str] = document["tasks"][message["task"]]["jobs"]
        if message["attempt"] < len(started):
            job = started[message["attempt"]]
        else:
            job = self._start_container(name, document, message)
        resource = await self._jobs.wait(job)
        if not resource:
            return GoogleError("NOT_FOUND", f"CustomJob {job} was deleted while the task ran.").rpc_status()
        if resource["state"] == "JOB_STATE_SUCCEEDED":
            return None
        error: JSON = resource.get("error", {"code": 13, "message": "The custom job has failed."})
        return error

    def _start_container(self, name: str, document: JSON, message: JSON) -> str:
        pipeline = document["resource"]
        container: JSON = {"imageUri": message["image"], "command": message["command"], "args": message["args"]}
        container["env"] = [{"name": key, "value": value} for key, value in message["env"].items()]
        limits = (message[key] for key in ("cpus", "memory", "accelerator", "accelerators"))
        pool = {"machineSpec": machine(*limits), "replicaCount": "1"}
        spec: JSON = {"workerPoolSpecs": [{**pool, "containerSpec": {k: v for k, v in container.items() if v}}]}
        spec |= {key: pipeline[key] for key in ("serviceAccount", "network") if key in pipeline}
        resource: JSON = {"displayName": f"{name.rpartition('/')[2]}-{message['task']}"[:128], "jobSpec": spec}
        resource |= {key: pipeline[key] for key in ("labels", "encryptionSpec") if key in pipeline}
        made = new_job("/".join(name.split("/")[:4]), "customJobs", resource)
        first = not any(task["jobs"] for task in document["tasks"].values())
        fault = document["fault"] if first and document["fault"].get("kind") in ("hold", "slow") else {}
        with self._store.transaction():
            self._change(name, lambda document: document["tasks"][message["task"]]["jobs"].append(made["name"]))
            self._jobs.put(made, fault, outputs=message["outputs"])
            self._jobs.say(made["name"], "Waiting for job to be provisioned.")
        self._jobs.start(made["name"])
        return str(made["name"])

    async def _end_containers(self, name: str) -> None:
        """Cancels the custom jobs that still run, and waits for them."""
        document = self.find(name)
        running = [
            task["jobs"][-1]
            for task in (document or {"tasks": {}})["tasks"].values()
            if task["jobs"] and task["state"] not in TASK_ENDED
        ]
        for job in running:
            self._jobs.cancel(job)
        for job in running:
            await self._jobs.wait(job)


def _child(connection: Connection, order: JSON) -> None:
    from sandbox.pipelines import child  # in the job's process

    child.run(connection, order)


def _receive(connection: Connection, messages: asyncio.Queue[JSON | None]) -> None:
    try:
        while connection.poll():
            messages.put_nowait(json.loads(connection.recv_bytes()))
    except (EOFError, OSError):
        asyncio.get_running_loop().remove_reader(connection.fileno())
        messages.put_nowait(None)


def _running(document: JSON) -> None:
    """The job runs, and has its first task, which stands for the whole DAG."""
    resource, now = document["resource"], clock.now()
    resource.setdefault("startTime", now)
    if not document["cancelled"]:
        resource["state"] = "PIPELINE_STATE_RUNNING"


def _note(document: JSON, message: JSON) -> None:
    """Notes how a task stands. After a restart, one that has ended is told again, and stays as it is."""
    now = clock.now()
    new = {key: message[key] for key in ("name", "id", "parent", "type")} | {"createTime": now, "jobs": []}
    task = document["tasks"].setdefault(message["unique"], new)
    if task.get("state") in TASK_ENDED:
        return
    task |= {key: message[key] for key in ("state", "inputs", "outputs") if message[key] or key == "state"}
    if message["state"] in TASK_ENDED:
        task["endTime"] = now
        if message["error"]:
            task["error"] = message["error"]
