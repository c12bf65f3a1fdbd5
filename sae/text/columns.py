"""Which column of a table, or key of a JSON line, holds the text: as strings, chat messages or token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal

from sae.text.documents import Document, RawDocument

Kind = Literal["text", "messages", "input_ids"]
USUAL: tuple[Kind, ...] = ("messages", "input_ids")  # read without being asked for, if there is no "text"
NAMES: dict[Kind, str] = {"text": "string", "messages": "chat messages", "input_ids": "token ids"}
ABOUT_A_TEXT = ("id", "domain", "source")  # columns that say something about the document
ABOUT_A_RECORD = (*ABOUT_A_TEXT, "attention_mask")  # what is read besides the text


class ColumnError(ValueError):
    """No column holds the text, or several may; the message names them."""


@dataclass(frozen=True)
class Column:
    """Where a record's text is, and in which form."""

    name: str
    kind: Kind


TEXT = Column("text", "text")


def column_of(kinds: Mapping[str, Kind | None], asked: str | None) -> Column:
    """The column asked for; else "text", else "messages" or "input_ids", else the only column of strings.

    `kinds` says what each column holds, None for anything that is no text.
    Raises: ColumnError if there is no such column, or if several may be meant.
    """
    columns = f"its columns are {sorted(kinds)}"
    if asked is not None:
        kind = kinds.get(asked)
        if asked not in kinds:
            raise ColumnError(f'has no column "{asked}"; {columns}')
        if kind is None:
            raise ColumnError(
                f'the column "{asked}" holds neither strings, nor chat messages (each with a role and content), nor '
                f"token ids; {columns}"
            )
        return Column(asked, kind)
    if kinds.get("text") == "text":
        return TEXT
    usual = [kind for kind in USUAL if kinds.get(kind) == kind]
    strings = [name for name, kind in kinds.items() if kind == "text" and name not in ABOUT_A_TEXT]
    if len(usual) == 1:
        return Column(usual[0], usual[0])
    if not usual and len(strings) == 1:
        return Column(strings[0], "text")
    raise ColumnError(f'has no column "text"; {columns}. Name the one to read with --text-column')


def kind_of(value: Any) -> Kind | None:
    """What one value of a record is; None for anything that is no text."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value:
        if all(isinstance(item, Mapping) and isinstance(item.get("role"), str) for item in value):
            return "messages"
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return "input_ids"
    return None


def kinds_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Kind | None]:
    """What each key of some records holds, by the first value that is any kind of text."""
    found: dict[str, Kind | None] = {}
    for record in records:
        for name, value in record.items():
            found[name] = found.get(name) or kind_of(value)
    return found


def document_in(
    record: Mapping[str, Any], column: Column, where: str, default_source: str
) -> Document | RawDocument | None:
    """The document of a record, with its "id", "domain" and "source"; None if the column holds something else."""
    value = record.get(column.name)
    if kind_of(value) != column.kind and not (column.kind != "text" and value == []):
        return None
    name = str(record.get("id") or where)
    domain, source = str(record.get("domain") or "text"), str(record.get("source") or default_source)
    if isinstance(value, str):
        return Document(name, value, domain, source)
    assert isinstance(value, list)
    assert column.kind != "text"
    shown = record.get("attention_mask")
    if column.kind == "input_ids" and isinstance(shown, list):  # 0 is padding
        value = list(compress(value, shown))
    return RawDocument(name, column.kind, _without_nulls(value), domain, source)


def _without_nulls(content: list[Any]) -> list[Any]:
    """Messages without the keys that a table added: a chat template may ask whether a key is there."""
    return [
        {name: value for name, value in item.items() if value is not None} if isinstance(item, Mapping) else item
        for item in content
    ]
