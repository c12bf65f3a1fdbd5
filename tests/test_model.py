"""The dictionary itself: encode, decode, scale folding, saving, and what loading refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.checkpoint import CheckpointError
from sae.model import SAE, fold_scale, load, save

KINDS = [("relu", None), ("topk", 1), ("topk", 3), ("topk", 11)]


def random_sae(activation: str, k: int | None, seed: int = 0) -> SAE:
    sae = SAE(4, 11, activation=activation, k=k)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae.requires_grad_(False)


@pytest.mark.parametrize(("activation", "k"), KINDS)
def test_encode_and_decode_are_the_formula(activation: str, k: int | None) -> None:
    sae, x = random_sae(activation, k), torch.randn(50, 4) * 2
    pre = (x.double() - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    f = pre.clamp_min(0)
    if k:
        kth = pre.sort(-1, descending=True).values[:, k - 1 : k]
        f = torch.where(pre >= kth, f, 0.0)
    torch.testing.assert_close(sae.encode(x).double(), f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        sae.decode(sae.encode(x)).double(), f @ sae.W_dec.double() + sae.b_dec, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(sae(x), sae.decode(sae.encode(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode_sparse(x).dense(), sae.encode(x), rtol=1e-4, atol=1e-5)
    if k:
        assert ((sae.encode(x) > 0).sum(-1) <= k).all()


@pytest.mark.parametrize(("activation", "k"), KINDS)
def test_leading_dimensions_are_kept(activation: str, k: int | None) -> None:
    sae, x = random_sae(activation, k), torch.randn(2, 3, 5, 4)
    assert sae.encode(x).shape == (2, 3, 5, 11)
    assert sae(x).shape == x.shape
    assert torch.equal(sae.encode(x).view(-1, 11), sae.encode(x.view(-1, 4)))
    torch.testing.assert_close(sae(x[0, 0, 0]), sae(x)[0, 0, 0])


@given(st.sampled_from(KINDS), st.floats(1e-3, 1e3), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_folded_dictionary_does_on_x_what_the_other_does_on_scaled_x(kind: tuple, scale: float, seed: int) -> None:
    sae = random_sae(*kind, seed=seed)
    folded = fold_scale(sae, scale)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed)) / scale
    close = {"rtol": 1e-3, "atol": 2e-5 / scale}
    torch.testing.assert_close(folded.encode(x), sae.encode(scale * x) / scale, **close)
    torch.testing.assert_close(folded(x), sae(scale * x) / scale, **close)
    assert torch.equal(folded.W_dec, sae.W_dec)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(11))
    assert folded.activation == sae.activation
    assert folded.k == sae.k


@pytest.mark.parametrize(("activation", "k"), KINDS)
def test_saved_and_loaded_bit_for_bit(tmp_path: Path, activation: str, k: int | None) -> None:
    sae = random_sae(activation, k)
    save(sae, tmp_path / "a", {"recipe": "x", "hook_point": "h"})
    found = load(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), found.parameters(), strict=True))
    assert (found.d_in, found.d_sae, found.activation, found.k) == (4, 11, activation, k)
    assert found.config["kind"] == "sae"
    assert found.config["recipe"] == "x"
    assert not any(parameter.requires_grad for parameter in found.parameters())
    x = torch.randn(5, 4)
    assert torch.equal(found.encode(x), sae.encode(x))


@pytest.mark.parametrize("k", [None, 0, -1, 12])
def test_topk_needs_a_k(k: int | None) -> None:
    with pytest.raises(ValueError, match=r"topk needs 1 <= k <= d_sae = 11; got k = "):
        SAE(4, 11, activation="topk", k=k)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="one of relu, topk; got 'gelu'"):
        SAE(4, 11, activation="gelu")


def test_loading_refuses_what_is_no_dictionary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load(tmp_path)
    for content in ("[]", '{"kind": "model"}', "3"):
        config.write_text(content)
        with pytest.raises(CheckpointError, match='expected "kind": "sae"'):
            load(tmp_path)
    save(random_sae("relu", None), tmp_path, {})
    good = json.loads(config.read_text())
    config.write_text(json.dumps(good | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads up to 1"):
        load(tmp_path)
    config.write_text(json.dumps(good | {"d_sae": 12}))
    with pytest.raises(CheckpointError, match=r"does not fit config\.json"):
        load(tmp_path)
    config.write_text(json.dumps({k: v for k, v in good.items() if k != "d_in"}))
    with pytest.raises(CheckpointError, match="d_in"):
        load(tmp_path)
    config.write_text(json.dumps(good))
    weights = tmp_path / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path)
