"""The pipeline as functions: one per verb of the `sae` command, to call from scripts. The only importer of `store`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae import evaluation, harvesting, indexing, recipes, training
from sae.checkpoint import read_tensors, write_json, write_tensors
from sae.config import TrainConfig
from sae.documents import HELD_OUT, TRAIN
from sae.interop import saelens
from sae.kernels import choose
from sae.lm import LanguageModel, load_model
from sae.model import SAE, load, save
from sae.rows import Batch, Rows
from sae.text import TextSource, combine, open_text
from sae.tokenizer import token_bytes
from store.activations import ActivationStore
from store.batches import ShuffledRows
from store.features import FeatureIndex, FeatureWriter

DEFAULT_HOOK_POINT = "blocks.0.mlp.hook_post"
EXPORT_FORMATS = ("native", "sae-lens")
BYTES_PER_VALUE = {"float16": 2, "bfloat16": 2, "float32": 4}


class PipelineError(ValueError):
    """The pieces given do not belong together, or there is no room for the work."""


# --- harvest ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """What a harvest will take on disk, against what is free."""

    rows: int
    disk_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        return f"{self.rows:,} rows, {self.disk_bytes / 1e9:.2f} GB on disk ({self.free_bytes / 1e9:.1f} GB free)"


def forecast_harvest(plan: harvesting.Plan, widths: Sequence[int], dtype: str, out: Path) -> Forecast:
    rows = sum(plan.tokens.values())
    row_bytes = sum(widths) * BYTES_PER_VALUE[dtype] + 9  # 9: token, keep and document number
    folder = next(p for p in (out, *out.absolute().parents) if p.exists())
    return Forecast(rows, rows * row_bytes, shutil.disk_usage(folder).free)


def harvest(
    model: LanguageModel | str,
    text: str | Path | TextSource | Sequence[str | Path],
    out: str | Path,
    *,
    tokens: int,
    hook_points: Sequence[str] = (DEFAULT_HOOK_POINT,),
    dtype: str = "float16",
    heldout_tokens: int | None = None,
    seq_len: int | None = None,
    device: str = "cpu",
) -> Path:
    """Streams the activations of `tokens` tokens (and a frozen held-out split) into a Zarr store at `out`.

    Repeat the call to go on after an interruption: committed shards stay, the result is the same byte for byte.
    Raises: PipelineError when the disk is too small; StoreError when `out` is another store; TextError for bad text.
    """
    lm = load_model(model, device=device) if isinstance(model, str) else model
    source = _source(text)
    out = Path(out)
    seq_len = seq_len or min(256, lm.context_tokens)
    if seq_len > lm.context_tokens:
        raise PipelineError(f"seq_len = {seq_len} is more than {lm.id}'s context of {lm.context_tokens} tokens.")
    if dtype not in BYTES_PER_VALUE:
        raise PipelineError(f"dtype must be one of {', '.join(BYTES_PER_VALUE)}; got {dtype!r}.")
    widths = {hook_point: lm.hook_width(hook_point) for hook_point in hook_points}
    plan = harvesting.plan(tokens, heldout_tokens or harvesting.default_heldout_tokens(tokens), seq_len)
    forecast = forecast_harvest(plan, list(widths.values()), dtype, out)
    if not out.exists() and forecast.disk_bytes > forecast.free_bytes:
        raise PipelineError(f"harvest needs {forecast}. Lower --tokens, or choose another disk with --out.")
    store = ActivationStore.create(
        out,
        hook_points=widths,
        seq_len=seq_len,
        contexts_per_shard=plan.contexts_per_shard,
        n_shards=plan.n_shards,
        dtype=dtype,
        provenance=_provenance(lm, source),
    )
    if store.is_complete:
        return out
    with store.hold():
        harvesting.harvest(lm, source, store)  # type: ignore[arg-type]
    return out


def _source(text: str | Path | TextSource | Sequence[str | Path]) -> TextSource:
    if isinstance(text, TextSource):
        return text
    if isinstance(text, str | Path):
        return open_text(text)
    return combine([open_text(spec) for spec in text])


def _provenance(lm: LanguageModel, source: TextSource) -> dict[str, Any]:
    from hashlib import sha256

    return {
        "model": lm.identity(),
        "tokenizer_sha256": sha256(lm.tokenizer.to_str().encode()).hexdigest(),
        "text": source.name,
        "text_sha256": source.fingerprint,
        "bos": "one BOS before each document; BOS rows are stored and not kept",
        "weight_processing": "none",
        "held_out": "documents with blake2b(text) mod 20 == 0",
    }


# --- train -----------------------------------------------------------------------------------------------------------


class StoreRows:
    """Training rows from an activation store."""

    def __init__(self, store: ActivationStore, hook_point: str, *, batch_tokens: int, seed: int) -> None:
        self._rows = ShuffledRows(store, hook_point, batch_rows=batch_tokens, seed=seed)
        self.d_in, self.n_rows = self._rows.d_in, self._rows.n_rows

    def batch(self, step: int) -> Batch:
        return Batch(torch.from_numpy(self._rows.batch(step)))

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        return torch.from_numpy(self._rows.sample(min(n, self.n_rows), seed))


def train(
    rows: str | Path | Rows,
    out: str | Path,
    *,
    recipe: str = "topk",
    d_sae: int = 4096,
    tokens: int | None = None,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    hook_point: str | None = None,
    kernels: str = "auto",
) -> SAE:
    """Trains a dictionary on a store (its path) or any `Rows`; `config` overrides the recipe's settings.

    `tokens` is the number of rows seen (default: four epochs of a store, 4M of other rows).
    Repeat the call to go on after an interruption: the result is the same bit for bit.
    Raises: ValueError for wrong settings, before any work; Interrupted on Ctrl-C or SIGTERM.
    """
    overrides = {"d_sae": d_sae, "seed": seed, **(config or {})}
    tokens = overrides.pop("tokens", tokens)
    if not isinstance(rows, str | Path):
        _, resolved = recipes.resolve(recipe, tokens=tokens or TrainConfig.tokens, **overrides)
        return training.train(rows, out, resolved, kernels=kernels)
    store = ActivationStore.open(rows)
    hook = _hook_point(store, hook_point)
    kept_rows = store.totals(TRAIN, hook).kept_rows
    _, resolved = recipes.resolve(recipe, tokens=tokens or 4 * kept_rows, **overrides)
    source = StoreRows(store, hook, batch_tokens=resolved.batch_tokens, seed=resolved.seed)
    provenance = {
        "hook_point": hook,
        "model": store.provenance["model"],
        "store": {
            "path": os.path.relpath(store.path, out),
            "tokenizer_sha256": store.provenance["tokenizer_sha256"],
            "text": store.provenance["text"],
            "text_sha256": store.provenance["text_sha256"],
            "kept_rows": kept_rows,
        },
    }
    return training.train(source, out, resolved, provenance=provenance, kernels=kernels)


def _hook_point(store: ActivationStore, asked: str | None) -> str:
    names = list(store.hook_points)
    if asked is None and len(names) == 1:
        return names[0]
    if asked not in names:
        raise PipelineError(f"{store.path} holds the hook points {', '.join(names)}; got {asked!r}. Name one of them.")
    return asked


# --- evaluate, index -------------------------------------------------------------------------------------------------


def evaluate(
    sae: SAE | str | Path, *, store: str | Path | None = None, model: LanguageModel | str | None = None
) -> dict:
    """Evaluates a dictionary on the store's held-out split; writes eval.json and feature_stats.safetensors beside it.

    A path finds its own store and model. Raises: PipelineError when the store or model is not the dictionary's.
    """
    dictionary, directory = _opened(sae)
    acts = _store_of(dictionary, directory, store)
    lm = _model_of(dictionary, model)
    hook = dictionary.config["hook_point"]
    heldout = acts.totals(HELD_OUT, hook)
    domains = sorted({entry[2] for entry in acts.documents(HELD_OUT).values()})
    result, stats = evaluation.evaluate(
        dictionary,
        lm,
        _eval_blocks(acts, hook, domains),
        hook_point=hook,
        heldout_mean=heldout.mean,
        train_mean=acts.totals(TRAIN, hook).mean,
        domains=domains,
        kept_tokens=heldout.kept_rows,
    )
    if directory:
        write_json(directory / "eval.json", result)
        write_tensors(directory / "feature_stats.safetensors", stats, {"tokens": heldout.kept_rows, "split": HELD_OUT})
    return result


def _eval_blocks(store: ActivationStore, hook_point: str, domains: list[str]) -> Iterator[evaluation.Block]:
    number = {domain: i for i, domain in enumerate(domains)}
    table = {n: number[entry[2]] for n, entry in store.documents(HELD_OUT).items()}
    lookup = np.full(max(table, default=0) + 2, -1)
    lookup[list(table)] = list(table.values())
    for shard in sorted(store.markers(HELD_OUT)):
        acts = store.read_acts(HELD_OUT, shard, hook_point)
        contexts = store.read_contexts(HELD_OUT, shard)
        if not len(contexts.tokens):  # the text was over before this shard
            continue
        yield evaluation.Block(
            torch.from_numpy(acts).view(*contexts.tokens.shape, -1),
            torch.from_numpy(contexts.tokens.astype(np.int64)),
            torch.from_numpy(contexts.keep),
            lookup[contexts.document],
        )


def index(
    sae: SAE | str | Path,
    *,
    store: str | Path | None = None,
    model: LanguageModel | str | None = None,
    tokens: int = 1_000_000,
    out: str | Path | None = None,
) -> Path:
    """Builds the feature index (`features.zarr` beside the dictionary) over `tokens` tokens, held-out ones first.

    Raises: PipelineError when the store or model is not the dictionary's.
    """
    dictionary, directory = _opened(sae)
    acts = _store_of(dictionary, directory, store)
    lm = _model_of(dictionary, model)
    hook = dictionary.config["hook_point"]
    path = Path(out) if out else (directory or Path(".")) / "features.zarr"
    shards = _first_shards(acts, tokens)
    markers = {split: acts.markers(split) for split in (HELD_OUT, TRAIN)}
    contexts = sum(markers[split][shard].contexts for split, shard in shards)
    documents, renumbered = _documents_of(acts, shards)
    writer = FeatureWriter(
        path,
        d_sae=dictionary.d_sae,
        seq_len=acts.seq_len,
        n_contexts=contexts,
        attributes={
            "d_in": dictionary.d_in,
            "hook_point": hook,
            "model": lm.id,
            "sae": directory.name if directory else dictionary.config.get("recipe", "sae"),
            "bos": lm.bos_id,
            "heldout_contexts": sum(
                acts.markers(split)[shard].contexts for split, shard in shards if split == HELD_OUT
            ),
            "provenance": {"store": acts.provenance, "recipe": dictionary.config.get("recipe")},
        },
        vocabulary=token_bytes(lm.tokenizer),
        documents=documents,
    )
    blocks = _index_blocks(acts, hook, shards, renumbered)
    try:
        return indexing.index(dictionary, lm, blocks, writer, hook_point=hook, tokens=contexts * acts.seq_len)
    except BaseException:
        writer.abandon()
        raise


def _first_shards(store: ActivationStore, tokens: int) -> list[tuple[str, int]]:
    """Held-out shards, then training shards, until `tokens` tokens are covered."""
    chosen: list[tuple[str, int]] = []
    for split in (HELD_OUT, TRAIN):
        for shard in sorted(store.markers(split)):
            if len(chosen) * store.rows_per_shard >= tokens:
                return chosen
            chosen.append((split, shard))
    return chosen


def _documents_of(
    store: ActivationStore, shards: list[tuple[str, int]]
) -> tuple[list[tuple[str, str, str, str]], np.ndarray]:
    """The documents of these shards, and a table from the store's numbers to their place in that list."""
    tables = {split: store.markers(split) for split in {split for split, _ in shards}}
    found: dict[int, tuple[str, str, str, str]] = {}
    for split, shard in shards:
        found |= {int(n): tuple(entry) for n, entry in tables[split][shard].documents.items()}  # type: ignore[misc]
    numbers = sorted(found)
    renumbered = np.full(max(numbers, default=0) + 2, -1, np.int32)  # the last entry answers padding's -1
    renumbered[numbers] = np.arange(len(numbers), dtype=np.int32)
    return [found[n] for n in numbers], renumbered


