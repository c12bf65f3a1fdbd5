"""Controls: optimal bases, a model with shuffled weights, probes of planted classes."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import HOOK_POINT
from scipy import sparse

from sae import pipeline
from sae.analysis.baselines import (
    HeldRows,
    independent_components,
    made_without_training,
    principal_components,
    shuffled_weights,
)
from sae.analysis.probing import Labelled, probe
from sae.cli import main
from sae.lm import NativeModel
from sae.pipeline.controls import Setup
from store.activations import ActivationStore
from store.common import TRAIN

D_IN = 16


def rows(n: int = 3000) -> torch.Tensor:
    """ReLU-like rows of correlated neurons."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, D_IN, generator=generator) @ torch.randn(D_IN, D_IN, generator=generator)).relu()


def fvu(sae, x: torch.Tensor) -> float:  # noqa: ANN001
    return ((x - sae.reconstruct(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()


def test_each_control_is_the_basis_that_its_name_says() -> None:
    x = rows()
    found = made_without_training(x, d_sae=40, k=4)
    assert {name: sae.d_sae for name, sae in found.items()} == {
        "random": 40,
        "pca": 2 * D_IN,
        "ica": found["ica"].d_sae,
        "neurons": D_IN,
        "neurons_topk": D_IN,
    }
    torch.testing.assert_close(found["neurons"].reconstruct(x), x)
    kept = x.topk(4).values.pow(2).sum()
    error = (x - found["neurons_topk"].reconstruct(x)).pow(2).sum()
    assert error.item() == pytest.approx((x.pow(2).sum() - kept).item(), rel=1e-4)
    for name in ("random", "pca", "ica"):
        assert ((found[name].encode(x) > 0).sum(-1) <= 4).all(), name
        torch.testing.assert_close(found[name].W_dec.norm(dim=-1), torch.ones(found[name].d_sae))
    assert fvu(made_without_training(x, 40, 2 * D_IN)["pca"], x) < 1e-8  # all components: everything
    centred = (x - x.mean(0)).numpy()
    strongest = -np.sort(-np.abs(centred @ np.linalg.svd(centred, full_matrices=False)[2].T), axis=1)[:, :4]
    assert fvu(found["pca"], x) == pytest.approx(1 - (strongest**2).sum() / (centred**2).sum(), rel=1e-3)
    for scale in (0.9, 1.1):  # the fitted scale of the random directions is the best one
        other = made_without_training(x, d_sae=40, k=4)["random"]
        other.W_enc.mul_(scale)
        assert fvu(other, x) > fvu(found["random"], x)


def test_neurons_with_negative_parts_are_two_features_each() -> None:
    x = torch.randn(500, D_IN, generator=torch.Generator().manual_seed(0))
    found = made_without_training(x, d_sae=8, k=3)
    assert found["neurons"].d_sae == 2 * D_IN
    torch.testing.assert_close(found["neurons"].reconstruct(x), x)


def test_components() -> None:
    x = rows()
    components = principal_components(x)
    torch.testing.assert_close(components @ components.T, torch.eye(D_IN), atol=1e-5, rtol=0)
    variances = ((x - x.mean(0)) @ components.T).var(0)
    assert (variances.diff() <= 1e-4).all()
    generator = torch.Generator().manual_seed(1)
    sources = torch.rand(8000, 6, generator=generator).log().neg() * torch.sign(
        torch.rand(8000, 6, generator=generator) - 0.5
    )
    mixing = torch.nn.functional.normalize(torch.randn(6, D_IN, generator=generator), dim=-1)
    directions, forms = independent_components(sources @ mixing, seed=0)
    assert (directions @ mixing.T).abs().max(0).values.min() > 0.98
    centred = sources @ mixing - (sources @ mixing).mean(0)
    torch.testing.assert_close(centred @ forms.T @ directions, centred, atol=1e-2, rtol=0)


def test_a_shuffled_model_has_the_same_entries_and_is_restored(tiny_model: NativeModel) -> None:
    before = {name: p.clone() for name, p in tiny_model.module.named_parameters()}
    tokens = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    clean = tiny_model.logits(tokens)
    with pytest.raises(RuntimeError, match="inside"), shuffled_weights(tiny_model) as model:  # noqa: PT012
        for name, p in model.module.named_parameters():
            torch.testing.assert_close(p.flatten().sort().values, before[name].flatten().sort().values)
            assert torch.equal(p, before[name]) == (p.dim() == 1), name
        assert (model.logits(tokens) - clean).abs().max() > 0.1
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.module.named_parameters())
    assert torch.equal(tiny_model.logits(tokens), clean)


def test_held_rows_come_once_in_each_epoch() -> None:
    x = torch.arange(10.0)[:, None]
    held = HeldRows(x, batch_tokens=4, seed=0)
    seen = torch.cat([held.batch(step).x for step in range(5)]).flatten()
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert not torch.equal(seen[:10], seen[10:])
    assert torch.equal(held.batch(1).x, HeldRows(x, batch_tokens=4, seed=0).batch(1).x)
    assert torch.equal(held.sample(5, 1), held.sample(5, 1))


def labelled(seed: int, n: int = 6000) -> Labelled:
    """Feature 0 is class 0; features 1 and 2 are each half of class 1; class 2 has none; the rest is noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    acts = (rng.random((n, 20)) < 0.1) * rng.random((n, 20)) * 0.1
    half = rng.random(n) < 0.5
    acts[:, 0] = (labels == 0) * (1 + rng.random(n))
    acts[:, 1] = ((labels == 1) & half) * (1 + rng.random(n))
    acts[:, 2] = ((labels == 1) & ~half) * (1 + rng.random(n))
    return Labelled(sparse.csr_array(acts.astype(np.float32)), labels)


def test_probes_find_planted_features_and_score_at_chance_on_shuffled_labels() -> None:
    found = probe(labelled(0), labelled(1), ["one", "two halves", "none", "absent"])
    classes = found["classes"]
    assert classes["one"]["k1"] == 1
    assert classes["two halves"]["k1"] == pytest.approx(0.75, abs=0.04)  # one half right, the rest by the bias
    assert classes["two halves"]["k5"] == 1
    # Class 2 has no feature: it is predicted where no feature of classes 0 and 1 fires.
    assert classes["none"]["k1"] < 0.8 < classes["none"]["k5"]
    assert "absent" not in classes
    assert found["mean"]["k2"] == pytest.approx(np.mean([entry["k2"] for entry in classes.values()]))
    shuffled = labelled(0)._replace(labels=np.random.default_rng(5).permutation(labelled(0).labels))
    other = labelled(1)._replace(labels=np.random.default_rng(6).permutation(labelled(1).labels))
    assert probe(shuffled, other, ["one"])["mean"]["k5"] == pytest.approx(0.5, abs=0.05)
    assert probe(labelled(0, 30), labelled(1, 30), ["one"])["mean"] == {"k1": None, "k2": None, "k5": None}


@pytest.fixture(scope="module")
def float32_store(tmp_path_factory: pytest.TempPathFactory, tiny_model: NativeModel, tiny_text: Path) -> Path:
    out = tmp_path_factory.mktemp("float32") / "acts.zarr"
    return pipeline.harvest(tiny_model, tiny_text, out, tokens=4096, heldout_tokens=512, dtype="float32")


@pytest.mark.parametrize("n", [100, 3000, 10**6])
def test_training_rows_are_those_of_the_store_to_the_last_bit(
    tiny_model: NativeModel, float32_store: Path, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for values that 16 bits cannot hold."""
    store = ActivationStore.open(float32_store)
    read = ActivationStore.read_acts
    monkeypatch.setattr(ActivationStore, "read_acts", lambda *where: 1e5 * read(*where))
    kept = [
        1e5 * read(store, TRAIN, shard, HOOK_POINT)[store.read_contexts(TRAIN, shard).keep.reshape(-1)]
        for shard in sorted(store.markers(TRAIN))
    ]
    wanted = torch.from_numpy(np.concatenate(kept)[:n])
    assert torch.equal(Setup(store, tiny_model, HOOK_POINT, 512).training_rows(n), wanted)


@pytest.mark.slow
def test_the_table_end_to_end(tmp_path: Path, tiny_model: NativeModel, tiny_text: Path, capsys, monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setattr("sae.analysis.probing.MIN_TOKENS", 20)
    monkeypatch.setattr("sae.evaluation.domains.MIN_TOKENS", 20)
    monkeypatch.setattr("sae.analysis.baselines.ICA_ITERATIONS", 3)
    monkeypatch.setattr(import_module("sae.pipeline.evaluate"), "SPREAD_SHARDS", 32)  # the same number as is held out
    monkeypatch.setattr("sae.analysis.absorption.MIN_TOKENS", 20)
    monkeypatch.setattr("sae.analysis.absorption.MIN_PROBE_ACCURACY", 0.5)
    pipeline.harvest(tiny_model, tiny_text, tmp_path / "acts.zarr", tokens=1024, heldout_tokens=512)  # 48 shards
    out = tmp_path / "topk"
    pipeline.train(tmp_path / "acts.zarr", out, d_sae=48, tokens=8192, config={"k": 4, "batch_tokens": 256})
    command = ["controls", str(out), "--tokens", "1024", "--train-tokens", "1024"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "forecast: 7 dictionaries" in said.err
    result = json.loads((out / "controls.json").read_text())
    measured = result["measured"]
    assert list(measured) == ["dictionary", "ica", "neurons", "neurons_topk", "pca", "random", "shuffled_model"]
    assert all(name in said.out for name in measured)
    assert measured["neurons"]["fvu"] == pytest.approx(0, abs=1e-9)
    assert measured["neurons"]["ce_loss_score_zero"] == pytest.approx(1, abs=1e-2)  # the store is in 16 bits
    assert measured["dictionary"]["fvu"] < measured["random"]["fvu"]
    assert measured["pca"]["l0"] <= result["k"]
    assert measured["shuffled_model"]["features"] == 48
    assert measured["random"]["absorption"] is None
    assert measured["dictionary"]["absorption"]["kinds"]
    assert 0 <= measured["dictionary"]["absorption"]["mean"] <= 1
    evaluated = pipeline.evaluate(out)
    assert result["tokens"] == evaluated["tokens"]
    assert measured["dictionary"]["l0"] == evaluated["metrics"]["l0"]["value"]
    assert measured["dictionary"]["fvu"] == pytest.approx(evaluated["metrics"]["fvu"]["value"], rel=1e-6)
    assert (out / "controls" / "shuffled_model" / "sae.safetensors").exists()
    again = pipeline.controls(out, tokens=1024, train_tokens=1024, only=["shuffled_model"])
    assert again["measured"]["shuffled_model"] == measured["shuffled_model"]  # the weights came back in between
    assert main(["controls", str(out), "--only", "nothing"]) == 2
    assert "choose from random, pca" in capsys.readouterr().err
