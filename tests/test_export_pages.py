"""Feature pages for SAEDashboard and Neuronpedia: their fields, and what our own reader reads back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dump_files import dashboard
from fakes import HOOK_POINT, random_sae

from sae import pipeline
from sae.cli import main
from sae.dictionary.files import save
from sae.interop import dashboards
from sae.lm import NativeModel
from sae.pipeline import PipelineError
from store.activations import ActivationStore
from store.common import StoreError
from store.features import FeatureIndex

# The fields of SAEDashboard's NeuronpediaDashboardBatch, …Feature and …Activation (0.5 to 0.8), with their types.
NUMBER = (int, float)
FEATURE: dict[str, type | tuple[type, ...]] = {
    "feature_index": int,
    "frac_nonzero": NUMBER,
    "n_prompts_total": int,
    "n_tokens_in_prompt": int,
    "dataset": str,
}
LISTS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("neuron_alignment_indices", "correlated_neurons_indices", "correlated_features_indices"), int),
    **dict.fromkeys(("neg_str", "pos_str"), str),
    **dict.fromkeys(
        (
            "neuron_alignment_values",
            "neuron_alignment_l1",
            "correlated_neurons_l1",
            "correlated_neurons_pearson",
            "correlated_features_l1",
            "correlated_features_pearson",
            "neg_values",
            "pos_values",
            "freq_hist_data_bar_values",
            "freq_hist_data_bar_heights",
            "logits_hist_data_bar_heights",
            "logits_hist_data_bar_values",
            "decoder_weights_dist",
            "vector",
        ),
        NUMBER,
    ),
    "activations": dict,
}
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}
D_SAE = 24


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, tiny_model_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("indexed") / "mine"
    store = ActivationStore.open(tiny_store)
    sae = random_sae(store.hook_points[HOOK_POINT], d_sae=D_SAE, activation="topk", k=3)
    sae.config |= {"model": NativeModel(tiny_model_dir, str(tiny_model_dir)).identity()}
    save(sae, directory, sae.config)
    pipeline.index(directory, store=tiny_store, tokens=1024)
    return directory


@pytest.fixture(scope="module")
def exported(indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.export_pages(indexed, tmp_path_factory.mktemp("pages") / "out")


def batch(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "batch-0.json").read_text(encoding="utf-8"))
    return content


def test_the_files_have_the_fields_and_types_of_their_reader(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {"batch-0.json", "run_settings.json"}
    content = batch(exported)
    assert content.keys() == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    assert (content["layer"], content["sae_set"]) == (0, "mine")
    assert [each["feature_index"] for each in content["features"]] == list(range(D_SAE))
    for each in content["features"]:
        assert each.keys() == FEATURE.keys() | LISTS.keys()
        assert all(isinstance(each[name], kind) for name, kind in FEATURE.items())
        for name, kind in LISTS.items():
            assert all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in each[name]), name
        for a, b in (("neg_str", "neg_values"), ("pos_str", "pos_values")):
            assert len(each[a]) == len(each[b])
        for example in each["activations"]:
            assert example.keys() == ACTIVATION
            assert len(example["tokens"]) == len(example["values"])
            assert 0 <= example["qualifying_token_index"] < len(example["tokens"])
    told = json.loads((exported / "run_settings.json").read_text())
    assert {"model_id", "layer", "sae_set", "n_prompts_total", "n_tokens_in_prompt"} <= told.keys()


def test_the_pages_hold_what_the_index_holds(indexed: Path, exported: Path) -> None:
    """Against the firings themselves: the strongest in each context, and every activation around them."""
    index = FeatureIndex.open(indexed / "features.zarr")
    dense = np.zeros((D_SAE, index.n_contexts * index.seq_len), np.float32)
    for feature in range(D_SAE):
        rows, values = index.firings(feature)
        dense[feature, rows] = values
    kept = index.all_kept.reshape(-1)
    fired = 0
    for each in batch(exported)["features"]:
        acts = dense[each["feature_index"]]
        fired += bool(acts.any())
        assert each["frac_nonzero"] == pytest.approx((acts > 0).sum() / index.kept_tokens)
        assert sum(each["freq_hist_data_bar_heights"]) == (acts > 0).sum()
        top = [a for a in each["activations"] if a["bin_min"] == -1]
        by_context = np.sort(acts.reshape(index.n_contexts, -1).max(1))[::-1]
        assert [a["values"][a["qualifying_token_index"]] for a in top] == [v for v in by_context[:20].tolist() if v > 0]
        edges = np.linspace(0, acts.max(), 6)
        for example in each["activations"]:
            hit = example["values"][example["qualifying_token_index"]]
            assert max(0, example["bin_min"]) < hit <= example["bin_max"]
            if example["bin_min"] >= 0:
                inside = (acts > example["bin_min"]) & (acts <= example["bin_max"])
                assert example["bin_contains"] == pytest.approx(inside.sum() / index.kept_tokens)
                assert np.isclose(edges, example["bin_min"]).any()
        context = int(acts.argmax()) // index.seq_len
        if top and context == int(np.argmax(acts.reshape(index.n_contexts, -1).max(1))):
            span = slice(context * index.seq_len, (context + 1) * index.seq_len)  # a context fits into one example
            expected = acts[span][kept[span]]
            assert top[0]["values"] == expected.tolist()
    assert fired > D_SAE // 2


def test_our_reader_reads_back_the_same(indexed: Path, exported: Path, tmp_path: Path) -> None:
    index = FeatureIndex.open(indexed / "features.zarr")
    pages = {page.feature: page for page in dashboards.read(exported / "batch-0.json", "sae-dashboard")}
    for feature, page in pages.items():
        ids = index.panel("logits/top_id", feature).tolist()
        assert [token for token, _ in page.raises] == [index.token_bytes(i) for i in ids]
        assert [weight for _, weight in page.raises] == pytest.approx(index.panel("logits/top_value", feature).tolist())
        assert page.logits is not None
        assert page.logits.counts.tolist() == index.panel("logits/histogram", feature).tolist()
        low, high = index.panel("logits/range", feature).tolist()
        np.testing.assert_allclose(page.logits.edges[[0, -1]], [low, high], atol=1e-5)
        if page.texts:
            rows, values = index.firings(feature)
            strongest = int(rows[values == values.max()].min())
            assert page.texts[0].tokens[page.texts[0].hit] == index.token_bytes(int(index.tokens_of([strongest])[0]))
    again = pipeline.import_dump(exported, tmp_path / "again", format="sae-dashboard")
    assert FeatureIndex.open(again).d_sae == D_SAE


def test_the_same_examples_are_drawn_again(indexed: Path, exported: Path, tmp_path: Path) -> None:
    again = pipeline.export_pages(indexed, tmp_path / "again", features=[5, 2])
    features = {each["feature_index"]: each for each in batch(exported)["features"]}
    assert batch(again)["features"] == [features[5], features[2]]


def test_export_by_command(indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["export", str(indexed), "--format", "sae-dashboard", "--out", str(out), "--features", "0-2,7"]
    assert main(command) == 0
    assert [each["feature_index"] for each in batch(out)["features"]] == [0, 1, 2, 7]
    assert capsys.readouterr().out.strip() == str(out)
    assert main(["export", str(indexed), "--out", str(tmp_path / "a"), "--features", "1"]) == 2
    assert "feature pages" in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PipelineError, match="feature 24 does not exist"):
        pipeline.export_pages(indexed, tmp_path / "out", features=[0, 24])
    with pytest.raises(PipelineError, match="at least one feature"):
        pipeline.export_pages(indexed, tmp_path / "out", features=[])
    with pytest.raises(StoreError, match="no feature index here"):
        pipeline.export_pages(tmp_path, tmp_path / "out")
    pipeline.import_dump(dashboard(tmp_path / "dump"), tmp_path / "theirs", format="sae-dashboard")
    with pytest.raises(PipelineError, match="holds samples only"):
        pipeline.export_pages(tmp_path / "theirs", tmp_path / "out")

    def torn(*_: Any, **__: Any) -> dict[str, Any]:
        raise OSError("no space left on device")

    monkeypatch.setattr(sys.modules["sae.pipeline.pages"], "settings_json", torn)
    with pytest.raises(OSError, match="no space left"):
        pipeline.export_pages(indexed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
