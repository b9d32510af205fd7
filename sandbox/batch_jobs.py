"""Batch prediction jobs as they run: the replicas of a model version are started, asked in batches, and stopped.

A job is a document of the kind `batchJob`: `resource`, as the API shows it, and `fault` and `cancelled`. Its output is
stored at its end, so a sandbox that was killed begins the job again and leaves no half of an output.
"""

import asyncio
import itertools
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO, Any

from sandbox import clock
from sandbox.batch_instances import (
    ATTEMPTS,
    REQUEST_SECONDS,
    InstanceError,
    Item,
    of_csv,
    of_file,
    of_json_lines,
    predictions,
    refused,
    request,
    split_uri,
    wildcard,
)
from sandbox.errors import GoogleError, invalid, not_found
from sandbox.fleet import Fleet
from sandbox.runner import UnreachableError
from sandbox.serving import Serving
from sandbox.storage.contents import content_file, live_object, save
from sandbox.store import JSON, Store

log = logging.getLogger("sandbox")

KIND = "batchJob"
ENDED = ("JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_PARTIALLY_SUCCEEDED")
# Requests that a replica gets at once. The number on Vertex AI is not documented.
TOGETHER = 4
MOST_PARTIAL_FAILURES = 20  # "This field never exceeds 20 entries."


