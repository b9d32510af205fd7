"""Predicts with an exported model in this process: JSON instances in, predictions out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.contract import Limits
from serving.exported.model_contract import PROGRAM, Array, Contract, ContractError, InstanceError, Prediction
from serving.exported.program import Program

TOLERANCE = 1e-3  # between a prediction here and where the model was exported, relative to numbers above 1
# The errors of torch's operators where an instance does not fit the program, such as a number that an embedding lacks.
_UNFIT = (RuntimeError, TypeError, ValueError, LookupError)


class ExportedModel:
    """A model from a folder, ready: it has predicted its own examples right. Threads may share it."""

    def __init__(self, folder: Path, device: torch.device | None = None, max_pixels: int = Limits.max_pixels) -> None:
        """max_pixels: of a picture in an instance. Raises ContractError and ProgramError."""
        self.contract = Contract.load(folder)
        self._program = Program(folder / PROGRAM, device)
        self._max_pixels = max_pixels
        for number, example in enumerate(self.contract.examples):
            (found,) = self.predict([example.instance])
            if isinstance(found, InstanceError):
                raise ContractError(f"{folder}: the program does not fit the contract: examples[{number}]: {found}")
            if not _same(found, example.prediction):
                raise ContractError(
                    f"{folder}: examples[{number}] is predicted as {found}, not as {example.prediction}"
                )

    def predict(self, instances: Sequence[Any]) -> list[Prediction | InstanceError]:
        """A prediction for each instance, in order; for one that is refused its error, and the others are answered."""
        answers: list[Prediction | InstanceError] = []
        batch: list[tuple[int, list[Array]]] = []
        for place, instance in enumerate(instances):
            try:
                batch.append((place, self.contract.read(instance, self._max_pixels)))
                answers.append({})
            except InstanceError as error:
                answers.append(error)
        for (place, _), answer in zip(batch, self._predict([one for _, one in batch]), strict=True):
            answers[place] = answer
        return answers

    def _predict(self, batch: list[list[Array]]) -> list[Prediction | InstanceError]:
        if not batch:
            return []
        try:
            outputs = self._run(batch)
        except _UNFIT as error:
            if len(batch) == 1:
                return [InstanceError(f"the model cannot compute it: {_first_line(error)}")]
            return [answer for one in batch for answer in self._predict([one])]  # finds the one that does not fit
        return [self._written(one) for one in zip(*outputs, strict=True)]

    def _run(self, batch: list[list[Array]]) -> list[Array]:
        columns = [torch.from_numpy(np.stack(column)) for column in zip(*batch, strict=True)]
        outputs = [one.cpu().numpy() for one in self._program(*columns)]
        if len(outputs) != len(self.contract.values):
            raise ValueError(f"it has {len(outputs)} outputs; the contract has {len(self.contract.values)}")
        for output, declared in zip(outputs, self.contract.values, strict=True):
            if output.shape != (len(batch), *declared.shape) or output.dtype != declared.dtype:
                raise ValueError(f"{declared.name} is {output.dtype} of the shape {list(output.shape[1:])}")
        return outputs

    def _written(self, outputs: Sequence[Array]) -> Prediction | InstanceError:
        try:
            return self.contract.write(outputs)
        except InstanceError as error:
            return error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or repr(error)


def _same(found: object, expected: object) -> bool:
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[name], expected[name]) for name in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return abs(found - expected) <= TOLERANCE * max(1.0, abs(expected))
    return found == expected
