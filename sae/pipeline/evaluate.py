"""Evaluate a dictionary on held-out text, and the blocks of a store that evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.dictionary.autoencoder import SAE
from sae.dictionary.inference import FrozenSAE
from sae.evaluation import evaluate as evaluation
from sae.evaluation.outliers import fvu_of_all_rows
from sae.jobs.checkpoint import write_tensors
from sae.lm import LanguageModel
from sae.parallel.launch import all_ranks
from sae.parallel.mesh import ONE, Mesh
from sae.parallel.shares import shared_out
from sae.pipeline.crosscoders import evaluate_crosscoder
from sae.pipeline.donors import donors
from sae.pipeline.errors import PipelineError
from sae.pipeline.resolve import model_with, opened, output_hook_point, store_of
from store.activation_reader import ActivationReader
from store.common import HELD_OUT, TRAIN, write_json

CHOOSING_TOKENS = 65_536
SPREAD_SHARDS = 64  # a few contexts are taken from each, because one shard holds few documents


def evaluate(
    sae: SAE | str | Path,
    *,
    store: str | Path | None = None,
    model: LanguageModel | str | None = None,
    device: str = "auto",
    kernels: str = "auto",
    ablated: evaluation.Ablated | None = None,
    over_ranks: bool = False,
) -> dict[str, Any]:
    """Evaluates a dictionary on the store's held-out split; writes eval.json and feature_stats.safetensors next to it.

    A dictionary given by its path names its store and model. A transcoder's ŷ takes the place of y, at its target hook
    point. A crosscoder is measured at each of its sites, on its own stores and with their models; sites.safetensors
    gets the shares of each feature's decoder norms. Where activations came as arrays there is no model to run, and the
    metrics of its losses are left out.
    To measure several dictionaries of one store and output hook point, pass each the same `ablated`, {} at
    first: what does not depend on the dictionary is then computed once.
    With `over_ranks` the processes that torchrun started share the text, and all of them call this: the result is that
    of one process, bit for bit.
    Raises: PipelineError if the store or the model is not the dictionary's.
    """
    with all_ranks(device) if over_ranks else nullcontext(ONE) as mesh:
        return _evaluate(sae, store, model, device, kernels, ablated, mesh)


def _evaluate(
    sae: SAE | str | Path,
    store: str | Path | None,
    model: LanguageModel | str | None,
    device: str,
    kernels: str,
    ablated: evaluation.Ablated | None,
    mesh: Mesh,
) -> dict[str, Any]:
    dictionary, directory = opened(sae)
    if dictionary.is_crosscoder:
        if store is not None or directory is None:
            raise PipelineError(
                "a crosscoder is evaluated on the stores that its config.json names: give its directory, and no store."
            )
        return evaluate_crosscoder(dictionary, directory, model, device, kernels, mesh)
    acts = store_of(dictionary, directory, store)
    lm = model_with(dictionary, model, acts, device=device)
    read, replaced = dictionary.config["hook_point"], output_hook_point(dictionary)
    target = replaced if dictionary.is_transcoder else None
    heldout = acts.totals(HELD_OUT, replaced)
    domains = sorted({entry[2] for entry in acts.documents(HELD_OUT).values()})

    def heldout_blocks(store: ActivationReader = acts) -> Iterator[evaluation.Block]:
        return eval_blocks(store, read, domains, HELD_OUT, sorted(store.markers(HELD_OUT)), target, mesh=mesh)

    result, stats = evaluation.evaluate(
        dictionary,
        lm,
        evaluation.Blocks(heldout_blocks),
        training=choosing_blocks(acts, read, domains, mesh),
        hook_point=replaced,
        heldout_mean=heldout.mean,
        train_mean=acts.totals(TRAIN, replaced).mean,
        donors=donors(acts, replaced),
        domains=domains,
        kept_tokens=heldout.kept_rows,
        device=device,
        kernels=kernels,
        ablated=ablated if acts.row_filter.is_off else None,  # other rows, other losses
        mesh=mesh,
    )
    if not acts.row_filter.is_off:
        everything = acts.whole.totals(HELD_OUT, replaced)
        placed = FrozenSAE(dictionary, device, kernels)
        of_all_rows = fvu_of_all_rows(placed, heldout_blocks(acts.whole), everything.mean, mesh)
        result["row_filter"] = {
            **acts.row_filter.to_json(),
            "rows": heldout.kept_rows,
            "rows_left_out": everything.kept_rows - heldout.kept_rows,
            "fvu_all_rows": of_all_rows,
        }

    def write() -> dict[str, Any]:
        if directory:
            counted = {"tokens": heldout.kept_rows, "split": HELD_OUT}
            write_tensors(directory / "feature_stats.safetensors", stats, counted)
            write_json(directory / "eval.json", result)  # last: a sweep takes its presence for a finished evaluation
        return result

    return mesh.on_first(write)


def choosing_blocks(
    store: ActivationReader, hook_point: str, domains: list[str], mesh: Mesh = ONE
) -> Iterator[evaluation.Block]:
    """Training contexts to choose each domain's feature on, spread over the whole store."""
    shards, every = thinned(store, TRAIN, CHOOSING_TOKENS)
    return eval_blocks(store, hook_point, domains, TRAIN, shards, every=every, mesh=mesh)


def thinned(store: ActivationReader, split: str, tokens: int) -> tuple[list[int], int]:
    """Shards spread evenly over a split, and n: one in n of their contexts makes at least about `tokens` tokens."""
    shards = sorted(store.markers(split))
    chosen = spread(shards, SPREAD_SHARDS)
    return chosen, max(1, len(chosen) * store.rows_per_shard // tokens)


def spread(shards: list[int], most: int) -> list[int]:
    """At most that many of the shards, evenly spaced from the first one on."""
    n = min(len(shards), most)
    return [shards[i * len(shards) // n] for i in range(n)]


def eval_blocks(
    store: ActivationReader,
    hook_point: str,
    domains: list[str],
    split: str,
    shards: list[int],
    target: str | None = None,
    *,
    every: int = 1,
    mesh: Mesh = ONE,
) -> Iterator[evaluation.Block]:
    """Contexts of this rank's part of some shards, one in `every`; with y if there is a target hook point."""
    markers = store.markers(split)
    documents = {int(n): entry for shard in shards for n, entry in markers[shard].documents.items()}
    lookup = np.full(max(documents, default=0) + 2, -1)
    for number, entry in documents.items():
        lookup[number] = domains.index(entry[2]) if entry[2] in domains else -1
    filled = {shard: markers[shard].contexts for shard in shards if markers[shard].contexts}  # the text may end before
    for shard, skipped in shared_out(filled, mesh):
        contexts = store.read_contexts(split, shard)
        acts, wanted = (
            torch.from_numpy(store.read_acts(split, shard, hook)).view(*contexts.tokens.shape, -1)[::every]
            if hook
            else None
            for hook in (hook_point, target)
        )
        assert acts is not None
        yield evaluation.Block(
            acts,
            torch.from_numpy(contexts.tokens[::every].astype(np.int64)),
            torch.from_numpy(contexts.keep[::every]),
            lookup[contexts.document[::every]],
            wanted,
            skipped,
        )
