"""Rows near a few directions for tests of training steps, and what some recipes need beside them.

Imports nothing that a bare GPU image lacks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.sites import Site
from sae.training.recipes import Recipe
from sae.training.rows import Batch
from sae.training.state import TrainState


class Rows:
    """`rows` rows a batch, each near 3 times a unit direction."""

    def __init__(self, d_in: int, rows: int = 10) -> None:
        self.d_in, self.rows = d_in, rows

    def batch(self, step: int) -> Batch:
        return Batch(self.sample(self.rows, step))

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        g = torch.Generator().manual_seed(seed)
        directions = 3 * torch.eye(self.d_in)[torch.randint(self.d_in, (n,), generator=g)]
        return torch.randn(n, self.d_in, generator=g) + directions


class TargetRows(Rows):
    """The same with a target of another width, y = sin(x U)."""

    d_out = 20

    def batch(self, step: int) -> Batch:
        return Batch(self.sample(self.rows, step), self.sample_targets(self.rows, step))

    def sample_targets(self, n: int, seed: int) -> Float[Tensor, "n d_out"]:
        U = torch.randn(self.d_in, self.d_out, generator=torch.Generator().manual_seed(99))
        return torch.sin(self.sample(n, seed) @ U)


class SiteRows(Rows):
    """The same, as rows of three sites."""

    def __init__(self, d_in: int, rows: int = 10) -> None:
        super().__init__(d_in, rows)
        second, third = d_in // 3, d_in // 4
        self.sites = tuple(Site(*site, 1.0) for site in (("a", d_in - second - third), ("b", second), ("c", third)))


class ModelRows(Rows):
    """The same with the rest of a model: logits = tanh(x A + resid) B."""

    def __init__(self, d_in: int, rows: int = 10) -> None:
        super().__init__(d_in, rows)
        g = torch.Generator().manual_seed(7)
        self.A, self.B = (torch.randn(shape, generator=g) / 3 for shape in ((d_in, 6), (6, 30)))

    def batch(self, step: int) -> Batch:
        resid = torch.randn(self.rows, 6, generator=torch.Generator().manual_seed(1000 + step))
        return Batch(self.sample(self.rows, step), resid=resid)

    def downstream(self, x: Float[Tensor, "n d_in"], resid: Float[Tensor, "n 6"]) -> Float[Tensor, "n 30"]:
        return torch.tanh(x @ self.A.to(x.device) + resid) @ self.B.to(x.device)


def rows_for(recipe: Recipe, d_in: int, rows: int) -> Rows:
    return {"y": TargetRows, "sites": SiteRows, "resid": ModelRows}.get(recipe.needs, Rows)(d_in, rows)


@torch.no_grad()
def make_sparse(state: TrainState, rows: Rows) -> None:
    """In the middle of its run, with about one active feature in a row, so that sparse products pay."""
    state.density, state.step, state.optimizer.step_count, state.penalty.step = 0.04, 10, 10, 10
    sae = state.sae
    x = torch.cat([rows.batch(step).x for step in range(2)]).to(state.device) * state.scale
    largest = sae.pre_acts(x).flatten().sort(descending=True).values
    bar, spread = largest[len(x)], largest[len(x) // 2] - largest[len(x)]
    if sae.activation == "jumprelu":
        state.tokens_since_fired[::3] = 1000  # long enough for their biases to rise
        sae.threshold.copy_(bar + torch.linspace(-1, 1, sae.d_sae) * spread)
    else:
        sae.b_enc -= bar
    if sae.activation == "gated":  # some gates that open give no magnitude
        sae.r_mag += torch.linspace(-0.5, 0.5, sae.d_sae)
        sae.b_mag += torch.linspace(1.0, -1.0, sae.d_sae) * spread
