"""Small copies of the image files that an index names as its samples; no Streamlit here."""

from __future__ import annotations

import base64
import io
import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from store.features import FeatureIndex

SIDE = 112  # pixels
MAX_FILE_BYTES = 50_000_000
MAX_LEADING = 8  # rows of a sample that are no patches: a class token, registers


@dataclass(frozen=True)
class Picture:
    """An image as a data URL; its patches are a square grid of `grid` × `grid` after `leading` other rows (0: none)."""

    url: str
    grid: int
    leading: int


def picture_of(index: FeatureIndex, context: int) -> Picture | None:
    """The image of a context's sample; None if the index names no images, or the file is gone or no image."""
    root = (index.rows or {}).get("images")
    if not root:
        return None
    row = context * index.seq_len
    path = Path(root) / index.document_of(row).id
    try:
        stamp = path.stat().st_mtime_ns if path.is_file() else None
    except (OSError, ValueError):  # e.g. a name with a null byte
        stamp = None
    url = None if stamp is None else _data_url(str(path), stamp)
    if url is None:
        return None
    return Picture(url, *patch_grid(int((index.keep_at(context)).sum())))


def patch_grid(positions: int) -> tuple[int, int]:
    """(side, leading rows) if the rows of a sample can be the patches of a square image; else (0, 0).

    A vision transformer has side² patches after its class token and registers: 197 = 1 + 14².
    """
    side = math.isqrt(positions)
    leading = positions - side * side
    return (side, leading) if side > 1 and leading <= min(MAX_LEADING, side) else (0, 0)


@lru_cache(maxsize=4096)
def _data_url(path: str, stamp: int) -> str | None:
    """A JPEG of SIDE × SIDE pixels: stretched, as vision transformers see it, so that patches lie where they belong."""
    try:
        if Path(path).stat().st_size > MAX_FILE_BYTES:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of an image that would take too much memory
            with Image.open(path) as image:
                image.draft("RGB", (2 * SIDE, 2 * SIDE))
                small = image.convert("RGB").resize((SIDE, SIDE))
    except (OSError, ValueError, Warning, Image.DecompressionBombError):
        return None
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
