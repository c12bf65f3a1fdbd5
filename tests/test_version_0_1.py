"""Files that version 0.1.0 wrote open unchanged, and its unfinished runs continue.

`data/version-0.1.tar.xz` was made by that version (commit 5e7b10c): a tiny model, its text, a finished store, one that
was cut off after 20 shards, nine dictionaries, five runs cut off at step 33 of 60, an evaluation and a feature index.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from sae import pipeline
from sae.cli import main
from sae.dictionary.files import load
from sae.jobs.checkpoint import read_tensors
from sae.lm import NativeModel
from sae.training.config import DEFAULTS
from store.activations import ActivationStore
from store.features import FeatureIndex

ARCHIVE = Path(__file__).parent / "data" / "version-0.1.tar.xz"
CUT = ("balanced", "batch-topk", "jumprelu", "topk", "towards-monosemanticity")
FINISHED = (*CUT, "anthropic-2024-04", "gated", "matryoshka", "p-anneal")
RUN = {"d_sae": 24, "tokens": 60 * 64, "seed": 1, "config": {"batch_tokens": 64, "target_l0": 3.0}}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory / "version-0.1"


@pytest.fixture(scope="module")
def model(old: Path) -> NativeModel:
    return NativeModel(old / "model", "model")


def test_the_store_opens_and_verifies(old: Path) -> None:
    store = ActivationStore.open(old / "run" / "acts.zarr")
    assert store.is_complete
    assert store.verify() == []


def test_the_harvest_that_was_cut_off_continues(
    old: Path, model: NativeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(old / "run" / "cut.zarr", tmp_path / "cut.zarr")
    monkeypatch.chdir(old)  # the store names its text by the path it was given
    pipeline.harvest(model, "text.jsonl", tmp_path / "cut.zarr", tokens=2048, heldout_tokens=256)
    whole, found = (ActivationStore.open(path) for path in (old / "run" / "acts.zarr", tmp_path / "cut.zarr"))
    assert found.is_complete
    assert found.verify() == []
    for split, shards in whole.n_shards.items():
        for shard in range(shards):
            there, here = (store.read_contexts(split, shard) for store in (whole, found))
            for name in ("tokens", "keep", "document"):
                assert np.array_equal(getattr(here, name), getattr(there, name)), name
            acts = [store.read_acts(split, shard, "blocks.0.mlp.hook_post") for store in (whole, found)]
            np.testing.assert_allclose(acts[1], acts[0], rtol=2e-3, atol=1e-4)  # float16 of another processor


def test_a_new_harvest_of_the_same_text_has_the_same_rows(old: Path, model: NativeModel, tmp_path: Path) -> None:
    """Documents that are short and many keep their splits and lanes: the files of tokens are the same byte for byte."""
    pipeline.harvest(model, old / "text.jsonl", tmp_path / "acts.zarr", tokens=2048, heldout_tokens=256)
    whole, found = (ActivationStore.open(path) for path in (old / "run" / "acts.zarr", tmp_path / "acts.zarr"))
    assert found.n_shards == whole.n_shards
    for name in ("tokens", "keep", "document"):
        there = {p.relative_to(whole.path): p.read_bytes() for p in Path(whole.path, name).rglob("*") if p.is_file()}
        assert len(there) > 60
        assert {p: Path(found.path, p).read_bytes() for p in there} == there
    for split in whole.n_shards:
        assert {s: (m.cursor, m.documents, m.kept_rows) for s, m in found.markers(split).items()} == {
            s: (m.cursor, m.documents, m.kept_rows) for s, m in whole.markers(split).items()
        }
        for shard, marker in whole.markers(split).items():
            if marker.contexts:
                acts = [store.read_acts(split, shard, "blocks.0.mlp.hook_post") for store in (whole, found)]
                np.testing.assert_allclose(acts[1], acts[0], rtol=2e-3, atol=1e-4)  # float16 of another processor


@pytest.mark.parametrize("recipe", FINISHED)
def test_a_dictionary_opens_and_reconstructs_as_it_did(old: Path, recipe: str) -> None:
    sae = load(old / "run" / recipe)
    tensors, _ = read_tensors(old / "run" / recipe / "sae.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in sae.tensors().items())
    assert sae.config["train"]["recipe"] == recipe
    x = torch.from_numpy(
        ActivationStore.open(old / "run" / "acts.zarr").read_acts("heldout", 0, sae.config["hook_point"])
    )
    assert sae.reconstruct(x).shape == x.shape


@pytest.mark.parametrize("recipe", CUT)
def test_a_training_that_was_cut_off_continues(old: Path, recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(old / "run" / "acts.zarr", run / "acts.zarr")
    shutil.copytree(old / "run" / f"cut-{recipe}", run / f"cut-{recipe}")
    assert read_tensors(run / f"cut-{recipe}" / "state.safetensors")[1]["step"] == 33
    with warnings.catch_warnings():  # 60 steps are too few for some searches of λ, as they were then
        warnings.simplefilter("ignore")
        sae = pipeline.train(run / "acts.zarr", run / f"cut-{recipe}", recipe=recipe, **RUN)
    whole = load(old / "run" / recipe)
    for name, tensor in sae.tensors().items():  # bit for bit on one processor; between two, the last digits may differ
        torch.testing.assert_close(tensor, whole.tensors()[name], rtol=1e-3, atol=1e-4, msg=name)
    there, here = (json.loads((d / "config.json").read_text()) for d in (old / "run" / recipe, run / f"cut-{recipe}"))
    assert here["train"] == json.loads(json.dumps(DEFAULTS)) | there["train"]  # new settings are at their defaults


def test_it_is_evaluated_to_the_same_figures(old: Path, model: NativeModel, tmp_path: Path) -> None:
    shutil.copytree(old / "run", tmp_path / "run")
    before = json.loads((tmp_path / "run" / "balanced" / "eval.json").read_text())
    after = pipeline.evaluate(tmp_path / "run" / "balanced", model=model)
    assert after["tokens"] == before["tokens"]
    assert after["metrics"].keys() >= before["metrics"].keys()
    for name, entry in before["metrics"].items():
        assert after["metrics"][name]["version"] == entry["version"], name
        if isinstance(entry["value"], float):
            assert after["metrics"][name]["value"] == pytest.approx(entry["value"], rel=1e-3, abs=1e-5), name


def test_its_index_opens(old: Path) -> None:
    index = FeatureIndex.open(old / "run" / "balanced" / "features.zarr")
    assert sum(len(index.firings(feature)[0]) for feature in range(24)) > 100


@pytest.mark.parametrize("path", ["run", "run/acts.zarr", "run/balanced", "run/balanced/features.zarr", "model"])
def test_the_command_describes_it(old: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(old / path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"]
