"""A dictionary is measured with its own model under any name, and x̂ replaces x only at the hook point of x."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import HOOK_POINT, write_model

from browser import data, live
from sae import pipeline
from sae.cli import main
from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import load, save
from sae.lm import NativeModel
from sae.pipeline import resolve
from store.activations import ActivationStore

D_IN, D_SAE = 32, 24


def written(directory: Path, model: Path, store: Path, sae: SAE | None = None, **config: object) -> Path:
    known = {
        "hook_point": HOOK_POINT,
        "model": NativeModel(model, str(model)).identity(),
        "store": {"path": str(store)},
    }
    return save(sae or SAE(D_IN, D_SAE), directory, known | config)


TRANSCODERS: dict[str, Callable[[Path, Path, Path], Path]] = {
    "another place": lambda out, model, store: written(out, model, store, target_hook_point="blocks.0.hook_mlp_out"),
    "by recipe": lambda out, model, store: written(out, model, store, recipe="transcoder"),
    "skip": lambda out, model, store: written(out, model, store, SAE(D_IN, D_SAE, skip=True)),
    "another width": lambda out, model, store: written(out, model, store, SAE(D_IN, D_SAE, d_out=16, pre_bias=False)),
}


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_nothing_puts_a_transcoders_output_where_its_input_was(
    tmp_path: Path, tiny_model_dir: Path, tiny_store: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transcoder = TRANSCODERS[kind](tmp_path / "runs" / "t", tiny_model_dir, tiny_store)
    plain = written(tmp_path / "runs" / "plain", tiny_model_dir, tiny_store)
    assert load(transcoder).is_transcoder
    assert not load(plain).is_transcoder
    for verb in (lambda: pipeline.controls(transcoder),):
        with pytest.raises(pipeline.PipelineError, match="is a transcoder"):
            verb()
    nowhere = "holds .*; the dictionary predicts" if kind == "another place" else "has no target_hook_point"
    for verb in (
        lambda: pipeline.evaluate(transcoder),
        lambda: pipeline.index(transcoder),
        lambda: pipeline.compare(transcoder, plain),
    ):
        with pytest.raises(pipeline.PipelineError, match=nowhere):  # of y: not in the store, or not recorded
            verb()
    if kind != "another place":
        assert main(["steer", str(transcoder), "--edit", "0:ablate"]) != 0
        assert re.search("feature_stats|target_hook_point", capsys.readouterr().err)
    (entry,) = [entry for entry in data.scan(tmp_path / "runs") if entry.path == transcoder]
    with pytest.raises(live.LiveError, match="is a transcoder"):
        live.load(entry)
    assert {file.name for file in transcoder.iterdir()} == {"config.json", "sae.safetensors"}  # nothing half-written


def test_a_named_model_must_have_the_recorded_weights(tmp_path: Path, tiny_model_dir: Path, tiny_store: Path) -> None:
    ours = written(tmp_path / "ours", tiny_model_dir, tiny_store)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model_dir, moved)
    assert pipeline.open_pair(ours, str(moved))[1].id == str(moved)  # the same weights elsewhere
    other = write_model(tmp_path / "other", seed=1)
    hashes = [NativeModel(path, str(path)).weights_sha256[:12] for path in (tiny_model_dir, other)]
    said = f"trained on .*{hashes[0]}….*the model here is {other} .*{hashes[1]}…"
    for verb in (
        lambda: pipeline.open_pair(ours, str(other)),
        lambda: pipeline.evaluate(ours, model=str(other)),
        lambda: pipeline.evaluate(ours, model=NativeModel(other, str(other))),
        lambda: pipeline.index(ours, model=str(other)),
        lambda: pipeline.controls(ours, model=str(other)),
    ):
        with pytest.raises(pipeline.PipelineError, match=said):
            verb()
    shutil.rmtree(moved)
    shutil.copytree(other, moved)  # the recorded name, other weights
    config = load(ours).config
    renamed = save(load(ours), tmp_path / "renamed", config | {"model": config["model"] | {"id": str(moved)}})
    with pytest.raises(pipeline.PipelineError, match="it has changed, or is a different model"):
        pipeline.open_pair(renamed)


def test_end_to_end_continues_with_the_stores_model_or_not_at_all(tmp_path: Path, tiny_text: Path) -> None:
    model = write_model(tmp_path / "model")
    places = ["blocks.0.hook_resid_mid", HOOK_POINT]
    store = pipeline.harvest(
        NativeModel(model, str(model)),
        tiny_text,
        tmp_path / "acts.zarr",
        tokens=2048,
        heldout_tokens=256,
        hook_points=places,
    )

    def trained(name: str) -> SAE:
        small = {"batch_tokens": 64, "resample_shares": ()}
        return pipeline.train(
            store, tmp_path / name, recipe="end-to-end", d_sae=D_SAE, tokens=256, config=small, hook_point=HOOK_POINT
        )

    assert trained("ours").d_sae == D_SAE
    shutil.rmtree(model)
    write_model(model, seed=1)  # the recorded name, other weights: its logits would be learned from
    with pytest.raises(pipeline.PipelineError, match="it has changed"):
        trained("theirs")
    assert not (tmp_path / "theirs").exists()


def test_a_store_that_does_not_say_whose_activations_it_holds_is_refused(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ActivationStore.open(tiny_store)
    del store.provenance["model"]
    monkeypatch.setattr(ActivationStore, "open", lambda _: store)
    with pytest.raises(pipeline.PipelineError, match=r"acts\.zarr does not say which model its activations come from"):
        resolve.store_of(SAE(4, 8), None, tiny_store)
