"""Find the store and the model that a dictionary belongs to, and refuse any other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sae.dictionary.autoencoder import SAE, refuse_transcoder
from sae.dictionary.files import load
from sae.dictionary.sites import refuse_crosscoder
from sae.dictionary.trained_rows import trained_with_context_bos
from sae.jobs.progress import progress
from sae.kernels import device_named
from sae.lm import LanguageModel, load_model
from sae.pipeline.errors import PipelineError
from store.activation_reader import ActivationReader
from store.activations import ActivationStore
from store.common import can_run, contexts_begin_with_bos, same_model
from store.filtered import filtered

X_HAT_FOR_X = "controls"  # they put x̂ in the place of x


def model_device(name: str = "auto") -> str:
    """The device for a language model: `auto` is a CUDA device if there is one, else the CPU.

    Raises: PipelineError for a device that this machine does not have.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available.get(name):
        here = ", ".join(device for device in available if available[device])
        raise PipelineError(f"--device {name}: not available on this machine; choose auto, {here}.")
    return name


def opened(sae: SAE | str | Path) -> tuple[SAE, Path | None]:
    """A dictionary, and its directory if it was given by that."""
    return (sae, None) if isinstance(sae, SAE) else (_load(sae), Path(sae))


def autoencoder(directory: str | Path) -> SAE:
    """A dictionary that reconstructs its own input. Raises: PipelineError for a transcoder or a crosscoder."""
    sae = _load(directory)
    refuse_crosscoder(sae, X_HAT_FOR_X, PipelineError)
    refuse_transcoder(sae, X_HAT_FOR_X, PipelineError)
    return sae


def _load(directory: str | Path) -> SAE:
    if not Path(directory).exists():
        raise PipelineError(
            f"{directory} is not a dictionary: there is no such directory. `sae train` makes one; `sae info DIR` lists "
            "what a directory holds."
        )
    return load(directory)


def output_hook_point(sae: SAE) -> str:
    """The hook point of x̂: that of x, or a transcoder's target.

    Raises: PipelineError when it is not recorded, or there are several (a crosscoder).
    """
    refuse_crosscoder(sae, "here", PipelineError)
    key = "target_hook_point" if sae.is_transcoder else "hook_point"
    if key not in sae.config:
        raise PipelineError(
            f"the hook point of this dictionary's output is not recorded: its config.json has no {key}."
        )
    return str(sae.config[key])


def store_of(sae: SAE, directory: Path | None, asked: str | Path | None) -> ActivationReader:
    """The store a dictionary was trained on, or the one asked for, which must hold activations of the same model.

    Rows that the dictionary's row filter leaves out are not kept in it.
    Raises: PipelineError for another model's store, or one without a hook point that the dictionary reads or predicts,
    and for a crosscoder.
    """
    refuse_crosscoder(sae, str(directory or "this command"), PipelineError)
    if asked is None:
        held = sae.config.get("store", {}).get("path")
        if "live" in sae.config:
            raise PipelineError(
                "this command needs an activation store, and this dictionary was trained live, without one. Make one:\n"
                f"  {_harvest_for(sae.config, directory)}\nand name it with --acts. The dictionary was trained on none "
                "of its held-out documents."
            )
        if held is None or directory is None:
            raise PipelineError("this dictionary does not say which store it was trained on; name one with --acts.")
        asked = recorded_store(directory, held)
    store = ActivationStore.open(asked)
    ours, theirs = sae.config.get("model", {}), _model_in(store)
    unlike = not can_run(ours) and ours != theirs  # activations that came as arrays: the name is all there is
    if unlike or ("sha256" in ours and not same_model(ours, theirs)):  # an imported dictionary may have no hash
        raise PipelineError(
            f"{store.path} holds activations of {_named(theirs)}, the dictionary was trained on {_named(ours)}. "
            "Harvest that model's activations first."
        )
    places = [("reads", sae.config.get("hook_point") or "an unnamed hook point", sae.d_in)]
    if sae.is_transcoder:
        places.append(("predicts", output_hook_point(sae), sae.d_out))
    for does, hook_point, width in places:
        if store.hook_points.get(hook_point) != width:
            held = ", ".join(f"{name} ({width} wide)" for name, width in store.hook_points.items())
            raise PipelineError(f"{store.path} holds {held}; the dictionary {does} {hook_point} ({width} wide).")
    _warn_of_other_contexts(sae, store)
    return filtered(
        store, sae.config.get("row_filter"), dict.fromkeys(hook for _, hook, _ in places), row_filter_progress
    )


def recorded_store(directory: Path, held: str) -> Path:
    """Where the store lies that a dictionary's directory records relative to itself, or to what it is a link to."""
    path = Path(os.path.normpath(directory / held))
    if path.exists():
        return path
    linked = Path(os.path.normpath(directory.resolve() / held))
    return linked if linked.exists() else path


def _warn_of_other_contexts(sae: SAE, store: ActivationReader) -> None:
    """Warns if the store's contexts begin otherwise than those that the dictionary was trained on."""
    trained, here = trained_with_context_bos(sae.config), contexts_begin_with_bos(store.provenance)
    if trained is not None and trained != here:
        begin = {True: "begin with BOS", False: "begin anywhere in the text"}
        warnings.warn(
            f"the contexts of {store.path} {begin[here]}, those that the dictionary was trained on {begin[trained]}: "
            "figures are not comparable where the first position is a sink. Harvest a store with "
            f"--{'' if trained else 'no-'}context-bos.",
            stacklevel=2,
        )


