"""The layer's own units as the baseline of a dictionary: is it more faithful than as many of the largest units?"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from sae.evaluation.blocks import Ablated, Block
from sae.evaluation.ratio_metrics import counted
from sae.lm import LanguageModel
from sae.lm.splice import replaced_losses
from sae.lm.units import active_units, largest_units, participation_ratio

AS_FAITHFUL = "at this L0 the layer's own units are as faithful"
ALREADY_SPARSE = f"{AS_FAITHFUL}: its activations are already sparse"
NOT_BETTER = f"{AS_FAITHFUL}: the dictionary is not better than as many of the largest"


class UnitsBaseline:
    """The model's losses with x replaced by its k largest units, on one block after another.

    Of the dictionaries that share `ablated`, those with the same k share the losses. Without a model there are none.
    """

    def __init__(self, model: LanguageModel | None, hook_point: str, k: int, ablated: Ablated | None) -> None:
        self._model, self._hook_point, self._k = model, hook_point, k
        self._ablated: Ablated = {} if ablated is None else ablated
        self._block = 0

    def sums(self, block: Block) -> dict[str, Float64[np.ndarray, "contexts pos"]]:
        """What each position adds to those of `metrics.SUMS` that describe the units and the k largest of them."""
        x, largest = block.wanted.double(), largest_units(block.wanted, self._k)
        of_rows = {
            "units_l0": active_units(x),
            "units_participation": participation_ratio(x),
            "topk_units_l0": active_units(largest),
            "topk_units_error": (x - largest.double()).pow(2).sum(-1),
        }
        losses = {} if self._model is None else {"ce_units": self._losses(self._model, block, largest)}
        return counted(block, of_rows, losses)

    def _losses(
        self, model: LanguageModel, block: Block, largest: Float[Tensor, "contexts pos d_out"]
    ) -> Float[Tensor, "contexts pos"]:
        known, name = self._ablated.setdefault(self._block, {}), f"ce_units_{self._k}"
        if name not in known:
            replacements = {name.removeprefix("ce_"): largest}
            known |= replaced_losses(model, block.tokens, block.keep, self._hook_point, replacements)
        self._block += 1
        return known[name]


def verdict(metrics: dict[str, dict[str, Any]], k: int, n_units: int) -> dict[str, Any]:
    """The section `units` of eval.json: the baseline's k, and in words whether the dictionary is better.

    It is better if the 95% interval of ce_gain_over_units lies above 0; without losses, if its fvu is lower. The
    activations count as already sparse if their participation ratio is at most k.
    """
    gain, ratio = metrics.get("ce_gain_over_units"), metrics["units_participation_ratio"]["value"]
    if gain is None or gain["value"] is None:
        fvu, of_units = metrics["fvu"]["value"], metrics["topk_units_fvu"]["value"]
        as_faithful = fvu is not None and fvu >= of_units
    else:
        as_faithful = gain["ci95"][0] <= 0
    sparse = ratio is not None and ratio <= k
    return {
        "n_units": n_units,
        "k": k,
        "as_faithful": as_faithful,
        "verdict": (ALREADY_SPARSE if sparse else NOT_BETTER) if as_faithful else None,
        "formula": "k = l0, rounded, at least 1. As faithful: the 95% interval of ce_gain_over_units is not above 0 "
        "(without losses: fvu ≥ topk_units_fvu). Already sparse: units_participation_ratio ≤ k",
        "version": 1,
    }
