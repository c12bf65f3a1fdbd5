"""The weights of a transformer by what they do: queries, keys, values and outputs per head, MLPs, norms, embeddings.

Only for models whose forward pass these weights reproduce exactly: learned positions, LayerNorm, attention then MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.lm.paths import Norm


@dataclass(frozen=True)
class AffineNorm:
    """LayerNorm: `norm.numerator(x) / norm.scale(x) + bias`."""

    norm: Norm
    bias: Float[Tensor, " d_model"]

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.norm.numerator(x) / self.norm.scale(x) + self.bias.to(x)


@dataclass(frozen=True)
class AttentionWeights:
    """Heads of one layer. Vectors are rows: `q = x @ W_Q[head] + b_Q[head]`, and a head writes `z @ W_O[head]`."""

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_Q: Float[Tensor, "head d_head"]
    b_K: Float[Tensor, "head d_head"]
    b_V: Float[Tensor, "head d_head"]
    b_O: Float[Tensor, " d_model"]

    def pattern(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch head dst src"]:
        """softmax(q kᵀ / √d_head), causal; x is what the norm gives."""
        scores = self.scores(x)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1)

    def scores(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch head dst src"]:
        """q kᵀ / √d_head, also where the mask forbids attention."""
        q, k = (self._per_head(x, W, b) for W, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K)))
        found: Tensor = q @ k.transpose(-1, -2) / self.W_Q.shape[-1] ** 0.5
        return found

    def values(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch head pos d_head"]:
        return self._per_head(x, self.W_V, self.b_V)

    @staticmethod
    def _per_head(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("...pm,hmd->...hpd", x, W.to(x)) + b[:, None].to(x)


@dataclass(frozen=True)
class MlpWeights:
    """`post = act(x @ W_in + b_in)`, written as `post @ W_out + b_out`; x is what the norm gives."""

    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]


@dataclass(frozen=True)
class LayerWeights:
    """One block; `mlp` and its norm are None in attention-only models."""

    ln1: AffineNorm
    attn: AttentionWeights
    ln2: AffineNorm | None = None
    mlp: MlpWeights | None = None


@dataclass(frozen=True)
class TransformerWeights:
    """All weights, in float32: copies, so that a later change of the model does not reach them."""

    W_E: Float[Tensor, "d_vocab d_model"]
    W_pos: Float[Tensor, "n_ctx d_model"]
    layers: tuple[LayerWeights, ...]
    ln_final: AffineNorm
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"]

    @property
    def n_heads(self) -> int:
        return int(self.layers[0].attn.W_Q.shape[0])

    @property
    def d_head(self) -> int:
        return int(self.layers[0].attn.W_Q.shape[-1])

    def embedded(self, tokens: Int[Tensor, "*batch pos"]) -> Float[Tensor, "*batch pos d_model"]:
        """What enters the first block."""
        return self.W_E[tokens.to(self.W_E.device)] + self.W_pos[: tokens.shape[-1]]

    def logits(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """`ln_final(resid) @ W_U + b_U`."""
        return self.ln_final(resid) @ self.W_U.to(resid) + self.b_U.to(resid)


def weights_from(find: Callable[[str], Tensor], *, n_layers: int, eps: float, has_mlp: bool) -> TransformerWeights:
    """The weights by TransformerLens' names (`blocks.0.attn.W_Q`, `blocks.0.ln1.w`, `W_E` …)."""

    def get(name: str) -> Tensor:
        return find(name).detach().float().clone()

    def norm(name: str) -> AffineNorm:
        return AffineNorm(Norm(get(f"{name}.w"), True, eps), get(f"{name}.b"))

    def attention(block: str) -> AttentionWeights:
        parts = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
        return AttentionWeights(**{part: get(f"{block}.attn.{part}") for part in parts})

    def layer(number: int) -> LayerWeights:
        block = f"blocks.{number}"
        if not has_mlp:
            return LayerWeights(norm(f"{block}.ln1"), attention(block))
        mlp = MlpWeights(get(f"{block}.mlp.W_out"), get(f"{block}.mlp.b_out"))
        return LayerWeights(norm(f"{block}.ln1"), attention(block), norm(f"{block}.ln2"), mlp)

    embeddings = {part: get(part) for part in ("W_E", "W_pos", "W_U", "b_U")}
    return TransformerWeights(
        layers=tuple(layer(number) for number in range(n_layers)), ln_final=norm("ln_final"), **embeddings
    )
