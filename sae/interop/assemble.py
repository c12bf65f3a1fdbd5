"""A dictionary made of what a peer's files hold: settings and tensors checked, taken over, and described."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.interop.files import InteropError

OURS = "monosem"  # the key under which our own config.json travels in a peer's file
NOT_CARRIED = ("kind", "format", "store", "imported")

# --- settings --------------------------------------------------------------------------------------------------------


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object within a configuration; an empty one where there is none."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def text(config: Mapping[str, Any], *names: str) -> str | None:
    """The first of these settings that is a non-empty string."""
    return next((config[name] for name in names if isinstance(config.get(name), str) and config[name]), None)


def whole(config: Mapping[str, Any], name: str, where: Path) -> int:
    """A setting that must be a positive whole number. Raises: InteropError."""
    found = config.get(name)
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise InteropError(f"{where}: {name} must be a positive whole number; got {found!r}.")
    return found


def refuse_unless(holds: bool, where: Path, reason: str) -> None:
    """Raises: InteropError saying why this dictionary cannot be ours."""
    if not holds:
        raise InteropError(f"{where} cannot be imported: {reason}")


def refuse_export_unless(holds: bool, peer: str, reason: str) -> None:
    """Raises: InteropError saying why this dictionary cannot be the peer's."""
    if not holds:
        raise InteropError(f"it cannot be exported as {peer}: {reason}")


def carried(sae: SAE) -> dict[str, Any]:
    """Our own config.json as it travels in a peer's file, so that nothing is lost on the way back."""
    return {name: value for name, value in sae.config.items() if name not in NOT_CARRIED}


# --- tensors ---------------------------------------------------------------------------------------------------------


def pick(tensors: Mapping[str, Any], names: Mapping[str, str], where: Path, ignored: Collection[str] = ()) -> dict:
    """These tensors under our names, as float32.

    Raises: InteropError for one that is missing, no finite numbers, or in the file and not asked for.
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
    """Turns these matrices over, in place. Raises: InteropError for one that is no matrix."""
    for name in names:
        _refuse_unless_matrix(tensors[name], name, where)
        tensors[name] = tensors[name].t()


def _refuse_unless_matrix(tensor: Tensor, name: str, where: Path) -> None:
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise InteropError(f"{where}: {name} must be a matrix; got the shape {tuple(tensor.shape)}.")


def rescale(tensors: dict[str, Tensor], factors: Mapping[str, Tensor | float]) -> None:
    """Multiplies those of these tensors that are there by their factors, in float64."""
    for name, factor in factors.items():
        if name in tensors:
            tensors[name] = (tensors[name].double() * factor).float()


def shape_of(tensors: Mapping[str, Tensor], where: Path) -> dict[str, int]:
    """d_in, d_sae and d_out as W_enc and W_dec have them. Raises: InteropError when they are no matrices."""
    for name in ("W_enc", "W_dec"):
        _refuse_unless_matrix(tensors[name], name, where)
    d_in, d_sae = tensors["W_enc"].shape
    return {"d_in": d_in, "d_sae": d_sae, "d_out": tensors["W_dec"].shape[1]}


def agree(config: Mapping[str, Any], said: Mapping[str, int], where: Path) -> None:
    """Raises: InteropError when a size in the configuration is not the tensors' own."""
    for name, size in said.items():
        if config.get(name) not in (None, size):
            raise InteropError(f"{where}: {name} = {config[name]!r} in the configuration, {size} in the tensors.")


def assemble(
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
    """A dictionary of these tensors; `settings` are the constructor's, `config` the peer's own configuration.

    Raises: InteropError when the tensors do not fit each other or the settings.
    """
    shape = shape_of(tensors, where)
    refuse_unless(
        shape["d_out"] == shape["d_in"],
        where,
        f"it reads {shape['d_in']} values and writes {shape['d_out']}: a transcoder, not a dictionary of one place.",
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


def restore(sae: SAE, ours: Mapping[str, Any]) -> SAE:
    """Puts back what `carried` put into the peer's file, where it does not contradict the file itself."""
    if not ours:
        return sae
    known = {name: value for name, value in ours.items() if name not in NOT_CARRIED}
    model = section(known, "model")
    if model.get("id") != sae.config["model"].get("id"):
        known.pop("model", None)
    if "hook_point" in known and sae.config["hook_point"] is not None:
        known["hook_point"] = sae.config["hook_point"]
    sae.config = {**sae.config, **known}
    return sae
