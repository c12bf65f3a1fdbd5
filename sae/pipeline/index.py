"""Build a dictionary's feature index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.dictionary.autoencoder import SAE
from sae.indexing import build as indexing
from sae.indexing import over_ranks
from sae.lm import LanguageModel
from sae.parallel.launch import all_ranks
from sae.parallel.mesh import ONE, Mesh
from sae.pipeline.evaluate import spread
from sae.pipeline.resolve import model_with, opened, output_hook_point, store_of
from sae.text.tokenizer import token_bytes
from store.activation_reader import ActivationReader
from store.common import HELD_OUT, TRAIN, DocumentRecord, explaining_full_disk, read_ahead
from store.feature_parts import BlockFiles
from store.features import FeatureWriter
from store.shards import Marker


def index(
    sae: SAE | str | Path,
    *,
    store: str | Path | None = None,
    model: LanguageModel | str | None = None,
    tokens: int = 1_000_000,
    out: str | Path | None = None,
    device: str = "auto",
    kernels: str = "auto",
    over_ranks: bool = False,
) -> Path:
    """Builds the feature index (`features.zarr` next to the dictionary) over `tokens` tokens.

    These are the held-out ones, then training text spread evenly over the store. A feature's effect on the output is
    that of its decoder row at the hook point of x̂ (a transcoder's target). Where activations came as arrays, there is
    no model, and the index has no logit weights and no Δloss. If no linear map
    leads from the hook point to the logits, it has no logit weights and says why (`no_logit_weights`).
    With `over_ranks` the processes that torchrun started share the work, and all of them call this; the index must be
    on a file system that all of them see. It is that of one process, bit for bit.
    Raises: PipelineError if the store or the model is not the dictionary's.
    """
    with all_ranks(device) if over_ranks else nullcontext(ONE) as mesh:
        return _index(sae, store, model, tokens, out, device, kernels, mesh)


def _index(
    sae: SAE | str | Path,
    store: str | Path | None,
    model: LanguageModel | str | None,
    tokens: int,
    out: str | Path | None,
    device: str,
    kernels: str,
    mesh: Mesh,
) -> Path:
    dictionary, directory = opened(sae)
    acts = store_of(dictionary, directory, store)
    lm = model_with(dictionary, model, acts, device=device)
    path = Path(out) if out else (directory or Path(".")) / "features.zarr"
    with explaining_full_disk(path, lambda: "The unfinished index is removed; an earlier one stays."):
        return _build(dictionary, directory, lm, acts, path, tokens, device, kernels, mesh)


def _build(
    dictionary: SAE,
    directory: Path | None,
    lm: LanguageModel | None,
    acts: ActivationReader,
    path: Path,
    tokens: int,
    device: str,
    kernels: str,
    mesh: Mesh,
) -> Path:
    hook, written = dictionary.config["hook_point"], output_hook_point(dictionary)
    shards = spread_shards(acts, tokens)
    markers = {split: acts.markers(split) for split in (HELD_OUT, TRAIN)}
    contexts = sum(markers[split][shard].contexts for split, shard in shards)
    documents, renumbered = _documents_of(markers, shards)
    no_path = lm.why_no_path(written) if lm else None
    attributes = {
        "d_in": dictionary.d_in,
        "hook_point": hook,
        **({"target_hook_point": written} if dictionary.is_transcoder else {}),
        "model": lm.id if lm else acts.provenance["model"]["id"],
        "sae": directory.name if directory else dictionary.config.get("recipe", "sae"),
        "bos": lm.bos_id if lm else None,
        **({"no_logit_weights": no_path} if no_path else {}),
        **({} if lm else {"rows": acts.provenance["rows"]}),
        "heldout_contexts": sum(markers[split][shard].contexts for split, shard in shards if split == HELD_OUT),
        "provenance": {"store": acts.provenance, "recipe": dictionary.config.get("recipe")},
    }
    writers: list[FeatureWriter] = []

    def begin() -> str:
        writers.append(
            FeatureWriter(
                path,
                d_sae=dictionary.d_sae,
                seq_len=acts.seq_len,
                n_contexts=contexts,
                attributes=attributes,
                vocabulary=token_bytes(lm.tokenizer, lm.d_vocab) if lm else acts.vocabulary(),
                documents=documents,
            )
        )
        return str(writers[0].partial)

    def blocks(which: slice = slice(None)) -> Iterator[indexing.IndexBlock]:
        return _index_blocks(acts, hook, shards, renumbered, which)

    kept = BlockFiles(Path(mesh.on_first(begin)) / "spill" / "blocks")
    how: dict[str, Any] = {
        "hook_point": written,
        "tokens": contexts * acts.seq_len,
        "device": device,
        "kernels": kernels,
        "resampled": _resampled_at(directory) if directory else None,
    }
    try:
        if mesh.world == 1 and over_ranks.fits(dictionary):
            return indexing.index(dictionary, lm, blocks(), writers[0], **how)
        own, writer = blocks(slice(mesh.rank, None, mesh.world)), writers[0] if mesh.is_first else None
        over_ranks.index(dictionary, lm, own, blocks, kept, writer, **how, mesh=mesh)
        return path
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise


def _resampled_at(directory: Path) -> dict[int, int]:
    """The step at which each feature was last resampled."""
    log = directory / "resampled.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return {line["feature"]: line["step"] for line in map(json.loads, lines)}


def spread_shards(store: ActivationReader, tokens: int) -> list[tuple[str, int]]:
    """Held-out shards from the first one on, then training shards spread evenly, until `tokens` tokens are covered.

    A few long documents may fill the first training shards, so these alone would leave out domains of the text.
    """
    wanted = -(-tokens // store.rows_per_shard)
    held_out, train = (sorted(store.markers(split)) for split in (HELD_OUT, TRAIN))
    chosen = [(HELD_OUT, shard) for shard in held_out[:wanted]]
    return chosen + [(TRAIN, shard) for shard in spread(train, wanted - len(chosen))]


def _documents_of(
    markers: dict[str, dict[int, Marker]], shards: list[tuple[str, int]]
) -> tuple[list[DocumentRecord], np.ndarray]:
    """The documents of these shards, and the table from the store's document numbers to places in that list."""
    found: dict[int, DocumentRecord] = {}
    for split, shard in shards:
        found |= markers[split][shard].documents
    numbers = sorted(found)
    renumbered = np.full(max(numbers, default=0) + 2, -1, np.int32)  # the last entry is for padding, which is -1
    renumbered[numbers] = np.arange(len(numbers), dtype=np.int32)
    return [found[n] for n in numbers], renumbered


def _index_blocks(
    store: ActivationReader, hook_point: str, shards: list[tuple[str, int]], renumbered: np.ndarray, which: slice
) -> Iterator[indexing.IndexBlock]:
    """One block for each of these shards that holds text, or for those of a slice of them."""
    markers = {split: store.markers(split) for split in dict.fromkeys(split for split, _ in shards)}
    counts = [markers[split][shard].contexts for split, shard in shards]
    firsts = np.cumsum([0, *counts]).tolist()
    filled = [(first, place) for first, place, n in zip(firsts, shards, counts, strict=False) if n]

    def read(entry: tuple[int, tuple[str, int]]) -> indexing.IndexBlock:
        first_context, place = entry
        contexts, acts = store.read_contexts(*place), store.read_acts(*place, hook_point)
        document = renumbered[contexts.document]
        return indexing.IndexBlock(first_context, torch.from_numpy(acts), contexts.tokens, contexts.keep, document)

    return read_ahead(read, filled[which])