def _index_blocks(
    store: ActivationStore, hook_point: str, shards: list[tuple[str, int]], renumbered: np.ndarray
) -> Iterator[indexing.IndexBlock]:
    first_context = 0
    for split, shard in shards:
        contexts = store.read_contexts(split, shard)
        if not len(contexts.tokens):
            continue
        acts = torch.from_numpy(store.read_acts(split, shard, hook_point))
        yield indexing.IndexBlock(first_context, acts, contexts.tokens, contexts.keep, renumbered[contexts.document])
        first_context += len(contexts.tokens)


def _opened(sae: SAE | str | Path) -> tuple[SAE, Path | None]:
    return (sae, None) if isinstance(sae, SAE) else (load(sae), Path(sae))


def _store_of(sae: SAE, directory: Path | None, asked: str | Path | None) -> ActivationStore:
    if asked is None:
        held = sae.config.get("store", {}).get("path")
        if held is None or directory is None:
            raise PipelineError("this dictionary does not say which store it was trained on; name one (--acts).")
        asked = Path(os.path.normpath(directory / held))
    store = ActivationStore.open(asked)
    ours, theirs = sae.config.get("model", {}), store.provenance["model"]
    if ours and ours.get("sha256") != theirs.get("sha256"):
        raise PipelineError(
            f"{store.path} holds activations of {theirs['id']} (weights {theirs['sha256'][:12]}…), the dictionary was "
            f"trained on {ours['id']} ({ours['sha256'][:12]}…). Harvest that model's activations first."
        )
    return store


