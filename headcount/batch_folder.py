"""A folder of any size, counted on this machine by a process for each core, and taken up again after a kill."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, NamedTuple

from headcount.counters import Counter, CountError, InProcess
from headcount.files import SUFFIXES
from headcount.ledger import BatchError, Ledger, Row, Totals
from serving.contract import Parameters

TOGETHER: Final = 8  # pictures of a message to a process
AHEAD: Final = 2  # messages that a process has, so that it never waits for the next
SECONDS: Final = 1.0  # between two transactions
PART: Final = ".part"  # suffix of the ledger that stands beside the table until it is whole

OpenCounter = Callable[[], Counter]


def counter_of(weights: str) -> OpenCounter:
    """Opens the counter of a process. weights: a published name, or a path. Raises CountError."""
    from headcount.data import DataError, find_weights

    try:
        return partial(InProcess, find_weights(weights), 2)  # 2: one thread for each picture
    except DataError as error:
        raise CountError(str(error)) from None


def count_folder(
    folder: Path,
    table: Path,
    parameters: Parameters,
    counter: OpenCounter,
    processes: int,
    about: dict[str, Any],
    tell: Callable[[Totals], object] = lambda totals: None,
) -> Totals:
    """Counts in all pictures below a folder and writes the table; goes on where a killed run ended.

    counter: pickled and called in each process. about: what a run must have in common with the one that it goes on
    with. tell: called with the totals now and then. Raises BatchError.
    """
    part = table.with_name(table.name + PART)
    if table.exists() and not part.exists():
        raise BatchError(f"{table} exists: remove it, or name another table with --out.")
    if not folder.is_dir():
        raise BatchError(f"{folder} is no folder: name one with pictures, or gs://BUCKET/PREFIX with --stack.")
    try:
        ledger = Ledger(part, {"folder": str(folder.resolve()), **about})
        try:
            ledger.add(_found(folder))
            if not ledger.totals().pictures:
                raise BatchError(f"{folder} holds no picture ({', '.join(SUFFIXES)}).")
            _count(folder, ledger, parameters, counter, processes, tell)
            totals = ledger.totals()
            new = table.with_name(table.name + ".new")
            with new.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                ledger.write(file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(table)
            ledger.remove()
        except BatchError:
            if not ledger.totals().pictures:
                ledger.remove()
            raise
        finally:
            ledger.close()
    except OSError as error:
        raise BatchError(f"{error.filename or table} cannot be written: {error.strerror or error}.") from None
    return totals


def _found(folder: Path) -> Iterator[tuple[str, str]]:
    """The pictures below a folder, named relative to it, each with a stamp that changes with its content."""
    todo = [""]
    while todo:
        below = todo.pop()
        try:
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    name = f"{below}/{entry.name}" if below else entry.name
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(name)
                    elif entry.name.lower().endswith(SUFFIXES):
                        yield name, _stamp(entry)
        except OSError:
            yield below, ""  # reading it fails again, and gives the reason


def _stamp(entry: os.DirEntry[str]) -> str:
    try:
        status = entry.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _count(
    folder: Path,
    ledger: Ledger,
    parameters: Parameters,
    counter: OpenCounter,
    processes: int,
    tell: Callable[[Totals], object],
) -> None:
    """Counts what is left, and records it about once a second."""
    totals, known = ledger.totals(), deque[Row]()
    tell(totals)
    due = time.monotonic() + SECONDS
    try:
        for rows in Processes(partial(_work, folder, counter, parameters), processes).map(ledger.left()):
            known.extend(rows)
            if time.monotonic() > due:
                ledger.record(known)
                totals = totals.with_rows(known)  # to ask the ledger would read all of it
                known.clear()
                tell(totals)
                due = time.monotonic() + SECONDS
    finally:
        ledger.record(known)


# ------------------------------------------------------------------------------------------------------- processes


class Worker(NamedTuple):
    """A process that counts, and the messages that it has not answered."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    waiting: deque[list[str]]


