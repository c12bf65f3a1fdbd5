"""What a dictionary must beat: dictionaries made without training, and one trained on a model that knows nothing.

Each control is an ordinary `SAE`, so every metric is measured on it by the same code. A metric that a control passes
certifies nothing (Bricken et al. 2023, randomised model; Heap et al. 2025, arXiv 2501.17727).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.directions import unit
from sae.lm import LanguageModel
from sae.training.rows import Batch

ICA_ROWS, ICA_ITERATIONS = 16_384, 30
ICA_VARIANCE = 0.999  # components beyond this share of the variance are noise that whitening would blow up

MEANING = {
    "random": "as many random unit directions, the k largest projections kept, one scale fitted to the rows",
    "pca": "principal components with both signs, the k largest projections kept",
    "ica": f"FastICA ({ICA_ROWS:,} rows, {ICA_ITERATIONS} iterations, {ICA_VARIANCE:.1%} of the variance) with both "
    "signs, the k largest kept",
    "neurons": "the activations themselves: each neuron a feature (negative parts as features of their own)",
    "neurons_topk": "the k largest neurons",
    "shuffled_model": "the same recipe on the same model with the entries of every weight matrix shuffled",
}


@torch.no_grad()
def made_without_training(x: Float[Tensor, "n d_in"], d_sae: int, k: int, seed: int = 0) -> dict[str, SAE]:
    """random, pca, ica, neurons and neurons_topk, from some rows; k active features where there is a choice."""
    generator = torch.Generator().manual_seed(seed)
    mean = x.mean(0)
    directions = unit(torch.randn(d_sae, x.shape[1], generator=generator))
    found = {"random": _scaled(_topk(directions, directions, mean, k), x)}
    components = principal_components(x)
    found["pca"] = _both_signs(components, components, mean, k)
    mixing, unmixing = independent_components(x[:ICA_ROWS], seed)
    found["ica"] = _both_signs(mixing, unmixing, mean, k)
    neurons = torch.eye(x.shape[1])
    if (x < 0).any():
        neurons = torch.cat([neurons, -neurons])
    found["neurons"] = SAE(x.shape[1], len(neurons))
    found["neurons"].W_enc.copy_(neurons.T)
    found["neurons"].W_dec.copy_(neurons)
    found["neurons_topk"] = _topk(neurons, neurons, torch.zeros(x.shape[1]), k)
    return {name: sae.eval().requires_grad_(False) for name, sae in found.items()}


def principal_components(x: Float[Tensor, "n d_in"]) -> Float[Tensor, "d_in d_in"]:
    """Orthonormal rows, most variance first."""
    centred = (x - x.mean(0)).double()
    return torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).T.float().contiguous()


def independent_components(
    x: Float[Tensor, "n d_in"], seed: int
) -> tuple[Float[Tensor, "n_components d_in"], Float[Tensor, "n_components d_in"]]:
    """Unit directions dᵢ of FastICA and the forms wᵢ that read their strengths: x ≈ mean + Σ (wᵢ · (x − mean)) dᵢ."""
    variances = torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0)
    enough = int((variances.cumsum(0) < ICA_VARIANCE * variances.sum()).sum()) + 1
    fitted = FastICA(
        n_components=min(enough, len(x) - 1), whiten="unit-variance", max_iter=ICA_ITERATIONS, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # bounded on purpose
        fitted.fit(x.double().numpy())
    mixing = torch.from_numpy(fitted.mixing_.T).float()  # [n_components, d_in]
    norms = mixing.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return mixing / norms, torch.from_numpy(fitted.components_).float() * norms


def _both_signs(directions: Tensor, forms: Tensor, mean: Tensor, k: int) -> SAE:
    return _topk(torch.cat([directions, -directions]), torch.cat([forms, -forms]), mean, k)


def _topk(directions: Tensor, forms: Tensor, centre: Tensor, k: int) -> SAE:
    """f = the k largest of ReLU(forms · (x − centre)), x̂ = centre + Σ f d."""
    n, d_in = directions.shape
    sae = SAE(d_in, n, activation="topk", k=min(k, n))
    sae.W_dec.copy_(directions)
    sae.W_enc.copy_(forms.T)
    sae.b_dec.copy_(centre)
    return sae


def _scaled(sae: SAE, x: Tensor) -> SAE:
    """The encoder times the one number with which the rows are reconstructed best."""
    centred, x_hat = x - sae.b_dec, sae.output(sae.feature_acts(x).sparse(), x) - sae.b_dec
    sae.W_enc.mul_((centred * x_hat).sum() / x_hat.pow(2).sum().clamp_min(1e-12))
    return sae


@contextmanager
def shuffled_weights(model: LanguageModel, seed: int = 0) -> Iterator[LanguageModel]:
    """Inside, the entries of every weight matrix of the model stand in a random order: what it learned is gone.

    The marginal distribution of each matrix stays; vectors (biases, norms) stay as they are.
    Source: Bricken et al. 2023, "randomised" transformer.
    """
    generator = torch.Generator().manual_seed(seed)
    module: torch.nn.Module = model.module  # type: ignore[attr-defined]
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    kept = [p.detach().clone() for p in matrices]
    with model.lock:
        try:
            for p in matrices:
                order = torch.randperm(p.numel(), generator=generator).to(p.device)
                _set(p, p.flatten()[order].view_as(p))
            yield model
        finally:
            for p, before in zip(matrices, kept, strict=True):
                _set(p, before)


@torch.no_grad()
def _set(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)


class HeldRows:
    """Rows in memory as a trainer's source: every epoch in a seeded order of its own."""

    def __init__(self, x: Float[Tensor, "n d_in"], *, batch_tokens: int, seed: int) -> None:
        self.x, self.batch_tokens, self.seed = x, batch_tokens, seed
        self.d_in = x.shape[1]
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int) -> Batch:
        places = np.arange(step * self.batch_tokens, (step + 1) * self.batch_tokens)
        epochs, within = places // len(self.x), places % len(self.x)
        rows = np.concatenate([self._of(epoch)[within[epochs == epoch]] for epoch in np.unique(epochs)])
        return Batch(self.x[torch.from_numpy(rows)].float())

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        chosen = np.random.default_rng([self.seed, 1, seed]).permutation(len(self.x))[:n]
        return self.x[torch.from_numpy(chosen)].float()

    def _of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.x))
        return self._order
