"""Rows of a store for the trainer, and the record of where they come from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.jobs.ranks import rank_and_world
from sae.parallel.mesh import ONE, Mesh
from sae.pipeline.errors import PipelineError
from sae.pipeline.live import check_target, resid_mid_of
from sae.pipeline.resident_rows import ResidentRows, fitting, memory_for_rows
from sae.pipeline.resolve import model_in, row_filter_progress
from sae.training import recipes
from sae.training.config import TrainConfig
from sae.training.rows import Batch, Downstream
from store.activation_reader import ActivationReader
from store.activations import ActivationStore
from store.batches import ShuffledRows
from store.common import TRAIN, contexts_begin_with_bos
from store.filtered import FilteredStore, median_norm
from store.lane_rows import LaneRows

SHUFFLE_BYTES = 10**9  # default memory for rows


class StoreRows:
    """Training rows from an activation store: x, and what else a recipe needs of the same tokens.

    Each of `world` data-parallel ranks gets its own rows; all ranks together see every kept row once per epoch. On a
    `device` with room for them rows lie there as they are stored (`sae.pipeline.resident_rows`), and batches are
    tensors of it; which rows a batch has does not depend on that. `device_bytes` is asked for the room when rows are
    first needed.
    With `lanes` each rank reads its own shards alone (`store.lane_rows`), from the host's memory, and the ranks of
    `mesh` put their parts of a sample together.
    """

    def __init__(
        self,
        store: ActivationReader,
        hook_point: str,
        *,
        batch_tokens: int,
        seed: int,
        target_hook_point: str | None = None,
        resid_hook_point: str | None = None,
        downstream: Downstream | None = None,
        max_ram_bytes: int = SHUFFLE_BYTES,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
        device_bytes: Callable[[], int] = lambda: 0,
        lanes: int = 0,
        mesh: Mesh = ONE,
    ) -> None:
        others = [hook for hook in (target_hook_point, resid_hook_point) if hook]
        total_width = sum(store.hook_points[hook] for hook in (hook_point, *others))
        common: dict[str, Any] = {"batch_rows": batch_tokens, "seed": seed, "rank": rank, "world": world}

        def rows(hook: str, **pools: Any) -> ShuffledRows | LaneRows:
            if lanes:
                return LaneRows(store, hook, lanes=lanes, **common, **pools)
            return ShuffledRows(store, hook, **common, **pools)

        self._rows = rows(hook_point, memory_bytes=max_ram_bytes * store.hook_points[hook_point] // total_width)
        pools = _pools_of(self._rows)
        self._targets = rows(target_hook_point, **pools) if target_hook_point else None
        self._streams = rows(resid_hook_point, **pools) if resid_hook_point else None
        self._mesh, self.samples_together = mesh, bool(lanes) and world > 1
        self.d_in, self.n_rows = self._rows.d_in, self._rows.n_rows
        self.d_out = self._targets.d_in if self._targets else self.d_in
        self.downstream, self._device, self._device_bytes = downstream, device, device_bytes

    @cached_property
    def _resident(self) -> tuple[ResidentRows | None, ...]:
        """x, y and resid on the device; nothing if it has no room."""
        sources = [self._rows, self._targets, self._streams]
        shuffled = [rows for rows in sources if isinstance(rows, ShuffledRows)]
        held = fitting(shuffled, self._device_bytes()) if self._device and shuffled else None
        return tuple(
            ResidentRows(rows, self._device, everything=held == "all")
            if isinstance(rows, ShuffledRows) and held and self._device
            else None
            for rows in sources
        )

    def batch(self, step: int) -> Batch:
        if self._resident[0] is not None:
            x, mixing = self._resident[0].batch(step)
            y, resid = (rows.batch(step)[0] if rows else None for rows in self._resident[1:])
            return Batch(x, y, resid, mixing)
        drawn = self._rows.draw(step)
        y, resid = (torch.from_numpy(rows.batch(step)) if rows else None for rows in (self._targets, self._streams))
        return Batch(torch.from_numpy(drawn.rows), y, resid, lambda: self._rows.mixing(drawn.contexts))

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        return self._sample(0, self._rows, n, seed)

    def _sample(self, place: int, source: ShuffledRows | LaneRows, n: int, seed: int) -> Tensor:
        resident, n = self._resident[place], min(n, self.n_rows)
        if resident is not None:
            return resident.sample(n, seed)
        drawn = torch.from_numpy(source.sample(n, seed))
        return self._mesh.joined(drawn, source.sample_lengths(n)) if isinstance(source, LaneRows) else drawn

    def sample_targets(self, n: int, seed: int) -> Float[Tensor, "n d_out"]:
        """y of the rows that `sample` draws."""
        if self._targets is None:
            raise PipelineError("this recipe predicts y from x: name the hook point of x, then that of y.")
        return self._sample(1, self._targets, n, seed)


def _pools_of(rows: ShuffledRows | LaneRows) -> dict[str, Any]:
    """The pools of x for other hook points, so that row n of each belongs to the same token."""
    if isinstance(rows, LaneRows):
        return {"plans": rows.plans}
    return {"pool_shards": rows.pool_shards, "parts": rows.parts}


def open_rows(
    path: str | Path,
    *,
    batch_tokens: int,
    hook_point: str | None = None,
    seed: int = 0,
    rank: int | None = None,
    world: int | None = None,
    max_ram_bytes: int = SHUFFLE_BYTES,
) -> StoreRows:
    """Rows of a store for a training loop of your own, in one process or in one of many ranks.

    `batch_tokens` is the number of rows that one rank gets per step; `rank` and `world` default to RANK and WORLD_SIZE,
    which torchrun sets, else to 0 and 1. All ranks together see every kept row once per epoch.
    Raises: StoreError for a damaged store or a wrong rank; PipelineError for a wrong hook point.
    """
    own_rank, own_world = rank_and_world()
    store = ActivationStore.open(path)
    return StoreRows(
        store,
        hook_point_of(store, hook_point),
        batch_tokens=batch_tokens,
        seed=seed,
        max_ram_bytes=max_ram_bytes,
        rank=own_rank if rank is None else rank,
        world=own_world if world is None else world,
    )


def training_view(store: ActivationReader, hook: str, config: TrainConfig, *others: str | None) -> ActivationReader:
    """The store without the rows that the run leaves out; the store itself if it leaves none out.

    Other hook points that are read as well, and count in `max_norm_multiple`, are named in `others`.
    """
    wanted = config.row_filter
    if wanted.is_off:
        return store
    hooks = [hook, *(other for other in others if other)]
    if wanted.max_norm_multiple:
        wanted = replace(wanted, median_norms={name: median_norm(store, name, wanted) for name in hooks})
    return FilteredStore(store, wanted, hooks, row_filter_progress)


def rows_for(
    store: ActivationReader,
    hook: str,
    config: TrainConfig,
    target_hook_point: str | None,
    max_ram_bytes: int = SHUFFLE_BYTES,
    device: torch.device | None = None,
    mesh: Mesh = ONE,
    d_sae: int = 0,
) -> StoreRows:
    """The rows that a recipe trains on: this rank's part of each batch, on a CUDA device if that has room for them.

    Besides them the device holds this rank's part of `d_sae` features: of the dictionary (0), or of all of a sweep.

    Raises: PipelineError when the store lacks a hook point that it needs.
    """
    check_target(config.recipe, target_hook_point)
    resid, downstream = None, None
    if recipes.recipe_named(config.recipe).needs == "resid":
        downstream = model_in(store).downstream(hook)
        resid = hook_point_of(store, resid_mid_of(hook))
    batch_tokens = config.batch_tokens // mesh.world
    return StoreRows(
        store,
        hook,
        batch_tokens=batch_tokens,
        seed=config.seed,
        target_hook_point=hook_point_of(store, target_hook_point) if target_hook_point else None,
        resid_hook_point=resid,
        downstream=downstream,
        max_ram_bytes=max_ram_bytes,
        rank=mesh.rank,
        world=mesh.world,
        lanes=config.row_lanes,
        mesh=mesh,
        **room_beside(device, store.hook_points[hook], (d_sae or config.d_sae) // mesh.shards, batch_tokens),
    )


def room_beside(device: torch.device | None, d_in: int, d_sae: int, batch_tokens: int) -> dict[str, Any]:
    """The device for rows, a CUDA device or none, and how much room a run of this size leaves there for them."""
    if device is None or device.type != "cuda":
        return {}
    free = torch.cuda.mem_get_info
    return {"device": device, "device_bytes": lambda: memory_for_rows(free(device)[0], d_in, d_sae, batch_tokens)}


def provenance_of(
    store: ActivationReader,
    hook: str,
    out: str | Path,
    target_hook_point: str | None = None,
    max_ram_bytes: int = SHUFFLE_BYTES,
) -> dict[str, Any]:
    """Where a dictionary's rows come from, for its config.json."""
    return {
        "hook_point": hook,
        **({"target_hook_point": target_hook_point} if target_hook_point else {}),
        "model": store.provenance["model"],
        "store": {
            "path": os.path.relpath(store.path, out),
            "tokenizer_sha256": store.provenance["tokenizer_sha256"],
            "text": store.provenance["text"],
            "text_sha256": store.provenance["text_sha256"],
            **({"bos": store.provenance["bos"]} if contexts_begin_with_bos(store.provenance) else {}),
            "kept_rows": store.totals(TRAIN, hook).kept_rows,
            "rows_sha256": store.fingerprint(TRAIN),  # a ring replaces its rows, in the same number
            "max_ram_bytes": max_ram_bytes,  # decides their order
        },
        **({} if store.row_filter.is_off else {"row_filter": store.row_filter.to_json()}),
    }


def hook_point_of(store: ActivationReader, asked: str | None) -> str:
    """The hook point asked for, or the store's only one. Raises: PipelineError for an unknown or missing name."""
    names = list(store.hook_points)
    if asked is None and len(names) == 1:
        return names[0]
    if asked not in names:
        wrong = "no hook point was named" if asked is None else f"got {asked!r}"
        raise PipelineError(f"{store.path} holds the hook points {', '.join(names)}; {wrong}. Choose one of them.")
    return asked
