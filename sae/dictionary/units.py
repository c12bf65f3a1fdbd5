"""A layer's own units (the entries of its activation vectors) as the baseline of a dictionary.

After an activation function a unit is a neuron. A dictionary that is not more faithful than the k largest units, k
being its L0, shows nothing that the units do not show.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def active_units(x: Float[Tensor, "*rows d_in"]) -> Int[Tensor, "*rows"]:
    """The number of units that are not 0, the row's L0: d_in for activations that are dense and of both signs."""
    return (x != 0).sum(-1)


def participation_ratio(x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows"]:
    """`(Σ a²)² / Σ a⁴` of each row in float64: n for n units of equal size, whatever their signs; 0 for a row of zeros.

    Source: the inverse of the ratio in Bell & Dean 1970 (Atomic vibrations in vitreous silica), of a² instead of
    squared displacements.
    """
    squares = x.double().pow(2)
    fourth_powers = squares.pow(2).sum(-1)
    return squares.sum(-1).pow(2) / torch.where(fourth_powers > 0, fourth_powers, 1.0)


def largest_units(x: Float[Tensor, "*rows d_in"], k: int) -> Float[Tensor, "*rows d_in"]:
    """x with all but the k units of largest absolute value set to 0, in each row."""
    places = x.abs().topk(min(k, x.shape[-1]), sorted=False).indices
    return torch.zeros_like(x).scatter(-1, places, x.gather(-1, places))


def units_to_match(l0: float, n_units: int) -> int:
    """The k whose k largest units are compared with a dictionary of this L0: rounded, at least 1, at most all."""
    return min(n_units, max(1, round(l0)))
