"""Shapes in signatures are checked while tests run."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from sae.dictionary.autoencoder import SAE


def test_a_wrong_shape_is_noticed() -> None:
    sae = SAE(6, 12)
    assert sae.decode(torch.zeros(3, 12)).shape == (3, 6)
    with pytest.raises(jaxtyping.TypeCheckError, match="feature_acts"):
        sae.feature_acts(torch.zeros(3))
