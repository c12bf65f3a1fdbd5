"""LEACE through the package against the closed form in float64, and what erasure leaves to probes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.circuits.erase_edit import erase_edit
from sae.circuits.erasure import ErasureError, leace, random_eraser
from sae.circuits.results import Control, Measure, Result, write_result

pytest.importorskip("concept_erasure", reason="the optional package concept-erasure is not installed")


def rows(n: int = 600, d: int = 12, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    mixing = torch.randn(d, d, generator=g, dtype=torch.float64)
    means = 2 * torch.randn(classes, d, generator=g, dtype=torch.float64)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ mixing + means[labels]
    return x + 5, labels


def closed_form(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """x − W⁺ P W (x − mean), P the projection onto the columns of W Σ_xz; every class has a column in z."""
    x, z = x.numpy(), np.eye(classes)[labels.numpy()]
    centred, z = x - x.mean(0), z - z.mean(0)
    covariance = centred.T @ centred / (len(x) - 1)
    values, vectors = np.linalg.eigh(covariance)
    whiten, colour = (vectors * values**p @ vectors.T for p in (-0.5, 0.5))
    u, s, _ = np.linalg.svd(whiten @ (centred.T @ z / (len(x) - 1)), full_matrices=False)
    u = u[:, s > 1e-9]
    return torch.from_numpy(x - centred @ (colour @ u @ u.T @ whiten).T)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_package_gives_the_closed_form(classes: int) -> None:
    x, labels = rows(classes=classes)
    eraser = leace(x, labels, classes)
    assert (eraser(x) - closed_form(x, labels, classes)).abs().max() <= 1e-12 * x.abs().max()
    assert eraser.rank == classes - 1


def test_its_default_settings_do_not() -> None:
    from concept_erasure import LeaceFitter

    x, labels = rows(n=60)
    z = torch.nn.functional.one_hot(labels, 3).double()
    assert (LeaceFitter.fit(x, z).eraser(x) - closed_form(x, labels, 3)).abs().max() > 1e-3


def test_no_linear_probe_is_left() -> None:
    """The class means are equal after erasure, so the best linear predictor of z is a constant (theorem 3.1)."""
    x, labels = rows()
    eraser = leace(x, labels, 3)
    erased = eraser(x)
    means = torch.stack([erased[labels == c].mean(0) for c in range(3)])
    assert (means - means[0]).abs().max() < 1e-10
    z = torch.nn.functional.one_hot(labels, 3).double()
    solved = torch.linalg.pinv(erased - erased.mean(0), rtol=1e-9) @ (z - z.mean(0))
    assert solved.abs().max() < 1e-8
    blind = random_eraser(x, eraser.rank)(x)
    assert (blind[labels == 0].mean(0) - blind[labels == 1].mean(0)).abs().max() > 0.1


def test_a_class_without_rows_is_refused() -> None:
    x, labels = rows()
    with pytest.raises(ErasureError, match="at least 2 rows of each of the 4 classes"):
        leace(x, labels, 4)


def test_a_result_is_read_as_an_edit_with_the_control_that_it_was_compared_with(tmp_path: Path) -> None:
    x, labels = rows()
    eraser = leace(x, labels, 3)
    about = {"rank": eraser.rank, "seed": 4, "concept": "a b"}
    arrays = {"projection": eraser.projection, "mean": eraser.mean}
    measured = {"probe_accuracy": Measure(0.5, 9, "tokens", "f", {"before": Control(1.0, "before")})}
    path = write_result(Result("erase", measured, about, "a_b", arrays=arrays), tmp_path)
    edit, control = erase_edit(path), erase_edit(path, control=True)
    assert torch.equal(edit.erase(x), eraser(x))
    assert torch.equal(control.erase(x), random_eraser(x, eraser.rank, seed=4)(x))
    removed = x - control.erase(x)
    assert torch.linalg.matrix_rank(removed, rtol=1e-9) == eraser.rank
    assert [str(each) for each in (edit, control)] == ["erase:a_b", "erase:a_b:random"]
    with pytest.raises(ErasureError, match="a result of the lens depth"):
        erase_edit(write_result(Result("depth", measured, {}), tmp_path))
