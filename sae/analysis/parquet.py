"""Tables on disk as Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from store.common import atomic_write


def write_table(path: str | Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes equally long columns to a Parquet file, whole or not at all; NaN is written as null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pa.array(column, from_pandas=True) for name, column in columns.items()}
    with atomic_write(path) as partial:
        pq.write_table(pa.table(arrays), partial, compression="zstd")
