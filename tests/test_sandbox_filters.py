"""Filters of list methods and of Cloud Logging are read as Google documents them."""

from __future__ import annotations

import pytest

from sandbox.errors import GoogleError
from sandbox.filters import Node, Term, holds, parse


def known(item: dict[str, str], term: Term) -> bool:
    value = item.get(".".join(term.path), "")
    if not term.path:
        return term.value in " ".join(item.values())
    return {"=": value == term.value, "!=": value != term.value, ":": term.value in value, ">=": value >= term.value}[
        term.op
    ]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", ()),
        ('resource.type="ml_job"', (Term(("resource", "type"), "=", "ml_job"),)),
        ("a=1 b!=2", (Term(("a",), "=", "1"), Term(("b",), "!=", "2"))),
        ("a=1\nAND b:*", (Term(("a",), "=", "1"), Term(("b",), ":", "*"))),
        ('labels."ml.googleapis.com/trial_id"="3"', (Term(("labels", "ml.googleapis.com/trial_id"), "=", "3"),)),
        ('a."b.c".d = x', (Term(("a", "b.c", "d"), "=", "x"),)),
        (r'a="say \"yes\""', (Term(("a",), "=", 'say "yes"'),)),
        ('timestamp>="2026-01-01T00:00:00Z"', (Term(("timestamp",), ">=", "2026-01-01T00:00:00Z"),)),
        ("timestamp<2026-01-01T00:00:00.5Z", (Term(("timestamp",), "<", "2026-01-01T00:00:00.5Z"),)),
        ("a=-3", (Term(("a",), "=", "-3"),)),
        ('"two words"', (Term((), ":", "two words"),)),
        ("textPayload=~\"lo+ss\" -- as a comment says", (Term(("textPayload",), "=~", "lo+ss"),)),
        ("-a=1", (Node("not", (Term(("a",), "=", "1"),)),)),
        ("s=(A OR B)", (Node("or", (Term(("s",), "=", "A"), Term(("s",), "=", "B"))),)),
    ],
)  # fmt: skip
def test_a_filter_is_read(text: str, terms: object) -> None:
    assert parse(text) == terms


@pytest.mark.parametrize("text", ["=", "a=", "(a=1", "a=1)", "a=1 OR", "NOT", 'a="open', "a==1", "AND a=1"])
def test_a_filter_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(GoogleError, match="Invalid filter"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("a=1 AND b=9 OR b=2", True),  # OR binds more than AND does
        ("a=9 AND b=9 OR b=2", False),
        ("a=9 AND (b=9 OR b=2)", False),
        ("(a=9 AND b=9) OR b=2", True),
        ("NOT a=9 b=2", True),
        ("NOT (a=1 b=2)", False),
        ("b=(1 OR 2) AND a:1", True),
        ("1 2", True),
    ],
)
def test_its_words_are_joined(text: str, result: bool) -> None:
    assert all(holds(part, {"a": "1", "b": "2"}, known) for part in parse(text)) is result
