"""Throughput, latency, memory and accuracy as a table and a plot: `make bench`.

Two processes of one thread each for the pipelines; the server with two workers at concurrency 4, closed loop, after
warm-up. Pipelines take turns in short rounds, so that a busy machine disturbs all of them; the ratio reported is the
median of the rounds' ratios. What the load generator burns is not counted: a rate is requests / (seconds - its CPU
seconds / cores), since it takes those from the server.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bench.pipelines import CPU, PIPELINES, Pipeline, Stages, median_stages
from bench.served import CONCURRENCY, Served
from headcount.data import fetch, labelled_people
from serving.torchserve import ALLOCATOR

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def twelve_megapixels(data: bytes) -> bytes:
    """The picture as a 3024×4032 JPEG of quality 90."""
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    large = cv2.resize(picture, (3024, 4032), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", large, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def accuracy(pipelines: dict[str, Pipeline], folder: Path) -> dict[str, float]:
    """Mean absolute count error of each pipeline on coco128."""
    files = sorted((folder / "images").iterdir())
    pictures, truth = [file.read_bytes() for file in files], np.array([labelled_people(file) for file in files])
    return {name: float(np.abs(np.array(p.counts(pictures)) - truth).mean()) for name, p in pipelines.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = ROOT / ".headcount"
    parser.add_argument("--checkpoint", type=Path, default=home / "weights" / "yolov5n.pt")
    parser.add_argument("--compiled", type=Path, default=home / "compiled" / "yolov5n")
    parser.add_argument("--archive", type=Path, default=home / "archive" / "yolov5n")
    parser.add_argument("--rounds", type=int, default=6, help="turns each pipeline and the server take")
    parser.add_argument("--seconds", type=float, default=3, help="of each turn")
    parser.add_argument("--requests", type=int, default=10_000, help="of the memory test; 0 leaves it out")
    arguments = parser.parse_args()
    bus = fetch("bus.jpg").read_bytes()
    pictures = {"bus.jpg": bus, "12 megapixels": twelve_megapixels(bus)}
    RESULTS.mkdir(exist_ok=True)
    os.environ.update(ALLOCATOR, OMP_NUM_THREADS="1")  # the same for all
    multiprocessing.set_start_method("spawn")

    pipelines = {name: Pipeline(name, arguments.checkpoint, arguments.compiled) for name in PIPELINES}
    result: dict[str, Any] = {"error": accuracy(pipelines, fetch("coco128")), "pictures": {}}
    server = Served(arguments.archive, RESULTS / "server.log")
    result["start seconds"] = server.started_after
    for data in pictures.values():  # the JVM compiles what is hot within some thousand requests
        server.load(data, 10)
    for title, data in pictures.items():
        rates: dict[str, list[float]] = {name: [] for name in (*pipelines, "server")}
        stages: dict[str, list[Stages]] = {name: [] for name in pipelines}
        loads = []
        for _ in range(arguments.rounds):
            for name, pipeline in pipelines.items():
                rate, spent = pipeline.rate(data, arguments.seconds)
                rates[name].append(rate)
                stages[name].append(spent)
            loads.append(server.load(data, arguments.seconds))
            rates["server"].append(loads[-1]["rate"])
        result["pictures"][title] = {
            "rates": {name: statistics.median(many) for name, many in rates.items()},
            "to plain": {
                n: statistics.median(a / b for a, b in zip(rates[n], rates["plain"], strict=True)) for n in rates
            },
            "server to in-process": statistics.median(
                a / b for a, b in zip(rates["server"], rates["headcount"], strict=True)
            ),
            "to plain, CPU": {n: median_cpu(stages["plain"]) / median_cpu(stages[n]) for n in stages},
            "stages": {name: median_stages(many) for name, many in stages.items()},
            "cpu ms": median_stages([load["cpu ms"] for load in loads]),
            "p50": statistics.median(load["p50"] for load in loads),
            "p99": statistics.median(load["p99"] for load in loads),
        }
    for pipeline in pipelines.values():
        pipeline.close()
    if arguments.requests:
        server.close()
        server = Served(arguments.archive, RESULTS / "server.log")
        server.load(bus, requests=min(500, arguments.requests))
        early = server.memory()
        server.load(bus, requests=arguments.requests - 500)
        result["memory"] = {"after 500": early, f"after {arguments.requests}": server.memory()}
    server.close()
    (RESULTS / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (RESULTS / "bench.txt").write_text(text)
    print(text)
    plot(result, RESULTS / "bench.png")
    print(f"plot: {RESULTS / 'bench.png'}")


def median_cpu(many: list[Stages]) -> float:
    return statistics.median(one[CPU] for one in many)


def table(result: dict[str, Any]) -> str:
    lines = [f"start to healthy: {result['start seconds']:.1f} s"]
    lines += ["mean absolute count error on coco128: " + ", ".join(f"{n} {e:.3f}" for n, e in result["error"].items())]
    for title, one in result["pictures"].items():
        lines += ["", title, f"  {'':12}{'pictures/s':>12}{'of plain':>10}{'of plain by CPU':>17}"]
        for name, rate in one["rates"].items():
            by_cpu = f"{one['to plain, CPU'][name]:17.2f}" if name in one["to plain, CPU"] else ""
            lines += [f"  {name:12}{rate:12.1f}{one['to plain'][name]:10.2f}{by_cpu}"]
        by_cpu = one["stages"]["headcount"][CPU] / sum(one["cpu ms"].values())
        lines += [f"  the server makes {one['server to in-process']:.2f} of headcount in-process, {by_cpu:.2f} by CPU"]
        ratio = one["p99"] / one["p50"]
        lines += [
            f"  latency with {CONCURRENCY} clients: p50 {one['p50']:.0f}, p99 {one['p99']:.0f} ms: {ratio:.2f} times"
        ]
        cpu = one["cpu ms"]
        server = sum(cpu.values()) - one["stages"]["headcount"][CPU]
        roles = ", ".join(f"{role} {spent:.2f}" for role, spent in cpu.items())
        lines += [f"  CPU a request, ms: {roles}; the server itself, beyond counting: {server:.2f}"]
        for name, stages in one["stages"].items():
            lines += [f"  stages of {name}, ms: " + ", ".join(f"{stage} {ms:.2f}" for stage, ms in stages.items())]
    if memory := result.get("memory"):
        (first, early), (last, late) = memory.items()
        lines += ["", f"memory {first} requests {early:.0f} MB, {last} {late:.0f} MB: {late / early - 1:+.1%}"]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(result["pictures"]), figsize=(11, 4), layout="constrained")
    for axis, (title, one) in zip(axes, result["pictures"].items(), strict=True):
        bars = axis.bar(list(one["to plain"]), list(one["to plain"].values()), color=["#999", "#7ab", "#286", "#c73"])
        axis.bar_label(bars, fmt="%.2f")
        axis.set_title(f"{title}: throughput, plain = 1")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
