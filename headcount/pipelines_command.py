"""`headcount pipelines`: starts compiled pipelines on Vertex AI or in the sandbox, lists, draws and follows them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from headcount.jobs_command import Project, Region, Stack
from headcount.operate_command import Json, said

if TYPE_CHECKING:
    from headcount.pipelines import Pipelines, Run

OfStack = Annotated[str, typer.Option("-s", "--stack", metavar="NAME", help="Of this stack, e.g. local or dev.")]
Compiled = Annotated[
    str,
    typer.Argument(
        metavar="TEMPLATE",
        help="A YAML file of kfp's compiler, its gs:// address, or that in a KFP repository; else the stack's.",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Id, full name, or display name (the newest job counts).")]
PAGE: Final = 100  # jobs of which the widths of the columns are taken, and then no longer

pipelines = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Run, list, draw and follow pipelines.")


@pipelines.command(no_args_is_help=True)
def run(
    stack: OfStack,
    template: Compiled = "",
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A parameter of the pipeline, as often as needed."),
    ] = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="The run's name; the pipeline's without it.")] = "",
    experiment: Annotated[
        str, typer.Option(metavar="NAME", help="Put the run into this experiment, which is made if need be.")
    ] = "",
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Take no task's outputs from an earlier run.")] = False,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", "--wait", help="Print each task's states, until the run has ended.")
    ] = False,
) -> None:
    """Start a pipeline, with the service account and the bucket of a stack.

    Exit code: 0 started, or with -f succeeded; 1 refused or not succeeded; 2 the template, a parameter or an option
    does not fit, and nothing was sent.
    """
    from headcount import pipeline_template, pipelines

    if experiment and not pipelines.EXPERIMENT.fullmatch(experiment):
        raise typer.BadParameter(f"{experiment!r} is no name of an experiment: a-z, 0-9 and -, at most 128 of them")
    with _refusals():
        local = None if not template or "://" in template else _file(template)
        given = pipeline_template.values(local, param or []) if local else {}
    with _opened(stack) as (there, found), _refusals():
        to = pipelines.target(found)
        if local is None:
            preset = {} if template else found.get("pipelineParameters", {})
            local = there.template(template or pipelines.of_stack(found))
            given = pipeline_template.values(local, param or [], preset)
        if no_cache:
            local = local.uncached()
        context = there.experiment(experiment) if experiment else ""
        name = name or local.name
        started = there.start(pipelines.request(local, given, to, name), pipelines.new_id(name))
        print(started.name)
        page = pipelines.console(started, to.place) or f"headcount pipelines show {started.id} --stack {stack}"
        print(page, flush=True)
        try:
            if context:
                there.associate(started.id, context)
            if follow:
                _follow(there, started)
        except KeyboardInterrupt:  # ends the reading, and not the run
            print(f"{started.id} goes on: `headcount pipelines show {started.id} -s {stack}`", file=sys.stderr)
            raise typer.Exit(130) from None


@pipelines.command("list")
def list_(
    stack: Stack = None,
    project: Project = None,
    region: Region = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Print so many of the newest jobs.")] = None,
    as_json: Json = False,
) -> None:
    """List the pipeline jobs of a stack's project and region, the newest first, and the schedules."""
    from itertools import islice

    with _opened(stack, project, region) as (there, _):
        schedules = there.schedules()
        listed = islice(there.listed(), limit)
        if as_json:
            _print_json(listed, schedules)
        else:
            _print_table(listed, schedules)


@pipelines.command(no_args_is_help=True)
def show(
    job: JobName,
    stack: Stack = None,
    project: Project = None,
    region: Region = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as a page, too.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a pipeline job: its tasks in the order in which they run, with their states, times and errors."""
    from headcount import pipeline_graph, pipeline_page

    with _opened(stack, project, region, job) as (there, _):
        found = there.find(job)
    if html is not None:
        try:
            html.write_text(pipeline_page.render(found), encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(f"--html {html} cannot be written: {error.strerror or error}") from None
    if as_json:
        tasks = pipeline_graph.as_json(pipeline_graph.graph(found))
        print(json.dumps({"job": {k: v for k, v in found.items() if k not in _LONG}, "tasks": tasks}, indent=1))
    else:
        print(pipeline_graph.text(found), end="")


_LONG: Final = ("pipelineSpec", "jobDetail")  # of a job, whose content is in its tasks


@pipelines.command(no_args_is_help=True)
def logs(
    job: JobName,
    task: Annotated[str, typer.Argument(metavar="TASK", help="A task of `show`, or all of them.")] = "",
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
    stack: Stack = None,
    project: Project = None,
    region: Region = None,
) -> None:
    """Print the log of a pipeline job's tasks. With -f, follow it; the exit status is then 1 unless it succeeds."""
    from headcount.pipelines import run_of
    from headcount.results import printable

    with _opened(stack, project, region, job) as (there, _):
        found = run_of(there.find(job))
        try:
            for path, line in there.log(found.id, task, follow=follow):
                print(f"{line.time[:19]}Z {printable(f'{path}: {line.text}')}", flush=True)
        except KeyboardInterrupt:  # ends the reading, and not the run
            raise typer.Exit(130) from None
        if follow:
            _end(run_of(there.get(found.id)))


@pipelines.command(no_args_is_help=True)
def upload(template: Annotated[Path, typer.Argument(help="A YAML file of kfp's compiler.")], stack: OfStack) -> None:
    """Copy a compiled pipeline to a stack's bucket, and print its address for `headcount pipelines run`.

    It is named after its content, so that uploading it again changes nothing.
    """
    from headcount import bucket, pipelines
    from headcount.stacks import outputs

    with _refusals():
        local = _file(str(template))
    with said():
        name = pipelines.stored_name(local, template.read_bytes())
        print(f"{bucket.copy({name: template}, outputs(stack))}/{name}")


def _file(template: str) -> Any:
    from headcount.pipeline_template import TemplateError, read

    try:
        content = Path(template).read_bytes()
    except OSError as error:
        raise TemplateError(f"{template} cannot be read: {error.strerror or error}.") from None
    return read(content, template)


def _follow(there: Pipelines, started: Run) -> None:
    from headcount.pipelines import run_of
    from headcount.results import printable

    for path, node in there.changes(started.id):
        print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}Z {path}: {node.state}", flush=True)
        for line in node.error.splitlines():
            print(f"  ! {printable(line)}", flush=True)
    _end(run_of(there.get(started.id)))


