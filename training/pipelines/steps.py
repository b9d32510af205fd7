"""The work of the pipeline's steps: plain functions of folders and values, which know nothing of KFP.

The modules that import torch are imported by the functions that need them, because each step is a process of its own
and torch takes seconds to import.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from serving.exported.model_contract import Contract, ContractError, InstanceError
from training.files import UsageError, local_path, published
from training.pipelines.registry import Candidate, open_registry

if TYPE_CHECKING:
    from serving.exported.model import ExportedModel

RAW = ("adult.data", "adult.test")  # as the UCI Adult table is published
TRAIN, EVAL = "train.csv", "eval.csv"
PREDICTIONS = "predictions.jsonl"
TOGETHER = 1000  # records that are predicted at once
METRIC = "accuracy"  # decides which of two models is better


def download(data: str, raw: Path) -> str:
    """Copies adult.data and adult.test into the folder `raw`, from `data` or from where they are published.

    data: a folder, a gs:// prefix, or "". Raises UsageError. Returns a sentence with the sizes.
    """
    if data:
        folder = local_path(data)
        sources = [folder / name for name in RAW]
        if absent := [source.name for source in sources if not source.is_file()]:
            raise UsageError(f"{data} has no {' and no '.join(absent)}; give a folder with {' and '.join(RAW)}")
    else:
        sources = [published(name) for name in RAW]
    raw.mkdir(parents=True, exist_ok=True)
    for source, name in zip(sources, RAW, strict=True):
        shutil.copyfile(source, raw / name)
    return ", ".join(f"{name} {(raw / name).stat().st_size / 1e6:.2f} MB" for name in RAW)


@dataclass(frozen=True)
class Cleaning:
    """The result of cleaning. counts: records in the files, records kept, and records dropped for each reason."""

    counts: Mapping[str, int]
    summary: str


def clean(raw: Path, cleaned: Path, max_dropped: float) -> Cleaning:
    """Writes the records that are worth learning from as train.csv and eval.csv into the folder `cleaned`.

    - Space around values, comments, blank lines, and the full stop after the labels of adult.test are removed.
    - A broken record is dropped: a wrong number of fields, a number that is none, or an unknown label.
    - A missing category is written as "?", which the network knows as a value of its own.
    - A record that repeats another one of its file is dropped. So is a training record that adult.test has, too,
      because the model must not be judged by records that it has learned.

    max_dropped: the largest fraction of broken records in a file; more of them mean that the file is another table.
    Raises UsageError.
    """
    from training.census import CATEGORIES, COLUMNS, read_records
    from training.common import BadRecords

    counts: Counter[str] = Counter()
    rows: dict[str, dict[tuple[str, ...], None]] = {}  # a dict keeps the order and drops what repeats
    for name in RAW:
        bad = BadRecords("skip")
        records = read_records([str(raw / name)], bad)
        print(*bad.shown, sep="\n")
        total = len(records) + bad.count
        if bad.count > max_dropped * total or not records:
            first = bad.shown[0].partition(":")[2] if bad.shown else "the file is empty"
            raise UsageError(
                f"{bad.count} of {total} records of {name} are broken, and at most {max_dropped:.1%} may be; the first "
                f"is in line {first}; repair the file, or raise max_dropped"
            )
        for record in records:
            missing = [column for column in CATEGORIES if record[column] in ("", "?", "NA")]
            record |= dict.fromkeys(missing, "?")
            counts["missing_values"] += len(missing)
        rows[name] = dict.fromkeys(tuple(record[column] for column in COLUMNS) for record in records)
        counts["records"] += total
        counts["broken"] += bad.count
        counts["duplicates"] += len(records) - len(rows[name])
    train, evaluation = (rows[name] for name in RAW)
    kept = [row for row in train if row not in evaluation]
    counts["leaks"] = len(train) - len(kept)
    counts["train"], counts["eval"] = len(kept), len(evaluation)
    cleaned.mkdir(parents=True, exist_ok=True)
    for name, table in ((TRAIN, kept), (EVAL, list(evaluation))):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        (cleaned / name).write_text(text.getvalue(), encoding="utf-8")
    names = {"broken": "broken", "duplicates": "repeated", "leaks": "in both files"}
    dropped = ", ".join(f"{counts[name]:,} {text}" for name, text in names.items())
    return Cleaning(dict(counts), f"{counts['train']:,} and {counts['eval']:,} records; dropped: {dropped}")


@dataclass(frozen=True)
class Evaluation:
    """A model's figures. confusion: [true class][predicted class], numbers of records, in the order of `classes`."""

    metrics: Mapping[str, float]
    classes: tuple[str, ...]
    confusion: list[list[int]]

    @property
    def summary(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())