class BatchJobs:
    """The jobs that run. `serving_of` makes the settings of the replicas from a job's resource."""

    def __init__(self, store: Store, fleet: Fleet, partly: bool = False) -> None:
        self._store = store
        self._fleet = fleet
        #: Whether a job of which some instances failed ends as partially succeeded.
        self._partly = partly
        self.serving_of: Callable[[JSON], Serving]
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._released = asyncio.Event()

    def find(self, name: str) -> JSON | None:
        return self._store.get(KIND, name)

    def update(self, name: str, **fields: Any) -> None:
        """Changes a job's resource. A deleted job stays so."""
        with self._store.transaction():
            if job := self.find(name):
                job["resource"] |= {**fields, "updateTime": clock.now()}
                self._store.put(KIND, name, job)

    def start(self, name: str) -> None:
        self._tasks[name] = asyncio.create_task(self._run(name))

    def cancel(self, name: str) -> None:
        """Ends a job, whose output is then none; one that has ended stays as it is."""
        if task := self._tasks.get(name):
            with self._store.transaction():
                job = self.find(name)
                assert job is not None
                job["cancelled"] = True
                self._store.put(KIND, name, job)
            self.update(name, state="JOB_STATE_CANCELLING")
            task.cancel()

    def release(self) -> None:
        """Lets go of the jobs that a fault holds."""
        for name in self._tasks:
            if (job := self.find(name)) and job["fault"].get("kind") == "hold":
                self._store.put(KIND, name, {**job, "fault": {}})
        self._released.set()
        self._released = asyncio.Event()

    def resume(self) -> None:
        """At start: begins the jobs of before again."""
        for name, job in self._store.list(KIND):
            if job["resource"]["state"] not in ENDED:
                self.start(name)

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------- one job

    async def _run(self, name: str) -> None:
        job = self.find(name)
        assert job is not None
        outcome: JSON
        try:
            if job.get("cancelled"):
                raise asyncio.CancelledError
            outcome = await self._work(name, job)
        except asyncio.CancelledError:
            job = self.find(name)
            if not job or not job.get("cancelled"):
                return  # the sandbox is stopping, and the next start begins the job again
            outcome = {"state": "JOB_STATE_CANCELLED", "error": {"code": 1, "message": "CANCELED"}}
        except GoogleError as error:
            outcome = {"state": "JOB_STATE_FAILED", "error": error.rpc_status()}
        except Exception as error:
            log.exception("batch prediction job %s", name)
            internal = GoogleError("INTERNAL", f"Internal error encountered: {error!r}")
            outcome = {"state": "JOB_STATE_FAILED", "error": internal.rpc_status()}
        self.update(name, **outcome, endTime=clock.now())
        self._tasks.pop(name, None)

    async def _work(self, name: str, job: JSON) -> JSON:
        """Runs a job to its end and returns what its resource has then. Raises GoogleError where it fails."""
        resource, fault = job["resource"], job["fault"]
        ordered = GoogleError(fault.get("status", "INTERNAL"), fault.get("message", "Ordered by a fault."))
        if fault.get("kind") == "operation_error" and fault["when"] == "before":
            raise ordered
        what = self.serving_of(resource)
        replicas = await self._replicas(resource)
        files = self._files(resource["inputConfig"])
        self.update(name, state="JOB_STATE_PENDING")
        try:
            await self._fleet.runner.fetch(what.launch.image)
            await self._fleet.bring_up(what, replicas)
            self.update(name, state="JOB_STATE_RUNNING", startTime=resource.get("startTime", clock.now()))
            with ExitStack() as stack:
                run = BatchRun(self, resource, what, replicas, stack)
                await run.count(files)
                await self._linger(name, fault)
                if fault.get("kind") == "operation_error":
                    raise ordered
                return run.finish(self._store, partly=self._partly)
        finally:
            await self._fleet.bring_down(*what.key)

    async def ask(self, what: Serving, body: bytes) -> tuple[int, bytes]:
        """The status and the body of a replica's answer; 503 where there is none."""
        try:
            answer = await self._fleet.predict(*what.key, what.predict_route, body, "application/json", REQUEST_SECONDS)
        except UnreachableError as error:
            return (504, b"upstream request timeout") if error.timeout else (503, str(error).encode())
        return (answer.status, answer.body) if answer else (503, b"no replica is available")

    async def _linger(self, name: str, fault: JSON) -> None:
        """What an ordered fault does to the end of a job."""
        if fault.get("kind") == "slow":
            await asyncio.sleep(fault["seconds"])
        while (job := self.find(name)) and job["fault"].get("kind") == "hold":
            await self._released.wait()

    async def _replicas(self, resource: JSON) -> int:
        """The replicas that run here: those that the job asks for, but no more than this machine has CPUs."""
        cpus = len(await self._fleet.runner.cpus())
        return min(int(resource["dedicatedResources"].get("startingReplicaCount", 1)), cpus)

    # --------------------------------------------------------------------------------------------------- input

    def _files(self, config: JSON) -> list[tuple[str, JSON]]:
        """URI and object of each file of the input. Raises INVALID_ARGUMENT."""
        found: dict[str, JSON] = {}
        try:
            for uri in config["gcsSource"]["uris"]:
                bucket, pattern = split_uri(uri)
                names = wildcard(pattern)
                for key, item in self._store.list("object", f"{bucket}/"):
                    name = key.removeprefix(f"{bucket}/").partition("\n")[0]
                    if "timeDeleted" not in item and (name == pattern or names.fullmatch(name)):
                        found[f"gs://{bucket}/{name}"] = item
        except InstanceError as error:
            raise invalid(str(error)) from None
        if not found:
            raise not_found(f"No files match the input URIs {', '.join(config['gcsSource']['uris'])}.")
        return sorted(found.items())

    def items(self, files: list[tuple[str, JSON]], resource: JSON) -> Iterator[Item | InstanceError]:
        """The instances of the input, one after the other."""
        config, kind = resource.get("instanceConfig", {}), resource["inputConfig"]["instancesFormat"]
        for _, item in files:
            with content_file(self._store, item["file"]).open(encoding="utf-8", newline="") as lines:
                if kind == "jsonl":
                    yield from of_json_lines(lines, config)
                elif kind == "csv":
                    yield from of_csv(lines, config)
                else:
                    yield from (self._listed(line.strip()) for line in lines if line.strip())

    def _listed(self, uri: str) -> Item | InstanceError:
        try:
            item = live_object(self._store, *split_uri(uri))
        except InstanceError as error:
            return error
        if item is None:
            return InstanceError(f"The file {uri} cannot be read: it does not exist.")
        return of_file(uri, content_file(self._store, item["file"]).read_bytes())


