"""A transcoder is measured at its target hook point: ŷ replaces y, and the index describes its features there."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from fakes import SHAPE
from streamlit.testing.v1 import AppTest

import browser
from browser.state import ROOT_VARIABLE
from sae import pipeline
from sae.cli import main
from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import load, save
from sae.interventions.edits import Edit
from sae.interventions.steering import next_tokens, steer
from sae.lm import NativeModel
from store.activations import ActivationStore
from store.common import HELD_OUT
from store.features import FeatureIndex

READ, WRITTEN = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"
D_SAE = 40


@pytest.fixture(scope="module")
def store(tiny_model: NativeModel, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("transcoder") / "acts.zarr"
    return pipeline.harvest(
        tiny_model, tiny_text, out, tokens=4096, heldout_tokens=512, hook_points=[READ, WRITTEN], dtype="float32"
    )


def transcoder(directory: Path, model: NativeModel, store: Path, *, skip: bool = False) -> SAE:
    sae = SAE(SHAPE.d_model, D_SAE, pre_bias=False, skip=skip)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        sae.b_enc[:3] = -100.0  # three that never fire
    places = {"hook_point": READ, "target_hook_point": WRITTEN}
    save(sae, directory, places | {"model": model.identity(), "store": {"path": str(store)}})
    return load(directory)


def held_out(store: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and keep of the held-out contexts."""
    acts = ActivationStore.open(store)
    contexts = [acts.read_contexts(HELD_OUT, shard) for shard in sorted(acts.markers(HELD_OUT))]
    tokens, keep = (np.concatenate([getattr(part, name) for part in contexts]) for name in ("tokens", "keep"))
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(keep)


