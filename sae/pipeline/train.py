"""Train a dictionary on an activation store, on a running model, or on any rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae.dictionary.autoencoder import SAE
from sae.jobs.trackers import trackers_named
from sae.kernels import device_named
from sae.lm.units import active_units
from sae.pipeline.live import Live, live_rows
from sae.pipeline.rows import SHUFFLE_BYTES, hook_point_of, provenance_of, rows_for
from sae.pipeline.stores import warn_of_few_rows
from sae.training import loop, recipes
from sae.training.config import TrainConfig
from sae.training.rows import Rows
from store.activations import ActivationStore
from store.common import TRAIN

UNITS_ROWS = 2048  # on which the L0 of the activations themselves is measured


def train(
    rows: str | Path | Live | Rows,
    out: str | Path,
    *,
    recipe: str = "balanced",
    d_sae: int = 4096,
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
) -> SAE:
    """Trains a dictionary on a store (its path), a model and a text (`Live`: nothing on disk) or any `Rows`.

    `l0` is the mean number of active features per token to aim for (default: the recipe's; saved as `target_l0`);
    `config` overrides further settings of the recipe. `tokens` is the number of rows to train on (default: four epochs
    of a store, 4M of other rows). A transcoder needs a `target_hook_point` too. `keep` is the number of saved states
    kept on disk; `log_to` names trackers (`sae.jobs.trackers`). A store that fits into `max_ram_bytes` is shuffled
    exactly, a larger one in two levels.
    Repeat the call to continue after an interruption: the result is the same bit for bit.
    Raises: ValueError for wrong settings, before any work; Interrupted on Ctrl-C or SIGTERM.
    """
    aim = {} if l0 is None else {"target_l0": l0}
    overrides = {"d_sae": d_sae, "seed": seed, **aim, **(config or {})}
    tokens = overrides.pop("tokens", tokens)
    how: dict[str, Any] = {"kernels": kernels, "device": device, "keep": keep, "trackers": trackers_named(log_to)}
    if not isinstance(rows, str | Path):
        _, resolved = recipes.resolve(recipe, tokens=tokens or TrainConfig.tokens, **overrides)
        provenance: dict[str, Any] = {}
        if isinstance(rows, Live):
            where = str(device_named(device))
            rows, provenance = live_rows(rows, resolved, hook_point, target_hook_point, where, Path(out))
        _warn_unless_sparser(rows, resolved, out)
        return loop.train(rows, out, resolved, provenance=provenance, **how)
    store = ActivationStore.open(rows)
    hook = hook_point_of(store, hook_point)
    kept_rows = store.totals(TRAIN, hook).kept_rows
    warn_of_few_rows(store)
    _, resolved = recipes.resolve(recipe, tokens=tokens or 4 * kept_rows, **overrides)
    source = rows_for(store, hook, resolved, target_hook_point, max_ram_bytes)
    provenance = provenance_of(store, hook, out, target_hook_point, max_ram_bytes)
    _warn_unless_sparser(source, resolved, out)
    return loop.train(source, out, resolved, provenance=provenance, **how)


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
