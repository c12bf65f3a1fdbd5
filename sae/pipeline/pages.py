"""Export a dictionary's feature index as pages that SAEDashboard and Neuronpedia read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sae.interop.dashboard_files import TOP_BIN, Example, FeaturePage, batch_json, feature_json, settings_json
from sae.interop.hooks import layer_of
from sae.jobs.progress import progress
from sae.pipeline.errors import PipelineError
from sae.pipeline.exchange import refuse_filled
from store.common import write_bytes
from store.features import FeatureIndex

PAGE_FORMATS = ("sae-dashboard",)
FEATURES_A_FILE = 64
TOP, INTERVALS, PER_INTERVAL = 20, 5, 5  # SAEDashboard's own numbers of examples
ACT_BARS = 50
NEURONS = 10
MAX_TOKENS = 128  # of one example


def export_pages(sae: str | Path, out: str | Path, *, features: Iterable[int] | None = None, seed: int = 0) -> Path:
    """Writes the feature pages of a dictionary that has an index into `out`, for SAEDashboard or Neuronpedia.

    A page holds the strongest firings (one for each context), examples drawn from five equal intervals of activation,
    the histograms of activations and logit weights, the tokens raised and lowered most, and the neurons of the decoder
    row. `features` are their numbers (all by default). Texts of BOS and padding are left out, activations are in the
    model's own units. Raises: PipelineError for an unknown feature, an index of samples, or an `out` that holds files;
    StoreError without an index. Nothing is left in `out` if it fails.
    """
    directory, out = Path(sae), Path(out)
    index = FeatureIndex.open(directory if directory.name.endswith(".zarr") else directory / "features.zarr")
    if index.sampled:
        raise PipelineError(f"{sae}: its index was imported and holds samples only; export the original pages.")
    numbers = list(range(index.d_sae)) if features is None else list(dict.fromkeys(features))
    if wrong := [number for number in numbers if not 0 <= number < index.d_sae]:
        raise PipelineError(f"{sae}: feature {wrong[0]} does not exist; features are 0 … {index.d_sae - 1:,}.")
    if not numbers:
        raise PipelineError("export: name at least one feature.")
    refuse_filled(out, "export")
    existed = out.exists()
    try:
        _write(index, numbers, out, seed)
    except BaseException:
        for file in out.glob("*.json"):
            file.unlink()
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return out


def _write(index: FeatureIndex, numbers: Sequence[int], out: Path, seed: int) -> None:
    model = index.attributes.get("model", "unknown")
    model = str(model.get("id", "unknown")) if isinstance(model, dict) else str(model)
    layer, name = layer_of(str(index.attributes.get("hook_point"))) or 0, str(index.attributes.get("sae", "sae"))
    dataset = str(index.attributes.get("provenance", {}).get("store", {}).get("text", "unknown"))
    sizes = {"contexts": index.n_contexts, "context_tokens": index.seq_len}
    with progress("export", len(numbers), "feature") as bar:
        for number, start in enumerate(range(0, len(numbers), FEATURES_A_FILE)):
            part = numbers[start : start + FEATURES_A_FILE]
            pages = [feature_json(page(index, feature, seed), dataset=dataset, **sizes) for feature in part]
            _write_json(out / f"batch-{number}.json", batch_json(pages, model=model, layer=layer, name=name))
            bar.update(len(part))
    told = settings_json(
        model=model, layer=layer, name=name, dataset=dataset, contexts=index.n_contexts, tokens=index.seq_len
    )
    _write_json(out / "run_settings.json", told)


def _write_json(path: Path, content: object) -> None:
    write_bytes(path, json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8"))


def page(index: FeatureIndex, feature: int, seed: int = 0) -> FeaturePage:
    """What the index holds of one feature, in the form that is written."""
    rows, values = index.firings(feature)
    return FeaturePage(
        feature=feature,
        density=len(rows) / max(1, index.kept_tokens),
        examples=list(_examples(index, rows, values, np.random.default_rng((seed, feature)))),
        acts=np.histogram(values, ACT_BARS, (0.0, float(values.max()))) if len(values) else None,
        logits=_logit_histogram(index, feature),
        raises=_tokens(index, "top", feature),
        lowers=_tokens(index, "bottom", feature),
        neurons=_neurons(index, feature),
        correlated=_correlated(index, feature),
    )


def _examples(index: FeatureIndex, rows: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> Iterator[Example]:
    """The strongest firings, one for each context, then samples of each interval of activation, strongest first."""
    if not len(rows):
        return
    order = np.lexsort((rows, -values))
    _, first = np.unique(rows[order] // index.seq_len, return_index=True)
    highest = float(values.max())
    low, share = TOP_BIN
    for i in order[np.sort(first)[:TOP]].tolist():
        yield _example(index, rows, values, i, low, highest, share)
    edges = np.linspace(0.0, highest, INTERVALS + 1)
    interval = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, INTERVALS - 1)
    for number in range(INTERVALS - 1, -1, -1):
        inside = np.flatnonzero(interval == number)
        drawn = rng.choice(inside, min(PER_INTERVAL, len(inside)), replace=False)
        for i in sorted(drawn.tolist(), key=lambda i: -float(values[i])):
            bounds = (float(edges[number]), float(edges[number + 1]))
            yield _example(index, rows, values, i, *bounds, len(inside) / max(1, index.kept_tokens))


def _example(
    index: FeatureIndex, rows: np.ndarray, values: np.ndarray, chosen: int, low: float, high: float, share: float
) -> Example:
    window = index.window(int(rows[chosen]), MAX_TOKENS // 2 - 1, MAX_TOKENS // 2)
    begin = window.context * index.seq_len + window.start
    size = len(window.token_ids)
    acts = np.zeros(size, np.float32)
    inside = slice(*np.searchsorted(rows, [begin, begin + size]))
    acts[rows[inside] - begin] = values[inside]
    kept = index.keep_at(window.context)[window.start : window.start + size]
    return Example(
        tokens=[index.token_bytes(int(token)) for token in window.token_ids[kept]],
        acts=acts[kept],
        hit=int(kept[: window.position - window.start].sum()),
        low=low,
        high=high,
        share=share,
    )


def _logit_histogram(index: FeatureIndex, feature: int) -> tuple[np.ndarray, np.ndarray] | None:
    if not index.has("logits/histogram"):
        return None
    counts = index.panel("logits/histogram", feature)
    low, high = index.panel("logits/range", feature).astype(float)
    return counts, np.linspace(low, high, len(counts) + 1)


def _tokens(index: FeatureIndex, side: str, feature: int) -> list[tuple[bytes, float]]:
    return [(index.token_bytes(i), weight) for i, weight in index.logit_weights(side, feature)]


def _neurons(index: FeatureIndex, feature: int) -> list[tuple[int, float, float]]:
    if not index.has("neurons/weight_id"):
        return []
    columns = [index.panel(f"neurons/weight_{part}", feature)[:NEURONS].tolist() for part in ("id", "value", "share")]
    return [entry for entry in zip(*columns, strict=True) if entry[0] >= 0]


def _correlated(index: FeatureIndex, feature: int) -> list[tuple[int, float]]:
    if not index.has("neurons/corr_id"):
        return []
    ids, values = (index.panel(f"neurons/corr_{part}", feature)[:NEURONS].tolist() for part in ("id", "value"))
    return [(i, value) for i, value in zip(ids, values, strict=True) if i >= 0 and np.isfinite(value)]
