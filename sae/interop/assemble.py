"""What all peers' readers share: checks of settings and tensors, and the dictionary that is made of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.interop.files import InteropError

OWN_CONFIG = "monosem"  # the key under which our own config.json travels in a peer's file
NOT_EXPORTED = ("kind", "format", "store", "imported")

# --- settings --------------------------------------------------------------------------------------------------------


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object within a configuration; an empty one if it is missing."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def first_text(config: Mapping[str, Any], *names: str) -> str | None:
    """The first of these settings that is a non-empty string."""
    return next((config[name] for name in names if isinstance(config.get(name), str) and config[name]), None)


def positive_int(config: Mapping[str, Any], name: str, where: Path) -> int:
    """A setting that must be a positive whole number. Raises: InteropError."""
    found = config.get(name)
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise InteropError(f"{where}: {name} must be a positive whole number; got {found!r}.")
    return found


def require(condition: bool, where: Path, reason: str) -> None:
    """Raises: InteropError saying why a dictionary cannot be imported, unless the condition holds."""
    if not condition:
        raise InteropError(f"{where} cannot be imported: {reason}")


def require_exportable(condition: bool, peer: str, reason: str) -> None:
    """Raises: InteropError saying why a dictionary cannot be exported, unless the condition holds."""
    if not condition:
        raise InteropError(f"this dictionary cannot be exported as {peer}: {reason}")


def own_config(sae: SAE) -> dict[str, Any]:
    """Our own config.json as it travels in a peer's file, so that a later import restores it."""
    return {name: value for name, value in sae.config.items() if name not in NOT_EXPORTED}


# --- tensors ---------------------------------------------------------------------------------------------------------


def take_tensors(
    tensors: Mapping[str, Any], names: Mapping[str, str], where: Path, ignored: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors of a file under our names (`names`: ours → the peer's), as float32.

    Raises: InteropError for a tensor that is missing, holds anything but finite numbers, or is neither in `names` nor
    `ignored`: an unknown tensor may change what the dictionary computes.
    """
    missing = sorted(set(names.values()) - tensors.keys())
    unknown = sorted(set(map(str, tensors.keys())) - set(names.values()) - set(ignored))
    if missing or unknown:
        problem = f"it lacks {', '.join(missing)}" if missing else f"it also holds {', '.join(unknown[:8])}"
        expected = ", ".join(sorted(names.values()))
        raise InteropError(f"{where} does not hold what its configuration says: {problem}. Expected {expected}.")
    found: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        tensor = tensors[theirs]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise InteropError(f"{where}: {theirs} must be a tensor of floating-point numbers.")
        found[ours] = tensor.float()
        if not torch.isfinite(found[ours]).all():
            raise InteropError(f"{where}: {theirs} holds NaN or infinite numbers; the file is damaged or diverged.")
    return found


def transpose(tensors: dict[str, Tensor], names: Collection[str], where: Path) -> None:
    """Transposes these tensors, in place. Raises: InteropError for one that is not a matrix."""
    for name in names:
        _require_matrix(tensors[name], name, where)
        tensors[name] = tensors[name].t()


def _require_matrix(tensor: Tensor, name: str, where: Path) -> None:
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise InteropError(f"{where}: {name} must be a matrix; got shape {tuple(tensor.shape)}.")


def rescale(tensors: dict[str, Tensor], factors: Mapping[str, Tensor | float]) -> None:
    """Multiplies tensors by their factors in float64, in place; a missing tensor is skipped."""
    for name, factor in factors.items():
        if name in tensors:
            tensors[name] = (tensors[name].double() * factor).float()


def shift_encoder(tensors: dict[str, Tensor], shift: Tensor) -> None:
    """Adds `shift` [d_sae] to what the encoder's weights give, in float64, in place: to every bias after them."""
    tensors["b_enc"] = (tensors["b_enc"].double() + shift).float()
    if "b_mag" in tensors:  # a gated dictionary scales its shared encoder by exp(r_mag) in the second path
        tensors["b_mag"] = (tensors["b_mag"].double() + tensors["r_mag"].double().exp() * shift).float()


def shape_of(tensors: Mapping[str, Tensor], where: Path) -> dict[str, int]:
    """d_in, d_sae and d_out, from W_enc and W_dec. Raises: InteropError unless all tensors have shapes that fit."""
    for name in ("W_enc", "W_dec"):
        _require_matrix(tensors[name], name, where)
    d_in, d_sae = tensors["W_enc"].shape
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(tensors, (d_sae,))
    expected |= {"W_enc": (d_in, d_sae), "W_dec": (d_sae, *tensors["W_dec"].shape[1:])}
    expected |= {"b_dec": tuple(tensors["W_dec"].shape[1:])} if "b_dec" in tensors else {}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.ndim or name != "threshold"}
    if wrong := {name: shape for name, shape in found.items() if shape != expected[name]}:
        name, shape = next(iter(wrong.items()))
        raise InteropError(
            f"{where}: the tensors do not fit each other: W_enc is {(d_in, d_sae)}, so {name} must be "
            f"{expected[name]}; got {shape}."
        )
    return {"d_in": d_in, "d_sae": d_sae, "d_out": tensors["W_dec"].shape[1]}


def require_sizes(config: Mapping[str, Any], sizes: Mapping[str, int], where: Path) -> None:
    """Raises: InteropError when a size in the configuration differs from the tensors' (`sizes`)."""
    for name, size in sizes.items():
        if config.get(name) not in (None, size):
            raise InteropError(f"{where}: {name} is {config[name]!r} in the configuration but {size} in the tensors.")


def dictionary(
    where: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    peer: str,
    kind: str,
    hook_point: str | None,
    model: str | None,
    config: Mapping[str, Any],
    notes: Collection[str] = (),
) -> SAE:
    """A dictionary of these tensors. `settings` are arguments of `SAE`, `config` is the peer's own configuration.

    Raises: InteropError when the tensors do not fit each other or the settings.
    """
    shape = shape_of(tensors, where)
    require(
        shape["d_out"] == shape["d_in"],
        where,
        f"it is a transcoder: it reads {shape['d_in']} values and writes {shape['d_out']}.",
    )
    try:
        sae = SAE(**{**shape, **settings})
    except ValueError as error:
        raise InteropError(f"{where} cannot be imported: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in sae.tensors().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise InteropError(f"{where}: the tensors do not fit each other: expected {expected}, got {found}.")
    for name, tensor in sae.tensors().items():
        tensor.copy_(tensors[name])
    sae.config = {
        "recipe": f"{peer}:{kind}",
        "hook_point": hook_point,
        "model": {} if model is None else {"id": model},
        "imported": {"format": peer, "kind": kind, "notes": list(notes), "config": dict(config)},
    }
    return sae.eval().requires_grad_(False)


def restore_own_config(sae: SAE, ours: Mapping[str, Any]) -> SAE:
    """Puts back what `own_config` put into the peer's file, except where it contradicts the file itself."""
    if not ours:
        return sae
    known = {name: value for name, value in ours.items() if name not in NOT_EXPORTED}
    model = section(known, "model")
    if model.get("id") != sae.config["model"].get("id"):
        known.pop("model", None)
    if "hook_point" in known and sae.config["hook_point"] is not None:
        known["hook_point"] = sae.config["hook_point"]
    sae.config = {**sae.config, **known}
    return sae
