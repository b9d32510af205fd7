"""The sandbox's state: JSON documents by kind and resource name, in one SQLite file."""

import builtins
import fcntl
import json
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JSON = dict[str, Any]


class Store:
    """Documents that survive a kill at any point.

    Used from the event loop's thread only, and nothing awaits inside a transaction: so each
    transaction is also atomic towards every other request. A commit is in the write-ahead log before
    the call returns; SIGKILL loses nothing that was answered. (A power cut may lose the last commits:
    synchronous=NORMAL, for speed.)
    """

    def __init__(self, folder: Path) -> None:
        """Opens or creates `folder`. Raises BlockingIOError when another sandbox has it open."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # Held until the process ends, however it ends.
        self._lock = (folder / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._db = sqlite3.connect(folder / "state.sqlite", isolation_level=None)
        self._db.executescript(
            """
            PRAGMA journal_mode = WAL;
            PRAGMA synchronous = NORMAL;
            CREATE TABLE IF NOT EXISTS documents (
                kind TEXT, name TEXT, body TEXT NOT NULL, PRIMARY KEY (kind, name));
            CREATE TABLE IF NOT EXISTS history (seq INTEGER PRIMARY KEY, body TEXT NOT NULL);
            CREATE TABLE IF NOT EXISTS logs (
                seq INTEGER PRIMARY KEY, project TEXT NOT NULL, job TEXT NOT NULL, body TEXT NOT NULL);
            CREATE INDEX IF NOT EXISTS logs_of_job ON logs (project, job);
            """
        )
        with self.transaction():
            identity = self.get("meta", "id") or {"id": uuid.uuid4().hex[:12]}
            self.put("meta", "id", identity)
        #: Marks the containers of this state folder; another folder's are never touched.
        self.id: str = identity["id"]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. Nested use joins the outer transaction."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def get(self, kind: str, name: str) -> JSON | None:
        row = self._db.execute("SELECT body FROM documents WHERE kind = ? AND name = ?", (kind, name)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, kind: str, name: str, body: JSON) -> None:
        self._db.execute("INSERT OR REPLACE INTO documents VALUES (?, ?, ?)", (kind, name, json.dumps(body)))

    def delete(self, kind: str, name: str) -> None:
        self._db.execute("DELETE FROM documents WHERE kind = ? AND name = ?", (kind, name))

    def list(self, kind: str, prefix: str = "") -> list[tuple[str, JSON]]:
        """(name, document) of a kind whose name begins with `prefix`, by name."""
        rows = self._db.execute(
            "SELECT name, body FROM documents WHERE kind = ? AND name >= ? AND name < ? ORDER BY name",
            (kind, prefix, prefix + "\U0010ffff"),
        )
        return [(name, json.loads(body)) for name, body in rows]

    def record(self, entry: JSON) -> None:
        """Appends to the history that the admin route shows."""
        self._db.execute("INSERT INTO history (body) VALUES (?)", (json.dumps(entry),))

    def history(self) -> builtins.list[JSON]:
        rows = self._db.execute("SELECT seq, body FROM history ORDER BY seq")
        return [{"seq": seq, **json.loads(body)} for seq, body in rows]

    def log(self, project: str, job: str, entries: builtins.list[JSON]) -> None:
        """Appends log entries of a job of `projects/ID`."""
        self._db.executemany(
            "INSERT INTO logs (project, job, body) VALUES (?, ?, ?)", [(project, job, json.dumps(e)) for e in entries]
        )

    def logged(self, project: str, job: str = "") -> builtins.list[JSON]:
        """The log entries of a project, or of one of its jobs, in the order in which they were written."""
        rows = self._db.execute(
            "SELECT body FROM logs WHERE project = ? AND (? = '' OR job = ?) ORDER BY seq", (project, job, job)
        )
        return [json.loads(body) for (body,) in rows]

    def clear(self) -> None:
        """Forgets everything but the folder's identity, by which its containers are found and removed."""
        with self.transaction():
            self._db.execute("DELETE FROM documents WHERE kind != 'meta'")
            self._db.execute("DELETE FROM history")
            self._db.execute("DELETE FROM logs")

    def close(self) -> None:
        self._db.close()
        self._lock.close()
