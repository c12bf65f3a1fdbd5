"""Activations that came as arrays, from any model: checked, divided into splits, and written into a store."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.harvesting.samples import RowPlan, Samples, plan_rows, samples_of
from sae.jobs.progress import Interrupted, interruptible, progress
from sae.pipeline.beside import POSITIONS, Beside, Given, read_beside
from sae.pipeline.errors import PipelineError
from sae.pipeline.harvest import BYTES_PER_VALUE
from store import arrays
from store.activations import ActivationStore, is_url
from store.arrays import ArraySource, Rows, StoredArray
from store.common import ARRAYS, HELD_OUT, SPLITS, DocumentRecord

UNNAMED_MODEL = "unnamed model"
SLAB_BYTES = 1 << 25
# The least magnitude that rounds to infinity: (2 − 2^−(mantissa bits + 1)) · 2^(largest exponent).
OVERFLOW = {
    "float16": (2 - 2.0**-11) * 2.0**15,
    "bfloat16": (2 - 2.0**-8) * 2.0**127,
    "float32": (2 - 2.0**-24) * 2.0**127,
}
LAYER_NAME = re.compile(r"(layers?|blocks?|resid|mlp|attn|heads?|(^|[^a-z])[lh])[-_. ]*$", re.IGNORECASE)
Arrays = str | Path | np.ndarray | torch.Tensor | Mapping[str, np.ndarray | torch.Tensor]


def store_activations(
    source: Arrays,
    out: str | Path,
    *,
    hook_points: Sequence[str] = (),
    rows_per_sample: int | None = None,
    token_ids: Given | None = None,
    tokenizer: str | Path | None = None,
    texts: Given | None = None,
    images: Given | None = None,
    labels: Given | None = None,
    keep: Given | None = None,
    dtype: str | Mapping[str, str] | None = None,
    model: str = UNNAMED_MODEL,
    report: Callable[[str], None] = lambda line: None,
) -> str | Path:
    """Writes activations of any model, given as arrays, into a store at `out`, to train and index dictionaries on.

    `source` is a file (.npy, .safetensors, .arrow, .parquet), a Zarr array, a directory of these, or an array (several
    by name) in memory; floats of shape [rows, d_in] or [samples, positions, d_in]. `hook_points` name the arrays to
    take, or the only array. Rows that belong together (the patches of an image) are one sample and stay in one split:
    those of a 3-d array, or runs of `rows_per_sample`; else 64 neighbours count as one. A twentieth of the samples is
    held out. `dtype` is that of the store (default: the array's own; float64 becomes float32).

    Beside the rows, as files, columns of the source, or sequences: `token_ids` (what they stand for: `tokenizer`, a
    tokenizer.json) or `texts`, one for each row; `keep`, a mask of rows; and for each sample `texts`, paths of
    `images`, or `labels` (they become domains).
    Everything is read twice: first checked and hashed, then written. Repeat the call to continue after an interruption.
    Raises: PipelineError or StoreError, before anything is written, for arrays that do not fit, a value that is not
    finite (naming its row) or too large for `dtype`; StoreError when `out` is another store; Interrupted on Ctrl-C.
    """
    opened = _opened(source)
    chosen = _chosen(opened, hook_points)
    hooks = {hook: Rows(array) for hook, array in chosen.items()}
    first = next(iter(hooks.values()))
    _same_rows(hooks)
    samples = samples_of(first.n_rows, first.lengths, rows_per_sample, str(opened.path))
    plan = plan_rows(samples, str(opened.path))
    given = {
        "token-ids": token_ids,
        "tokenizer": tokenizer,
        "texts": texts,
        "images": images,
        "labels": labels,
        "keep": keep,
    }
    longest = int(samples.lengths.max())
    beside = read_beside(given, opened, first.n_rows, len(samples.lengths), longest, told=samples.told)
    dtypes = _dtypes(dtype, hooks)
    naming = Naming(opened.path.name, first, samples)
    _report(report, opened, hooks, samples, plan, beside, dtypes)
    digests = {hook: _checked(hook, rows, dtypes[hook], beside.keep, naming) for hook, rows in hooks.items()}
    store = ActivationStore.create(
        out if is_url(out) else Path(out),
        hook_points={hook: rows.d_in for hook, rows in hooks.items()},
        seq_len=plan.seq_len,
        contexts_per_shard=plan.contexts_per_shard,
        n_shards=plan.n_shards,
        dtype=dtypes,
        provenance=_provenance(opened, chosen, digests, beside, samples, model),
    )
    if not store.is_complete:
        with store.hold():
            store.write_vocabulary(beside.vocabulary)
            _write(store, hooks, plan, beside, naming)
    return store.path


# --- what is stored --------------------------------------------------------------------------------------------------


def _opened(source: Arrays) -> ArraySource:
    if isinstance(source, str | Path):
        return arrays.open_arrays(Path(source))
    named = source if isinstance(source, Mapping) else {"acts": source}
    return ArraySource(Path("arrays in memory"), {name: _in_memory(name, array) for name, array in named.items()})


def _in_memory(name: str, array: np.ndarray | torch.Tensor) -> StoredArray:
    if not isinstance(array, torch.Tensor):
        return arrays.in_memory(name, np.asarray(array))
    held = array.detach().cpu()
    if held.dtype != torch.bfloat16:
        return arrays.in_memory(name, held.numpy())
    bits = held.view(torch.uint16).numpy()
    return StoredArray(name, bits.shape, "bfloat16", lambda start, stop: bits[start:stop])


def _chosen(source: ArraySource, asked: Sequence[str]) -> dict[str, StoredArray]:
    """The arrays to store, by hook point. Raises: PipelineError when it is not clear which ones."""
    found = {name: array for name, array in source.arrays.items() if array.holds_rows}
    if asked and all(name in found for name in asked):
        return {_hook_name(name): found[name] for name in asked}
    if not found:
        held = ", ".join(f"{name} ({a.dtype} {list(a.shape)})" for name, a in source.arrays.items())
        raise PipelineError(
            f"{source.path}: holds no activations: {held}. Expected floats of shape [rows, d_in] or [samples, "
            "positions, d_in]."
        )
    if len(asked) <= 1 and len(found) == 1:
        name, array = next(iter(found.items()))
        return {_hook_name(asked[0] if asked else name): array}
    if len(asked) <= 1 and _are_parts(list(found)):
        return {_hook_name(asked[0] if asked else source.path.stem): arrays.joined(list(found.values()))}
    wrong = f"got --hook-point {', '.join(asked)}" if asked else "none was named"
    raise PipelineError(
        f"{source.path}: holds several arrays ({', '.join(found)}); {wrong}. Name those to store with --hook-point. "
        "(Files that are numbered parts of one array, such as part-0.npy, part-1.npy, are joined.)"
    )


def _are_parts(names: list[str]) -> bool:
    """Whether names are those of numbered parts: equal but for one number, which does not count layers or heads."""
    split = [re.split(r"(\d+)", name) for name in names]
    if any(len(parts) != len(split[0]) for parts in split):
        return False
    differing = [i for i in range(len(split[0])) if len({parts[i] for parts in split}) > 1]
    return len(differing) == 1 and differing[0] % 2 == 1 and not LAYER_NAME.search("".join(split[0][: differing[0]]))


def _hook_name(name: str) -> str:
    """A name as stores allow it: letters, digits, dots, underscores and dashes, beginning with a letter or digit."""
    return re.sub(r"^[^A-Za-z0-9]+", "", re.sub(r"[^A-Za-z0-9_.\-]", "_", name)) or "acts"


def _same_rows(hooks: Mapping[str, Rows]) -> None:
    first = next(iter(hooks.values()))
    for rows in hooks.values():
        if rows.n_rows != first.n_rows or not np.array_equal(_or_none(rows.lengths), _or_none(first.lengths)):
            raise PipelineError(
                f"{rows.where} has {rows.n_rows:,} rows and {first.where} {first.n_rows:,}, or their samples differ: "
                "arrays that are stored together must hold the same rows in the same order."
            )


def _or_none(lengths: np.ndarray | None) -> np.ndarray:
    return np.empty(0) if lengths is None else lengths


def _dtypes(dtype: str | Mapping[str, str] | None, hooks: Mapping[str, Rows]) -> dict[str, str]:
    own = {hook: "float32" if rows.dtype == "float64" else rows.dtype for hook, rows in hooks.items()}
    asked = dict.fromkeys(hooks, dtype) if isinstance(dtype, str) else dict(dtype or {})
    for kind in asked.values():
        if kind not in BYTES_PER_VALUE:
            raise PipelineError(f"dtype must be one of {', '.join(BYTES_PER_VALUE)}; got {kind!r}.")
    if unknown := asked.keys() - own.keys():
        raise PipelineError(f"dtype is given for {', '.join(unknown)}; the arrays are {', '.join(own)}.")
    return own | asked


# --- checking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Naming:
    """How rows and contexts are named: as slices of the array, so that anyone finds them there."""

    name: str
    rows: Rows
    samples: Samples

    def row(self, row: int) -> str:
        """`acts.npy[17, 42]` in an array of samples, else `acts.npy[3391]`."""
        if self.rows.lengths is None:
            return f"{self.name}[{row}]"
        sample = int(np.searchsorted(self.samples.starts, row, side="right")) - 1
        return f"{self.name}[{sample}, {row - int(self.samples.starts[sample])}]"

    def context(self, sample: int, start: int, stop: int) -> str:
        """The slice that a context holds: `acts.npy[17, 0:197]`, or `acts.npy[3349:3546]`."""
        if self.rows.lengths is None:
            return f"{self.name}[{start}:{stop}]"
        first = int(self.samples.starts[sample])
        return f"{self.name}[{sample}, {start - first}:{stop - first}]"


def _checked(hook: str, rows: Rows, dtype: str, keep: np.ndarray | None, naming: Naming) -> str:
    """SHA-256 of an array's numbers. Raises: PipelineError naming the first row that cannot be stored."""
    digest = sha256(f"{rows.dtype} {rows.n_rows} {rows.d_in}".encode())
    with progress(f"check {hook}", rows.n_rows, "row") as bar:
        for start, block in _slabs(rows):
            digest.update(np.ascontiguousarray(block).data)
            kept = slice(None) if keep is None else keep[start : start + len(block)]
            values = _floats(block, rows.dtype)
            largest = np.abs(values).max(axis=1)
            bad = ~(largest < np.float64(OVERFLOW[dtype]))
            if bad[kept].any():
                row = start + int(np.flatnonzero(bad if keep is None else bad & kept)[0])
                raise PipelineError(_why_not(naming.row(row), row, float(largest[row - start]), dtype))
            bar.update(len(block))
    return digest.hexdigest()


def _why_not(name: str, row: int, largest: float, dtype: str) -> str:
    if not np.isfinite(largest):
        what = "NaN" if np.isnan(largest) else "infinity"
        return (
            f"row {row:,} ({name}) holds {what}. Nothing was written. Correct it, or leave the row out with a mask "
            "(keep=FILE)."
        )
    wider = "bfloat16 or float32" if dtype == "float16" else "float32" if dtype == "bfloat16" else ""
    advice = f"Use --dtype {wider}." if wider else "No dtype of a store holds it."
    return f"row {row:,} ({name}) has magnitude {largest:g}, too large for {dtype}. Nothing was written. {advice}"


def _slabs(rows: Rows) -> Iterator[tuple[int, np.ndarray]]:
    each = max(1, SLAB_BYTES // (rows.d_in * 8))
    for start in range(0, rows.n_rows, each):
        yield start, rows.read(start, min(start + each, rows.n_rows))


def _floats(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The values of stored rows; bfloat16 is the upper half of a float32."""
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(store: ActivationStore, hooks: Mapping[str, Rows], plan: RowPlan, beside: Beside, naming: Naming) -> None:
    row_bytes = sum(rows.d_in for rows in hooks.values()) * 4
    total = sum(int((plan.stop - plan.start)[plan.contexts[split]].sum()) for split in SPLITS)
    with interruptible() as interrupt, progress("store", total, "row") as bar:
        for split in SPLITS:
            written = store.markers(split)
            for window in plan.windows(split, row_bytes):
                missing = {shard: contexts for shard, contexts in window.items() if shard not in written}
                for shard, arguments in _shards(missing, hooks, store.dtype, plan, beside, naming):
                    store.write_shard(split, shard, **arguments)
                    if interrupt.requested:
                        raise Interrupted(
                            f"stopped with every finished shard saved in {store.path}. Repeat the command to continue."
                        )
                bar.update(sum(int((plan.stop - plan.start)[contexts].sum()) for contexts in window.values()))
        store.finish()


def _shards(
    wanted: Mapping[int, np.ndarray],
    hooks: Mapping[str, Rows],
    dtypes: Mapping[str, str],
    plan: RowPlan,
    beside: Beside,
    naming: Naming,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The arguments of `write_shard` for some shards of a window, whose rows are read in the array's order."""
    order = np.sort(np.concatenate([np.empty(0, np.int64), *wanted.values()]))
    read = {hook: _contexts_of(rows, plan, order, dtypes[hook]) for hook, rows in hooks.items()}
    for shard, contexts in wanted.items():
        start, stop = plan.start[contexts], plan.stop[contexts]
        place = start[:, None] + np.arange(plan.seq_len)
        inside = place < stop[:, None]
        row = np.where(inside, place, 0)
        keep = inside if beside.keep is None else inside & beside.keep[row]
        if beside.tokens is not None:
            tokens = beside.tokens[row]
        else:
            first = naming.samples.starts[plan.sample[contexts]]
            tokens = row - first[:, None] if beside.meaning == POSITIONS else np.zeros_like(row)
        mine = np.searchsorted(order, contexts)
        yield (
            shard,
            {
                "acts": {hook: np.where(keep[..., None], block[mine], 0) for hook, block in read.items()},
                "tokens": np.where(inside, tokens, 0).astype(np.uint32),
                "keep": keep,
                "document": np.where(inside, contexts[:, None], -1).astype(np.int32),
                "documents": {int(c): _record(int(c), plan, beside, naming) for c in contexts},
                "cursor": {},
            },
        )


def _contexts_of(rows: Rows, plan: RowPlan, contexts: np.ndarray, dtype: str) -> np.ndarray:
    """Rows of ascending contexts [contexts, seq_len, d_in]; neighbouring contexts are read together.

    Rows of bfloat16 stay bits for a store of that dtype, and become floats for any other.
    """
    bits = rows.dtype == dtype == "bfloat16"
    stored = np.dtype(np.uint16) if bits else _floats(rows.read(0, 0), rows.dtype).dtype
    found = np.zeros((len(contexts), plan.seq_len, rows.d_in), stored)
    begin = 0
    while begin < len(contexts):
        end = begin + 1
        while end < len(contexts) and plan.start[contexts[end]] == plan.stop[contexts[end - 1]]:
            end += 1
        start = int(plan.start[contexts[begin]])
        block = rows.read(start, int(plan.stop[contexts[end - 1]]))
        block = block if bits else _floats(block, rows.dtype)
        for i in range(begin, end):
            low, high = (int(bound[contexts[i]]) - start for bound in (plan.start, plan.stop))
            found[i, : high - low] = block[low:high]
        begin = end
    return found


def _record(context: int, plan: RowPlan, beside: Beside, naming: Naming) -> DocumentRecord:
    """What is shown of a context: the name of its sample (an image, a text), its slice of the array, its label."""
    sample, start, stop = int(plan.sample[context]), int(plan.start[context]), int(plan.stop[context])
    if beside.names is not None:
        name = beside.names[sample]
    else:
        name = f"sample {sample}" if naming.samples.told else f"rows {start} to {stop - 1}"
    label = naming.name if beside.labels is None else beside.labels[sample]
    return DocumentRecord(name, naming.context(sample, start, stop), label, "")


def _provenance(
    source: ArraySource,
    chosen: Mapping[str, StoredArray],
    digests: Mapping[str, str],
    beside: Beside,
    samples: Samples,
    model: str,
) -> dict[str, Any]:
    """What determines a store's rows, under the keys that a harvested store has as well where that makes sense."""
    lengths = sha256(samples.lengths.tobytes()).hexdigest()
    everything = json.dumps([digests, beside.digest, lengths], sort_keys=True)
    return {
        "model": {"id": model, "kind": ARRAYS},
        "text": source.path.name,
        "text_sha256": sha256(everything.encode()).hexdigest(),
        "tokenizer_sha256": sha256(b"\0".join(beside.vocabulary)).hexdigest(),
        "arrays": {
            hook: {"name": array.where.rsplit("/", 1)[-1], "dtype": array.dtype, "shape": list(array.shape)}
            | {"sha256": digests[hook]}
            for hook, array in chosen.items()
        },
        "rows": {"tokens": beside.meaning, "images": beside.image_root},
        "samples": len(samples.lengths),
        "held_out": "the twentieth of the samples with the smallest SplitMix64 hashes of their numbers",
    }


def _report(
    report: Callable[[str], None],
    source: ArraySource,
    hooks: Mapping[str, Rows],
    samples: Samples,
    plan: RowPlan,
    beside: Beside,
    dtypes: Mapping[str, str],
) -> None:
    """Says what was found and how it is divided, before the work. Raises: PipelineError if a split keeps no row."""
    n_rows = next(iter(hooks.values())).n_rows
    kept = {}
    for split in SPLITS:
        lengths = (plan.stop - plan.start)[plan.contexts[split]]
        kept[split] = int(lengths.sum())
        if beside.keep is not None:
            kept[split] = sum(int(beside.keep[plan.start[c] : plan.stop[c]].sum()) for c in plan.contexts[split])
        if not kept[split]:
            raise PipelineError(f"{source.path}: the mask (keep) leaves no row in the {split} split.")
    unit = "samples" if samples.told else "blocks of neighbouring rows"
    held = ", ".join(f"{hook} [{n_rows:,}, {rows.d_in:,}] as {dtypes[hook]}" for hook, rows in hooks.items())
    report(f"{source.path}: {held}; {len(samples.lengths):,} {unit}")
    shorter = " (shorter samples are padded)" if int(samples.lengths.min()) < plan.seq_len else ""
    report(
        f"kept rows: {kept['train']:,} for training, {kept[HELD_OUT]:,} held out; contexts of {plan.seq_len}{shorter}"
    )
    if source.unread:
        shown = ", ".join(source.unread[:5]) + (" …" if len(source.unread) > 5 else "")
        report(f"not read: {len(source.unread)} other files ({shown})")
