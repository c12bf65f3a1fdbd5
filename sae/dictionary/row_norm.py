"""Normalisation of each row by itself, before a dictionary encodes it, and its inverse on x̂.

Training here uses none: it scales all rows by one constant. Dictionaries of other tools need it.

| row_norm | what the encoder reads | x̂ |
|---|---|---|
| `mean` | x; its columns sum to 0, so that each row's mean makes no difference | x̂ + mean(x) |
| `layer_norm` | (x − mean(x)) / (std(x) + 1e-5), std with d − 1 | x̂ · std(x) + mean(x) |
| `unit_mean_square` | x · √d / ‖x‖ | x̂ · ‖x‖ / √d |

Source: SAELens' `normalize_activations` ("layer_norm", "constant_norm_rescale") and openai/sparse_autoencoder's
`normalize`; `mean` is TransformerLens' `center_writing_weights` seen from the model's own activations.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

ROW_NORMS = ("mean", "layer_norm", "unit_mean_square")
LAYER_NORM_EPS = 1e-5  # added to the standard deviation, and not undone: as the other tools do


def normalised(x: Float[Tensor, "*batch d_in"], row_norm: str | None) -> Float[Tensor, "*batch d_in"]:
    """What the encoder reads of x."""
    match row_norm:
        case "layer_norm":
            return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + LAYER_NORM_EPS)
        case "unit_mean_square":
            return x / _root_mean_square(x)
    return x


def restored(
    x_hat: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"], row_norm: str | None
) -> Float[Tensor, "*batch d_out"]:
    """x̂ of the normalised rows in the units of x."""
    match row_norm:
        case "mean":
            return x_hat + x.mean(-1, keepdim=True)
        case "layer_norm":
            return x_hat * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
        case "unit_mean_square":
            return x_hat * _root_mean_square(x)
    return x_hat


def _root_mean_square(x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"]:
    """‖x‖ / √d; a row of zeros counts as 1, so that it stays zero."""
    scale = x.pow(2).mean(-1, keepdim=True).sqrt()
    return scale.where(scale > 0, scale.new_ones(()))
