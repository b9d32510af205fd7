"""A pipeline job as an HTML page of its own: its graph as a picture, and a table of its tasks. It loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from itertools import pairwise
from typing import Any, Final

from headcount.pipeline_graph import Node, clock, flat, graph, headline, remarks, took

# Sizes in pixels.
LETTER: Final = 7.6  # the mean width of a letter of the names
LINE: Final = 18
PAD: Final = 12
GAP: Final = 26  # between nodes beside each other
LAYER_GAP: Final = 38
DUMMY: Final = 14  # the width that an edge takes where it passes a layer
LONGEST: Final = 36  # letters of a name that are shown
ABREAST: Final = 4  # iterations of a loop

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --box: #f4f5f7; --edge: #8a94a0; --soft: #59636e;
  --succeeded: #1a7f4b; --cached: #0072b2; --running: #b36b00; --failed: #c2320f; --idle: #646e79; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ecf0; --paper: #14181d; --box: #1e242b; --edge: #75808c;
  --soft: #a3adb8; --succeeded: #4cc38a; --cached: #56b4e9; --running: #f0b152; --failed: #ff8a65; --idle: #8b96a2; } }
body { margin: 2rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
.graph { overflow-x: auto; margin: 1.5rem 0; }
svg { display: block; font: 14px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .soft { fill: var(--soft); font-size: 12px; }
svg .edge { fill: none; stroke: var(--edge); stroke-width: 1.5; } svg marker path { fill: var(--edge); }
svg rect { fill: var(--box); stroke: var(--state); stroke-width: 1.5; }
svg .group > rect { fill: none; stroke-dasharray: 5 3; }
svg .bar { fill: var(--state); stroke: none; } svg .state { fill: var(--state); font-size: 12px; font-weight: 600; }
.succeeded { --state: var(--succeeded); } .cached { --state: var(--cached); }
.failed, .cancelled { --state: var(--failed); }
.running, .pending, .cancelling { --state: var(--running); }
.waiting, .not-run, .not-triggered { --state: var(--idle); }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #8884; } td.state { color: var(--state); font-weight: 600; white-space: nowrap; }
pre { margin: .3rem 0; padding: .6rem; background: var(--box); border-left: 4px solid var(--failed);
  overflow-wrap: anywhere;
  white-space: pre-wrap; font: .85em ui-monospace, monospace; }
"""


def render(job: Mapping[str, Any], now: datetime | None = None) -> str:
    """The whole page, in a dark and a light form."""
    now = now or datetime.now(UTC)
    nodes = graph(job)
    title = escape(headline(job, now))
    error = str(job.get("error", {}).get("message", ""))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    body = [
        f"<h1>{escape(str(job.get('displayName') or job.get('name', '')))}</h1>",
        f"<p>{title}</p>",
        f"<pre>{escape(error)}</pre>" if error else "",
        f'<div class="graph">{_svg(nodes, now)}</div>' if nodes else "<p>The job has no tasks.</p>",
        _table(nodes, now),
    ]
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{"".join(body)}\n</body></html>\n'