def _model_of(sae: SAE, asked: LanguageModel | str | None) -> LanguageModel:
    if isinstance(asked, LanguageModel):
        return asked
    ours = sae.config.get("model", {})
    if asked is None and "id" not in ours:
        raise PipelineError("this dictionary does not say which model it belongs to; name one (--model).")
    lm = load_model(asked or ours["id"])
    if asked is None and lm.weights_sha256 != ours["sha256"]:
        raise PipelineError(
            f"the model {lm.id} has changed since the dictionary was trained: weights {lm.weights_sha256[:12]}…, "
            f"expected {ours['sha256'][:12]}…. Name the right one (--model)."
        )
    return lm


# --- export ----------------------------------------------------------------------------------------------------------


def export(sae: SAE | str | Path, format: str, out: str | Path) -> Path:
    """Writes the dictionary as safetensors: `native` (sae.safetensors + config.json) or `sae-lens` (SAELens' layout).

    Raises: PipelineError for an unknown format or an `out` that already holds files.
    """
    dictionary, _ = _opened(sae)
    out = Path(out)
    if format not in EXPORT_FORMATS:
        raise PipelineError(f"export: format must be one of {', '.join(EXPORT_FORMATS)}; got {format!r}.")
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise PipelineError(f"export: {out} is {'a file' if out.is_file() else 'not empty'}; choose another --out.")
    if format == "sae-lens":
        return saelens.write(dictionary, out)
    return save(dictionary, out, dictionary.config)


