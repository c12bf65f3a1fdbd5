"""Rows made from a known (planted) dictionary, and how much of it a trained dictionary recovers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.analysis.correlation import pair_blocks
from sae.analysis.matching import recovery, synthetic_bench
from sae.analysis.recorder import Recorder
from sae.dictionary.autoencoder import SAE
from sae.dictionary.directions import unit
from sae.training.rows import Batch

_TRUTHS, _BATCHES, _SAMPLES = range(3)  # independent streams of one seed
JUDGED_ROWS = 16_384
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class PlantedRows:
    """`x = Σ aᵢ dᵢ + noise`: n_truths random unit directions in d_in dimensions, on average `active` of them per row.

    Truth i is active with a probability ∝ decay^i (so some are rare), independently of the others, with a strength aᵢ
    uniform on 0 … 1. The noise is Gaussian with E‖noise‖² = noise². A source of rows for training: every batch is a
    pure function of (seed, step).
    Source: Sharkey et al. 2022; sparse_coding's toy data (512 truths in 256 dimensions, 5 active, decay 0.99).
    """

    n_truths: int = 512
    d_in: int = 256
    active: float = 5.0
    decay: float = 0.99
    noise: float = 0.1
    batch_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1 or self.probabilities.max() > 1:
            raise ValueError(
                f"planted: {self.active} active truths of {self.n_truths} with decay {self.decay} need a "
                "probability above 1. Ask for fewer active truths, or for a decay closer to 1 (0 < decay ≤ 1)."
            )

    @cached_property
    def probabilities(self) -> Float[Tensor, " n_truths"]:
        """The probability that each truth is active in a row."""
        weights = self.decay ** torch.arange(self.n_truths, dtype=torch.float64)
        return (weights * self.active / weights.sum()).float()

    @cached_property
    def truths(self) -> Float[Tensor, "n_truths d_in"]:
        """The planted directions, unit norm."""
        directions = torch.randn(self.n_truths, self.d_in, generator=self._generator(_TRUTHS, 0))
        return unit(directions)

    def rows(self, n: int, generator: torch.Generator) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n n_truths"]]:
        """n rows, and the strength of each truth in each row (0: not active)."""
        on = torch.rand(n, self.n_truths, generator=generator) < self.probabilities
        strengths = torch.rand(n, self.n_truths, generator=generator) * on
        noise = torch.randn(n, self.d_in, generator=generator) * (self.noise / self.d_in**0.5)
        return strengths @ self.truths + noise, strengths

    def batch(self, step: int) -> Batch:
        return Batch(self.rows(self.batch_tokens, self._generator(_BATCHES, step))[0])

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        generator = self._generator(_SAMPLES, seed)
        sizes = [min(ROWS_AT_ONCE, n - start) for start in range(0, n, ROWS_AT_ONCE)]
        return torch.cat([self.rows(size, generator)[0] for size in sizes])

    def _generator(self, stream: int, number: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.seed, stream, number]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


@torch.inference_mode()
def judge(sae: SAE, planted: PlantedRows) -> dict[str, float]:
    """How well a dictionary trained on planted rows recovers the planted one.

    The measures of `matching.recovery`; and on JUDGED_ROWS fresh rows those of `matching.synthetic_bench`, fvu, l0,
    dead_share and f_correlation: the mean over truths of the largest Pearson correlation of the truth's strength with a
    feature's activation.
    """
    x, strengths = planted.rows(JUDGED_ROWS, planted._generator(_SAMPLES, 2**40))
    acts = sae.feature_acts(x).sparse()
    x_hat = sae.output(acts, x)
    recorded = Recorder(sae.d_sae)
    everywhere = torch.ones(len(x), dtype=torch.bool)
    recorded.add(acts, everywhere)
    truth = Recorder(planted.n_truths)
    rows, ids = strengths.nonzero(as_tuple=True)
    truth.add_entries(ids, strengths[rows, ids], rows, everywhere)
    found, planted_acts = recorded.matrix(), truth.matrix()
    best = np.concatenate([block.pearson.max(1) for block in pair_blocks(planted_acts, found)])
    seen = strengths.any(0).numpy()
    return {
        **recovery(sae.W_dec, planted.truths),
        **synthetic_bench(sae.W_dec, found, planted.truths, planted_acts),
        "f_correlation": float(best[seen].mean()),
        "fvu": ((x - x_hat).double().pow(2).sum() / (x - x.mean(0)).double().pow(2).sum()).item(),
        "l0": found.nnz / len(x),
        "dead_share": float(1 - len(np.unique(found.indices)) / sae.d_sae),
    }
