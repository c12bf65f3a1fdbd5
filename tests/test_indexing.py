"""The index of a tiny model: every activation stored, every panel against brute force."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import HOOK_POINT
from hypothesis import given
from hypothesis import strategies as st

from sae.dictionary.autoencoder import SAE
from sae.indexing import build as indexing
from sae.indexing.build import IndexBlock, index
from sae.indexing.correlation import FeatureNeuronCorrelation
from sae.kernels.activations import DenseActs
from sae.lm import NativeModel
from sae.pipeline.index import spread_shards
from sae.text.tokenizer import token_bytes
from store.common import HELD_OUT, TRAIN
from store.features import FeatureIndex, FeatureWriter

CONTEXTS, SEQ_LEN, D_IN, D_SAE = 7, 16, 32, 30
DOCUMENTS = [("a", "s", "prose", "0"), ("b", "s", "dna", "1")]


def make_sae(d_sae: int = D_SAE, **kind: object) -> SAE:
    sae = SAE(D_IN, d_sae, **kind)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        sae.b_enc[4] = -1e3
    return sae.requires_grad_(False)


class Built:
    def __init__(self, path: Path, model: NativeModel, sae: SAE, per_block: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sae, self.model = sae, model
        self.tokens = torch.randint(1, 300, (CONTEXTS, SEQ_LEN), generator=generator)
        self.keep = torch.rand(CONTEXTS, SEQ_LEN, generator=generator) < 0.85
        self.acts = model.capture(self.tokens, HOOK_POINT)
        self.document = np.where(np.arange(SEQ_LEN) < 6, 0, 1)[None].repeat(CONTEXTS, 0).astype(np.int32)
        writer = FeatureWriter(
            path,
            d_sae=sae.d_sae,
            seq_len=SEQ_LEN,
            n_contexts=CONTEXTS,
            documents=DOCUMENTS,
            attributes={"d_in": D_IN, "hook_point": HOOK_POINT, "model": "m", "sae": "s"},
            vocabulary=token_bytes(model.tokenizer),
        )
        parts = [slice(start, start + per_block) for start in range(0, CONTEXTS, per_block)]
        blocks = (
            IndexBlock(
                p.start, self.acts[p].flatten(0, 1), self.tokens[p].numpy(), self.keep[p].numpy(), self.document[p]
            )
            for p in parts
        )
        self.index = FeatureIndex.open(
            index(sae, model, blocks, writer, hook_point=HOOK_POINT, tokens=self.tokens.numel())
        )
        # the truth: dense, float64
        f = sae.encode(self.acts.flatten(0, 1)).double().numpy()
        self.f = f * self.keep.flatten().numpy()[:, None]


@pytest.fixture(scope="module", params=["relu", "topk"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: NativeModel) -> Built:
    kind = {"activation": "topk", "k": 5} if request.param == "topk" else {}
    path = tmp_path_factory.mktemp("index") / "features.zarr"
    return Built(path, tiny_model, make_sae(**kind), per_block=3)


def test_every_activation_is_stored(built: Built) -> None:
    assert built.index.d_sae == D_SAE
    assert built.index.kept_tokens == int(built.keep.sum())
    for feature in range(D_SAE):
        rows, values = built.index.firings(feature)
        assert rows.tolist() == np.flatnonzero(built.f[:, feature]).tolist()
        np.testing.assert_allclose(values, built.f[rows, feature], rtol=1e-3)
    assert len(built.index.firings(4)[0]) == 0
    stats = built.index.stats
    np.testing.assert_array_equal(stats["count"], (built.f > 0).sum(0))
    np.testing.assert_allclose(stats["max"], built.f.max(0), rtol=1e-3)


def test_logit_weights(built: Built) -> None:
    """Centred residual direction, final norm's weight, unembedding, median at 0; nothing else."""
    sae, module = built.sae, built.model.module
    W_out = module.blocks[0].mlp.out.weight.double().numpy()  # [d_model, d_mlp]
    direction = sae.W_dec.double().numpy() @ W_out.T
    direction -= direction.mean(1, keepdims=True)
    logits = (direction * module.ln_final.weight.double().numpy()) @ module.unembed.weight.double().numpy().T
    logits -= np.sort(logits, axis=1)[:, (logits.shape[1] - 1) // 2][:, None]  # torch's median: the lower of two
    for feature in range(D_SAE):
        row, panel = (
            logits[feature],
            {
                n: built.index.panel(f"logits/{n}", feature)
                for n in ("top_id", "top_value", "bottom_id", "bottom_value", "histogram", "range")
            },
        )
        np.testing.assert_allclose(panel["top_value"], np.sort(row)[::-1][:20], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(panel["bottom_value"], np.sort(row)[:20], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(row[panel["top_id"]], panel["top_value"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(row[panel["bottom_id"]], panel["bottom_value"], rtol=1e-4, atol=1e-4)
        assert len(set(panel["top_id"].tolist())) == 20
        np.testing.assert_allclose(panel["range"], [row.min(), row.max()], rtol=1e-4, atol=1e-4)
        assert panel["histogram"].sum() == built.model.d_vocab
        wanted, _ = np.histogram(row, bins=np.linspace(row.min(), row.max(), 41))
        assert np.abs(np.cumsum(panel["histogram"]) - np.cumsum(wanted)).max() <= 1  # rounding at an edge
        centred = row - row.mean()
        kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
        assert built.index.stats["logit_kurtosis"][feature] == pytest.approx(kurtosis, rel=1e-3)


def test_the_model_is_not_changed_by_its_logit_weights(built: Built) -> None:
    before = built.model.logits(built.tokens)
    indexing.weight_panels(built.sae, built.model, HOOK_POINT)
    assert torch.equal(built.model.logits(built.tokens), before)


def test_neurons_by_weight(built: Built) -> None:
    for feature, row in enumerate(built.sae.W_dec.numpy()):
        ids = built.index.panel("neurons/weight_id", feature)
        assert ids.tolist() == np.argsort(-np.abs(row))[:10].tolist()
        np.testing.assert_array_equal(built.index.panel("neurons/weight_value", feature), row[ids])
        share = np.abs(row[ids]) / np.abs(row).sum()
        np.testing.assert_allclose(built.index.panel("neurons/weight_share", feature), share, rtol=1e-5)


def test_neurons_by_correlation(built: Built) -> None:
    kept = built.keep.flatten().numpy()
    x = built.acts.flatten(0, 1).double().numpy()[kept]
    for feature in range(D_SAE):
        ids, found = (built.index.panel(f"neurons/corr_{n}", feature) for n in ("id", "value"))
        f = built.f[kept, feature]
        if not f.any():
            np.testing.assert_array_equal(found, 0)
            continue
        wanted = np.array([np.corrcoef(f, x[:, j])[0, 1] if x[:, j].std() > 0 else 0.0 for j in range(D_IN)])
        np.testing.assert_allclose(found, np.sort(wanted)[::-1][:10], atol=1e-4)
        np.testing.assert_allclose(found, wanted[ids], atol=1e-4)


def test_neighbours(built: Built) -> None:
    rows = built.sae.W_dec.double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    for feature in range(D_SAE):
        ids = built.index.panel("neighbours/id", feature)
        assert feature not in ids
        np.testing.assert_allclose(
            built.index.panel("neighbours/cosine", feature), np.sort(cosine[feature])[::-1][:10], atol=1e-5
        )
        np.testing.assert_allclose(cosine[feature, ids], built.index.panel("neighbours/cosine", feature), atol=1e-5)
    np.testing.assert_allclose(built.index.stats["nearest_cosine"], cosine.max(1), atol=1e-5)
    encoder = built.sae.W_enc.T.double().numpy()
    alignment = (encoder * rows).sum(1) / np.linalg.norm(encoder, axis=1) / np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(built.index.stats["cos_enc_dec"], alignment, atol=1e-5)


def test_the_size_of_a_block_does_not_matter(tmp_path: Path, tiny_model: NativeModel, built: Built) -> None:
    if built.sae.activation != "relu":
        pytest.skip("once is enough")
    one = Built(tmp_path / "features.zarr", tiny_model, make_sae(), per_block=CONTEXTS).index
    for feature in range(D_SAE):
        for mine, theirs in zip(one.firings(feature), built.index.firings(feature), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-3)
        np.testing.assert_allclose(
            one.panel("neurons/corr_value", feature), built.index.panel("neurons/corr_value", feature), atol=1e-4
        )


@pytest.mark.parametrize("at_once", [1, 7, 512])
def test_the_number_of_features_at_once_does_not_matter(tiny_model: NativeModel, monkeypatch, at_once: int) -> None:
    sae = make_sae()
    whole = indexing.weight_panels(sae, tiny_model, HOOK_POINT)
    monkeypatch.setattr(indexing, "FEATURES_AT_ONCE", at_once)
    parts = indexing.weight_panels(sae, tiny_model, HOOK_POINT)
    for name in ("neighbours/cosine", "logits/top_value", "stats/cos_enc_dec", "neurons/weight_share"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-5)
    assert parts["neighbours/id"].shape == (D_SAE, 10)


@pytest.mark.parametrize("d_sae", [1, 2, 5])
def test_dictionaries_smaller_than_a_panel(tiny_model: NativeModel, d_sae: int) -> None:
    sae = SAE(D_IN, d_sae).requires_grad_(False)  # all zero: no direction has a length
    found = indexing.weight_panels(sae, tiny_model, HOOK_POINT)
    assert found["neighbours/id"].shape == (d_sae, min(10, d_sae - 1))
    assert found["logits/histogram"].sum(1).tolist() == [300] * d_sae
    assert all(np.isfinite(panel).all() for panel in found.values())


def test_the_correlation_of_a_constant_is_zero() -> None:
    """A neuron that is always 0.1 has a variance of rounding error only; dividing by it gave correlations above 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 6, generator=generator)
    x[:, 1], x[:, 2], x[:, 3] = 0.1, 0.0, 1234.567
    f = torch.rand(4000, 3, generator=generator).sub(0.7).relu()
    f[:, 1] = 0.3
    correlation = FeatureNeuronCorrelation(3, 6)
    for start in range(0, 4000, 700):
        part = slice(start, start + 700)
        correlation.add(DenseActs(f[part]).sparse(), x[part], torch.ones(len(x[part]), dtype=torch.bool))
    found = correlation.matrix()
    assert not found[:, 1:4].any()
    assert not found[1].any()
    for i in (0, 2):
        for j in (0, 4, 5):
            assert found[i, j] == pytest.approx(np.corrcoef(f[:, i], x[:, j])[0, 1], abs=1e-5)


def test_correlation_of_neurons_far_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(3000, 1, generator=generator).sub(0.8).relu()
    x = 300 + f * 5 + torch.rand(3000, 2, generator=generator)
    correlation = FeatureNeuronCorrelation(1, 2)
    kept = torch.arange(3000) % 3 > 0
    x[~kept] = 1e6  # rows that are not kept do not count
    acts = DenseActs(f).sparse()
    correlation.add(acts.where(kept[acts.support.rows]), x, kept)
    f, x = f[kept], x[kept]
    wanted = [np.corrcoef(f[:, 0].double(), x[:, j].double())[0, 1] for j in range(2)]
    np.testing.assert_allclose(correlation.matrix()[0], wanted, atol=2e-3)


def test_correlations_without_rows_are_zero() -> None:
    assert not FeatureNeuronCorrelation(2, 3).matrix().any()


@given(st.integers(0, 5), st.integers(0, 60), st.integers(0, 800))
def test_indexed_text_is_spread_over_the_training_shards(held_out: int, train: int, tokens: int) -> None:
    """All held-out shards come before training text, which leaves no gap wider than an even spread must."""
    shards = {HELD_OUT: dict.fromkeys(range(held_out)), TRAIN: dict.fromkeys(range(7, 7 + train))}
    chosen = spread_shards(SimpleNamespace(markers=shards.__getitem__, rows_per_shard=10), tokens)
    assert len(chosen) == min(held_out + train, -(-tokens // 10))
    assert chosen[:held_out] == [(HELD_OUT, shard) for shard in range(min(held_out, len(chosen)))]
    numbers = [shard for split, shard in chosen[held_out:] if split == TRAIN]
    assert len(numbers) == len(chosen[held_out:])
    edges = [*numbers, 7 + train]
    gaps = {after - before for before, after in zip(edges, edges[1:], strict=False)}
    assert numbers[:1] in ([], [7])
    assert not numbers or gaps <= {train // len(numbers), -(-train // len(numbers))}
