"""What steering needs from files: the units of activations, each feature's maximum and 99th percentile; erasers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sae.jobs.checkpoint import read_tensors
from sae.pipeline.errors import PipelineError
from store.features import FeatureIndex

if TYPE_CHECKING:
    from sae.interventions.edits import Erasure


def feature_max(directory: str | Path) -> np.ndarray:
    """Largest held-out activation of each feature [d_sae], from feature_stats.safetensors (written by `evaluate`)."""
    return _held_out_stats(Path(directory))["max"].numpy()


def feature_units(directory: str | Path) -> dict[str, np.ndarray]:
    """The units of steering, `feature_max` and `feature_p99` [d_sae], as arguments of `sae.steer`.

    They are taken over the tokens of the feature index, as in the browser; without an index over the held-out tokens
    of `evaluate`. Raises: PipelineError if there is neither.
    """
    directory = Path(directory)
    if (directory / "features.zarr").is_dir():
        stats = FeatureIndex.open(directory / "features.zarr").stats
        return {"feature_max": stats["max"], "feature_p99": stats["p99"]}
    held_out = _held_out_stats(directory)
    return {f"feature_{name}": held_out[name].numpy() for name in ("max", "p99")}


def erasure(directory: str | Path, concept: str, *, control: bool = False) -> Erasure:
    """The edit `erase:CONCEPT` of `sae.steer`, from the dictionary's result of `sae lens erase`.

    `control` is the random subspace of equal rank that the result was compared with.
    Raises: PipelineError if there is no such result; ResultError if it cannot be read.
    """
    from sae.circuits.erase_edit import erase_edit
    from sae.circuits.results import DIRECTORY

    path = Path(directory) / DIRECTORY / f"erase-{concept}.json"
    if not path.is_file():
        raise PipelineError(
            f"{path} is missing. Run `sae lens erase {directory} --concept {concept}`, which writes it."
        )
    return erase_edit(path, control=control)


def _held_out_stats(directory: Path) -> dict[str, Tensor]:
    path = directory / "feature_stats.safetensors"
    if not path.is_file():
        raise PipelineError(f"{path} is missing. Run `sae eval {directory}`, which writes it.")
    return read_tensors(path)[0]
