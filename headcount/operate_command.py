"""`headcount drift`, `headcount history`, `headcount rollback`: what runs, since when, and back to what ran before."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from headcount.drift import Finding
    from headcount.endpoint import Endpoint
    from headcount.google import Google

Stack = Annotated[str, typer.Argument(metavar="STACK", help="The stack, such as local or dev.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DRIFT: Final = 2  # exit code
ANSWERS: Final = 3  # in a row by the right version, before a rollback holds
SETTLE_SECONDS: Final = 120.0  # for which the version before may still answer
SETTLE_PAUSE: Final = 1.0


def drift(stack: Stack, as_json: Json = False) -> None:
    """Name what differs between a stack's state and the world, and who changed it last. Nothing is changed.

    The changes that the next `pulumi up` would make anyway are listed apart from it. Exit code: 0 no drift, 2 drift,
    1 error.
    """
    from headcount import drift as differences
    from headcount import history, stacks
    from headcount.google import Google, place_of

    with said():
        place = place_of(stacks.outputs(stack))
        found = differences.findings(stacks.digest(stack, "refresh", "--preview-only"), stack)
        state = json.loads(stacks.pulumi(stack, "stack", "export"))["deployment"]
        listed = json.loads(stacks.pulumi(stack, "stack", "history", "--json", "--page-size", "1"))
        since = next((update.end for update in history.updates(listed)), "1970-01-01T00:00:00Z")
        with contextlib.closing(Google(place)) as google:
            more, unread = _added_by_others(google, state)
            found = sorted([*found, *more], key=lambda one: (one.kind == "foreign", str(one)))
            found, unknown = _with_authors(google, found, since)
    failed = ""
    try:
        steps = differences.pending(stacks.digest(stack, "preview"))
    except stacks.StackError as error:
        steps, failed = [], str(error)
    write = differences.json_text if as_json else differences.text
    print(write(found, steps, stack, unknown), end="")
    for problem in unread:
        print(f"Not compared: {problem}", file=sys.stderr)
    if failed:
        print(f"The next `pulumi up` fails: {failed}", file=sys.stderr)
    raise typer.Exit(DRIFT if found else 1 if unread or failed else 0)


def _added_by_others(google: Google, state: dict[str, Any]) -> tuple[list[Finding], list[str]]:
    """What others added to the stack's resources, and what could not be read."""
    from headcount import drift as differences
    from headcount.google import GoogleError

    found: list[Finding] = []
    unread: list[str] = []
    for resource in differences.guarded(state):
        try:
            policy = google.ask(*differences.addressed(google.place, resource))
        except GoogleError as error:
            unread.append(str(error))
            continue
        found += differences.foreign_grants(resource, policy)
    for name in differences.endpoints(state):
        try:
            found += differences.foreign_models(state, google.ask("GET", f"{google.place.vertex}/v1/{name}"))
        except GoogleError as error:
            unread.append(str(error))
    return found, unread


def _with_authors(google: Google, found: list[Finding], since: str) -> tuple[list[Finding], str]:
    """The findings with their authors, and why there are none where the audit log cannot be read."""
    from headcount.audit import last_change
    from headcount.google import GoogleError

    try:
        return [replace(one, author=last_change(google, one, since)) for one in found], ""
    except GoogleError as error:
        return found, str(error)


def history(stack: Stack, as_json: Json = False) -> None:
    """Print which model versions served when, with the digests of their images, from Pulumi's own history."""
    from headcount import history as periods

    with said():
        found = periods.read(stack)
    print((periods.json_text if as_json else periods.table_text)(found), end="")


def rollback(
    stack: Stack,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The picture that the endpoint has to count; a sample without it."),
    ] = None,
    json_instances: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The instances that an exported model has to predict, a JSON instance a line."
        ),
    ] = None,
) -> None:
    """Move all traffic to the version that served before, ask it, and move back if it does not answer.

    The stack's file is changed and deployed; other changes of the program stay undeployed. After an interruption the
    same command goes on. Exit code: 0 the earlier version serves, 1 it does not.
    """
    from headcount import history, recovery, releases
    from headcount.rollback import Rollback, plan
    from headcount.stacks import StackError

    with said():
        for line in recovery.recover(stack):
            print(line)
        if found := Rollback.interrupted(stack):
            what = f"the move back from {found.version.version}" if found.back else f"to {found.version.version}"
            print(f"A rollback of stack {stack} was interrupted; it goes on: {what}.")
        else:
            planned = plan(stack, history.read(stack), releases.read(stack))
            print(planned)
            found = Rollback.of(planned)
        ask = _question(found.version.model, picture, json_instances)
        if not yes:
            if not sys.stdin.isatty():
                raise StackError("Nothing was changed. Repeat with --yes to do it.")
            if not typer.confirm("Do it?"):
                raise StackError("Nothing was changed.")
        try:
            done = found.run(lambda release, _: answered_by(stack, release, ask), print)
        except KeyboardInterrupt:
            print(f"Interrupted. Repeat `headcount rollback {stack}` to finish it.", file=sys.stderr)
            raise typer.Exit(130) from None
    if not done:
        print(f"Stack {stack} serves what it served before the rollback.", file=sys.stderr)
        raise typer.Exit(1)
    print(
        f"{found.version.version} serves all requests of stack {stack}. Commit Pulumi.{stack}.yaml, which says so too."
    )


def _question(model: str, picture: Path | None, instances: Path | None) -> Callable[[Endpoint], str]:
    """Asks an endpoint once; returns the id of the deployed model that answered.

    model: the gs:// folder of an exported model, or "" where pictures are counted. Raises StackError, CountError.
    """
    from headcount.data import DataError, fetch
    from headcount.stacks import StackError
    from serving.contract import Parameters

    try:
        if instances:
            given = [json.loads(line) for line in instances.read_text().splitlines() if line.strip()]
            return lambda endpoint: endpoint.predicted_by(given)[1]
        if model:
            raise StackError(
                f"It serves the model {model}. Name a file with instances to ask it for, with --json-instances."
            )
        data = (picture or fetch("bus.jpg")).read_bytes()
        return lambda endpoint: endpoint.counted_by(data, Parameters())[1]
    except (OSError, ValueError, DataError) as error:
        raise StackError(f"There is nothing to ask the endpoint with: {error}") from None


def answered_by(stack: str, release: str, ask: Callable[[Endpoint], str]) -> str:
    """What is wrong with the endpoint's answers if a release should give them all, or ""."""
    from headcount import releases
    from headcount.counters import CountError
    from headcount.endpoint import Endpoint, of_stack
    from headcount.stacks import StackError, outputs

    try:
        here = [one for one in releases.serving(outputs(stack)) if one.release == release]
        if not here or here[0].traffic != 100:
            return f"release {release} has {here[0].traffic if here else 0} % of the endpoint's traffic."
        with contextlib.closing(Endpoint(of_stack(stack))) as endpoint:
            deadline, good = time.monotonic() + SETTLE_SECONDS, 0
            while good < ANSWERS:
                by = ask(endpoint)
                good = good + 1 if by == here[0].id else 0
                if not good and time.monotonic() > deadline:
                    return f"deployed model {by} still answers."
                if not good:
                    time.sleep(SETTLE_PAUSE)
    except (CountError, StackError) as error:
        return str(error)
    return ""


@contextlib.contextmanager
def said() -> Iterator[None]:
    """Prints an error as a sentence and ends with 1."""
    from headcount.counters import CountError
    from headcount.google import GoogleError
    from headcount.stacks import StackError

    try:
        yield
    except (StackError, GoogleError, CountError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
