"""The replicas of deployed models: one container each, started, watched, restarted, stopped.

https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from sandbox.errors import GoogleError, precondition
from sandbox.runner import LABEL, Container, ContainerResponse, ContainerRunner, UnreachableError
from sandbox.serving import Idle, Serving
from sandbox.store import JSON

log = logging.getLogger("sandbox")

# A health check must be answered within 10 s, and after four failures in a row Vertex AI sends the
# replica no more predictions (the page above).
HEALTH_TIMEOUT = 10.0
HEALTH_PERIOD = 10.0
HEALTH_FAILURES = 4
# Short, because a container may be ready after one second.
START_PERIOD = 0.25
# Kubernetes' terminationGracePeriodSeconds.
STOP_GRACE = 30.0
# A request in flight may take this long before its replica is stopped: the shared endpoint's limit.
DRAIN_SECONDS = 60.0
LOG_LINES = 20


class ColdError(Exception):
    """The model is scaled to zero, or is just coming back; it has been asked to start."""


@dataclass
class Sleeper:
    """A deployed model that scales to zero: when it was last asked, and since when it has been up or starting."""

    what: Serving
    idle: Idle
    asked: float
    up: float
    watcher: asyncio.Task[None]


@dataclass
class Replica:
    container: Container
    healthy: bool = False
    in_flight: int = 0
    failures: int = 0  # of health checks, in a row
    lifeless: int = 0  # likewise of liveness probes
    restarts: int = 0  # since it was last healthy
    watcher: asyncio.Task[None] | None = None


@dataclass
class Fleet:
    runner: ContainerRunner
    state: str
    #: Called with the endpoint's name after replicas became available or ceased to be.
    changed: Callable[[str], None] = lambda endpoint: None
    replicas: dict[tuple[str, str], list[Replica]] = field(default_factory=dict)
    # Tasks that bring replicas back after a start. Each ends when it has done so, or when another task needs them.
    _restoring: dict[tuple[str, str], asyncio.Task[None]] = field(default_factory=dict)
    _stopping: set[asyncio.Task[None]] = field(default_factory=set)
    _sleepers: dict[tuple[str, str], Sleeper] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------- serving

    def available(self, endpoint: str, deployed_id: str) -> int:
        return sum(r.healthy for r in self.replicas.get((endpoint, deployed_id), []))

    async def predict(
        self, endpoint: str, deployed_id: str, route: str, body: bytes, content_type: str, timeout: float
    ) -> ContainerResponse | None:
        """The answer of the least busy replica, or None when none is available.

        Raises UnreachableError, and ColdError where the model is scaled to zero.
        """
        candidates = [r for r in self.replicas.get((endpoint, deployed_id), []) if r.healthy]
        sleeper = self._sleepers.get((endpoint, deployed_id))
        if sleeper:
            sleeper.asked = time.monotonic()
            if not candidates:
                self._wake(sleeper)
                raise ColdError
        if not candidates:
            return None
        replica = min(candidates, key=lambda r: r.in_flight)
        # Equally busy ones take turns.
        group = self.replicas[endpoint, deployed_id]
        group.remove(replica)
        group.append(replica)
        replica.in_flight += 1
        try:
            return await replica.container.post(route, body, content_type, timeout)
        finally:
            replica.in_flight -= 1

    # ------------------------------------------------------------------------------------ up and down

    async def bring_up(self, what: Serving, count: int) -> None:
        """Returns when `count` replicas are available; those already there are kept.

        Raises GoogleError with the container's last log lines when one exits or is not healthy in
        time. Then the caller brings down what was started.
        """
        await self._let_go(what.key)
        await self._bring_up(what, count)
        self._watch_idleness(what)

    async def _let_go(self, key: tuple[str, str]) -> None:
        """Ends the background tasks of a deployed model."""
        if sleeper := self._sleepers.pop(key, None):
            await _cancelled(sleeper.watcher)
        if task := self._restoring.pop(key, None):
            await _cancelled(task)

    # -------------------------------------------------------------------------------- scale to zero

    def _watch_idleness(self, what: Serving) -> None:
        if what.idle:
            now = time.monotonic()
            watcher = asyncio.create_task(self._rest(what.key))
            self._sleepers[what.key] = Sleeper(what, what.idle, now, now, watcher)

    async def _rest(self, key: tuple[str, str]) -> None:
        """Stops a model's replicas whenever it has had no request for the idle period."""
        while True:
            sleeper = self._sleepers[key]
            due = max(sleeper.up + sleeper.idle.up_at_least, sleeper.asked + sleeper.idle.idle)
            if (left := due - time.monotonic()) > 0:
                await asyncio.sleep(left)
            elif any(r.in_flight for r in self.replicas.get(key, [])):
                await asyncio.sleep(0.05)
            else:
                if task := self._restoring.pop(key, None):
                    await _cancelled(task)
                await self._take_down(key, 0)
                sleeper.up = math.inf  # asleep: nothing is due until it wakes

    def _wake(self, sleeper: Sleeper) -> None:
        """Starts a sleeping model in the background; one that starts already is left alone."""
        if sleeper.up != math.inf:
            return
        sleeper.up = time.monotonic()
        self.restore(sleeper.what, sleeper.idle.replicas)
        sleeper.watcher.cancel()
        sleeper.watcher = asyncio.create_task(self._rest(sleeper.what.key))

    async def _bring_up(self, what: Serving, count: int) -> None:
        group = self.replicas.setdefault(what.key, [])
        deadline = time.monotonic() + what.timeout  # counts from here: the image was fetched before
        for replica in [r for r in group if r.watcher is None]:  # found after a kill
            if await replica.container.exit_code() is not None:
                group.remove(replica)
                await replica.container.stop(0)
        waits = [self._ready(what, r, deadline) for r in group if r.watcher is None]
        adds = [self._add(what, group, deadline) for _ in range(count - len(group))]
        await _together([*waits, *adds])

    async def _add(self, what: Serving, group: list[Replica], deadline: float) -> None:
        replica = Replica(await self.runner.start(what.launch))
        group.append(replica)
        await self._ready(what, replica, deadline)

    async def _ready(self, what: Serving, replica: Replica, deadline: float) -> None:
        container = replica.container
        probes = [p for p in (what.startup, what.health or what.route_probe) if p]
        for probe in probes:
            await asyncio.sleep(float(probe.get("initialDelaySeconds", 0)))
            failure = "not asked yet"
            while failure := await self._probe(what, container, probe):
                if (code := await container.exit_code()) is not None:
                    raise await _failed(f"Model server exited unexpectedly (exit status {code}).", container)
                if time.monotonic() > deadline:
                    raise await _failed(
                        f"Model server never became ready: {failure} after {what.timeout:g} s. Please "
                        "validate that your model file or container configuration are valid.",
                        container,
                    )
                await asyncio.sleep(START_PERIOD)
        if (code := await container.exit_code()) is not None:
            raise await _failed(f"Model server exited unexpectedly (exit status {code}).", container)
        replica.healthy = True
        replica.watcher = asyncio.create_task(self._watch(what, replica))
        self.changed(what.endpoint)

    async def bring_down(self, endpoint: str, deployed_id: str, keep: int = 0) -> None:
        """Stops all but `keep` replicas: out of the traffic, requests in flight answered, SIGTERM.

        If it is cancelled, it stops them all the same, without a caller that waits.
        """
        key = (endpoint, deployed_id)
        sleeper = self._sleepers.get(key)
        await self._let_go(key)
        await self._take_down(key, keep)
        if keep and sleeper:
            self._watch_idleness(sleeper.what)

    async def _take_down(self, key: tuple[str, str], keep: int) -> None:
        group = self.replicas.get(key, [])
        leaving = sorted(group, key=lambda r: r.healthy, reverse=True)[keep:]
        for replica in leaving:
            group.remove(replica)
        if not group:
            self.replicas.pop(key, None)
        if any(r.healthy for r in leaving):
            self.changed(key[0])
        stops = [asyncio.create_task(self._stop(r)) for r in leaving]
        for stop in stops:
            self._stopping.add(stop)
            stop.add_done_callback(self._stopping.discard)
        await asyncio.shield(asyncio.gather(*stops))

    async def _stop(self, replica: Replica, grace: float = STOP_GRACE) -> None:
        if replica.watcher:
            await _cancelled(replica.watcher)
        else:
            grace = 0  # it never served: there is nothing that it could end well
        deadline = time.monotonic() + DRAIN_SECONDS
        while replica.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await replica.container.stop(grace)

    # -------------------------------------------------------------------------------------- watching

    async def _probe(self, what: Serving, container: Container, probe: JSON) -> str:
        """Why a probe fails, or "" when it does not."""
        timeout = float(probe.get("timeoutSeconds", 1.0)) if "route" not in probe else HEALTH_TIMEOUT
        try:
            if command := probe.get("exec", {}).get("command"):
                status = await container.execute(command, timeout)
                return f"{command[0]} ended with status {status}" if status else ""
            if "tcpSocket" in probe:
                await container.connect(probe["tcpSocket"].get("port", what.launch.port), timeout)
                return ""
            asked = probe.get("httpGet", {})
            path, port = asked.get("path") or what.health_route, asked.get("port") or what.launch.port
            status = await container.get(path, port, timeout)
            # Kubernetes takes 200 to 399 for its probes, Vertex AI's health check 200 only.
            good = status == 200 if "route" in probe else 200 <= status < 400
            return "" if good else f"{path} answers {status}"
        except UnreachableError as error:
            return f"the health check gets no answer ({error})"

    async def _watch(self, what: Serving, replica: Replica) -> None:
        """Keeps one replica alive until it leaves; a container that ended is replaced by a new one."""
        period = float(what.health.get("periodSeconds", HEALTH_PERIOD))
        while True:
            await asyncio.sleep(min(period, 1.0) if replica.failures else period)
            try:
                await self._look_after(what, replica)
            except Exception as error:  # of Docker, which may come back
                log.warning("deployed model %s: %r", what.deployed_id, error)

    async def _look_after(self, what: Serving, replica: Replica) -> None:
        limit = int(what.health.get("failureThreshold", HEALTH_FAILURES))
        exited = await replica.container.exit_code() is not None
        if what.liveness and not exited:
            dead = await self._probe(what, replica.container, what.liveness)
            replica.lifeless = replica.lifeless + 1 if dead else 0
        if exited or replica.lifeless >= int(what.liveness.get("failureThreshold", 3)):
            self._set_healthy(what, replica, False)
            replica.failures, replica.lifeless = limit, 0
            await replica.container.stop(0 if exited else STOP_GRACE)
            await asyncio.sleep(min(2.0**replica.restarts - 1, 60))
            replica.restarts += 1
            replica.container = await self.runner.start(what.launch)
        elif failure := await self._probe(what, replica.container, what.health or what.route_probe):
            replica.failures += 1
            if replica.failures >= limit and replica.healthy:
                log.warning("deployed model %s: out of the traffic, %s", what.deployed_id, failure)
                self._set_healthy(what, replica, False)
        else:
            replica.failures = replica.restarts = 0
            self._set_healthy(what, replica, True)

    def _set_healthy(self, what: Serving, replica: Replica, healthy: bool) -> None:
        if replica.healthy != healthy:
            replica.healthy = healthy
            self.changed(what.endpoint)

    # ------------------------------------------------------------------------------ start and end of us

    async def adopt(self, wanted: list[tuple[Serving, int]], pending: set[tuple[str, str, str]]) -> None:
        """Takes over the containers of a killed sandbox: keeps the right ones, starts missing ones, removes the rest.

        `pending` are (endpoint, deployed id, version) of deployments that run on.
        """
        owners = pending | {(s.endpoint, s.deployed_id, s.version) for s, _ in wanted}
        orphans = []
        for container in await self.runner.find(self.state):
            labels = container.labels
            if LABEL + "job" in labels:
                continue  # see sandbox.jobs
            owner = tuple(labels.get(LABEL + k, "") for k in ("endpoint", "deployed-model", "version"))
            if owner in owners:
                self.replicas.setdefault((owner[0], owner[1]), []).append(Replica(container))
            else:
                orphans.append(container)
        for what, count in wanted:
            there = len(self.replicas.get(what.key, []))
            if count or there:
                self.restore(what, count or there)
            self._watch_idleness(what)
            if not count and not there:
                self._sleepers[what.key].up = math.inf
        for container in orphans:
            task = asyncio.create_task(container.stop(STOP_GRACE))
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)

    def restore(self, what: Serving, count: int) -> None:
        """Brings back the replicas of something deployed, in the background and until it has."""
        self._restoring[what.key] = asyncio.create_task(self._restore(what, count))

    async def _restore(self, what: Serving, count: int) -> None:
        pause = 1.0
        while True:
            try:
                await self._bring_up(what, count)
                return
            except GoogleError as error:
                log.warning("deployed model %s does not come back: %s", what.deployed_id, error.message)
            for replica in [r for r in self.replicas.get(what.key, []) if r.watcher is None]:
                await replica.container.stop(0)
                self.replicas[what.key].remove(replica)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 60)

    async def stop(self) -> None:
        """Ends every container. Models stay deployed in the state, and the next start brings them up."""
        for key in {*self._restoring, *self._sleepers}:
            await self._let_go(key)
        replicas = [r for group in self.replicas.values() for r in group]
        await asyncio.gather(*(self._stop(r, grace=10) for r in replicas), return_exceptions=True)
        if self._stopping:
            await asyncio.wait(self._stopping)
        await self.runner.close()


async def _cancelled(task: "asyncio.Task[None]") -> None:
    """Cancels a task and waits for its end, after which the containers that it was starting are gone too."""
    task.cancel()
    await asyncio.wait([task])


async def _together(work: list[Coroutine[Any, Any, None]]) -> None:
    """Waits for all; the first error cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for item in work:
                group.create_task(item)
    except* GoogleError as errors:
        first = next(_leaves(errors))
    else:
        return
    raise first


def _leaves(group: BaseExceptionGroup[GoogleError]) -> Iterator[GoogleError]:
    for error in group.exceptions:
        if isinstance(error, GoogleError):
            yield error
        else:
            yield from _leaves(error)


async def _failed(message: str, container: Container) -> GoogleError:
    with contextlib.suppress(Exception):
        if lines := await container.logs(LOG_LINES):
            message += " Last log lines of the container:\n" + "\n".join(lines)
    return precondition(message)
