"""`headcount verify`: labelled pictures through a stack's endpoint, and the verdict about a release."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from headcount.operate_command import Json, Stack, said


def verify(
    stack: Stack,
    pictures: Annotated[
        list[str] | None,
        typer.Argument(metavar="PICTURE", help="Labelled pictures and folders of them; COCO128's without any."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lines NAME=COUNT; without it YOLO's label files beside the pictures."),
    ] = None,
    release: Annotated[
        str, typer.Option(metavar="NAME", help="The release to prove; the one with least traffic without it.")
    ] = "",
    most: Annotated[int, typer.Option("--pictures", min=1, help="Pictures at most, spread over those given.")] = 32,
    requests: Annotated[int, typer.Option(min=1, help="Requests at most.")] = 400,
    tolerance: Annotated[
        float, typer.Option(help="People a picture by which its error may be above that of what serves most.")
    ] = 0.05,
    fail_above: Annotated[
        float | None, typer.Option(metavar="ERROR", help="Fail above this mean absolute count error, too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove a release: count labelled pictures through the endpoint, and compare with the version that serves most.

    The pictures are asked again until each version with traffic has counted them, because the endpoint chooses which
    one answers. Exit code: 0 as good, 2 worse, 1 error or too few answers.
    """
    from headcount import releases, stacks
    from headcount import verify as proof
    from headcount.data import DataError, fetch
    from headcount.endpoint import Endpoint, of_stack
    from serving.contract import Parameters

    with said():
        try:
            names = pictures or [str(fetch("coco128") / "images")]
            given = proof.spread(proof.labelled(names, labels) if pictures else proof.coco(names[0]), most)
            found = releases.serving(stacks.outputs(stack))
            proof.chosen(found, release)
            with contextlib.closing(Endpoint(of_stack(stack))) as endpoint:

                def count(data: bytes) -> tuple[int, str]:
                    answer, model = endpoint.counted_by(data, Parameters())
                    return answer.count, model

                serving = [one.id for one in found if one.traffic]
                answers = proof.ask(given, serving, proof.once_with(count, time.monotonic), requests, _progress)
        except (proof.VerifyError, DataError) as error:
            raise stacks.StackError(str(error).replace("STACK", stack)) from None
    verdict = proof.judge(stack, found, release, answers, tolerance=tolerance, highest=fail_above)
    print(proof.json_text(verdict) if as_json else proof.text(verdict), end="")
    raise typer.Exit(verdict.exit_code)


def _progress(requests: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{requests} requests ", end="", file=sys.stderr, flush=True)
