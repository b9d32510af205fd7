"""Income over 50,000 dollars a year from the UCI Adult table: a wide and deep network.

    python -m training.census --job-dir output --train-files adult.data --eval-files adult.test --train-steps 2000

Wide (Cheng et al., https://arxiv.org/abs/1606.07792): a weight for each category and for each crossing of some, which
remembers exceptions. Deep: embeddings of the categories beside the numeric columns, which generalises. Their logits
are added. Read from top to bottom: columns, records, network, training, export.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import Counter
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

# The columns of the file, in order: https://archive.ics.uci.edu/dataset/2/adult. The names are those of the requests
# that older guides send. fnlwgt says how many people of the census a record stands for and nothing about the person.
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
HEAVY_TAILED = ("capital_gain", "capital_loss")  # most are 0, some are 99,999: the network gets their logarithm
AGES = (18, 25, 30, 35, 40, 45, 50, 55, 60, 65)  # lower ends of the age groups that are crossed
CROSSINGS = (("education", "occupation"), ("native_country", "occupation"), ("age", "education", "occupation"),
             ("marital_status", "occupation"))  # fmt: skip


@dataclass
class Table:
    """Records: numbers [n, 5] float32, categories [n, 8] int64 as places in the vocabulary, labels [n] float32."""

    numbers: Tensor
    categories: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def read_records(files: Sequence[str], bad: common.BadRecords) -> list[dict[str, str]]:
    """The records of files as columns and texts. Blank lines and comments (`|…`) are none."""
    records = []
    for file in map(common.local_path, files):
        try:
            with file.open(newline="", encoding="utf-8", errors="replace") as opened:
                for line, fields in enumerate(csv.reader(opened, skipinitialspace=True), 1):
                    if not fields or fields[0].startswith("|"):
                        continue
                    # The file of test records ends its labels with a full stop.
                    record = dict(zip(COLUMNS, (one.strip() for one in fields), strict=False))
                    record["income_bracket"] = record.get("income_bracket", "").rstrip(".")
                    if why := why_broken(record, len(fields)):
                        bad.add(file, line, why)
                    else:
                        records.append(record)
        except OSError as error:
            raise common.UsageError(f"{file} cannot be read: {error.strerror}") from None
    return records


def why_broken(record: dict[str, str], fields: int) -> str:
    """What is wrong with a record, or ""."""
    if fields != len(COLUMNS):
        return f"{fields} fields, not {len(COLUMNS)}"
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
    """The categories of each column, the most frequent first. What is not known ("?") has the place 0."""
    found = []
    for name in CATEGORIES:
        counts = Counter(record[name] for record in records)
        counts.pop("?", None)
        found.append(Category(name, tuple(sorted(counts, key=lambda text, counts=counts: (-counts[text], text)))))  # type: ignore[misc]
    return found


def as_table(records: Sequence[dict[str, str]], categories: Sequence[Category]) -> Table:
    return Table(
        torch.tensor([[float(record[name]) for name in NUMBERS] for record in records], dtype=torch.float32),
        torch.tensor([[one.index(record[one.name]) for one in categories] for record in records]),
        torch.tensor([float(record["income_bracket"] == CLASSES[1]) for record in records]),
    )


def scaled(numbers: Tensor) -> Tensor:
    """The numeric columns with the heavy tails drawn in."""
    columns = [
        column.log1p() if name in HEAVY_TAILED else column
        for name, column in zip(NUMBERS, numbers.unbind(1), strict=True)
    ]
    return torch.stack(columns, 1)


class WideAndDeep(nn.Module):
    """numbers [n, 5], categories [n, 8] → logits [n]. Everything between a record and its logit is in here."""

    mean: Tensor
    deviation: Tensor
    ages: Tensor

    def __init__(self, sizes: dict[str, int], embedding: int, hidden: Sequence[int], dropout: float) -> None:
        """sizes: number of values of each category, that of "not known" included."""
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
        """What has wide weights: each category, the age group, and the crossings."""
        return [*((name,) for name in CATEGORIES), ("age",), *CROSSINGS]

    def combinations(self, names: Sequence[str]) -> int:
        return math.prod(self.sizes[name] for name in names)

    def fit_scale(self, numbers: Tensor) -> None:
        """Takes mean and standard deviation from the training records."""
        columns = scaled(numbers)
        self.mean.copy_(columns.mean(0))
        self.deviation.copy_(columns.std(0).clamp_min(1e-6))

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
    """Area under the ROC curve: the chance that a positive record scores above a negative one, ties counting half."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return math.nan
    return float((ranks[labels > 0].sum() - positive * (positive + 1) / 2) / (positive * negative))


