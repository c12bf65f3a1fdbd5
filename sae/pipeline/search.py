"""Search a dictionary's features by meaning: the cosine of a query's embedding with those of the features' texts.

The embeddings are kept in `meaning.npz` in the dictionary's directory, by the digest of each text, so that only texts
that changed are embedded again.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from sae.jobs.progress import progress
from sae.pipeline.errors import PipelineError
from sae.pipeline.feature_texts import feature_texts
from sae.text.embedding import load_text_model
from store.common import StoreError, write_bytes
from store.features import FeatureIndex
from store.notes import Note, Notes

CACHE = "meaning.npz"
FORMAT = 1
BATCH = 128  # texts between two reports of progress
SAVED = 32 * BATCH  # texts between two writes
DIGEST_BYTES = 16
Progress = Callable[[int, int], None]  # texts embedded, of how many


class Embedder(Protocol):
    """Turns texts into vectors. `id` says which model it is: vectors of another one are not used."""

    id: str

    def embed(self, texts: Sequence[str], *, query: bool = False) -> np.ndarray:
        """[n, d] float32, each row of length 1."""
        ...


@dataclass(frozen=True)
class Searchable:
    """A dictionary's features as texts with their embeddings, ready to be compared with queries.

    `texts` are by the index, `own` your labels and notes; an empty text has nan as its embedding.
    """

    texts: Sequence[str]
    own: Sequence[str]
    vectors: Float[np.ndarray, "2 d_sae d"]  # of `texts`, of `own`

    def similarities(self, query: Float[np.ndarray, " d"]) -> Float[np.ndarray, " d_sae"]:
        """The cosine of each feature with a query, v · q: the larger one of its two texts; nan without a text."""
        if not self.vectors.shape[-1]:  # no feature has a text
            return np.full(len(self.texts), np.nan, np.float32)
        found: np.ndarray = np.fmax(*(self.vectors @ query))
        return found


def search(sae: str | Path, text: str, *, n: int = 10, text_model: str | Path | None = None) -> dict[str, Any]:
    """The `n` features of an indexed dictionary that are closest in meaning to `text`, most similar first.

    A feature has two texts: your label and note; and the domain and tokens that it fires on, in words. Its similarity
    is the larger cosine of the two with the query, v · q for embeddings of length 1. `text_model` is the directory of a
    sentence-transformers model (by default all-MiniLM-L6-v2, from the extra `search`). The result holds `features`,
    each with feature, similarity, label and text; `median_similarity`, that of the median feature; and `text_model`.
    Raises: PipelineError for an empty query; TextModelError without a text model; StoreError without an index.
    """
    if not text.strip():
        raise PipelineError("search: the text to search for is empty.")
    if n < 1:
        raise PipelineError(f"search: n = {n}; expected at least one feature.")
    path = Path(sae)
    directory = path.parent if path.name.endswith(".zarr") else path
    index = FeatureIndex.open(path if path.name.endswith(".zarr") else path / "features.zarr")
    model = load_text_model(text_model)
    with _progress_bar() as report:
        found = searchable(index, directory, model, report)
    similarity = found.similarities(model.embed([text.strip()], query=True)[0])
    labels = {note.feature: note.label for note in Notes(directory).all()}
    features = [
        {
            "feature": feature,
            "similarity": float(similarity[feature]),
            "label": labels.get(feature, ""),
            "text": found.texts[feature],
        }
        for feature in ranked(similarity)[:n].tolist()
    ]
    return {"text_model": model.id, "median_similarity": median(similarity), "features": features}


def ranked(similarity: Float[np.ndarray, " d_sae"]) -> np.ndarray:
    """The features with a similarity, most similar first (ties: lower number)."""
    order = np.argsort(-similarity, kind="stable")
    return order[: np.isfinite(similarity).sum()]


def median(similarity: Float[np.ndarray, " d_sae"]) -> float | None:
    """The similarity of the median feature, which says what the others' are worth; None if no feature has a text."""
    known = similarity[np.isfinite(similarity)]
    return float(np.median(known)) if len(known) else None


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress]:
    """Reports on a progress bar, which appears only if texts are embedded."""
    with contextlib.ExitStack() as opened:
        bars: list[tqdm] = []

        def report(done: int, total: int) -> None:
            if not bars:
                bars.append(opened.enter_context(progress("embed", total, "text")))
            bars[0].update(done - bars[0].n)

        yield report


def searchable(
    index: FeatureIndex, directory: Path, model: Embedder, report: Progress = lambda done, total: None
) -> Searchable:
    """The features of an index, whose dictionary is in `directory`, with their embeddings."""
    texts, own = feature_texts(index), own_texts(index.d_sae, Notes(directory).all())
    found = vectors(directory / CACHE, [*texts, *own], model, report)
    return Searchable(texts, own, found.reshape(2, index.d_sae, -1))


def own_texts(d_sae: int, notes: Sequence[Note]) -> list[str]:
    """Your label and note of each feature as one text; "" without one."""
    found = {note.feature: ". ".join(filter(None, (note.label, note.note))) for note in notes}
    return [found.get(feature, "") for feature in range(d_sae)]


def vectors(
    path: Path, texts: Sequence[str], model: Embedder, report: Progress = lambda done, total: None
) -> Float[np.ndarray, "n d"]:
    """The embeddings of the texts, nan for an empty one; new ones are added to the file at `path`.

    They are also written on the way and when it is interrupted. A file that is damaged or of another model is made
    again. If it cannot be written, the embeddings are used all the same.
    """
    digests = [_digest(text) if text else b"" for text in texts]
    wanted = {digest: text for digest, text in zip(digests, texts, strict=True) if digest}
    known = {digest: vector for digest, vector in _read(path, model.id).items() if digest in wanted}
    missing = sorted(wanted.keys() - known.keys(), key=lambda digest: (len(wanted[digest]), digest))
    with contextlib.ExitStack() as on_leaving:
        if missing:
            on_leaving.callback(_write, path, model.id, known)
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            made = model.embed([wanted[digest] for digest in part]).astype(np.float16)
            known.update(zip(part, made, strict=True))
            if start and start % SAVED == 0:
                _write(path, model.id, known)
            report(start + len(part), len(missing))
    width = len(next(iter(known.values()))) if known else 0
    found = np.full((len(texts), width), np.nan, np.float32)
    for row, digest in enumerate(digests):
        if digest:
            found[row] = known[digest]
    return found


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "replace")).digest()[:DIGEST_BYTES]


def _read(path: Path, model: str) -> dict[bytes, np.ndarray]:
    """The embeddings in the file by digest; none if it is missing, damaged, a link, or of another model."""
    if path.is_symlink() or not path.is_file():
        return {}
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            digests, rows = file["digests"], file["vectors"]
            usable = int(file["format"]) == FORMAT and str(file["model"]) == model
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}
    if not usable or rows.ndim != 2 or digests.shape != (len(rows), DIGEST_BYTES) or not np.isfinite(rows).all():
        return {}
    return {digest.tobytes(): row for digest, row in zip(digests, rows, strict=True)}


def _write(path: Path, model: str, known: dict[bytes, np.ndarray]) -> None:
    """Writes the embeddings, unless the directory cannot be written or the disk is full."""
    if not known:
        return
    content = io.BytesIO()
    digests = np.frombuffer(b"".join(known), np.uint8).reshape(len(known), DIGEST_BYTES)
    np.savez(content, format=FORMAT, model=model, digests=digests, vectors=np.stack(list(known.values())))
    with contextlib.suppress(OSError, StoreError):
        write_bytes(path, content.getvalue())
