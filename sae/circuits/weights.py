"""What heads do, from the weights alone: OV and QK circuits, copying, composition.

Rows are vectors: `OV = W_V W_O` moves a row of the stream, `QK = W_Q W_Kᵀ` scores destination × source. Norms between
the embedding and a head, and before the unembedding, are folded in without their scale σ.
Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.lm import LanguageModel
from sae.lm.weights import TransformerWeights

Composition = Literal["q", "k", "v"]


class Circuits(NamedTuple):
    """Full circuits of one head, as factors: `OV[src, out] = read_V @ write_U`, `QK[dst, src] = read_Q @ read_Kᵀ`.

    Rows and columns are the tokens that the tokenizer has; float64. QK is a score before division by σ² and √d_head.
    """

    read_Q: Float[Tensor, "token d_head"]
    read_K: Float[Tensor, "token d_head"]
    read_V: Float[Tensor, "token d_head"]
    write_U: Float[Tensor, "d_head token"]

    def ov(self) -> Float[Tensor, "src out"]:
        return self.read_V @ self.write_U

    def qk(self) -> Float[Tensor, "dst src"]:
        return self.read_Q @ self.read_K.T


@dataclass(frozen=True)
class Folded:
    """The weights in float64, with embedding and unembedding of the tokenizer's tokens only."""

    weights: TransformerWeights
    W_E: Float[Tensor, "token d_model"]
    W_U: Float[Tensor, "d_model token"]

    @classmethod
    def of(cls, model: LanguageModel) -> Folded:
        """Raises: ModelError for a model whose weights are not known by what they do."""
        weights, ids = model.weights(), model.token_ids
        norm = weights.ln_final.norm
        W_U = weights.W_U[:, ids].double()
        W_U = norm.transposed(W_U.T).T  # what multiplies the centred stream, norm weight included
        return cls(weights, weights.W_E[ids].double(), W_U - W_U.mean(1, keepdim=True))

    def circuits(self, layer: int, head: int) -> Circuits:
        """The circuits of a head that reads token embeddings through its layer's norm."""
        attn, x = self.weights.layers[layer].attn, self.normed(self.W_E, layer)
        Q, K, V = (x @ W[head].double() for W in (attn.W_Q, attn.W_K, attn.W_V))
        return Circuits(Q, K, V, attn.W_O[head].double() @ self.W_U)

    def normed(self, x: Float[Tensor, "*batch d_model"], layer: int) -> Float[Tensor, "*batch d_model"]:
        """(x − mean x) · w of a layer's norm."""
        return self.weights.layers[layer].ln1.norm.numerator(x)


def eigenvalue_score(left: Float[Tensor, "n d"], right: Float[Tensor, "d n"]) -> float:
    """Σ Re λ / Σ |λ| over the eigenvalues of `left @ right`: 1 if all are positive, −1 if all are negative.

    The d × d product `right @ left` has the same eigenvalues but for zeros; float64.
    """
    found = torch.linalg.eigvals(right.double() @ left.double())
    size = float(found.abs().sum())
    return float(found.real.sum()) / size if size else 0.0


def eigenvalues(left: Float[Tensor, "n d"], right: Float[Tensor, "d n"]) -> Tensor:
    """The eigenvalues of `left @ right` that are not zero by its rank: d complex numbers, largest first."""
    found: Tensor = torch.linalg.eigvals(right.double() @ left.double())
    largest_first: Tensor = found[found.abs().argsort(descending=True)]
    return largest_first


def copying_scores(model: LanguageModel) -> Float[Tensor, "layer head"]:
    """Eigenvalue score of each head's OV circuit, embedding → unembedding: positive eigenvalues raise the token read.

        Σ Re λ / Σ |λ|,   λ of  W_E · norm · W_V W_O · norm · W_U

    A head that attends to everything alike can score 1, too: the score says what a head writes, not where it looks.
    Source: Elhage et al. 2021, "Copying behavior: OV eigenvalues".
    """
    folded = Folded.of(model)
    return _per_head(folded, lambda c: eigenvalue_score(c.read_V, c.write_U))


def matching_scores(model: LanguageModel) -> Float[Tensor, "layer head"]:
    """Eigenvalue score of each head's QK circuit, embedding × embedding: positive where a token attends to itself."""
    return _per_head(Folded.of(model), lambda c: eigenvalue_score(c.read_Q, c.read_K.T))


def k_composed_matching(model: LanguageModel, layer: int) -> Float[Tensor, "earlier head"]:
    """Eigenvalue score of QK with keys written by each head of earlier layers: induction heads are positive.

        λ of  (W_E · norm · W_Q) (W_E · norm · OV_earlier · norm · W_K)ᵀ

    `earlier` counts the heads of the layers before, layer by layer. Source: Elhage et al. 2021, "Induction heads".
    """
    folded = Folded.of(model)
    attn, own = folded.weights.layers[layer].attn, folded.normed(folded.W_E, layer)
    found = []
    for before in range(layer):
        x, earlier = folded.normed(folded.W_E, before), folded.weights.layers[before].attn
        for head in range(folded.weights.n_heads):
            moved = folded.normed(x @ earlier.W_V[head].double() @ earlier.W_O[head].double(), layer)
            found.append(
                [
                    eigenvalue_score(own @ Q.double(), (moved @ K.double()).T)
                    for Q, K in zip(attn.W_Q, attn.W_K, strict=True)
                ]
            )
    return torch.tensor(found, dtype=torch.float64).reshape(-1, folded.weights.n_heads)