def _table(nodes: Sequence[Node], now: datetime) -> str:
    rows = []
    for path, node in flat(nodes):
        cells = (clock(node.started), took(node.started, node.ended, now), ", ".join(node.after))
        said = escape(path) + (f"<pre>{escape(node.error)}</pre>" if node.error else "")
        rows.append(
            f'<tr><td>{said}</td><td class="state {_class(node)}">{escape(node.state)}</td>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("Task", "State", "Started (UTC)", "Took", "After"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>" if rows else ""


def _class(node: Node) -> str:
    return node.state.replace(" ", "-")


# --- the layout -----------------------------------------------------------------------------------------------


@dataclass
class Box:
    """A node with its place. x, y: of its upper left corner within the node around it. width, height: pixels.

    edges: the points of each edge between the nodes in it, from an earlier node to a later one.
    """

    width: float
    height: float
    node: Node | None = None
    x: float = 0
    y: float = 0
    inner: list[Box] = field(default_factory=list)
    edges: list[list[tuple[float, float]]] = field(default_factory=list)


def layout(nodes: Sequence[Node]) -> Box:
    """Places nodes in rows by their layers, earlier ones above; returns a box around them, at 0, 0.

    An edge over several layers gets a place of its own in each row that it passes, so that it crosses no node. The
    nodes of a row stand in the order of the mean place of those for which they wait.
    """
    layers = {node.name: node.layer for node in nodes}
    if nodes and all(node.kind == "iteration" for node in nodes):
        layers = {node.name: number // ABREAST for number, node in enumerate(nodes)}
    rows: list[list[tuple[str, ...]]] = [[] for _ in range(max(layers.values(), default=-1) + 1)]
    boxes: dict[tuple[str, ...], Box] = {}
    above: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    chains: list[list[tuple[str, ...]]] = []
    for node in nodes:
        key: tuple[str, ...] = (node.name,)
        boxes[key], above[key] = _sized(node), []
        rows[layers[node.name]].append(key)
        for before in node.after:
            passed = [(before, node.name, str(row)) for row in range(layers[before] + 1, layers[node.name])]
            chain: list[tuple[str, ...]] = [(before,), *passed, key]
            chains.append(chain)
            for dummy in passed:
                boxes[dummy] = Box(DUMMY, 0)
                rows[layers[before] + 1 + passed.index(dummy)].append(dummy)
            for one, next_one in pairwise(chain):
                above.setdefault(next_one, []).append(one)
    widths = [sum(boxes[key].width for key in row) + GAP * (len(row) - 1) for row in rows]
    whole = Box(max(widths, default=0), 0)
    floor: dict[tuple[str, ...], float] = {}  # the end of the row of each
    for row, width in zip(rows, widths, strict=True):
        row.sort(key=lambda key: _mean([boxes[one].x + boxes[one].width / 2 for one in above[key]]))
        x = (whole.width - width) / 2
        tallest = max(boxes[key].height for key in row)
        for key in row:
            box = boxes[key]
            box.x, box.y = x, whole.height
            floor[key] = whole.height + tallest
            if box.node is None:
                box.height = tallest
            x += box.width + GAP
        whole.height += tallest + LAYER_GAP
    whole.height = max(whole.height - LAYER_GAP, 0)
    whole.inner = [box for box in boxes.values() if box.node]
    for chain in chains:
        points: list[tuple[float, float]] = []
        for key in chain[:-1]:  # straight down to the end of the row, because those beside may be taller
            middle = boxes[key].x + boxes[key].width / 2
            points += [(middle, boxes[key].y)] if boxes[key].node is None else []
            points += [(middle, boxes[key].y + boxes[key].height), (middle, floor[key])]
        points.append((boxes[chain[-1]].x + boxes[chain[-1]].width / 2, boxes[chain[-1]].y))
        whole.edges.append(points)
    return whole


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _sized(node: Node) -> Box:
    lines = _lines(node)
    width = max(120.0, *(len(line) * LETTER for line in lines)) + 2 * PAD
    height = LINE * len(lines) + PAD
    if not node.nodes:
        return Box(width, height, node)
    inside = layout(node.nodes)
    width = max(width, inside.width + 2 * PAD)
    for box in inside.inner:
        box.x += (width - inside.width) / 2
        box.y += height + PAD
    shift = (width - inside.width) / 2
    edges = [[(x + shift, y + height + PAD) for x, y in points] for points in inside.edges]
    return Box(width, height + inside.height + 2 * PAD, node, inner=inside.inner, edges=edges)


def _lines(node: Node) -> list[str]:
    return [*map(_short, [node.name, *remarks(node)]), node.state + " " * 12]  # and the time that it took


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _svg(nodes: Sequence[Node], now: datetime) -> str:
    whole = layout(nodes)
    width, height = whole.width + 2, whole.height + 2
    drawn = "".join(_drawn(box, now) for box in whole.inner)
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>'
    )
    return (
        f'<svg role="img" aria-label="The graph of the tasks, which the table below lists" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="-1 -1 {width:.0f} {height:.0f}">{arrow}{_edges(whole)}{drawn}</svg>'
    )


def _edges(box: Box) -> str:
    return "".join(f'<path class="edge" marker-end="url(#arrow)" d="{_curve(points)}"/>' for points in box.edges)


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """A path that leaves and reaches each point upright."""
    x, y = points[0]
    parts = [f"M{x:.1f} {y:.1f}"]
    for (x1, y1), (x2, y2) in pairwise(points):
        middle = (y1 + y2) / 2
        parts.append(f"C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}")
    return "".join(parts)


def _drawn(box: Box, now: datetime) -> str:
    node = box.node
    assert node is not None
    name, *more, state = _lines(node)
    time = took(node.started, node.ended, now)
    texts = [f'<text x="{PAD}" y="{LINE}">{escape(name)}</text>']
    texts += [f'<text class="soft" x="{PAD}" y="{(2 + i) * LINE}">{escape(line)}</text>' for i, line in enumerate(more)]
    y = LINE * (2 + len(more))
    texts.append(f'<text class="state" x="{PAD}" y="{y}">{escape(state.strip())}</text>')
    if time:
        texts.append(f'<text class="soft" text-anchor="end" x="{box.width - PAD:.1f}" y="{y}">{escape(time)}</text>')
    kind = "group" if box.inner else "task"
    bar = "" if box.inner else f'<rect class="bar" width="4" height="{box.height:.1f}" rx="2"/>'
    full = "\n".join([node.name, *remarks(node), *([node.error] if node.error else [])])
    return (
        f'<g class="{kind} {_class(node)}" transform="translate({box.x:.1f} {box.y:.1f})"><title>{escape(full)}</title>'
        f'<rect width="{box.width:.1f}" height="{box.height:.1f}" rx="6"/>{bar}{"".join(texts)}{_edges(box)}'
        f"{''.join(_drawn(one, now) for one in box.inner)}</g>"
    )
