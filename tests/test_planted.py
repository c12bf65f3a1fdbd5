"""Planted rows: their distribution, that they depend on (seed, step) only, and recovery of the planted dictionary."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from sae import pipeline
from sae.analysis.matching import synthetic_bench
from sae.analysis.planted import PlantedRows, judge
from sae.dictionary.autoencoder import SAE

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = PlantedRows(n_truths=24, d_in=64, active=2.0, decay=0.97, noise=0.0, batch_tokens=512)


def test_the_rows_have_the_documented_distribution() -> None:
    x, strengths = SMALL.rows(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, strengths @ SMALL.truths)
    on = strengths > 0
    assert on.float().sum(1).mean().item() == pytest.approx(2.0, rel=0.02)
    torch.testing.assert_close(on.float().mean(0), SMALL.probabilities, atol=0.01, rtol=0)
    assert SMALL.probabilities[9] / SMALL.probabilities[8] == pytest.approx(0.97, rel=1e-5)
    assert strengths[on].mean().item() == pytest.approx(0.5, abs=0.01)
    noisy = PlantedRows(n_truths=24, d_in=64, active=2.0, noise=0.3)
    x, strengths = noisy.rows(5000, torch.Generator().manual_seed(0))
    assert (x - strengths @ noisy.truths).pow(2).sum(-1).mean().item() == pytest.approx(0.09, rel=0.05)
    torch.testing.assert_close(noisy.truths.norm(dim=-1), torch.ones(24))


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    again = PlantedRows(n_truths=24, d_in=64, active=2.0, decay=0.97, noise=0.0, batch_tokens=512)
    assert torch.equal(SMALL.batch(3).x, again.batch(3).x)
    assert torch.equal(SMALL.sample(5000, 1), again.sample(5000, 1))
    assert not torch.equal(SMALL.batch(3).x, SMALL.batch(4).x)
    assert not torch.equal(SMALL.batch(3).x, PlantedRows(24, 64, 2.0, 0.97, 0.0, 512, seed=1).batch(3).x)
    assert SMALL.sample(5000, 1).shape == (5000, 64)


def test_a_probability_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match="probability above 1"):
        PlantedRows(n_truths=10, active=8.0, decay=0.5)


def test_the_planted_dictionary_itself_is_recovered_perfectly() -> None:
    orthogonal = PlantedRows(n_truths=24, d_in=64, active=2.0, decay=0.97, noise=0.0)
    object.__setattr__(orthogonal, "truths", torch.eye(64)[:24])
    sae = SAE(64, 24)
    with torch.no_grad():
        sae.W_dec.copy_(orthogonal.truths)
        sae.W_enc.copy_(orthogonal.truths.T)
    found = judge(sae.requires_grad_(False), orthogonal)
    assert found["mcc"] == found["mmcs_truth"] == found["recovered"] == 1
    assert found["bench_f1"] == found["bench_mcc"] == found["uniqueness"] == 1
    assert found["f_correlation"] == pytest.approx(1, abs=1e-6)
    assert found["fvu"] == pytest.approx(0, abs=1e-9)
    assert found["l0"] == pytest.approx(2, rel=0.05)
    assert found["dead_share"] == 0


def bench_by_hand(W_dec: np.ndarray, fired: np.ndarray, truth: np.ndarray, on: np.ndarray) -> dict[str, float]:
    """SynthSAEBench's formulas, feature by feature and over every one-to-one matching."""

    def cosine(d: np.ndarray, t: np.ndarray) -> float:
        return abs(sum(d * t)) / np.sqrt(sum(d * d) * sum(t * t))

    cosines = np.array([[cosine(d, t) for t in truth] for d in W_dec])
    scores, tracks = [], []
    for feature, row in enumerate(cosines):
        tracks.append(max(range(len(truth)), key=lambda t, row=row: row[t]))
        says, holds = fired[:, feature] > 0, on[:, tracks[-1]] > 0
        hits = sum(says & holds)
        precision = hits / sum(says) if sum(says) else 0.0
        recall = hits / sum(holds) if sum(holds) else 0.0
        scores.append((precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0))
    few, many = cosines if len(W_dec) <= len(truth) else cosines.T, max(cosines.shape)
    best = max(
        sum(row[partner] for row, partner in zip(few, chosen, strict=True))
        for chosen in itertools.permutations(range(many), len(few))
    )
    mean = np.mean(scores, axis=0)
    return {
        "bench_precision": mean[0],
        "bench_recall": mean[1],
        "bench_f1": mean[2],
        "bench_mcc": best / len(few),
        "uniqueness": len(set(tracks)) / len(W_dec),
    }


