"""`headcount release` changes the releases in a stack's file; `headcount recover` repairs a stack after a kill."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from headcount import releases
from headcount.stacks import StackError, outputs

Name = Annotated[str, typer.Argument(help="The release, such as main or next.")]

release = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@release.callback()
def _release(
    context: typer.Context, stack: Annotated[str, typer.Option("-s", "--stack", metavar="STACK", help="The stack.")]
) -> None:
    """Change the releases in a stack's file, and print the diff. Nothing is deployed before `pulumi up`."""
    context.obj = stack


@release.command()
def canary(
    context: typer.Context,
    name: Name,
    percent: Annotated[int, typer.Argument(help="Its share of the traffic.")],
    image: Annotated[
        str, typer.Option(metavar="DIGEST", help="An image by digest (sha256:…) instead of the one that is built.")
    ] = releases.BUILD,
    model: Annotated[
        str,
        typer.Option(metavar="URI", help="Serve the model of this gs:// folder, or of a job: training/JOB."),
    ] = "",
) -> None:
    """Give a new release a share of the traffic, beside the other releases."""
    stack = context.obj

    def edit(current: releases.Releases) -> releases.Releases:
        pins = image == releases.BUILD and any(r["image"] == image for n, r in current.items() if n != name)
        running = outputs(stack).get("images", {}) if pins else {}
        return releases.canary(current, name, image, percent, running, model)

    with _said(stack):
        print(releases.change(stack, edit), end="")


@release.command()
def add(
    context: typer.Context,
    name: Name,
    source: Annotated[str, typer.Option("--from", metavar="STACK", help="The stack whose endpoint serves the image.")],
    percent: Annotated[int, typer.Option(help="Its share of the traffic.")] = 100,
) -> None:
    """Add a release with the image that has most of another stack's traffic."""
    with _said(context.obj):
        proved = releases.proved(source)
        print(releases.change(context.obj, lambda r: releases.canary(r, name, proved, percent, {})), end="")


@release.command()
def promote(context: typer.Context, name: Name) -> None:
    """Give a release all the traffic. The others stay deployed, and cost, until `remove`."""
    with _said(context.obj):
        print(releases.change(context.obj, lambda r: releases.promote(r, name)), end="")


@release.command()
def remove(context: typer.Context, name: Name) -> None:
    """Undeploy and delete a release that has no traffic."""
    with _said(context.obj):
        print(releases.change(context.obj, lambda r: releases.remove(r, name)), end="")


@release.command()
def pause(context: typer.Context) -> None:
    """Undeploy everything and keep the model versions."""
    with _said(context.obj):
        print(releases.pause(context.obj, True), end="")


@release.command()
def resume(context: typer.Context) -> None:
    """Deploy the releases again after a pause."""
    with _said(context.obj):
        print(releases.pause(context.obj, False), end="")


def recover(stack: Annotated[str, typer.Argument(help="The stack.")]) -> None:
    """Repair a stack after its `pulumi` was killed: its lock, its state file, and its pending resources."""
    from headcount.recovery import recover as repair

    with _said():
        print("\n".join(repair(stack)) or "nothing to recover")


@contextlib.contextmanager
def _said(stack: str = "") -> Iterator[None]:
    """Prints a StackError as a sentence and ends with 1; after a change of a stack's file, prints how to deploy it."""
    try:
        yield
    except StackError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    if stack:
        print(f"Deploy it: pulumi up -s {stack}", file=sys.stderr)
