"""Load on a server over HTTP, from a closed and from an open loop of clients.

The clients of a closed loop wait for an answer before they ask again, so that a server that stalls is asked less. An
open loop asks at times that are chosen in advance, as independent users do, and counts each latency from the time at
which the request was due. A stall therefore counts for every request that it delays.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

CLIENTS = 4  # of the closed loop: two for each worker
OPEN_SHARE = 0.6  # load of the open loop, as a share of the closed loop's rate; Vertex AI scales out at 60 % CPU
OPEN_CLIENTS = 32  # of the open loop, enough that a request hardly ever waits for one of them
ANSWER_SECONDS = 60
IDLE_SECONDS = 1  # a server may close a connection that was idle for longer


class BenchError(Exception):
    """An answer was wrong or missing, so that no figure of this run is worth anything."""


@dataclass(frozen=True)
class Question:
    """What a server is asked, and how many people it has to find.

    server: its name in messages. count: reads the number of people from the content of an answer.
    """

    server: str
    port: int
    path: str
    content_type: str
    body: bytes
    expected: int
    count: Callable[[bytes], int]

    def ask(self, connection: http.client.HTTPConnection) -> None:
        """Ask once. Raises BenchError unless the answer is 200 with the expected count."""
        try:
            connection.request("POST", self.path, self.body, {"Content-Type": self.content_type})
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise BenchError(f"{self.server} did not answer a request: {error!r}") from None
        if answer.status != 200:
            raise BenchError(f"{self.server} answered a request with {answer.status}: {content[:300]!r}")
        try:
            counted = self.count(content)
        except (ValueError, KeyError, TypeError):
            raise BenchError(f"{self.server} answered a request without a count: {content[:300]!r}") from None
        if counted != self.expected:
            raise BenchError(f"{self.server} counted {counted} people where there are {self.expected}")


@dataclass
class LoadResult:
    """What a loop measured, in seconds: each latency, the time by the clock, and the CPU time of the clients."""

    latencies: list[float] = field(default_factory=list)
    seconds: float = 0
    own_cpu: float = 0

    @property
    def rate(self) -> float:
        """Requests a second by the clock."""
        return len(self.latencies) / self.seconds


def closed_loop(question: Question, seconds: float = 0, requests: int = 0, clients: int = CLIENTS) -> LoadResult:
    """Ask for so many seconds or so often. Raises BenchError."""
    end = time.perf_counter() + seconds if seconds else float("inf")
    left = iter(range(requests)) if requests else iter(int, 1)  # the second one never ends

    def due() -> float | None:
        now = time.perf_counter()
        return now if now < end and next(left, None) is not None else None

    return _run(question, due, clients)


def open_loop(question: Question, rate: float, seconds: float, seed: int) -> LoadResult:
    """Ask at the times of a Poisson process of that rate (a second). Raises BenchError."""
    began, times = time.perf_counter(), iter(arrivals(rate, seconds, seed))

    def due() -> float | None:
        at = next(times, None)
        return None if at is None else began + at

    return _run(question, due, OPEN_CLIENTS)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """The arrival times of a Poisson process: seconds from its begin, in order. Not empty."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(1, round(2 * rate * seconds)) + 10)
    times = np.cumsum(gaps)
    return times[times < seconds].tolist() or [0.0]


def _run(question: Question, due: Callable[[], float | None], clients: int) -> LoadResult:
    """Ask at each time that due() returns, until it returns None."""
    load, failed = LoadResult(), threading.Event()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", question.port, timeout=ANSWER_SECONDS)
        last = 0.0
        try:
            while not failed.is_set() and (at := due()) is not None:
                if (early := at - time.perf_counter()) > 0:
                    failed.wait(early)
                if time.perf_counter() - last > IDLE_SECONDS:
                    connection.close()  # the next request opens it again
                question.ask(connection)
                last = time.perf_counter()
                load.latencies.append(last - at)
        except BenchError:
            failed.set()
            raise
        finally:
            connection.close()

    began, own = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
    load.seconds, load.own_cpu = time.perf_counter() - began, time.process_time() - own
    for one in running:
        one.result()  # raises BenchError
    return load
