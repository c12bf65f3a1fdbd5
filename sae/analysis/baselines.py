"""Controls for a dictionary: dictionaries made without training, and one trained on a model with shuffled weights.

Each control is an ordinary `SAE`, so the same code measures every metric on it. A metric on which a control does as
well as a trained dictionary proves nothing (Bricken et al. 2023, randomised model; Heap et al. 2025, arXiv 2501.17727).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from sae.analysis.untrained import matrices_shuffled
from sae.dictionary.autoencoder import SAE
from sae.dictionary.directions import unit
from sae.lm import LanguageModel
from sae.training.rows import Batch

ICA_ROWS, ICA_ITERATIONS = 16_384, 30
ICA_VARIANCE = 0.999  # components beyond this share of the variance are noise, which whitening would amplify

MEANING = {
    "random": "as many random unit directions, the k largest projections kept, one scale fitted to the rows",
    "pca": "principal components with both signs, the k largest projections kept",
    "ica": f"FastICA ({ICA_ROWS:,} rows, {ICA_ITERATIONS} iterations, {ICA_VARIANCE:.1%} of the variance) with both "
    "signs, the k largest kept",
    "neurons": "the activations themselves: each neuron a feature (negative parts as features of their own)",
    "neurons_topk": "the k largest neurons by absolute value, as in the metrics topk_units_… of sae eval",
    "shuffled_model": "the same recipe on the same model with the entries of every weight matrix shuffled",
}


@torch.no_grad()
def made_without_training(
    x: Float[Tensor, "n d_in"], d_sae: int, k: int, seed: int = 0, *, only: Iterable[str] | None = None
) -> dict[str, SAE]:
    """The controls random, pca, ica, neurons and neurons_topk (see MEANING), or those in `only`, fitted to some rows.

    All but `neurons` keep k active features.
    """
    wanted = set(MEANING if only is None else only)
    mean, found = x.mean(0), dict[str, SAE]()
    if "random" in wanted:
        directions = unit(torch.randn(d_sae, x.shape[1], generator=torch.Generator().manual_seed(seed)))
        found["random"] = _scaled(_topk(directions, directions, mean, k), x)
    if "pca" in wanted:
        components = principal_components(x)
        found["pca"] = _both_signs(components, components, mean, k)
    if "ica" in wanted:
        found["ica"] = _both_signs(*independent_components(x[:ICA_ROWS], seed), mean, k)
    neurons = _neurons(x)
    if "neurons" in wanted:
        found["neurons"] = SAE(x.shape[1], len(neurons))
        found["neurons"].W_enc.copy_(neurons.T)
        found["neurons"].W_dec.copy_(neurons)
    if "neurons_topk" in wanted:
        found["neurons_topk"] = _topk(neurons, neurons, torch.zeros(x.shape[1]), k)
    return {name: sae.eval().requires_grad_(False) for name, sae in found.items()}


def _neurons(x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n_neurons d_in"]:
    """The neurons as directions; with their opposites where x has negative entries."""
    neurons = torch.eye(x.shape[1])
    return torch.cat([neurons, -neurons]) if (x < 0).any() else neurons


def principal_components(x: Float[Tensor, "n d_in"]) -> Float[Tensor, "d_in d_in"]:
    """Principal components as orthonormal rows, sorted by falling variance."""
    centred = (x - x.mean(0)).double()
    vectors: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors
    return vectors.flip(1).T.float().contiguous()


def independent_components(
    x: Float[Tensor, "n d_in"], seed: int
) -> tuple[Float[Tensor, "n_components d_in"], Float[Tensor, "n_components d_in"]]:
    """FastICA: unit directions dᵢ and the rows wᵢ that read their strengths, x ≈ mean + Σ (wᵢ · (x − mean)) dᵢ."""
    variances = torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0)
    enough = int((variances.cumsum(0) < ICA_VARIANCE * variances.sum()).sum()) + 1
    fitted = FastICA(
        n_components=min(enough, len(x) - 1), whiten="unit-variance", max_iter=ICA_ITERATIONS, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # ICA_ITERATIONS is a limit on purpose
        fitted.fit(x.double().numpy())
    mixing = torch.from_numpy(fitted.mixing_.T).float()  # [n_components, d_in]
    norms = mixing.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return mixing / norms, torch.from_numpy(fitted.components_).float() * norms


def _both_signs(
    directions: Float[Tensor, "n d_in"], readers: Float[Tensor, "n d_in"], centre: Float[Tensor, " d_in"], k: int
) -> SAE:
    """Two features for each direction: one for positive strengths, one for negative strengths."""
    return _topk(torch.cat([directions, -directions]), torch.cat([readers, -readers]), centre, k)


def _topk(
    directions: Float[Tensor, "n d_in"], readers: Float[Tensor, "n d_in"], centre: Float[Tensor, " d_in"], k: int
) -> SAE:
    """f = the k largest of ReLU(readers · (x − centre)), x̂ = centre + Σ f d."""
    n, d_in = directions.shape
    sae = SAE(d_in, n, activation="topk", k=min(k, n))
    sae.W_dec.copy_(directions)
    sae.W_enc.copy_(readers.T)
    sae.b_dec.copy_(centre)
    return sae


def _scaled(sae: SAE, x: Float[Tensor, "n d_in"]) -> SAE:
    """The same dictionary with its encoder multiplied by the number that minimises the reconstruction error."""
    centred, x_hat = x - sae.b_dec, sae.output(sae.feature_acts(x).sparse(), x) - sae.b_dec
    sae.W_enc.mul_((centred * x_hat).sum() / x_hat.pow(2).sum().clamp_min(1e-12))
    return sae


@contextmanager
def shuffled_weights(model: LanguageModel, seed: int = 0) -> Iterator[LanguageModel]:
    """Inside the `with` block the entries of every weight matrix of the model are in a random order.

    What the model has learned is gone; the distribution of each matrix's entries and all vectors (biases, norms) stay.
    The weights are restored at the end, also after an error.
    Source: Bricken et al. 2023, "randomised" transformer.
    """
    with model.lock, matrices_shuffled(model, seed):
        yield model


class HeldRows:
    """Rows in memory as a source for training; each epoch has its own order, drawn from the seed."""

    def __init__(self, x: Float[Tensor, "n d_in"], *, batch_tokens: int, seed: int) -> None:
        self.x, self.batch_tokens, self.seed = x, batch_tokens, seed
        self.d_in = x.shape[1]
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int) -> Batch:
        places = np.arange(step * self.batch_tokens, (step + 1) * self.batch_tokens)
        epochs, within = places // len(self.x), places % len(self.x)
        rows = np.concatenate([self._order_of(epoch)[within[epochs == epoch]] for epoch in np.unique(epochs)])
        return Batch(self.x[torch.from_numpy(rows)].float())

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        chosen = np.random.default_rng([self.seed, 1, seed]).permutation(len(self.x))[:n]
        return self.x[torch.from_numpy(chosen)].float()

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.x))
        return self._order
