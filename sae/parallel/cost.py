"""What a mesh exchanges in a step, by formula, and the mesh that exchanges least."""

from __future__ import annotations

BETWEEN_MACHINES = 8  # times as long as inside one: NVLink against a 400 Gb/s network, per GPU


def exchanged_bytes(
    row_groups: int, shards: int, *, d_in: int, d_sae: int, batch_tokens: int, k: int, bytes_per_value: int = 4
) -> dict[str, float]:
    """Bytes that reach one rank in a TopK step without AuxK, by operation of the mesh, but for a few numbers.

    With R row groups, F shards and B rows: `gather_rows` (x, and the gradient of the sums) 2 (F − 1)/F · B/R · d_in,
    `scatter_sum` (F − 1)/F · B/R · d_in, `stack` (k candidates a row) (F − 1) · B/R · k, and `reduce` (gradients of a
    shard's W_enc, b_enc and W_dec over row groups) 2 (R − 1)/R · d_sae/F · (2 d_in + 1) values.
    """
    rows, others = batch_tokens / row_groups, (shards - 1) / shards
    return {
        "gather_rows": 2 * others * rows * d_in * bytes_per_value,
        "scatter_sum": others * rows * d_in * bytes_per_value,
        "stack": (shards - 1) * rows * k * bytes_per_value,
        "reduce": 2 * (row_groups - 1) / row_groups * d_sae / shards * (2 * d_in + 1) * bytes_per_value,
    }


def cheapest(world: int, on_one_machine: int, *, d_in: int, d_sae: int, batch_tokens: int, k: int) -> tuple[int, int]:
    """(row groups, shards) of the mesh of `world` ranks that takes least time to exchange its bytes.

    Bytes that cross machines, of which each has `on_one_machine` ranks, count BETWEEN_MACHINES times.
    """

    def cost(shards: int) -> float:
        found = exchanged_bytes(world // shards, shards, d_in=d_in, d_sae=d_sae, batch_tokens=batch_tokens, k=k)
        between_rows = BETWEEN_MACHINES if world > on_one_machine else 1
        between_shards = BETWEEN_MACHINES if shards > on_one_machine else 1
        return found.pop("reduce") * between_rows + sum(found.values()) * between_shards

    possible = [shards for shards in range(1, min(world, d_sae) + 1) if world % shards == 0]
    shards = min(possible, key=cost)
    return world // shards, shards
