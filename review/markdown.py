"""A review as the Markdown of a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from . import words
from .summary import Changed, Review
from .words import Table, cut, one_line, plain

# "body is too long (maximum is 65536 characters)", as GitHub answers; GitLab takes 1,000,000.
LONGEST: Final = 65_536
LONGEST_VALUE: Final = 400
LONGEST_MESSAGE: Final = 2_000
MOST_LINES: Final = 50  # of a list or table, so that none leaves no room for the others
_RESERVE: Final = 400  # for the sentence that says what was left out


def marker(stack: str) -> str:
    """The hidden line by which the comment of a stack is found again."""
    return f"<!-- headcount review: {stack} -->"


def render(found: Review, longest: int = LONGEST) -> str:
    """The review in at most `longest` characters. What does not fit is left out, property diffs first."""
    if not found.exit_code and not found.policies and not found.warnings:
        return f"{marker(found.stack)}**{found.stack}**: no change.\n"
    head = [f"{marker(found.stack)}", f"### {found.stack}: {found.headline}", ""]
    text = "\n".join(
        [
            *head,
            *_findings(found),
            *_traffic(found),
            *_cost(found),
            *_verified(found),
            *_notes(found),
            *_resources(found),
        ]
    )
    text = re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"
    if len(text) > longest:
        said = f"\n\nThe rest is left out, because a comment may have {longest:,} characters.\n"
        return text[: longest - len(said)].rpartition("\n")[0] + said
    return text + _differences(found, longest - len(text))


def _findings(found: Review) -> list[str]:
    lines: list[str] = []
    if found.errors:
        lines += ["> [!CAUTION]", "> **The preview fails**", ""]
        lines += [_fenced(text) for text in words.errors(found)]
        lines += ["", words.remedy(found), ""]
    if found.dangers:
        lines.append("> [!CAUTION]")
        for rule, texts in words.by_rule(found.dangers):
            lines += [
                f"> **Dangerous: {rule.brief}.** {rule.why}",
                ">",
                *(f"> - {text}" for text in texts[:MOST_LINES]),
            ]
            lines += [*_more(len(texts), "> - "), ">"]
        lines[-1] = ""
    if found.policies:
        listed = [f"- {_prose(words.policy_line(policy))}" for policy in found.policies[:MOST_LINES]]
        lines += ["**Policies**", "", *listed, *_more(len(found.policies), "- "), ""]
    return lines


def _traffic(found: Review) -> list[str]:
    if not found.traffic.before and not found.traffic.after:
        return []
    if stays := words.traffic_stays(found):
        return [stays, ""]
    lines = ["**Traffic**", "", *_table(words.traffic_table(found)), ""]
    if steps := found.traffic.steps:
        lines += [f"{words.steps_title(found)}:", ""]
        lines += [f"{number}. {one_line(step)}" for number, step in enumerate(steps[:MOST_LINES], 1)]
        lines += [*_more(len(steps), ""), ""]
    return lines


def _cost(found: Review) -> list[str]:
    if not found.traffic.before and not found.traffic.after and not (found.jobs or found.runs):
        return []
    bound = " ".join(words.cost_bound(found))
    if (stays := words.cost_stays(found)) and not (found.jobs or found.runs):
        return [f"{stays} {bound}".rstrip(), ""]
    said = [stays] if stays else _table(words.cost_table(found))
    remarks = " ".join([*words.cost_bound(found), *words.cost_remarks(found)])
    return ["**Cost of the machines**", "", *said, "", remarks, ""]


def _verified(found: Review) -> list[str]:
    return ["**Verified**", "", found.verified, ""] if found.verified else []


def _notes(found: Review) -> list[str]:
    notes = [finding.text for finding in found.notes]
    for message in found.warnings:
        who = f"`{plain(message.resource)}`: " if message.resource else ""
        notes.append(who + _prose(cut(one_line(message.text), LONGEST_MESSAGE)))
    if not notes:
        return []
    return ["**Worth knowing**", "", *(f"- {note}" for note in notes[:MOST_LINES]), *_more(len(notes), "- "), ""]


def _resources(found: Review) -> list[str]:
    if not found.resources:
        return []
    heads, rows = words.resource_table(found)
    table = _table((heads, rows[:MOST_LINES]))
    return ["**Resources**", "", *table, "", *_more(len(rows), ""), ""]


def _differences(found: Review, room: int) -> str:
    """The folded property diffs, as many resources as there is room for."""
    shown = [one for one in found.resources if one.differences]
    if not shown:
        return ""
    head = f"\n<details>\n<summary>Property diffs of {len(shown)} resource{'s' if len(shown) > 1 else ''}</summary>\n\n"
    foot = "</details>\n"
    room -= len(head) + len(foot) + _RESERVE
    blocks: list[str] = []
    for one in shown:
        block = _difference(one)
        if len(block) > room:
            break
        blocks.append(block)
        room -= len(block)
    left = shown[len(blocks) :]
    said = ""
    if left:
        count = sum(len(one.differences) for one in left)
        said = (
            f"The diffs of {len(left)} more resources with {count} properties are left out, because a comment may have "
            f"{LONGEST:,} characters. `headcount review {found.stack} --html FILE` has them all.\n"
        )
    return head + "".join(blocks) + said + foot


def _difference(one: Changed) -> str:
    lines = []
    for difference in one.differences:
        reason = "  # the reason of the replacement" if difference.replaces else ""
        if difference.old is not None:
            lines.append(f"- {difference.path}: {cut(one_line(difference.old), LONGEST_VALUE)}{reason}")
        if difference.new is not None:
            lines.append(f"+ {difference.path}: {cut(one_line(difference.new), LONGEST_VALUE)}")
    return f"{one.kind} `{plain(one.name)}`, {words.DONE[one.operation]}\n\n{_fenced(*lines, language='diff')}\n\n"


def _fenced(*lines: str, language: str = "") -> str:
    """A code block, whose fence is longer than any in the lines."""
    text = "\n".join(lines) if language else cut("\n".join(lines), LONGEST_MESSAGE)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _prose(text: str) -> str:
    """The words of others, without what Markdown would read as HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _table(table: Table) -> list[str]:
    heads, rows = table
    line = ["--:" if head in ("traffic now", "after", "now") else "---" for head in heads]

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [row(heads), f"|{'|'.join(line)}|", *map(row, rows)]


def _more(count: int, bullet: str) -> list[str]:
    return [f"{bullet}and {count - MOST_LINES} more"] if count > MOST_LINES else []
