"""The ASGI application: finds the method that a request means, calls its handler, answers as Google does."""

import asyncio
import dataclasses
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from sandbox import (
    compute,
    iam,
    kms,
    oauth2,
    operations,
    resource_manager,
    service_usage,
    vertex_batch_jobs,
    vertex_contexts,
    vertex_custom_jobs,
    vertex_deployments,
    vertex_endpoints,
    vertex_models,
    vertex_operations,
    vertex_pipeline_jobs,
    vertex_predictions,
    vertex_schedules,
    vertex_tensorboards,
    vertex_tuning_jobs,
    workload_identity,
)
from sandbox.admin import Admin, linger
from sandbox.artifact_registry import packages, repositories
from sandbox.artifact_registry.registry import RegistryServer
from sandbox.batch_jobs import BatchJobs
from sandbox.cloud_logging import audit, queries
from sandbox.context import Call, Cloud, SandboxSettings
from sandbox.conventions import partial
from sandbox.discovery import PREFIXES, Method, read_request, response_violations, route
from sandbox.docker_runner import DockerRunner
from sandbox.errors import STATUS_OF_HTTP, GoogleError, invalid, not_found, unimplemented
from sandbox.fleet import Fleet
from sandbox.jobs import Jobs
from sandbox.pipelines.runs import Pipelines
from sandbox.projects import Projects, project_number
from sandbox.runner import ContainerRunner
from sandbox.storage import buckets, objects, paths
from sandbox.store import JSON, Store
from sandbox.stub_runner import StubRunner

log = logging.getLogger("sandbox")

Handler = Callable[[Call], Awaitable[Any]]

#: Every method that the sandbox implements, by its id in the discovery documents. A further API is a
#: further file with such a table, and its document in sandbox.discovery.
METHODS: dict[str, Handler] = {
    **vertex_models.METHODS,
    **vertex_endpoints.METHODS,
    **vertex_deployments.METHODS,
    **vertex_predictions.METHODS,
    **vertex_operations.METHODS,
    **vertex_batch_jobs.METHODS,
    **vertex_custom_jobs.METHODS,
    **vertex_tuning_jobs.METHODS,
    **vertex_tensorboards.METHODS,
    **vertex_pipeline_jobs.METHODS,
    **vertex_schedules.METHODS,
    **vertex_contexts.METHODS,
    **queries.METHODS,
    **buckets.METHODS,
    **objects.METHODS,
    **repositories.METHODS,
    **iam.METHODS,
    **workload_identity.METHODS,
    **kms.METHODS,
    **resource_manager.METHODS,
    **service_usage.METHODS,
    **compute.METHODS,
}
# Handlers that read the body themselves: it is a container's or a file's, or its nulls count.
RAW = {*vertex_predictions.METHODS, *buckets.RAW, *objects.RAW}
RUNNERS: dict[str, Callable[[int], ContainerRunner]] = {"docker": DockerRunner, "stub": StubRunner}
# Larger than any payload limit, so that a caller meets those limits first.
MAX_BODY = 64 * 2**20


class DroppedError(Exception):
    """A fault closes the connection."""


