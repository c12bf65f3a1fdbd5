"""The rows of a crosscoder: those of several hook points, or of several models, joined token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.sites import Site
from sae.pipeline.errors import PipelineError
from sae.pipeline.resident_rows import ResidentRows, fitting
from sae.pipeline.rows import SHUFFLE_BYTES, hook_point_of, provenance_of, room_beside, training_view
from sae.training.config import TrainConfig
from sae.training.rows import Batch
from store.activation_reader import ActivationReader, Totals
from store.activations import ActivationStore
from store.batches import ShuffledRows
from store.common import TRAIN
from store.paired import require_same_rows

OF_A_SAMPLE = 1  # separates the pairings of a sample from those of a batch


@dataclass(frozen=True)
class Sites:
    """What a crosscoder is trained on: the hook points of each of these stores (default: a store's only one).

    Several stores must hold the same tokens, row by row: harvest one text from each model.
    """

    stores: Sequence[str | Path]
    hook_points: Sequence[str] = ()


class Place(NamedTuple):
    """A hook point of a store, and the name of this site."""

    name: str
    store: ActivationReader
    hook_point: str

    @property
    def width(self) -> int:
        return self.store.hook_points[self.hook_point]

    def totals(self, split: str) -> Totals:
        """Moments of the kept rows."""
        return self.store.totals(split, self.hook_point)


def open_sites(sites: Sites) -> list[Place]:
    """Opens the stores and checks that their training rows belong to the same tokens.

    Raises: PipelineError for fewer than two sites, one named twice, or a hook point that a store lacks; StoreError for
    stores of other tokens.
    """
    stores = [ActivationStore.open(path) for path in sites.stores]
    hooks: list[str | None] = [*sites.hook_points] or [None]
    found = [(store, hook_point_of(store, hook)) for store in stores for hook in hooks]
    if len(found) < 2:
        raise PipelineError(
            "a crosscoder joins at least two sites: name two hook points of one store, or two stores. Of one, train "
            "another recipe."
        )
    if len({(str(store.path), hook) for store, hook in found}) < len(found):
        raise PipelineError("a crosscoder's sites are different places: a store or a hook point is named twice.")
    for other in stores[1:]:
        require_same_rows(stores[0], other, TRAIN)
    return [
        Place(name, store, hook) for name, (store, hook) in zip(_names(stores, found, len(hooks)), found, strict=True)
    ]


def _names(stores: Sequence[ActivationReader], found: Sequence[tuple[ActivationReader, str]], hooks: int) -> list[str]:
    """What tells the sites apart: the model or, if that is the same, the store; and the hook point."""
    if len(stores) == 1:
        return [hook for _, hook in found]
    models = [str(store.provenance["model"]["id"]) for store in stores]
    named = models if len(set(models)) == len(models) else [str(store.path) for store in stores]
    return [named[n // hooks] + (f" {hook}" if hooks > 1 else "") for n, (_, hook) in enumerate(found)]


class JoinedRows:
    """Training rows of several sites side by side: row n of each belongs to the same token.

    Each site is multiplied by `1 / √(mean ‖x^s‖²)` of its training rows, so that all have the same mean squared norm.
    With `shuffle_sites`, the rows of all sites but the first are permuted within each batch: pairs of tokens drawn at
    random, the control of what the sites share.
    On a `device` with room for them rows lie there, as those of `StoreRows` do.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        batch_tokens: int,
        seed: int,
        shuffle_sites: bool = False,
        max_ram_bytes: int = SHUFFLE_BYTES,
        device: torch.device | None = None,
        device_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.places, self._seed, self._shuffle = places, seed, shuffle_sites
        self._device, self._device_bytes = device, device_bytes
        self.sites = [Site(place.name, place.width, _scale(place)) for place in places]
        self.d_in = sum(place.width for place in places)

        def rows(place: Place, **pools: Any) -> ShuffledRows:
            return ShuffledRows(place.store, place.hook_point, batch_rows=batch_tokens, seed=seed, **pools)

        first = rows(places[0], memory_bytes=max_ram_bytes * places[0].width // self.d_in)
        # The same pools as for the first, so that row n of each belongs to the same token.
        pools = {"pool_shards": first.pool_shards, "parts": first.parts}
        self._rows = [first, *(rows(place, **pools) for place in places[1:])]

    @classmethod
    def of(
        cls,
        places: Sequence[Place],
        config: TrainConfig,
        max_ram_bytes: int = SHUFFLE_BYTES,
        device: torch.device | None = None,
    ) -> JoinedRows:
        """The rows for a run with these settings, on a CUDA device if that has room for them.

        Raises: PipelineError for a row filter that cannot be shared.
        """
        return cls(
            _views(places, config),
            batch_tokens=config.batch_tokens,
            seed=config.seed,
            shuffle_sites=config.shuffle_sites,
            max_ram_bytes=max_ram_bytes,
            **room_beside(device, sum(place.width for place in places), config.d_sae, config.batch_tokens),
        )

    @cached_property
    def _resident(self) -> list[ResidentRows]:
        """The rows of each site on the device; none if it has no room."""
        held = fitting(self._rows, self._device_bytes()) if self._device else None
        if not held or not self._device:
            return []
        return [ResidentRows(rows, self._device, everything=held == "all") for rows in self._rows]

    def batch(self, step: int) -> Batch:
        if self._resident:
            found = [rows.batch(step) for rows in self._resident]
            return Batch(self._joined([x for x, _ in found], [self._seed, step]), mixing=found[0][1])
        x, contexts = self._rows[0].draw(step)
        parts = [torch.from_numpy(part) for part in (x, *(rows.batch(step) for rows in self._rows[1:]))]
        return Batch(self._joined(parts, [self._seed, step]), mixing=lambda: self._rows[0].mixing(contexts))

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        n = min(n, self._rows[0].n_rows)
        parts = [rows.sample(n, seed) for rows in self._resident]
        parts = parts or [torch.from_numpy(rows.sample(n, seed)) for rows in self._rows]
        return self._joined(parts, [seed, n, OF_A_SAMPLE])

    def _joined(self, parts: Sequence[Tensor], seed: Sequence[int]) -> Float[Tensor, "n d_in"]:
        scaled = [part * site.scale for part, site in zip(parts, self.sites, strict=True)]
        joined = torch.cat(scaled, dim=-1)
        return _paired_at_random(joined, self.sites, seed) if self._shuffle else joined


def _paired_at_random(
    x: Float[Tensor, "rows d_in"], sites: Sequence[Site], seed: Sequence[int]
) -> Float[Tensor, "rows d_in"]:
    """The rows with those of each site but the first permuted."""
    parts = list(torch.split(x, [site.width for site in sites], dim=-1))
    for n in range(1, len(parts)):
        order = np.random.default_rng([*seed, n]).permutation(len(x))
        parts[n] = parts[n][torch.from_numpy(order).to(x.device)]
    return torch.cat(parts, dim=-1)


def _scale(place: Place) -> float:
    mean_square = place.totals(TRAIN).mean_sq_norm
    if not mean_square > 0:
        raise PipelineError(f"every activation at {place.name} is zero; is the hook point right?")
    return float(mean_square**-0.5)


def _views(places: Sequence[Place], config: TrainConfig) -> list[Place]:
    """The places without the rows that the run leaves out: the same tokens at each."""
    if config.row_filter.is_off:
        return list(places)
    paths = list(dict.fromkeys(str(place.store.path) for place in places))
    if len(paths) > 1 and config.max_norm_multiple:
        raise PipelineError(
            "max_norm_multiple leaves out rows by their norms in one store; of several stores it would leave out other "
            "tokens in each. Leave out tokens (skip_token_ids) or positions (skip_positions)."
        )
    views = {}
    for path in paths:
        here = [place for place in places if str(place.store.path) == path]
        hook, *others = (place.hook_point for place in here)
        views[path] = training_view(here[0].store, hook, config, *others)
    return [place._replace(store=views[str(place.store.path)]) for place in places]


def provenance_of_sites(rows: JoinedRows, out: str | Path, max_ram_bytes: int = SHUFFLE_BYTES) -> dict[str, Any]:
    """Where a crosscoder's rows come from, for its config.json: each site, in the order of its values, with its scale.

    `sites: [{"name", "width", "scale", "hook_point", "model", "store"}]`
    """
    recorded = []
    for place, site in zip(rows.places, rows.sites, strict=True):
        origin = provenance_of(place.store, place.hook_point, out, None, max_ram_bytes)
        origin.pop("row_filter", None)
        recorded.append({**site._asdict(), **origin})
    view = rows.places[0].store
    return {"sites": recorded, **({} if view.row_filter.is_off else {"row_filter": view.row_filter.to_json()})}
