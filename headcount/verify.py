"""Proof of a release: labelled pictures through the endpoint, and each version's count error and latency.

Vertex AI does not let a caller choose a deployed model behind a traffic split. Its answer names the model that gave it,
so that pictures are asked again until each version has counted them, or the requests are used up.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from headcount.counters import CountError
from headcount.data import labelled_people
from headcount.releases import Serving
from headcount.results import printable

LEAST: Final = 10  # pictures that a version must have counted before its error says something
SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif")


class VerifyError(Exception):
    """A release cannot be proved; the message says how to repair it."""


@dataclass(frozen=True)
class Labelled:
    """A picture and the number of people that its label gives it."""

    path: Path
    people: int


@dataclass(frozen=True)
class Asked:
    """One request. model: id of the deployed model that answered, "" where none did. count: None for a failure."""

    picture: str
    people: int
    model: str
    count: int | None
    seconds: float


@dataclass(frozen=True)
class Judged:
    """One version's answers. pictures: that it counted; error: mean absolute count error, people a picture; bias: mean
    difference to the labels. p50, p95: seconds of an answer. None where it gave no answer.
    """

    release: str
    version: str
    traffic: int
    answers: int
    pictures: int
    error: float | None = None
    bias: float | None = None
    p50: float | None = None
    p95: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The proof. result: good, measured (nothing to compare with), worse, too high, or too few answers.

    error, baseline: of both on the same pictures.
    release: the one that is proved; against: the one that serves most, "" where it is the same. failed: requests.
    """

    stack: str
    release: str
    against: str
    result: str
    why: str
    error: float | None
    baseline: float | None
    pictures: int
    requests: int
    failed: int
    versions: tuple[Judged, ...]

    @property
    def exit_code(self) -> int:
        return {"good": 0, "measured": 0, "worse": 2, "too high": 2}.get(self.result, 1)


# --- asking -------------------------------------------------------------------------------------------------


def ask(
    pictures: Sequence[Labelled],
    models: Iterable[str],
    once: Callable[[Labelled], Asked],
    most: int,
    say: Callable[[int], None] = lambda _: None,
) -> list[Asked]:
    """Asks for each picture until each of the deployed models has counted it, at most `most` times in all.

    The rounds go over all pictures, so that the answers of a version with little traffic are spread over them.
    """
    missing = {picture.path: set(models) for picture in pictures}
    answers: list[Asked] = []
    failures = 0
    while any(missing.values()):
        for picture in pictures:
            if not missing[picture.path]:
                continue
            if len(answers) >= most:
                return answers
            answer = once(picture)
            answers.append(answer)
            say(len(answers))
            missing[picture.path].discard(answer.model)
            failures = failures + 1 if answer.count is None else 0
            if failures >= LEAST:  # the endpoint does not answer at all
                return answers
    return answers


# --- judging ------------------------------------------------------------------------------------------------


def chosen(found: Sequence[Serving], release: str) -> Serving:
    """The release to prove: the named one, else the one with least traffic, that has some. Raises VerifyError."""
    if release:
        named = next((one for one in found if one.release == release), None)
        if named is None:
            raise VerifyError(f"Release {release} is not deployed; there are: {_names(found)}.")
        if not named.traffic:
            raise VerifyError(
                f"Release {release} has no traffic, and Vertex AI gives requests to none without. Give it some: "
                f"`headcount release -s STACK canary {release} 5 --image …`, then `pulumi up`."
            )
        return named
    serving = [one for one in found if one.traffic]
    if not serving:
        raise VerifyError("No release has traffic: run `pulumi up` first.")
    return min(serving, key=lambda one: one.traffic)


def _names(found: Sequence[Serving]) -> str:
    return ", ".join(one.release for one in found) or "none"


def judge(
    stack: str,
    found: Sequence[Serving],
    release: str,
    answers: Sequence[Asked],
    *,
    tolerance: float,
    highest: float | None,
) -> Verdict:
    """The verdict about a release. tolerance: people a picture that its error may be above that of the version with
    most traffic, on the pictures that both counted. highest: error above which it fails in any case.
    """
    candidate = chosen(found, release)
    leader = max((one for one in found if one.traffic), key=lambda one: one.traffic)
    versions = tuple(_judged(one, answers) for one in found)
    mine, theirs = _counts(candidate.id, answers), _counts(leader.id, answers)
    both = sorted(mine.keys() & theirs.keys())
    enough = min(LEAST, len({answer.picture for answer in answers}))
    error = _error([mine[name] for name in both])
    baseline = _error([theirs[name] for name in both]) if leader != candidate else None
    result, why = "good", ""
    if len(mine) < enough or len(both) < enough or error is None:
        result = "too few answers"
        why = f"{candidate.release} counted {len(mine)} pictures, and {len(both)} of those that {leader.release} did"
        why += f"; {enough} are needed: give more --requests, or the release more traffic"
    elif highest is not None and error > highest:
        result, why = "too high", f"its count error is {error:.3f}, above {highest:g}"
    elif baseline is not None and error > baseline + tolerance:
        result, why = "worse", f"its count error is {error:.3f}, that of {leader.release} {baseline:.3f}"
    elif leader == candidate and highest is None:
        result, why = "measured", "no other release has traffic to compare it with, and --fail-above gives no limit"
    against = "" if leader == candidate else leader.release
    failed = sum(answer.count is None for answer in answers)
    return Verdict(
        stack, candidate.release, against, result, why, error, baseline, len(both), len(answers), failed, versions
    )  # fmt: skip


