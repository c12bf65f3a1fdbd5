"""Rows of Parquet files. Only the columns that are needed are read, a few rows at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from sae.text.columns import Kind

ROWS_AT_ONCE = 64  # a row may hold a whole book


class ParquetError(ValueError):
    """A file is not Parquet, or is damaged."""


def kinds_in(path: Path) -> dict[str, Kind | None]:
    """What each column of a file holds, by its type; None for anything that is no text. Raises: ParquetError."""
    try:
        return kinds_of_schema(pq.read_schema(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ParquetError(f"not a Parquet file, or a damaged one: {error}") from error


def kinds_of_schema(schema: Any) -> dict[str, Kind | None]:
    """As `kinds_in`, of a schema of pyarrow."""
    return {column.name: _kind(column.type) for column in schema}


def _kind(of: Any) -> Kind | None:
    if types.is_dictionary(of):
        return _kind(of.value_type)
    if types.is_string(of) or types.is_large_string(of) or types.is_string_view(of):
        return "text"
    if types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of):
        if types.is_integer(of.value_type):
            return "input_ids"
        if types.is_struct(of.value_type) and of.value_type.get_field_index("role") >= 0:
            return "messages"
    return None


def rows_in(path: Path, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file as dictionaries of those of these columns that it has. Raises: ParquetError."""
    try:
        with pq.ParquetFile(path) as file:
            there = [name for name in file.schema_arrow.names if name in columns]
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=there):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ParquetError(str(error)) from error
