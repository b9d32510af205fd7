"""`python -m bench.batch`: `headcount batch FOLDER` against the same pipeline on bytes in memory, in as many processes.

Both count the pictures of coco128 over and over, in turns. Wall-clock and CPU time include the start of the processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from headcount.counters import InProcess
from headcount.data import fetch, find_weights
from serving.contract import Parameters

CORES = 2


def in_process(checkpoint: Path, pictures: list[Path], number: int, results: multiprocessing.Queue[int]) -> None:
    """Counts in a share of the pictures, which are read once."""
    counter = InProcess(checkpoint, 2)
    contents = [picture.read_bytes() for picture in pictures]
    results.put(sum(counter.count(contents[i % len(contents)], Parameters()).count for i in range(number)))


def memory_turn(checkpoint: Path, pictures: list[Path], number: int) -> int:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[int] = context.Queue()
    shares = [(pictures[i::CORES], number // CORES) for i in range(CORES)]
    processes = [context.Process(target=in_process, args=(checkpoint, *share, results)) for share in shares]
    for process in processes:
        process.start()
    people = sum(results.get() for _ in processes)
    for process in processes:
        process.join()
    return people


def batch_turn(folder: Path, table: Path) -> int:
    command = [sys.executable, "-m", "headcount.cli", "batch", str(folder), "--out", str(table)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    rows = table.read_text().splitlines()[1:]
    table.unlink()
    return sum(int(row.split(",")[1]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.batch", description=__doc__)
    parser.add_argument("--pictures", type=int, default=5120, help="a multiple of 256")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    checkpoint, pictures = find_weights("yolov5n"), sorted((fetch("coco128") / "images").rglob("*.jpg"))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    walls, cpus = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        folder.mkdir()
        for i in range(options.pictures):
            (folder / f"{i:06}.jpg").write_bytes(pictures[i % len(pictures)].read_bytes())
        for round_ in range(options.rounds):
            spent: dict[str, tuple[float, float, int]] = {}
            for name in ("memory", "batch") if round_ % 2 else ("batch", "memory"):
                before, began = _cpu(), time.perf_counter()
                if name == "memory":
                    people = memory_turn(checkpoint, pictures, options.pictures)
                else:
                    people = batch_turn(folder, Path(temporary) / "table.csv")
                spent[name] = time.perf_counter() - began, _cpu() - before, people
                rate = options.pictures / spent[name][0]
                print(
                    f"{name}: {rate:.1f} pictures a second, {spent[name][1] / options.pictures * 1e3:.2f} ms CPU each"
                )
            assert spent["memory"][2] == spent["batch"][2], "they count different numbers of people"
            walls.append(spent["memory"][0] / spent["batch"][0])
            cpus.append(spent["memory"][1] / spent["batch"][1])
    for name, ratios in (("pictures a second", walls), ("CPU time", cpus)):
        print(f"batch / memory, {name}: {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")


def _cpu() -> float:
    """Seconds of CPU time of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
