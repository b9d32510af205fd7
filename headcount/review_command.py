"""`headcount review` says what `pulumi up` would change, what that costs, and what of it is dangerous."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand

from headcount.stacks import StackError, pulumi

USAGE: Final = 2  # a wrong command line, for typer
ERROR: Final = 1  # as review/summary.py has it, which is slow to import


class ReviewCommand(TyperCommand):
    """A command whose usage errors exit with 1, because 2 says that something changes."""

    def parse_args(self, *arguments: Any) -> Any:
        try:
            return super().parse_args(*arguments)
        except Exception as error:
            if getattr(error, "exit_code", None) == USAGE:  # typer exports no class for all of them
                error.exit_code = ERROR  # type: ignore[attr-defined]
            raise


def review(
    stack: Annotated[str, typer.Argument(help="The stack.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the review for tools.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the review as a page, too.")] = None,
    post: Annotated[
        bool, typer.Option("--post", help="Write it as a comment on the pull request of a GitHub workflow, too.")
    ] = False,
    save_plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save Pulumi's plan of the same preview, for `up --plan`.")
    ] = None,
    policy_pack: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Apply the policies of this folder, too.")
    ] = None,
    verified: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Show what `headcount verify STACK --json` wrote into this file."),
    ] = None,
    events: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read this event log of a preview instead of running one.")
    ] = None,
) -> None:
    """Say what `pulumi up` would change, what that costs, and what of it is dangerous, as Markdown.

    Exits with 0 if nothing changes, 2 if something changes, 3 if something dangerous changes or a mandatory policy is
    violated, and 1 at an error. Changes nothing.
    """
    # Imported here because Pulumi's SDK is slow to import.
    from review import events as event_log
    from review import github, markdown, page, prices, summary
    from review.verified import sentence

    try:
        lines = events.read_text().splitlines() if events else _preview(stack, save_plan, policy_pack or [])
        served = set() if events else _served(stack)
        preview = event_log.read(stack, lines)
        found = summary.review(preview, prices.load(), served)
        if verified:
            found = replace(found, verified=sentence(verified.read_text(), stack))
        text = markdown.render(found)
        if html:
            html.write_text(page.render(found))
        if post:
            to = github.PullRequest.of(os.environ)
            print(github.post(to, markdown.marker(stack), text), file=sys.stderr)
    except (StackError, github.CommentError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(ERROR) from None
    print(json.dumps(summary.as_json(found), indent=2, ensure_ascii=False) if as_json else text, end="\n" * as_json)
    raise typer.Exit(found.exit_code)


def _preview(stack: str, save_plan: Path | None, policy_packs: list[Path]) -> list[str]:
    """The events of a preview, also of one that fails. Raises StackError where there are none."""
    options = [f"--save-plan={save_plan.resolve()}"] if save_plan else []
    options += [f"--policy-pack={pack.resolve()}" for pack in policy_packs]
    # The engine writes secrets into its events as [secret], and settings as they are: nobody else may read the log.
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "events.jsonl"
        try:
            # Pulumi takes this option with this variable only; its Automation API does the same.
            pulumi(stack, "preview", f"--event-log={log}", *options, PULUMI_DEBUG_COMMANDS="true")
        except StackError:
            if not log.exists() or '"diagnosticEvent"' not in log.read_text():
                raise
        return log.read_text().splitlines()


def _served(stack: str) -> set[str]:
    """The model versions that have answered requests."""
    from review.served import served

    history = json.loads(pulumi(stack, "stack", "history", "--json", "--page-size", "200"))
    return served(json.loads(pulumi(stack, "stack", "export")), history or [])
