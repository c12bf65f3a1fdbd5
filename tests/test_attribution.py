"""Attribution against the model run by hand: activations, spliced losses, and parts that sum to the logit."""

from __future__ import annotations

import pytest
import torch
from fakes import HOOK_POINT, SHAPE, random_sae, write_model

from sae.dictionary.autoencoder import SAE
from sae.interventions.ablation import only_final_norm_reads
from sae.interventions.attribution import attribute, inspect
from sae.lm import NativeModel
from sae.lm.transformer import TransformerConfig

D_SAE = 24


@pytest.fixture(scope="module")
def sae() -> SAE:
    return random_sae(SHAPE.d_mlp, HOOK_POINT)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    shape = TransformerConfig(**{**SHAPE.to_dict(), "n_layers": 2, "act_fn": "gelu"})
    return NativeModel(write_model(tmp_path_factory.mktemp("deep") / "two", shape=shape), "two")


@pytest.fixture(scope="module")
def ids(tiny_model: NativeModel) -> list[int]:
    return tiny_model.encode_prompt("the quick brown fox jumps")


def test_active_features_error_and_spliced_losses(sae: SAE, tiny_model: NativeModel, ids: list[int]) -> None:
    found = inspect(tiny_model, sae, ids, hook_point=HOOK_POINT)
    tokens = torch.tensor([ids])
    x = tiny_model.capture(tokens, HOOK_POINT)[0]
    dense = torch.zeros(len(ids), D_SAE)
    dense[found.positions, found.features] = found.acts
    torch.testing.assert_close(dense, sae.encode(x))
    assert bool((found.acts > 0).all())
    x_hat = dense @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(found.error, ((x - x_hat) ** 2).sum(-1) / ((x - sae.b_dec) ** 2).sum(-1))
    assert found.loss[0].isnan()
    assert found.loss_spliced[0].isnan()
    torch.testing.assert_close(found.loss[1:], tiny_model.token_losses(tokens)[0])
    module, block = tiny_model.module, tiny_model.module.blocks[0]
    resid = module.resid_pre(tokens)
    resid = resid + block.attn(block.ln1(resid))
    replaced = torch.cat([x[:1], x_hat[1:]])  # the BOS keeps what it is, as in evaluation
    logits = module.unembed(module.ln_final(resid + block.mlp.out(replaced)))[0, :-1]
    by_hand = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    torch.testing.assert_close(found.loss_spliced[1:], by_hand)


@pytest.mark.parametrize("hook", ["mlp.hook_post", "hook_mlp_out", "hook_resid_post"])
def test_in_the_last_layer_the_parts_sum_to_the_logit(
    two_layers: NativeModel, tiny_model: NativeModel, ids: list[int], hook: str
) -> None:
    """The linear path: remove a feature's contribution from the stream, fix the norm's scale, read the logit again."""
    position, token = 4, 17
    for model, hook_point in ((tiny_model, f"blocks.0.{hook}"), (two_layers, f"blocks.1.{hook}")):
        sae = random_sae(model.hook_width(hook_point), hook_point)
        found = attribute(model, sae, ids, position=position, token=token, hook_point=hook_point)
        assert found.exact
        assert set(found.positions.tolist()) == {position}
        module = model.module
        last = f"blocks.{model.n_layers - 1}.hook_resid_post"
        resid = model.capture(torch.tensor([ids]), last)[0, position].double()
        norm = module.ln_final
        scale = (resid.var(unbiased=False) + norm.eps).sqrt()

        def logit(resid: torch.Tensor, norm=norm, scale=scale, module=module) -> float:
            normed = (resid - resid.mean()) / scale * norm.weight.double() + norm.bias.double()
            logits = module.unembed.weight.double() @ normed
            return float(logits[token] - logits.mean())

        assert found.logit == pytest.approx(logit(resid), abs=1e-4)
        out = model.direct_path(hook_point).matrix
        x = model.capture(torch.tensor([ids]), hook_point)[0, position]
        acts = sae.encode(x).double()
        assert found.features.tolist() == torch.nonzero(acts)[:, 0].tolist()

        def write(direction: torch.Tensor, out=out) -> torch.Tensor:
            return direction.double() if out is None else direction.double() @ out.double()

        for feature, push in zip(found.features.tolist(), found.by_feature.tolist(), strict=True):
            without = resid - acts[feature] * write(sae.W_dec[feature])
            assert push == pytest.approx(logit(resid) - logit(without), abs=1e-5)
        assert found.bias == pytest.approx(logit(resid) - logit(resid - write(sae.b_dec)), abs=1e-5)
        error = x - sae(x)
        assert found.unexplained == pytest.approx(logit(resid) - logit(resid - write(error)), abs=1e-5)
        others = resid - write(x)
        assert found.rest == pytest.approx(logit(others), abs=1e-4)


