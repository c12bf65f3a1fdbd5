"""The feature index: every activation of every feature, feature-major, self-contained.

A page reads slices of one index, and works after the activation store is deleted. Row `r` is token `r % seq_len` of
context `r // seq_len` of this index. Statistics are computed from the stored (float16) values, so that the largest
stored value of a feature equals its `stats/max`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from store.common import DocumentRecord, StoreError
from store.feature_writer import INDEX_FORMAT, KIND, FeatureWriter
from store.schema import read_json

__all__ = ["FeatureIndex", "FeatureWriter", "Window"]


@dataclass(frozen=True)
class Window:
    """Tokens around one row: `token_ids[i]` is at position `start + i` of `context`."""

    context: int
    position: int
    token_ids: np.ndarray
    start: int


class FeatureIndex:
    """Reads slices of one finished index; recently read chunks are cached."""

    def __init__(self, path: Path, root: zarr.Group) -> None:
        self.path, self._root = path, root
        self.attributes: dict[str, Any] = dict(root.attrs)
        self.d_sae = int(self.attributes["d_sae"])
        self.seq_len = int(self.attributes["seq_len"])
        self.n_contexts = int(self.attributes["n_contexts"])
        self.kept_tokens = int(self.attributes["kept_tokens"])
        self.d_vocab = int(self.attributes["d_vocab"])
        self.domains: list[str] = list(self.attributes["domains"])
        self._array = lru_cache(maxsize=None)(self._open_array)
        # a page reads one row of about thirty panels each, and the next feature's rows are in the same chunks
        self._chunk = lru_cache(maxsize=256)(self._read_chunk)
        self._pointers = lru_cache(maxsize=None)(self._read_pointers)
        self.has = lru_cache(maxsize=None)(self._has)

    @classmethod
    def open(cls, path: str | Path) -> FeatureIndex:
        """Opens a finished index. Raises: StoreError for anything else."""
        path = Path(path)
        hint = "build it with `sae index`"
        if path.name.endswith(".partial"):
            raise StoreError(f"{path}: an index whose build did not finish; {hint} again")
        if not path.is_dir():
            raise StoreError(f"{path}: no feature index here; {hint}")
        try:
            root = zarr.open_group(path, mode="r", zarr_format=3)
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise StoreError(f"{path}: not a feature index ({error}); {hint}") from error
        if root.attrs.get("kind") != KIND:
            raise StoreError(
                f"{path}: a Zarr group, but not a feature index (kind {root.attrs.get('kind')!r}, "
                f"expected {KIND!r}); {hint}"
            )
        found = int(root.attrs["format"])  # type: ignore[arg-type]
        if found != INDEX_FORMAT:
            advice = (
                "update monosem" if found > INDEX_FORMAT else f"{hint} again (the old one stays until the new is done)"
            )
            raise StoreError(f"{path}: an index of format {found}, this version reads format {INDEX_FORMAT}; {advice}")
        return cls(path, root)

    @property
    def sampled(self) -> bool:
        """Whether it holds only samples of the firings (a dump of another tool), so that counts mean nothing."""
        return bool(self.attributes.get("sampled"))

    def firings(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (int64, ascending) and values (float32) where `feature` fires."""
        part = self._slice("firings/ptr", feature, self.d_sae, "feature")
        rows, values = self._array("firings/row")[part], self._array("firings/value")[part]
        return np.asarray(rows).astype(np.int64), np.asarray(values).astype(np.float32)

    def features_of_token(self, token_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Features that fire on a token, ascending: (feature, count, Σ activation, max)."""
        return self._inverted("by_token", token_id)

    def features_before_token(self, token_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Features that fire on the token before a token: (feature, count, Σ activation, max).

        Raises: StoreError for an index without this list (an older one).
        """
        if not self.has("by_next_token"):
            raise StoreError(f"{self.path}: no list of the tokens after a firing; build the index again to get it")
        return self._inverted("by_next_token", token_id)

    def _inverted(self, name: str, token_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        part = self._slice(f"{name}/ptr", token_id, self.d_vocab, "token")
        feature, count, total, largest = (
            np.asarray(self._array(f"{name}/{column}")[part]) for column in ("feature", "count", "sum", "max")
        )
        return feature.astype(np.int64), count, total, largest

    def occurrences(self, token_id: int) -> int:
        """How often a token occurs at a kept position."""
        return int(self.token_counts[token_id])

    @cached_property
    def token_counts(self) -> np.ndarray:
        """How often each token occurs at a kept position [d_vocab]."""
        return np.asarray(self._array("by_token/occurrences")[:])

    @cached_property
    def all_tokens(self) -> np.ndarray:
        """Every token id [n_contexts, seq_len], read once (4 bytes a token)."""
        return np.asarray(self._array("tokens")[:])

    @cached_property
    def all_kept(self) -> np.ndarray:
        """Which positions are kept [n_contexts, seq_len], read once."""
        return np.asarray(self._array("keep")[:])

    @cached_property
    def domain_numbers(self) -> np.ndarray:
        """The index in `domains` of each row's domain, -1 on padding [n_rows]."""
        of_document = np.array([self.domains.index(document.domain) for document in self.documents] + [-1], np.int64)
        numbers: np.ndarray = of_document[np.asarray(self._array("document")[:])]
        return numbers.reshape(-1)

    @cached_property
    def stats(self) -> dict[str, np.ndarray]:
        """Every `stats/<name>` [d_sae], read once."""
        group = self._root["stats"]
        assert isinstance(group, zarr.Group)
        return {name: np.asarray(array[:]) for name, array in group.arrays()}

    def _has(self, name: str) -> bool:
        """Whether the index holds the panel `name` ("logits/top_id", …)."""
        return name in self._root

    def panel(self, name: str, feature: int) -> np.ndarray:
        """Row `feature` of a panel. Raises: StoreError when the index does not hold it."""
        if not self.has(name):
            raise StoreError(f"{self.path}: no panel {name}; build the index again to get it")
        array = self._array(name)
        if not 0 <= feature < array.shape[0]:
            raise StoreError(f"{self.path}: {name} has no row {feature}; it has {array.shape[0]}")
        number, place = divmod(feature, array.chunks[0])
        chunk: np.ndarray = self._chunk(name, number)
        return np.asarray(chunk[place])

    def column(self, name: str) -> np.ndarray:
        """A whole panel [d_sae, …], for the table of all features."""
        if not self.has(name):
            raise StoreError(f"{self.path}: no panel {name}; build the index again to get it")
        return np.asarray(self._array(name)[:])

    def tokens_at(self, context: int) -> np.ndarray:
        """Token ids [seq_len] of one context."""
        return self._context("tokens", context)

    def keep_at(self, context: int) -> np.ndarray:
        """Which positions of a context are kept (BOS and padding are not) [seq_len]."""
        return self._context("keep", context)

    def window(self, row: int, before: int, after: int) -> Window:
        """The tokens around `row`, clipped at its context."""
        context, position = divmod(int(row), self.seq_len)
        start, stop = max(0, position - before), min(self.seq_len, position + after + 1)
        return Window(context, position, self.tokens_at(context)[start:stop], start)

    def tokens_of(self, rows: np.ndarray) -> np.ndarray:
        """The token ids [n] at `rows` [n] (any order)."""
        rows = np.asarray(rows, np.int64)
        per_chunk = self._array("tokens").chunks[0] * self.seq_len
        out = np.zeros(len(rows), np.uint32)
        chunk_of = rows // per_chunk
        for number in np.unique(chunk_of).tolist():
            here = chunk_of == number
            flat = self._chunk("tokens", number).reshape(-1)
            out[here] = flat[rows[here] - number * per_chunk]
        return out

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; `[id]` for an id without a token, such as a padding row of the embedding."""
        known = 0 <= token_id < len(self._vocabulary)
        return self._vocabulary[token_id] if known else f"[{token_id}]".encode()

    def logit_weights(self, side: str, feature: int) -> list[tuple[int, float]]:
        """(token id, logit weight) of the tokens that a feature raises ("top") or lowers ("bottom") most, if known.

        Older indexes list padding rows of the embedding too; these ids stand for no token and are left out.
        """
        if not self.has(f"logits/{side}_id"):
            return []
        ids, weights = (self.panel(f"logits/{side}_{column}", feature).tolist() for column in ("id", "value"))
        return [(i, weight) for i, weight in zip(ids, weights, strict=True) if 0 <= i < len(self._vocabulary)]

    def document_of(self, row: int) -> DocumentRecord:
        """The document that a row belongs to; empty strings on padding."""
        context, position = divmod(int(row), self.seq_len)
        number = int(self._context("document", context)[position])
        return self.documents[number] if number >= 0 else DocumentRecord("", "", "", "")

    @property
    def rows(self) -> dict[str, Any] | None:
        """How rows that came as arrays are shown: {"tokens": what a token id stands for, "images": their directory}.

        None in an index of text.
        """
        found: dict[str, Any] | None = self.attributes.get("rows")
        return found

    def row_name(self, row: int) -> str:
        """Where a row is in the array that it came from: `acts.npy[17, 42]` or `acts.npy[3391]`; "" for text."""
        source = self.document_of(row).source if self.rows else ""
        found = re.fullmatch(r"(.*)\[(\d+, )?(\d+):\d+\]", source, re.DOTALL)
        return f"{found[1]}[{found[2] or ''}{int(found[3]) + row % self.seq_len}]" if found else ""

    @cached_property
    def _vocabulary(self) -> list[bytes]:
        return [token.encode("latin-1") for token in read_json(self.path / "vocabulary.json")]

    @cached_property
    def documents(self) -> list[DocumentRecord]:
        """The document table, by document number."""
        rows = read_json(self.path / "documents.json")
        return [DocumentRecord(*row) for row in rows]

    def _slice(self, name: str, group: int, n_groups: int, what: str) -> slice:
        if not 0 <= group < n_groups:
            raise StoreError(f"{self.path}: {what} {group} is outside 0..{n_groups - 1}")
        lo, hi = self._pointers(name)[group : group + 2].tolist()
        return slice(lo, hi)

    def _read_pointers(self, name: str) -> np.ndarray:
        return np.asarray(self._array(name)[:])

    def _context(self, name: str, context: int) -> np.ndarray:
        if not 0 <= context < self.n_contexts:
            raise StoreError(f"{self.path}: context {context} is outside 0..{self.n_contexts - 1}")
        per_chunk = self._array(name).chunks[0]
        chunk: np.ndarray = self._chunk(name, context // per_chunk)
        return np.asarray(chunk[context % per_chunk])

    def _read_chunk(self, name: str, number: int) -> np.ndarray:
        array = self._array(name)
        per_chunk = array.chunks[0]
        chunk = np.asarray(array[number * per_chunk : (number + 1) * per_chunk])
        chunk.setflags(write=False)
        return chunk

    def _open_array(self, name: str) -> zarr.Array[Any]:
        array = self._root[name]
        assert isinstance(array, zarr.Array), name
        return array