# --- steering inputs, descriptions -----------------------------------------------------------------------------------


def open_pair(directory: str | Path, model: str | None = None) -> tuple[SAE, LanguageModel]:
    """A dictionary and the model it belongs to."""
    dictionary = load(directory)
    return dictionary, _model_of(dictionary, model)


def feature_max(directory: str | Path) -> np.ndarray:
    """Largest held-out activation of each feature, from feature_stats.safetensors (written by evaluate)."""
    path = Path(directory) / "feature_stats.safetensors"
    if not path.is_file():
        raise PipelineError(f"{path} is missing; `sae eval {directory}` writes it.")
    return read_tensors(path)[0]["max"].numpy()


def describe(path: str | Path) -> dict[str, Any]:
    """What an artefact is: a dictionary, an activation store, a feature index, a model, or a run holding them.

    Raises: PipelineError when it is none.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        import json

        config = json.loads((path / "config.json").read_text())
        if isinstance(config, dict) and config.get("kind") == "sae":
            here = choose()
            kernels = {"kernels_here": f"{here.NAME}: {here.describe()}"}
            return {"kind": "sae", **{k: v for k, v in config.items() if k != "kind"}, **kernels}
        return {"kind": "model", **config}
    if path.name.endswith(".zarr") and (path / "firings").is_dir():
        found = FeatureIndex.open(path)
        return {**found.attributes, "kind": "feature index", "contexts": found.n_contexts}
    if path.name.endswith(".zarr"):
        return _describe_store(ActivationStore.open(path))
    inside = sorted(p for p in path.glob("*") if p.name.endswith(".zarr") or (p / "config.json").is_file())
    if not inside:
        raise PipelineError(f"{path}: no dictionary, activation store, feature index or model here.")
    return {"kind": "run", "holds": [p.name for p in inside]}


def _describe_store(store: ActivationStore) -> dict[str, Any]:
    splits = {}
    for split in (HELD_OUT, TRAIN):
        markers = store.markers(split)
        splits[split] = {
            "shards": f"{len(markers)} of {store.n_shards[split]}",
            "kept_rows": sum(marker.kept_rows for marker in markers.values()),
        }
    return {
        "kind": "activation store",
        "complete": store.is_complete,
        "hook_points": store.hook_points,
        "dtype": store.dtype,
        "seq_len": store.seq_len,
        "splits": splits,
        "provenance": store.provenance,
    }


def verify(path: str | Path) -> list[str]:
    """Checks every checksum of an activation store; returns the problems as sentences."""
    return ActivationStore.open(path).verify()
