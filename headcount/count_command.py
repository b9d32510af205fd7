"""`headcount count`: counts the people in pictures, in this process or on a server.

stdout carries the results and nothing else, stderr everything else. Exit codes: 0 every picture was counted,
1 some or all were not, 2 the command was not understood.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from headcount.client import open_counter
from headcount.counters import Counter, CountError
from headcount.files import Input, annotated_paths, find_inputs
from headcount.results import Result, csv_header, csv_row, json_text, printable, table_text
from serving.contract import Parameters, RequestError

Server = tuple[str | None, str | None, str | None, str | None]  # as open_counter takes them; all None: this process
T = TypeVar("T")
R = TypeVar("R")


def count(
    pictures: Annotated[
        list[str],
        typer.Argument(metavar="PICTURE", help="Files, folders (with all below them), glob patterns."),
    ],
    annotate: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write each picture with the boxes drawn to this folder."),
    ] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Ask this server, e.g. http://localhost:8080.")] = None,
    grpc: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ask this server over gRPC, e.g. localhost:7070.")
    ] = None,
    stack: Annotated[
        str | None, typer.Option(metavar="NAME", help="Ask the endpoint of this Pulumi stack, e.g. local or dev.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Ask this endpoint of Vertex AI: projects/…/locations/…/endpoints/ID."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Least confidence of a person, 0.01 to 1.")] = Parameters.confidence,
    iou: Annotated[float, typer.Option(help="Overlap above which two boxes are one person, 0 to 1.")] = Parameters.iou,
    max_people: Annotated[
        int | None, typer.Option(help="Longest list of boxes for a picture; the count is never cut.")
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            metavar="POINTS",
            help="Count those who stand in this polygon: 'x,y x,y x,y' or JSON, as fractions of the sides.",
        ),
    ] = None,
    detail: Annotated[
        str,
        typer.Option(
            metavar="fast|full|auto",
            help="Look once at each picture, at all of it closely, or closely where it seems crowded.",
        ),
    ] = Parameters.detail,
    grid: Annotated[
        str | None,
        typer.Option(metavar="COLUMNSxROWS", help="Count also in the cells of a grid, such as 4x3; needs --json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, boxes included.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, each row as soon as it is known.")] = False,
) -> None:
    """Count the people in pictures, in this process or on a server.

    Without --url, --grpc, --stack and --endpoint the network runs here; its weights are fetched the first time.
    HEADCOUNT_WEIGHTS names others (yolov5n, yolov5s and so on, or a file), HEADCOUNT_MIRROR a folder or URL to fetch
    them from.

    Exit code: 0 all pictures were counted, 1 some or all were not, 2 the command was not understood.
    """
    given = {
        "confidence": confidence, "iou": iou, "max_people": max_people, "annotate": annotate is not None,
        "detail": detail, "grid": grid,
    }  # fmt: skip
    try:
        if region is not None:
            given["region"] = parse_region(region)
        parameters = Parameters.parse(given)
    except (RequestError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv are two formats; give one of them")
    if grid is not None and not as_json:
        raise typer.BadParameter("--grid needs --json, because tables and CSV have no place for its cells")
    inputs = find_inputs(pictures, annotate)
    try:
        results = list(_counted(inputs, parameters, annotate, (url, grpc, stack, endpoint), as_csv))
        if as_json:
            _print(json_text(results))
        elif not as_csv:
            terminal = sys.stdout.isatty()
            _print(table_text(results, terminal), sys.stdout.encoding, "replace")
    except KeyboardInterrupt:
        leave("stopped", 130)
    except BrokenPipeError:
        leave("", 141)  # what a shell reports for SIGPIPE: the reader has all that it wanted
    raise typer.Exit(1 if any(result.error for result in results) else 0)


def parse_region(text: str) -> Any:
    """A polygon as written on a command line, for `Parameters.parse`. Raises ValueError."""
    if text.lstrip().startswith("["):
        return text
    try:
        return [[float(value) for value in point.split(",")] for point in text.split()]
    except ValueError:
        raise ValueError(f"region is {text!r}; write it as 'x,y x,y x,y' or as JSON [[x, y], …]") from None


def _counted(
    inputs: Sequence[Input],
    parameters: Parameters,
    annotate: Path | None,
    server: Server,
    as_csv: bool,
) -> Iterator[Result]:
    """Count in all inputs, in their order, telling what fails and printing CSV on the way."""
    targets = _targets(inputs, annotate)
    readable = sum(not item.error for item in inputs)
    counter = _open(server, readable) if readable else None

    def one(item: Input) -> Result:
        if item.error or counter is None:
            return Result(item.name, error=item.error)
        return count_file(item.name, counter, parameters)

    if as_csv:
        _print(csv_header())
    # CSV that goes to the terminal is its own progress.
    with _progress(len(inputs), hidden=as_csv and sys.stdout.isatty()) as advance:
        for result in in_order(one, inputs, counter.parallel if counter else 1):
            if result.answer and result.answer.annotated is not None:
                result = write_annotated(result, targets[result.name])
            if result.answer and result.answer.note:
                _say(f"{printable(result.name)}: {result.answer.note}")
            if result.error:
                _say(f"{printable(result.name)}: {result.error}")
            if as_csv:
                _print(csv_row(result))
            advance()
            yield result
    if counter is not None:
        counter.close()


def _open(server: Server, pictures: int) -> Counter:
    try:
        return open_counter(*server, parallel=min(pictures, os.cpu_count() or 1, 8))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except CountError as error:
        _say(str(error))
        raise typer.Exit(1) from None


def _targets(inputs: Sequence[Input], folder: Path | None) -> dict[str, Path]:
    if folder is None:
        return {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(
            f"--annotate {printable(str(folder))}: {error.strerror}; name a folder that can be written"
        ) from None
    names = [item.name for item in inputs]
    return dict(zip(names, annotated_paths(names, folder), strict=True))


def count_file(name: str, counter: Counter, parameters: Parameters) -> Result:
    """Count in one file. Whatever goes wrong is this file's result, never the end of the others."""
    try:
        return Result(name, counter.count(Path(name).read_bytes(), parameters))
    except CountError as error:
        return Result(name, error=str(error))
    except OSError as error:
        return Result(name, error=f"cannot be read: {error.strerror or error}")
    except Exception as error:
        return Result(name, error=f"counting failed: {error!r}")


