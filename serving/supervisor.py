"""Starts TorchServe and the front, watches both, and ends both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from serving import connections
from serving.exported.model_contract import Contract
from serving.front import Front, FrontSettings
from serving.local_compile import compile_in_background
from serving.logs import log
from serving.run_folder import RunFolder
from serving.storage import StorageError, fetch_model
from serving.torchserve import Plan, StartError, TorchServe, listen

START_SECONDS = 180  # for a worker to run its first picture, the largest network on a slow processor included
DRAIN_SECONDS = 5  # for the requests that are left after the grace; Vertex AI kills 10 s after SIGTERM
FETCH_PAUSES = (1, 3, 9, None)  # seconds between attempts to fetch the model
CLOSE_SECONDS = 1  # for connections to send the rest of their answers


@dataclass(frozen=True)
class Options:
    """The options of a start. model: folder with the model to use instead of the archive's, local or gs://.

    sample: a picture for the line that is printed for people. grace: seconds after SIGTERM in which requests are taken.
    compiled: folder in which a compiled network is made for the next start, if any.
    """

    host: str
    port: int
    front: FrontSettings
    torchserve: Plan
    model: str = ""
    sample: str = ""
    grace: float = 3
    compiled: Path | None = None


class Supervisor:
    """Runs both and stops both.

    SIGTERM: /ping answers 503 at once, so that a load balancer looks for another server; requests are taken for the
    grace, because the load balancer needs a while to notice; then they are refused, and those in flight are finished.
    SIGINT comes from a person at a terminal: it has no grace, and the second one waits for no request.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.folder: RunFolder = options.torchserve.folder
        self.torchserve: TorchServe | None = None
        self.url = ""
        self._served: dict[str, Any] = {}  # name and version of an exported model
        self._ready = asyncio.Event()
        self._stop, self._grace_over, self._at_once = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C. Raises StartError, StorageError and OSError."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        public = listen(self.options.host, self.options.port)
        host = f"[{self.options.host.strip('[]')}]" if ":" in self.options.host else self.options.host
        self.url = f"http://{host}:{public.getsockname()[1]}"
        log("starting", url=self.url, grpc=self.options.torchserve.grpc)
        front = Front(self.options.front)
        server = connections.server(front)
        serving = asyncio.create_task(server.serve([public]))
        watching = asyncio.create_task(self._serve_model(front))
        compiling = asyncio.create_task(self._compile())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait((serving, watching, stopping), return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()  # raises the exception that ended it
            await self._finish(front, watching)
        finally:
            watching.cancel()
            compiling.cancel()
            await asyncio.wait([watching, compiling])
            if self.torchserve is not None:
                self.torchserve.end()  # requests that did not end in time are answered 503 now
            server.should_exit = True
            await asyncio.wait([serving], timeout=CLOSE_SECONDS)
            server.force_exit = True
            front.close()

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    def _interrupt(self) -> None:
        if self._grace_over.is_set():
            self._at_once.set()
        self._stop.set()
        self._grace_over.set()

    async def _finish(self, front: Front, watching: asyncio.Task[None]) -> None:
        """Gives load balancers time to notice that this server leaves, and finishes its requests."""
        front.leaving = True
        log("leaving", open_requests=front.open)
        if self.ready:  # else no load balancer knows this server yet
            grace = asyncio.create_task(self._grace_over.wait())
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait((grace, watching), timeout=self.options.grace, return_when=first)
            grace.cancel()
        front.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._until_quiet(front), DRAIN_SECONDS)

    async def _until_quiet(self, front: Front) -> None:
        """Waits for requests in flight. The front does not know of requests over gRPC, so their workers report them."""
        quiet = 0
        while quiet < 5 and not self._at_once.is_set() and self.torchserve is not None and self.torchserve.running():
            # Between two requests over gRPC no worker is busy for a moment, so this looks several times.
            quiet = 0 if front.open or self.folder.answers_grpc() else quiet + 1
            await asyncio.sleep(0.02)

    async def _serve_model(self, front: Front) -> None:
        """Starts TorchServe and keeps the sign of life fresh; never returns. Raises StartError when no server is
        left, StorageError and ContractError."""
        plan, probe = self.options.torchserve, simplejpeg.encode_jpeg(np.full((8, 160, 3), 114, np.uint8))
        model = await self._model()
        if model is not None and model.is_dir():
            contract = await asyncio.to_thread(Contract.load, model)
            plan = plan.of_exported(contract.name, contract.version)
            front.serve_exported(contract)
            self._served = {"model": contract.name, "version": contract.version}
            probe = json.dumps({"instances": [contract.examples[0].instance]}).encode()
        self.torchserve = plan.start(model)
        began = time.monotonic()
        probes: set[asyncio.Task[None]] = set()
        workers = self.options.torchserve.workers
        while True:
            if not self.torchserve.running():
                raise StartError(f"TorchServe ended by itself with status {self.torchserve.end()}")
            if front.healthy() and not self.ready:
                self._ready.set()
                self._report(time.monotonic() - began)
            elif not self.ready and time.monotonic() > began + START_SECONDS:
                raise StartError(f"no worker was ready within {START_SECONDS} s; the log above says why")
            if reason := self.folder.failure():
                if not self.ready:
                    raise StartError(reason)
                log("a worker could not be set up again", logging.ERROR, reason=reason)
            # One probe a worker, because a stuck worker keeps one of them, and the next must reach another worker.
            probes = {probe for probe in probes if not probe.done()}
            if self.ready and len(probes) < workers:
                probes.add(asyncio.create_task(front.probe(probe)))
            await asyncio.sleep(front.settings.stuck_seconds / 10 if self.ready else 0.1)

    async def _compile(self) -> None:
        """Make a compiled network for the next start, if that is wanted. The start comes first."""
        if self.options.compiled is not None:
            await self._ready.wait()
            assert self.options.torchserve.archive is not None
            checkpoint = next(self.options.torchserve.archive.glob("*.pt"))
            await compile_in_background(checkpoint, self.options.compiled, os.environ.get("HEADCOUNT_CLASS", "person"))

    async def _model(self) -> Path | None:
        """Returns the model to use instead of the archive's: a checkpoint, or the folder of an exported model.

        A failure that may pass does not end the start at once, because on Vertex AI it would end a deployment that took
        twenty minutes. The loop is our own, because the image has no library for retries.
        """
        for pause in FETCH_PAUSES if self.options.model else ():
            log("fetching the model", uri=self.options.model)
            try:
                return await asyncio.to_thread(fetch_model, self.options.model, self.folder.path)
            except StorageError as error:
                if error.code != 503 or pause is None:
                    raise
                log("the model could not be fetched, trying again", logging.WARNING, reason=str(error))
                await asyncio.sleep(pause)
        return None

    def _report(self, seconds: float) -> None:
        workers, sample, facts = self.options.torchserve.workers, self.options.sample, self.folder.worker_facts()
        log("ready", seconds=round(seconds, 1), workers=workers, url=self.url, sample=sample, **self._served, **facts)


__all__ = ["Options", "StartError", "Supervisor"]
