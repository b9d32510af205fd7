"""`headcount jobs` lists and cancels jobs of Vertex AI; `headcount logs` prints the log of one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from headcount.jobs import Jobs

Stack = Annotated[str | None, typer.Option("-s", "--stack", metavar="NAME", help="Of this stack, e.g. local or dev.")]
Project = Annotated[str | None, typer.Option(metavar="ID", help="Of this project of Google Cloud.")]
Region = Annotated[str | None, typer.Option(metavar="REGION", help="In this region, e.g. europe-west4.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Id, full name, or display name (the newest job counts).")]

jobs = typer.Typer(rich_markup_mode=None)


@jobs.callback(invoke_without_command=True)
def _jobs(
    context: typer.Context,
    stack: Stack = None,
    project: Project = None,
    region: Region = None,
    limit: Annotated[int, typer.Option(min=1, help="Print so many of the newest jobs.")] = 20,
) -> None:
    """List the jobs of a stack's project and region, or of --project and --region."""
    context.obj = (stack, project, region)
    if context.invoked_subcommand is None:
        with opened(stack, project, region, "") as there:
            from headcount.jobs import table_text

            print(table_text(there.listed()[:limit]), end="")


@jobs.command(no_args_is_help=True)
def cancel(
    context: typer.Context, job: JobName, stack: Stack = None, project: Project = None, region: Region = None
) -> None:
    """Cancel a job that runs. Its record stays, and the next `pulumi up` runs it again."""
    before = context.obj
    with opened(stack or before[0], project or before[1], region or before[2], job) as there:
        found = there.find(job)
        if found.has_ended:
            _fail(f"{found.name} has ended: {found.state}.")
        there.cancel(found)
        print(f"cancelling {found.name}")


def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
    stack: Stack = None,
    project: Project = None,
    region: Region = None,
) -> None:
    """Print a job's log. With -f, follow it; the exit status is then 1 unless the job succeeds."""
    with opened(stack, project, region, job) as there:
        found = there.find(job)
        try:
            for line in there.log(found, follow=follow):
                print(line, flush=True)
        except KeyboardInterrupt:  # ends the reading, and not the job
            raise typer.Exit(130) from None
        if follow:
            found = there.refreshed(found)
            print(f"{found.name}: {found.state}", file=sys.stderr)
            raise typer.Exit(0 if found.state.endswith("SUCCEEDED") else 1)


@contextlib.contextmanager
def opened(stack: str | None, project: str | None, region: str | None, job: str) -> Iterator[Jobs]:
    """The jobs of a place. job: its full name names the place too. Errors end with a sentence and status 1."""
    from headcount.credentials import CredentialsError
    from headcount.google import GoogleError, Place
    from headcount.jobs import NAME, Jobs, of_stack
    from headcount.stacks import StackError

    if stack and (project or region):
        raise typer.BadParameter("give --stack, or --project and --region, not both")
    try:
        if stack:
            place = of_stack(stack)
        elif match := NAME.fullmatch(job):
            place = Place(match[1], match[2])
        elif project and region:
            place = Place(project, region)
        else:
            raise typer.BadParameter("name a stack with --stack, or a project and a region with --project and --region")
        with contextlib.closing(Jobs(place)) as there:
            yield there
    except (CredentialsError, GoogleError, StackError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    print(message, file=sys.stderr)
    raise typer.Exit(1) from None
