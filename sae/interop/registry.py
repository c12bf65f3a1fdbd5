"""Which peers there are, and which of them wrote what lies at a path."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from sae.dictionary.autoencoder import SAE
from sae.interop import dictionary_learning, llamascopium, nanda, openai, saelens, sparsify
from sae.interop.files import InteropError


@runtime_checkable
class Peer(Protocol):
    """One tool's layout: a module of this package."""

    NAME: str
    FILES: str

    def detect(self, path: Path) -> bool:
        """Whether the files at `path` (a directory, or one file) are this peer's, by their names alone."""

    def read(self, path: Path) -> SAE:
        """The dictionary at `path`. Raises: InteropError."""


@runtime_checkable
class Writer(Peer, Protocol):
    """A peer whose layout is written too."""

    def write(self, sae: SAE, out: Path) -> Path:
        """Writes the dictionary into the directory `out`. Raises: InteropError."""


WRITERS: dict[str, Writer] = {peer.NAME: peer for peer in (saelens, dictionary_learning, sparsify)}
PEERS: dict[str, Peer] = {**WRITERS, **{peer.NAME: peer for peer in (llamascopium, nanda, openai)}}


def identify(path: Path) -> Peer:
    """The peer whose files lie at `path`. Raises: InteropError when there are none, or of several."""
    if not path.exists():
        raise InteropError(f"{path}: no such file or directory.")
    found = [peer for peer in PEERS.values() if peer.detect(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InteropError(
            f"{path} holds files of {', '.join(peer.NAME for peer in found)}; say which is meant (--format)."
        )
    known = "; ".join(f"{peer.NAME}: {peer.FILES}" for peer in PEERS.values())
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else path.name
    raise InteropError(
        f"{path} is no dictionary that can be imported: it holds {inside or 'nothing'}. Known are {known}."
    )


def read(path: Path, format: str | None = None) -> SAE:
    """The dictionary at `path`, by its own files or as `format` says. Raises: InteropError."""
    if format is None:
        return identify(path).read(path)
    if format not in PEERS:
        raise InteropError(f"format must be one of {', '.join(PEERS)}; got {format!r}.")
    if not path.exists():
        raise InteropError(f"{path}: no such file or directory.")
    return PEERS[format].read(path)
