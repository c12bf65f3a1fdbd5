"""One shard of a dictionary in training: a range of its features, on a mesh of ranks that hold the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE, WHOLE
from sae.dictionary.files import load, write_config
from sae.jobs.checkpoint import write_blocks
from sae.kernels.activations import FeatureActs
from sae.kernels.sparsity import BatchTopK, Rule
from sae.parallel.mesh import ONE, Mesh
from sae.parallel.selection import largest_in_rows

DEALT_AT_ONCE = 16_384  # features


class Shard(SAE):
    """The features `mesh.features(d_sae)` of a dictionary with `d_sae` features; `b_dec` and `W_skip` are whole.

    In a training step each rank passes its own rows: `gathered` gives those of its row group, `decoded` this rank's own
    rows of the sum over all shards. `encode` and `decode` are for rows that all ranks hold alike. On one rank it is the
    dictionary itself. What is saved or loaded is never a shard.
    """

    def __init__(self, mesh: Mesh, d_in: int, d_sae: int, *, k: int | None = None, **shape: Any) -> None:
        own = mesh.features(d_sae)
        super().__init__(d_in, len(own), k=min(k, len(own)) if k else None, **shape)
        self.k, self.mesh, self.first_feature = k, mesh, own.start

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments with which a plain `SAE` has parameters of this shard's shapes."""
        return {**super().shape, "k": min(self.k, self.d_sae) if self.k else None}

    @property
    def rule(self) -> Rule:
        if self.activation == "batchtopk" and self.training:
            assert self.k is not None
            return BatchTopK(self.k, self.mesh.reduce(self.threshold.amax(), "max", "features") - self.threshold)
        return super().rule

    def gathered(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "gathered d_in"]:
        return self.mesh.gather_rows(x)

    def decoded(self, acts: FeatureActs) -> Float[Tensor, "rows d_out"]:
        return self.mesh.scatter_sum(super().decoded(acts))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """This shard's activations on rows that all shards are given."""
        if self.mesh.shards == 1 or self.activation != "topk":
            return super().encode(x)
        assert self.k is not None
        pre = self.pre_acts(x).relu()
        return pre * largest_in_rows(self.mesh, pre, self.k)

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """`f W_dec + b_dec`, f the activations of all shards on rows that all of them are given."""
        if self.mesh.shards == 1:
            return super().decode(feature_acts)
        return self.mesh.reduce(feature_acts @ self.W_dec, "sum", "features") + self.b_dec


def mesh_of(sae: SAE) -> Mesh:
    """The ranks that hold a dictionary: one, unless it is a shard."""
    return sae.mesh if isinstance(sae, Shard) else ONE


def own_features(sae: SAE, features: Int[Tensor, " n"]) -> tuple[Bool[Tensor, " n"], Int[Tensor, " own"]]:
    """Which of these features of a whole dictionary this shard holds, and their numbers in it."""
    first = sae.first_feature if isinstance(sae, Shard) else 0
    mine = (features >= first) & (features < first + sae.d_sae)
    return mine, features[mine] - first


@torch.no_grad()
def save_from_shards(part: SAE, mesh: Mesh, d_sae: int, out: Path, k: int | None) -> SAE:
    """Writes the dictionary of which each rank holds a part to sae.safetensors and config.json.

    Rank 0 writes it to its place block by block, so that no rank holds more than its part and a block. Returns this
    rank's features of it, as they were saved.
    """
    tensors, width = part.tensors(), part.d_out
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    shapes = {
        name: shape if name in WHOLE else (shape[0], d_sae) if name == "W_enc" else (d_sae, *shape[1:])
        for name, shape in shapes.items()
    }
    assert width
    blocks = _blocks_of(tensors, mesh, d_sae)
    if mesh.is_first:
        write_blocks(out / "sae.safetensors", shapes, {"kind": "sae", "format": 1}, blocks)
        shape = {**part.shape, "d_sae": d_sae, "k": k}
        write_config({name: value for name, value in shape.items() if name != "row_norm"}, out, part.config)
    else:
        for _ in blocks:
            pass
    mesh.agree(False)  # rank 0 has written it
    return load(out, mesh.features(d_sae) if mesh.shards > 1 else None)


def _blocks_of(tensors: dict[str, Tensor], mesh: Mesh, d_sae: int) -> Iterator[tuple[str, int, Tensor]]:
    """(name, first feature, rows by feature) of the whole dictionary, on rank 0; the owners send them."""
    for name, tensor in tensors.items():
        if name in WHOLE:
            yield name, -1, tensor
            continue
        rows = tensor.t() if name == "W_enc" else tensor
        for shard in range(mesh.shards):
            own = mesh.features(d_sae, shard)
            for start in range(own.start, own.stop, DEALT_AT_ONCE):
                stop = min(own.stop, start + DEALT_AT_ONCE)
                if mesh.shard == shard:
                    block = rows[start - own.start : stop - own.start].contiguous()
                else:
                    block = rows.new_empty((stop - start, *rows.shape[1:]))
                yield name, start, mesh.to_first(block, owner=shard)


@torch.no_grad()
def dealt(shard: Shard, whole: SAE | None, d_sae: int) -> Shard:
    """This rank's features of the dictionary that rank 0 holds; on one rank that dictionary."""
    mesh = shard.mesh
    if mesh.world == 1:
        assert isinstance(whole, Shard)
        return whole
    theirs = whole.tensors() if whole is not None else {}
    for name, mine in shard.tensors().items():
        if name in WHOLE:
            mine.copy_(mesh.send_first(theirs.get(name, mine).contiguous()))
            continue
        rows = mine.t() if name == "W_enc" else mine  # one row per feature
        for start in range(0, d_sae, DEALT_AT_ONCE):
            stop = min(d_sae, start + DEALT_AT_ONCE)
            part = rows.new_empty((stop - start, *rows.shape[1:]))
            if name in theirs:
                part.copy_((theirs[name].t() if name == "W_enc" else theirs[name])[start:stop])
            mesh.send_first(part)
            own = mesh.features(d_sae)
            first, last = max(start, own.start), min(stop, own.stop)
            if first < last:
                rows[first - own.start : last - own.start] = part[first - start : last - start]
    return shard
