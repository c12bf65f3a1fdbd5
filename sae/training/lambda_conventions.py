"""λ in the conventions of this project, the papers and other tools."""

from __future__ import annotations

import math
from typing import Any


def in_every_convention(found: float, penalised: str, scale: float, d_in: int) -> dict[str, Any]:
    """λ of a finished run in our units and as other tools' settings (on the same rows, in their normalisation).

    `found` is λ in scaled units, `penalised` what it multiplies. Scaled and raw losses differ by the factor scale²; a
    squared error averaged over d_in by another factor d_in.
    """
    if penalised == "λ · L0":
        return {
            "of": penalised,
            "scaled": found,
            "raw": found / scale**2,
            "sae_lens": found,
            "meaning": "scaled: ‖x−x̂‖² summed over d_in with E‖x‖² = d_in, mean over the batch, + λ L0 (SAELens' "
            "l0_coefficient under normalize_activations, and the paper's); raw: the same on x in the model's units",
        }
    if penalised == "λ · Σ f beside KL":
        return {
            "of": penalised,
            "scaled": found,
            "raw": found * scale,
            "meaning": "scaled: KL in nats, mean over the batch, + λ Σ f with E‖x‖² = d_in; raw: the same with f in "
            "the model's units",
        }
    if penalised == "λ · Σ f Σ ‖d^s‖":  # raw rows have no λ: each site has a scale of its own
        return {
            "of": penalised,
            "scaled": found,
            "meaning": "scaled: Σ_s ‖x^s−x̂^s‖², mean over the batch, + λ Σ f Σ_s ‖d^s‖, with the same E‖x^s‖² at each "
            "site s and Σ_s E‖x^s‖² = d_in, the number of values of all sites",
        }
    return {
        "of": penalised,
        "scaled": found,
        "raw": found / scale,
        "raw_mean_squared": found / scale / d_in,
        "sae_lens": found,
        "dictionary_learning": found / math.sqrt(d_in),
        "meaning": "raw: ‖x−x̂‖² summed over d_in, mean over the batch, + λ Σ f in the model's units; "
        "raw_mean_squared: the same with the squared error averaged over d_in (the paper's convention); "
        "sae_lens: l1_coefficient with normalised activations (E‖x‖ = √d_in); "
        "dictionary_learning: l1_penalty with E‖x‖² = 1",
    }
