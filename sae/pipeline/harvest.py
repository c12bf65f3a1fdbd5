"""Harvest a store: its forecast, its budgets, and the record of where its rows come from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.dictionary.outliers import outliers_among
from sae.harvesting import harvest as harvesting
from sae.harvesting.lanes import Plan, default_heldout_tokens, lanes_of, plan
from sae.harvesting.text_lanes import survey
from sae.jobs.memory import resident_bytes
from sae.lm import LanguageModel, load_model
from sae.pipeline.errors import PipelineError
from sae.pipeline.resolve import model_device
from sae.pipeline.stores import harvested
from sae.text.sources import TextSource, combine, open_text
from sae.text.splits import DIVIDED, SplitRule, rule_named
from store.activations import ActivationStore, is_url
from store.common import (
    BOS_BEFORE_CONTEXTS,
    BOS_BEFORE_DOCUMENTS,
    HELD_OUT,
    LANES,
    TRAIN,
    StoreError,
    contexts_begin_with_bos,
    same_model,
)

DEFAULT_HOOK_POINT = "blocks.0.mlp.hook_post"
BYTES_PER_VALUE = {"float16": 2, "bfloat16": 2, "float32": 4}
OUTLIER_SHARDS = 8  # in which rows of a huge norm are looked for
TEXT_BYTES = 9  # per row: token, keep and document number
Text = str | Path | TextSource | Sequence[str | Path]


@dataclass(frozen=True)
class Forecast:
    """The disk and memory that a harvest needs.

    `shard_bytes` includes a shard's marker and the rounding to disk blocks. `ram_bytes` is what this process holds now
    and the rows of the shards being filled, without the text's window, which takes up to half a gigabyte more.
    """

    rows: int
    disk_bytes: int
    free_bytes: int | None  # None: a remote store
    shard_bytes: int
    ram_bytes: int

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f" ({self.free_bytes / 1e9:.1f} GB free)"
        ram = f"at least {self.ram_bytes / 1e9:.2f} GB of memory"
        return f"{self.rows:,} rows, {self.disk_bytes / 1e9:.2f} GB on disk{free}, {ram}"


def forecast_harvest(
    plan: Plan, widths: Mapping[str, int], dtype: str | Mapping[str, str], out: str | Path
) -> Forecast:
    """Rows and bytes of the finished store, and the disk space that is free."""
    shard_rows = plan.contexts_per_shard * plan.seq_len
    kinds = _dtypes(dtype, widths)
    row_bytes = sum(width * BYTES_PER_VALUE[kinds[hook]] for hook, width in widths.items()) + TEXT_BYTES
    rows = plan.kept_shards * shard_rows
    # A marker holds Σx in float64 (base64) and the documents; every file takes whole blocks of 4 KiB.
    marker = sum(widths.values()) * 11 + shard_rows * 10
    shard_bytes = shard_rows * row_bytes + marker + 4096 * (len(widths) + 4)
    ram_bytes = resident_bytes() + harvesting.SHARDS_IN_HAND * shard_rows * sum(widths.values()) * 4  # float32
    free_bytes = None
    if not is_url(out):
        folder = next(p for p in (Path(out), *Path(out).absolute().parents) if p.exists())
        free_bytes = shutil.disk_usage(folder).free
    return Forecast(rows, rows * row_bytes, free_bytes, shard_bytes, ram_bytes)


def harvest(
    model: LanguageModel | str,
    text: Text,
    out: str | Path,
    *,
    tokens: int,
    hook_points: Sequence[str] = (DEFAULT_HOOK_POINT,),
    dtype: str | Mapping[str, str] = "float16",
    heldout_tokens: int | None = None,
    seq_len: int | None = None,
    context_bos: bool | None = None,
    device: str = "auto",
    rank: int = 0,
    world: int = 1,
    max_disk_bytes: int | None = None,
    max_ram_bytes: int | None = None,
    keep_rows: int | None = None,
    take_over: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> str | Path:
    """Streams the activations of `tokens` tokens (and a frozen held-out split) into a Zarr store at `out`.

    `context_bos` begins every context with BOS (default: as the store at `out`; a new one so for every model with a BOS
    token but those of `sae pretrain`, which were trained on contexts that begin anywhere).
    Worker `rank` of `world` fills its share of the 64 lanes; together they write the same bytes as one worker alone.
    `max_disk_bytes`, and `max_ram_bytes` of this process, end the harvest early, with everything written ready for use;
    `keep_rows` keeps only the newest training rows. A model given by name runs on `device`. `report` is called with
    lines of text: the forecast, and at the end the rows asked for and found, and the L0 of what is stored.
    Repeat the call to continue after an interruption: committed shards stay, and the result is the same byte for byte.
    Raises: PipelineError when disk or memory is too small at the start; OutOfMemoryBudget and DiskFull later on;
    StoreError when `out` is another store, or another process writes one of these lanes; TextError for bad text;
    EmptySplit when the text has nothing to train on or nothing to hold out, before anything is written.
    """
    out = out if is_url(out) else Path(out)
    begun = _begun(out)
    held_weights = begun.provenance.get("model", {}).get("sha256") if begun else None
    lm = model
    if isinstance(lm, str):
        lm = load_model(lm, device=model_device(device), weights_sha256=held_weights)
    source = source_of(text).for_model(lm)
    context_bos = begins_with_bos(lm, _bos_recorded(begun) if context_bos is None else context_bos)
    seq_len = context_length(lm, seq_len, context_bos)
    lanes = lanes_of(rank, world)
    widths = {hook_point: lm.hook_width(hook_point) for hook_point in hook_points}
    dtypes = _dtypes(dtype, widths)
    planned = plan(tokens, heldout_tokens or default_heldout_tokens(tokens), seq_len, keep_rows)
    forecast = forecast_harvest(planned, widths, dtypes, out)
    report(f"forecast: {forecast}")
    for reason in filter(None, map(lm.why_no_path, hook_points)):
        report(f"note: {reason} A dictionary trained on it gets no logit weights.")
    only = _within(planned, forecast, max_disk_bytes)
    wanted_bytes = forecast.disk_bytes if only is None else max_disk_bytes or 0
    if forecast.free_bytes is not None and not Path(out).exists() and wanted_bytes > forecast.free_bytes:
        raise PipelineError(f"harvest needs {forecast}. Lower --tokens, or choose another disk with --out.")
    if max_ram_bytes is not None and forecast.ram_bytes > max_ram_bytes:
        raise PipelineError(
            f"harvest needs {forecast.ram_bytes / 1e6:,.0f} MB of memory for the model and the rows not yet written, "
            f"more than the {max_ram_bytes / 1e6:,.0f} MB allowed. Raise --max-ram, or name fewer hook points at once."
        )
    rule = split_rule_of(begun) if begun else DIVIDED
    text_lanes = begun.text_lanes if begun else survey(lm, source, rule, planned).text_lanes(planned)
    store = ActivationStore.create(
        out,
        hook_points=widths,
        seq_len=seq_len,
        contexts_per_shard=planned.contexts_per_shard,
        n_shards=planned.n_shards,
        dtype=dtypes,
        provenance=_as_recorded(begun, provenance_of(lm, source, context_bos, rule)),
        ring_shards_per_lane=planned.ring_shards_per_lane,
        text_lanes=text_lanes,
    )
    if not store.is_complete:
        with store.hold(lanes, take_over=take_over):
            harvesting.harvest(
                lm,
                source,
                store,
                rule=rule,
                lanes=lanes,
                only=only,
                max_ram_bytes=max_ram_bytes,
                context_bos=context_bos,
            )
    if store.is_complete:
        report(harvested(store))
    if world == 1 or store.is_complete:
        _report_outliers(store, report)
        for line in sparsity_of(store):
            report(line)
    return out


def sparsity_of(store: ActivationStore) -> Iterator[str]:
    """For each hook point of a store, in words: how sparse its training rows are before any dictionary."""
    if not any(marker.kept_rows for marker in store.markers(TRAIN).values()):
        return
    for hook, d_in in store.hook_points.items():
        found = store.totals(TRAIN, hook)
        if found.units_l0 is None:
            yield f"{hook}: L0 not known, because version 0.1 wrote some of the rows"
            continue
        yield (
            f"{hook}: L0 {found.units_l0:,.1f} of {d_in:,} units, participation ratio "
            f"{found.units_participation_ratio:,.1f}. A dictionary shows more than the units at a lower L0"
        )


def _report_outliers(store: ActivationStore, report: Callable[[str], None]) -> None:
    """Reports a warning for each hook point where few of the written training rows carry much of the variance."""
    shards = [shard for shard, marker in store.markers(TRAIN).items() if marker.kept_rows]
    n, draw = min(len(shards), OUTLIER_SHARDS), np.random.default_rng(0)
    for hook in store.hook_points if n else ():
        rows = []
        for shard in (shards[i * len(shards) // n] for i in range(n)):
            keep = store.read_keep(TRAIN, shard).reshape(-1)
            rows.append(store.read_acts(TRAIN, shard, hook)[keep & (draw.random(len(keep)) * n < 1)])  # bounds memory
        found = outliers_among(torch.from_numpy(np.concatenate(rows)))
        if found.notable:
            bos = "" if contexts_begin_with_bos(store.provenance) else ", or begin contexts with BOS (--context-bos)"
            report(
                f"warning: {hook}: {found}. The FVU and the scale of the inputs would be mostly about them. Leave them "
                f"out in training with --set max_norm_multiple=10{bos}; see the page Sinks and outliers."
            )


def _dtypes(dtype: str | Mapping[str, str], hooks: Mapping[str, int]) -> dict[str, str]:
    """The dtype of each hook point. Raises: PipelineError for an unknown dtype, or a hook point without one."""
    kinds = dict.fromkeys(hooks, dtype) if isinstance(dtype, str) else dict(dtype)
    for kind in kinds.values():
        if kind not in BYTES_PER_VALUE:
            raise PipelineError(f"dtype must be one of {', '.join(BYTES_PER_VALUE)}; got {kind!r}.")
    if kinds.keys() != hooks.keys():
        raise PipelineError(
            f"dtype is given for {', '.join(kinds) or 'no hook point'}; the hook points are {', '.join(hooks)}."
        )
    return kinds


def _within(planned: Plan, forecast: Forecast, max_disk_bytes: int | None) -> dict[str, Container[int]] | None:
    """The shards that fit into the budget, held-out ones first; None when all of them do.

    It depends on nothing but these numbers, so that any number of workers stops at the same shards.
    Raises: PipelineError when there is no room for one training shard per lane, or for all shards of a ring.
    """
    if max_disk_bytes is None or planned.kept_shards * forecast.shard_bytes <= max_disk_bytes:
        return None
    train = max_disk_bytes // forecast.shard_bytes - planned.n_shards[HELD_OUT]
    if train < min(LANES, planned.n_shards[TRAIN]) or planned.ring_shards_per_lane is not None:
        least = planned.n_shards[HELD_OUT] + min(LANES, planned.n_shards[TRAIN])
        if planned.ring_shards_per_lane is not None:
            least = planned.kept_shards
        raise PipelineError(
            f"a disk budget of {max_disk_bytes / 1e6:,.1f} MB is too small: the held-out split and "
            f"{'the ring' if planned.ring_shards_per_lane else 'one shard of each lane'} take "
            f"{least * forecast.shard_bytes / 1e6:,.1f} MB. Raise --max-disk, or lower --heldout-tokens or --keep-rows."
        )
    return {HELD_OUT: range(planned.n_shards[HELD_OUT]), TRAIN: range(train)}


def begins_with_bos(lm: LanguageModel, asked: bool | None) -> bool:
    """Whether contexts begin with BOS: as asked, else as suits the model. Raises: PipelineError without a BOS token."""
    if asked and lm.bos_id is None:
        raise PipelineError(f"{lm.id} has no BOS token to begin contexts with. Leave out --context-bos.")
    return lm.context_bos if asked is None else asked


def context_length(lm: LanguageModel, asked: int | None, context_bos: bool) -> int:
    """Positions of a context: as asked, else 256, or the model's limit if lower.

    Raises: PipelineError above the limit, or when there is only room for BOS.
    """
    seq_len = asked or min(256, lm.context_tokens)
    if context_bos and seq_len == 1:
        raise PipelineError("seq_len = 1 leaves no room after the BOS of a context. Choose at least 2 tokens.")
    if seq_len > lm.context_tokens:
        raise PipelineError(
            f"seq_len = {seq_len} is longer than the context of {lm.id}. Choose at most {lm.context_tokens} tokens."
        )
    return seq_len


def source_of(text: Text, *, text_column: str | None = None, special_tokens: bool = False) -> TextSource:
    """The text that a caller names, as one source.

    `text_column` names the column of tables that holds it. With `special_tokens`, special tokens in texts are read as
    such: `<|im_start|>` is one token.
    Raises: TextError for a missing path, an unknown file type, or records in which no column holds the text.
    """
    if isinstance(text, TextSource):
        return text
    specs = [text] if isinstance(text, str | Path) else text
    return replace(combine([open_text(spec, column=text_column) for spec in specs]), special_tokens=special_tokens)


def provenance_of(lm: LanguageModel, source: TextSource, context_bos: bool, rule: SplitRule) -> dict[str, Any]:
    """What determines a store's rows: model, tokenizer and text, each with its hash."""
    return {
        "model": lm.identity(),
        "tokenizer_sha256": sha256(lm.tokenizer.to_str().encode()).hexdigest(),
        "text": source.name,
        "text_specs": list(source.specs),
        "text_sha256": source.fingerprint,
        **({} if source.column is None else {"text_column": source.column}),
        **_special_tokens(lm, source),
        "bos": BOS_BEFORE_CONTEXTS if context_bos else BOS_BEFORE_DOCUMENTS,
        "weight_processing": "none",
        "held_out": rule.held_out,
    }


