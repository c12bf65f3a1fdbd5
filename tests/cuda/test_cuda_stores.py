"""What reads a store or a model, on a GPU: rows, live training, evaluation and the index. Needs zarr and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("zarr")
pytest.importorskip("google_crc32c")
pytest.importorskip("tokenizers")
from fakes import HOOK_POINT, made_up_documents, text_source, write_jsonl, write_model

import sae
from sae import pipeline
from sae.lm import NativeModel
from sae.pipeline.resident_rows import ResidentRows
from store.activations import ActivationStore
from store.batches import ShuffledRows

SETTINGS: dict[str, Any] = {"recipe": "topk", "d_sae": 32, "tokens": 1024, "config": {"k": 3, "batch_tokens": 64}}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    home = tmp_path_factory.mktemp("run")
    text = write_jsonl(home / "text.jsonl", made_up_documents(1500))
    model = NativeModel(model_dir, str(model_dir))
    return pipeline.harvest(model, text, home / "acts.zarr", tokens=4096, heldout_tokens=512)


@pytest.mark.parametrize("everything", [True, False])
def test_rows_on_the_device_are_those_of_the_host(device: torch.device, acts: Path, everything: bool) -> None:
    store = ActivationStore.open(acts)
    plan = {"batch_rows": 50, "seed": 1, "pool_shards": 3, "parts": 2}
    host, source = (ShuffledRows(store, HOOK_POINT, **plan) for _ in range(2))  # type: ignore[arg-type]
    resident = ResidentRows(source, device, everything=everything)
    batches = [resident.batch(step)[0] for step in range(int(2 * host.steps_per_epoch))]  # all of them are kept
    assert batches[0].device.type == device.type
    for step, x in enumerate(batches):
        assert np.array_equal(x.cpu().numpy(), host.batch(step)), step


def test_a_run_on_a_store_is_evaluated_and_indexed(device: torch.device, acts: Path, tmp_path: Path) -> None:
    trained = tmp_path / "sae"
    how: dict[str, Any] = {"device": device.type}
    pipeline.train(acts, trained, **SETTINGS, **how)
    config = json.loads((trained / "config.json").read_text())
    assert config["device"] == device.type
    found = [pipeline.evaluate(trained, device=place)["metrics"] for place in ("cpu", device.type)]
    for name in ("fvu", "l0", "ce_sae", "delta_ce"):
        assert found[1][name]["value"] == pytest.approx(found[0][name]["value"], rel=1e-3, abs=1e-4), name
    here, there = (
        pipeline.index(trained, out=tmp_path / f"{n}.zarr", device=place)
        for n, place in enumerate(("cpu", device.type))
    )
    assert here.exists()
    assert there.exists()


def test_a_live_run_keeps_its_rows_on_the_device(device: torch.device, model_dir: Path, tmp_path: Path) -> None:
    from sae.training.live_rows import Contexts, LiveRows

    model = NativeModel(model_dir, "tiny", device.type)
    source = text_source(made_up_documents(800))
    rows = LiveRows(Contexts(model, source, 32), {"x": HOOK_POINT}, batch_tokens=64, seed=0, steps=16)
    assert rows.batch(0).x.device.type == device.type
    live = sae.Live(model, source)
    found = pipeline.train(live, tmp_path / "live", **SETTINGS, device=device.type)
    assert all(tensor.isfinite().all() for tensor in found.tensors().values())
