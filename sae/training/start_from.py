"""Start a run from a dictionary that exists: its function on raw inputs, exactly, in the parameters of a recipe."""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE, fold_decoder_norms, fold_scale

UNIT_WITHIN = 1e-5  # rows this close to norm 1 are left as they are
# By the recipe's activation: those of dictionaries that have the same function there.
CONTINUES = {
    "relu": ("relu",),
    "topk": ("topk",),
    "batchtopk": ("batchtopk", "jumprelu", "relu"),
    "jumprelu": ("jumprelu", "batchtopk", "relu"),
    "gated": ("gated", "relu"),
}


class CannotStart(ValueError):
    """The recipe's dictionary cannot have the function of the one to start from; the message says why."""


@torch.no_grad()
def start_from_(sae: SAE, source: SAE, *, scale: float, target_scale: float, unit_norm: bool) -> None:
    """Makes `sae`, which reads `scale`·x and gives `target_scale`·x̂, the function of `source` on x.

    Exact but for rounding: biases and thresholds are multiplied by the scale; a pre-bias is moved into b_enc or out of
    it; decoder rows become unit rows where the recipe keeps them so. A ReLU becomes a JumpReLU with threshold 0, or a
    gate with magnitudes equal to its pre-activations.
    Raises: CannotStart for other shapes, a `row_norm`, or an activation that the recipe's cannot equal.
    """
    for name in ("d_in", "d_out", "d_sae", "skip"):
        mine, theirs = getattr(sae, name), getattr(source, name)
        if mine != theirs:
            raise CannotStart(f"it has {name} = {theirs}, this run {mine}.")
    if source.row_norm is not None:
        raise CannotStart(f"it normalises each row before it encodes ({source.row_norm}), which no recipe does.")
    if source.activation not in CONTINUES[sae.activation]:
        raise CannotStart(
            f"its activation is {source.activation}, and this recipe's is {sae.activation}, which cannot have the same "
            f"function. Recipes of {sae.activation} start from {', '.join(CONTINUES[sae.activation])}."
        )
    if sae.activation == "topk" and source.k != sae.k:
        raise CannotStart(f"it keeps k = {source.k} features, this run k = {sae.k}. Ask for --l0 {source.k}.")
    norms = source.W_dec.double().norm(dim=-1)
    if unit_norm and bool(((norms - 1).abs() > UNIT_WITHIN).any()):
        if source.activation == "topk":
            raise CannotStart(
                "its decoder rows are not of unit norm, as this recipe keeps them, and making them so would change "
                "which features are the k largest."
            )
        source = fold_decoder_norms(source)
    folded = fold_scale(source, 1 / scale, 1 / target_scale)
    tensors = dict(folded.tensors())
    if folded.pre_bias != sae.pre_bias:
        _move_pre_bias(tensors, into_b_enc=folded.pre_bias)
    if "threshold" in sae.tensors():
        tensors.setdefault("threshold", torch.zeros_like(tensors["b_enc"]))
        tensors["threshold"] = tensors["threshold"].clamp_min(0)  # a negative threshold counts as 0
    if sae.activation == "gated":
        tensors.setdefault("r_mag", torch.zeros_like(tensors["b_enc"]))
        tensors.setdefault("b_mag", tensors["b_enc"])
    for name, tensor in sae.tensors().items():
        tensor.copy_(tensors[name])


def _move_pre_bias(tensors: dict[str, Tensor], *, into_b_enc: bool) -> None:
    """(x − b_dec) W_enc + b_enc = x W_enc + (b_enc − b_dec W_enc); a gate's magnitudes keep their values."""
    shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
    moved = tensors["b_enc"].double() + (-shift if into_b_enc else shift)
    if "b_mag" in tensors:  # exp(r) (pre − b_enc) + b_mag, with the same pre and another b_enc
        change = tensors["r_mag"].double().exp() * (moved - tensors["b_enc"].double())
        tensors["b_mag"] = (tensors["b_mag"].double() + change).float()
    tensors["b_enc"] = moved.float()


def fingerprint(sae: SAE) -> str:
    """SHA-256 over the names and float32 bytes of the parameters, in the order of the names."""
    digest = sha256()
    for name, tensor in sorted(sae.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