def evaluate(model: Path, data: Path) -> Evaluation:
    """Measures an exported model on the records of eval.csv. Raises UsageError."""
    import numpy as np

    from training.census import CLASSES, auc

    records, predictions = _predicted(model, data)
    labels = np.array([record["income_bracket"] == CLASSES[1] for record in records])
    try:
        found = np.array([one["class_ids"][0] for one in predictions])
        scores = np.array([one["probabilities"][1] for one in predictions])
    except (KeyError, IndexError):
        raise UsageError(f"{model} does not predict the classes of the census table; is it another model?") from None
    confusion = [[int(((labels == true) & (found == guess)).sum()) for guess in (0, 1)] for true in (0, 1)]
    metrics = {METRIC: float((found == labels).mean()), "auc": auc(scores, labels.astype(np.float64))}
    return Evaluation(metrics, CLASSES, confusion)


def infer(model: Path, data: Path, predictions: Path) -> str:
    """Writes a line {"instance": …, "prediction": …} for each record of eval.csv, without its label.

    The format is that of Vertex AI's batch predictions. Raises UsageError.
    """
    from training.census import CLASSES, instance

    records, answers = _predicted(model, data)
    predictions.mkdir(parents=True, exist_ok=True)
    with (predictions / PREDICTIONS).open("w", encoding="utf-8") as file:
        for record, answer in zip(records, answers, strict=True):
            file.write(json.dumps({"instance": instance(record), "prediction": answer}) + "\n")
    high = sum(answer["classes"] == [CLASSES[1]] for answer in answers)
    return f"{len(records):,} predictions, {high:,} of them {CLASSES[1]}"


def _predicted(model: Path, data: Path) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Returns the records of eval.csv and their predictions."""
    from training.census import instance, read_records
    from training.common import BadRecords

    records = read_records([str(data / EVAL)], BadRecords("skip"))
    exported, predictions = _load(model), []
    for start in range(0, len(records), TOGETHER):
        for number, found in enumerate(exported.predict([instance(one) for one in records[start : start + TOGETHER]])):
            if isinstance(found, InstanceError):
                raise UsageError(f"{model} refuses record {start + number + 1} of {EVAL}: {found}")
            predictions.append(found)
    return records, predictions


def _load(model: Path) -> ExportedModel:
    from serving.exported.model import ExportedModel
    from serving.exported.program import ProgramError

    try:
        return ExportedModel(model)
    except (ContractError, ProgramError) as error:
        raise UsageError(str(error)) from None


class Verdict(NamedTuple):
    """Whether a model becomes the default version. champion: the default version so far, or ""."""

    better: bool
    champion: str
    summary: str


def compare(model: Path, data: Path, metrics: Mapping[str, float], registry: str, job: str) -> Verdict:
    """Evaluates the default version on the same data, and decides whether the model is better.

    metrics: of the model on `data`. registry, job: as `open_registry` takes them. Raises UsageError.
    """
    champion = open_registry(registry, job).default()
    if champion is None:
        return Verdict(True, "", "the registry has no version yet")
    if champion.model == Contract.load(model).version:
        return Verdict(False, champion.name, f"version {champion.name}, the default, is this model")
    try:
        score = evaluate(champion.folder(), data).metrics[METRIC]
    except UsageError as error:
        raise UsageError(
            f"version {champion.name}, the default, cannot be evaluated ({error}); give the alias default to another "
            "version"
        ) from None
    better = metrics[METRIC] > score
    return Verdict(
        better,
        champion.name,
        f"{'better' if better else 'not better, so it is not registered'}: {METRIC} {metrics[METRIC]:.5f}, and version "
        f"{champion.name}, the default, has {score:.5f} on the same data",
    )


def register(
    model: Path, uri: str, data: Path, metrics: Mapping[str, float], champion: str, registry: str, image: str, job: str
) -> str:
    """Adds a model to the registry as its default version.

    uri: of the folder `model`. champion: the default version that the model was compared with. image: serves it.
    Raises UsageError.
    """
    evaluated_on = hashlib.sha256((data / EVAL).read_bytes()).hexdigest()
    candidate = Candidate(model, uri, Contract.load(model).version, dict(metrics), evaluated_on, champion, image)
    name = open_registry(registry, job).register(candidate)
    return f"version {name} is the default now"
