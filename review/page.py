"""A review as an HTML page of its own, with a picture of the rollout's steps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Final

from . import words
from .summary import Review
from .traffic import Frame

# Colours that people tell apart, also those who see no red or no green: https://jfly.uni-koeln.de/color/
COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid #8888; padding: .25rem .6rem; text-align: left; }
code, pre { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: #8882; padding: .6rem; white-space: pre-wrap; }
.danger { border-left: .4rem solid #d55e00; padding: .1rem 1rem; background: #d55e0018; margin: 1rem 0; }
.bar { display: flex; height: 1rem; width: 100%; min-width: 14rem; background: #8882; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
del { background: #d55e0030; text-decoration: none; display: block; }
ins { background: #009e7330; text-decoration: none; display: block; }
"""


def render(found: Review) -> str:
    """The whole page. It loads nothing."""
    title = f"{found.stack}: {found.headline}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        *_dangers(found),
        *_list("Policies", [words.policy_line(policy) for policy in found.policies]),
        *_traffic(found),
        *_cost(found),
        *([f"<h2>Verified</h2><p>{_text(found.verified)}</p>"] if found.verified else []),
        *_list("Worth knowing", [*(f.text for f in found.notes), *(m.text for m in found.warnings)]),
        *_resources(found),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _dangers(found: Review) -> list[str]:
    parts = [f'<div class="danger"><h2>The preview fails</h2><pre>{escape(t)}</pre></div>' for t in words.errors(found)]
    parts += [f"<p>{_text(said)}</p>" for said in [words.remedy(found)] if said]
    for rule, texts in words.by_rule(found.dangers):
        items = "".join(f"<li>{_text(text)}</li>" for text in texts)
        parts.append(
            f'<div class="danger"><h2>Dangerous: {_text(rule.brief)}</h2><p>{_text(rule.why)}</p><ul>{items}</ul></div>'
        )
    return parts


def _traffic(found: Review) -> list[str]:
    if not found.traffic.before and not found.traffic.after:
        return []
    if stays := words.traffic_stays(found):
        return [f"<p>{_text(stays)}</p>"]
    return ["<h2>Traffic</h2>", _table(words.traffic_table(found)), *_picture(found)]


def _picture(found: Review) -> list[str]:
    """A row for each step: the share of each model, as a bar, and the machines that run after it."""
    if found.traffic.logged:
        listed = "".join(f"<li>{escape(step)}</li>" for step in found.traffic.logged)
        return [
            f"<h2>{_text(words.steps_title(found))}</h2>",
            f"<ol>{listed}</ol>",
        ]
    frames = found.traffic.frames
    names = dict.fromkeys(name for frame in frames for name in (*frame.machines, *frame.traffic))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    rows = "".join(_frame(number, frame, colours) for number, frame in enumerate(frames))
    return [
        f"<h2>{_text(words.steps_title(found))}</h2>",
        f"<table><tr><th></th><th>step</th><th>traffic after it</th><th>machines</th></tr>{rows}</table>",
    ]


def _frame(number: int, frame: Frame, colours: dict[str, str]) -> str:
    spans = "".join(
        f'<span style="flex:{share or 0};background:{colours[name]}" title="{escape(name)}"></span>'
        for name, share in frame.traffic.items()
    )
    machines = "<br>".join(
        f'<span class="swatch" style="background:{colours[name]}"></span>{escape(name)}: {escape(count)}'
        for name, count in frame.machines.items()
    )
    said = ", ".join(f"{name} {_share(share)}" for name, share in frame.traffic.items()) or "none"
    bar = f'<div class="bar" aria-hidden="true">{spans}</div>{escape(said)}'
    return f"<tr><td>{number or ''}</td><td>{escape(frame.text) or 'now'}</td><td>{bar}</td><td>{machines}</td></tr>"


def _share(share: int | None) -> str:
    return "?" if share is None else f"{share} %"


def _cost(found: Review) -> list[str]:
    if not found.traffic.before and not found.traffic.after and not (found.jobs or found.runs):
        return []
    stays = words.cost_stays(found)
    said = f"<p>{_text(stays)}</p>" if stays else _table(words.cost_table(found))
    remarks = [*words.cost_bound(found), *words.cost_remarks(found)]
    return ["<h2>Cost of the machines</h2>", said, *(f"<p>{_text(remark)}</p>" for remark in remarks)]


def _resources(found: Review) -> list[str]:
    if not found.resources:
        return []
    parts = ["<h2>Resources</h2>", _table(words.resource_table(found))]
    for one in found.resources:
        lines = []
        for d in one.differences:
            reason = "  # the reason of the replacement" if d.replaces else ""
            lines += [f"<del>- {escape(d.path)}: {escape(d.old)}{reason}</del>"] if d.old is not None else []
            lines += [f"<ins>+ {escape(d.path)}: {escape(d.new)}</ins>"] if d.new is not None else []
        if lines:
            name = f"{escape(one.kind)} <code>{escape(one.name)}</code>, {words.DONE[one.operation]}"
            parts.append(f"<details><summary>{name}</summary><pre>{''.join(lines)}</pre></details>")
    return parts


def _list(title: str, texts: Iterable[str]) -> list[str]:
    items = "".join(f"<li>{_text(text)}</li>" for text in texts)
    return [f"<h2>{title}</h2><ul>{items}</ul>"] if items else []


def _table(table: words.Table) -> str:
    heads, rows = table
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(text: str) -> str:
    """Text as HTML, in which `these` are code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
