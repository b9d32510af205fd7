"""The command `headcount`."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from headcount.batch_command import batch
from headcount.compare_command import compare
from headcount.count_command import count
from headcount.deploy_command import deploy, plan
from headcount.jobs_command import jobs, logs
from headcount.operate_command import drift, history, rollback
from headcount.pipelines_command import pipelines
from headcount.predict_command import predict
from headcount.register_command import register
from headcount.release_command import recover, release
from headcount.review_command import ReviewCommand, review
from headcount.verify_command import verify
from headcount.web_command import web

# Plain help and errors, because rich's panels wrap a message over framed lines, which scripts and logs cannot use.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command(no_args_is_help=True)(count)
app.command(no_args_is_help=True)(batch)
app.command(no_args_is_help=True)(compare)
app.command(no_args_is_help=True)(predict)
app.command(no_args_is_help=True)(register)
app.command()(web)
app.command(no_args_is_help=True)(plan)
app.command(no_args_is_help=True)(deploy)
app.command(cls=ReviewCommand, no_args_is_help=True)(review)
app.command(no_args_is_help=True)(recover)
app.command(no_args_is_help=True)(logs)
app.command(no_args_is_help=True)(drift)
app.command(no_args_is_help=True)(history)
app.command(no_args_is_help=True)(rollback)
app.command(no_args_is_help=True)(verify)
app.add_typer(release, name="release")
app.add_typer(jobs, name="jobs")
app.add_typer(pipelines, name="pipelines")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"headcount {version('headcount')}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def _headcount(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Counts the people in pictures, predicts with other models, and manages the releases and jobs of a stack."""


def main() -> None:
    try:
        app()
    except ModuleNotFoundError as error:  # `make serve` installs less than the verbs of stacks need
        sys.exit(f"This needs the package {error.name}, which is not installed: run `make install` and repeat.")


if __name__ == "__main__":
    main()
