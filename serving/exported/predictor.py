"""Predicts with a trained model in this process: `python -m serving.exported.predictor --model DIR --json-instances FILE`.

`Predictor` is the reference for servers: JSON instances in, predictions out, and no code of the model's folder runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.exported.model_contract import PROGRAM, Contract, ContractError, InstanceError, Prediction
from serving.exported.program import Program, ProgramError

TOLERANCE = 1e-3  # between a prediction here and where the model was exported, relative to numbers above 1


class Predictor:
    """A model from a folder, ready: it has predicted its own examples right. Threads may share it."""

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        """Raises ContractError and ProgramError."""
        self.contract = Contract.load(folder)
        self._program = Program(folder / PROGRAM, device)
        for example in self.contract.examples:
            try:
                (found,) = self.predict([example.instance])
            except (RuntimeError, TypeError, ValueError, IndexError, InstanceError) as error:
                raise ContractError(f"{folder}: the program does not fit the contract: {error}") from None
            if isinstance(found, InstanceError) or not _same(found, example.prediction):
                raise ContractError(f"{folder}: an example of the contract is predicted as {found}")

    def predict(self, instances: Sequence[Any]) -> list[Prediction | InstanceError]:
        """A prediction for each instance, in order; for one that is refused its error, and the others are answered."""
        read: list[list[np.ndarray[Any, Any]] | InstanceError] = []
        for instance in instances:
            try:
                read.append(self.contract.read(instance))
            except InstanceError as error:
                read.append(error)
        good = [one for one in read if not isinstance(one, InstanceError)]
        predictions = iter(self._predict(good) if good else [])
        return [one if isinstance(one, InstanceError) else next(predictions) for one in read]

    def _predict(self, batch: list[list[np.ndarray[Any, Any]]]) -> list[Prediction]:
        columns = [torch.from_numpy(np.stack(column)) for column in zip(*batch, strict=True)]
        outputs = [one.cpu().numpy() for one in self._program(*columns)]
        for output, declared in zip(outputs, self.contract.values, strict=True):
            if output.shape != (len(batch), *declared.shape) or output.dtype != declared.dtype:
                raise ValueError(f"{declared.name} is {output.dtype} of the shape {list(output.shape[1:])}")
        return [self.contract.write(one) for one in zip(*outputs, strict=True)]


def _same(found: object, expected: object) -> bool:
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[name], expected[name]) for name in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return abs(found - expected) <= TOLERANCE * max(1.0, abs(expected))
    return found == expected


def table(predictions: Sequence[Prediction]) -> str:
    """As `gcloud ai-platform local predict` printed them: a column for each output."""
    if not predictions:
        return ""
    rows = [[name.upper() for name in predictions[0]]]
    rows += [[json.dumps(value, ensure_ascii=False) for value in one.values()] for one in predictions]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.exported.predictor", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder with model.pt2, contract.json")
    parser.add_argument(
        "--json-instances", default="-", metavar="FILE", help="an instance a line; - for standard input"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each instance, errors included")
    arguments = parser.parse_args(argv)
    try:
        predictor = Predictor(arguments.model)
        from_stdin = arguments.json_instances == "-"
        text = sys.stdin.read() if from_stdin else Path(arguments.json_instances).read_text()
    except (ContractError, ProgramError) as error:
        print(f"predict: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"predict: {error.filename} cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    numbers, instances, failed = [], [], False
    answers: dict[int, Prediction | InstanceError] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                instances.append(json.loads(line))
                numbers.append(number)
            except ValueError as error:
                answers[number] = InstanceError(f"it is no JSON: {error}")
    answers |= zip(numbers, predictor.predict(instances), strict=True)
    answered = [answers[number] for number in sorted(answers)]
    for number in sorted(answers):
        answer = answers[number]
        if isinstance(answer, InstanceError):
            failed = True
            print(f"predict: {arguments.json_instances}:{number}: {answer}", file=sys.stderr)
    if arguments.json:
        for one in answered:
            print(json.dumps({"error": str(one)} if isinstance(one, InstanceError) else one))
    else:
        print(table([one for one in answered if not isinstance(one, InstanceError)]))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