@pytest.mark.parametrize("n_learned", [3, 5, 6])
def test_the_scores_of_the_bench_by_hand(n_learned: int) -> None:
    rng = np.random.default_rng(n_learned)
    W_dec, truth = rng.normal(size=(n_learned, 4)), rng.normal(size=(5, 4))
    W_dec[1] = -W_dec[0] * 3  # tracks the same truth: the sign does not count
    fired = rng.random((40, n_learned)) * (rng.random((40, n_learned)) < 0.3)
    on = rng.random((40, 5)) * (rng.random((40, 5)) < 0.3)
    fired[:, 2] = on[:, 4] = 0.0  # never fires; is never on
    found = synthetic_bench(
        torch.from_numpy(W_dec), sparse.csr_array(fired), torch.from_numpy(truth), sparse.csr_array(on)
    )
    assert found == pytest.approx(bench_by_hand(W_dec, fired, truth, on), rel=1e-6)
    assert found["uniqueness"] < 1


def test_training_finds_the_planted_dictionary(tmp_path: Path) -> None:
    sae = pipeline.train(
        SMALL, tmp_path / "topk", recipe="topk", d_sae=24, tokens=300_000, seed=0, config={"k": 2, "batch_tokens": 512}
    )
    found = judge(sae, SMALL)
    random = judge(SAE(64, 24).requires_grad_(False), SMALL)
    assert min(found["mcc"], found["bench_mcc"], found["uniqueness"]) > 0.9
    assert found["bench_f1"] > 0.6  # always k features, also where fewer truths are on
    assert random["mcc"] < 0.1
    assert random["bench_f1"] == 0
    assert random["dead_share"] == 1


def test_thresholds_reach_the_l0_asked_for_at_a_moderate_lambda(tmp_path: Path) -> None:
    """A target far below the active truths: with lr for thresholds too, λ would rise to 3e4 for an L0 of 2.6."""
    planted = PlantedRows(n_truths=128, d_in=48, active=6.0, decay=0.98, batch_tokens=1024)
    config = {"target_l0": 2.0, "batch_tokens": 1024}
    sae = pipeline.train(planted, tmp_path, recipe="jumprelu", d_sae=128, tokens=300_000, seed=0, config=config)
    assert judge(sae, planted)["l0"] == pytest.approx(2, rel=0.1)
    assert sae.config["lambda"]["scaled"] < 48 / 2  # λ · L0 < E‖x‖²: the penalty outweighs no whole input


def test_the_script_leaves_out_recipes_that_need_more_than_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as when the script is run: it imports other scripts
    spec = importlib.util.spec_from_file_location("planted", SCRIPTS / "planted.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setitem(script.SIZES, "small", {"n_truths": 24, "d_in": 64, "active": 2.0, "decay": 0.97})
    command = ["planted.py", "--recipes", "transcoder,topk,end-to-end", "--tokens", "8192", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert script.main() == 0
    said = capsys.readouterr().err
    assert "transcoder: left out, it needs y" in said
    assert "end-to-end: left out, it needs resid" in said
    summary = json.loads((tmp_path / "small.json").read_text())
    assert {"date", "cpu", "torch"} <= set(summary["hardware"])
    found = summary["results"]
    assert [entry["recipe"] for entry in found] == ["random", "topk"]
