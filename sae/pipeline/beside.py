"""What lies beside rows that came as an array: token ids or texts, a mask, and names, images and labels of samples."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from sae.pipeline.errors import PipelineError
from sae.text.tokenizer import load_tokenizer, token_bytes
from store import arrays
from store.arrays import ArraySource, StoredArray

KINDS = ("token-ids", "tokenizer", "texts", "images", "labels", "keep")
MAX_VOCABULARY = 1 << 20
Given = str | Path | Sequence[Any] | np.ndarray
POSITIONS, NOTHING, IDS, TEXTS = "positions", "nothing", "ids", "texts"  # what the token of a row stands for


@dataclass
class Beside:
    """`tokens` [rows] index `vocabulary`; None: the position in the sample (`meaning` positions), or nothing.

    `names`, `images` and `labels` have one entry for each sample. `digest` is of all of it, for the record.
    """

    meaning: str
    vocabulary: list[bytes]
    tokens: np.ndarray | None = None
    keep: np.ndarray | None = None
    names: list[str] | None = None
    labels: list[str] | None = None
    image_root: str | None = None
    digest: str = ""
    _hash: Any = field(default_factory=sha256, repr=False)

    def note(self, what: str, content: Iterable[Any] | np.ndarray) -> None:
        """Adds something to the digest."""
        raw = content.tobytes() if isinstance(content, np.ndarray) else json.dumps(list(content)).encode()
        self._hash.update(what.encode() + raw)
        self.digest = self._hash.hexdigest()


def read_beside(
    given: dict[str, Given | None], source: ArraySource, n_rows: int, n_samples: int, longest: int, *, told: bool
) -> Beside:
    """Reads everything that was given, by the kinds in KINDS.

    `longest` is the number of rows of the longest sample. `told`: whether it is known which rows belong together.

    Raises: PipelineError for an unknown kind, a file or column that does not exist, or a wrong number of entries.
    """
    for kind in given:
        if kind not in KINDS:
            raise PipelineError(
                f"harvest --from: {kind!r} is not known; beside the rows there may be {', '.join(KINDS)}."
            )
    wanted = {kind: value for kind, value in given.items() if value is not None}
    found = Beside(POSITIONS, [str(i).encode() for i in range(longest)]) if told else Beside(NOTHING, [b"row"])
    if "token-ids" in wanted:
        _read_token_ids(found, wanted, source, n_rows)
    elif "tokenizer" in wanted:
        raise PipelineError(
            "harvest --from: a tokenizer says what token ids stand for, and none are given (token-ids=…)."
        )
    if "keep" in wanted:
        mask = _numbers("keep", wanted["keep"], source, n_rows)
        if not np.isin(mask, (0, 1)).all():
            raise PipelineError(
                "harvest --from: keep must hold 1 or true for rows to keep, and 0 or false for the others."
            )
        found.keep = mask.astype(bool)
        found.note("keep", found.keep)
    if "texts" in wanted:
        texts = _texts("texts", wanted["texts"], source)
        if len(texts) == n_rows and "token-ids" not in wanted:
            _texts_as_tokens(found, texts)
        else:
            found.names = _for_samples("texts", texts, n_samples, n_rows)
        found.note("texts", texts)
    if "images" in wanted:
        found.names = _for_samples("images", _texts("images", wanted["images"], source), n_samples, n_rows)
        found.image_root = os.path.abspath(_folder_of(wanted["images"]))
        found.note("images", found.names)
    if "labels" in wanted:
        found.labels = _for_samples("labels", _texts("labels", wanted["labels"], source), n_samples, n_rows)
        found.note("labels", found.labels)
    return found


def _read_token_ids(found: Beside, wanted: dict[str, Given], source: ArraySource, n_rows: int) -> None:
    ids = _numbers("token-ids", wanted["token-ids"], source, n_rows)
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high >= MAX_VOCABULARY:
        raise PipelineError(
            f"harvest --from: token-ids must lie between 0 and {MAX_VOCABULARY - 1:,}; found "
            f"{low if low < 0 else high:,}."
        )
    found.meaning, found.tokens = IDS, ids.astype(np.uint32)
    found.vocabulary = [f"[{i}]".encode() for i in range(high + 1)]
    if "tokenizer" in wanted:
        known = token_bytes(load_tokenizer(Path(str(wanted["tokenizer"]))))
        found.vocabulary = known + found.vocabulary[len(known) :]  # padding rows of an embedding have no token
    found.note("token-ids", found.tokens)


def _texts_as_tokens(found: Beside, texts: list[str]) -> None:
    """One text for each row: equal texts are one token."""
    numbers: dict[str, int] = {}
    tokens = np.fromiter((numbers.setdefault(text, len(numbers)) for text in texts), np.uint32, len(texts))
    if len(numbers) > MAX_VOCABULARY:
        raise PipelineError(
            f"harvest --from: {len(numbers):,} different texts of rows are more than the {MAX_VOCABULARY:,} that an "
            "index can hold. Give one text for each sample."
        )
    found.meaning, found.tokens = TEXTS, tokens
    found.vocabulary = [text.encode("utf-8", "surrogatepass") for text in numbers]


def _for_samples(kind: str, entries: list[str], n_samples: int, n_rows: int) -> list[str]:
    if len(entries) != n_samples:
        also = f" or {n_rows:,} (one for each row)" if kind == "texts" else ""
        raise PipelineError(
            f"harvest --from: {kind} has {len(entries):,} entries; expected {n_samples:,} (one for each sample){also}. "
            "If every row is a sample of its own: --rows-per-sample 1."
        )
    return entries


def _numbers(kind: str, given: Given, source: ArraySource, n_rows: int) -> np.ndarray:
    """Integers or booleans, one for each row, in any shape that has so many."""
    array = _array(kind, given, source)
    if np.dtype("O") != array.dtype and array.dtype.kind not in "iub":
        raise PipelineError(f"harvest --from: {kind} holds {array.dtype}; expected integers or booleans.")
    if array.size != n_rows:
        raise PipelineError(
            f"harvest --from: {kind} has {array.size:,} entries; expected {n_rows:,}, one for each row."
        )
    return array.reshape(-1)


def _array(kind: str, given: Given, source: ArraySource) -> np.ndarray:
    if not isinstance(given, str | Path):
        return np.asarray(given)
    if Path(given).exists():
        held = arrays.open_arrays(Path(given)).arrays
        if len(held) != 1:
            raise PipelineError(f"harvest --from: {kind}={given} holds {', '.join(held)}; expected one array.")
        return _whole(next(iter(held.values())))
    return _whole(_column(kind, given, source))


def _column(kind: str, given: str | Path, source: ArraySource) -> StoredArray:
    """A column or tensor of the source itself."""
    found = source.arrays.get(str(given))
    if found is None:
        raise PipelineError(
            f"harvest --from: {kind}={given}: no such file, and {source.path} has no array of that name. It has "
            f"{', '.join(source.arrays)}."
        )
    return found


def _whole(array: StoredArray) -> np.ndarray:
    return array.read(0, array.shape[0] if array.shape else 1)


def _texts(kind: str, given: Given, source: ArraySource) -> list[str]:
    """The lines of a text file, the strings of a .jsonl file, a column of texts, or any sequence of texts."""
    if not isinstance(given, str | Path):
        return [str(each) for each in given]
    path = Path(given)
    if not path.exists():
        column = _column(kind, given, source)
        if column.dtype == "str" or len(column.shape) == 1:  # class numbers are labels, too
            return [str(each) for each in _whole(column).tolist()]
        raise PipelineError(
            f"harvest --from: {kind}={given} holds {column.dtype} {list(column.shape)}; expected texts."
        )
    if path.suffix == ".npy":
        return [str(each) for each in _array(kind, given, source).reshape(-1).tolist()]
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"harvest --from: {kind}={given} cannot be read as UTF-8 text ({error}).") from error
    lines = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if path.suffix != ".jsonl":
        return lines
    try:
        return [str(json.loads(line)) for line in lines]
    except ValueError as error:
        raise PipelineError(f"harvest --from: {kind}={given}: a line is not JSON ({error}).") from error


def _folder_of(listing: Given) -> Path:
    """Where relative paths of images start: at their list, or here."""
    return Path(listing).parent if isinstance(listing, str | Path) and Path(listing).is_file() else Path()
