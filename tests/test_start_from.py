"""A run that starts from a dictionary has its function at the first step, whatever the recipe, scale and biases."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FewRows
from torch import Tensor

import sae
from sae import pipeline
from sae.cli import main
from sae.dictionary.autoencoder import SAE, fold_scale
from sae.kernels import choose
from sae.training import recipes
from sae.training.rows import Batch
from sae.training.start_from import CannotStart
from sae.training.state import start

D_SAE, K = 12, 3


class OffCentreRows(FewRows):
    """Rows far from the origin and of a large scale, so that a wrong centre or scale would show; y for a transcoder."""

    d_out = 5

    def batch(self, step: int) -> Batch:
        return Batch(self.sample(16, step), self.sample_targets(16, step))

    def sample(self, n: int, seed: int) -> Tensor:
        return 7 * super().sample(n, seed) + 20

    def sample_targets(self, n: int, seed: int) -> Tensor:
        return self.sample(n, seed)[:, :5] * 0.01


def random_source(activation: str, *, pre_bias: bool = True, unit: bool = False, d_out: int | None = None) -> SAE:
    source = SAE(8, D_SAE, activation=activation, k=K if "topk" in activation else None, d_out=d_out, pre_bias=pre_bias)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in source.tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        source.b_dec.add_(15.0)
        if hasattr(source, "threshold"):
            source.threshold.abs_()
        if unit:
            source.W_dec.div_(source.W_dec.norm(dim=-1, keepdim=True))
    return source.eval()


def formula(source: SAE, x: Tensor) -> Tensor:
    """x̂ by the papers' formulas, in float64."""
    t = {name: tensor.double() for name, tensor in source.tensors().items()}
    x = x.double()
    gate = t["b_enc"]
    pre = (x - t["b_dec"] if source.pre_bias else x) @ t["W_enc"] + gate
    match source.activation:
        case "relu":
            f = pre.relu()
        case "topk":
            kth = pre.topk(K).values[:, -1:]
            f = torch.where(pre >= kth, pre.relu(), 0.0)
        case "jumprelu" | "batchtopk":
            f = torch.where(pre > t["threshold"], pre, 0.0)
        case "gated":
            f = torch.where(pre > 0, (t["r_mag"].exp() * (pre - gate) + t["b_mag"]).relu(), 0.0)
    return f @ t["W_dec"] + t["b_dec"]


def started(source: SAE, recipe: str, **settings: Any) -> SAE:
    """The dictionary of a run's first step, on raw rows."""
    found, config = recipes.resolve(recipe, d_sae=D_SAE, tokens=1000, batch_tokens=16, **settings)
    state = start(OffCentreRows(), config, found, choose("reference"), source=source)
    assert state.scale != pytest.approx(1, abs=0.1)
    return fold_scale(state.sae.eval(), state.scale, state.target_scale)


PAIRS = [
    ("relu", "towards-monosemanticity", {}),
    ("relu", "anthropic-2024-04", {}),  # without a pre-bias, decoder rows free
    ("relu", "gated", {}),
    ("relu", "jumprelu", {}),
    ("relu", "balanced", {"k": K}),
    ("gated", "gated", {}),
    ("jumprelu", "jumprelu", {}),
    ("jumprelu", "balanced", {"k": K}),
    ("batchtopk", "batch-topk", {"k": K}),
    ("batchtopk", "jumprelu", {}),
]


@pytest.mark.parametrize(("activation", "recipe", "settings"), PAIRS)
@pytest.mark.parametrize("pre_bias", [True, False])
def test_the_function_at_the_first_step_is_that_of_the_source(
    activation: str, recipe: str, settings: dict[str, Any], pre_bias: bool
) -> None:
    source = random_source(activation, pre_bias=pre_bias)
    x = OffCentreRows().sample(200, 1)
    expected = formula(source, x)
    torch.testing.assert_close(started(source, recipe, **settings)(x).double(), expected, rtol=2e-5, atol=2e-3)
    assert expected.std() > 1


def test_a_topk_dictionary_with_unit_rows_starts_a_topk_run() -> None:
    source = random_source("topk", unit=True)
    x = OffCentreRows().sample(200, 1)
    torch.testing.assert_close(started(source, "topk", k=K)(x).double(), formula(source, x), rtol=2e-5, atol=2e-3)


