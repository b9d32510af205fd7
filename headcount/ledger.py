"""The pictures of a batch and what became of each, in one SQLite file, which survives a kill at any moment.

SQLite keeps a transaction whole, syncs it to the disk, and holds a million names outside of the memory.
"""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

COLUMNS: Final = ("picture", "count", "error")
PAGE = 1000  # rows that are in memory together


class BatchError(Exception):
    """A batch cannot go on; the message says how to repair it."""


@dataclass(frozen=True)
class Row:
    """A picture that was dealt with: its count, or the reason why there is none."""

    picture: str
    count: int | None = None
    error: str = ""


@dataclass(frozen=True)
class Totals:
    """pictures: all of them. counted, failed: those that were dealt with. people: in the counted ones."""

    pictures: int
    counted: int
    failed: int
    people: int

    @property
    def left(self) -> int:
        return self.pictures - self.counted - self.failed

    def with_rows(self, rows: Collection[Row]) -> Totals:
        """The totals after so many more rows were recorded, of pictures that were left."""
        counts = [row.count for row in rows if row.count is not None]
        failed = self.failed + len(rows) - len(counts)
        return Totals(self.pictures, self.counted + len(counts), failed, self.people + sum(counts))

    def __str__(self) -> str:
        failed = f", {self.failed:,} not counted" if self.failed else ""
        return f"{self.pictures:,} pictures{failed}, {self.people:,} people"


class Ledger:
    """The pictures of one batch, each once.

    about: what the batch counts and how. A ledger that was begun with something else is refused: raises BatchError.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        try:
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None)
            # Another process that has the file open is told so at once.
            self._db.executescript(
                "PRAGMA locking_mode = EXCLUSIVE; PRAGMA synchronous = FULL; BEGIN EXCLUSIVE;"
                "CREATE TABLE IF NOT EXISTS about (text TEXT NOT NULL);"
                "CREATE TABLE IF NOT EXISTS pictures (name BLOB PRIMARY KEY, stamp TEXT NOT NULL, count INTEGER,"
                " error TEXT) WITHOUT ROWID; COMMIT;"
            )
        except sqlite3.Error as error:
            busy = "locked" in str(error)
            hint = "another run has it open: wait for its end" if busy else f"{error}; remove it to begin anew"
            raise BatchError(f"{path} cannot be used: {hint}.") from None
        before = self._db.execute("SELECT text FROM about").fetchone()
        if before is None:
            with self._db:
                self._db.execute("INSERT INTO about VALUES (?)", (json.dumps(about),))
        elif json.loads(before[0]) != about:
            said = ", ".join(f"{k} {v}" for k, v in json.loads(before[0]).items() if about.get(k) != v)
            self._db.close()
            raise BatchError(f"{path} is of a batch with {said}: repeat the command with that, or remove the file.")

    def add(self, pictures: Iterable[tuple[str, str]]) -> None:
        """Adds pictures with a stamp of their content. One that is there stays as it is if its stamp is the same."""
        rows = ((_key(name), stamp) for name, stamp in pictures)
        self._db.execute("BEGIN")
        with self._db:
            self._db.executemany(
                "INSERT INTO pictures (name, stamp) VALUES (?, ?) ON CONFLICT (name) DO UPDATE"
                " SET stamp = excluded.stamp, count = NULL, error = NULL WHERE stamp != excluded.stamp",
                rows,
            )

    def record(self, rows: Iterable[Row]) -> None:
        """Notes what became of pictures. One that is counted stays counted."""
        changes = ((row.count, row.error or None, _key(row.picture)) for row in rows)
        self._db.execute("BEGIN")
        with self._db:
            self._db.executemany("UPDATE pictures SET count = ?, error = ? WHERE name = ? AND count IS NULL", changes)

    def give_up(self, why: str) -> None:
        """Notes a reason for all pictures that nothing is known of."""
        self._db.execute("UPDATE pictures SET error = ? WHERE count IS NULL AND error IS NULL", (why,))

    def left(self) -> Iterator[str]:
        """The pictures that nothing is known of yet. The ledger may change meanwhile."""
        return (name for name, _, _ in self._pages("AND count IS NULL AND error IS NULL"))

    def totals(self) -> Totals:
        found = self._db.execute("SELECT COUNT(*), COUNT(count), COUNT(error), TOTAL(count) FROM pictures").fetchone()
        return Totals(*map(int, found))

    def write(self, table: IO[str]) -> None:
        """Writes the table as CSV, in the order of the names."""
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, count, error in self._pages(""):
            writer.writerow((name, "" if count is None else count, error or ""))

    def close(self) -> None:
        self._db.close()

    def remove(self) -> None:
        """Closes the ledger and removes its files."""
        self._db.close()
        for path in (self._path, self._path.with_name(self._path.name + "-journal")):
            path.unlink(missing_ok=True)

    def _pages(self, condition: str) -> Iterator[tuple[str, int | None, str | None]]:
        last = b""
        while True:
            query = f"SELECT name, count, error FROM pictures WHERE name > ? {condition} ORDER BY name LIMIT {PAGE}"
            with closing(self._db.execute(query, (last,))) as cursor:
                page = cursor.fetchall()
            yield from ((_name(name), count, error) for name, count, error in page)
            if len(page) < PAGE:
                return
            last = page[-1][0]


def _key(name: str) -> bytes:
    """A file's name need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def _name(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")
