"""Another tool's feature pages, made into an index the browser reads: samples of the firings, and said to be so."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sae.interop import dashboards
from sae.interop.dashboards import DumpedFeature, Histogram
from sae.interop.files import InteropError
from sae.jobs.progress import progress
from sae.pipeline.errors import PipelineError
from sae.pipeline.exchange import refuse_filled
from store.common import write_bytes
from store.features import FeatureWriter

DUMP_FORMATS = tuple(dashboards.READERS)
MAX_ROWS = 1 << 28  # of all texts, padded to the longest
N_LOGITS, N_NEURONS = 20, 10


@dataclass
class _Survey:
    """What must be known before the first text is written."""

    vocabulary: dict[bytes, int] = field(default_factory=lambda: {b"": 0})  # 0 fills shorter texts up
    groups: dict[tuple[str, str], int] = field(default_factory=dict)  # (title, file) → document number
    sha256: dict[str, str] = field(default_factory=dict)
    found: dict[int, str] = field(default_factory=dict)  # feature → file
    origin: dict[str, str] = field(default_factory=dict)
    n_texts: int = 0
    longest: int = 1
    act_bars: int = 0
    logit_bars: int = 0

    def token(self, token: bytes) -> int:
        return self.vocabulary.setdefault(token, len(self.vocabulary))

    def add(self, each: DumpedFeature, name: str) -> None:
        """Counts one feature. Raises: InteropError when it was seen before."""
        if each.feature in self.found:
            raise InteropError(
                f"feature {each.feature} stands in {self.found[each.feature]} and again in {name}; a dump of one "
                "dictionary has it once. Import each dictionary's dump on its own."
            )
        self.found[each.feature] = name
        self.origin |= each.origin
        self.n_texts += len(each.texts)
        self.longest = max([self.longest, *(len(text.tokens) for text in each.texts)])
        self.act_bars = max(self.act_bars, len(each.acts.counts) if each.acts else 0)
        self.logit_bars = max(self.logit_bars, len(each.logits.counts) if each.logits else 0)
        for text in each.texts:
            self.groups.setdefault((text.group, name), len(self.groups))
            for token in text.tokens:
                self.token(token)
        for token, _ in (*each.raises, *each.lowers):
            self.token(token)


def import_dump(source: str | Path, out: str | Path, *, format: str) -> Path:
    """Reads the feature pages below `source` and writes `out` (config.json, features.zarr), which the browser shows.

    `format` is `sae-dashboard` (SAEDashboard's batches, Neuronpedia's features) or `paper`. The index holds the dump's
    texts and activations, its statistics and logit weights; it is marked `sampled`, so that nothing is concluded from
    firings the dump does not hold. Ablation losses are taken as loss without the feature − loss, in nats.
    Raises: InteropError for a file that is broken or says something impossible; PipelineError for an unknown format or
    an `out` that holds files. Then nothing is left in `out`.
    """
    source, out = Path(source), Path(out)
    if format not in DUMP_FORMATS:
        raise PipelineError(f"import: a dump's format is one of {', '.join(DUMP_FORMATS)}; got {format!r}.")
    refuse_filled(out, "import")
    paths = dashboards.files(source)
    survey = _Survey()
    for path, each in _features(paths, format, "read"):
        survey.add(each, path.name)
    if not survey.found:
        raise InteropError(f"{source}: no feature in its {len(paths):,} files.")
    for path in paths:
        survey.sha256[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    d_sae, rows = max(survey.found) + 1, max(1, survey.n_texts) * survey.longest
    if rows > MAX_ROWS:
        raise InteropError(
            f"{source}: {survey.n_texts:,} texts of up to {survey.longest:,} tokens; at most {MAX_ROWS:,} tokens are "
            "taken. Import a part of the files."
        )
    before = out.exists()
    try:
        return _write(out, paths, format, survey, d_sae, source.resolve().name)
    except BaseException:
        shutil.rmtree(out if not before else out / "features.zarr", ignore_errors=True)
        raise


def _features(paths: Sequence[Path], format: str, doing: str) -> Iterator[tuple[Path, DumpedFeature]]:
    with progress(doing, len(paths), "file") as bar:
        for path in paths:
            for each in dashboards.read(path, format):
                yield path, each
            bar.update(1)


def _write(out: Path, paths: Sequence[Path], format: str, survey: _Survey, d_sae: int, name: str) -> Path:
    model = survey.origin.get("model_id", "")
    place = " ".join(survey.origin[key] for key in ("layer", "sae_set") if key in survey.origin)
    n_contexts = max(1, survey.n_texts)
    writer = FeatureWriter(
        out / "features.zarr",
        d_sae=d_sae,
        seq_len=survey.longest,
        n_contexts=n_contexts,
        attributes={"sampled": True, "hook_point": place, "model": {"id": model or "?"}, "provenance": {"dump": name}},
        vocabulary=list(survey.vocabulary),
        documents=[(title, file, "", survey.sha256[file]) for title, file in survey.groups],
    )
    try:
        panels = _Panels(d_sae, n_contexts, survey)
        first = 0
        for path, each in _features(paths, format, "write"):
            _append(writer, survey, path.name, each, first)
            panels.add(each, first)
            first += len(each.texts)
        if not first:  # an index has at least one context
            blank = np.zeros((1, survey.longest), np.int64)
            writer.append(0, blank, blank > 0, blank - 1, blank[0, :0], blank[0, :0], blank[0, :0])
        index = writer.finish(panels.arrays)
    except BaseException:
        writer.abandon()
        raise
    config = {
        "kind": "feature-dump",
        "format": 1,
        "d_sae": d_sae,
        "recipe": f"{format} dump",
        "model": {"id": model or "?"},
        "hook_point": place,
        "imported": {"format": format, "source": name, "files": len(paths), "features": len(survey.found)},
    }
    write_bytes(out / "config.json", json.dumps(config, indent=2).encode())
    return index


def _append(writer: FeatureWriter, survey: _Survey, file: str, each: DumpedFeature, first: int) -> None:
    """One context a text; the rest of it is padding."""
    if not each.texts:
        return
    shape = (len(each.texts), survey.longest)
    tokens, acts = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    document = np.full(shape, -1, np.int64)
    for i, text in enumerate(each.texts):
        size = len(text.tokens)
        tokens[i, :size] = [survey.vocabulary[token] for token in text.tokens]
        acts[i, :size] = text.acts
        document[i, :size] = survey.groups[text.group, file]
    rows = np.flatnonzero(acts.reshape(-1) > 0)
    writer.append(
        first,
        tokens,
        document >= 0,
        document,
        rows + first * survey.longest,
        np.full(len(rows), each.feature),
        acts.reshape(-1)[rows],
    )


class _Panels:
    """What the dump says beyond its texts; `dump/*` panels are read by browser.dumps."""

    def __init__(self, d_sae: int, n_contexts: int, survey: _Survey) -> None:
        def blank(*shape: int, dtype: str = "float32") -> np.ndarray:
            return np.full(shape, np.nan if dtype == "float32" else -1, dtype)

        self.survey = survey
        self.arrays = {
            "stats/density": blank(d_sae),
            "stats/recorded_max": blank(d_sae),
            "dump/contexts": np.zeros((d_sae, 2), np.int64),
            "dump/hit": np.zeros(n_contexts, np.int32),
            "dump/loss": blank(n_contexts, survey.longest),
            "neurons/weight_id": blank(d_sae, N_NEURONS, dtype="int32"),
            "neurons/weight_value": blank(d_sae, N_NEURONS),
        }
        for side in ("top", "bottom"):
            self.arrays[f"logits/{side}_id"] = blank(d_sae, N_LOGITS, dtype="int32")
            self.arrays[f"logits/{side}_value"] = blank(d_sae, N_LOGITS)
        for kind, bars in (("act", survey.act_bars), ("logit", survey.logit_bars)):
            if bars:
                self.arrays[f"dump/{kind}_counts"] = blank(d_sae, bars)
                self.arrays[f"dump/{kind}_edges"] = blank(d_sae, bars + 1)

    def add(self, each: DumpedFeature, first: int) -> None:
        number, arrays = each.feature, self.arrays
        arrays["stats/density"][number], arrays["stats/recorded_max"][number] = each.density, each.max
        arrays["dump/contexts"][number] = first, len(each.texts)
        for i, text in enumerate(each.texts, first):
            arrays["dump/hit"][i] = text.hit
            if text.loss is not None:
                arrays["dump/loss"][i, : len(text.loss)] = text.loss
        for side, pairs in (("top", each.raises), ("bottom", each.lowers)):
            for place, (token, weight) in enumerate(pairs[:N_LOGITS]):
                arrays[f"logits/{side}_id"][number, place] = self.survey.vocabulary[token]
                arrays[f"logits/{side}_value"][number, place] = weight
        for place, (neuron, weight) in enumerate(each.neurons[:N_NEURONS]):
            arrays["neurons/weight_id"][number, place] = neuron
            arrays["neurons/weight_value"][number, place] = weight
        self._histogram("act", number, each.acts)
        self._histogram("logit", number, each.logits)

    def _histogram(self, kind: str, number: int, found: Histogram | None) -> None:
        if found is not None:
            self.arrays[f"dump/{kind}_counts"][number, : len(found.counts)] = found.counts
            self.arrays[f"dump/{kind}_edges"][number, : len(found.edges)] = found.edges