def evaluate(model: WideAndDeep, table: Table, device: torch.device, records: int) -> dict[str, float]:
    """Accuracy, AUC and loss on the first records of a table."""
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
    return {
        "accuracy": float(((logits > 0) == (labels > 0)).float().mean()),
        "auc": auc(logits.numpy(), labels.numpy()),
        "eval_loss": float(F.binary_cross_entropy_with_logits(logits, labels)),
    }


class Served(nn.Module):
    """The network as it is served: a tensor [n] for each column, answers as the older guides' census model gave."""

    def __init__(self, model: WideAndDeep) -> None:
        super().__init__()
        self.model = model

    def forward(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """The columns of NUMBERS, then those of CATEGORIES → class ids, logistic, logits, probabilities."""
        numbers = torch.stack(columns[: len(NUMBERS)], 1)
        logits = self.model(numbers, torch.stack(columns[len(NUMBERS) :], 1))[:, None]
        logistic = logits.sigmoid()
        return (logits > 0).long(), logistic, logits, torch.cat([1 - logistic, logistic], 1)


def contract(categories: Sequence[Category], metrics: dict[str, float], origin: dict[str, object]) -> Contract:
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
    """A record as a JSON instance."""
    return {name: float(record[name]) for name in NUMBERS} | {name: record[name] for name in CATEGORIES}


def published(name: str) -> list[str]:
    """The published file, fetched where it is not here yet."""
    from headcount.data import DataError, fetch

    try:
        return [str(fetch(name))]
    except DataError as error:
        raise common.UsageError(str(error)) from None


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="census", description=__doc__.partition("\n")[0])
    common.add_arguments(parser, checkpoint_every=500)
    parser.add_argument("--train-files", nargs="+", metavar="FILE", help="records (the published adult.data)")
    parser.add_argument("--eval-files", nargs="+", metavar="FILE", help="records (the published adult.test)")
    parser.add_argument("--train-steps", type=common.whole, default=2000, help="batches to train (%(default)s)")
    parser.add_argument("--eval-steps", type=common.whole, help="batches to evaluate (all records)")
    parser.add_argument("--eval-every", type=common.whole, default=500, help="steps between evaluations (%(default)s)")
    parser.add_argument("--train-batch-size", type=common.whole, default=256, help="records a step (%(default)s)")
    parser.add_argument("--eval-batch-size", type=common.whole, default=100, help="records a step (%(default)s)")
    parser.add_argument("--learning-rate", type=common.positive, default=0.005, help="at its peak (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=2e-4, help="rare crossings need it (%(default)s)")
    parser.add_argument("--embedding-size", type=common.whole, default=8, help="of a category (%(default)s)")
    parser.add_argument("--hidden", type=common.whole, nargs="+", default=[100, 50], help="units of the deep layers")
    parser.add_argument("--dropout", type=common.fraction, default=0.1, help="in the deep layers (%(default)s)")
    return common.parse(parser, argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    with common.run_of(arguments) as run:
        train(arguments, run)


def train(arguments: argparse.Namespace, run: common.Run) -> None:
    bad = common.BadRecords(arguments.on_bad_record)
    records = read_records(arguments.train_files or published("adult.data"), bad)
    eval_records = read_records(arguments.eval_files or published("adult.test"), bad)
    bad.close(run)
    if len(records) < 2 or not eval_records:
        raise common.UsageError("there are no records to train with, or none to evaluate with")
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
        run.say(
            f"accuracy {metrics['accuracy']:.4f}, AUC {metrics['auc']:.4f} on {min(evaluated, len(eval_table))} "
            f"records; {bad.count} skipped; the model is in {run.folders.model}",
            {**metrics, "skipped": bad.count, "model": str(run.folders.model)},
        )


if __name__ == "__main__":
    common.command(main)
