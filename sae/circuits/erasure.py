"""LEACE: the smallest linear edit after which no linear probe can tell a concept.

r(x) = x − P (x − E x), P = W⁺ U Uᵀ W with W = Σ_xx^(−½) and U an orthonormal basis of the columns of W Σ_xz; z is the
concept, one-hot. Source: Belrose et al. 2023, arXiv 2306.03819, theorem 4.3; the package `concept-erasure` is by its
authors, and this module is its one door.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SVD_TOLERANCE = 1e-12
# The package's defaults shrink Σ_xx and keep the edit from growing the trace; those edits are not the formula's.
EXACT = {"shrinkage": False, "constrain_cov_trace": False, "svd_tol": SVD_TOLERANCE}


class ErasureError(ValueError):
    """A concept cannot be erased; the message says why."""


@dataclass(frozen=True, eq=False)
class Eraser:
    """`x → x − (x − mean) @ projection`: affine, and the identity outside the erased directions."""

    projection: Float[Tensor, "d_in d_in"]
    mean: Float[Tensor, " d_in"]
    rank: int

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        moved = (x - self.mean.to(x)) @ self.projection.to(x)
        return x - moved


def leace(x: Float[Tensor, "row d_in"], labels: Int[Tensor, " row"], n_classes: int) -> Eraser:
    """Erases what linear probes can read of the labels from x, in float64.

    Raises: ErasureError if a class has no rows, or the package `concept-erasure` is not installed.
    """
    counts = torch.bincount(labels, minlength=n_classes)
    if len(counts) != n_classes or int(counts.min()) < 2:
        raise ErasureError(f"erasure needs at least 2 rows of each of the {n_classes} classes; got {counts.tolist()}.")
    try:
        from concept_erasure import LeaceFitter
    except ImportError as error:
        raise ErasureError(
            "erasing a concept needs the package concept-erasure: pip install 'monosem[erasure]'."
        ) from error
    rows = x.double().cpu()
    z = torch.nn.functional.one_hot(labels.cpu(), n_classes)[:, 1:].double()  # the last column follows from the others
    fitter = LeaceFitter(rows.shape[1], z.shape[1], dtype=torch.float64, **EXACT)
    eraser = fitter.update(rows, z).eraser
    left, right = eraser.proj_left, eraser.proj_right
    projection = (left @ right).T  # rows of x from the left
    return Eraser(projection, rows.mean(0), int(torch.linalg.matrix_rank(projection)))


def random_eraser(x: Float[Tensor, "row d_in"], rank: int, *, seed: int = 0) -> Eraser:
    """The control: an orthogonal projection onto a random subspace of this rank is removed, around the mean."""
    return random_subspace(x.double().mean(0).cpu(), rank, seed=seed)


def random_subspace(mean: Float[Tensor, " d_in"], rank: int, *, seed: int = 0) -> Eraser:
    """An orthogonal projection onto a random subspace of this rank, removed around `mean`."""
    noise = torch.randn(len(mean), rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(noise).Q
    return Eraser(basis @ basis.T, mean, rank)
