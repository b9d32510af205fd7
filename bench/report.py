"""The table of ratios, computed from what the rounds measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from bench.load import CLIENTS, OPEN_SHARE, LoadResult
from bench.pipelines import CORES, CPU, Stages, median_stages


@dataclass
class Turns:
    """What the competitors did with one picture: by competitor, one entry for each round."""

    rates: dict[str, list[float]] = field(default_factory=dict)  # pictures a second by the clock
    stages: dict[str, list[Stages]] = field(default_factory=dict)  # of pipelines
    closed: dict[str, list[LoadResult]] = field(default_factory=dict)  # of servers
    opened: dict[str, list[LoadResult]] = field(default_factory=dict)
    cpu: dict[str, list[Stages]] = field(default_factory=dict)  # of servers: milliseconds a request by role

    def latency(self, loop: str, server: str, percent: float) -> float:
        """A percentile of a server's latencies in all rounds together, in milliseconds. loop: closed or opened."""
        loads = getattr(self, loop)[server]
        return float(np.percentile([one for load in loads for one in load.latencies], percent)) * 1e3

    def requests(self, loop: str, server: str) -> int:
        return sum(len(load.latencies) for load in getattr(self, loop)[server])


@dataclass(frozen=True)
class Ratio:
    """A row of the table. values: by picture, one for each round or one in all. how: how it was obtained."""

    name: str
    how: str
    values: dict[str, list[float]]


def compare(turns: dict[str, Turns]) -> list[Ratio]:
    """The rows of the table that come out of the rounds. turns: by picture."""
    servers = next(iter(turns.values())).closed
    pairs = [("server", "plain"), ("server", "headcount"), ("headcount", "plain"), ("eager", "plain")]
    if "flask" in servers:
        pairs = [("server", "flask"), ("flask", "plain"), *pairs]
    rows: list[tuple[str, str, Callable[[Turns], list[float]]]] = [
        (f"{a} / {b}", "pictures a second by the clock, in the same round", partial(_by_clock, a=a, b=b))
        for a, b in pairs
    ]
    rows += [
        ("plain / headcount, CPU a picture", "CPU time, which other processes disturb less", _pipelines_by_cpu),
        ("server / headcount, CPU a picture", "CPU time of all processes of the server", _server_by_cpu),
    ]
    if "flask" in servers:
        rows.append(("flask / server, CPU a request", "CPU time of all processes of each", _flask_by_cpu))
    for name in servers:
        closed, opened = (sum(one.requests(kind, name) for one in turns.values()) for kind in ("closed", "opened"))
        how = f"closed loop of {CLIENTS} clients, {closed} requests"
        rows.append((f"{name}'s p99 / p50", how, partial(_tail, server=name, loop="closed")))
        how = f"p99 of an open loop: Poisson arrivals at {OPEN_SHARE} of the closed loop's rate, latency from the time "
        how += f"at which a request was due, {opened} requests; p50 of the closed loop"
        rows.append((f"{name}'s open p99 / p50", how, partial(_tail, server=name, loop="opened")))
    return [Ratio(name, how, {title: ratio(one) for title, one in turns.items()}) for name, how, ratio in rows]


def _by_clock(turns: Turns, a: str, b: str) -> list[float]:
    return [x / y for x, y in zip(turns.rates[a], turns.rates[b], strict=True)]


def _pipelines_by_cpu(turns: Turns) -> list[float]:
    return [x[CPU] / y[CPU] for x, y in zip(turns.stages["plain"], turns.stages["headcount"], strict=True)]


def _server_by_cpu(turns: Turns) -> list[float]:
    return [sum(x.values()) / y[CPU] for x, y in zip(turns.cpu["server"], turns.stages["headcount"], strict=True)]


def _flask_by_cpu(turns: Turns) -> list[float]:
    return [sum(x.values()) / sum(y.values()) for x, y in zip(turns.cpu["flask"], turns.cpu["server"], strict=True)]


def _tail(turns: Turns, server: str, loop: str) -> list[float]:
    return [turns.latency(loop, server, 99) / turns.latency("closed", server, 50)]


def table(ratios: list[Ratio], titles: list[str]) -> list[str]:
    """The table: medians of the rounds, with the lowest and the highest in brackets."""

    def cell(values: list[float]) -> str:
        if not values:
            return ""
        middle = f"{statistics.median(values):.2f}"
        return middle if len(values) == 1 else f"{middle} [{min(values):.2f}, {max(values):.2f}]"

    lines = [f"{'ratio':36}" + "".join(f"{title:20}" for title in titles) + "how"]
    for one in ratios:
        lines.append(f"{one.name:36}" + "".join(f"{cell(one.values.get(title, [])):20}" for title in titles) + one.how)
    return lines


def absolute(turns: dict[str, Turns]) -> Iterator[str]:
    """What the ratios were computed from: figures of this machine at this hour."""
    for title, one in turns.items():
        yield f"{title}, pictures a second: " + ", ".join(
            f"{n} {statistics.median(r):.1f}" for n, r in one.rates.items()
        )
        for name, loads in one.closed.items():
            own = sum(load.own_cpu for load in loads) / sum(load.seconds for load in loads) / CORES
            closed, opened = ([one.latency(loop, name, p) for p in (50, 99)] for loop in ("closed", "opened"))
            yield (
                f"  {name}: closed loop p50 {closed[0]:.0f}, p99 {closed[1]:.0f} ms; open loop p50 {opened[0]:.0f}, "
                f"p99 {opened[1]:.0f} ms; the clients of the closed loop took {own:.0%} of the CPU"
            )
            roles = ", ".join(f"{role} {spent:.2f}" for role, spent in median_stages(one.cpu[name]).items())
            yield f"  {name}, CPU a request in ms: {roles}"
        for name, many in one.stages.items():
            yield f"  {name}, ms: " + ", ".join(f"{stage} {ms:.2f}" for stage, ms in median_stages(many).items())
