"""Dictionaries on the Hugging Face hub, fetched only when `hub:` is asked for. The only door to huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from sae.interop.files import InteropError

PREFIX = "hub:"
_WEIGHTS = (".safetensors", ".pt", ".pth", ".npz")
_SPEC = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<inside>[^@]+?))?/?(?:@(?P<revision>[\w./-]+))?")


def fetch(spec: str) -> Path:
    """Downloads one dictionary, `hub:owner/repo[/path][@revision]`; returns its path in the hub's own cache.

    Raises: InteropError when the repository is not available, or holds no such path (the message lists what it holds).
    """
    from huggingface_hub import HfApi, snapshot_download

    match = _SPEC.fullmatch(spec.removeprefix(PREFIX))
    if match is None:
        raise InteropError(f"{spec!r}: expected hub:owner/repo, hub:owner/repo/path or either with @revision.")
    repo, inside, revision = match["repo"], match["inside"] or "", match["revision"]
    try:
        files = HfApi().list_repo_files(repo, revision=revision)
        wanted = files_of(files, inside)
        if not wanted:
            raise InteropError(f"{spec}: no such path in the repository. {_listing(files)}")
        root = snapshot_download(repo, revision=revision, allow_patterns=wanted)
    except (OSError, ValueError) as error:  # network, authorisation, no such repository
        if isinstance(error, InteropError):
            raise
        raise InteropError(f"{spec} cannot be downloaded: {error}") from error
    return _place(Path(root), inside)


def files_of(files: Sequence[str], inside: str) -> list[str]:
    """The files of one dictionary: those in the directory `inside`, or the file `inside` and its configuration."""
    path = PurePosixPath(inside)
    stem = path.with_suffix("") if path.suffix == ".pt" else path
    alone = {str(path), f"{stem}.pt", f"{stem}_cfg.json"}
    folders = (path, path / "checkpoints") if f"{path / 'hyperparams.json'}" in files else (path,)
    return [file for file in files if file in alone or PurePosixPath(file).parent in folders]


def _place(root: Path, inside: str) -> Path:
    path = root / inside
    return path if path.exists() else path.with_name(f"{path.name}.pt")


def _listing(files: Sequence[str]) -> str:
    folders = sorted({str(PurePosixPath(file).parent) for file in files if file.endswith(_WEIGHTS)})
    shown = ", ".join(folders[:12]) + (", …" if len(folders) > 12 else "")
    return f"Directories with weights: {shown}." if folders else f"It holds none of {', '.join(_WEIGHTS)}."
