"""Logits from any residual stream of a model, as its own last steps compute them: the final norm, W_U, the soft cap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.lm import LanguageModel, ModelError, Readout

TOLERANCE = 1e-2  # of the largest logit, for models in 16 bits


@dataclass(frozen=True, eq=False)
class Unembedding:
    """`logits = cap(factor · norm(resid) @ W_U + constant)`; the constant (biases) is measured."""

    readout: Readout
    constant: Float[Tensor, " d_vocab"]

    def logits(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """What the model predicts from this residual stream; differentiable."""
        norm = self.readout.norm
        normed = norm.numerator(resid) / norm.scale(resid)
        found: Tensor = normed @ self.readout.W_U.to(resid) * self.readout.factor + self.constant.to(resid)
        cap = self.readout.soft_cap
        return found if cap is None else cap * torch.tanh(found / cap)

    def log_p(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Log-probabilities of the next token."""
        return self.logits(resid).log_softmax(-1)


@torch.inference_mode(False)
@torch.no_grad()
def unembedding_of(model: LanguageModel, tokens: Int[Tensor, "batch pos"]) -> Unembedding:
    """The model's last steps, checked on `tokens`.

    Raises: NoLinearPath if the logits do not follow from a norm and W_U; ModelError if they do not on these tokens.
    """
    readout, last = model.readout(), f"blocks.{model.n_layers - 1}.hook_resid_post"
    tokens = tokens[:1].clone()
    resid, logits = model.capture(tokens, last).clone(), model.logits(tokens).clone()
    without = Unembedding(readout, torch.zeros(model.d_vocab, device=resid.device)).logits(resid[0, 0])
    found = Unembedding(readout, readout.uncapped(logits[0, 0]) - readout.uncapped(without))
    if (found.logits(resid) - logits).abs().max() > TOLERANCE * logits.abs().max():
        raise ModelError(f"{model.id}: its logits do not follow from {last} by the final norm and W_U alone.")
    return found
