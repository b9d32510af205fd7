"""Ratios of throughput, latency, CPU, memory and accuracy, measured in one run: `make bench`.

README.md says how each figure is obtained.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from bench.load import OPEN_SHARE, BenchError, closed_loop, open_loop
from bench.pipelines import CORES, PIPELINES, Pipeline
from bench.price import cost_lines
from bench.report import Ratio, Turns, absolute, compare, table
from bench.served import FlaskServer, HeadcountServer, ServerProcess, flask_python
from headcount.data import fetch, labelled_people
from infra.settings import Settings
from serving.torchserve import ALLOCATOR

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
WARM_UP_SECONDS = 10  # the JVM compiles the code that runs often within some thousand requests
QUIET = 0.5  # processes that want to run, in the minute before the run
EARLY = 500  # requests before the memory is read for the first time


def main() -> None:
    arguments = _arguments()
    RESULTS.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the competitors, as Ctrl-C does
    os.environ.update(ALLOCATOR)  # the same for all
    multiprocessing.set_start_method("spawn")
    try:
        lines, kept = _bench(arguments)
    except BenchError as error:
        sys.exit(f"bench: {error}")
    (RESULTS / "bench.txt").write_text("\n".join(lines) + "\n")
    (RESULTS / "bench.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(*lines, sep="\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = ROOT / ".headcount"
    parser.add_argument("--checkpoint", type=Path, default=home / "weights" / "yolov5n.pt")
    parser.add_argument("--compiled", type=Path, default=home / "compiled" / "yolov5n")
    parser.add_argument("--archive", type=Path, default=home / "archive" / "yolov5n")
    parser.add_argument("--flask", type=Path, metavar="DIR", help="checkout of YOLOv5 whose Flask server competes")
    parser.add_argument("--flask-python", type=Path, metavar="FILE", help="its interpreter; default: DIR/.venv's")
    parser.add_argument("--rounds", type=int, default=6, help="turns that each competitor takes")
    parser.add_argument("--seconds", type=float, default=3, help="of each turn")
    parser.add_argument("--requests", type=int, default=10_000, help="of the memory test; 0 leaves it out")
    parser.add_argument("--node-hour", type=float, metavar="USD", help="price of one machine for an hour")
    return parser.parse_args()


def _bench(arguments: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Measure everything, and return the lines to print and the figures to keep."""
    peaks = [f"{str(dtype)[6:]} {gigaflops(dtype):.0f}" for dtype in (torch.float32, torch.bfloat16)]
    busy = os.getloadavg()[0]
    machine = f"{CORES} cores, load before the run {busy:.1f}; GFLOP/s of one core: {', '.join(peaks)}"
    if busy > QUIET:
        machine += (
            "\nother processes took CPU time, so ratios of rates and latencies say little; those of CPU time hold"
        )
    bus = fetch("bus.jpg").read_bytes()
    pictures = {"bus.jpg": bus, "12 megapixels": twelve_megapixels(bus)}
    with contextlib.ExitStack() as at_end:
        servers: list[ServerProcess] = []
        if arguments.flask:
            python = arguments.flask_python or flask_python(arguments.flask)
            scratch = Path(at_end.enter_context(tempfile.TemporaryDirectory()))
            servers.append(FlaskServer(arguments.flask, python, arguments.checkpoint, scratch))
            at_end.callback(servers[-1].close)
        os.environ["OMP_NUM_THREADS"] = "1"  # Flask chooses its threads itself, and is slower with one
        servers.append(HeadcountServer(arguments.archive, RESULTS / "server.log"))
        at_end.callback(servers[-1].close)
        pipelines = {}
        for name in PIPELINES:
            pipelines[name] = Pipeline(name, arguments.checkpoint, arguments.compiled)
            at_end.callback(pipelines[name].close)
        errors = accuracy(pipelines, fetch("coco128"))
        expected = {title: counted(pipelines, title, data) for title, data in pictures.items()}
        turns = {
            title: rounds(pipelines, servers, data, expected[title], arguments) for title, data in pictures.items()
        }
        start = servers[-1].started_after
    ratios = compare(turns)
    ours, plain = errors["headcount"], errors["plain"]
    how = f"mean absolute count error on coco128: {ours:.3f} and {plain:.3f} people"
    ratios.append(Ratio("headcount / plain, count error", how, {"bus.jpg": [ours / plain]}))
    if arguments.requests > EARLY:
        early, late = memory(arguments, bus, expected["bus.jpg"])
        how = f"resident after {arguments.requests} requests, {late:.0f} MB, and after {EARLY}, {early:.0f} MB"
        ratios.append(Ratio("server's memory, late / early", how, {"bus.jpg": [late / early]}))
    rates = {title: statistics.median(one.rates["server"]) for title, one in turns.items()}
    costs = cost_lines(Settings.model_fields["machine_type"].default, rates, arguments.node_hour)
    lines = [machine, f"the server was healthy after {start:.1f} s", "", *table(ratios, list(pictures)), ""]
    lines += ["figures of this machine at this hour:", *absolute(turns), "", *costs]
    kept = {"machine": machine, "ratios": [asdict(one) for one in ratios]}
    return lines, kept | {"turns": {title: asdict(one) for title, one in turns.items()}}


