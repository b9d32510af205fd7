"""The bench: a request that fails ends it, an open loop counts stalls, and each ratio is that of its own round."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from helpers import free_port
from pytest_httpserver import HTTPServer

from bench import __main__ as bench
from bench import load, price, report, served
from bench.load import BenchError, LoadResult, Question, arrivals, closed_loop, open_loop
from bench.pipelines import CPU, Pipeline
from bench.served import FlaskServer, ServerProcess, flask_python
from infra.settings import Settings


def question(port: int, expected: int = 4) -> Question:
    return Question(
        "server", port, "/people", "image/jpeg", b"a picture", expected, lambda c: int(json.loads(c)["count"])
    )


# Load


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (500, "broken", "server answered a request with 500: b'broken'"),
        (200, '{"count": 3}', "server counted 3 people where there are 4"),
        (200, '{"people": []}', "server answered a request without a count"),
        (200, "no JSON", "server answered a request without a count"),
    ],
)
def test_a_failed_request_ends_the_run(httpserver: HTTPServer, status: int, content: str, message: str) -> None:
    """Also if it is one among many good ones."""
    httpserver.expect_oneshot_request("/people").respond_with_data('{"count": 4}')
    httpserver.expect_oneshot_request("/people").respond_with_data(content, status=status)
    httpserver.expect_request("/people").respond_with_data('{"count": 4}')
    with pytest.raises(BenchError, match=message):
        closed_loop(question(httpserver.port), requests=100)


def test_no_answer_ends_the_run() -> None:
    with pytest.raises(BenchError, match=r"server did not answer a request: ConnectionRefusedError"):
        open_loop(question(free_port()), rate=10, seconds=1, seed=0)


def test_a_failed_request_is_the_last_line_of_the_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(_: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
        raise BenchError("server counted 3 people where there are 4")

    monkeypatch.setattr(bench, "_bench", fail)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(multiprocessing, "set_start_method", lambda _: None)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of this process stay
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="bench: server counted 3 people where there are 4"):
        bench.main()


def test_the_closed_loop_asks_as_often_as_it_is_told(httpserver: HTTPServer) -> None:
    httpserver.expect_request("/people", method="POST", data=b"a picture").respond_with_json({"count": 4})
    measured = closed_loop(question(httpserver.port), requests=25)
    assert len(httpserver.log) == len(measured.latencies) == 25
    assert measured.rate == 25 / measured.seconds


def test_arrivals_are_poisson_s() -> None:
    times = arrivals(rate=50, seconds=100, seed=1)
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 100
    assert 4650 < len(times) < 5350, "5000 expected, five times the square root more or less"
    gaps = sorted(b - a for a, b in itertools.pairwise(times))
    assert gaps[len(gaps) // 2] == pytest.approx(0.693 / 50, rel=0.1), "the median of exponential gaps is ln 2 / rate"
    assert times == arrivals(rate=50, seconds=100, seed=1) != arrivals(rate=50, seconds=100, seed=2)
    assert arrivals(rate=0.001, seconds=1, seed=1) == [0.0], "a slow server is asked at least once"


def test_the_open_loop_counts_a_stall_for_all_requests_that_it_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """One client and a clock of its own: the first request takes 50 s, and all were due in one."""
    now, took = [0.0], iter([50.0])

    def ask(self: Question, connection: object) -> None:
        now[0] += next(took, 0)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(load, "OPEN_CLIENTS", 1)
    monkeypatch.setattr(Question, "ask", ask)
    measured = open_loop(question(free_port()), rate=20, seconds=1, seed=3)
    assert measured.latencies == pytest.approx([50 - due for due in arrivals(20, 1, 3)])
    assert len(measured.latencies) > 5


# Rounds


class Stub:
    """A pipeline and a server that note their turns."""

    def __init__(self, name: str, turns: list[str], count: int = 4) -> None:
        self.name, self.turns, self.count, self.cpus = name, turns, count, 0.0

    def rate(self, picture: bytes, seconds: float) -> tuple[float, dict[str, float]]:
        self.turns.append(self.name)
        return 10.0, {CPU: 5.0}

    def counts(self, pictures: list[bytes]) -> list[int]:
        return [self.count]

    def question(self, picture: bytes, expected: int) -> str:
        return self.name

    def cpu(self) -> dict[str, float]:
        self.cpus += 0.5
        return {"all": self.cpus}


def test_each_round_begins_with_another_competitor_and_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    opened: list[tuple[Any, ...]] = []

    def closed_loop(*_: object) -> LoadResult:
        turns.append("server")
        return LoadResult([0.1] * 50, 10, 1)

    def open_loop(*arguments: object) -> LoadResult:
        opened.append(arguments)
        return LoadResult([0.2], 1, 0)

    monkeypatch.setattr(bench, "closed_loop", closed_loop)
    monkeypatch.setattr(bench, "open_loop", open_loop)
    pipelines = cast(dict[str, Pipeline], {name: Stub(name, turns) for name in ("plain", "headcount")})
    servers = cast(list[ServerProcess], [Stub("server", turns)])
    options = argparse.Namespace(rounds=3, seconds=2)
    measured = bench.rounds(pipelines, servers, b"a picture", 4, options)
    assert turns == [
        "server", "plain", "headcount", "server", "headcount", "server", "plain", "server", "plain", "headcount",
    ], "a warm-up, then three rounds"  # fmt: skip
    assert measured.rates == {"plain": [10.0] * 3, "headcount": [10.0] * 3, "server": [5.0] * 3}
    assert measured.cpu["server"] == [{"all": 10.0}] * 3, "milliseconds a request"
    assert [(rate, seconds) for _, rate, seconds, _ in opened] == [(3.0, 2)] * 3, "0.6 of 5 a second"


def test_pipelines_that_disagree_do_unequal_work() -> None:
    pipelines = cast(dict[str, Pipeline], {"plain": Stub("plain", []), "headcount": Stub("headcount", [], 5)})
    with pytest.raises(BenchError, match=r"different numbers of people in bus.jpg: plain 4, headcount 5"):
        bench.counted(pipelines, "bus.jpg", b"")


# Ratios


def measured_turns(*servers: str) -> report.Turns:
    """Three rounds, the second of which was three times as slow for all."""
    speeds = {"plain": 20.0, "eager": 40.0, "headcount": 60.0, "server": 50.0, "flask": 10.0}
    turns = report.Turns()
    for slow in (1, 3, 1):
        for name, speed in speeds.items():
            if name in ("server", "flask") and name not in servers:
                continue
            turns.rates.setdefault(name, []).append(speed / slow)
            turns.stages.setdefault(name, []).append({"decode": 2.0, CPU: 2000 / speed})
            turns.cpu.setdefault(name, []).append({"front": 1.0, "workers": 2000 / speed - 1})
    for name in servers:
        turns.closed[name] = [LoadResult([0.1] * 99 + [0.3], 10, 1)]
        turns.opened[name] = [LoadResult([0.2] * 50, 10, 1), LoadResult([0.5] * 50, 10, 1)]
    return turns


def test_a_slow_phase_of_the_machine_changes_no_ratio() -> None:
    rows = {one.name: one for one in report.compare({"bus.jpg": measured_turns("server", "flask")})}
    assert rows["server / flask"].values == {"bus.jpg": pytest.approx([5, 5, 5])}
    assert rows["server / plain"].values == {"bus.jpg": pytest.approx([2.5, 2.5, 2.5])}
    assert rows["server / headcount"].values["bus.jpg"][0] == pytest.approx(50 / 60)
    assert rows["plain / headcount, CPU a picture"].values["bus.jpg"][0] == pytest.approx(3)
    assert rows["server / headcount, CPU a picture"].values["bus.jpg"][0] == pytest.approx(60 / 50)
    assert rows["flask / server, CPU a request"].values["bus.jpg"][0] == pytest.approx(200 / 40)
    assert rows["flask's open p99 / p50"].values == {"bus.jpg": [pytest.approx(5)]}
    assert "0.6 of the closed loop's rate" in rows["server's open p99 / p50"].how
    assert "100 requests" in rows["server's open p99 / p50"].how


def test_without_flask_there_are_no_rows_of_it() -> None:
    assert not [one.name for one in report.compare({"bus.jpg": measured_turns("server")}) if "flask" in one.name]


def test_the_table_shows_medians_extremes_and_how() -> None:
    rows = [report.Ratio("a / b", "by the clock", {"one": [1.0, 3.0, 2.0], "two": [4.0]})]
    heading, row = report.table(rows, ["one", "two"])
    assert heading.split() == ["ratio", "one", "two", "how"]
    assert row.split("  ")[0] == "a / b"
    assert row.endswith("2.00 [1.00, 3.00]   4.00                by the clock")


def test_the_figures_of_the_machine_are_told_too() -> None:
    text = "\n".join(report.absolute({"bus.jpg": measured_turns("server")}))
    assert "plain 20.0" in text
    assert "closed loop p50 100, p99 102 ms; open loop p50 350, p99 500 ms" in text
    assert "took 5% of the CPU" in text


# Cost


def test_a_price_is_dated_and_has_a_source_or_is_unknown() -> None:
    machine_type = Settings.model_fields["machine_type"].default
    lines = price.cost_lines(machine_type, {"bus.jpg": 50}, None)
    assert machine_type in lines[0]
    assert "Vertex AI: unknown; look for c3-highcpu-4 at https://cloud.google.com/vertex-ai/pricing" in lines[1]
    assert [line for line in lines if "0.170104 USD an hour (us-central1, 2025-03-06, https://github.com/" in line]
    assert lines[2].endswith("bus.jpg 0.00095 USD")
    assert price.cost_lines("z9-unheard-of-1", {"bus.jpg": 50}, None)[1:] == [
        "  Vertex AI: unknown; look for z9-unheard-of-1 at https://cloud.google.com/vertex-ai/pricing, "
        "then BENCH='--node-hour USD'"
    ]


def test_the_user_s_own_price_is_taken() -> None:
    lines = price.cost_lines("c3-highcpu-4", {"bus.jpg": 50}, 0.18)
    assert lines[1] == "  0.18 USD an hour (--node-hour): bus.jpg 0.00100 USD"


# The Flask server of a YOLOv5 checkout

# Behaves as that server does where the bench meets it: the options, how it loads its model, its route and its answer.
RESTAPI = """
import argparse, http.server, json, torch
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--model", nargs="+")
options = parser.parse_args()
people = {m: torch.hub.load("ultralytics/yolov5", m, force_reload=True, skip_validation=True) for m in options.model}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert b'name="image"; filename="picture.jpg"' in body and b"a picture" in body
        found = ["person"] * people[self.path.removeprefix("/v1/object-detection/")] + ["bus"]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([{"name": name} for name in found]).encode())

