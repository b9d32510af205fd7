"""The drawing of a pipeline job, as text and as a page."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pipeline_jobs import failed, job, running, spec, task
from playwright.sync_api import Browser

from headcount.pipeline_graph import Node, as_json, flat, graph, text, took
from headcount.pipeline_page import Box, layout, render

NOW = datetime(2026, 1, 1, 4, tzinfo=UTC)


def states(found: dict[str, Any]) -> dict[str, str]:
    return {path: node.state for path, node in flat(graph(found))}


def test_a_job_is_drawn_with_the_states_of_its_tasks() -> None:
    assert text(failed(), NOW).splitlines() == [
        "digits-weekly-1, failed, started 2026-01-01 03:00:01, 12 min 0 s",
        "error: The DAG failed because some tasks failed.",
        "",
        "TASK            STATE          STARTED   TOOK  AFTER",
        "exit-handler-1  failed         03:02:00  30 s",
        "  download      cached         03:03:00  30 s",
        "  evaluate      succeeded      03:09:00  30 s  download",
        "  for-loop-2    failed         03:04:00  30 s  download        1 of 2 iterations done",
        "    [0]         succeeded      03:06:00  30 s",
        "      train     succeeded      03:06:00  30 s                  2 attempts",
        "    [1]         failed         03:08:00  30 s",
        "      train     failed         03:08:00  30 s",
        "        ! exit code 3",
        "        ! no <memory>",
        "  condition-3   not triggered                  evaluate        \"better\", if evaluate-better == 'yes'",
        "    register    not run",
        "clean-up        succeeded      03:11:00  30 s  exit-handler-1  whatever becomes of it",
    ]


def test_tasks_that_have_not_started_are_drawn() -> None:
    assert states(running()) == {
        "exit-handler-1": "running",
        "exit-handler-1.download": "running",
        "exit-handler-1.evaluate": "waiting",
        "exit-handler-1.for-loop-2": "waiting",
        "exit-handler-1.for-loop-2.train": "waiting",
        "exit-handler-1.condition-3": "waiting",
        "exit-handler-1.condition-3.register": "waiting",
        "clean-up": "waiting",
    }
    assert set(states(job("PENDING")).values()) == {"waiting"}
    assert set(states(job("CANCELLED")).values()) == {"not run"}


def test_iterations_without_details_of_their_own_are_told_apart() -> None:
    found = job(
        "RUNNING",
        task(2, "exit-handler-1", "RUNNING"),
        task(4, "for-loop-2", "RUNNING", 2),
        task(5, "train", "SKIPPED", 4),
        task(6, "train", "RUNNING", 4),
        task(7, "train", "PENDING", 4),
    )
    loop = {path.rpartition("for-loop-2")[2]: state for path, state in states(found).items() if "loop-2" in path}
    assert loop == {
        "": "running",
        "[0]": "cached", "[0].train": "cached",
        "[1]": "running", "[1].train": "running",
        "[2]": "pending", "[2].train": "pending",
    }  # fmt: skip
    assert "1 of 3 iterations done" in text(found, NOW)


def test_a_job_without_its_specification_is_drawn_from_the_details() -> None:
    found = failed()
    del found["pipelineSpec"]
    drawn = states(found)
    assert drawn["digits-weekly-1.exit-handler-1.for-loop-2.for-loop-2-1.train"] == "failed"
    assert len(drawn) == 11


def test_a_text_that_moves_the_cursor_does_not() -> None:
    found = job("FAILED", task(2, "exit-handler-1", "FAILED", error={"message": "\x1b[2Jx"}))
    assert "! \\x1b[2Jx" in text(found, NOW)


def test_json_has_the_graph_and_the_jobs_behind_it() -> None:
    nodes = as_json(graph(failed()))
    json.dumps(nodes)
    loop = nodes[0]["nodes"][2]
    assert (loop["name"], loop["kind"], loop["layer"], loop["after"]) == ("for-loop-2", "loop", 1, ("download",))
    first = loop["nodes"][0]["nodes"][0]
    assert [name.rpartition("/")[2] for name in (*first["failed_jobs"], first["job"])] == ["105", "106"]
    assert "error" not in first


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ("2026-01-01T00:00:59.6Z", "1 min 0 s"),
        ("2026-01-01T00:00:09.123456789Z", "9 s"),
        ("2026-01-01T03:04:05Z", "3 h 4 min"),
        ("", "4 h 0 min"),
        ("2025-12-31T00:00:00Z", "0 s"),  # two clocks
    ],
)
def test_durations_are_words(ended: str, said: str) -> None:
    assert took("2026-01-01T00:00:00Z", ended, NOW) == said


# --- the page


def test_no_box_lies_on_another_and_no_edge_crosses_one() -> None:
    """Also where an edge passes a row of larger boxes: train waits for download alone."""
    nodes = [
        Node("download", layer=0),
        Node("clean", layer=1, after=("download",)),
        Node("group", kind="group", layer=1, after=("download",), nodes=(Node("a"), Node("b", layer=1, after=("a",)))),
        Node("evaluate", layer=2, after=("clean",)),
        Node("train", layer=3, after=("download", "evaluate", "group")),
    ]
    check(layout(nodes))
    iterations = [Node(f"[{number}]", kind="iteration") for number in range(7)]
    assert len({box.y for box in layout(iterations).inner}) == 2
    check(layout(iterations))
    assert layout([]).inner == []


def check(whole: Box) -> None:
    boxes = whole.inner
    for number, one in enumerate(boxes):
        assert one.x >= 0
        assert one.x + one.width <= whole.width
        assert one.y + one.height <= whole.height
        for other in boxes[number + 1 :]:
            apart = one.x + one.width < other.x or other.x + other.width < one.x
            assert apart or one.y + one.height < other.y or other.y + other.height < one.y
    for points in whole.edges:
        for (x, y), (next_x, end) in pairwise(points):
            # Upright pieces pass no box; the curves between them stay between two rows.
            assert x == next_x or not [b for b in boxes if b.y < end - 1 and b.y + b.height > y + 1]
            assert not [b for b in boxes if b.x < x < b.x + b.width and y < b.y + b.height - 1 and end > b.y + 1]
            assert end >= y


def test_the_page_loads_nothing_and_takes_no_text_for_html() -> None:
    found = failed() | {"displayName": "<script>alert(1)</script>"}
    page = render(found, NOW)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "no &lt;memory&gt;" in page
    assert "no <memory>" not in page
    assert not re.search(r"""(src|href)=|url\((?!#)|@import|https?://""", page)
    assert "The job has no tasks" in render({"name": "a/b", "state": "PIPELINE_STATE_PENDING"}, NOW)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_graph_and_the_table(chromium: Browser, tmp_path: Path, scheme: Any) -> None:
    file = tmp_path / "page.html"
    file.write_text(render(failed(), NOW))
    with chromium.new_context(color_scheme=scheme) as context:
        page = context.new_page()
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(file.as_uri())
        assert page.get_by_role("img", name="graph").is_visible()
        assert page.locator("svg g").count() == len(list(flat(graph(failed()))))
        assert page.get_by_role("row").count() == 1 + len(list(flat(graph(failed()))))
        # Each text is inside its box.
        outside = page.evaluate(
            """() => [...document.querySelectorAll('svg g')].filter(g => {
                 const box = g.querySelector('rect').getBoundingClientRect()
                 return [...g.querySelectorAll(':scope > text')].some(t => t.getBoundingClientRect().right > box.right)
               }).length"""
        )
        assert outside == 0
        # Text and paper differ by 4.5, as WCAG asks.
        assert page.evaluate(CONTRAST) >= 4.5
        assert wrong == []


CONTRAST = """() => {
  const light = colour => {
    const parts = colour.match(/[\\d.]+/g).map(v => v / 255)
    const [r, g, b] = parts.map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    return .2126 * r + .7152 * g + .0722 * b }
  const paper = light(getComputedStyle(document.body).backgroundColor)
  return Math.min(...[...document.querySelectorAll('td, th, h1, p, svg text')].map(e => {
    const style = getComputedStyle(e), ink = light(e.closest('svg') ? style.fill : style.color)
    return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05) }))
}"""


def test_the_graph_of_a_circle_ends() -> None:
    """No compiler writes one, but a template is a file that anybody may change."""
    found = spec()
    found["root"]["dag"]["tasks"]["exit-handler-1"]["dependentTasks"] = ["clean-up"]
    assert len(graph({"pipelineSpec": found})) == 2