def write_annotated(result: Result, target: Path) -> Result:
    """Move the annotated picture from the result to the target, in one step."""
    assert result.answer
    assert result.answer.annotated is not None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".part", delete=False) as file:
            try:
                file.write(result.answer.annotated)
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~_umask())  # temporary files are private
                Path(file.name).replace(target)
            except BaseException:
                Path(file.name).unlink()
                raise
    except OSError as error:
        return Result(result.name, error=f"{printable(str(target))} cannot be written: {error.strerror or error}")
    return replace(result, answer=replace(result.answer, annotated=None), annotated=target)


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def in_order(work: Callable[[T], R], items: Iterable[T], parallel: int) -> Iterator[R]:
    """`work` of each item in the items' order, `parallel` at once, and few results ahead of the reader."""
    executor = ThreadPoolExecutor(parallel)
    ahead: deque[Future[R]] = deque()
    try:
        for item in items:
            ahead.append(executor.submit(work, item))
            if len(ahead) >= 2 * parallel:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _progress(total: int, hidden: bool) -> Iterator[Callable[[], object]]:
    """A bar on stderr, where that is a terminal."""
    if hidden or total < 2 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("counting", total=total)
        yield lambda: bar.advance(task)


def _say(message: str) -> None:
    print(f"headcount: {message}", file=sys.stderr, flush=True)


def _print(text: str, encoding: str = "utf-8", errors: str = "surrogateescape") -> None:
    """To stdout at once; file names that are no UTF-8 come out as the bytes they are."""
    try:
        sys.stdout.buffer.write(text.encode(encoding, errors))
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        leave(f"the results cannot be written: {error.strerror}", 1)


def leave(message: str, code: int) -> NoReturn:
    """End now: without waiting for pictures that other threads are at, without flushing what nobody reads."""
    if message:
        _say(message)
    os._exit(code)
