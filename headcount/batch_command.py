"""`headcount batch`: counts pictures by the million, in a folder on this machine or in a bucket on Vertex AI."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from headcount.batch_plan import HOURS, Wish
from headcount.counters import CountError
from headcount.google import GoogleError
from headcount.ledger import BatchError, Totals
from headcount.stacks import StackError, outputs
from serving.contract import Parameters, RequestError


def batch(
    source: Annotated[
        str, typer.Argument(metavar="FOLDER|gs://BUCKET/PREFIX", help="All pictures below it are counted.")
    ] = "",
    stack: Annotated[
        str | None, typer.Option("-s", "--stack", metavar="NAME", help="The stack whose release counts in a bucket.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE", help="The table of a folder (NAME.csv), or a gs:// folder for those of a bucket."
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Least confidence of a person, 0.01 to 1.")] = Parameters.confidence,
    detail: Annotated[
        str, typer.Option(metavar="fast|full|auto", help="How closely each picture is looked at.")
    ] = Parameters.detail,
    machines: Annotated[
        int | None, typer.Option(min=1, help="Machines of a bucket's job; else chosen by time.")
    ] = None,
    machine_type: Annotated[
        str, typer.Option(metavar="TYPE", help="Their type; else that of the release that serves.")
    ] = "",
    within: Annotated[float, typer.Option(min=0.1, metavar="HOURS", help="The wanted time of a bucket's job.")] = HOURS,
    limit_usd: Annotated[
        float | None, typer.Option(min=0, metavar="USD", help="Start no job that costs more, and end one that does.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take up a bucket's batch by its name; needs --stack.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimate of a bucket's job only.")] = False,
) -> None:
    """Count the people in all pictures of a folder or of a bucket, and write one table: picture, count, error.

    A folder is counted on this machine, a bucket by a batch prediction job of Vertex AI with the release that the stack
    serves. A run that was stopped or killed goes on where it was if the command is repeated. Exit code: 0 all pictures
    were counted, 1 some or all were not, 2 the command was not understood.
    """
    try:
        parameters = Parameters.parse({"confidence": confidence, "detail": detail})
    except RequestError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        if resume or source.startswith("gs://"):
            wish = Wish(source, out or "", parameters, machines, machine_type, within, limit_usd)
            totals = _bucket(wish, stack, resume, dry=dry_run)
        elif machines or machine_type or limit_usd is not None or dry_run:
            raise typer.BadParameter("machines, a limit in USD and a dry run are for a bucket: gs://BUCKET/PREFIX")
        else:
            totals = _folder(source, stack, out, parameters)
    except (BatchError, CountError, GoogleError, StackError) as error:
        _fail(str(error))
    raise typer.Exit(1 if totals.failed else 0)


def _bucket(wish: Wish, stack: str | None, resume: str | None, *, dry: bool) -> Totals:
    from headcount.batch_job import Batch

    if not stack:
        raise typer.BadParameter("a bucket is counted by the release of a stack: name it with --stack")
    if wish.out and not wish.out.startswith("gs://"):
        raise typer.BadParameter(
            f"--out {wish.out}: the results of a bucket go to a bucket, so write gs://BUCKET/FOLDER"
        )
    if resume and wish.source:
        raise typer.BadParameter("--resume names a batch, which knows its pictures: leave the address out")
    with contextlib.closing(Batch(stack, outputs(stack), wish)) as one:
        if resume:
            one.resume(resume)
        else:
            one.begin()
        try:
            totals = one.run(dry=dry)
        except KeyboardInterrupt:
            print(one.left_alone, file=sys.stderr)
            raise typer.Exit(130) from None
        except (GoogleError, StackError) as error:
            raise BatchError(f"{error}\n{one.left_alone}") from None
        if not dry:
            print(f"{totals}, in {one.table}", file=sys.stderr)
        return replace(totals, failed=0) if dry else totals


def _folder(source: str, stack: str | None, out: str | None, parameters: Parameters) -> Totals:
    from headcount.batch_folder import count_folder, counter_of
    from headcount.data import DEFAULT_WEIGHTS

    if not source:
        raise typer.BadParameter("name a folder, or gs://BUCKET/PREFIX with --stack")
    if stack:
        raise typer.BadParameter("--stack counts in a bucket: name gs://BUCKET/PREFIX, or leave --stack out")
    folder = Path(source)
    table = Path(out or f"{folder.resolve().name}.csv")
    if table.suffix != ".csv":
        raise typer.BadParameter(f"--out {table}: the table is CSV, so name a file that ends with .csv")
    weights = os.environ.get("HEADCOUNT_WEIGHTS") or DEFAULT_WEIGHTS
    about: dict[str, Any] = {"weights": weights, **parameters.as_json()}
    progress = Progress()
    try:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        totals = count_folder(folder, table, parameters, counter_of(weights), cores, about, progress.tell)
    except KeyboardInterrupt:
        print("stopped: repeat the command to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"{totals}, in {table}", file=sys.stderr)
    return totals


class Progress:
    """Tells how far a batch is, every ten seconds."""

    def __init__(self) -> None:
        self._began, self._before, self._told = time.monotonic(), -1, 0.0

    def tell(self, totals: Totals) -> None:
        now = time.monotonic()
        done = totals.counted + totals.failed
        if self._before < 0:  # the first call: what an earlier run has counted
            self._before, self._told = done, now
            if done:
                print(f"going on after {done:,} of {totals.pictures:,} pictures", file=sys.stderr)
        elif now > self._told + 10 and totals.left:
            self._told = now
            rate = (done - self._before) / (now - self._began)
            left = f", {totals.left / rate / 60:.0f} min left" if rate else ""
            print(f"{done:,} of {totals.pictures:,} pictures, {rate:.1f} a second{left}", file=sys.stderr)


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(1) from None
