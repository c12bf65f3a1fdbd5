"""scripts/dead_features.py: three trainings that differ only in the cure, counted on held-out text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import HOOK_POINT

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import dead_features  # noqa: E402

import sae  # noqa: E402
from sae.training.recipes import RECIPES  # noqa: E402
from store.activations import ActivationStore  # noqa: E402


@torch.no_grad()
def test_naive_reinitialisation_changes_dead_features_only() -> None:
    torch.manual_seed(0)
    dictionary = sae.SAE(16, 40)
    for tensor in (dictionary.W_enc, dictionary.W_dec, dictionary.b_enc):
        tensor.normal_()
    before = dictionary.W_enc.clone(), dictionary.W_dec.clone(), dictionary.b_enc.clone()
    dead, living = torch.tensor([3, 17, 39]), torch.tensor([n for n in range(40) if n not in (3, 17, 39)])
    parents = dead_features.reinitialise_(
        dictionary, None, dead, torch.empty(0, 16), torch.empty(0), torch.Generator().manual_seed(1)
    )
    assert parents.tolist() == [-1, -1, -1]
    assert torch.equal(dictionary.W_enc[:, living], before[0][:, living])
    assert torch.equal(dictionary.W_dec[living], before[1][living])
    assert torch.equal(dictionary.b_enc[living], before[2][living])
    assert torch.allclose(dictionary.W_dec[dead].norm(dim=-1), torch.ones(3))
    assert dictionary.W_enc[:, dead].abs().max() <= 16**-0.5  # Kaiming uniform for d_in inputs
    assert dictionary.b_enc[dead].tolist() == [0.0, 0.0, 0.0]


def test_three_cures_on_a_store(tmp_path: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [
        "dead_features.py",
        "--acts",
        str(tiny_store),
        "--hook-point",
        HOOK_POINT,
        "--out",
        str(tmp_path / "runs"),
        "--d-sae",
        "64",
        "--tokens",
        "5120",
        "--json",
        str(tmp_path / "dead.json"),
        "--set",
        "batch_tokens=128",
        "--set",
        "l1=100",
        "--set",
        "lr=0.01",
        "--set",
        "resample_shares=0.5,0.7",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    recipes = dict(RECIPES)
    assert dead_features.main() == 0
    assert recipes == RECIPES
    results = json.loads((tmp_path / "dead.json").read_text())["results"]
    assert list(results) == ["none", "naive", "paper"]
    assert results["none"]["events"] == []
    for cure in ("naive", "paper"):  # a penalty this large leaves features to bring back
        assert sum(event["features"] for event in results[cure]["events"]) > 0
        log = [json.loads(line) for line in (tmp_path / "runs" / cure / "resampled.jsonl").read_text().splitlines()]
        assert {line["parent_row"] == -1 for line in log} == {cure == "naive"}
    store = ActivationStore.open(tiny_store)
    for cure, line in results.items():
        dictionary, count, tokens = sae.load(tmp_path / "runs" / cure), np.zeros(64), 0
        for shard in store.markers("heldout"):
            kept = store.read_contexts("heldout", shard).keep.reshape(-1)
            x = torch.from_numpy(store.read_acts("heldout", shard, HOOK_POINT)[kept])
            count += (dictionary.encode(x) > 0).sum(0).numpy()
            tokens += len(x)
        assert line["heldout_tokens"] == tokens
        assert line["alive"] == (count > 0).sum()
        assert line["not_ultra_low"] == (count > 1e-5 * tokens).sum()
        assert line["l0"] == pytest.approx(count.sum() / tokens)
