"""The list of peers, and which of them wrote the files at a path."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol, runtime_checkable

from sae.dictionary.autoencoder import SAE
from sae.interop import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llamascopium,
    nanda,
    openai,
    qwen_scope,
    saelens,
    settings,
    sparsify,
)
from sae.interop.files import InteropError


@runtime_checkable
class Peer(Protocol):
    """One tool's file layout; the modules of this package implement it."""

    NAME: str
    FILES: str

    def detect(self, path: Path) -> bool:
        """Whether the files at `path` (a directory, or one file) have the names of this peer's files."""

    def read(self, path: Path, ignore: Collection[str] = ()) -> SAE:
        """The dictionary at `path`, without the settings named in `ignore`. Raises: InteropError."""


@runtime_checkable
class Writer(Peer, Protocol):
    """A peer whose layout can also be written."""

    def write(self, sae: SAE, out: Path) -> Path:
        """Writes the dictionary into the directory `out`. Raises: InteropError."""


WRITERS: dict[str, Writer] = {peer.NAME: peer for peer in (saelens, dictionary_learning, sparsify)}
_READ_ONLY = (llamascopium, llama_scope, gemma_scope, gemma_scope_2, goodfire, qwen_scope, nanda, openai)
PEERS: dict[str, Peer] = {**WRITERS, **{peer.NAME: peer for peer in _READ_ONLY}}


def identify(path: Path) -> Peer:
    """The peer whose files are at `path`. Raises: InteropError for files of no known peer, or of several."""
    if not path.exists():
        raise InteropError(f"{path}: no such file or directory.")
    found = [peer for peer in PEERS.values() if peer.detect(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InteropError(
            f"{path} holds files of several formats ({', '.join(peer.NAME for peer in found)}); choose one (--format)."
        )
    known = "; ".join(f"{peer.NAME}: {peer.FILES}" for peer in PEERS.values())
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else path.name
    raise InteropError(
        f"{path} is not a dictionary that can be imported: it holds {inside or 'no files'}. Known formats: {known}."
    )


def read(path: Path, format: str | None = None, ignore: Collection[str] = ()) -> SAE:
    """The dictionary at `path`, in the format `format`, or else in that of its files.

    `ignore` names settings of its configuration to leave out, as if they were not there; the dictionary records them.
    Raises: InteropError.
    """
    if format is not None and format not in PEERS:
        raise InteropError(f"format must be one of {', '.join(PEERS)}; got {format!r}.")
    if format is not None and not path.exists():
        raise InteropError(f"{path}: no such file or directory.")
    peer = identify(path) if format is None else PEERS[format]
    sae = peer.read(path, frozenset(ignore))
    imported = sae.config["imported"]
    settings.require_mentioned(imported["config"], ignore)
    if ignore:
        imported["ignored"] = sorted(ignore)
    return sae
