"""Counts and costs of several weights, each with several details, and of Cloud Vision, on the same pictures."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from headcount.data import labelled_people, people_of
from headcount.results import printable
from review.prices import COMPUTE, PREDICTION, VISION, Prices, cost_per_thousand

WEIGHTS: Final = ("yolov5n", "yolov5s", "yolov5m")
DETAILS: Final = ("fast", "auto", "full")
MACHINE: Final = "c3-highcpu-4"  # the default of the stacks, infra/settings.py
REGION: Final = "europe-west4"
CORES: Final = 2  # of that machine, whose four vCPUs are threads of two cores
CLOUD_VISION: Final = "Cloud Vision"
SAME: Final = 1.1  # prices whose ratio is below it are the same, because the CPU time of a picture varies
WORTH: Final = 0.05  # people a picture: a smaller difference of errors is worth no money


class CompareError(Exception):
    """Nothing can be compared; the message says how to repair it."""


@dataclass(frozen=True)
class Counted:
    """One way of counting on all pictures.

    model: weights, or CLOUD_VISION. detail: how closely it looks, "" for Cloud Vision. counts: people by picture,
    without those that it failed on. seconds: CPU time of a core for a picture, None for Cloud Vision. looks: of the
    network at a picture, on average.
    """

    model: str
    detail: str
    counts: Mapping[str, int]
    seconds: float | None = None
    looks: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.model} {self.detail}".rstrip()


@dataclass(frozen=True)
class Hour:
    """The price of a machine's hour in USD, and its origin in words."""

    usd: float
    origin: str


@dataclass(frozen=True)
class Outcome:
    """The result of one way of counting. rate: pictures a second of the machine. usd: for 1,000 pictures.

    error: mean absolute difference to the labels, bias: mean difference, in people a picture; None without labels.
    """

    name: str
    model: str
    detail: str
    people: int
    looks: float
    rate: float | None
    usd: float
    error: float | None = None
    bias: float | None = None


def labels_of(pictures: Sequence[str], labels: Path | None) -> dict[str, int]:
    """The number of people in each picture that has a label; none at all where there are no labels.

    labels: a folder of YOLO's text files, in which a picture without a file shows nobody, or a CSV file with the
    picture's name and the number of people in its first columns. None: the folder `labels` beside that of the
    pictures, if there is one. Raises CompareError.
    """
    paths = [Path(name) for name in pictures]
    if labels is None:
        beside = {path.parent.parent / "labels" for path in paths}
        return {str(p): labelled_people(p) for p in paths} if all(one.is_dir() for one in beside) else {}
    if labels.is_dir():
        found = {str(path): labels / f"{path.stem}.txt" for path in paths}
        if not any(file.is_file() for file in found.values()):
            raise CompareError(f"{labels} has no label of these pictures, such as {paths[0].stem}.txt.")
        return {name: people_of(file) for name, file in found.items()}
    by_name = _csv_labels(labels)
    known = {str(path): by_name[path.name] for path in paths if path.name in by_name}
    if not known:
        raise CompareError(f"{labels} has no line for any of these pictures, such as {paths[0].name},3.")
    return known