class Processes:
    """Processes that each count a few pictures at a time. main: runs in each, with its end of a pipe."""

    def __init__(self, main: Callable[[Connection], None], number: int) -> None:
        self._context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self._main, self._number = main, number
        self._workers: dict[Connection, Worker] = {}
        self._suspects: deque[list[str]] = deque()

    def map(self, pictures: Iterator[str]) -> Iterator[list[Row]]:
        """What became of the pictures, in any order. Raises BatchError."""
        chunks = iter(lambda: list(itertools.islice(pictures, TOGETHER)), [])
        try:
            while True:
                self._feed(chunks)
                if not self._workers:
                    return
                for connection in wait(list(self._workers)):
                    assert isinstance(connection, Connection)
                    yield self._answer(self._workers[connection])
        finally:
            for worker in self._workers.values():
                worker.process.terminate()
            for worker in self._workers.values():
                worker.process.join()
                worker.connection.close()

    def _feed(self, chunks: Iterator[list[str]]) -> None:
        """Gives every process enough to do, and ends those for which nothing is left."""
        for worker in [*self._workers.values(), *(None for _ in range(self._number - len(self._workers)))]:
            while worker is None or len(worker.waiting) < AHEAD:
                # A picture that may have killed a process is alone in its message, and that is the process's only one.
                alone = bool(self._suspects)
                if worker is not None and worker.waiting and (alone or len(worker.waiting[0]) == 1):
                    break
                chunk = self._suspects.popleft() if alone else next(chunks, None)
                if chunk is None:
                    break
                worker = worker or self._start()
                worker.waiting.append(chunk)
                try:
                    worker.connection.send(chunk)
                except OSError:
                    break  # it has died, which its answer will tell
                if alone:
                    break
        for worker in [one for one in self._workers.values() if not one.waiting]:
            self._end(worker)

    def _start(self) -> Worker:
        ours, theirs = self._context.Pipe()
        # Its pipe ends with this process, however that ends, and it ends with its pipe.
        process = self._context.Process(target=self._main, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        worker = self._workers[ours] = Worker(process, ours, deque())
        return worker

    def _end(self, worker: Worker) -> None:
        del self._workers[worker.connection]
        worker.connection.close()
        worker.process.join()

    def _answer(self, worker: Worker) -> list[Row]:
        """What a process answers; where it has died, its pictures are given to others one by one."""
        try:
            answer: list[Row] | str = worker.connection.recv()
        except (EOFError, OSError):
            self._end(worker)
            lost = list(itertools.chain.from_iterable(worker.waiting))
            if len(lost) == 1:
                return [Row(lost[0], error=f"a process that counted it ended ({_how(worker.process.exitcode)})")]
            self._suspects.extend([picture] for picture in lost)
            return []
        if isinstance(answer, str):
            raise BatchError(answer)
        worker.waiting.popleft()
        return answer


def _how(code: int | None) -> str:
    return f"signal {-code}" if code and code < 0 else f"status {code}"


def _work(folder: Path, open_counter: OpenCounter, parameters: Parameters, connection: Connection) -> None:
    """The main function of a process: counts the pictures of each message, until the pipe ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to answer
    try:
        counter = open_counter()
    except CountError as error:
        connection.send(str(error))
        return
    try:
        while True:
            connection.send([_row(folder, name, counter, parameters) for name in connection.recv()])
    except (EOFError, OSError):
        pass
    finally:
        counter.close()


def _row(folder: Path, name: str, counter: Counter, parameters: Parameters) -> Row:
    try:
        with open(os.path.join(folder, name), "rb") as file:  # noqa: PTH118, PTH123  # cheaper than Path
            return Row(name, counter.count(file.read(), parameters).count)
    except CountError as error:
        return Row(name, error=str(error))
    except OSError as error:
        return Row(name, error=f"cannot be read: {error.strerror or error}")
    except Exception as error:
        return Row(name, error=f"counting failed: {error!r}")
