"""Features in circuits, in float64: which pairs make the score of a head, and which heads write or read a feature."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fakes import SHAPE, random_sae, write_model
from torch import Tensor

from sae.circuits.feature_heads import heads_of_feature
from sae.circuits.qk_features import qk_pairs
from sae.dictionary.autoencoder import SAE
from sae.lm import LanguageModel, ModelError, load_model

IDS = [0, 17, 203, 5, 17, 99, 250, 31, 17, 203]
DST, SRC, LAYER, HEAD = 8, 5, 1, 1
D, D_HEAD = SHAPE.d_model, SHAPE.d_head
HOOKS = ("blocks.0.hook_attn_out", "blocks.0.hook_resid_post")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(write_model(tmp_path_factory.mktemp("circuits") / "model", shape=replace(SHAPE, n_layers=2)))


@pytest.fixture(scope="module")
def sae() -> SAE:
    return random_sae(D, d_sae=24)


def captured(model: LanguageModel, part: str, head: int = HEAD) -> Tensor:
    x = model.capture(torch.tensor([IDS[: DST + 1]]), f"blocks.{LAYER}.attn.hook_{part}")[0].double()
    return x[:, head * D_HEAD : (head + 1) * D_HEAD]


OTHERS = [p for p in range(1, DST + 1) if p != SRC]  # BOS is none


@pytest.mark.parametrize("hook_point", HOOKS)
def test_pairs_sum_to_what_the_models_own_queries_and_keys_give(
    model: LanguageModel, sae: SAE, hook_point: str
) -> None:
    found = qk_pairs(model, sae, IDS, hook_point=hook_point, layer=LAYER, head=HEAD, dst=DST, src=SRC)
    q, k = captured(model, "q"), captured(model, "k")
    score = float(q[DST] @ (k[SRC] - k[OTHERS].mean(0)) / D_HEAD**0.5)
    assert found.score == pytest.approx(score, abs=1e-5)
    assert float(found.pairs.sum()) == pytest.approx(score, abs=1e-5)
    assert found.pairs.shape == (len(found.queries), len(found.keys)) == found.random_95.shape


def normed(model: LanguageModel, vector: Tensor, scale: float) -> Tensor:
    """A part of the stream through the norm of the layer, its scale held."""
    ln1 = model.weights().layers[LAYER].ln1.norm
    return (vector - vector.mean()) * ln1.weight.double() / scale


def test_a_pair_of_features_is_their_share_of_query_and_key(model: LanguageModel, sae: SAE) -> None:
    hook = HOOKS[0]
    found = qk_pairs(model, sae, IDS, hook_point=hook, layer=LAYER, head=HEAD, dst=DST, src=SRC)
    acts = sae.encode(model.capture(torch.tensor([IDS]), hook)[0]).double()
    stream = model.capture(torch.tensor([IDS]), "blocks.1.hook_resid_pre")[0].double()
    eps = model.weights().layers[LAYER].ln1.norm.eps
    scale = ((stream - stream.mean(-1, keepdim=True)).square().mean(-1) + eps).sqrt()
    attn, total = model.weights().layers[LAYER].attn, 0.0
    for i in range(sae.d_sae):
        for j in range(sae.d_sae):
            write_i, write_j = (sae.W_dec[n].double() for n in (i, j))
            q = normed(model, acts[DST, i] * write_i, float(scale[DST])) @ attn.W_Q[HEAD].double()

            def key(place: int, vector: Tensor = write_j, feature: int = j) -> Tensor:
                own = normed(model, acts[place, feature] * vector, float(scale[place]))
                return own @ attn.W_K[HEAD].double()

            wanted = float(q @ (key(SRC) - torch.stack([key(p) for p in OTHERS]).mean(0)) / D_HEAD**0.5)
            total += wanted
            names = f"L0.feature.{i}", f"L0.feature.{j}"
            if names[0] not in found.queries or names[1] not in found.keys:
                assert wanted == 0
                continue
            pair = found.pairs[found.queries.index(names[0]), found.keys.index(names[1])]
            assert float(pair) == pytest.approx(wanted, abs=1e-5)
    assert found.features.value == pytest.approx(total, abs=1e-5)
    key_features = [n for n, name in enumerate(found.keys) if "feature" in name]
    assert found.key_features.value == pytest.approx(float(found.pairs[:, key_features].sum()), abs=1e-5)


def test_the_control_is_what_random_directions_of_equal_norm_give(model: LanguageModel, sae: SAE) -> None:
    """5% of random pairs are beyond it, for one pair of features drawn 4,000 times."""
    hook = HOOKS[0]
    found = qk_pairs(model, sae, IDS, hook_point=hook, layer=LAYER, head=HEAD, dst=DST, src=SRC)
    i, j = (next(n for n, name in enumerate(names) if "feature" in name) for names in (found.queries, found.keys))
    feature_i, feature_j = (int(names[n].rpartition(".")[2]) for names, n in ((found.queries, i), (found.keys, j)))
    acts = sae.encode(model.capture(torch.tensor([IDS]), hook)[0])
    stream = model.capture(torch.tensor([IDS]), "blocks.1.hook_resid_pre")[0]
    layer = model.weights().layers[LAYER]
    scale = layer.ln1.norm.scale(stream).flatten()
    size_i = acts[DST, feature_i] / scale[DST] * sae.W_dec[feature_i].norm()
    shifts = acts[:, feature_j] / scale
    size_j = (shifts[SRC] - shifts[OTHERS].mean()) * sae.W_dec[feature_j].norm()
    u, v = (torch.nn.functional.normalize(torch.randn(4000, D), dim=-1) for _ in range(2))
    w, read = layer.ln1.norm.weight, layer.attn
    q, k = ((x - x.mean(-1, keepdim=True)) * w for x in (u * size_i, v * size_j))
    drawn = ((q @ read.W_Q[HEAD]) * (k @ read.W_K[HEAD])).sum(-1).abs() / D_HEAD**0.5
    assert 0.02 < float((drawn > found.random_95[i, j]).double().mean()) < 0.1
    assert min(found.features.random_95, found.key_features.random_95) > 0


def test_pairs_that_cannot_be_are_refused(model: LanguageModel, sae: SAE) -> None:
    ask = {"hook_point": HOOKS[0], "layer": LAYER, "head": HEAD, "dst": DST, "src": SRC}
    for change, error, message in (
        ({"layer": 0}, ModelError, "heads of layer 0 do not read features"),
        ({"head": 2}, ModelError, "head 2 does not exist"),
        ({"src": 9}, ValueError, "cannot read position 9"),
        ({"dst": 1, "src": 1}, ValueError, "no other source"),
        ({"hook_point": "blocks.1.hook_resid_post"}, ModelError, "it is in the last one"),
    ):
        with pytest.raises(error, match=message):
            qk_pairs(model, sae, IDS, **(ask | change))  # type: ignore[arg-type]


# --- heads of a feature ----------------------------------------------------------------------------------------------


def test_a_planted_feature_finds_its_heads(model: LanguageModel) -> None:
    """A feature written along what one head's key hears most, and read along what one head writes most."""
    weights, sae = model.weights(), random_sae(D, d_sae=4)
    with torch.no_grad():
        key = weights.layers[1].attn.W_K[0] * weights.layers[1].ln1.norm.weight[:, None]
        sae.W_dec[2] = torch.linalg.svd(key - key.mean(0)).U[:, 0]
        sae.W_enc[:, 2] = torch.linalg.svd(weights.layers[0].attn.W_O[1]).Vh[0]
    writing, reading = heads_of_feature(model, sae, 2, HOOKS[0])
    assert [(link.layer, link.head) for link in writing][0] == (0, 1)
    assert {(link.layer, link.head, link.way) for link in reading} == {(1, h, way) for h in (0, 1) for way in "qkv"}
    own = next(link for link in reading if (link.head, link.way) == (0, "k"))
    direction = sae.W_dec[2].double()
    seen = (direction - direction.mean()) * weights.layers[1].ln1.norm.weight.double()
    assert own.strength == pytest.approx(float((seen @ weights.layers[1].attn.W_K[0].double()).norm()), rel=1e-4)
    assert own.strength > own.random_95 > own.random
    assert writing[0].strength == pytest.approx(
        float((weights.layers[0].attn.W_O[1] @ sae.W_enc[:, 2]).norm()), rel=1e-4
    )


def test_where_no_head_is_reached_the_lists_are_empty(model: LanguageModel) -> None:
    assert heads_of_feature(model, random_sae(D), 0, "blocks.1.hook_resid_post")[1] == []
    assert heads_of_feature(model, random_sae(SHAPE.d_mlp), 0, "blocks.0.mlp.hook_post")[0] == []
    writing, _ = heads_of_feature(model, random_sae(D), 0, "blocks.0.attn.hook_z")
    assert [(link.layer, link.way) for link in writing] == [(0, "writes")] * 2
    with pytest.raises(ValueError, match="feature 99 does not exist"):
        heads_of_feature(model, random_sae(D), 99, HOOKS[0])


def test_random_features_are_like_random_directions(model: LanguageModel) -> None:
    """Of many random features, about 5% of the strengths are above the 95% of random directions."""
    sae = random_sae(D, d_sae=60)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(60, D, generator=torch.Generator().manual_seed(3))))
    links = [link for f in range(60) for link in heads_of_feature(model, sae, f, HOOKS[0], seed=f)[1]]
    beyond = sum(link.strength > link.random_95 for link in links) / len(links)
    assert 0.01 < beyond < 0.12
