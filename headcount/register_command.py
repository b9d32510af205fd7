"""`headcount register`: uploads a model that was trained elsewhere to a stack's bucket, and prints its release."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from headcount import bucket, releases
from headcount.counters import CountError
from headcount.predictors import LocalModel
from headcount.stacks import StackError, outputs
from serving.exported.model_contract import CONTRACT, PROGRAM


def register(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with model.pt2 and contract.json.")],
    stack: Annotated[str, typer.Option("-s", "--stack", metavar="STACK", help="The stack.")],
) -> None:
    """Upload an exported model to a stack's bucket, and print the release to put into the stack's file.

    The model is tried first. Its folder in the bucket is named after its content, so that registering the same model
    again uploads nothing. Nothing is deployed before `pulumi up`.
    """
    try:
        name = LocalModel(model).contract.name
        found = outputs(stack)
        uri = upload(model, name, found)
        image = next((str(one["image"]) for one in releases.read(stack).values()), releases.BUILD)
    except (StackError, CountError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(release_text(name, image, uri), end="")
    print(
        f"Put this into Pulumi.{stack}.yaml, in place of its releases or beside them, and deploy it: "
        f"pulumi up -s {stack}",
        file=sys.stderr,
    )


def release_text(name: str, image: str, uri: str) -> str:
    """The release of a model, as it stands in a stack's file."""
    lines = ("headcount:releases:", f"  {name.replace('_', '-')}:", f"    image: {image}", f"    model: {uri}",
             "    traffic: 100")  # fmt: skip
    return "".join(f"  {line}\n" for line in lines)


def upload(model: Path, name: str, found: dict[str, Any]) -> str:
    """Copies a model to the bucket of a stack with these outputs; returns its gs:// folder. Raises StackError.

    The contract is copied last: a folder without one is not a model, so that a kill leaves no half of one.
    """
    # The contract has the program's checksum.
    folder = f"{name}/{hashlib.sha256((model / CONTRACT).read_bytes()).hexdigest()[:16]}"
    return f"{bucket.copy({f'{folder}/{file}': model / file for file in (PROGRAM, CONTRACT)}, found)}/{folder}"
