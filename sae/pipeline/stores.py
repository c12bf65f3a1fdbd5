"""Activation stores: forecast, harvest, verify."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae import harvesting
from sae.lm import LanguageModel, load_model
from sae.pipeline.pairing import PipelineError
from sae.text import TextSource, combine, open_text
from store.activations import ActivationStore

DEFAULT_HOOK_POINT = "blocks.0.mlp.hook_post"
BYTES_PER_VALUE = {"float16": 2, "bfloat16": 2, "float32": 4}


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


def verify(path: str | Path) -> list[str]:
    """Checks every checksum of an activation store; returns the problems as sentences."""
    return ActivationStore.open(path).verify()