@pytest.mark.parametrize("hook_point", ["blocks.0.mlp.hook_post", "blocks.0.hook_resid_post", "blocks.1.hook_attn_out"])
def test_in_other_layers_it_is_gradient_times_activation(
    two_layers: NativeModel, ids: list[int], hook_point: str
) -> None:
    sae = random_sae(two_layers.hook_width(hook_point), hook_point)
    position, token, step = 5, 9, 1e-2
    assert not only_final_norm_reads(two_layers, hook_point)
    found = attribute(two_layers, sae, ids, position=position, token=token, hook_point=hook_point)
    assert not found.exact
    tokens = torch.tensor([ids[: position + 1]])

    def logit(where: int, feature: int, by: float) -> float:
        def moved(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[0, where] += by * sae.W_dec[feature]
            return x

        logits = two_layers.logits(tokens, hook_point, moved)[0, -1].double()
        return float(logits[token] - logits.mean())

    assert len(found.positions) > 5
    for i in range(0, len(found.positions), 1 + len(found.positions) // 5):
        where, feature = int(found.positions[i]), int(found.features[i])
        slope = (logit(where, feature, step) - logit(where, feature, -step)) / (2 * step)
        act = float(sae.encode(two_layers.capture(tokens, hook_point))[0, where, feature])
        assert float(found.by_feature[i]) == pytest.approx(slope * act, abs=2e-3, rel=2e-2)


@pytest.mark.parametrize(
    ("change", "message"), [({"position": 99}, "position 99 is outside"), ({"token": -1}, "token -1 is outside")]
)
def test_missing_positions_and_tokens_are_refused(
    sae: SAE, tiny_model: NativeModel, ids: list[int], change: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(tiny_model, sae, ids, **{"position": 1, "token": 1, "hook_point": HOOK_POINT, **change})
    assert not tiny_model.lock.locked()


@pytest.mark.slow
def test_the_bridge_gives_the_same_results(sae: SAE, tiny_model: NativeModel, ids: list[int]) -> None:
    """TransformerLens running the same weights: gradients, attribution and splices through its hooks."""
    from sae.lm import BridgeModel

    bridge = tiny_model.bridge()
    bridge.tokenizer = None
    other = BridgeModel.__new__(BridgeModel)
    other.module, other.id, other.device, other.lock = bridge, "bridge", tiny_model.device, tiny_model.lock
    other.bos_id, other.d_vocab, other._widths, other._paths = tiny_model.bos_id, tiny_model.d_vocab, {}, {}
    other.tokenizer = tiny_model.tokenizer
    ours = attribute(tiny_model, sae, ids, position=4, token=17, hook_point=HOOK_POINT)
    theirs = attribute(other, sae, ids, position=4, token=17, hook_point=HOOK_POINT)
    torch.testing.assert_close(theirs.by_feature, ours.by_feature, atol=1e-4, rtol=1e-3)
    mid = random_sae(SHAPE.d_model, "blocks.0.hook_resid_mid")
    settings = {"position": 4, "token": 17, "hook_point": "blocks.0.hook_resid_mid"}
    ours, theirs = (attribute(model, mid, ids, **settings) for model in (tiny_model, other))
    assert not ours.exact
    torch.testing.assert_close(theirs.by_feature, ours.by_feature, atol=1e-4, rtol=1e-3)


def test_a_transcoder_is_refused(tiny_model: NativeModel, ids: list[int]) -> None:
    for made in (SAE(SHAPE.d_mlp, D_SAE, skip=True), SAE(SHAPE.d_mlp, D_SAE, d_out=3, pre_bias=False)):
        with pytest.raises(ValueError, match="microscope: this dictionary is a transcoder"):
            inspect(tiny_model, made, ids, hook_point=HOOK_POINT)
        with pytest.raises(ValueError, match="attribution: this dictionary is a transcoder"):
            attribute(tiny_model, made, ids, position=1, token=2, hook_point=HOOK_POINT)