def test_a_transcoder_keeps_its_function_with_two_scales() -> None:
    source = random_source("relu", pre_bias=False, d_out=5)
    x = OffCentreRows().sample(200, 1)
    made = started(source, "transcoder")
    torch.testing.assert_close(made(x).double(), formula(source, x), rtol=2e-5, atol=2e-3)


@pytest.mark.parametrize(
    ("source", "recipe", "settings", "said"),
    [
        (random_source("topk"), "topk", {"k": K}, "not of unit norm"),
        (random_source("topk", unit=True), "topk", {"k": K + 1}, "k = 3 features, this run k = 4"),
        (random_source("topk"), "jumprelu", {}, "cannot have the same function"),
        (random_source("gated"), "balanced", {"k": K}, "cannot have the same function"),
        (random_source("jumprelu"), "towards-monosemanticity", {}, "cannot have the same function"),
        (SAE(8, D_SAE, row_norm="layer_norm"), "towards-monosemanticity", {}, "normalises each row"),
        (SAE(7, D_SAE), "towards-monosemanticity", {}, "d_in = 7, this run 8"),
        (SAE(8, D_SAE + 1), "towards-monosemanticity", {}, "d_sae = 13, this run 12"),
    ],
)
def test_what_cannot_keep_the_function_is_refused(source: SAE, recipe: str, settings: Any, said: str) -> None:
    with pytest.raises(CannotStart, match=said):
        started(source, recipe, **settings)


def test_a_level_of_thresholds_that_exists_is_kept_at_the_first_step() -> None:
    from sae.training.step import train_step

    source = random_source("batchtopk", unit=True)
    with torch.no_grad():
        source.threshold.fill_(0.5)
    found, config = recipes.resolve("batch-topk", d_sae=D_SAE, tokens=1000, batch_tokens=16, k=K)
    rows = OffCentreRows()
    state = start(rows, config, found, choose("reference"), source=source)
    before = state.sae.threshold.amax().item()
    train_step(state, rows.batch(0), config)
    after = state.sae.threshold.amax().item()
    assert before == pytest.approx(0.5 * state.scale)
    assert abs(after - before) < 0.2 * abs(before) + 0.1  # a hundredth of the way to the batch's own level


def test_a_dictionary_is_trained_further_and_its_origin_is_recorded(tiny_store: Path, tmp_path: Path) -> None:
    """First a run of 60 steps; a run from it that cannot move has its fvu, and its record names it by its weights."""
    sizes: dict[str, Any] = {"l0": 5, "tokens": 60 * 256, "config": {"batch_tokens": 256}}
    first = pipeline.train(tiny_store, tmp_path / "first", d_sae=48, **sizes)
    still = [
        "--set",
        "lr=1e-12",
        "--set",
        "min_density=0",
        "--tokens",
        str(25 * 256),
        "--batch-tokens",
        "256",
        "--l0",
        "5",
    ]
    source = ["--acts", str(tiny_store), "--from", str(tmp_path / "first")]
    assert main(["train", *source, *still, "--out", str(tmp_path / "second")]) == 0
    second = sae.load(tmp_path / "second")
    assert second.d_sae == 48
    torch.testing.assert_close(second.W_dec, first.W_dec, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(second.b_dec, first.b_dec, rtol=1e-4, atol=1e-5)
    logs = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("first", "second")
    ]
    assert logs[1]["fvu"] == pytest.approx(logs[0]["fvu"], rel=0.3)
    record = second.config["started_from"]
    digest = hashlib.sha256()
    for name in ("W_dec", "W_enc", "b_dec", "b_enc", "threshold"):
        digest.update(name.encode() + first.tensors()[name].contiguous().numpy().tobytes())
    assert record["sha256"] == digest.hexdigest()
    assert record["path"] == "../first"
    assert record["recipe"] == "matryoshka"


def test_a_dictionary_of_another_hook_point_is_refused_before_anything_is_written(
    tiny_store: Path, tmp_path: Path
) -> None:
    other = SAE(32, 48)
    other.config = {"hook_point": "blocks.0.hook_resid_post"}
    with pytest.raises(ValueError, match="reads blocks.0.hook_resid_post, this run blocks.0.mlp.hook_post"):
        pipeline.train(tiny_store, tmp_path / "out", recipe="towards-monosemanticity", start_from=other)
    assert not (tmp_path / "out").exists()