def split_rule_of(store: ActivationStore) -> SplitRule:
    """The rule by which a store's text was divided. Raises: ValueError for one that this version does not know."""
    return rule_named(store.provenance.get("held_out"))


def _begun(out: str | Path) -> ActivationStore | None:
    """The store that is at `out` already; None if there is none, or a damaged one, which is reported later."""
    try:
        return ActivationStore.open(out)
    except StoreError:
        return None


def _bos_recorded(begun: ActivationStore | None) -> bool | None:
    """Whether the contexts of the store begun begin with BOS; None without a store."""
    return contexts_begin_with_bos(begun.provenance) if begun else None


def _special_tokens(lm: LanguageModel, source: TextSource) -> dict[str, Any]:
    """What a store records of special tokens in its text; nothing where texts are read literally."""
    chat, ids = "messages" in source.kinds, "input_ids" in source.kinds
    found: dict[str, Any] = {}
    if source.special_tokens or chat or ids:
        found["special_tokens"] = {"in_text": source.special_tokens, "in_chats": chat, "in_token_ids": ids}
        found["special_token_rows"] = f"kept, but for those of token {lm.bos_id} (BOS) and padding"
    if chat:
        found["chat_template_sha256"] = sha256((lm.chat_template or "").encode()).hexdigest()
    if source.agreement:
        found["token_ids"] = {
            "tokenizer_tokens": lm.tokenizer.get_vocab_size(),
            "checked_documents": source.agreement.documents,
            "share_that_came_back": source.agreement.share,
        }
    return found


def _as_recorded(begun: ActivationStore | None, provenance: dict[str, Any]) -> dict[str, Any]:
    """The provenance, with the model named as in the store begun, if that is the same model by another name."""
    there = begun.provenance.get("model", {}) if begun else {}
    return provenance | {"model": there} if same_model(there, provenance["model"]) else provenance
