"""Your own labels, notes and bookmarks of features, in a SQLite file in the dictionary's directory (`notes.sqlite`).

The first write creates the file; only looking at features does not. `browser.named_lists` keeps its lists there, too.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NAME = "notes.sqlite"
MAX_LABEL, MAX_NOTE = 200, 10_000  # characters
_TABLE = """CREATE TABLE IF NOT EXISTS notes (
    feature INTEGER PRIMARY KEY, label TEXT NOT NULL DEFAULT '', note TEXT NOT NULL DEFAULT '',
    bookmarked INTEGER NOT NULL DEFAULT 0, changed TEXT NOT NULL DEFAULT '') STRICT"""


class NotesError(ValueError):
    """The notes cannot be read or written; the message names the file and the reason."""


@dataclass(frozen=True)
class Note:
    """Label, note and bookmark of one feature."""

    feature: int
    label: str = ""
    note: str = ""
    bookmarked: bool = False
    changed: str = ""


class Notes:
    """The notes of one dictionary. Raises NotesError if the file is damaged or read-only."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME

    def get(self, feature: int) -> Note:
        """The note of a feature; an empty one if nothing was saved."""
        found = self._read("SELECT * FROM notes WHERE feature = ?", (feature,))
        return found[0] if found else Note(feature)

    def all(self) -> list[Note]:
        """All notes, sorted by feature."""
        return self._read("SELECT * FROM notes ORDER BY feature", ())

    def put(self, note: Note) -> None:
        """Saves `note` in place of the feature's earlier one; an empty note deletes it."""
        label, text = note.label.strip()[:MAX_LABEL], note.note.strip()[:MAX_NOTE]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with writing(self.path, _TABLE) as database:
            if not (label or text or note.bookmarked):
                database.execute("DELETE FROM notes WHERE feature = ?", (note.feature,))
                return
            database.execute(
                "INSERT OR REPLACE INTO notes (feature, label, note, bookmarked, changed) VALUES (?, ?, ?, ?, ?)",
                (note.feature, label, text, int(note.bookmarked), now),
            )

    def export(self) -> list[dict[str, Any]]:
        """All notes as plain values, for JSON."""
        return [asdict(note) for note in self.all()]

    def _read(self, query: str, values: tuple[Any, ...]) -> list[Note]:
        with reading(self.path, "notes") as database:
            rows = database.execute(query, values).fetchall() if database else []
        return [Note(r["feature"], r["label"], r["note"], bool(r["bookmarked"]), r["changed"]) for r in rows]


@contextlib.contextmanager
def reading(path: Path, table: str) -> Iterator[sqlite3.Connection | None]:
    """A connection for reading; None if the file does not exist or has no such table yet."""
    if not path.is_file() and not path.is_symlink():
        yield None
        return
    with _connection(path) as database:
        found = database.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)).fetchone()
        yield database if found else None


@contextlib.contextmanager
def writing(path: Path, *tables: str) -> Iterator[sqlite3.Connection]:
    """A connection with one transaction: it waits for another session's write, and a failed one changes nothing.

    `tables` are the statements that create the tables where they do not exist.
    """
    with _connection(path) as database, database:
        database.execute("BEGIN IMMEDIATE")
        for table in tables:
            database.execute(table)
        yield database


@contextlib.contextmanager
def _connection(path: Path) -> Iterator[sqlite3.Connection]:
    if path.is_symlink():
        raise NotesError(f"{path} is a link; notes must be a regular file. Replace the link by the file it points to.")
    try:
        database = sqlite3.connect(path, timeout=5)
        try:
            database.row_factory = sqlite3.Row
            yield database
        finally:
            database.close()
    except sqlite3.Error as error:
        raise NotesError(f"{path}: {error}. Move the file away, or make its directory writable.") from error
