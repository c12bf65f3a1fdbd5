"""Builds a feature index (`store.features`): takes chunks of activations, sorts them on disk, renames the result."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from store.common import DocumentRecord, StoreError, exclusive_lock, fsync, reserve
from store.feature_sort import (
    SortedFirings,
    Spill,
    domains,
    empty_stats,
    moments,
    next_tokens,
    spill_pairs,
    stable_order,
    token_pairs,
    top_tokens,
)
from store.schema import atomic_json

KIND = "feature-index"
# 2: co-activation, successors, labels, Δloss, occurrences of each token, features before a token, the map
INDEX_FORMAT = 2
CHUNK = 1 << 16  # elements: a feature's slice is in few chunks, and a chunk decodes in less than 1 ms
SMALLEST = np.float16(6e-8)  # the least positive float16, so that no firing is rounded to zero
BLOCK = 1 << 21  # firings in memory at once when statistics are computed

# dtypes of the panels of the format; others are stored with their own dtype
PANEL_DTYPES = {
    "stats/cos_enc_dec": "float32",
    "stats/nearest_cosine": "float32",
    "stats/logit_kurtosis": "float32",
    "logits/top_id": "int32",
    "logits/top_value": "float32",
    "logits/bottom_id": "int32",
    "logits/bottom_value": "float32",
    "logits/histogram": "uint32",
    "logits/range": "float32",
    "neurons/weight_id": "int32",
    "neurons/weight_value": "float32",
    "neurons/weight_share": "float32",
    "neurons/corr_id": "int32",
    "neurons/corr_value": "float32",
    "neighbours/id": "int32",
    "neighbours/cosine": "float32",
    "stats/resampled_step": "int32",
    "stats/delta_loss": "float32",
    "effects/interval_abs": "float32",
    "effects/interval_samples": "uint8",
    "together/id": "int32",
    "together/jaccard": "float32",
    "correlated/id": "int32",
    "correlated/pearson": "float32",
    "successors/id": "int32",
    "successors/share": "float32",
    "successors/lift": "float32",
    "label/kind": "int8",
    "label/keys": "int32",
    "label/score": "float32",
    "heads/share": "float32",
    "map/pca": "float32",
    "map/umap": "float32",
    "map/cluster": "int32",
}


class FeatureWriter:
    """Builds an index in `<path>.partial` and renames it at the end.

    A killed build leaves no index, and an existing index at `path` stays until the new one is complete. Chunks of
    activations go to disk; memory use follows the size of one appended chunk.

    Raises: StoreError when another process is building the same index.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        d_sae: int,
        seq_len: int,
        n_contexts: int,
        attributes: dict[str, Any],
        vocabulary: Sequence[bytes],
        documents: Sequence[DocumentRecord],
    ) -> None:
        if n_contexts * seq_len > 2**32:
            raise StoreError(
                f"{path}: {n_contexts} contexts of {seq_len} tokens are more rows than the index "
                "format can number (2^32); index fewer contexts"
            )
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.d_sae, self.seq_len, self.n_contexts = d_sae, seq_len, n_contexts
        self.attributes, self.vocabulary = dict(attributes), list(vocabulary)
        self.documents = [DocumentRecord(*document) for document in documents]
        self.domains = sorted({document.domain for document in self.documents})
        self._lock = ExitStack()
        self._lock.enter_context(exclusive_lock(self.path.with_name(self.path.name + ".lock"), str(self.path)))
        shutil.rmtree(self.partial, ignore_errors=True)  # what a killed build left
        try:
            self._begin()
        except BaseException:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._lock.close()
            raise

    def _begin(self) -> None:
        shape, spill = (self.n_contexts, self.seq_len), self.partial / "spill"
        spill.mkdir(parents=True)
        self._tokens = _contexts_map(spill / "tokens", "uint32", shape)
        self._keep = _contexts_map(spill / "keep", "bool", shape)
        self._document = _contexts_map(spill / "document", "int32", shape)
        self._document[:] = -1
        self._seen = np.zeros(self.n_contexts, bool)
        self._coo = Spill(spill / "firings", {"feature": "uint32", "row": "uint32", "value": "float16"})

    def append(
        self,
        first_context: int,
        tokens: np.ndarray,
        keep: np.ndarray,
        document: np.ndarray,
        rows: np.ndarray,
        features: np.ndarray,
        values: np.ndarray,
    ) -> None:
        """Adds contexts [contexts, seq_len] from number `first_context` on, and the firings in them.

        `rows`, `features`, `values` are 1-D, in any order: the positive activations of kept rows.
        Raises: StoreError when they do not belong to these contexts.
        """
        tokens, keep, document = np.asarray(tokens), np.asarray(keep, bool), np.asarray(document)
        rows, features = np.asarray(rows, np.int64), np.asarray(features, np.int64)
        values = np.asarray(values, np.float32)
        where = slice(first_context, first_context + len(tokens))
        self._check_contexts(where, tokens, keep, document)
        self._check_firings(where, keep, rows, features, values)
        order = stable_order(rows - where.start * self.seq_len)
        order = order[stable_order(features[order])]
        rows, features = rows[order], features[order]
        if np.any((np.diff(rows) == 0) & (np.diff(features) == 0)):
            raise StoreError(f"{self.path}: a (row, feature) pair was appended twice")
        self._tokens[where], self._keep[where], self._document[where] = tokens, keep, document
        self._seen[where] = True
        stored = np.maximum(values[order].astype(np.float16), SMALLEST)
        self._coo.append(first_context, feature=features, row=rows, value=stored)

    def finish(
        self,
        panels: dict[str, np.ndarray],
        from_firings: Callable[[SortedFirings], dict[str, np.ndarray]] | None = None,
    ) -> Path:
        """Sorts, computes statistics, adds `panels` ({"logits/top_id": [d_sae, …], …}) and renames.

        `from_firings` computes further panels from the sorted activations.
        """
        if not self._seen.all():
            raise StoreError(
                f"{self.path}: {int(self._seen.sum())} of {self.n_contexts} contexts were "
                f"appended; the first missing one is {int(np.argmin(self._seen))}"
            )
        root = zarr.open_group(self.partial, mode="a", zarr_format=3)
        ptr, firings = self._coo.scatter("feature", self.d_sae)
        with ThreadPoolExecutor(1) as background:  # on one thread, and independent of `from_firings`
            statistics = background.submit(self._put_statistics, root, ptr, firings)
            if from_firings is not None:
                row_ptr, by_row = self._coo.scatter("row", self.n_contexts * self.seq_len)
                panels = panels | from_firings(
                    SortedFirings(
                        ptr,
                        firings["row"],
                        firings["value"],
                        row_ptr,
                        by_row["feature"],
                        by_row["value"],
                        self._tokens,
                        self._keep,
                        self._domain_of()[self._document],
                    )
                )
        self._put_panels(root, panels, statistics.result())
        atomic_json(self.partial / "documents.json", [list(d) for d in self.documents])
        strings = [token.decode("latin-1") for token in self.vocabulary]
        atomic_json(self.partial / "vocabulary.json", strings)
        root.attrs.update(self._attributes())
        return self._publish()

    def abandon(self) -> None:
        """Removes the unfinished index."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        with suppress(OSError):  # a full disk has no room for what is not written yet, which is removed anyway
            self._coo.close()
        self._lock.close()

    def _attributes(self) -> dict[str, Any]:
        return {
            "provenance": {},
            "bos": None,
            **self.attributes,
            "kind": KIND,
            "format": INDEX_FORMAT,
            "d_sae": self.d_sae,
            "seq_len": self.seq_len,
            "n_contexts": self.n_contexts,
            "kept_tokens": int(self._keep.sum()),
            "d_vocab": len(self.vocabulary),
            "domains": self.domains,
        }

    def _check_contexts(self, where: slice, tokens: np.ndarray, keep: np.ndarray, document: np.ndarray) -> None:
        shape = (len(tokens), self.seq_len)
        for name, array in (("tokens", tokens), ("keep", keep), ("document", document)):
            if array.shape != shape:
                raise StoreError(f"{self.path}: {name} is {array.shape}, expected {shape}")
        if where.start < 0 or where.stop > self.n_contexts:
            raise StoreError(
                f"{self.path}: contexts {where.start}..{where.stop - 1} lie outside the "
                f"{self.n_contexts} contexts of the index"
            )
        if self._seen[where].any():
            raise StoreError(f"{self.path}: contexts from {where.start} were appended before")
        if tokens.size and int(tokens.max()) >= len(self.vocabulary):
            raise StoreError(
                f"{self.path}: token id {int(tokens.max())} is outside the vocabulary of "
                f"{len(self.vocabulary)}; index with the tokenizer the text was harvested with"
            )
        if document.size and int(document.max()) >= len(self.documents):
            raise StoreError(
                f"{self.path}: document number {int(document.max())} is outside the table of "
                f"{len(self.documents)} documents"
            )

    def _check_firings(
        self, where: slice, keep: np.ndarray, rows: np.ndarray, features: np.ndarray, values: np.ndarray
    ) -> None:
        if not len(rows) == len(features) == len(values):
            raise StoreError(f"{self.path}: {len(rows)} rows, {len(features)} features, {len(values)} values")
        if not len(rows):
            return
        local = rows - where.start * self.seq_len
        if local.min() < 0 or local.max() >= keep.size or not keep.reshape(-1)[local].all():
            raise StoreError(
                f"{self.path}: activations on rows outside contexts {where.start}.."
                f"{where.stop - 1} or on rows that are not kept (BOS, padding); drop them first"
            )
        if features.min() < 0 or features.max() >= self.d_sae:
            raise StoreError(f"{self.path}: a feature number lies outside 0..{self.d_sae - 1}")
        wrong = ~((values > 0) & (values <= np.finfo(np.float16).max))
        if wrong.any():
            i = int(np.argmax(wrong))
            raise StoreError(
                f"{self.path}: feature {features[i]} has activation {values[i]} on row {rows[i]}; "
                "the index holds values in (0, 65504]"
            )

    def _put_statistics(self, root: zarr.Group, ptr: np.ndarray, firings: dict[str, np.ndarray]) -> set[str]:
        """Stores the text, the sorted activations and the statistics; returns the names of the statistics' panels."""
        _put(root, "firings/ptr", ptr)
        _put(root, "firings/row", firings["row"])
        _put(root, "firings/value", firings["value"])
        stats, inverted = self._statistics(ptr, firings["row"], firings["value"])
        for name, column in stats.items():
            _put(root, f"stats/{name}", column)
        for group, pairs in inverted.items():
            token_ptr, columns = pairs.scatter("token", len(self.vocabulary))
            for name, column in ({"ptr": token_ptr} | columns).items():
                _put(root, f"{group}/{name}", column)
        for name, column in (("tokens", self._tokens), ("keep", self._keep), ("document", self._document)):
            _put(root, name, column)
        occurrences = np.bincount(self._tokens[self._keep], minlength=len(self.vocabulary))
        _put(root, "by_token/occurrences", occurrences.astype(np.uint32))
        return {f"stats/{name}" for name in stats}

    def _statistics(
        self, ptr: np.ndarray, rows: np.ndarray, values: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, Spill]]:
        """Statistics of each feature, and the sums for the inverted indices: (token, feature) for the token that the
        feature fires on, and for the token after it."""
        columns = {"token": "uint32", "feature": "uint32", "count": "uint32", "sum": "float32", "max": "float32"}
        inverted = {name: Spill(self.partial / "spill" / name, columns) for name in ("by_token", "by_next_token")}
        stats = empty_stats(self.d_sae)
        stats["count"] = np.diff(ptr)
        tokens, documents = self._tokens.reshape(-1), self._document.reshape(-1)
        domain_of = self._domain_of()
        following = next_tokens(self._tokens, self._keep)
        lo = 0
        while lo < self.d_sae:
            # whole features until the block is full; one feature may exceed it
            hi = max(int(np.searchsorted(ptr, ptr[lo] + BLOCK, "right")) - 1, lo + 1)
            part = slice(ptr[lo], ptr[hi])
            feature = np.repeat(np.arange(lo, hi), np.diff(ptr[lo : hi + 1]))
            value = np.asarray(values[part], np.float64)
            row = np.asarray(rows[part])
            if len(row):
                moments(stats, feature, value)
                fired = token_pairs(feature, tokens[row].astype(np.int64), value)
                spill_pairs(inverted["by_token"], fired)
                top_tokens(stats, fired)
                after = following[row]
                known = after >= 0
                spill_pairs(inverted["by_next_token"], token_pairs(feature[known], after[known], value[known]))
                domains(stats, feature, domain_of[documents[row]])
            lo = hi
        return stats, inverted

    def _domain_of(self) -> np.ndarray:
        """The domain number of each document number; the last entry is for the -1 of padding."""
        return np.array([self.domains.index(d.domain) for d in self.documents] + [-1], np.int64)

    def _put_panels(self, root: zarr.Group, panels: dict[str, np.ndarray], computed: set[str]) -> None:
        for name, array in panels.items():
            if name in computed or name.split("/")[0] in ("firings", "by_token", "by_next_token"):
                raise StoreError(f"{self.path}: panel {name} is computed by the writer itself")
            array = np.asarray(array)
            if name in PANEL_DTYPES:
                array = array.astype(PANEL_DTYPES[name], copy=False)
                if len(array) != self.d_sae:
                    raise StoreError(f"{self.path}: panel {name} is {array.shape}, expected [{self.d_sae}, …]")
            _put(root, name, array)

    def _publish(self) -> Path:
        shutil.rmtree(self.partial / "spill")
        for folder, _, files in os.walk(self.partial):
            for name in [*files, "."]:
                fsync(os.path.join(folder, name))
        previous = self.path.with_name(self.path.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        if self.path.exists():
            self.path.rename(previous)
        self.partial.rename(self.path)
        fsync(self.path.parent)
        shutil.rmtree(previous, ignore_errors=True)
        self._lock.close()
        return self.path


def _put(root: zarr.Group, name: str, array: np.ndarray) -> None:
    """Writes an array in chunks of about CHUNK elements, one band of chunks at a time."""
    per_row = max(1, int(np.prod(array.shape[1:])))
    step = max(1, CHUNK // per_row)
    target = root.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(min(step, max(1, len(array))), *(max(1, n) for n in array.shape[1:])),
        compressors=ZstdCodec(level=1, checksum=True),
    )
    band = step * 16
    for start in range(0, len(array), band):
        target[start : start + band] = np.asarray(array[start : start + band])


def _contexts_map(path: Path, dtype: str, shape: tuple[int, int]) -> np.ndarray:
    if 0 in shape:
        raise StoreError(f"{path}: an index needs at least one context and one position")
    contexts = np.memmap(path, dtype=dtype, mode="w+", shape=shape)
    reserve(path)
    return contexts
