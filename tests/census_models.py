"""Tables and models of the census pipeline for tests: exported in a moment, and right as often as a test wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from kfp import dsl
from torch import Tensor, nn
from training_data import adult_line

from serving.exported.model_contract import Category
from training.census import CATEGORIES, NUMBERS, contract
from training.export import export

HOURS = NUMBERS.index("hours_per_week")


class ByHours(nn.Module):
    """Predicts >50K for records with more than `hours` hours a week, with the outputs of the census model."""

    def __init__(self, hours: float) -> None:
        super().__init__()
        self.register_buffer("hours", torch.tensor(hours))

    def forward(self, *columns: Tensor) -> tuple[Tensor, ...]:
        used = sum(column.float() for column in columns) * 0  # a program may not ignore an input
        logits = (columns[HOURS] - self.get_buffer("hours") + used)[:, None]
        logistic = logits.sigmoid()
        return (logits > 0).long(), logistic, logits, torch.cat([1 - logistic, logistic], 1)


def model(folder: Path, hours: float) -> Path:
    """Exports ByHours into a folder."""
    categories = [Category(name, ("a", "b")) for name in CATEGORIES]
    instances: list[dict[str, Any]] = [
        dict.fromkeys(NUMBERS, float(number)) | dict.fromkeys(CATEGORIES, "a") for number in (1, 2)
    ]
    export(ByHours(hours), contract(categories, {}, {}), instances, folder)
    return folder


def evaluation(folder: Path, hours: list[int]) -> Path:
    """Writes eval.csv: records with so many hours a week, of which those with more than 40 earn more."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        adult_line(">50K" if one > 40 else "<=50K", hours_per_week=str(one), age=str(20 + number))
        for number, one in enumerate(hours)
    ]
    (folder / "eval.csv").write_text("\n".join(lines) + "\n")
    return folder


def artifact(kind: type[dsl.Artifact], path: Path, **metadata: Any) -> Any:
    """Returns an artifact of KFP at a path."""
    return kind(name=path.name, uri=str(path), metadata=metadata)
