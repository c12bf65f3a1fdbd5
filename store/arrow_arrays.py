"""Columns of Arrow and Parquet files, such as Hugging Face datasets write, as arrays: read in slices, never whole."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from store.common import StoreError

SUFFIXES = (".arrow", ".parquet")


@dataclass(frozen=True, eq=False)
class Column:
    """One column: `read(start, stop)` gives its items; of a list of lists, the rows of these items, end to end.

    `lengths` is the number of elements of each item where items differ: then the second axis of `shape` is -1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], np.ndarray]
    lengths: np.ndarray | None = None


def columns(path: Path) -> Iterator[Column]:
    """The columns of numbers, of lists of numbers, of lists of such lists, and of strings; others are left out.

    Raises: StoreError for a damaged file; later, on reading, for a missing value.
    """
    import pyarrow as pa

    try:
        groups = _parquet_groups(path) if path.suffix == ".parquet" else _ipc_groups(path)
        for name in groups.names:
            column = _column(path, name, groups)
            if column is not None:
                yield column
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path}: cannot be read as {path.suffix} ({error})") from error


@dataclass(frozen=True)
class _Groups:
    """A file in groups of rows, of which only the last one read is in memory (an .arrow file is mapped)."""

    names: list[str]
    starts: np.ndarray  # first row of each group, and the number of rows
    read: Callable[[int, str], Any]  # (group, column name) → pyarrow.Array


def _parquet_groups(path: Path) -> _Groups:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, memory_map=True)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    @lru_cache(maxsize=2)
    def read(group: int, name: str) -> Any:
        return _array(file.read_row_group(group, columns=[name]).column(name))

    return _Groups(list(file.schema_arrow.names), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), read)


def _ipc_groups(path: Path) -> _Groups:
    """Hugging Face writes the streaming format, other programs often the file format."""
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    if mapped.read(6) == b"ARROW1":
        table = pa.ipc.open_file(mapped).read_all()
    else:
        mapped.seek(0)
        table = pa.ipc.open_stream(mapped).read_all()
    batches = table.to_batches()
    starts = np.concatenate([[0], np.cumsum([len(batch) for batch in batches])]).astype(np.int64)
    return _Groups(list(table.column_names), starts, lambda group, name: _plain(batches[group].column(name)))


def _array(chunked: Any) -> Any:
    import pyarrow as pa

    return _plain(chunked.chunk(0) if chunked.num_chunks == 1 else pa.concat_arrays(chunked.chunks))


def _plain(array: Any) -> Any:
    """The array without an extension type (Hugging Face's Array2D is one)."""
    import pyarrow as pa

    return array.storage if isinstance(array.type, pa.ExtensionType) else array


def _column(path: Path, name: str, groups: _Groups) -> Column | None:
    """A column as an array; None if it holds neither numbers nor lists of numbers nor strings."""
    import pyarrow as pa

    n_items, where = int(groups.starts[-1]), f"{path}: column {name}"
    if not n_items:
        return None
    kind, depth = groups.read(0, name).type, 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    if depth == 0 and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return Column(name, (n_items,), "str", _reader(groups, name, lambda part: _strings(where, part)))
    if depth > 2 or not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return None
    dtype = {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(kind), str(kind))
    parts = range(len(groups.starts) - 1)
    widths = [_lengths((groups.read(group, name) for group in parts), depth=d) for d in range(depth)]
    # One number where all lists are equally long, else -1.
    axes = [int(found[0]) if len(found) and (found == found[0]).all() else -1 for found in widths]
    lengths = widths[0] if axes[:1] == [-1] else None
    shape = tuple(axes) if lengths is None else (-1, *axes[1:])

    def convert(part: Any) -> np.ndarray:
        flat = part
        for _ in range(depth):
            _refuse_missing(where, flat)
            flat = flat.flatten()
        _refuse_missing(where, flat)
        values: np.ndarray = flat.to_numpy(zero_copy_only=False)
        if -1 in shape[1:]:  # no array: refused by whoever needs one
            return values
        return values.reshape((-1, *shape[1:]) if lengths is not None else (len(part), *shape))

    return Column(name, (n_items, *shape), dtype, _reader(groups, name, convert), lengths)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _reader(groups: _Groups, name: str, convert: Callable[[Any], np.ndarray]) -> Callable[[int, int], np.ndarray]:
    sizes = np.diff(groups.starts).tolist()
    return read_parts(sizes, lambda group, a, b: convert(groups.read(group, name).slice(a, b - a)))


def read_parts(sizes: Sequence[int], read: Callable[[int, int, int], np.ndarray]) -> Callable[[int, int], np.ndarray]:
    """Reads items across parts of these sizes: `read(part, start, stop)` gives those of one part."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()

    def across(start: int, stop: int) -> np.ndarray:
        part, found = max(0, bisect_right(starts, start) - 1), []
        while part < len(sizes) and starts[part] < stop:
            if sizes[part]:
                found.append(read(part, max(start - starts[part], 0), min(stop, starts[part + 1]) - starts[part]))
            part += 1
        if not found:
            return read(0, 0, 0)
        return found[0] if len(found) == 1 else np.concatenate(found)

    return across


def _strings(where: str, array: Any) -> np.ndarray:
    _refuse_missing(where, array)
    return np.array(array.to_pylist(), dtype=object)


def _refuse_missing(where: str, array: Any) -> None:
    if array.null_count:
        raise StoreError(f"{where} has {array.null_count:,} missing values; expected a value in every row")


def _lengths(parts: Iterable[Any], *, depth: int) -> np.ndarray:
    """The number of elements of each list, `depth` lists down; a missing list counts as empty here."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = [np.empty(0, np.int64)]
    for part in parts:
        for _ in range(depth):
            part = part.flatten()
        if pa.types.is_fixed_size_list(part.type):
            found.append(np.full(len(part), part.type.list_size, np.int64))
        else:
            found.append(pc.fill_null(pc.list_value_length(part), 0).to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(found)