def _counts(model: str, answers: Iterable[Asked]) -> dict[str, tuple[int, int]]:
    """(count, people) of a version's first answer for each picture: a version counts a picture always alike."""
    found: dict[str, tuple[int, int]] = {}
    for answer in answers:
        if answer.model == model and answer.count is not None:
            found.setdefault(answer.picture, (answer.count, answer.people))
    return found


def _error(counts: Sequence[tuple[int, int]]) -> float | None:
    return statistics.fmean(abs(count - people) for count, people in counts) if counts else None


def _judged(one: Serving, answers: Sequence[Asked]) -> Judged:
    counts = list(_counts(one.id, answers).values())
    seconds = sorted(answer.seconds for answer in answers if answer.model == one.id and answer.count is not None)
    found = Judged(one.release, one.version, one.traffic, len(seconds), len(counts))
    if not counts:
        return found
    bias = statistics.fmean(count - people for count, people in counts)
    p50, p95 = percentile(seconds, 50), percentile(seconds, 95)
    return replace(found, error=_error(counts), bias=bias, p50=p50, p95=p95)


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile of ordered values."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


# --- labels -------------------------------------------------------------------------------------------------


def labelled(names: Sequence[str], labels: Path | None) -> list[Labelled]:
    """The pictures of files and folders, with their labels: from a file of NAME=COUNT lines, or YOLO's label files.

    YOLO's has a line for each object, beginning with its class, 0 for a person. It has the picture's name with .txt,
    beside the picture or in a folder labels/ beside the picture's. Raises VerifyError.
    """
    paths = [path for name in names for path in _pictures(Path(name))]
    counts = _counted(labels) if labels else {}
    found = []
    for path in paths:
        people = counts.get(path.name) if labels else _yolo(path)
        if people is None:
            where = (
                f"{labels} has no line {path.name}=COUNT" if labels else f"there is no {path.stem}.txt with its label"
            )
            raise VerifyError(f"{printable(str(path))} has no label: {where}.")
        found.append(Labelled(path, people))
    return found


def coco(folder: str) -> list[Labelled]:
    """The pictures of coco128. One without a label file shows nothing that COCO labels, and so nobody."""
    return [Labelled(path, labelled_people(path)) for path in _pictures(Path(folder))]


def _pictures(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES)
        if not found:
            raise VerifyError(f"There is no picture in {path}.")
        return found
    if not path.is_file():
        raise VerifyError(f"There is no picture {path}.")
    return [path]


def _counted(labels: Path) -> dict[str, int]:
    try:
        lines = labels.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VerifyError(f"{labels} cannot be read: {error}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"\s*(.+?)\s*[=,]\s*(\d+)\s*", line)
        if not match:
            raise VerifyError(f"{labels}, line {number}: {line!r} is not NAME=COUNT.")
        found[Path(match[1]).name] = int(match[2])
    return found


def _yolo(picture: Path) -> int | None:
    for label in (picture.with_suffix(".txt"), picture.parent.parent / "labels" / f"{picture.stem}.txt"):
        if label.is_file():
            return sum(line.split()[:1] == ["0"] for line in label.read_text().splitlines())
    return None


def spread(pictures: Sequence[Labelled], most: int) -> list[Labelled]:
    """At most so many of the pictures, spread evenly over them."""
    count = min(most, len(pictures))
    return [pictures[index * len(pictures) // count] for index in range(count)]


# --- the report ---------------------------------------------------------------------------------------------


def text(verdict: Verdict) -> str:
    rows = [("RELEASE", "VERSION", "TRAFFIC", "ANSWERS", "PICTURES", "ERROR", "BIAS", "P50", "P95")]
    rows += [
        (one.release, one.version, f"{one.traffic} %", str(one.answers), str(one.pictures), _number(one.error),
         _number(one.bias, "+.3f"), _number(one.p50, ".3f", " s"), _number(one.p95, ".3f", " s"))
        for one in verdict.versions
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if any(not one.traffic for one in verdict.versions):
        lines.append("Releases without traffic cannot be asked.")
    if verdict.failed:
        lines.append(f"{verdict.failed} of {verdict.requests} requests were not answered.")
    if verdict.against and verdict.error is not None:
        lines.append(
            f"On {verdict.pictures} pictures that both counted: {verdict.release} {verdict.error:.3f}, "
            f"{verdict.against} {_number(verdict.baseline)} people a picture off."
        )
    says = {"good": "is good", "measured": "was measured", "worse": "is worse", "too high": "is not good enough"}.get(
        verdict.result, "is not proved"
    )
    lines.append(f"{verdict.release} {says}{': ' + verdict.why if verdict.why else ''}.")
    return "".join(f"{line}\n" for line in lines)


def _number(value: float | None, form: str = ".3f", unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def json_text(verdict: Verdict) -> str:
    return json.dumps(asdict(verdict), indent=2) + "\n"


def once_with(count: Callable[[bytes], tuple[int, str]], clock: Callable[[], float]) -> Callable[[Labelled], Asked]:
    """Asks for one picture. count: the count and the deployed model of an answer; it raises CountError."""

    def once(picture: Labelled) -> Asked:
        data, start = picture.path.read_bytes(), clock()
        try:
            people, model = count(data)
        except CountError:
            return Asked(str(picture.path), picture.people, "", None, clock() - start)
        return Asked(str(picture.path), picture.people, model, people, clock() - start)

    return once
