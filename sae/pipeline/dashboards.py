"""Import another tool's feature pages as an index that the browser reads.

The pages hold samples of the firings, not all of them; the index is marked as `sampled`.
"""

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
from store.common import DocumentRecord, explaining_full_disk, write_bytes
from store.features import FeatureWriter

DUMP_FORMATS = tuple(dashboards.READERS)
MAX_ROWS = 1 << 28  # tokens of all texts, each padded to the longest
N_LOGITS, N_NEURONS = 20, 10


@dataclass
class _Survey:
    """What must be known of all files before the first text is written."""

    vocabulary: dict[bytes, int] = field(default_factory=lambda: {b"": 0})  # token 0 pads shorter texts
    documents: dict[tuple[str, str], int] = field(default_factory=dict)  # (title, file) → document number
    sha256: dict[str, str] = field(default_factory=dict)  # by file
    file_of: dict[int, str] = field(default_factory=dict)  # by feature
    origin: dict[str, str] = field(default_factory=dict)
    n_texts: int = 0
    longest: int = 1
    act_bars: int = 0
    logit_bars: int = 0

    def add(self, page: DumpedFeature, file: str) -> None:
        """Counts one feature. Raises: InteropError if it was seen before."""
        if page.feature in self.file_of:
            raise InteropError(
                f"feature {page.feature} is in {self.file_of[page.feature]} and again in {file}; a dump of one "
                "dictionary has it once. Import the dump of each dictionary separately."
            )
        self.file_of[page.feature] = file
        self.origin |= page.origin
        self.n_texts += len(page.texts)
        self.longest = max([self.longest, *(len(text.tokens) for text in page.texts)])
        self.act_bars = max(self.act_bars, len(page.acts.counts) if page.acts else 0)
        self.logit_bars = max(self.logit_bars, len(page.logits.counts) if page.logits else 0)
        for text in page.texts:
            self.documents.setdefault((text.group, file), len(self.documents))
            for token in text.tokens:
                self._number(token)
        for token, _ in (*page.raises, *page.lowers):
            self._number(token)

    def _number(self, token: bytes) -> None:
        self.vocabulary.setdefault(token, len(self.vocabulary))

    @property
    def d_sae(self) -> int:
        return max(self.file_of) + 1

    @property
    def n_contexts(self) -> int:
        """One for each text; an index has at least one."""
        return max(1, self.n_texts)


def import_dump(source: str | Path, out: str | Path, *, format: str) -> Path:
    """Reads the feature pages below `source` and writes `out` (config.json, features.zarr), which the browser shows.

    `format` is `sae-dashboard` (SAEDashboard's batches, Neuronpedia's features) or `paper`. The index holds the dump's
    texts, activations, statistics and logit weights. It is marked `sampled`, so that nothing is concluded from firings
    that the dump does not hold. Ablation losses are read as loss without the feature − loss, in nats.
    Raises: InteropError for a file that is broken or contradicts itself; PipelineError for an unknown format or an
    `out` that holds files. Then nothing is left in `out`.
    """
    source, out = Path(source), Path(out)
    if format not in DUMP_FORMATS:
        raise PipelineError(f"import: the format of a dump is one of {', '.join(DUMP_FORMATS)}; got {format!r}.")
    refuse_filled(out, "import")
    paths = dashboards.files(source)
    survey = _surveyed(source, paths, format)
    existed = out.exists()
    try:
        with explaining_full_disk(out, lambda: "Nothing of it is kept."):
            return _write(out, paths, format, survey, source.resolve().name)
    except BaseException:
        shutil.rmtree(out / "features.zarr" if existed else out, ignore_errors=True)
        raise


