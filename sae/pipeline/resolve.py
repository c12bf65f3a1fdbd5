"""Which store and which model a dictionary belongs to, and a refusal of any other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sae.dictionary.autoencoder import SAE, refuse_transcoder
from sae.dictionary.files import load
from sae.kernels import device_named
from sae.lm import LanguageModel, load_model
from sae.pipeline.errors import PipelineError
from store.activations import ActivationStore
from store.common import same_model

X_HAT_FOR_X = "controls, comparison and steering"  # what takes x̂ to stand where x was read


def opened(sae: SAE | str | Path) -> tuple[SAE, Path | None]:
    return (sae, None) if isinstance(sae, SAE) else (load(sae), Path(sae))


def autoencoder(directory: str | Path) -> SAE:
    """A dictionary whose x̂ stands where x was read. Raises: PipelineError for a transcoder."""
    sae = load(directory)
    refuse_transcoder(sae, X_HAT_FOR_X, PipelineError)
    return sae


def output_hook_point(sae: SAE) -> str:
    """Where x̂ belongs: where x was read, or where a transcoder's y is. Raises: PipelineError when it does not say."""
    key = "target_hook_point" if sae.is_transcoder else "hook_point"
    if key not in sae.config:
        raise PipelineError(f"this dictionary does not say where its output belongs: its config.json has no {key}.")
    return sae.config[key]


def store_of(sae: SAE, directory: Path | None, asked: str | Path | None) -> ActivationStore:
    """The store it was trained on, or the one asked for, of the same model.

    Raises: PipelineError for another model's, or one that lacks a place that the dictionary reads or predicts.
    """
    if asked is None:
        held = sae.config.get("store", {}).get("path")
        if "live" in sae.config:
            raise PipelineError(
                "this dictionary was trained live, without a store, and this needs one. Make it:\n"
                f"  {_harvest_for(sae.config, directory)}\nand name it (--acts). Its held-out documents are new to the "
                "dictionary, which was trained on no held-out document."
            )
        if held is None or directory is None:
            raise PipelineError("this dictionary does not say which store it was trained on; name one (--acts).")
        asked = Path(os.path.normpath(directory / held))
    store = ActivationStore.open(asked)
    ours, theirs = sae.config.get("model", {}), _model_in(store)
    if "sha256" in ours and not same_model(ours, theirs):  # an imported dictionary may not know it
        raise PipelineError(
            f"{store.path} holds activations of {theirs['id']} (weights {theirs['sha256'][:12]}…), the dictionary was "
            f"trained on {ours['id']} ({ours['sha256'][:12]}…). Harvest that model's activations first."
        )
    places = [("reads", sae.config.get("hook_point") or "an unnamed place", sae.d_in)]
    if sae.is_transcoder:
        places.append(("predicts", output_hook_point(sae), sae.d_out))
    for does, hook_point, width in places:
        if store.hook_points.get(hook_point) != width:
            held = ", ".join(f"{name} ({width} wide)" for name, width in store.hook_points.items())
            raise PipelineError(f"{store.path} holds {held}; the dictionary {does} {hook_point} ({width} wide).")
    return store


def _harvest_for(config: dict[str, Any], directory: Path | None) -> str:
    """The command that makes a store for a dictionary trained live."""
    text = " ".join(f"--text {spec}" for spec in config["live"]["text_specs"])
    out = (directory.parent if directory else Path()) / "acts.zarr"
    return f"sae harvest --model {config['model']['id']} {text} --hook-point {config['hook_point']} --out {out}"


def _model_in(store: ActivationStore) -> dict[str, str]:
    """What the store says of the model whose activations it holds."""
    found = store.provenance.get("model")
    if not found:
        raise PipelineError(f"{store.path} does not say whose activations it holds. Harvest it with `sae harvest`.")
    return found


def model_of(
    sae: SAE, asked: LanguageModel | str | None, store: ActivationStore | None = None, *, device: str = "cpu"
) -> LanguageModel:
    """The dictionary's model, by its recorded name or where `asked` says it is now; without a known hash, the store's.

    Raises: PipelineError for a model with other weights: their effects are not the dictionary's.
    """
    lm = asked if isinstance(asked, LanguageModel) else _named_model(sae, asked, str(device_named(device)))
    ours = sae.config.get("model", {})
    if "sha256" in ours and not same_model(ours, lm.identity()):
        raise PipelineError(
            f"the dictionary was trained on {ours.get('id')} (weights {ours['sha256'][:12]}…), the model here is "
            f"{lm.id} (weights {lm.weights_sha256[:12]}…): it has changed, or is another. Name where the right one is "
            "(--model)."
        )
    if store and "sha256" not in ours:
        require_model_of(store, lm)
    return lm


def require_model_of(store: ActivationStore, lm: LanguageModel) -> None:
    """Raises: PipelineError unless `lm` is the model whose activations the store holds."""
    theirs = _model_in(store)
    if not same_model(theirs, lm.identity()):
        raise PipelineError(
            f"{store.path} holds activations of {theirs['id']} (weights {theirs['sha256'][:12]}…), the model named is "
            f"{lm.id} ({lm.weights_sha256[:12]}…). Name the store's (--model)."
        )


def model_in(store: ActivationStore) -> LanguageModel:
    """The model whose activations a store holds. Raises: PipelineError when that name now has other weights."""
    held = _model_in(store)
    lm = load_model(held["id"])
    if not same_model(held, lm.identity()):
        raise PipelineError(
            f"{store.path} holds activations of {held['id']} with weights {held['sha256'][:12]}…, the model of that "
            f"name here has {lm.weights_sha256[:12]}…: it has changed. Put the right one there, or harvest again."
        )
    return lm


def _named_model(sae: SAE, asked: str | None, device: str) -> LanguageModel:
    ours = sae.config.get("model", {})
    if asked is None and "id" not in ours:
        raise PipelineError("this dictionary does not say which model it belongs to; name one (--model).")
    return load_model(asked or ours["id"], device=device)


def open_pair(directory: str | Path, model: str | None = None) -> tuple[SAE, LanguageModel]:
    """An autoencoder and the model it belongs to."""
    dictionary = autoencoder(directory)
    return dictionary, model_of(dictionary, model)