class BatchRun:
    """The progress of one run of a job."""

    def __init__(self, jobs: BatchJobs, resource: JSON, what: Serving, replicas: int, stack: ExitStack) -> None:
        self._jobs, self._resource, self._what, self._replicas = jobs, resource, what, replicas
        self._size = int(resource.get("manualBatchTuningParameters", {}).get("batchSize", 0)) or 64
        # As many files of results as replicas; their number on Vertex AI is "nondeterministic".
        self._results = [self._file(stack) for _ in range(replicas)]
        self._failed, self._why = self._file(stack), Counter[str]()
        self._unreadable: list[JSON] = []
        self._good = self._bad = 0
        self._began = self._told = time.monotonic()
        self._turns = itertools.cycle(self._results)

    @staticmethod
    def _file(stack: ExitStack) -> IO[str]:
        return stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))

    async def count(self, files: list[tuple[str, JSON]]) -> None:
        """Asks for all predictions."""
        batches = self._batches(files)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._replicas * TOGETHER):
                group.create_task(self._worker(batches))

    def _batches(self, files: list[tuple[str, JSON]]) -> Iterator[list[Item]]:
        batch: list[Item] = []
        for item in self._jobs.items(files, self._resource):
            if isinstance(item, InstanceError):
                self._bad += 1
                self._why[str(item)] += 1
                self._unreadable.append(invalid(str(item)).rpc_status())
                continue
            batch.append(item)
            if len(batch) == self._size:
                yield batch
                batch = []
        if batch:
            yield batch

    async def _worker(self, batches: Iterator[list[Item]]) -> None:
        for batch in batches:
            await self._predict(batch)
            self._tell()

    async def _predict(self, batch: list[Item]) -> None:
        body, began = request(batch, self._resource.get("modelParameters")), time.monotonic()
        for _ in range(ATTEMPTS):
            status, answer = await self._jobs.ask(self._what, body)
            if status == 200:
                break
        try:
            if status != 200:
                raise InstanceError(refused(status, answer, time.monotonic() - began))
            found = predictions(answer, len(batch))
        except InstanceError as error:
            self._bad += len(batch)
            self._why[str(error)] += len(batch)
            status_ = {"code": 2, "message": str(error)}
            self._failed.writelines(json.dumps({**item.shown, "error": status_}) + "\n" for item in batch)
            return
        self._good += len(batch)
        pairs = zip(batch, found, strict=True)
        next(self._turns).writelines(json.dumps({**item.shown, "prediction": one}) + "\n" for item, one in pairs)

    def _tell(self, *, last: bool = False) -> None:
        """Shows the progress in the resource, about once a second."""
        if last or time.monotonic() > self._told + 1:
            self._told = time.monotonic()
            self._jobs.update(self._resource["name"], **self._progress())

    def _progress(self) -> JSON:
        hours = self._replicas * (time.monotonic() - self._began) / 3600
        stats = {"successfulCount": str(self._good), "failedCount": str(self._bad)}
        return {"completionStats": stats, "resourcesConsumed": {"replicaHours": hours}}

    def finish(self, store: Store, *, partly: bool) -> JSON:
        """Stores the output and returns the end of the job's resource. Raises NOT_FOUND without the bucket."""
        folder = self._resource["outputInfo"]["gcsOutputDirectory"]
        bucket, prefix = split_uri(folder)
        stats = "".join(f"{(message, number)!r}\n" for message, number in self._why.items())
        written = {
            **{f"prediction.results-{i:05}-of-{len(self._results):05}": _text(f) for i, f in enumerate(self._results)},
            "prediction.errors_stats-00000-of-00001": stats.encode(),
            **({"errors_0001.jsonl": text} if (text := _text(self._failed)) else {}),
        }
        for name, content in written.items():
            save(store, bucket, f"{prefix}/{name}", content)
        some = {"partialFailures": self._unreadable[:MOST_PARTIAL_FAILURES]} if self._unreadable else {}
        done = {**self._progress(), **some}
        if self._bad and not self._good:
            message = next(iter(self._why))
            return {**done, "state": "JOB_STATE_FAILED", "error": invalid(message).rpc_status()}
        state = "JOB_STATE_PARTIALLY_SUCCEEDED" if partly and self._bad else "JOB_STATE_SUCCEEDED"
        return {**done, "state": state}


def _text(file: IO[str]) -> bytes:
    file.seek(0)
    return file.read().encode()
