"""Which store and which model a dictionary belongs to, and a refusal of any other."""

from __future__ import annotations

import os
from pathlib import Path

from sae.lm import LanguageModel, load_model
from sae.model import SAE, load, refuse_transcoder
from store.activations import ActivationStore

X_HAT_FOR_X = "evaluation, index, controls, comparison and steering"  # what puts x̂ in the place of x


class PipelineError(ValueError):
    """The pieces given do not belong together, or there is no room for the work."""


def opened(sae: SAE | str | Path) -> tuple[SAE, Path | None]:
    return (sae, None) if isinstance(sae, SAE) else (load(sae), Path(sae))


def store_of(sae: SAE, directory: Path | None, asked: str | Path | None) -> ActivationStore:
    refuse_transcoder(sae, X_HAT_FOR_X, PipelineError)
    if asked is None:
        held = sae.config.get("store", {}).get("path")
        if held is None or directory is None:
            raise PipelineError("this dictionary does not say which store it was trained on; name one (--acts).")
        asked = Path(os.path.normpath(directory / held))
    store = ActivationStore.open(asked)
    ours, theirs = sae.config.get("model", {}), _model_in(store)
    if ours.get("sha256", theirs["sha256"]) != theirs["sha256"]:  # an imported dictionary may not know it
        raise PipelineError(
            f"{store.path} holds activations of {theirs['id']} (weights {theirs['sha256'][:12]}…), the dictionary was "
            f"trained on {ours['id']} ({ours['sha256'][:12]}…). Harvest that model's activations first."
        )
    hook_point = sae.config.get("hook_point") or "an unnamed place"
    if store.hook_points.get(hook_point) != sae.d_in:
        held = ", ".join(f"{name} ({width} wide)" for name, width in store.hook_points.items())
        raise PipelineError(f"{store.path} holds {held}; the dictionary reads {hook_point} ({sae.d_in} wide).")
    return store


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

    Raises: PipelineError for a transcoder, and for a model with other weights: their effects are not the dictionary's.
    """
    refuse_transcoder(sae, X_HAT_FOR_X, PipelineError)
    lm = asked if isinstance(asked, LanguageModel) else _named_model(sae, asked, device)
    ours = sae.config.get("model", {})
    if lm.weights_sha256 != ours.get("sha256", lm.weights_sha256):
        raise PipelineError(
            f"the dictionary was trained on {ours.get('id')} (weights {ours['sha256'][:12]}…), the model here is "
            f"{lm.id} (weights {lm.weights_sha256[:12]}…): it has changed, or is another. Name where the right one is "
            "(--model)."
        )
    theirs = _model_in(store) if store else {}
    if store and "sha256" not in ours and lm.weights_sha256 != theirs["sha256"]:
        raise PipelineError(
            f"{store.path} holds activations of {theirs['id']} (weights {theirs['sha256'][:12]}…), the model named is "
            f"{lm.id} ({lm.weights_sha256[:12]}…). Name the store's (--model)."
        )
    return lm


def _named_model(sae: SAE, asked: str | None, device: str) -> LanguageModel:
    ours = sae.config.get("model", {})
    if asked is None and "id" not in ours:
        raise PipelineError("this dictionary does not say which model it belongs to; name one (--model).")
    return load_model(asked or ours["id"], device=device)


def open_pair(directory: str | Path, model: str | None = None) -> tuple[SAE, LanguageModel]:
    """A dictionary and the model it belongs to."""
    dictionary = load(directory)
    return dictionary, model_of(dictionary, model)
