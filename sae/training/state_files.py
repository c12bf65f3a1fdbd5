"""The saved state of a run on disk, for any number of ranks: whoever wrote it, any mesh reads its own features of it.

Without shards it is one file, `state.safetensors`. With shards each rank writes its own features:

    state/<step>/features-<first>.safetensors   at most BLOCK features from <first> on: one row per feature
    state/<step>/whole.safetensors              what all ranks hold alike (b_dec, W_skip and their moments)
    state.json                                  the step and header, and size and SHA-256 of each file

`state.json` is written last, by one rename: files that it does not name do not count. If both forms are there, because
a run was killed after a change of its mesh, the later step counts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.dictionary.autoencoder import WHOLE
from sae.jobs.checkpoint import CheckpointError, read_header, write_tensors
from sae.parallel.mesh import Mesh
from store.common import fsync, write_json

STATE = "state.safetensors"
INDEX, PARTS = "state.json", "state"
FORMAT = 1
BLOCK = 16_384  # features in a file


def saved_header(out: Path) -> dict[str, Any]:
    """The header of the state that counts; {} if there is none. Raises: CheckpointError if it is damaged."""
    single, index = read_header(out / STATE), _index(out)
    return single if single.get("step", -1) >= index.get("step", -1) else index["header"]


def read_state(out: Path, mesh: Mesh, d_sae: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors of this rank's features, and the header; None without a saved state.

    Raises: CheckpointError naming a file that is missing or damaged.
    """
    header = saved_header(out)
    if not header:
        return None
    own = mesh.features(d_sae)
    index = _index(out)
    if index.get("header") != header:
        return _own_part(out / STATE, range(d_sae), own, rows_first=False), header
    home, parts = out / PARTS / _name(index["step"]), []
    for name, (n_bytes, sha256) in index["files"].items():
        held = _features_of(name, index)
        if held is None or (held.start < own.stop and own.start < held.stop):
            _check(home / name, n_bytes, sha256)
            parts.append(_own_part(home / name, held or own, own, rows_first=True))
    names = sorted({name for part in parts for name in part})
    tensors = {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
    return {name: tensor.t() if _is_encoder(name) else tensor for name, tensor in tensors.items()}, header


def write_state(
    out: Path, mesh: Mesh, tensors: dict[str, Tensor], header: dict[str, Any], d_sae: int, *, keep: int = 1
) -> None:
    """Saves the state, whole or not at all, and keeps `keep` − 1 earlier ones. All ranks call it together.

    Raises: OSError or ValueError on every rank if one of them could not write; the state before stays.
    """
    if mesh.shards == 1:
        _together(mesh, lambda: _write_single(out, tensors, header, keep) if mesh.is_first else {})
        return
    step = header["step"]
    if mesh.tell(_index(out).get("step") == step if mesh.is_first else False):
        return  # saved already; other ranks may have cut the same features into other files
    files = _together(mesh, lambda: _write_parts(out, mesh, tensors, header, d_sae))
    if mesh.is_first:
        index = {"kind": "training-state", "format": FORMAT, "step": step, "d_sae": d_sae, "header": header}
        index["files"] = dict(sorted(files.items()))
        index["first"] = {name: _first_of(name) for name in files if _first_of(name) is not None}
        write_json(out / PARTS / _name(step) / INDEX, index)
        write_json(out / INDEX, index)
        (out / STATE).unlink(missing_ok=True)
        _delete_all_but(out / PARTS, step, keep)
    mesh.agree(False)  # nobody begins the next save before this one counts


def _write_single(out: Path, tensors: dict[str, Tensor], header: dict[str, Any], keep: int) -> dict[str, list[Any]]:
    if keep > 1:
        _keep_earlier_states(out, keep - 1)
    write_tensors(out / STATE, tensors, header)
    if (out / INDEX).exists():
        (out / INDEX).unlink()
        shutil.rmtree(out / PARTS, ignore_errors=True)
    return {}


def _keep_earlier_states(out: Path, keep: int) -> None:
    """Links the present state to state-<step>.safetensors, and deletes all but the newest `keep` of those."""
    if (out / STATE).exists():
        earlier = out / f"state-{read_header(out / STATE)['step']:09d}.safetensors"
        if not earlier.exists():
            os.link(out / STATE, earlier)
    for old in sorted(out.glob("state-*.safetensors"))[:-keep]:
        old.unlink()


def _write_parts(
    out: Path, mesh: Mesh, tensors: dict[str, Tensor], header: dict[str, Any], d_sae: int
) -> dict[str, list[Any]]:
    """The files of this rank, and the size and SHA-256 of each: only one row group writes."""
    home, own, written = out / PARTS / _name(header["step"]), mesh.features(d_sae), []
    home.mkdir(parents=True, exist_ok=True)
    by_feature = {name: t.t() if _is_encoder(name) else t for name, t in tensors.items() if not _is_whole(name)}
    cuts = [own.start, *range(own.start // BLOCK * BLOCK + BLOCK, own.stop, BLOCK), own.stop]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        if mesh.row_group == 0 and start < stop:
            rows = {name: t[start - own.start : stop - own.start] for name, t in by_feature.items()}
            written.append(home / f"features-{start:010d}.safetensors")
            write_tensors(written[-1], rows, {"first": start, "stop": stop})
    if mesh.is_first:
        written.append(home / "whole.safetensors")
        write_tensors(written[-1], {name: t for name, t in tensors.items() if _is_whole(name)}, header)
    fsync(home)
    return {path.name: [path.stat().st_size, _sha256(path)] for path in written}


def _delete_all_but(parts: Path, step: int, keep: int) -> None:
    """Keeps this step and the `keep` − 1 before it; deletes older ones, and what a killed run left of later ones."""
    earlier = sorted(home.name for home in parts.iterdir() if (home / INDEX).exists() and home.name < _name(step))
    kept = {_name(step), *(earlier[-(keep - 1) :] if keep > 1 else [])}
    for home in parts.iterdir():
        if home.name not in kept:
            shutil.rmtree(home)


def _together(mesh: Mesh, write: Callable[[], dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """What all ranks wrote. Raises: on every rank the error of the one that could not write."""
    files: dict[str, list[Any]] = {}
    failed: Exception | None = None
    try:
        files = write()
    except (OSError, ValueError) as error:
        failed = error
    if mesh.world == 1:
        if failed is not None:
            raise failed
        return files
    said = mesh.everyones(str(failed) if failed else "")
    faults = [f"rank {rank}: {fault}" for rank, fault in enumerate(said) if fault]
    if faults:
        raise OSError(f"the state could not be saved, the one before stays. {'; '.join(faults)}") from failed
    return {name: entry for theirs in mesh.everyones(files) for name, entry in theirs.items()}


# --- names and files -------------------------------------------------------------------------------------------------


def _name(step: int) -> str:
    return f"{step:09d}"


def _is_encoder(name: str) -> bool:
    """Whether a tensor has its features in the second dimension."""
    return "W_enc" in name.split(".")


def _is_whole(name: str) -> bool:
    return any(part in WHOLE for part in name.split("."))


def _first_of(name: str) -> int | None:
    return int(name.split("-")[1].split(".")[0]) if name.startswith("features-") else None


def _features_of(name: str, index: dict[str, Any]) -> range | None:
    """The features in a file; None for what is whole."""
    first = _first_of(name)
    if first is None:
        return None
    later = [start for start in index["first"].values() if start > first]
    return range(first, min([*later, index["d_sae"]]))


def _index(out: Path) -> dict[str, Any]:
    path = out / INDEX
    if not path.exists():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Restore it from a backup, or train again.") from error
    if not isinstance(index, dict) or index.get("kind") != "training-state" or index.get("format", 0) > FORMAT:
        raise CheckpointError(f"{path} is not a training state that this version reads. Update monosem.")
    return index


def _check(path: Path, n_bytes: int, sha256: str) -> None:
    """Raises: CheckpointError unless the file is the one that was saved."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, but {INDEX} names it. Restore it from a backup, or train again.")
    if path.stat().st_size != n_bytes or _sha256(path) != sha256:
        raise CheckpointError(f"{path} is damaged: it is not the file that {INDEX} names. Restore it from a backup.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _own_part(path: Path, held: range, own: range, *, rows_first: bool) -> dict[str, Tensor]:
    """The rows of a file that holds the features `held`, as far as they are in `own`; whole tensors as they are."""
    part = slice(max(0, own.start - held.start), max(0, own.stop - held.start))
    try:
        with safe_open(str(path), "pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118
                if _is_whole(name) or held == own:
                    found[name] = file.get_tensor(name)
                elif _is_encoder(name) and not rows_first:
                    found[name] = file.get_slice(name)[:, part]
                else:
                    found[name] = file.get_slice(name)[part]
            return found
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}). Delete it and run the command that made it again."
        ) from error