if __name__ == "__main__":
    http.server.HTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "yolov5"
    (folder / "utils" / "flask_rest_api").mkdir(parents=True)
    (folder / "utils" / "flask_rest_api" / "restapi.py").write_text(RESTAPI)
    (folder / "hubconf.py").write_text("def custom(path):\n    return int(open(path).read())\n")
    return folder


def test_the_flask_server_of_a_checkout_runs_with_our_checkpoint(checkout: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "four.pt"
    checkpoint.write_text("4")
    server = FlaskServer(checkout, Path(sys.executable), checkpoint, tmp_path)
    try:
        assert len(closed_loop(server.question(b"a picture", 4), requests=3).latencies) == 3
        with pytest.raises(BenchError, match="flask counted 4 people where there are 3"):
            closed_loop(server.question(b"a picture", 3), requests=3)
        assert server.memory() > 1
    finally:
        server.close()


def test_a_server_that_does_not_start_is_said(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"flask did not start; .*flask.log says why"):
        FlaskServer(checkout, Path(sys.executable), tmp_path / "missing.pt", tmp_path)
    assert "missing.pt" in (tmp_path / "flask.log").read_text()


def test_the_interpreter_of_a_checkout_is_found_or_explained(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"is no checkout of YOLOv5.*git clone"):
        flask_python(tmp_path)
    with pytest.raises(BenchError, match=r"has no virtual environment.*--flask-python"):
        flask_python(checkout)
    (checkout / "venv" / "bin").mkdir(parents=True)
    (checkout / "venv" / "bin" / "python").symlink_to(sys.executable)
    assert flask_python(checkout) == checkout / "venv" / "bin" / "python"


def test_cpu_and_memory_are_the_kernel_s() -> None:
    used = os.times()
    assert 0 < served.cpu_seconds(os.getpid()) <= used.user + used.system + 1
    assert served.resident_megabytes(os.getpid()) > 10
