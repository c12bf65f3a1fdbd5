"""Input of the activation store: settings and shards, checked before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from store.activation_layout import HOOK_NAME, acts_name
from store.common import SPLITS, DocumentRecord, StoreError
from store.schema import decode, encode, stored_dtype
from store.shards import as_document

EXPONENT = {"float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80)}


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a store as they will be read back from JSON. Raises: StoreError if one is wrong."""
    if set(settings["n_shards"]) != set(SPLITS):
        raise StoreError(f"n_shards needs the keys {', '.join(SPLITS)}, got {list(settings['n_shards'])}")
    if not settings["hook_points"]:
        raise StoreError("hook_points is empty: give at least one as {hook point: d_in}")
    for hook, dtype in settings["dtype"].items():
        stored_dtype(dtype)
        if not HOOK_NAME.fullmatch(hook):
            raise StoreError(f"hook point {hook!r}: use letters, digits, '.', '_' and '-' only")
    sizes = {
        "seq_len": settings["seq_len"],
        "contexts_per_shard": settings["contexts_per_shard"],
        **{f"hook_points[{hook!r}]": d_in for hook, d_in in settings["hook_points"].items()},
    }
    for name, size in sizes.items():
        if int(size) < 1:
            raise StoreError(f"{name} must be at least 1, got {size}")
    if min(settings["n_shards"].values()) < 0 or sum(settings["n_shards"].values()) < 1:
        raise StoreError(f"n_shards must hold at least one shard, got {settings['n_shards']}")
    try:
        text = json.dumps(settings, allow_nan=False, default=_plain_number)
    except (TypeError, ValueError) as error:
        raise StoreError(f"the provenance cannot be written as JSON: {error}") from error
    plain: dict[str, Any] = json.loads(text)
    return plain


def _plain_number(value: Any) -> int | float:
    if isinstance(value, np.integer | np.floating):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def differences(there: Any, wanted: Any, name: str = "") -> list[str]:
    """One line for each key, at any depth, whose values differ between two JSON objects."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        absent = "(absent)"
        return [
            line
            for key in sorted(there.keys() | wanted.keys())
            for line in differences(there.get(key, absent), wanted.get(key, absent), f"{name}.{key}" if name else key)
        ]
    if there == wanted:
        return []
    return [f"{name}: the store has {_short(there)}, this call asks for {_short(wanted)}"]


def _short(value: Any) -> str:
    text = value if value == "(absent)" else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


@dataclass(frozen=True, eq=False)
class ShardInput:
    """One shard ready to be written: padded blocks by array name, and what they hold."""

    blocks: dict[str, np.ndarray]
    contexts: int
    kept: np.ndarray  # bool [contexts * seq_len]
    documents: dict[int, DocumentRecord]

    @classmethod
    def check(
        cls,
        *,
        acts: Mapping[str, np.ndarray],
        tokens: np.ndarray,
        keep: np.ndarray,
        document: np.ndarray,
        documents: Mapping[int, DocumentRecord],
        hook_points: Mapping[str, int],
        seq_len: int,
        dtype: Mapping[str, str],
        shard_contexts: int,
        first_context: int,
    ) -> ShardInput:
        """Casts and pads the arrays of `ActivationStore.write_shard`. Raises: StoreError if one is wrong."""
        if set(acts) != set(hook_points):
            raise StoreError(f"acts has hooks {sorted(acts)}, expected {sorted(hook_points)}")
        text = {
            "tokens": _integers("tokens", tokens, np.uint32),
            "keep": _integers("keep", keep, np.bool_),
            "document": _integers("document", document, np.int32),
        }
        contexts = len(text["tokens"])
        for name, array in text.items():
            if array.shape != (contexts, seq_len) or contexts > shard_contexts:
                raise StoreError(
                    f"{name} has shape {array.shape}, expected the same [contexts, {seq_len}] for "
                    f"tokens, keep and document, with at most {shard_contexts} contexts"
                )
        blocks = {
            "tokens": _padded(text["tokens"], shard_contexts, 0),
            "keep": _padded(text["keep"], shard_contexts, False),
            "document": _padded(text["document"], shard_contexts, -1),
        }
        for hook, d_in in hook_points.items():
            rows = _rows(hook, np.asarray(acts[hook]), contexts, seq_len, d_in)
            stored = encode(rows, dtype[hook])
            _check_finite(hook, rows, stored, dtype[hook], first_context, seq_len)
            blocks[acts_name(hook)] = _padded(stored, shard_contexts * seq_len, 0)
        table = {int(number): as_document(number, entry) for number, entry in documents.items()}
        return cls(blocks, contexts, text["keep"].reshape(-1), table)


def _integers(name: str, array: np.ndarray, dtype: type) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "iub":
        raise StoreError(f"{name} must hold integers or booleans, got {array.dtype}")
    fitting: np.ndarray = array.astype(dtype)
    if not np.array_equal(fitting, array):
        raise StoreError(f"{name} has a value that does not fit {np.dtype(dtype)}")
    return fitting


def _rows(hook: str, array: np.ndarray, contexts: int, seq_len: int, d_in: int) -> np.ndarray:
    flat, deep = (contexts * seq_len, d_in), (contexts, seq_len, d_in)
    if array.shape not in (flat, deep):
        raise StoreError(f"acts[{hook!r}] has shape {array.shape}, expected {flat} or {deep}")
    return array.reshape(flat)


def _padded(array: np.ndarray, length: int, fill: int | bool) -> np.ndarray:
    if len(array) == length:
        return np.ascontiguousarray(array)
    block = np.full((length, array.shape[1]), fill, array.dtype)
    block[: len(array)] = array
    return block


def _check_finite(
    hook: str, rows: np.ndarray, stored: np.ndarray, dtype: str, first_context: int, seq_len: int
) -> None:
    exponent = EXPONENT.get(dtype)  # only inf and NaN have all bits of the exponent set
    finite = np.isfinite(stored) if exponent is None else (stored.view(np.uint16) & exponent) != exponent
    if finite.all():
        return
    bad = int(np.flatnonzero(~finite.all(axis=1))[0])
    values = decode(rows[bad], dtype) if rows.dtype == np.uint16 else rows[bad]
    largest = np.abs(values.astype(np.float64)).max()  # NaN if one value is NaN
    where = (
        f"{hook}: row {first_context * seq_len + bad} (context {first_context + bad // seq_len}, "
        f"position {bad % seq_len}) has magnitude {largest:g}"
    )
    if not np.isfinite(largest):
        raise StoreError(f"{where}: the model itself computed it; nothing of this shard was stored")
    advice = (
        "harvest into a new store with dtype bfloat16"
        if dtype == "float16"
        else "harvest into a new store with dtype float32"
    )
    raise StoreError(
        f"{where}, too large for {dtype} (at most {_largest(dtype):g}): {advice}; nothing of this shard was stored"
    )


def _largest(dtype: str) -> float:
    if dtype == "bfloat16":
        return float(decode(np.array([0x7F7F], np.uint16), dtype)[0])
    return float(np.finfo(stored_dtype(dtype)).max)
