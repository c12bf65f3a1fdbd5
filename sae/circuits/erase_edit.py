"""The result of `sae lens erase` as an edit for steering, and its control."""

from __future__ import annotations

from pathlib import Path

from sae.circuits.erasure import Eraser, ErasureError, random_subspace
from sae.circuits.results import read_result
from sae.interventions.edits import Erasure


def erase_edit(path: str | Path, *, control: bool = False) -> Erasure:
    """The eraser that a result holds, or the random subspace of equal rank that the result was compared with.

    Raises: ErasureError for the result of another lens; ResultError, CheckpointError for a file that cannot be read.
    """
    path = Path(path)
    result = read_result(path)
    if result.lens != "erase" or not {"projection", "mean"} <= result.arrays.keys():
        raise ErasureError(f"{path} is a result of the lens {result.lens}, not of `sae lens erase`.")
    eraser = Eraser(result.arrays["projection"], result.arrays["mean"], int(result.about["rank"]))
    name = path.stem.removeprefix("erase-")
    if control:
        return Erasure(name, random_subspace(eraser.mean, eraser.rank, seed=int(result.about["seed"])), is_control=True)
    return Erasure(name, eraser)