def loss(model: NativeModel, tokens: torch.Tensor, keep: torch.Tensor, replacement: torch.Tensor | None) -> float:
    """Mean cross-entropy with the MLP's output replaced at kept positions, from the model's own modules and no hook."""
    module, layer = model.module, model.module.blocks[0]
    resid = module.resid_pre(tokens)
    resid = resid + layer.attn(layer.ln1(resid))
    y = layer.mlp.out(layer.mlp.post(layer.ln2(resid)))
    if replacement is not None:
        y = torch.where(keep[..., None], replacement, y)
    log_p = module.unembed(module.ln_final(resid + y)).double().log_softmax(-1)
    losses = -log_p[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return losses[keep[:, :-1] & keep[:, 1:]].mean().item()


@pytest.mark.parametrize("skip", [False, True])
def test_its_output_is_judged_against_y_and_spliced_there(
    tmp_path: Path, tiny_model: NativeModel, store: Path, skip: bool
) -> None:
    sae = transcoder(tmp_path / "t", tiny_model, store, skip=skip)
    result = pipeline.evaluate(tmp_path / "t", model=tiny_model)
    tokens, keep = held_out(store)
    module, layer = tiny_model.module, tiny_model.module.blocks[0]
    with torch.no_grad():
        resid = module.resid_pre(tokens)
        x = layer.ln2(resid + layer.attn(layer.ln1(resid)))
        y = layer.mlp.out(layer.mlp.post(x))
        f = (x @ sae.W_enc + sae.b_enc).relu()
        y_hat = f @ sae.W_dec + sae.b_dec + (x @ sae.W_skip if skip else 0)
        train_mean = torch.from_numpy(ActivationStore.open(store).totals("train", WRITTEN).mean).float()
        ce = {
            name: loss(tiny_model, tokens, keep, replacement)
            for name, replacement in {
                "clean": None,
                "sae": y_hat,
                "zero": torch.zeros_like(y),
                "mean": train_mean.expand_as(y),
            }.items()
        }
    kept = y[keep].double()
    wanted = {
        "l0": (f[keep] > 0).sum(-1).double().mean(),
        "fvu": (kept - y_hat[keep]).pow(2).sum() / (kept - kept.mean(0)).pow(2).sum(),
        "dead_share": (f[keep] > 0).sum(0).eq(0).double().mean(),
        "delta_ce": ce["sae"] - ce["clean"],
        **{f"ce_{name}": value for name, value in ce.items()},
        **{f"ce_loss_score_{name}": (ce[name] - ce["sae"]) / (ce[name] - ce["clean"]) for name in ("zero", "mean")},
    }
    for name, value in wanted.items():
        assert result["metrics"][name]["value"] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
    assert result["transcodes"] == {"x": READ, "y": WRITTEN}
    assert result["checks"]["splice_identity_error"] < 1e-5
    assert all(entry["median_d_dot_e"] is None for entry in result["by_density"])  # the two live in different spaces
    assert json.loads((tmp_path / "t" / "eval.json").read_text())["metrics"] == result["metrics"]


def test_a_transcoder_that_is_the_mlp_loses_nothing(tmp_path: Path, tiny_model: NativeModel, store: Path) -> None:
    """ReLU MLP: its neurons are the features of a perfect transcoder."""
    sae = SAE(SHAPE.d_model, SHAPE.d_mlp, pre_bias=False)
    mlp = tiny_model.module.blocks[0].mlp
    inner = mlp.get_submodule("in")
    with torch.no_grad():
        sae.W_enc.copy_(inner.weight.T)
        sae.b_enc.copy_(inner.bias)
        sae.W_dec.copy_(mlp.out.weight.T)
        sae.b_dec.copy_(mlp.out.bias)
    places = {"hook_point": READ, "target_hook_point": WRITTEN}
    save(sae, tmp_path / "mlp", places | {"model": tiny_model.identity(), "store": {"path": str(store)}})
    metrics = pipeline.evaluate(tmp_path / "mlp", model=tiny_model)["metrics"]
    assert metrics["fvu"]["value"] < 1e-9
    assert abs(metrics["delta_ce"]["value"]) < 1e-6
    assert metrics["ce_loss_score_zero"]["value"] == pytest.approx(1, abs=1e-5)


def test_its_index_says_what_features_do_where_they_write(tmp_path: Path, tiny_model: NativeModel, store: Path) -> None:
    sae = transcoder(tmp_path / "t", tiny_model, store)
    index = FeatureIndex.open(pipeline.index(tmp_path / "t", model=tiny_model, tokens=600))
    assert index.attributes["hook_point"] == READ
    assert index.attributes["target_hook_point"] == WRITTEN
    # firings: of what the encoder finds in x, on the kept tokens that the index holds
    tokens, keep = (
        torch.from_numpy(np.stack([of(context) for context in range(index.n_contexts)]))
        for of in (index.tokens_at, index.keep_at)
    )
    f = (tiny_model.capture(tokens.long(), READ) @ sae.W_enc + sae.b_enc).relu()
    assert index.stats["count"].tolist() == (f[keep] > 0).sum(0).tolist()
    # logit weights: decoder rows as what they add to the residual stream
    module = tiny_model.module
    d = sae.W_dec - sae.W_dec.mean(-1, keepdim=True)
    logits = (d * module.ln_final.weight) @ module.unembed.weight.T
    logits = logits - logits.median(-1, keepdim=True).values
    np.testing.assert_allclose(index.column("logits/top_value")[:, 0], logits.amax(-1).numpy(), rtol=1e-4)
    assert not index.has("neurons/weight_id")
    assert index.has("neurons/corr_id")


def test_from_the_command_line(
    tmp_path: Path, tiny_model_dir: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acts, out = str(tmp_path / "acts.zarr"), str(tmp_path / "t")
    places = ["--hook-point", READ, "--hook-point", WRITTEN]
    harvest = ["harvest", "--model", str(tiny_model_dir), "--text", str(tiny_text), "--tokens", "4096", *places]
    assert main([*harvest, "--heldout-tokens", "512", "--out", acts]) == 0
    small = ["--d-sae", "24", "--tokens", "4096", "--batch-tokens", "128"]
    assert main(["train", "--acts", acts, "--recipe", "transcoder", *places, *small, "--out", out]) == 0
    assert main(["eval", out]) == 0
    said = capsys.readouterr().out
    assert f"a transcoder from {READ}: x in the formulas is its target y, the activations at {WRITTEN}" in said
    assert main(["index", out, "--tokens", "600"]) == 0


# --- steering and comparing ------------------------------------------------------------------------------------------


def brute_logits(model: NativeModel, sae: SAE, tokens: torch.Tensor, edited: dict[int, float]) -> torch.Tensor:
    """Next-token logits with features held at these activations, by the model's own modules: y + Σ (v − a) · W_dec."""
    module, layer = model.module, model.module.blocks[0]
    resid = module.resid_pre(tokens)
    resid = resid + layer.attn(layer.ln1(resid))
    x = layer.ln2(resid)
    y = layer.mlp.out(layer.mlp.post(x))
    acts = (x @ sae.W_enc + sae.b_enc).relu()
    for feature, value in edited.items():
        y = y + (value - acts[..., feature])[..., None] * sae.W_dec[feature]
    return module.unembed(module.ln_final(resid + y))[:, -1]


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_steering_adds_its_features_next_to_the_mlps_own_output(
    tmp_path: Path, tiny_model: NativeModel, store: Path, skip: bool
) -> None:
    sae = transcoder(tmp_path / "t", tiny_model, store, skip=skip)
    units = {"feature_max": np.full(D_SAE, 2.0, np.float32)}
    edits = [Edit(5, "set", 3.0), Edit(9, "ablate")]
    found = steer(tiny_model, sae, "the quick", edits, temperature=0.0, max_new_tokens=6, **units)
    ids = list(found.prompt_ids)
    for token in found.steered_ids:
        logits = brute_logits(tiny_model, sae, torch.tensor([ids]), {5: 6.0, 9: 0.0})[0]
        assert token == int(logits.argmax())
        ids.append(token)
    shown = next_tokens(tiny_model, sae, found.prompt_ids, edits, **units)
    prompt = torch.tensor([found.prompt_ids])
    for which, expected in (("base", {}), ("steered", {5: 6.0, 9: 0.0})):
        p = brute_logits(tiny_model, sae, prompt, expected)[0].double().softmax(-1)[shown.ids]
        torch.testing.assert_close(torch.tensor(getattr(shown, which), dtype=torch.float64), p, atol=1e-6, rtol=1e-4)
    assert found.steered_ids != found.base_ids or shown.kl > 1e-4  # the edits do something here
    unedited = steer(tiny_model, sae, "the quick", [], temperature=0.0, max_new_tokens=3)
    assert unedited.steered_ids == unedited.base_ids
    assert max(unedited.kl) == 0


def test_two_transcoders_are_compared_where_they_read_and_where_they_write(
    tmp_path: Path, tiny_model: NativeModel, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("sae.pipeline.compare"), "model_of", lambda *_, **__: tiny_model)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(2))
    one = transcoder(tmp_path / "runs" / "one", tiny_model, store)
    other = transcoder(tmp_path / "runs" / "other", tiny_model, store)
    for name in ("W_enc", "b_enc", "W_dec"):
        tensor = getattr(other, name)
        getattr(other, name).data = tensor[:, order].contiguous() if name == "W_enc" else tensor[order].contiguous()
    save(other, tmp_path / "runs" / "other", other.config)
    result = pipeline.compare(tmp_path / "runs" / "one", tmp_path / "runs" / "other")
    assert (result["same_space"], result["same_outputs"]) == (True, True)
    assert result["a"]["target_hook_point"] == WRITTEN
    table = pyarrow.parquet.read_table(Path(result["path"]) / "features_a.parquet").to_pydict()
    for feature, (best, nearest) in enumerate(zip(table["matched"], table["cosine_best"], strict=True)):
        assert nearest is None or order[nearest] == feature
        assert best is None or order[best] == feature
    assert sum(best is not None for best in table["matched"]) > D_SAE // 2
    logits = [value for value in table["logit_correlation"] if value is not None]
    assert min(logits) > 0.999
    # An autoencoder of the MLP's output writes where the transcoder writes, and reads other activations.
    plain = SAE(SHAPE.d_model, D_SAE)
    with torch.no_grad():
        plain.W_dec.copy_(one.W_dec)
    places = {key: value for key, value in one.config.items() if key in ("model", "store")}
    save(plain, tmp_path / "runs" / "plain", places | {"hook_point": WRITTEN})
    result = pipeline.compare(tmp_path / "runs" / "one", tmp_path / "runs" / "plain")
    assert (result["same_space"], result["same_outputs"]) == (False, True)
    assert result["summary"]["decoder_a_to_b"]["median"] == pytest.approx(1, abs=1e-5)


def test_the_steer_verb_takes_a_transcoder(
    tmp_path: Path, tiny_model: NativeModel, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transcoder(tmp_path / "t", tiny_model, store)
    pipeline.evaluate(tmp_path / "t", model=tiny_model)
    arguments = ["steer", str(tmp_path / "t"), "--edit", "5:set:5", "--prompt", "the", "--max-new-tokens", "2"]
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["steered"][0]["ids"]) == 2


def test_the_apps_pages_work_with_a_transcoder_or_say_why_not(
    tmp_path: Path, tiny_model: NativeModel, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feature underlines its ablations at the target; Steering opens; Microscope refuses in words."""
    transcoder(tmp_path / "t", tiny_model, store)
    pipeline.evaluate(tmp_path / "t", model=tiny_model)
    pipeline.index(tmp_path / "t", model=tiny_model)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    said = {}
    for view in ("Feature", "Steering", "Microscope"):
        page = AppTest.from_file(str(Path(browser.__file__).with_name("app.py")), default_timeout=120)
        for name, value in {"sae": "t", "feature": "5", "view": view, "prompt": "the"}.items():
            page.query_params[name] = value
        page.run()
        assert not page.exception, page.exception
        said[view] = " ".join(element.body for element in page.get("html")) + " ".join(c.value for c in page.caption)
    assert "in closed form" in said["Feature"]
    assert "is a transcoder" not in said["Steering"]
    assert "is a transcoder" in said["Microscope"]
