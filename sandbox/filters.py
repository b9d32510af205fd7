"""The filters of list methods and of Cloud Logging, which have one grammar.

https://google.aip.dev/160, https://cloud.google.com/logging/docs/view/logging-query-language
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sandbox.errors import invalid

T = TypeVar("T")


@dataclass(frozen=True)
class Term:
    """A comparison, such as `labels."a.b" = "c"`. Without a path it asks for a text anywhere."""

    path: tuple[str, ...]
    op: str
    value: str


@dataclass(frozen=True)
class Node:
    """`kind` is and, or, or not."""

    kind: str
    parts: "tuple[Node | Term, ...]"


_TOKEN = re.compile(
    r"""\s*(?:
        (?P<comment>--[^\n]*)
      | (?P<op>>=|<=|!=|=~|!~|=|<|>|:)
      | (?P<bracket>[()])
      | (?P<string>"(?:[^"\\]|\\.)*")
      | (?P<word>[^\s()"=<>!:~]+)
    )""",
    re.VERBOSE,
)
_WORDS = ("AND", "OR", "NOT")


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, bool]] = []  # kind, text, whether a space is before it
        self.was_string = False  # whether the value that was last read had quotes
        at, text = 0, text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if not match:
                raise self.wrong(text[at:])
            kind = str(match.lastgroup)
            if kind != "comment":
                self.tokens.append((kind, match[kind], match.start(kind) > at))
            at = match.end()

    def wrong(self, at: str) -> Exception:
        return invalid(f'Invalid filter "{self.text}": it can not be read at "{at}".')

    def peek(self) -> tuple[str, str]:
        return self.tokens[0][:2] if self.tokens else ("end", "")

    def take(self) -> str:
        return self.tokens.pop(0)[1]

    def word(self, word: str) -> bool:
        if self.peek() == ("word", word):
            self.take()
            return True
        return False

    def conjunction(self) -> Node | Term:
        parts = [self.disjunction()]
        while self.peek()[0] != "end" and self.peek() != ("bracket", ")"):
            self.word("AND")  # a space between two terms means AND too
            parts.append(self.disjunction())
        return parts[0] if len(parts) == 1 else Node("and", tuple(parts))

    def disjunction(self) -> Node | Term:
        """OR binds more than AND does."""
        parts = [self.negation()]
        while self.word("OR"):
            parts.append(self.negation())
        return parts[0] if len(parts) == 1 else Node("or", tuple(parts))

    def negation(self) -> Node | Term:
        if self.word("NOT"):
            return Node("not", (self.negation(),))
        kind, text = self.peek()
        if kind == "word" and text.startswith("-") and len(text) > 1 and not text[1].isdigit():
            self.tokens[0] = (kind, text[1:], False)
            return Node("not", (self.negation(),))
        if (kind, text) == ("bracket", "("):
            self.take()
            inner = self.conjunction()
            self.close()
            return inner
        return self.term()

    def close(self) -> None:
        if self.peek() != ("bracket", ")"):
            raise self.wrong(self.peek()[1] or "its end")
        self.take()

    def term(self) -> Node | Term:
        name = self.value()
        path = [name.strip(".")] if self.was_string else name.strip(".").split(".")
        # A part of a path in quotes, as in labels."a.b": it follows the dot without a space.
        while not self.was_string and name.endswith(".") and self.peek()[0] == "string" and not self.tokens[0][2]:
            path.append(self.value())
            self.was_string = False
            name = self.take() if self.peek()[0] == "word" and not self.tokens[0][2] else ""
            path += [part for part in name.split(".") if part]
        if self.peek()[0] != "op":
            return Term((), ":", name if len(path) == 1 else ".".join(path))
        op = self.take()
        if self.peek() == ("bracket", "("):
            return self.values(tuple(path), op)
        return Term(tuple(path), op, self.value())

    def values(self, path: tuple[str, ...], op: str) -> Node | Term:
        """`severity = (ERROR OR WARNING)`."""
        self.take()
        parts, kind = [Term(path, op, self.value())], "or"
        while self.peek() != ("bracket", ")"):
            kind = "or" if self.word("OR") else "and"
            self.word("AND")
            parts.append(Term(path, op, self.value()))
        self.close()
        return parts[0] if len(parts) == 1 else Node(kind, tuple(parts))

    def value(self) -> str:
        kind, text = self.peek()
        if kind not in ("word", "string") or (kind == "word" and text in _WORDS):
            raise self.wrong(text or "its end")
        self.take()
        self.was_string = kind == "string"
        if self.was_string:
            return re.sub(r"\\(.)", r"\1", text[1:-1])
        # A time without quotes has colons.
        while re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]*", text) and self.peek() == ("op", ":"):
            text += self.take() + self.take()
        return text


def parse(text: str) -> tuple[Node | Term, ...]:
    """Returns the parts of a filter all of which must hold; none for an empty filter. Raises INVALID_ARGUMENT."""
    parser = _Parser(text)
    if not parser.tokens:
        return ()
    tree = parser.conjunction()
    if parser.tokens:
        raise parser.wrong(parser.peek()[1])
    return tree.parts if isinstance(tree, Node) and tree.kind == "and" else (tree,)


def holds(tree: Node | Term, item: T, compare: Callable[[T, Term], bool]) -> bool:
    """Whether a part of a filter holds for an item, where `compare` judges one comparison."""
    if isinstance(tree, Term):
        return compare(item, tree)
    results = (holds(part, item, compare) for part in tree.parts)
    return any(results) if tree.kind == "or" else all(results) if tree.kind == "and" else not next(results)