def _per_head(folded: Folded, score: Callable[[Circuits], float]) -> Float[Tensor, "layer head"]:
    n_layers, n_heads = len(folded.weights.layers), folded.weights.n_heads
    return torch.tensor(
        [[score(folded.circuits(layer, head)) for head in range(n_heads)] for layer in range(n_layers)],
        dtype=torch.float64,
    )


# --- composition -----------------------------------------------------------------------------------------------------


class HeadMatrices(NamedTuple):
    """One head: `OV = V @ O`, `QK = Q @ Kᵀ`."""

    Q: Float[Tensor, "d_model d_head"]
    K: Float[Tensor, "d_model d_head"]
    V: Float[Tensor, "d_model d_head"]
    O: Float[Tensor, "d_head d_model"]  # noqa: E741


def composition(first: HeadMatrices, second: HeadMatrices, kind: Composition) -> float:
    """How much of what the first head writes the second one reads by its queries, keys or values.

        q: ‖OV₁ QK₂‖ / (‖OV₁‖ ‖QK₂‖)    k: ‖QK₂ OV₁ᵀ‖ / (‖QK₂‖ ‖OV₁‖)    v: ‖OV₁ OV₂‖ / (‖OV₁‖ ‖OV₂‖)

    Frobenius norms; 1 at most. Compare with `random_composition`.
    Source: Elhage et al. 2021, "Composition" (Q-, K- and V-composition).
    """
    reads, rest = {"q": (second.Q, second.K.T), "k": (second.K, second.Q.T), "v": (second.V, second.O)}[kind]
    whole = _size(first.V, first.O) * _size(reads, rest)
    return _size(first.V @ (first.O @ reads), rest) / whole if whole else 0.0


def composition_scores(model: LanguageModel, kind: Composition) -> Float[Tensor, "writer reader"]:
    """`composition` of each head with each head of a later layer; heads counted layer by layer, nan for other pairs.

    The later head's norm is folded in: its centring and its weight, not its scale.
    """
    weights = model.weights()
    n_heads, n_layers = weights.n_heads, len(weights.layers)
    scores = torch.full((n_layers * n_heads, n_layers * n_heads), torch.nan, dtype=torch.float64)
    heads = [head_matrices(weights, layer, head) for layer in range(n_layers) for head in range(n_heads)]
    for place, second in enumerate(heads):
        for before in range(place // n_heads * n_heads):
            scores[before, place] = composition(heads[before], second, kind)
    return scores


@lru_cache
def random_composition(d_model: int, d_head: int, *, n: int = 50, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the score of pairs of heads with normal random weights: the baseline."""
    generator = torch.Generator().manual_seed(seed)

    def head() -> HeadMatrices:
        Q, K, V, write = torch.randn(4, d_model, d_head, generator=generator, dtype=torch.float64)
        return HeadMatrices(Q, K, V, write.T)

    found = torch.tensor([composition(head(), head(), "k") for _ in range(n)])
    return float(found.mean()), float(found.std())


def head_matrices(weights: TransformerWeights, layer: int, head: int) -> HeadMatrices:
    """A head's matrices in float64, its layer's norm folded into what reads: the centring and the norm's weight."""
    norm, attn = weights.layers[layer].ln1.norm, weights.layers[layer].attn
    Q, K, V = (norm.transposed(W[head].double().T).T for W in (attn.W_Q, attn.W_K, attn.W_V))
    return HeadMatrices(Q, K, V, attn.W_O[head].double())


def _size(left: Float[Tensor, "n d"], right: Float[Tensor, "d m"]) -> float:
    """Frobenius norm of `left @ right` from d × d products."""
    return math.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum())))


# --- bigrams ---------------------------------------------------------------------------------------------------------


def direct_bigrams(model: LanguageModel) -> Float[Tensor, "token next"]:
    """Logits of the direct path, token embedding → unembedding, centred per row: what order 0 knows of bigrams.

    Without the final norm's scale and without the position embedding. Source: Elhage et al. 2021, "zero-layer".
    """
    folded = Folded.of(model)
    found: Float[Tensor, "token next"] = folded.W_E @ folded.W_U
    return found


def bigram_agreement(
    logits: Float[Tensor, "token next"],
    tokens: Int[Tensor, "contexts pos"],
    ids: Int[Tensor, " token"],
    *,
    least: int = 100,
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Correlation, per token, of the direct path's logits with log P(next | token) counted in a text, add-one smoothed.

    Tokens that occur at least `least` times; returns the correlations and the places of those tokens in `ids`.
    """
    counts = bigram_counts(tokens, ids)
    rows = (counts.sum(1) >= least).nonzero()[:, 0]
    log_p = (counts[rows] + 1).log()
    pair = torch.stack([logits[rows], log_p])
    pair = pair - pair.mean(-1, keepdim=True)
    return torch.nn.functional.cosine_similarity(pair[0], pair[1], dim=-1), rows


def bigram_counts(tokens: Int[Tensor, "contexts pos"], ids: Int[Tensor, " token"]) -> Float[Tensor, "token next"]:
    """How often each token of `ids` follows each other one in a text."""
    place = torch.full((int(max(ids.max(), tokens.max())) + 1,), -1)
    place[ids] = torch.arange(len(ids))
    first, second = place[tokens[:, :-1].flatten()], place[tokens[:, 1:].flatten()]
    kept = (first >= 0) & (second >= 0)
    pairs = (first * len(ids) + second)[kept]
    return torch.bincount(pairs, minlength=len(ids) ** 2).double().view(len(ids), len(ids))
