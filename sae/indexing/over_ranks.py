"""The feature index by several processes, or by one whose memory does not hold every feature's correlations.

Each rank encodes its own blocks and keeps their activations in files that all ranks read; then each computes the
correlations of its own features, over all blocks in the order of the text; rank 0 puts the index together. Every figure
is that of one process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.inference import FrozenSAE
from sae.indexing.build import IndexBlock, IndexSink, Panels, encoded_blocks, finished, weight_panels
from sae.indexing.correlation import FeatureNeuronCorrelation
from sae.jobs.progress import progress
from sae.kernels.activations import SparseActs
from sae.kernels.autograd import Kernels
from sae.kernels.sparsity import Support
from sae.lm import LanguageModel
from sae.parallel.mesh import ONE, Mesh

CORRELATION_BYTES = 4 << 30  # memory for running correlations


@runtime_checkable
class KeptBlocks(Protocol):
    """Blocks with their firings that all ranks write and read; `store.feature_parts.BlockFiles` is one."""

    def write(
        self,
        first_context: int,
        tokens: np.ndarray,
        keep: np.ndarray,
        document: np.ndarray,
        rows: np.ndarray,
        features: np.ndarray,
        values: np.ndarray,
    ) -> None: ...

    def firings(self, first_context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...

    def first_contexts(self) -> list[int]: ...

    def read(self, first_context: int) -> dict[str, np.ndarray]: ...


def fits(sae: SAE) -> bool:
    """Whether the correlations of all features fit into memory, so that one pass over the blocks is enough."""
    return sae.d_sae * sae.d_in * FeatureNeuronCorrelation.BYTES <= CORRELATION_BYTES


@torch.inference_mode()
def index(
    sae: SAE,
    model: LanguageModel | None,
    own_blocks: Iterable[IndexBlock],
    all_blocks: Callable[[], Iterable[IndexBlock]],
    kept: KeptBlocks,
    sink: IndexSink | None,
    *,
    hook_point: str,
    tokens: int,
    resampled: Mapping[int, int] | None = None,
    device: str = "auto",
    kernels: str = "auto",
    mesh: Mesh = ONE,
) -> Path | None:
    """As `sae.indexing.build.index`; rank 0 alone has a `sink`, and returns the path of the index.

    `own_blocks` are those that this rank encodes, `all_blocks` reads those of all ranks, and `kept` holds the
    activations in between.
    """
    placed = FrozenSAE(sae, device, kernels)
    on_cpu: Kernels | None = None
    with progress("index", -(-tokens // mesh.world), "tok", shown=mesh.is_first) as bar:
        for block, fired in encoded_blocks(placed, own_blocks):
            support = fired.support
            kept.write(
                block.first_context,
                block.tokens,
                block.keep,
                block.document,
                support.rows.numpy(),
                support.features.numpy(),
                fired.values.numpy(),
            )
            on_cpu = fired.kernels
            bar.update(block.tokens.size)
    mesh.agree(False)  # all activations are in files
    panels = _correlations(sae, all_blocks, kept, on_cpu or placed.kernels, mesh)
    panels = weight_panels(sae, model, hook_point, mesh) | panels
    if not mesh.is_first:
        return None
    assert sink is not None
    for first in kept.first_contexts():
        entries = kept.read(first)
        seq_len = entries["tokens"].shape[1]
        sink.append(first, **entries | {"rows": entries["rows"].astype(np.int64) + first * seq_len})
    return finished(sae, model, sink, panels, hook_point, resampled)


def _correlations(
    sae: SAE, all_blocks: Callable[[], Iterable[IndexBlock]], kept: KeptBlocks, kernels: Kernels, mesh: Mesh
) -> Panels:
    """The correlation panels on rank 0; each rank goes over all blocks once for as many features as fit into memory."""
    first, stop = (sae.d_sae * n // mesh.world for n in (mesh.rank, mesh.rank + 1))
    at_once = max(1, CORRELATION_BYTES // (sae.d_in * FeatureNeuronCorrelation.BYTES))
    found: list[Panels] = []
    for start in range(first, stop, at_once):
        features = range(start, min(start + at_once, stop))
        correlation = FeatureNeuronCorrelation(len(features), sae.d_in)
        for block in all_blocks():
            acts = _acts_of(features, len(block.acts), kernels, *kept.firings(block.first_context))
            correlation.add(acts, block.acts, torch.from_numpy(block.keep.reshape(-1)))
        found.append(correlation.panels())
    empty = FeatureNeuronCorrelation(0, sae.d_in).panels()
    own = {name: np.concatenate([empty[name], *(panels[name] for panels in found)]) for name in empty}
    gathered = {name: mesh.collected(array) for name, array in own.items()}
    return {name: np.concatenate(parts) for name, parts in gathered.items() if parts}


def _acts_of(
    features: range, n_rows: int, kernels: Kernels, rows: np.ndarray, of: np.ndarray, values: np.ndarray
) -> SparseActs:
    """The activations of some features, which are numbered from 0; entries are row by row."""
    mine = (of >= features.start) & (of < features.stop)
    counts = np.bincount(rows[mine], minlength=n_rows)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    numbers: Tensor = torch.from_numpy(of[mine].astype(np.int32) - np.int32(features.start))
    return SparseActs(torch.from_numpy(values[mine]), Support(numbers, offsets, len(features)), kernels)
