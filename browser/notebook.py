"""Features in a notebook: the exported page, offline, shut in a frame of its own."""

from __future__ import annotations

import html
from pathlib import Path

from browser import export
from browser.notes import Notes
from store.features import FeatureIndex


class Shown(bytes):
    """One HTML page; a notebook displays it, and `Path(…).write_bytes(shown)` keeps it."""

    def _repr_html_(self) -> str:
        page = html.escape(self.decode(), quote=True)
        return f'<iframe sandbox srcdoc="{page}" style="width:100%;height:640px;border:0"></iframe>'


def show(directory: str | Path, *features: int) -> Shown:
    """The features of the dictionary in `directory` as one self-contained page, in the order given.

    Raises: StoreError without a feature index; ValueError for no feature, too many, or one that does not exist.
    """
    directory = Path(directory)
    index, notes = FeatureIndex.open(directory / "features.zarr"), Notes(directory)
    if not 1 <= len(features) <= export.MAX_FEATURES:
        raise ValueError(f"show: {len(features)} features asked for; 1 to {export.MAX_FEATURES} make a page.")
    for feature in features:
        if not 0 <= feature < index.d_sae:
            raise ValueError(f"show: feature {feature} does not exist; features are 0 … {index.d_sae - 1:,}.")
    described = [export.describe(index, feature, notes.get(feature)) for feature in features]
    provenance = f"{directory.resolve().name} · {index.d_sae:,} features · {index.kept_tokens:,} tokens"
    return Shown(export.to_html(provenance, described))
