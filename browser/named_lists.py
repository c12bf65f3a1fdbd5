"""Named lists of features, in the dictionary's `notes.sqlite`; their exchange as JSON and CSV. No Streamlit here."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from store.notes import NAME, NotesError, reading, writing

KIND, FORMAT = "feature-lists", 1
MAX_NAME = 80  # characters
_LISTS = "CREATE TABLE IF NOT EXISTS lists (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT"
_LISTED = """CREATE TABLE IF NOT EXISTS listed (
    place INTEGER PRIMARY KEY, list INTEGER NOT NULL REFERENCES lists, feature INTEGER NOT NULL,
    UNIQUE (list, feature)) STRICT"""


class Lists:
    """The named lists of one dictionary; a list keeps its features in the order in which they were added.

    Raises: NotesError for a list that does not exist or a name that cannot be one, and if the file is damaged or
    read-only. What fails changes nothing.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME

    def all(self) -> dict[str, list[int]]:
        """The features of every list; lists are sorted by name."""
        with reading(self.path, "listed") as database:
            if database is None:
                return {}
            rows = database.execute("SELECT name, feature FROM lists LEFT JOIN listed ON list = id ORDER BY place")
            pairs = [(row["name"], row["feature"]) for row in rows]
        names = sorted({name for name, _ in pairs}, key=lambda name: (name.casefold(), name))
        found: dict[str, list[int]] = {name: [] for name in names}
        for name, feature in pairs:
            if feature is not None:  # a list without features
                found[name].append(feature)
        return found

    def add(self, name: str, features: Iterable[int] = ()) -> str:
        """Adds features to a list, which is made if it does not exist; returns its name."""
        return self.merge({name: list(features)})[0]

    def merge(self, lists: Mapping[str, Sequence[int]]) -> list[str]:
        """Adds the features of several lists, all or none; returns the names of the lists."""
        checked = [(check_name(name), features) for name, features in lists.items()]
        with writing(self.path, _LISTS, _LISTED) as database:
            for name, features in checked:
                database.execute("INSERT OR IGNORE INTO lists (name) VALUES (?)", (name,))
                number = self._number(database, name)
                pairs = [(number, feature) for feature in features]
                database.executemany("INSERT OR IGNORE INTO listed (list, feature) VALUES (?, ?)", pairs)
        return [name for name, _ in checked]

    def remove(self, name: str, features: Iterable[int]) -> None:
        """Takes features out of a list; those that are not in it are passed over."""
        with writing(self.path, _LISTS, _LISTED) as database:
            number = self._number(database, name)
            pairs = [(number, feature) for feature in features]
            database.executemany("DELETE FROM listed WHERE list = ? AND feature = ?", pairs)

    def rename(self, name: str, new: str) -> str:
        """Gives a list another name, which no list may have; returns it."""
        new = check_name(new)
        with writing(self.path, _LISTS, _LISTED) as database:
            number = self._number(database, name)
            if new != name and database.execute("SELECT 1 FROM lists WHERE name = ?", (new,)).fetchone():
                raise NotesError(f"There is already a list “{new}”. Choose another name, or delete that list first.")
            database.execute("UPDATE lists SET name = ? WHERE id = ?", (new, number))
        return new

    def delete(self, name: str) -> None:
        """Deletes a list; its features keep their labels and notes."""
        with writing(self.path, _LISTS, _LISTED) as database:
            number = self._number(database, name)
            database.execute("DELETE FROM listed WHERE list = ?", (number,))
            database.execute("DELETE FROM lists WHERE id = ?", (number,))

    def _number(self, database: sqlite3.Connection, name: str) -> int:
        row = database.execute("SELECT id FROM lists WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise NotesError(f"There is no list “{name}”. It may have been renamed or deleted in another tab.")
        return int(row["id"])


def check_name(name: str) -> str:
    """The name without spaces around it. Raises: NotesError if it is empty, too long or more than one line."""
    name = name.strip()
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise NotesError(f"“{name[:MAX_NAME]}” cannot name a list: expected one line of 1 to {MAX_NAME} characters.")
    return name


def to_json(lists: Mapping[str, Sequence[int]]) -> bytes:
    """The lists as UTF-8 JSON."""
    content = {
        "format": FORMAT,
        "kind": KIND,
        "lists": [{"name": name, "features": list(features)} for name, features in lists.items()],
    }
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def to_csv(lists: Mapping[str, Sequence[int]]) -> bytes:
    """The lists as UTF-8 CSV: `list,feature`, a row for each feature; names are JSON strings, so that no spreadsheet
    runs one as a formula. A list without features has one row without a number."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["list", "feature"])
    for name, features in lists.items():
        cells = [str(feature) for feature in features] or [""]
        table.writerows([json.dumps(name, ensure_ascii=False), cell] for cell in cells)
    return text.getvalue().encode()


def read_lists(content: bytes, d_sae: int) -> dict[str, list[int]]:
    """The lists of a file that `to_json` or `to_csv` wrote, or that was written by hand in this form.

    Raises: NotesError for a file of another form, a name that cannot be one, or a feature that the dictionary of
    `d_sae` features does not have.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotesError(f"The file is not UTF-8 text ({error}). Expected JSON or CSV of feature lists.") from error
    pairs = _from_json(text) if text.lstrip()[:1] in ("{", "[") else _from_csv(text)
    found: dict[str, list[int]] = {}
    for name, features in pairs:
        known = found.setdefault(check_name(name), [])
        for feature in features:
            if not 0 <= feature < d_sae:
                raise NotesError(
                    f"List “{name}” holds feature {feature}; the features of this dictionary are 0 to {d_sae - 1:,}. "
                    "Nothing was imported: the file may belong to another dictionary."
                )
            known.append(feature)
    if not found:
        raise NotesError("The file holds no list.")
    return found


def _from_json(text: str) -> list[tuple[str, list[int]]]:
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise NotesError(f"The file is not JSON: {error}.") from error
    if not isinstance(content, dict) or content.get("kind") != KIND or content.get("format") != FORMAT:
        expected = f'"kind": "{KIND}", "format": {FORMAT} and "lists"'
        raise NotesError(f"The file is JSON, but holds no feature lists: expected an object with {expected}.")
    lists = content.get("lists")
    lists = lists if isinstance(lists, list) else [None]
    for number, each in enumerate(lists):
        features = each.get("features") if isinstance(each, dict) else None
        if not (isinstance(features, list) and isinstance(each.get("name"), str) and all(map(_is_number, features))):
            raise NotesError(f'Entry {number} of "lists": expected {{"name": text, "features": [whole numbers]}}.')
    return [(each["name"], each["features"]) for each in lists]


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _from_csv(text: str) -> list[tuple[str, list[int]]]:
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or rows[0][:2] != ["list", "feature"]:
        first = ",".join(rows[0])[:MAX_NAME] if rows else ""
        raise NotesError(f"The file begins with “{first}”: expected JSON, or CSV with the columns list,feature.")
    found = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        name, feature = [*row, ""][:2]
        if feature and not (feature.strip().isascii() and feature.strip().isdecimal()):
            raise NotesError(f"Line {number} of the CSV: “{feature[:MAX_NAME]}” is no feature number.")
        found.append((_plain(name), [int(feature)] if feature else []))
    return found


def _plain(name: str) -> str:
    """A name that `to_csv` wrote as a JSON string, or that was written as it is."""
    try:
        value = json.loads(name) if name.startswith('"') else name
    except ValueError:
        return name
    return value if isinstance(value, str) else name
