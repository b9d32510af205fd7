"""`headcount plan` writes a change down for approval, `headcount deploy` applies it: the verbs of the workflows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from headcount import deployment
from headcount.stacks import StackError

Stack = Annotated[str, typer.Argument(help="The stack.")]


def plan(
    stack: Stack, folder: Annotated[Path, typer.Argument(help="Where the review and Pulumi's plan are written.")]
) -> None:
    """Write down what `headcount deploy` would change, so that it can be approved. Changes nothing.

    Prints the review, and exits with 0 if nothing changes, 2 if something changes, 3 if something dangerous changes or
    a mandatory policy is violated, and 1 at an error.
    """
    try:
        status = deployment.make(stack, folder)
    except StackError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(deployment.ERROR) from None
    print((folder / deployment.REVIEW).read_text(), end="")
    raise typer.Exit(status)


def deploy(
    stack: Stack,
    approved: Annotated[
        Path | None, typer.Option("--plan", metavar="FOLDER", help="Apply only what `headcount plan` wrote here.")
    ] = None,
) -> None:
    """Deploy a stack under its policies, as `pulumi up` does.

    With --plan the change is previewed again before anything is touched, and must be the approved one.
    """
    try:
        status = deployment.deploy(stack, approved)
    except (StackError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    raise typer.Exit(status)
