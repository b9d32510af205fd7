"""Writes a trained model as a folder that can be served: `model.pt2` and `contract.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from serving.exported.model import ExportedModel
from serving.exported.model_contract import CONTRACT, PROGRAM, Contract, Example, Instance
from serving.exported.program import Program, save


def export(model: nn.Module, draft: Contract, instances: Sequence[Instance], folder: Path) -> None:
    """Exports a model, and checks that the folder predicts.

    model: takes the contract's inputs in order, each [batch, …], and returns its outputs of kind `values` as a tuple.
    draft: the contract; its sha256 and examples are filled in. instances: at least two, whose predictions become the
    contract's examples. A kill at any moment leaves a folder without a contract, or a whole one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONTRACT).unlink(missing_ok=True)
    columns = [np.stack(column) for column in zip(*(draft.read(one) for one in instances), strict=True)]
    tensors = [torch.from_numpy(column) for column in columns]
    partial = folder / f"{PROGRAM}.partial"
    save(model, tensors, partial)
    outputs = [one.numpy() for one in Program(partial)(*tensors)]
    contract = dataclasses.replace(
        draft,
        sha256=hashlib.sha256(partial.read_bytes()).hexdigest(),
        examples=tuple(
            Example(instance, draft.write(one))
            for instance, one in zip(instances, zip(*outputs, strict=True), strict=True)
        ),
    )
    partial.replace(folder / PROGRAM)
    _write_json(folder / CONTRACT, contract.as_json())
    ExportedModel(folder)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    partial.replace(file)
