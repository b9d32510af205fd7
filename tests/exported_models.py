"""Exported models for tests: small ones, made by torch.export in a moment, and damaged copies of them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serving.exported.model_contract import CONTRACT, PROGRAM, Category, Contract, Labels, Number, Values
from training.export import export

WEATHER = ("dry", "wet")
INSTANCES: list[dict[str, Any]] = [{"a": 1.0, "b": 2.0, "day": "mon"}, {"a": -3.5, "b": 0.25, "day": None}]


class Weather(nn.Module):
    """score = 2a - b + 1 + the day's weight (0 if not known, mon 10, tue 20), and whether it is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)
        self.days = nn.Embedding(3, 1)
        with torch.no_grad():
            self.line.weight.copy_(torch.tensor([[2.0, -1.0]]))
            self.line.bias.fill_(1.0)
            self.days.weight.copy_(torch.tensor([[0.0], [10.0], [20.0]]))

    def forward(self, a: Tensor, b: Tensor, day: Tensor) -> tuple[Tensor, Tensor]:
        score = self.line(torch.stack([a, b], 1)) + self.days(day)
        return (score > 0).long(), score


def contract(**changed: Any) -> Contract:
    given: dict[str, Any] = {
        "name": "weather",
        "sha256": "",
        "inputs": (Number("a"), Number("b", minimum=-100, maximum=1e30), Category("day", ("mon", "tue"))),
        "outputs": (Values("class_ids", (1,), "int64"), Labels("classes", "class_ids", WEATHER), Values("score", (1,))),
        "examples": (),
        "ignored": ("key",),
    }
    return Contract(**given | changed)


def weather(folder: Path) -> Path:
    """A folder with the model `weather`."""
    export(Weather(), contract(), INSTANCES, folder)
    return folder


def predicted(a: float, b: float, day: float = 0) -> dict[str, Any]:
    """What `weather` predicts, by hand. day: the day's weight."""
    score = 2 * a - b + 1 + day
    return {"class_ids": [int(score > 0)], "classes": [WEATHER[score > 0]], "score": [score]}


def rewrite(folder: Path, changed: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Changes members of the program's archive, by name, and writes the new checksum into the contract."""
    file = folder / PROGRAM
    with zipfile.ZipFile(file) as old:
        members = {name: changed(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, content in members.items():
            new.writestr(name, content)
    change_contract(folder, {"program": {"file": PROGRAM, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}})


def change_contract(folder: Path, fields: dict[str, Any]) -> None:
    file = folder / CONTRACT
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
