"""Search by meaning in the app and its JSON: what `sae.search` does, with the embeddings held in memory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from browser.launch import TEXT_MODEL_VARIABLE
from browser.live import LiveError
from store.features import FeatureIndex
from store.notes import NAME

if TYPE_CHECKING:
    from sae.pipeline.search import Embedder, Searchable

DICTIONARIES = 2  # kept in memory
_lock = threading.Lock()
_kept: OrderedDict[tuple[Path, int, int, str], Searchable] = OrderedDict()


def is_installed() -> bool:
    """Whether the extra `search` is installed, as far as the text model in use needs it."""
    from sae.text import embedding

    return embedding.is_installed(os.environ.get(TEXT_MODEL_VARIABLE))


def load_model() -> Embedder:
    """The text model in use. Raises: LiveError if it is not installed or cannot be used."""
    from sae.text.embedding import TextModelError, load_text_model

    try:
        return load_text_model(os.environ.get(TEXT_MODEL_VARIABLE))
    except TextModelError as error:
        raise LiveError(str(error)) from error


def similarities(
    index: FeatureIndex, directory: Path, text: str, report: Callable[[int, int], None] = lambda done, total: None
) -> np.ndarray:
    """The similarity of each feature of a dictionary with a text [d_sae], nan for a feature without words.

    `directory` is the dictionary's. New texts are embedded first; `report` is told how many of how many are done.
    Raises: LiveError without a text model; NotesError if the notes are damaged.
    """
    with _lock:  # another session waits for the same embeddings instead of making them, too
        model = load_model()
        found = _searchable(index, directory, model, report)
        return found.similarities(model.embed([text.strip()], query=True)[0])


def median(similarity: np.ndarray) -> float | None:
    """The similarity of the median feature; None if no feature has a text."""
    from sae.pipeline.search import median

    return median(similarity)


def _searchable(
    index: FeatureIndex, directory: Path, model: Embedder, report: Callable[[int, int], None]
) -> Searchable:
    from sae.pipeline.search import searchable

    key = (index.path, _stamp(index.path / "zarr.json"), _stamp(directory / NAME), model.id)
    if key not in _kept:
        _kept[key] = searchable(index, directory, model, report)
        while len(_kept) > DICTIONARIES:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


def _stamp(path: Path) -> int:
    """When a file was changed, in ns; 0 if there is none."""
    return path.stat().st_mtime_ns if path.is_file() else 0