def _end(found: Run) -> None:
    from headcount.results import printable

    why = f", {printable(found.error)}" if found.error else ""
    print(f"{found.name}: {found.state}{why}", file=sys.stderr)
    raise typer.Exit(0 if found.state == "SUCCEEDED" else 1)


def _print_table(listed: Iterator[Run], schedules: list[dict[str, Any]]) -> None:
    from itertools import islice

    from headcount.pipeline_graph import clock, took
    from headcount.results import printable

    names = {str(one["name"]): str(one.get("displayName", "")) for one in schedules}
    now = datetime.now(UTC)

    def row(one: Run) -> tuple[str, ...]:
        start = one.started or one.created
        schedule = names.get(one.schedule, one.schedule.rpartition("/")[2])
        return (
            one.id, one.state, clock(start, date=True)[:16], took(start, one.ended, now), printable(schedule),
            printable(one.display_name),
        )  # fmt: skip

    head = ("ID", "STATE", "STARTED", "TOOK", "SCHEDULE", "NAME")
    first = [head, *map(row, islice(listed, PAGE))]
    widths = _table(first)
    for one in listed:  # the rest as it comes, a page after the other
        _table([row(one)], widths)
    if schedules:
        print()
        rows: list[tuple[str, ...]] = [("SCHEDULE", "STATE", "CRON", "NEXT RUN", "RUNS")]
        rows += [
            (
                printable(str(one.get("displayName", ""))), str(one.get("state", "")), str(one.get("cron", "")),
                clock(str(one.get("nextRunTime", "")), date=True)[:16], str(one.get("startedRunCount", "0")),
            )
            for one in schedules
        ]  # fmt: skip
        _table(rows)


def _table(rows: list[tuple[str, ...]], widths: list[int] | None = None) -> list[int]:
    widths = widths or [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip(), flush=True)
    return widths


def _print_json(listed: Iterator[Run], schedules: list[dict[str, Any]]) -> None:
    """One object, a line for each job as it comes."""
    print('{"jobs": [', end="")
    for number, one in enumerate(listed):
        print(",\n" if number else "\n", json.dumps({"id": one.id, **asdict(one)}), sep="", end="", flush=True)
    # The request of a schedule has the whole template.
    short = [{k: v for k, v in one.items() if k != "createPipelineJobRequest"} for one in schedules]
    print(f'\n], "schedules": {json.dumps(short)}}}')


@contextlib.contextmanager
def _opened(
    stack: str | None, project: str | None = None, region: str | None = None, job: str = ""
) -> Iterator[tuple[Pipelines, dict[str, Any]]]:
    """The pipelines of a place, and the outputs of its stack, if one is named.

    job: its full name names the place too. Errors end with a sentence and status 1.
    """
    from headcount.google import Place, place_of
    from headcount.pipelines import NAME, Pipelines
    from headcount.stacks import outputs

    if stack and (project or region):
        raise typer.BadParameter("give --stack, or --project and --region, not both")
    found: dict[str, Any] = {}
    with said():
        if stack:
            found = outputs(stack)
            place = place_of(found)
        elif match := NAME.fullmatch(job):
            place = Place(match[1], match[2])
        elif project and region:
            place = Place(project, region)
        else:
            raise typer.BadParameter("name a stack with --stack, or a project and a region with --project and --region")
        with contextlib.closing(Pipelines(place)) as there:
            yield there, found


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A template or a parameter that does not fit ends with a sentence and status 2."""
    from headcount.pipeline_template import TemplateError

    try:
        yield
    except TemplateError as error:
        raise typer.BadParameter(str(error)) from None
