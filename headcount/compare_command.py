"""`headcount compare`: which weights and which detail are worth their price on a folder of pictures."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headcount import compare as judging
from headcount.count_command import in_order
from headcount.counters import CountError
from headcount.files import find_inputs
from headcount.results import printable
from serving.contract import Parameters

if TYPE_CHECKING:
    from headcount.counters import Answer, InProcess

VISION_BASE = ""  # of Cloud Vision's API, where that is not Google's


def compare(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The pictures, with all below it.")],
    labels: Annotated[
        Path | None,
        typer.Option(metavar="DIR|CSV", help="YOLO's label files, or lines PICTURE,PEOPLE; else `labels` beside them."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the tables and the plot to this folder.")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Weights or a checkpoint's path; yolov5n, s and m without.")
    ] = None,
    machine: Annotated[str, typer.Option(metavar="TYPE", help="The machine that is paid for.")] = judging.MACHINE,
    region: Annotated[str, typer.Option(metavar="REGION", help="Where it is paid for.")] = judging.REGION,
    node_hour: Annotated[
        float | None, typer.Option(metavar="USD", help="The price of its hour, if you know it.")
    ] = None,
    vision: Annotated[
        bool, typer.Option("--vision", help="Ask Cloud Vision too, which costs money for each picture.")
    ] = False,
    project: Annotated[str, typer.Option(metavar="ID", help="The project that pays for Cloud Vision.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the same pictures with several weights, each with detail fast, auto and full, and say what that costs.

    The cost is the CPU time that a picture takes on this machine, at the price of a machine of Google Cloud that is
    never idle. Exit code: 0 compared, 1 nothing to compare or some pictures were not counted, 2 the command was not
    understood.
    """
    from review.prices import load

    try:
        prices = load()
        of = judging.hour(prices, machine, region, node_hour)
        usd, source = judging.vision_price(prices)
        names = _pictures(folder)
        known = judging.labels_of(names, labels)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        if vision:
            most = usd * len(names)
            _say(
                f"Cloud Vision asks {usd * 1000:g} USD for 1,000 pictures after the first 1,000 of a month ({source}): "
                f"{most:.2f} USD at most for these {len(names)}."
            )
        counted, failed = _counted(names, weights or list(judging.WEIGHTS))
        if vision:
            counted.append(_by_vision(names, project, failed))
        counted = [one for one in counted if one.counts]
        if not counted or not judging.common(counted):
            raise judging.CompareError("Nothing was counted, hence nothing is compared.")
    except (judging.CompareError, CountError) as error:
        _say(str(error))
        raise typer.Exit(1) from None
    except OSError as error:
        raise typer.BadParameter(f"--out {out}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        _say("stopped")
        raise typer.Exit(130) from None
    pictures = judging.common(counted)
    outcomes = judging.judged(counted, known, of, usd)
    said = judging.verdict(outcomes)
    labelled = sum(name in known for name in pictures)
    if as_json:
        facts = {"pictures": len(pictures), "labelled": labelled, "machine": machine, "hour": of.origin}
        print(judging.json_text(outcomes, said, facts), end="")
    else:
        print(f"{judging.counted_pictures(len(pictures))}, {labelled} with a label; {machine}: {of.origin}")
        print(judging.table_text(outcomes), end="")
        print(said)
    if out is not None:
        judging.write_tables(out, outcomes, counted, known)
        try:
            judging.plot(out / "compare.png", outcomes, len(pictures), machine)
        except ImportError as error:
            _say(f"There is no plot, because {error.name} is not installed: `make train`'s packages have it.")
    raise typer.Exit(1 if failed else 0)


def _pictures(folder: Path) -> list[str]:
    found = find_inputs([str(folder)])
    if wrong := next((item for item in found if item.error), None):
        raise judging.CompareError(f"{printable(wrong.name)} {wrong.error}.")
    if not folder.is_dir():
        raise judging.CompareError(f"{printable(str(folder))} is no folder.")
    return [item.name for item in found]


def _counted(names: Sequence[str], weights: Sequence[str]) -> tuple[list[judging.Counted], set[str]]:
    """All pictures by all weights that can be had, and the pictures that one of them failed on.

    The ways take turns with each few pictures, so that a slow phase of the machine meets all alike. What is measured is
    the CPU time of the thread that counts, which other processes hardly change.
    """
    parallel = min(os.cpu_count() or 1, len(names), 8)
    counters = _counters(weights, parallel)
    ways = [(model, detail) for model in counters for detail in judging.DETAILS]
    counts: defaultdict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    looks: defaultdict[tuple[str, str], int] = defaultdict(int)
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    failed: set[str] = set()
    for model in counters:  # the first picture of a network takes longer
        with contextlib.suppress(CountError, OSError):
            counters[model].count(Path(names[0]).read_bytes(), Parameters())
    with _progress(len(names)) as done:
        for turn, start in enumerate(range(0, len(names), 4 * parallel)):
            some = names[start : start + 4 * parallel]
            first = turn % len(ways)  # each turn begins with another way, because the first one finds cold caches
            for way in ways[first:] + ways[:first]:
                count = _timed(counters[way[0]], way[1])
                for name, (answer, spent, error) in zip(some, in_order(count, some, parallel), strict=True):
                    if answer is None:
                        if name not in failed:
                            _say(f"{printable(name)}: {error}")
                        failed.add(name)
                    else:
                        counts[way][name] = answer.count
                        looks[way] += answer.looks
                        seconds[way] += spent
            done(len(some))
    for counter in counters.values():
        counter.close()
    found = [
        judging.Counted(*way, counts[way], seconds[way] / len(counts[way]), looks[way] / len(counts[way]))
        for way in ways
        if counts[way]
    ]
    return found, failed


def _counters(weights: Sequence[str], parallel: int) -> dict[str, InProcess]:
    """A counter for each of the weights that can be had, by their name. Says which cannot, and why."""
    import cv2

    from headcount.counters import InProcess
    from headcount.data import DataError, find_weights

    cv2.setNumThreads(1)  # all of a picture's work is then in the thread that is measured
    found: dict[str, InProcess] = {}
    for name in weights:
        try:
            path = find_weights(name)
        except DataError as error:
            _say(f"without {name}: {error}")
            continue
        if path.stem not in found:  # what serves instead of weights that cannot be had may be there already
            found[path.stem] = InProcess(path, max(parallel, 2))
    if not found:
        raise judging.CompareError(
            "No weights could be had: name a checkpoint with --weights, or set HEADCOUNT_MIRROR."
        )
    return found


def _timed(counter: InProcess, detail: str) -> Callable[[str], tuple[Answer | None, float, str]]:
    """Counts a file; returns the answer, the CPU seconds, and the error."""
    parameters = Parameters(detail=detail)

    def one(name: str) -> tuple[Answer | None, float, str]:
        try:
            data = Path(name).read_bytes()
            start = time.thread_time()
            answer = counter.count(data, parameters)
            return answer, time.thread_time() - start, ""
        except CountError as error:
            return None, 0.0, str(error)
        except OSError as error:
            return None, 0.0, f"cannot be read: {error.strerror or error}"

    return one


def _by_vision(names: Sequence[str], project: str, failed: set[str]) -> judging.Counted:
    from headcount.cloud_vision import CloudVision

    with contextlib.closing(CloudVision(project, VISION_BASE)) as there, _progress(len(names)) as done:
        counts = {}
        for name in names:
            if name in failed:
                continue  # what is not compared is not paid for
            try:
                counts[name] = there.count(Path(name).read_bytes())
            except CountError as error:
                if not counts:  # the API is not enabled, or refuses: it would refuse all of them
                    raise CountError(f"{error}. Nothing was asked after {printable(name)}.") from None
                _say(f"{printable(name)}: {error}")
                failed.add(name)
            done(1)
    return judging.Counted(judging.CLOUD_VISION, "", counts)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A count on stderr, where that is a terminal."""
    count, terminal = 0, sys.stderr.isatty()

    def done(number: int) -> None:
        nonlocal count
        count += number
        if terminal:
            print(f"\r{count} of {total} pictures ", end="", file=sys.stderr, flush=True)

    yield done
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