def _csv_labels(labels: Path) -> dict[str, int]:
    found = {}
    try:
        with labels.open(newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not row or row[0].startswith("#"):
                    continue
                if len(row) < 2 or not row[1].strip().isdigit():
                    if number == 1:
                        continue  # the columns' names
                    raise CompareError(f"{labels}, line {number}: {','.join(row)!r} is not PICTURE,PEOPLE.")
                found[Path(row[0].strip()).name] = int(row[1])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CompareError(f"{labels} cannot be read: {error}") from None
    return found


# --- prices ---------------------------------------------------------------------------------------------------


def hour(prices: Prices, machine: str, region: str, own: float | None = None) -> Hour:
    """The price of a machine's hour: the user's own, Vertex AI's, or else Compute Engine's, which is lower.

    Raises CompareError where none is known.
    """
    if own is not None:
        return Hour(own, f"{own:g} USD an hour (--node-hour)")
    for service, name in ((PREDICTION, "Vertex AI"), (COMPUTE, "Compute Engine, which asks less than Vertex AI")):
        if parts := prices.machine_parts(service, machine, region):
            usd = sum((price.usd or 0) * quantity for price, quantity in parts)
            return Hour(usd, f"{usd:.6g} USD an hour ({name}, {region}, {parts[0][0].day}, {parts[0][0].source})")
    raise CompareError(f"The price of {machine} in {region} is not on record: give it with --node-hour USD.")


def vision_price(prices: Prices) -> tuple[float, str]:
    """USD for a picture of Cloud Vision's object localisation, and its source."""
    price = prices.find(VISION, "OBJECT_LOCALIZATION", REGION)
    if price is None or price.usd is None:
        raise CompareError("The price of Cloud Vision is not on record.")
    return price.usd, price.source


# --- judging --------------------------------------------------------------------------------------------------


def common(counted: Sequence[Counted]) -> list[str]:
    """The pictures that all of them counted, which alone are compared."""
    first, *others = counted
    return [name for name in first.counts if all(name in other.counts for other in others)]


def judged(counted: Sequence[Counted], labels: Mapping[str, int], of: Hour, vision: float) -> list[Outcome]:
    """The outcome of each on the pictures that all of them counted. vision: USD for a picture of Cloud Vision."""
    pictures = common(counted)
    labelled = [name for name in pictures if name in labels]
    found = []
    for one in counted:
        rate = None if one.seconds is None else CORES / one.seconds
        differences = [one.counts[name] - labels[name] for name in labelled]
        found.append(
            Outcome(
                one.name,
                one.model,
                one.detail,
                sum(one.counts[name] for name in pictures),
                one.looks,
                rate,
                vision * 1000 if rate is None else cost_per_thousand(of.usd, rate),
                statistics.fmean(map(abs, differences)) if labelled else None,
                statistics.fmean(differences) if labelled else None,
            )
        )
    return found


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Which is worth its price, in a sentence."""
    cheapest = _cheapest(outcomes)
    errors = {one.name: one.error for one in outcomes if one.error is not None}
    if not errors:
        most = max(outcomes, key=lambda one: (one.people, -one.usd))
        if most is cheapest or most.people == cheapest.people:
            return f"{cheapest.name} is worth its price: it is the cheapest, and none finds more people."
        return (
            f"Without labels nobody knows which count is right: {cheapest.name} is the cheapest, and {most.name} finds "
            f"{_more_people(most.people, cheapest.people)} for {_times(most.usd, cheapest.usd)} the price."
        )
    least = min(errors.values())
    best = _cheapest([one for one in outcomes if errors[one.name] == least])
    chosen = _cheapest([one for one in outcomes if errors[one.name] <= least + WORTH])
    error = errors[chosen.name]
    said = f"{chosen.name} is worth its price: {error:.3f} people a picture off for {_usd(chosen.usd)} USD"
    if chosen is not best:
        said += f"; {best.name} is {error - least:.3f} people better for {_times(best.usd, chosen.usd)} the price"
    elif chosen is not cheapest:
        better = f"{errors[cheapest.name] - error:.3f} people better than {cheapest.name}"
        said += f", {better} for {_times(chosen.usd, cheapest.usd)} the price"
    else:
        said += ", and none is better or cheaper"
    return f"{said}."


def _cheapest(outcomes: Sequence[Outcome]) -> Outcome:
    """The cheapest; of those whose prices differ by no more than the measurement, the one that looks least."""
    usd = min(one.usd for one in outcomes)
    return min(
        (one for one in outcomes if one.usd <= SAME * usd),
        key=lambda one: (one.looks, one.error or 0, DETAILS.index(one.detail) if one.detail else 0),
    )


def _more_people(one: int, other: int) -> str:
    return f"{(one / other - 1) * 100:.0f} % more people" if other else f"{one} people instead of none"


def _times(one: float, other: float) -> str:
    return f"{one / other:.1f} times"


def _usd(usd: float) -> str:
    return f"{usd:.4f}" if usd < 1 else f"{usd:.2f}"


# --- the table, and the plot ----------------------------------------------------------------------------------


def table_text(outcomes: Sequence[Outcome]) -> str:
    """A table, the cheapest first."""
    rows = [("COUNTED BY", "PEOPLE", "ERROR", "BIAS", "LOOKS", "PICTURES/S", "USD/1000")]
    rows += [
        (
            printable(one.name), str(one.people), _number(one.error, ".3f"), _number(one.bias, "+.3f"),
            "-" if one.rate is None else f"{one.looks:.1f}", _number(one.rate, ".1f"), _usd(one.usd),
        )
        for one in sorted(outcomes, key=lambda one: one.usd)
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) + "\n"
        for row in rows
    )


def counted_pictures(number: int) -> str:
    return f"{number} picture{'' if number == 1 else 's'}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def json_text(outcomes: Sequence[Outcome], said: str, facts: Mapping[str, Any]) -> str:
    return json.dumps({**facts, "outcomes": [asdict(one) for one in outcomes], "verdict": said}, indent=1) + "\n"


def write_tables(
    folder: Path, outcomes: Sequence[Outcome], counted: Sequence[Counted], labels: Mapping[str, int]
) -> None:
    """Writes compare.csv, a line for each outcome, and counts.csv, a line for each picture."""
    with (folder / "compare.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(outcomes[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(one) for one in outcomes)
    with (folder / "counts.csv").open("w", newline="", errors="surrogateescape") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file", "label", *(one.name for one in counted)])
        for name in dict.fromkeys(name for one in counted for name in one.counts):
            rows.writerow([name, labels.get(name, ""), *(one.counts.get(name, "") for one in counted)])


# Colours that people tell apart, also those who see no red or no green: https://jfly.uni-koeln.de/color/
COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
MARKERS: Final = {"fast": "o", "auto": "s", "full": "^", "": "D"}


def plot(file: Path, outcomes: Sequence[Outcome], pictures: int, machine: str) -> None:
    """Draws the cost against the error, or against the people found where there are no labels.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure  # not pyplot, which wants a display
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    labelled = all(one.error is not None for one in outcomes)

    def height(one: Outcome) -> float:
        return (one.error or 0.0) if labelled else one.people

    highest = max(*map(height, outcomes), 0.01)
    for number, model in enumerate(dict.fromkeys(one.model for one in outcomes)):
        own = sorted((one for one in outcomes if one.model == model), key=lambda one: one.looks)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot([one.usd for one in own], [height(one) for one in own], color=colour, linewidth=1, alpha=0.5)
        for one in own:
            axes.plot(one.usd, height(one), MARKERS[one.detail], color=colour, markersize=9, clip_on=False)
        for group in _together(own, height, 0.03 * highest):
            first = group[0]
            said = ", ".join(one.detail or model for one in group)
            axes.annotate(
                said,
                (first.usd, height(first)),
                (0, -18 if number % 2 and height(first) > 0.1 * highest else 9),  # above and below by turns
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.plot([], [], "o", color=colour, label=model)
    axes.set_xscale("log")
    costs = [one.usd for one in outcomes]
    axes.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
    axes.set_ylim(0, highest * 1.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda usd, _: f"{usd:.2g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"USD for 1,000 pictures on a {machine} that is never idle")
    axes.set_ylabel("mean absolute count error, people a picture" if labelled else "people found")
    axes.set_title(f"{counted_pictures(pictures)}; {'lower' if labelled else 'higher'} and further left is better")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=120)


def _together(own: Sequence[Outcome], height: Callable[[Outcome], float], apart: float) -> list[list[Outcome]]:
    """Those whose texts would lie on each other, in groups. apart: the least difference of heights that is seen."""
    groups: list[list[Outcome]] = []
    for one in own:
        for group in groups:
            first = group[0]
            if abs(height(first) - height(one)) < apart and 0.85 < first.usd / one.usd < 1 / 0.85:
                group.append(one)
                break
        else:
            groups.append([one])
    return groups
