"""Tables on disk: Parquet, the one door to pyarrow."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_table(path: str | Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes equally long columns to a Parquet file, whole or not at all; NaN is written as null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pa.array(column, from_pandas=True) for name, column in columns.items()}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        pq.write_table(pa.table(arrays), temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
