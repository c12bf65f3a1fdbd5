"""Train on a model while it runs: rows from a model and a text, with nothing on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sae.lm import LanguageModel, load_model
from sae.pipeline.errors import PipelineError
from sae.pipeline.harvest import DEFAULT_HOOK_POINT, Text, begins_with_bos, context_length, provenance_of, source_of
from sae.text.splits import DIVIDED, rule_named
from sae.training.begun import SETTINGS
from sae.training.config import TrainConfig
from sae.training.live_rows import Contexts, LiveLanes, LiveRows
from sae.training.recipes import recipe_named
from store.common import RowFilter, contexts_begin_with_bos
from store.lane_rows import check_lanes
from store.shuffle_plan import seed_of_lane

MEDIAN_ROWS = 16_384  # whose norms give the median of a row filter


@dataclass(frozen=True)
class Live:
    """A model and a text to `train` on with nothing on disk: the model runs whenever the dictionary needs rows.

    Rows are shuffled in a buffer of at most `max_ram_bytes`, held in `dtype` (float16, bfloat16 or float32) on the
    device that the dictionary is trained on. Held-out documents are never trained on, as with a store.
    """

    model: LanguageModel | str
    text: Text
    seq_len: int | None = None  # tokens of a context; by default as in a harvest
    max_ram_bytes: int = 1 << 30
    dtype: str = "float16"
    context_bos: bool | None = None  # whether contexts begin with BOS; by default as in a harvest


def live_rows(
    live: Live, config: TrainConfig, hook_point: str | None, target_hook_point: str | None, device: str, out: Path
) -> tuple[LiveRows | LiveLanes, dict[str, Any]]:
    """The rows that a recipe trains on, and the record of where they come from, for config.json.

    With the setting `row_lanes` they are all lanes; `LiveLanes.on` takes those of a rank.
    A run that `out` holds keeps the rules by which its text is divided and its contexts begin.
    """
    begun = _recorded(out)
    held_weights = begun.get("model", {}).get("sha256")
    lm = (
        load_model(live.model, device=device, weights_sha256=held_weights)
        if isinstance(live.model, str)
        else live.model
    )
    source, hook = source_of(live.text).for_model(lm), hook_point or DEFAULT_HOOK_POINT
    rule = rule_named(begun["held_out"]) if "held_out" in begun else DIVIDED
    bos_recorded = contexts_begin_with_bos(begun) if begun else None
    context_bos = begins_with_bos(lm, bos_recorded if live.context_bos is None else live.context_bos)
    seq_len = context_length(lm, live.seq_len, context_bos)
    needs = recipe_named(config.recipe).needs
    check_target(config.recipe, target_hook_point)
    hooks = {"x": hook} | ({"y": target_hook_point} if target_hook_point else {})
    hooks |= {"resid": resid_mid_of(hook)} if needs == "resid" else {}

    def rows_through(row_filter: RowFilter, lane: int = 0, lanes: int = 1) -> LiveRows:
        return LiveRows(
            Contexts(lm, source, seq_len, context_bos, rule, row_filter, lane, lanes),
            hooks,
            batch_tokens=config.batch_tokens // lanes,
            seed=seed_of_lane(config.seed, lane) if lanes > 1 else config.seed,
            steps=config.steps,
            memory_bytes=live.max_ram_bytes // lanes,
            dtype=live.dtype,
            downstream=lm.downstream(hook) if needs == "resid" else None,
        )

    row_filter = config.row_filter
    if row_filter.max_norm_multiple:
        unbounded = rows_through(row_filter)
        found = {hook: unbounded.sample(MEDIAN_ROWS, 0)}
        found |= {target_hook_point: unbounded.sample_targets(MEDIAN_ROWS, 0)} if target_hook_point else {}
        medians = {name: float(np.median(sample.double().norm(dim=-1).numpy())) for name, sample in found.items()}
        row_filter = replace(row_filter, median_norms=medians)
    rows: LiveRows | LiveLanes
    if config.row_lanes:
        check_lanes(config.row_lanes, config.batch_tokens, 1)
        rows = LiveLanes(partial(rows_through, row_filter, lanes=config.row_lanes), config.row_lanes)
    else:
        rows = rows_through(row_filter)
    made_of = provenance_of(lm, source, context_bos, rule)
    return rows, {
        "hook_point": hook,
        **({"target_hook_point": target_hook_point} if target_hook_point else {}),
        "model": made_of.pop("model"),
        **({} if row_filter.is_off else {"row_filter": row_filter.to_json()}),
        "live": {**made_of, "seq_len": seq_len, "dtype": live.dtype, "mixed_batches": rows.plan.batches},
    }


def _recorded(out: Path) -> dict[str, Any]:
    """What the live run in `out` records of its text; empty if it holds none."""
    try:
        found = json.loads((out / SETTINGS).read_text(encoding="utf-8"))["rows"]["live"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged, which is reported later
        return {}
    return found if isinstance(found, dict) else {}


def check_target(recipe: str, target_hook_point: str | None) -> None:
    """Raises: PipelineError when a transcoder recipe has no target hook point, another recipe has one, or for a
    crosscoder, which has sites."""
    if recipe_named(recipe).needs == "sites":
        raise PipelineError(
            f"recipe {recipe} joins the activations of several places: name two hook points of one store, or the same "
            "hook point of two stores (--acts A --acts B; in Python rows = pipeline.Sites([A, B]))."
        )
    needs_target = recipe_named(recipe).needs == "y"
    if needs_target != bool(target_hook_point):
        wants = "predicts y from x: name a second hook point, that of y" if needs_target else "takes one hook point"
        raise PipelineError(f"recipe {recipe} {wants}.")


def resid_mid_of(hook_point: str) -> str:
    """The hook point of the residual stream that the MLP of `hook_point` adds to."""
    return f"{hook_point.split('.mlp.')[0]}.hook_resid_mid"
