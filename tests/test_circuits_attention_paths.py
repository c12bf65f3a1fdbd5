"""Paths into a feature against brute force: one head's reading of one source is removed, all else stays fixed."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import HOOK_POINT, SHAPE, random_sae, write_model

from sae.circuits.attention_paths import HOOKS, paths, patterns
from sae.lm import BridgeModel, ModelError, NativeModel
from sae.lm.transformer import TransformerConfig


def model_of(tmp_path_factory: pytest.TempPathFactory, **changes: object) -> NativeModel:
    shape = TransformerConfig(**{**SHAPE.to_dict(), **changes})
    return NativeModel(write_model(tmp_path_factory.mktemp("paths") / "model", shape=shape), "model")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    return model_of(tmp_path_factory, n_layers=2)


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    return model_of(tmp_path_factory, act_fn="gelu")


@pytest.fixture(scope="module")
def ids(tiny_model: NativeModel) -> list[int]:
    return tiny_model.encode_prompt("the quick brown fox jumps")


def by_hand(model: NativeModel, ids: list[int], layer: int) -> torch.Tensor:
    """Patterns from the definition, one head, one destination at a time."""
    block = model.module.blocks[layer]
    resid = model.capture(torch.tensor([ids]), f"blocks.{layer}.hook_resid_pre")[0]
    x, width = block.ln1(resid), block.attn.d_head
    found = torch.zeros(block.attn.n_heads, len(ids), len(ids))
    for head in range(block.attn.n_heads):
        part = slice(head * width, (head + 1) * width)
        q, k = (x @ p.weight[part].T + p.bias[part] for p in (block.attn.q, block.attn.k))
        for dst in range(len(ids)):
            found[head, dst, : dst + 1] = (q[dst] @ k[: dst + 1].T / math.sqrt(width)).softmax(-1)
    return found


def test_patterns_are_the_definition_and_what_the_model_uses(deep: NativeModel, ids: list[int]) -> None:
    for layer in (0, 1):
        found = patterns(deep, ids, layer=layer)
        torch.testing.assert_close(found, by_hand(deep, ids, layer))
        attn = deep.module.blocks[layer].attn
        x = torch.randn(len(ids), SHAPE.d_model, generator=torch.Generator().manual_seed(0))
        v = attn.v(x).view(len(ids), attn.n_heads, attn.d_head).transpose(0, 1)
        z = (attn.pattern(x) @ v).transpose(0, 1).reshape(len(ids), -1)
        torch.testing.assert_close(attn.o(z), attn(x[None])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("hook", HOOKS)
def test_each_part_is_the_change_when_it_is_removed(deep: NativeModel, ids: list[int], layer: int, hook: str) -> None:
    """By hand in float64: pattern, norm scales and ReLU gates are held fixed; each part is removed in turn."""
    hook_point = f"blocks.{layer}.{hook}"
    sae = random_sae(deep.hook_width(hook_point), hook_point)
    position, feature = 4, 7
    found = paths(deep, sae, ids, feature=feature, position=position, hook_point=hook_point)
    assert found.exact
    assert float(found.direct.sum() + found.heads.sum()) + found.rest == pytest.approx(found.pre_act, abs=1e-4)

    block = deep.module.blocks[layer].double()
    try:
        tokens = torch.tensor([ids])
        resid = deep.capture(tokens, f"blocks.{layer}.hook_resid_pre")[0].double()
        pattern = by_hand_double(block, resid)[:, position]
        if layer == 0:
            embeds = [deep.module.embed(tokens)[0].double(), deep.module.pos_embed.weight[: len(ids)].double()]
        else:
            embeds = [resid]
        sigma1 = (resid.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        attn_out = block.attn(block.ln1(resid)[None])[0, position]
        mid = resid[position] + attn_out
        sigma2 = (mid.var(unbiased=False) + 1e-5).sqrt()
        gate = block.mlp.get_submodule("in")(block.ln2(mid)) > 0

        def pre_act(attn: torch.Tensor, stream: torch.Tensor) -> float:
            mid = attn + stream
            normed = (mid - mid.mean()) / sigma2 * block.ln2.weight + block.ln2.bias
            post = block.mlp.get_submodule("in")(normed) * gate
            x = {
                "hook_attn_out": attn,
                "hook_resid_mid": mid,
                "mlp.hook_post": post,
                "hook_mlp_out": block.mlp.out(post),
                "hook_resid_post": mid + block.mlp.out(post),
            }[hook]
            return float((x - sae.b_dec.double()) @ sae.W_enc[:, feature].double() + sae.b_enc[feature].double())

        whole = pre_act(attn_out, resid[position])
        assert found.pre_act == pytest.approx(whole, abs=1e-4)
        width = block.attn.d_head
        for part, embed in enumerate(embeds):
            without = whole - pre_act(attn_out, resid[position] - embed[position])
            assert float(found.direct[part]) == pytest.approx(without, abs=1e-4)
            for head in range(block.attn.n_heads):
                own = slice(head * width, (head + 1) * width)
                for source in range(position + 1):
                    seen = (embed[source] - embed[source].mean()) / sigma1[source] * block.ln1.weight
                    v = block.attn.v.weight[own] @ seen
                    written = pattern[head, source] * block.attn.o.weight[:, own] @ v
                    without = whole - pre_act(attn_out - written, resid[position])
                    assert float(found.heads[part, head, source]) == pytest.approx(without, abs=1e-4)
    finally:
        block.float()


def by_hand_double(block, resid: torch.Tensor) -> torch.Tensor:
    x, width = block.ln1(resid), block.attn.d_head
    q, k = (p(x).view(len(x), -1, width).transpose(0, 1) for p in (block.attn.q, block.attn.k))
    scores = q @ k.transpose(1, 2) / math.sqrt(width)
    return scores.masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def test_a_smooth_activation_function_contributes_its_slope(smooth: NativeModel, ids: list[int]) -> None:
    """The direct path's slope against finite differences of the neurons' input, at a fixed scale of the norm."""
    sae = random_sae(SHAPE.d_mlp, HOOK_POINT)
    found = paths(smooth, sae, ids, feature=3, position=3, hook_point=HOOK_POINT)
    assert not found.exact
    block = smooth.module.blocks[0]
    mid = smooth.capture(torch.tensor([ids]), "blocks.0.hook_resid_mid")[0, 3]
    own = smooth.module.embed(torch.tensor(ids[3]))
    scale = (mid.var(unbiased=False) + 1e-5).sqrt()

    def pre_act(mid: torch.Tensor) -> float:
        normed = (mid - mid.mean()) / scale * block.ln2.weight + block.ln2.bias
        return float(sae.pre_acts(block.mlp.post(normed))[3])

    slope = (pre_act(mid + 0.01 * own) - pre_act(mid - 0.01 * own)) / 0.02
    assert float(found.direct[0]) == pytest.approx(slope, rel=0.02, abs=2e-3)
    assert float(found.direct.sum() + found.heads.sum()) + found.rest == pytest.approx(found.pre_act, abs=1e-4)


def test_unsupported_models_and_hook_points_are_refused(tiny_model: NativeModel, ids: list[int]) -> None:
    sae = random_sae(SHAPE.d_mlp, HOOK_POINT)
    settings = {"feature": 1, "position": 1, "hook_point": HOOK_POINT}
    for change, error, message in (
        ({"feature": 24}, ValueError, "feature 24 does not exist"),
        ({"position": 50}, ValueError, "position 50 is outside"),
        ({"hook_point": "blocks.0.hook_resid_pre"}, ModelError, "comes before attention"),
        ({"hook_point": "blocks.3.hook_resid_mid"}, ModelError, "has layers 0 … 0; got 3"),
    ):
        with pytest.raises(error, match=message):
            paths(tiny_model, sae, ids, **(settings | change))

    bridge = BridgeModel.__new__(BridgeModel)
    bridge.id, bridge.lock = "gpt2", tiny_model.lock
    with pytest.raises(ModelError, match="gpt2 runs through TransformerLens"):
        paths(bridge, sae, ids, **settings)
    assert not tiny_model.lock.locked()
