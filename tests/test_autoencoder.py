"""The dictionary itself: encode, decode, scale folding, saving, and what loading refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.dictionary.autoencoder import SAE, fold_decoder_norms, fold_scale, refuse_row_scale
from sae.dictionary.files import load, save
from sae.dictionary.inference import FrozenSAE
from sae.jobs.checkpoint import CheckpointError
from sae.kernels import choose

KINDS = [("relu", None), ("topk", 1), ("topk", 3), ("topk", 11), ("batchtopk", 3), ("jumprelu", None), ("gated", None)]


def random_sae(activation: str, k: int | None, seed: int = 0, **shape: object) -> SAE:
    """As loaded, so in evaluation mode; thresholds and gate biases of both signs."""
    sae = SAE(4, 11, activation=activation, k=k, **shape)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in sae.tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=g))
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae.eval().requires_grad_(False)


def activations(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """f in float64, each activation as its paper writes it."""
    p = {name: tensor.double() for name, tensor in sae.tensors().items()}
    x = x.double() - (p["b_dec"] if sae.pre_bias else 0)
    pre = x @ p["W_enc"] + p["b_enc"]
    if sae.activation == "topk":
        kth = pre.sort(-1, descending=True).values[:, sae.k - 1 : sae.k]
        return torch.where(pre >= kth, pre.clamp_min(0), 0.0)
    if sae.activation == "batchtopk" and sae.training:
        above = torch.where(pre > 0, pre - p["threshold"], -torch.inf)
        kth = above.flatten().sort(descending=True).values[sae.k * len(pre) - 1]
        return torch.where(above >= kth, pre.clamp_min(0), 0.0)
    if sae.activation in ("jumprelu", "batchtopk"):
        return pre.clamp_min(0) * (pre > p["threshold"])
    if sae.activation == "gated":
        magnitude = (x @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]).clamp_min(0)
        return (pre > 0) * magnitude
    return pre.clamp_min(0)


@pytest.mark.parametrize(("activation", "k"), KINDS)
def test_encode_and_decode_are_the_formula(activation: str, k: int | None) -> None:
    sae, x = random_sae(activation, k), torch.randn(50, 4) * 2
    for mode in (False, True):
        f = activations(sae.train(mode), x)
        assert 0 < (f > 0).double().mean() < 1
        torch.testing.assert_close(sae.encode(x).double(), f, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            sae.decode(sae.encode(x)).double(), f @ sae.W_dec.double() + sae.b_dec, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(sae(x), sae.decode(sae.encode(x)), rtol=1e-5, atol=1e-5)
        for kernels in ("reference", "cpu"):
            acts = sae.feature_acts(x, choose(kernels))
            torch.testing.assert_close(acts.sparse().dense(), sae.encode(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(sae.output(acts, x), sae(x), rtol=1e-4, atol=1e-5)
        if activation == "topk":
            assert ((sae.encode(x) > 0).sum(-1) <= k).all()
        if activation == "batchtopk" and mode:
            assert (sae.encode(x) > 0).sum() <= k * len(x)


@pytest.mark.parametrize(("activation", "k"), [kind for kind in KINDS if kind[0] != "topk"])
def test_a_dictionary_without_pre_bias_and_one_onto_other_rows(activation: str, k: int | None) -> None:
    sae, x = random_sae(activation, k, d_out=6, pre_bias=False, skip=True), torch.randn(50, 4) * 2
    f, p = activations(sae, x), sae.tensors()
    y = f @ p["W_dec"].double() + p["b_dec"] + x.double() @ p["W_skip"].double()
    torch.testing.assert_close(sae.encode(x).double(), f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x).double(), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.output(sae.feature_acts(x), x).double(), y, rtol=1e-4, atol=1e-4)
    folded = fold_scale(sae, 4.0, 0.5)
    torch.testing.assert_close(folded(x / 4), sae(x) / 0.5, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.encode(x / 4), sae.encode(x) / 0.5, rtol=1e-4, atol=1e-4)
    assert torch.equal(folded.W_dec, sae.W_dec)


def test_a_pre_bias_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="b_dec has d_out = 6 entries, x has d_in = 4"):
        SAE(4, 11, d_out=6)


@pytest.mark.parametrize(("activation", "k"), [kind for kind in KINDS if kind[0] != "topk"])
def test_folding_decoder_norms_keeps_the_function(activation: str, k: int | None) -> None:
    sae, x = random_sae(activation, k), torch.randn(50, 4) * 2
    norms = torch.linspace(0.0, 3.0, 11)
    sae.W_dec *= norms[:, None]
    folded = fold_decoder_norms(sae)
    norms[0] = 1.0  # a zero row stays one
    torch.testing.assert_close(folded.W_dec.norm(dim=1)[1:], torch.ones(10))
    torch.testing.assert_close(folded.encode(x), sae.encode(x) * norms, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-4, atol=1e-4)


def test_folding_decoder_norms_would_change_topk() -> None:
    with pytest.raises(ValueError, match="which features are the k largest"):
        fold_decoder_norms(random_sae("topk", 3))


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
    mine, theirs = sae.tensors(), found.tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (found.d_in, found.d_sae, found.activation, found.k) == (4, 11, activation, k)
    assert found.config["kind"] == "sae"
    assert found.config["recipe"] == "x"
    assert not any(parameter.requires_grad for parameter in found.parameters())
    x = torch.randn(5, 4)
    assert torch.equal(found.encode(x), sae.encode(x))


@pytest.mark.parametrize(("activation", "k"), KINDS)
def test_a_part_of_the_features_is_read(tmp_path: Path, activation: str, k: int | None) -> None:
    sae = random_sae(activation, k)
    save(sae, tmp_path, {})
    part = load(tmp_path, range(2, 5))
    assert part.d_sae == 3
    for name, tensor in part.tensors().items():
        whole = sae.tensors()[name]
        assert torch.equal(tensor, whole if name == "b_dec" else whole[:, 2:5] if name == "W_enc" else whole[2:5]), name
    for wrong in (range(0), range(3, sae.d_sae + 1), range(0, 4, 2)):
        with pytest.raises(ValueError, match="Choose a range of these"):
            load(tmp_path, wrong)


@pytest.mark.parametrize("k", [None, 0, -1, 12])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_topk_needs_a_k(activation: str, k: int | None) -> None:
    with pytest.raises(ValueError, match=rf"{activation} needs 1 <= k <= d_sae = 11; got k = "):
        SAE(4, 11, activation=activation, k=k)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="one of relu, topk, batchtopk, jumprelu, gated; got 'gelu'"):
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
    with pytest.raises(CheckpointError, match="format 99; this version reads up to 2"):
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


COMPILE = """
import torch
from test_autoencoder import KINDS, random_sae