def counted(pipelines: dict[str, Pipeline], title: str, picture: bytes) -> int:
    """The people in a picture. Raises BenchError where the pipelines disagree, because they then do unequal work."""
    counts = {name: pipeline.counts([picture])[0] for name, pipeline in pipelines.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise BenchError(f"the pipelines count different numbers of people in {title}: {said}")
    return counts["plain"]


def rounds(
    pipelines: dict[str, Pipeline],
    servers: list[ServerProcess],
    picture: bytes,
    expected: int,
    arguments: argparse.Namespace,
) -> Turns:
    """Let all competitors take turns with one picture. Each round begins with another one."""
    turns = Turns()
    questions = {server.name: server.question(picture, expected) for server in servers}
    for question in questions.values():
        closed_loop(question, WARM_UP_SECONDS)

    def take(name: str, pipeline: Pipeline) -> None:
        rate, spent = pipeline.rate(picture, arguments.seconds)
        turns.rates.setdefault(name, []).append(rate)
        turns.stages.setdefault(name, []).append(spent)

    def ask(server: ServerProcess, seed: int) -> None:
        question, before = questions[server.name], server.cpu()
        closed = closed_loop(question, arguments.seconds)
        spent = {role: (after - before[role]) / len(closed.latencies) * 1e3 for role, after in server.cpu().items()}
        opened = open_loop(question, OPEN_SHARE * closed.rate, arguments.seconds, seed)
        turns.rates.setdefault(server.name, []).append(closed.rate)
        turns.cpu.setdefault(server.name, []).append(spent)
        turns.closed.setdefault(server.name, []).append(closed)
        turns.opened.setdefault(server.name, []).append(opened)

    for i in range(arguments.rounds):
        order = [partial(take, name, pipeline) for name, pipeline in pipelines.items()]
        order += [partial(ask, server, i) for server in servers]
        for turn in order[i % len(order) :] + order[: i % len(order)]:
            turn()
    return turns


def memory(arguments: argparse.Namespace, picture: bytes, expected: int) -> tuple[float, float]:
    """Resident megabytes of a fresh server after EARLY requests, and after all."""
    with contextlib.closing(HeadcountServer(arguments.archive, RESULTS / "server.log")) as server:
        question = server.question(picture, expected)
        closed_loop(question, requests=EARLY)
        early = server.memory()
        closed_loop(question, requests=arguments.requests - EARLY)
        return early, server.memory()


def accuracy(pipelines: dict[str, Pipeline], folder: Path) -> dict[str, float]:
    """Mean absolute count error of each pipeline on a folder of labelled pictures."""
    files = sorted((folder / "images").iterdir())
    pictures, truth = [file.read_bytes() for file in files], np.array([labelled_people(file) for file in files])
    return {name: float(np.abs(np.array(p.counts(pictures)) - truth).mean()) for name, p in pipelines.items()}


def twelve_megapixels(data: bytes) -> bytes:
    """The picture as a 3024×4032 JPEG of quality 90."""
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    large = cv2.resize(picture, (3024, 4032), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", large, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def gigaflops(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """The most that one core multiplies, in 10⁹ operations a second: matrices of 1024×1024."""
    torch.set_num_threads(1)
    matrix = torch.ones(1024, 1024, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best / 1e9


if __name__ == "__main__":
    main()
