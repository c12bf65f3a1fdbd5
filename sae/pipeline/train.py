"""Train a dictionary on an activation store, on a running model, or on any rows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sae.dictionary.autoencoder import SAE
from sae.jobs.ranks import rank_and_world
from sae.jobs.trackers import trackers_named
from sae.kernels import device_named
from sae.lm.units import active_units
from sae.parallel.launch import check_started, joined_ranks
from sae.parallel.mesh import Mesh
from sae.pipeline.errors import PipelineError
from sae.pipeline.live import Live, live_rows
from sae.pipeline.resolve import opened
from sae.pipeline.rows import SHUFFLE_BYTES, hook_point_of, provenance_of, rows_for, training_view
from sae.pipeline.sites import JoinedRows, Sites, open_sites, provenance_of_sites
from sae.pipeline.stores import warn_of_few_rows
from sae.training import loop, recipes
from sae.training.begun import recipe_in, resolve_in
from sae.training.config import TrainConfig
from sae.training.live_rows import LiveLanes
from sae.training.rows import OwnRows, Rows, samples_together
from sae.training.start_from import fingerprint
from sae.training.state_files import saved_header
from store.activations import ActivationStore
from store.common import TRAIN
from store.lane_rows import check_lanes

D_SAE = 4096
UNITS_ROWS = 2048  # on which the L0 of the activations themselves is measured


def train(
    rows: str | Path | Live | Sites | Rows,
    out: str | Path,
    *,
    recipe: str | None = None,
    d_sae: int | None = None,
    l0: float | None = None,
    tokens: int | None = None,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    hook_point: str | None = None,
    target_hook_point: str | None = None,
    kernels: str = "auto",
    device: str = "auto",
    keep: int = 1,
    log_to: Sequence[str] = (),
    max_ram_bytes: int = SHUFFLE_BYTES,
    start_from: SAE | str | Path | None = None,
    shard: str | None = None,
) -> SAE:
    """Trains a dictionary on a store (its path), a model and a text (`Live`: nothing on disk) or any `Rows`.

    A crosscoder is trained on `Sites`: several hook points of a store, or of several stores of one text.

    Without a `recipe` it is that of the run in `out`, for a new one `matryoshka`.
    `d_sae` is the number of features (default: that of `start_from`, else 4096); `l0` is the mean number of active
    features per token to aim for (default: the recipe's; saved as `target_l0`);
    `config` overrides further settings of the recipe. `tokens` is the number of rows to train on (default: four epochs
    of a store, 4M of other rows). A transcoder needs a `target_hook_point` too. `keep` is the number of saved states
    kept on disk; `log_to` names trackers (`sae.jobs.trackers`). A store that fits into `max_ram_bytes` is shuffled
    exactly, a larger one in two levels.
    A run starts from the dictionary `start_from` (one of ours or an imported one) if it is given: with the same
    function at the first step, and a new optimizer. It may be of another model or recipe, as long as shapes and hook
    point agree.
    Under torchrun `shard` says how the processes train one dictionary together: `features` gives each a part of the
    dictionary, `rows` each the whole one, `RxF` both, `auto` the division that exchanges least. Settings are those of
    the whole run, also `batch_tokens`. With `features` each process gets its own features of the result; `sae.load`
    opens all.
    Repeat the call to continue after an interruption: the result is the same bit for bit.
    Raises: ValueError for wrong settings, before any work; Interrupted on Ctrl-C or SIGTERM.
    """
    recipe = recipe or recipe_in(Path(out))
    aim = {} if l0 is None else {"target_l0": l0}
    started = Started(start_from, out) if start_from is not None else None
    if d_sae is None:
        d_sae = started.sae.d_sae if started else D_SAE
    overrides = {"d_sae": d_sae, "seed": seed, **aim, **(config or {})}
    tokens = overrides.pop("tokens", tokens)
    how: dict[str, Any] = {"kernels": kernels, "device": device, "keep": keep, "trackers": trackers_named(log_to)}
    if started:
        how["source"] = started.sae
    check_started(shard)
    provenance: dict[str, Any]
    if isinstance(rows, Sites):
        if recipes.recipe_named(recipe).needs != "sites":
            raise PipelineError(f"recipe {recipe} takes one hook point of one store; recipe crosscoder joins several.")
        if hook_point or target_hook_point:
            raise PipelineError(
                "a crosscoder's hook points are named in its rows: pipeline.Sites(stores, hook_points)."
            )
        places = open_sites(rows)
        warn_of_few_rows(ActivationStore.open(rows.stores[0]))
        _, resolved = resolve_in(Path(out), recipe, tokens=tokens or 4 * places[0].totals(TRAIN).kept_rows, **overrides)
        place = _device_of(Path(out), device) if shard is None and rank_and_world()[1] == 1 else None
        joined = JoinedRows.of(places, resolved, max_ram_bytes, place)
        provenance = provenance_of_sites(joined, out, max_ram_bytes)
        if started:
            provenance |= started.record(provenance)
        return _trained(joined, out, resolved, provenance, shard, how)
    if not isinstance(rows, str | Path):
        _, resolved = resolve_in(Path(out), recipe, tokens=tokens or TrainConfig.tokens, **overrides)
        provenance = {}
        if isinstance(rows, Live):
            where = str(device_named(device))
            rows, provenance = live_rows(rows, resolved, hook_point, target_hook_point, where, Path(out))
        if started:
            provenance = provenance | started.record(provenance)
        return _trained(rows, out, resolved, provenance, shard, how)
    whole = ActivationStore.open(rows)
    hook = hook_point_of(whole, hook_point)
    kept_rows = whole.totals(TRAIN, hook).kept_rows
    _, resolved = resolve_in(Path(out), recipe, tokens=tokens or 4 * kept_rows, **overrides)
    with joined_ranks(shard, device, **_sizes(whole.hook_points[hook], resolved)) as mesh:
        warn_of_few_rows(whole)
        store = training_view(whole, hook, resolved, target_hook_point)
        place = _device_of(Path(out), device)
        source = rows_for(store, hook, resolved, target_hook_point, max_ram_bytes, place, mesh)
        provenance = provenance_of(store, hook, out, target_hook_point, max_ram_bytes)
        if started:
            provenance |= started.record(provenance)
        if mesh.is_first or source.samples_together:
            _warn_unless_sparser(source, resolved, out)
        return loop.train(source, out, resolved, provenance=provenance, mesh=mesh, **how)


def _trained(
    rows: Rows, out: str | Path, config: TrainConfig, provenance: dict[str, Any], shard: str | None, how: dict[str, Any]
) -> SAE:
    """A run on rows that each rank reads whole, or on lanes of a running model.

    Raises: PipelineError for the setting row_lanes with other rows.
    """
    if config.row_lanes and not isinstance(rows, LiveLanes):
        raise PipelineError(
            f"row_lanes ({config.row_lanes}) divides the shards of one store, or the text of a running model, among "
            "processes. Leave it out for rows of several hook points, or of your own."
        )
    with joined_ranks(shard, how["device"], **_sizes(rows.d_in, config)) as mesh:
        own = _own_part(rows, config, mesh)
        if mesh.is_first or samples_together(own):
            _warn_unless_sparser(own, config, out)
        return loop.train(own, out, config, provenance=provenance, mesh=mesh, **how)


def _own_part(rows: Rows, config: TrainConfig, mesh: Mesh) -> Rows:
    """What one rank gives to a batch."""
    if mesh.world == 1:
        return rows
    if isinstance(rows, LiveLanes):
        check_lanes(rows.lanes, config.batch_tokens // mesh.world, mesh.world)
        return rows.on(mesh)
    return OwnRows(rows, mesh.rank, mesh.world)


def _device_of(out: Path, asked: str) -> torch.device:
    """Where a run computes: a resumed one where it began. Raises: ValueError for a device that is not there."""
    return device_named(saved_header(out).get("device") or asked)


def _sizes(d_in: int, config: TrainConfig) -> dict[str, int]:
    return {"d_in": d_in, "d_sae": config.d_sae, "batch_tokens": config.batch_tokens, "k": config.k}


class Started:
    """The dictionary that a run starts from, and the record of it."""

    def __init__(self, source: SAE | str | Path, out: str | Path) -> None:
        self.sae, directory = opened(source)
        self._path = os.path.relpath(directory, out) if directory else None

    def record(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """The entry `started_from` of config.json. Raises: PipelineError if it belongs to other hook points."""
        config = self.sae.config
        here, there = ([site["hook_point"] for site in each.get("sites", [])] for each in (provenance, config))
        if here != there:
            names = [" and ".join(hooks) if hooks else "one hook point" for hooks in (there, here)]
            raise PipelineError(f"the dictionary to start from joins {names[0]}, this run {names[1]}.")
        for key, what in (("hook_point", "reads"), ("target_hook_point", "predicts")):
            ours, theirs = provenance.get(key), config.get(key)
            unknown = key == "hook_point" and theirs is None  # of an imported dictionary
            if ours != theirs and not unknown:
                own = ours or "its own input"
                raise PipelineError(f"the dictionary to start from {what} {theirs or 'its own input'}, this run {own}.")
        kept = ("recipe", "hook_point", "target_hook_point", "model", "imported")
        return {
            "started_from": {
                "path": self._path,
                "sha256": fingerprint(self.sae),
                **self.sae.shape,
                **{key: config[key] for key in kept if key in config},
                "tokens": config.get("train", {}).get("tokens"),
            }
        }


def _warn_unless_sparser(rows: Rows, config: TrainConfig, out: str | Path) -> None:
    """Warns when the L0 asked for is not below that of x itself; a transcoder's features do not describe x."""
    asked = config.k or config.target_l0
    if not asked or recipes.recipe_named(config.recipe).needs == "y":
        return
    sample = rows.sample(UNITS_ROWS, config.seed)
    own = active_units(sample).double().mean().item()
    if asked >= own:
        warnings.warn(
            f"{out}: an L0 of {asked:g} was asked for, and the activations themselves have {own:.1f}: that many of "
            f"their {sample.shape[1]:,} units are not 0 per row. A dictionary shows more than the units only at a "
            "lower L0: choose a smaller --l0, or a hook point whose activations are denser.",
            stacklevel=3,
        )