def _surveyed(source: Path, paths: Sequence[Path], format: str) -> _Survey:
    """Reads all files once. Raises: InteropError if they hold no feature, or too much text."""
    survey = _Survey()
    for path, page in _pages(paths, format, "read"):
        survey.add(page, path.name)
    if not survey.file_of:
        raise InteropError(f"{source}: there is no feature in its {len(paths):,} files.")
    for path in paths:
        survey.sha256[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    if survey.n_contexts * survey.longest > MAX_ROWS:
        raise InteropError(
            f"{source}: {survey.n_texts:,} texts of up to {survey.longest:,} tokens are more than the {MAX_ROWS:,} "
            "tokens that an index of a dump can hold. Import a part of the files."
        )
    return survey


def _pages(paths: Sequence[Path], format: str, doing: str) -> Iterator[tuple[Path, DumpedFeature]]:
    with progress(doing, len(paths), "file") as bar:
        for path in paths:
            for page in dashboards.read(path, format):
                yield path, page
            bar.update(1)


def _write(out: Path, paths: Sequence[Path], format: str, survey: _Survey, name: str) -> Path:
    """Writes the index, then config.json."""
    model = {"id": survey.origin.get("model_id") or "?"}
    hook_point = " ".join(survey.origin[key] for key in ("layer", "sae_set") if key in survey.origin)
    writer = FeatureWriter(
        out / "features.zarr",
        d_sae=survey.d_sae,
        seq_len=survey.longest,
        n_contexts=survey.n_contexts,
        attributes={"sampled": True, "hook_point": hook_point, "model": model, "provenance": {"dump": name}},
        vocabulary=list(survey.vocabulary),
        documents=[DocumentRecord(title, file, "", survey.sha256[file]) for title, file in survey.documents],
    )
    try:
        panels = _Panels(survey)
        first = 0
        for path, page in _pages(paths, format, "write"):
            _append(writer, survey, path.name, page, first)
            panels.add(page, first)
            first += len(page.texts)
        if not first:
            blank = np.zeros((1, survey.longest), np.int64)
            writer.append(0, blank, blank > 0, blank - 1, blank[0, :0], blank[0, :0], blank[0, :0])
        index = writer.finish(panels.arrays)
    except BaseException:
        writer.abandon()
        raise
    config = {
        "kind": "feature-dump",
        "format": 1,
        "d_sae": survey.d_sae,
        "recipe": f"{format} dump",
        "model": model,
        "hook_point": hook_point,
        "imported": {"format": format, "source": name, "files": len(paths), "features": len(survey.file_of)},
    }
    write_bytes(out / "config.json", json.dumps(config, indent=2).encode())
    return index


def _append(writer: FeatureWriter, survey: _Survey, file: str, page: DumpedFeature, first: int) -> None:
    """Appends a feature's texts, one context for each, padded to the longest text of the dump."""
    if not page.texts:
        return
    shape = (len(page.texts), survey.longest)
    tokens, acts = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    document = np.full(shape, -1, np.int64)
    for i, text in enumerate(page.texts):
        size = len(text.tokens)
        tokens[i, :size] = [survey.vocabulary[token] for token in text.tokens]
        acts[i, :size] = text.acts
        document[i, :size] = survey.documents[text.group, file]
    rows = np.flatnonzero(acts.reshape(-1) > 0)
    writer.append(
        first,
        tokens,
        document >= 0,
        document,
        rows + first * survey.longest,
        np.full(len(rows), page.feature),
        acts.reshape(-1)[rows],
    )


class _Panels:
    """What a dump holds besides texts, as arrays of the index; the browser reads those named `dump/*`."""

    def __init__(self, survey: _Survey) -> None:
        d_sae, n_contexts = survey.d_sae, survey.n_contexts

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

    def add(self, page: DumpedFeature, first: int) -> None:
        number, arrays = page.feature, self.arrays
        arrays["stats/density"][number], arrays["stats/recorded_max"][number] = page.density, page.max
        arrays["dump/contexts"][number] = first, len(page.texts)
        for i, text in enumerate(page.texts, first):
            arrays["dump/hit"][i] = text.hit
            if text.loss is not None:
                arrays["dump/loss"][i, : len(text.loss)] = text.loss
        for side, pairs in (("top", page.raises), ("bottom", page.lowers)):
            for place, (token, weight) in enumerate(pairs[:N_LOGITS]):
                arrays[f"logits/{side}_id"][number, place] = self.survey.vocabulary[token]
                arrays[f"logits/{side}_value"][number, place] = weight
        for place, (neuron, weight) in enumerate(page.neurons[:N_NEURONS]):
            arrays["neurons/weight_id"][number, place] = neuron
            arrays["neurons/weight_value"][number, place] = weight
        self._histogram("act", number, page.acts)
        self._histogram("logit", number, page.logits)

    def _histogram(self, kind: str, number: int, found: Histogram | None) -> None:
        if found is not None:
            self.arrays[f"dump/{kind}_counts"][number, : len(found.counts)] = found.counts
            self.arrays[f"dump/{kind}_edges"][number, : len(found.edges)] = found.edges