def row_filter_progress(shards: Collection[int]) -> Iterator[int]:
    """The shards that a row filter reads, with a progress bar."""
    with progress("row filter", len(shards), "shard") as bar:
        for shard in shards:
            yield shard
            bar.update(1)


def _harvest_for(config: dict[str, Any], directory: Path | None) -> str:
    """The command that makes a store for a dictionary trained live."""
    live = config["live"]
    text = " ".join(f"--text {spec}" for spec in live["text_specs"])
    text += f" --text-column {live['text_column']}" if "text_column" in live else ""
    text += " --special-tokens" if live.get("special_tokens", {}).get("in_text") else ""
    out = (directory.parent if directory else Path()) / "acts.zarr"
    bos = contexts_begin_with_bos(config["live"])
    usual = config["model"].get("kind") != "native-transformer"
    rule = "" if bos == usual else f" --{'' if bos else 'no-'}context-bos"
    return f"sae harvest --model {config['model']['id']} {text} --hook-point {config['hook_point']}{rule} --out {out}"


def _model_in(store: ActivationReader) -> dict[str, str]:
    """The identity of a store's model, as the store records it."""
    found: dict[str, str] = store.provenance.get("model", {})
    if not found:
        raise PipelineError(
            f"{store.path} does not say which model its activations come from. Make a store with `sae harvest`."
        )
    return found


def model_with(
    sae: SAE, asked: LanguageModel | str | None, store: ActivationReader, *, device: str = "cpu"
) -> LanguageModel | None:
    """`model_of`; None where the store's activations came as arrays, so that no model can be run.

    Raises: PipelineError also for a model that is asked for in that case.
    """
    if can_run(_model_in(store)):
        return model_of(sae, asked, store, device=device)
    if asked is not None:
        raise PipelineError(
            f"{store.path} holds activations that came as arrays, so nothing ties them to a model that could be run. "
            "Leave --model out: what needs a model is then left out, too."
        )
    return None


def model_of(
    sae: SAE, asked: LanguageModel | str | None, store: ActivationReader | None = None, *, device: str = "cpu"
) -> LanguageModel:
    """The dictionary's model, by its recorded name, or by the name or as the model asked for.

    Its weights must have the recorded hash; without a recorded one it must be the store's model.
    Raises: PipelineError for a model with other weights, and for a crosscoder, which may have several.
    """
    refuse_crosscoder(sae, "with one model", PipelineError)
    lm = asked if isinstance(asked, LanguageModel) else _named_model(sae, asked, str(device_named(device)))
    ours = sae.config.get("model", {})
    if "sha256" in ours and not same_model(ours, lm.identity()):
        raise PipelineError(
            f"the dictionary was trained on {_named(ours)}, the model here is {_named(lm.identity())}: it has changed, "
            "or is a different model. Name the right one with --model."
        )
    if store and "sha256" not in ours:
        require_model_of(store, lm)
    return lm


def require_model_of(store: ActivationReader, lm: LanguageModel) -> None:
    """Raises: PipelineError unless `lm` is the store's model."""
    theirs = _model_in(store)
    if not same_model(theirs, lm.identity()):
        raise PipelineError(
            f"{store.path} holds activations of {_named(theirs)}, the model named is {_named(lm.identity())}. Name the "
            "store's model with --model."
        )


def model_in(store: ActivationReader, device: str = "cpu") -> LanguageModel:
    """Loads a store's model. Raises: PipelineError if the model of that name now has other weights."""
    held = _model_in(store)
    if not can_run(held):
        raise PipelineError(f"{store.path} holds activations that came as arrays; this recipe has to run their model.")
    lm = load_model(held["id"], device=device, weights_sha256=held.get("sha256"))
    if not same_model(held, lm.identity()):
        raise PipelineError(
            f"{store.path} holds activations of {_named(held)}, the model of that name is {_named(lm.identity())}: "
            "it has changed. Put the right one there, or harvest again."
        )
    return lm


def _named(model: Mapping[str, Any]) -> str:
    """A model's recorded identity, for a message."""
    sha256 = model.get("sha256")
    return f"{model.get('id')} (weights {sha256[:12]}…)" if sha256 else f"{model.get('id')} (as arrays)"


def _named_model(sae: SAE, asked: str | None, device: str) -> LanguageModel:
    ours = sae.config.get("model", {})
    if asked is None and "id" not in ours:
        raise PipelineError("this dictionary does not say which model it belongs to; name one with --model.")
    if asked is None and not can_run(ours):
        raise PipelineError(
            "this dictionary was trained on activations that came as arrays (sae harvest --from), without a model that "
            "can be run here. Training, eval, index, browse and export work without one."
        )
    return load_model(asked or ours["id"], device=device, weights_sha256=None if asked else ours.get("sha256"))


def open_pair(directory: str | Path, model: str | None = None, *, device: str = "auto") -> tuple[SAE, LanguageModel]:
    """A dictionary and the model it belongs to, both on `device`."""
    dictionary = _load(directory)
    lm = model_of(dictionary, model, device=device)
    return dictionary.to(lm.device), lm
