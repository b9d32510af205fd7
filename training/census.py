"""Predicts from the UCI Adult table whether a person earns over 50,000 dollars a year, with a wide and deep network.

    python -m training.census --job-dir output --train-files adult.data --eval-files adult.test --train-steps 2000

The logit is the sum of two parts (Cheng et al., https://arxiv.org/abs/1606.07792). The wide part has a weight for each
category and for each combination of some categories; it memorises exceptions. The deep part is a network on embeddings
of the categories and on the numeric columns; it generalises. The file goes from columns over records and network to
training and export.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from serving.exported.model_contract import Category, Contract, Input, Labels, Number, Values
from training import common
from training.export import export

# https://archive.ics.uci.edu/dataset/2/adult, with the column names of the requests that older guides send. fnlwgt is
# the number of people for whom a record stands; it says nothing about the person.
NUMBERS = ("age", "education_num", "capital_gain", "capital_loss", "hours_per_week")
CATEGORIES = (
    "workclass", "education", "marital_status", "occupation", "relationship", "race", "gender", "native_country",
)  # fmt: skip
COLUMNS = (
    "age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation", "relationship", "race",
    "gender", "capital_gain", "capital_loss", "hours_per_week", "native_country", "income_bracket",
)  # fmt: skip
IGNORED = ("fnlwgt", "income_bracket")
CLASSES = ("<=50K", ">50K")
HEAVY_TAILED = ("capital_gain", "capital_loss")  # most are 0 and some are 99,999, so the network gets log(1 + x)
AGES = (18, 25, 30, 35, 40, 45, 50, 55, 60, 65)  # lower bounds of the age groups in combinations
CROSSINGS = (("education", "occupation"), ("native_country", "occupation"), ("age", "education", "occupation"),
             ("marital_status", "occupation"))  # fmt: skip


@dataclass
class Table:
    """Records: numbers [n, 5] float32, categories [n, 8] int64 (indices of the vocabularies), labels [n] float32."""

    numbers: Tensor
    categories: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def read_records(files: Sequence[str], bad: common.BadRecords) -> list[dict[str, str]]:
    """Returns the records of files as texts by column. Blank lines and comments (`|…`) are skipped.

    Each line is parsed alone, so that a stray quotation mark breaks one record and not the rest of the file.
    """
    records = []
    for file in map(common.local_path, files):
        with file.open(encoding="utf-8", errors="replace") as opened:
            for number, line in enumerate(opened, 1):
                if not line.strip() or line.startswith("|"):
                    continue
                try:
                    fields = [one.strip() for one in next(csv.reader([line], skipinitialspace=True, strict=True))]
                except csv.Error as error:
                    bad.add(file, number, str(error))
                    continue
                record = dict(zip(COLUMNS, fields, strict=False))
                # The published file of test records ends its labels with a full stop.
                record["income_bracket"] = record.get("income_bracket", "").rstrip(".")
                if why := why_broken(record, len(fields)):
                    bad.add(file, number, why)
                else:
                    records.append(record)
    return records


def why_broken(record: dict[str, str], fields: int) -> str:
    """Returns the defect of a record, or ""."""
    if fields != len(COLUMNS):
        return f"it has {fields} fields, not {len(COLUMNS)}"
    if broken := [name for name, value in record.items() if "\ufffd" in value]:
        return f"{broken[0]} is not UTF-8"
    for name in NUMBERS:
        try:
            number = float(record[name])
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            return f"{name} is {record[name]!r}, not a number of at least 0"
    if record["income_bracket"] not in CLASSES:
        return f"income_bracket is {record['income_bracket']!r}, not one of {', '.join(CLASSES)}"
    return ""


def vocabularies(records: Sequence[dict[str, str]]) -> list[Category]:
    """Returns the values of each categorical column in alphabetical order. Unknown values ("?") get the index 0."""
    return [Category(name, tuple(sorted({record[name] for record in records} - {"?", ""}))) for name in CATEGORIES]


def as_table(records: Sequence[dict[str, str]], categories: Sequence[Category]) -> Table:
    """Returns records as tensors."""
    return Table(
        torch.tensor([[float(record[name]) for name in NUMBERS] for record in records], dtype=torch.float32),
        torch.tensor([[one.index(record[one.name]) for one in categories] for record in records]),
        torch.tensor([float(record["income_bracket"] == CLASSES[1]) for record in records]),
    )


def scaled(numbers: Tensor) -> Tensor:
    """Returns the numeric columns [n, 5] with those of HEAVY_TAILED as log(1 + x)."""
    columns = [
        column.log1p() if name in HEAVY_TAILED else column
        for name, column in zip(NUMBERS, numbers.unbind(1), strict=True)
    ]
    return torch.stack(columns, 1)


class WideAndDeep(nn.Module):
    """Maps numbers [n, 5] and categories [n, 8] to logits [n], the scaling of the numbers included."""

    mean: Tensor
    deviation: Tensor
    ages: Tensor

    def __init__(self, sizes: dict[str, int], embedding: int, hidden: Sequence[int], dropout: float) -> None:
        """sizes: the number of values of each categorical column, the unknown value included."""
        super().__init__()
        self.sizes = sizes | {"age": len(AGES) + 1}
        self.register_buffer("ages", torch.tensor(AGES, dtype=torch.float32))
        self.register_buffer("mean", torch.zeros(len(NUMBERS)))
        self.register_buffer("deviation", torch.ones(len(NUMBERS)))
        self.embeddings = nn.ModuleList(nn.Embedding(sizes[name], embedding) for name in CATEGORIES)
        layers: list[nn.Module] = []
        width = len(NUMBERS) + embedding * len(CATEGORIES)
        for units in hidden:
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(dropout)]
            width = units
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1))
        self.wide = nn.ModuleList(
            nn.Embedding.from_pretrained(torch.zeros(self.combinations(one), 1), freeze=False) for one in self.crossed()
        )

    def crossed(self) -> list[tuple[str, ...]]:
        """Returns the column groups with weights in the wide part: each category, the age group, and CROSSINGS."""
        return [*((name,) for name in CATEGORIES), ("age",), *CROSSINGS]

    def combinations(self, names: Sequence[str]) -> int:
        return math.prod(self.sizes[name] for name in names)

    def fit_scale(self, numbers: Tensor) -> None:
        """Sets mean and standard deviation of the scaling from the training records."""
        columns = scaled(numbers)
        self.mean.copy_(columns.mean(0))
        deviation = columns.std(0)
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1))  # 0 for a column with one value

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        columns = dict(zip(CATEGORIES, categories.unbind(1), strict=True))
        embedded = [table(column) for table, column in zip(self.embeddings, columns.values(), strict=True)]
        deep = self.deep(torch.cat([(scaled(numbers) - self.mean) / self.deviation, *embedded], 1))
        columns["age"] = (numbers[:, :1] >= self.ages).sum(1)
        wide = torch.zeros_like(deep)
        for names, weights in zip(self.crossed(), self.wide, strict=True):
            place = torch.zeros_like(columns["age"])
            for name in names:
                place = place * self.sizes[name] + columns[name]
            wide = wide + weights(place)
        logits: Tensor = wide + deep
        return logits.squeeze(1)


def auc(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """Returns the area under the ROC curve: the probability that a positive record scores above a negative one.

    Ties count half. The value comes from the ranks (Mann and Whitney); it is NaN if a class is absent.
    """
    _, index, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[index]
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return math.nan
    return float((ranks[labels > 0].sum() - positive * (positive + 1) / 2) / (positive * negative))


def evaluate(model: WideAndDeep, table: Table, device: torch.device, records: int) -> dict[str, float]:
    """Returns accuracy, AUC and loss on the first records of a table."""
    model.eval()
    with torch.no_grad():
        logits = torch.cat(
            [
                model(numbers.to(device), categories.to(device)).cpu()
                for numbers, categories in zip(
                    table.numbers[:records].split(4096), table.categories[:records].split(4096), strict=True
                )
            ]
        )
    model.train()
    labels = table.labels[:records]
    found = {
        "accuracy": float(((logits > 0) == (labels > 0)).float().mean()),
        "auc": auc(logits.numpy(), labels.numpy()),
        "eval_loss": float(F.binary_cross_entropy_with_logits(logits, labels)),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


class Served(nn.Module):
    """The network with the inputs and outputs of the older guides' census model: a tensor [n] for each column."""

    def __init__(self, model: WideAndDeep) -> None:
        super().__init__()
        self.model = model

    def forward(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Maps the columns of NUMBERS and CATEGORIES to class ids, logistic, logits and probabilities, each [n, …]."""
        numbers = torch.stack(columns[: len(NUMBERS)], 1)
        logits = self.model(numbers, torch.stack(columns[len(NUMBERS) :], 1))[:, None]
        logistic = logits.sigmoid()
        return (logits > 0).long(), logistic, logits, torch.cat([1 - logistic, logistic], 1)


def contract(categories: Sequence[Category], metrics: dict[str, float], origin: dict[str, object]) -> Contract:
    """Returns the contract, to which `export` adds the program's SHA-256 and the examples."""
    inputs: list[Input] = [Number(name, minimum=0) for name in NUMBERS]
    return Contract(
        name="census",
        sha256="",
        inputs=(*inputs, *categories),
        outputs=(
            Values("class_ids", (1,), "int64"),
            Labels("classes", "class_ids", CLASSES),
            Values("logistic", (1,)),
            Values("logits", (1,)),
            Values("probabilities", (2,)),
        ),
        examples=(),
        ignored=IGNORED,
        metrics=metrics,
        origin=origin,
    )


def instance(record: dict[str, str]) -> dict[str, object]:
    """Returns a record as a JSON instance."""
    return {name: float(record[name]) for name in NUMBERS} | {name: record[name] for name in CATEGORIES}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="census", description=__doc__.partition("\n")[0])
    common.add_arguments(parser, checkpoint_every=500)
    parser.add_argument("--train-files", nargs="+", metavar="FILE", help="records (the published adult.data)")
    parser.add_argument("--eval-files", nargs="+", metavar="FILE", help="records (the published adult.test)")
    parser.add_argument("--train-steps", type=common.whole, default=2000, help="batches to train (%(default)s)")
    parser.add_argument("--eval-steps", type=common.whole, help="batches to evaluate (all records)")
    parser.add_argument("--eval-every", type=common.whole, default=500, help="steps between evaluations (%(default)s)")
    parser.add_argument("--train-batch-size", type=common.whole, default=256, help="records a step (%(default)s)")
    parser.add_argument(
        "--eval-batch-size", type=common.whole, default=100, help="records an evaluation step (%(default)s)"
    )
    parser.add_argument("--learning-rate", type=common.positive, default=0.005, help="at its peak (%(default)s)")
    parser.add_argument(
        "--weight-decay", type=float, default=2e-4, help="keeps weights of rare combinations small (%(default)s)"
    )
    parser.add_argument("--embedding-size", type=common.whole, default=8, help="numbers for a category (%(default)s)")
    parser.add_argument(
        "--hidden", type=common.whole, nargs="+", default=[100, 50], help="units of the deep layers (100 50)"
    )
    parser.add_argument("--dropout", type=common.fraction, default=0.1, help="in the deep layers (%(default)s)")
    return common.parse(parser, argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    with common.run_of(arguments) as run:
        train(arguments, run)


def train(arguments: argparse.Namespace, run: common.Run) -> None:
    bad = common.BadRecords(arguments.on_bad_record)
    records = read_records(arguments.train_files or [str(common.published("adult.data"))], bad)
    eval_records = read_records(arguments.eval_files or [str(common.published("adult.test"))], bad)
    bad.close(run)
    if len(records) < 2 or not eval_records:
        raise common.UsageError(f"{len(records)} records to train with and {len(eval_records)} to evaluate: too few")
    categories = vocabularies(records)
    table, eval_table = as_table(records, categories), as_table(eval_records, categories)

    sizes = {one.name: len(one.vocabulary) + 1 for one in categories}
    model = WideAndDeep(sizes, arguments.embedding_size, arguments.hidden, arguments.dropout)
    model.fit_scale(table.numbers)
    model.to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=arguments.weight_decay)
    done, state = run.restore(data=common.data_sha256([table.numbers, table.categories, table.labels]))
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    last, parallel = arguments.train_steps, run.parallel(model)
    evaluated = (arguments.eval_steps or len(eval_table)) * arguments.eval_batch_size
    for step in run.steps(done, last):
        common.set_learning_rate(optimizer, common.learning_rate_at(step, last, arguments.learning_rate))
        batch = run.share(common.batch_at(step, arguments.train_batch_size, len(table), run.seed))
        logits = parallel(table.numbers[batch].to(run.device), table.categories[batch].to(run.device))
        loss = F.binary_cross_entropy_with_logits(logits, table.labels[batch].to(run.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = step + 1
        if done % 100 == 0:
            run.report(done, loss=loss.item())
        if done % arguments.eval_every == 0 and done < last and run.is_chief:
            run.report(done, **evaluate(model, eval_table, run.device, evaluated))
        if done % arguments.checkpoint_every == 0 or done == last:
            run.save(done, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    if run.is_chief:
        metrics = evaluate(model, eval_table, run.device, evaluated)
        run.report(done, **metrics)
        run.report_trial(done, accuracy=metrics["accuracy"])
        origin = {"workload": "census", "records": len(table), "skipped": bad.count, "options": run.identity}
        examples = [instance(record) for record in eval_records[:2]] + [instance(records[0])]
        export(Served(model), contract(categories, metrics, origin), examples, run.folders.model)
        run.say_result(metrics, bad.count)


if __name__ == "__main__":
    common.command(main)
