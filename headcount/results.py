"""The output of `headcount count`: results as a table, as JSON, as CSV. Pure: results in, text out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headcount.counters import Answer

CSV_COLUMNS = ("file", "count", "width", "height", "annotated", "error")


@dataclass(frozen=True)
class Result:
    """The result for one picture: an answer, or the reason why there is none. annotated: path of its copy."""

    name: str
    answer: Answer | None = None
    error: str = ""
    annotated: Path | None = None


def csv_header() -> str:
    return _csv(CSV_COLUMNS)


def csv_row(result: Result) -> str:
    answer = result.answer
    numbers = (answer.count, answer.width, answer.height) if answer else ("", "", "")
    return _csv((result.name, *numbers, result.annotated or "", result.error))


def _csv(values: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def json_text(results: Sequence[Result]) -> str:
    """One object, a line for each picture. ASCII, so that file names come through that are no UTF-8."""
    lines = ",\n".join(json.dumps(_as_json(result)) for result in results)
    return f'{{"pictures": [\n{lines}\n], "total": {json.dumps(totals(results))}}}\n'


def _as_json(result: Result) -> dict[str, Any]:
    if result.answer is None:
        return {"file": result.name, "error": {"message": result.error}}
    copy = {"annotated": str(result.annotated)} if result.annotated else {}
    return {"file": result.name, **result.answer.as_json(), **copy}


def totals(results: Sequence[Result]) -> dict[str, int]:
    counts = [result.answer.count for result in results if result.answer]
    return {"pictures": len(results), "failed": len(results) - len(counts), "people": sum(counts)}


def table_text(results: Sequence[Result], terminal: bool) -> str:
    """A table as wide as its names, or on a terminal as the terminal, with long names folded."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if terminal else Console(width=100_000, color_system=None, force_terminal=False)
    table = Table(box=SIMPLE_HEAD if terminal else None, show_footer=True, pad_edge=False)
    total = totals(results)
    failed = f", {total['failed']} not counted" if total["failed"] else ""
    pictures = f"{total['pictures']} picture{'' if total['pictures'] == 1 else 's'}{failed}"
    table.add_column("Picture", pictures, overflow="fold")
    table.add_column("People", str(total["people"]), justify="right", no_wrap=True)
    table.add_column("Confidence", justify="right", no_wrap=True)
    table.add_column("Size", justify="right", no_wrap=True)
    for result in results:
        if result.answer is None:
            table.add_row(Text(printable(result.name)), "-", "", "", style="red")
            continue
        found = [person.confidence for person in result.answer.people]
        spread = "-".join(sorted({f"{c:.2f}" for c in (*found[:1], *found[-1:])}))
        size = f"{result.answer.width}x{result.answer.height}"
        table.add_row(Text(printable(result.name)), str(result.answer.count), spread, size)
    with console.capture() as captured:
        console.print(table)
    return "".join(line.rstrip() + "\n" for line in captured.get().splitlines())


def printable(name: str) -> str:
    """Returns a file name on one line, without characters that move the cursor or cannot be encoded."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
