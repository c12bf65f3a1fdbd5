"""Shows features in a notebook: the exported page in a sandboxed frame, offline."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from browser import export
from store.features import FeatureIndex
from store.notes import Notes


class Shown(bytes):
    """One HTML page that a notebook displays; `Path(…).write_bytes(shown)` saves it."""

    def _repr_html_(self) -> str:
        page = html.escape(self.decode(), quote=True)
        return f'<iframe sandbox srcdoc="{page}" style="width:100%;height:640px;border:0"></iframe>'


def show(directory: str | Path, *features: int) -> Shown:
    """The features of the dictionary in `directory` as one self-contained page, in the order given.

    Raises: StoreError without a feature index; ValueError for no features, too many, or an unknown one.
    """
    described, provenance = _described(Path(directory), features)
    return Shown(export.to_html(provenance, described))


def describe(directory: str | Path, *features: int) -> list[dict[str, Any]]:
    """What the pages of these features show, as plain values: the content of the app's JSON export.

    Raises: as `show`.
    """
    return _described(Path(directory), features)[0]


def _described(directory: Path, features: Sequence[int]) -> tuple[list[dict[str, Any]], str]:
    index, notes = FeatureIndex.open(directory / "features.zarr"), Notes(directory)
    if not 1 <= len(features) <= export.MAX_FEATURES:
        raise ValueError(f"show: got {len(features)} features, expected 1 to {export.MAX_FEATURES}.")
    for feature in features:
        if not 0 <= feature < index.d_sae:
            raise ValueError(f"show: feature {feature} does not exist; features are numbered 0 to {index.d_sae - 1:,}.")
    described = [export.describe(index, feature, notes.get(feature)) for feature in features]
    provenance = f"{directory.resolve().name} · {index.d_sae:,} features · {index.kept_tokens:,} tokens"
    return described, provenance
