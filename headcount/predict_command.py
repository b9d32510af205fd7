"""`headcount predict`: predicts for JSON instances with an exported model, in this process or on a server.

stdout carries the results and nothing else, stderr everything else. Exit codes: 0 all instances were predicted, 1 some
or all were not, 2 the command was not understood.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from headcount.counters import CountError
from headcount.predictors import LocalModel, Predictor, Server, predict_all, table


def predict(
    json_instances: Annotated[
        Path, typer.Option(metavar="FILE", help="A file with a JSON instance a line; - is standard input.")
    ],
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Predict here, with the model of this folder.")
    ] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Ask this server, e.g. http://localhost:8080.")] = None,
    stack: Annotated[
        str | None, typer.Option(metavar="NAME", help="Ask the endpoint of this Pulumi stack, e.g. local or dev.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Ask this endpoint of Vertex AI: projects/…/locations/…/endpoints/ID."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each instance.")] = False,
) -> None:
    """Predict with an exported model: model.pt2 and contract.json.

    Prints the table of `gcloud ai-platform predict`. The traffic split decides which release of an endpoint answers,
    because a request to Vertex AI cannot name one.

    Exit code: 0 all instances were predicted, 1 some or all were not, 2 the command was not understood.
    """
    if sum(place is not None for place in (model, url, stack, endpoint)) != 1:
        raise typer.BadParameter("give one of --model, --url, --stack and --endpoint")
    lines = _read(json_instances)
    answers: dict[int, Any] = {}  # by the number of the line
    instances: dict[int, Any] = {}
    for number, line in lines:
        try:
            instances[number] = json.loads(line)
        except (ValueError, RecursionError) as error:
            answers[number] = {"error": {"message": f"it is not JSON: {error}"}}
    try:
        predictor = _open(model, url, stack, endpoint)
        try:
            for number, answer in zip(instances, predict_all(predictor, [*instances.values()]), strict=True):
                answers[number] = answer
        finally:
            predictor.close()
    except CountError as error:
        # It concerns all instances that are left, and is told once.
        print(f"headcount: {error}", file=sys.stderr)
        unanswered = {number: {"error": {"message": str(error)}} for number in instances.keys() - answers.keys()}
    else:
        unanswered = {}
    for number, _ in lines:
        if message := _error(answers.get(number)):
            print(f"headcount: {json_instances}:{number}: {message}", file=sys.stderr)
    results = [(answers | unanswered)[number] for number, _ in lines]
    if as_json:
        print("".join(json.dumps(result) + "\n" for result in results), end="")
    else:
        print(table(results), end="")
    raise typer.Exit(1 if any(_error(result) is not None for result in results) else 0)


def _read(file: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, and their numbers."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{file} is not UTF-8") from None
    # Not splitlines, because JSON texts may hold other ends of lines.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _open(model: Path | None, url: str | None, stack: str | None, endpoint: str | None) -> Predictor:
    """Raises CountError."""
    if model is not None:
        return LocalModel(model)
    try:
        if url is not None:
            return Server(url)
        from headcount.endpoint import Endpoint, of_name, of_stack

        return Endpoint(of_stack(stack) if stack is not None else of_name(endpoint or ""))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _error(result: Any) -> str | None:
    """The message of an answer that is an error, without the place in its request, which is not the file's."""
    if not isinstance(result, dict) or "error" not in result:
        return None
    error = result["error"]
    message = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    return re.sub(r"^instances\[\d+\]: ", "", message)
