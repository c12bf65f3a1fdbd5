"""What several processes encode for one feature index: each keeps its blocks in files of its own, all read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from store.common import atomic_write

COLUMNS = ("tokens", "keep", "document", "rows", "features", "values")


class BlockFiles:
    """Blocks of contexts with their firings, one file for each block; memory use follows the size of a block.

    `rows` are counted from the start of the block; firings are in the order they came in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self,
        first_context: int,
        tokens: np.ndarray,
        keep: np.ndarray,
        document: np.ndarray,
        rows: np.ndarray,
        features: np.ndarray,
        values: np.ndarray,
    ) -> None:
        """Keeps a block: whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        small = rows.astype(np.uint32), features.astype(np.uint32), values.astype(np.float32)
        block: dict[str, Any] = dict(zip(COLUMNS, (tokens, keep, document, *small), strict=True))
        with atomic_write(self._file(first_context)) as partial, partial.open("wb") as file:
            np.savez(file, **block)

    def firings(self, first_context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, features and values of a block."""
        with np.load(self._file(first_context)) as block:
            return block["rows"], block["features"], block["values"]

    def read(self, first_context: int) -> dict[str, np.ndarray]:
        """All that `write` was given, by name."""
        with np.load(self._file(first_context)) as block:
            return {name: block[name] for name in COLUMNS}

    def first_contexts(self) -> list[int]:
        """The blocks that all processes have kept, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob("*.npz"))

    def _file(self, first_context: int) -> Path:
        return self.folder / f"{first_context:012d}.npz"
