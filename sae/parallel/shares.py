"""Which pieces of a text each rank reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sae.parallel.mesh import Mesh


def shared_out(shards: Mapping[int, int], mesh: Mesh) -> Iterator[tuple[int, tuple[int, ...]]]:
    """This rank's shards of {shard: number of contexts}, one in `mesh.world`; with each the contexts of those before it
    since its last one, which other ranks read."""
    skipped: list[int] = []
    for place, (shard, contexts) in enumerate(shards.items()):
        if place % mesh.world == mesh.rank:
            yield shard, tuple(skipped)
            skipped.clear()
        else:
            skipped.append(contexts)