class SandboxServer:
    """One sandbox. An ASGI application; its lifespan opens and closes the state."""

    def __init__(self, settings: SandboxSettings) -> None:
        store = Store(settings.state)
        if settings.fresh:
            store.clear()
        runner = RUNNERS[settings.runner](settings.port)
        fleet = Fleet(runner, store.id)
        # Elsewhere Docker runs in a virtual machine, which reaches a container's port and not one of this process.
        gated = sys.platform == "linux"
        registry = RegistryServer(
            settings.state / "registry",
            settings.registry_port,
            store.id,
            gated=gated,
            certificate=settings.registry_certificate,
        )
        jobs = Jobs(store, runner)
        self.cloud = Cloud(
            settings=settings,
            store=store,
            projects=Projects(store),
            operations=operations.Operations(store, settings.operation_seconds),
            fleet=fleet,
            jobs=jobs,
            pipelines=Pipelines(store, jobs),
            batches=BatchJobs(store, fleet, partly="partial-success" in settings.suppose),
            registry=registry,
        )
        training = (vertex_custom_jobs, vertex_tuning_jobs, vertex_tensorboards)
        others = (vertex_batch_jobs, vertex_pipeline_jobs, vertex_schedules, vertex_contexts)
        for module in (vertex_models, vertex_endpoints, vertex_deployments, *training, *others):
            self.cloud.operations.kinds |= module.kinds(self.cloud)
        fleet.changed = lambda name: vertex_endpoints.replicas_changed(self.cloud, name)
        self.cloud.batches.serving_of = lambda resource: vertex_batch_jobs.serving_of(self.cloud, resource)
        self.cloud.jobs.ended = lambda name: vertex_tuning_jobs.job_ended(self.cloud, name)
        self.admin = Admin(store, settings.admin, release=self._release)

    def _release(self) -> None:
        self.cloud.operations.release()
        self.cloud.jobs.release()
        self.cloud.pipelines.release()
        self.cloud.batches.release()

    async def start(self) -> None:
        # A thread is held while Docker pulls or stops; the default of a few would make others wait.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))
        await vertex_deployments.adopt(self.cloud)
        await self.cloud.jobs.resume()
        vertex_tuning_jobs.resume(self.cloud)
        self.cloud.pipelines.resume()
        vertex_schedules.resume(self.cloud)
        self.cloud.jobs.background(vertex_schedules.watch(self.cloud))
        self.cloud.batches.resume()
        self.cloud.operations.resume()

    async def stop(self) -> None:
        await self.cloud.operations.stop()
        await self.cloud.pipelines.stop()
        await self.cloud.jobs.stop()
        await self.cloud.batches.stop()
        await self.cloud.fleet.stop()
        await asyncio.to_thread(self.cloud.registry.stop)
        self.cloud.store.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            request = Request(scope, receive)
            try:
                response = await self._answer(request)
            except DroppedError:
                # ASGI has no word for it. Both of uvicorn's protocols give `receive` as a method of
                # the request's cycle, which knows its connection.
                receive.__self__.transport.abort()  # type: ignore[attr-defined]
                await receive()  # until uvicorn knows of the disconnection; otherwise it reports a missing answer
                return
            except ClientDisconnect:
                return
            await response(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    # ------------------------------------------------------------------------------------ one request

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        api = path.split("/")[1]
        api = "storage" if api in paths.ROOTS else api if api in PREFIXES else ""
        try:
            # No password protects the sandbox, so no web page may speak to it through the user's browser.
            if "origin" in request.headers:
                raise GoogleError("PERMISSION_DENIED", "The sandbox answers no browser (the request has an Origin).")
            if path.startswith("/_sandbox/"):
                return await self.admin.answer(request)
            if path == oauth2.PATH and request.method == "POST":
                return await oauth2.issue(request, self.cloud.settings.token_lifetime)
            if path.startswith(f"/{packages.ROOT}/") and packages.api_path(path[1:]) == path[1:]:
                return await packages.answer(self.cloud, request)
            return await self._google(request, api)
        except GoogleError as error:
            return JSONResponse(error.body(api), error.http)
        except (DroppedError, ClientDisconnect):
            raise
        except Exception as error:
            log.exception("%s %s", request.method, path)
            return JSONResponse(GoogleError("INTERNAL", f"The sandbox failed: {error!r}").body(api), 500)

    async def _google(self, request: Request, api: str) -> Response:
        http, path = request.method, packages.api_path(request.url.path.lstrip("/"))
        if path.startswith("artifactregistry/"):
            api, path = "artifactregistry", packages.quoted(path)
        rest = path.removeprefix(f"{api}/")
        if api == "storage":
            http, rest = paths.route_of(request)
        # Google's REST clients ask for operations under /ui/ (the first of their http options).
        version, _, name = rest.partition("/")
        method = route(http, f"v1/{name}" if version == "ui" else rest, api)
        if method is None:
            raise not_found(f"The requested URL /{path} was not found on this server.")
        name = self.cloud.projects.by_id(name.rpartition(":")[0] if ":" in name.rpartition("/")[2] else name)
        raw = await self._body(request)
        fault = self.admin.take(method.id, name, raw)
        status = 0
        try:
            await linger(fault)
            oauth2.check(request)
            if fault.get("kind") == "status":
                code = fault["code"]
                raise GoogleError(STATUS_OF_HTTP.get(code, "UNKNOWN"), "Ordered by a fault.", http=code)
            if fault.get("kind") == "refuse":
                raise GoogleError(fault["status"], fault["message"])
            if fault.get("kind") == "drop" and fault["when"] == "before":
                raise DroppedError
            call = Call(
                cloud=self.cloud,
                method=method,
                version="" if version == "ui" else version,
                name=name,
                query=dict(request.query_params),
                body={},
                request=request,
                raw=raw,
                fault=fault if fault.get("kind") in ("operation_error", "slow", "hold") else {},
            )
            response = await self._handle(call, version)
            status = response.status_code
            self._audit(call)
            if fault.get("kind") == "drop":
                raise DroppedError
            return response
        except GoogleError as error:
            status = error.http
            self._check(method, status, error.body(method.api))
            raise
        finally:
            self.admin.journal(request.method, method.id, name, status)

    async def _handle(self, call: Call, version: str) -> Response:
        handler = METHODS.get(call.method.id)
        if handler is None:
            raise unimplemented(f"{call.method.id} ({version})")
        self._meet(call)
        service_usage.check_enabled(call)
        if call.method.id in RAW:
            answer = await handler(call)
        else:
            answer = await handler(self._read(call))
        if isinstance(answer, Response):
            return answer
        shown = self._by_number(call, answer) if call.method.vertex else answer
        if found := self._check(call.method, 200, shown):
            raise GoogleError(
                "INTERNAL", "The sandbox's answer departs from the discovery document: " + "; ".join(found)
            )
        return JSONResponse(partial(shown, call.query["fields"]) if call.query.get("fields") else shown)

    def _audit(self, call: Call) -> None:
        """Adds a change that was made to the audit log of the project."""
        if call.request.method == "GET":
            return
        name, project = call.name, call.project
        if call.method.id == "storage.buckets.insert":
            name, project = f"b/{json.loads(call.raw)['name']}", call.query["project"]
        elif not project and (bucket := self.cloud.store.get("bucket", "".join(paths.names(call)[:1]))):
            project = self.cloud.projects.by_id(f"projects/{bucket['projectNumber']}").partition("/")[2]
        by = call.request.headers.get("authorization", "")
        if project and (entry := audit.entry(call.method.id, call.version, name, project, by)):
            self.cloud.store.log(f"projects/{project}", "", [entry])

    def _read(self, call: Call) -> Call:
        try:
            body = json.loads(call.raw) if call.raw else {}
        except ValueError as error:
            raise invalid(f"Invalid JSON payload received. {error}") from None
        try:
            body = read_request(call.method, list(call.query), body)
        except GoogleError as error:
            self._violation("request", call.method, error.message)
            raise
        return dataclasses.replace(call, body=_renamed(body, self.cloud.projects.by_id))

    async def _body(self, request: Request) -> bytes:
        if int(request.headers.get("content-length", 0)) > MAX_BODY:
            raise GoogleError(
                "INVALID_ARGUMENT", f"Request payload size exceeds the limit: {MAX_BODY} bytes.", http=413
            )
        return await request.body()

    # ----------------------------------------------------------------------- contract, project numbers

    def _check(self, method: Method, status: int, body: JSON) -> list[str]:
        if not self.cloud.settings.validate:
            return []
        found = response_violations(method, status, body)
        for violation in found:
            self._violation("response", method, violation)
        return found

    def _violation(self, part: str, method: Method, message: str) -> None:
        self.admin.violations.append({"part": part, "method": method.id, "message": message})

    def _meet(self, call: Call) -> None:
        """Learns the number of a project that the call names by its id. Raises for a number of no known project."""
        for project in (call.project, call.query.get("project", "")):
            self.cloud.projects.check(project)
            self.cloud.projects.meet(project)

    def _by_number(self, call: Call, answer: JSON) -> JSON:
        """The answer as Google gives it: names carry the project's number."""
        mine, shown = f"projects/{call.project}/", f"projects/{project_number(call.project)}/"
        renamed: JSON = _renamed(answer, lambda n: shown + n.removeprefix(mine) if n.startswith(mine) else n)
        return renamed


# The fields of messages that hold names of resources, and those that hold texts of users.
NAMES = ("name", "model", "parentModel", "endpoint", "customJob", "tensorboard", "scheduleName", "mainJob", "parent")
TEXTS = ("predictions", "env", "labels", "pipelineSpec", "parameterValues", "metadata")


def _renamed(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a body with changed resource names; texts of users stay as they are."""
    if isinstance(value, list):
        return [_renamed(v, change) for v in value]
    if not isinstance(value, dict):
        return value
    return {
        k: change(v)
        if k in NAMES and isinstance(v, str)
        else [change(name) for name in v]
        if k in ("failedMainJobs", "parentContexts")
        else v
        if k in TEXTS
        else _renamed(v, change)
        for k, v in value.items()
    }