x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
for activation, k in KINDS:
    sae = random_sae(activation, k)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), sae(x)), (activation, k)
    print(activation, k)
"""


def test_a_dictionary_compiles_in_one_graph() -> None:
    """As part of a user's compiled model; without a C++ compiler, so that only the capture is tested.

    In a separate process, because the shape checks of this one are Python code that a graph cannot contain.
    """
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{activation} {k}" for activation, k in KINDS]


# --- row norms, of other tools' dictionaries -------------------------------------------------------------------------


def scaled_rows(x: torch.Tensor, row_norm: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The normalised rows, and the scale and shift that undo it, in float64, as the other tools define them."""
    x = x.double()
    mean, nothing = x.mean(-1, keepdim=True), torch.zeros(len(x), 1, dtype=torch.float64)
    if row_norm == "layer_norm":
        std = ((x - mean) ** 2).sum(-1, keepdim=True).div(x.shape[-1] - 1).sqrt()
        return (x - mean) / (std + 1e-5), std, mean
    if row_norm == "unit_mean_square":
        size = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x / size, size, nothing
    return x, nothing + 1, mean


@pytest.mark.parametrize(("activation", "k"), KINDS)
@pytest.mark.parametrize("row_norm", ["mean", "layer_norm", "unit_mean_square"])
def test_a_row_norm_is_applied_before_and_undone_after(
    tmp_path: Path, activation: str, k: int | None, row_norm: str
) -> None:
    sae = random_sae(activation, k, row_norm=row_norm)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(5)) * 3 + 1
    rows, scale, shift = scaled_rows(x, row_norm)
    f = activations(sae, rows)
    x_hat = scale * (f @ sae.W_dec.double() + sae.b_dec.double()) + shift
    save(sae, tmp_path, {})
    assert json.loads((tmp_path / "config.json").read_text())["format"] == 2  # version 0.1 would ignore the row norm
    for found in (sae, load(tmp_path)):
        acts = found.feature_acts(x, choose())
        frozen_acts, frozen_x_hat = FrozenSAE(found, "cpu").reconstruct(x)
        for encoded in (found.encode(x), acts.sparse().dense(), frozen_acts.dense()):
            assert (encoded - f).abs().max() <= 2e-5 * f.abs().max()
        for decoded in (found.reconstruct(x), found.output(acts, x), frozen_x_hat):
            assert (decoded - x_hat).abs().max() <= 2e-5 * x_hat.abs().max()


def test_a_row_of_zeros_stays_finite_under_any_row_norm() -> None:
    for row_norm in ("mean", "layer_norm", "unit_mean_square"):
        assert torch.isfinite(random_sae("relu", None, row_norm=row_norm)(torch.zeros(2, 4))).all()


def test_a_dictionary_without_a_row_norm_is_saved_as_before(tmp_path: Path) -> None:
    save(random_sae("relu", None), tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == 1
    assert "row_norm" not in config


def test_what_needs_units_of_x_is_refused_when_rows_are_scaled_one_by_one() -> None:
    scaled = random_sae("relu", None, row_norm="layer_norm")
    with pytest.raises(ValueError, match="cannot be folded"):
        fold_scale(scaled, 2.0)
    with pytest.raises(ValueError, match="steering: this dictionary normalises each row"):
        refuse_row_scale(scaled, "steering")
    refuse_row_scale(random_sae("relu", None, row_norm="mean"), "steering")  # adds decoder rows in units of x
    for wrong in ({"row_norm": "batch"}, {"row_norm": "mean", "d_out": 3, "pre_bias": False}):
        with pytest.raises(ValueError, match="row_norm must be one of mean, layer_norm, unit_mean_square"):
            SAE(4, 11, **wrong)
