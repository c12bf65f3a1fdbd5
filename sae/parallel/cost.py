"""What a mesh exchanges in a step, by formula, and the mesh that exchanges least."""

from __future__ import annotations

from functools import cache
from math import comb

ALL_CANDIDATES = 16  # shards, up to which each sends as many candidates as may be kept: one exchange, and few bytes
ROW_DIGIT_BITS = 8  # of a value's bits, counted at once for each row: 4 rounds of 256 counts for float32
BETWEEN_MACHINES = 8  # times as long as inside one: NVLink against a 400 Gb/s network, per GPU


def exchanged_bytes(
    row_groups: int, shards: int, *, d_in: int, d_sae: int, batch_tokens: int, k: int, bytes_per_value: int = 4
) -> dict[str, float]:
    """Bytes that reach one rank in a TopK step without AuxK, by operation of the mesh, but for a few numbers.

    With R row groups, F shards and B rows: `gather_rows` (x, and the gradient of the sums) 2 (F − 1)/F · B/R · d_in,
    `scatter_sum` (F − 1)/F · B/R · d_in, `stack` (c candidates a row, `first_candidates`) (F − 1) · B/R · c, and
    `reduce` (gradients of a shard's W_enc, b_enc and W_dec over row groups) 2 (R − 1)/R · d_sae/F · (2 d_in + 1)
    values, and as many bytes as features (which have fired). Each row of a second round adds (F − 1) · k values.
    """
    rows, others = batch_tokens / row_groups, (shards - 1) / shards
    return {
        "gather_rows": 2 * others * rows * d_in * bytes_per_value,
        "scatter_sum": others * rows * d_in * bytes_per_value,
        "stack": (shards - 1) * rows * first_candidates(k, shards) * bytes_per_value,
        "reduce": 2 * (row_groups - 1) / row_groups * d_sae / shards * ((2 * d_in + 1) * bytes_per_value + 1),
    }


@cache
def first_candidates(k: int, shards: int) -> int:
    """How many candidates a row each of F shards sends first, of which k over all shards are kept.

    All k up to ALL_CANDIDATES shards. With more, the c that minimises c + k · p(c): rows in which a shard's c-th
    candidate may be kept send k candidates in a second round, and p(c) = min(1, F · P(X ≥ c)) bounds their share if
    each kept entry lies in any shard alike, X ~ Binomial(k, 1/F).
    """
    if shards <= ALL_CANDIDATES:
        return k
    more, found = 1.0, [float(k + 1)]  # P(X ≥ c), and the cost of each c from 0 on
    for c in range(1, k + 1):
        more -= comb(k, c - 1) * (shards - 1) ** (k - c + 1) / shards**k
        found.append(c + k * min(1.0, shards * max(0.0, more)))
    return min(range(1, k + 1), key=found.__getitem__)


def counts_are_fewer(k: int, shards: int, bytes_per_value: int) -> bool:
    """Whether counts by digit are a quarter of the bytes of a row's candidates or less: they take more calls.

    Counts of 4 bytes are summed in as many rounds as a value has digits, 2 (F − 1)/F · 4 · 256 bytes each, against
    (F − 1) · c · bytes_per_value of candidates.
    """
    counts = 2 * 4 * (1 << ROW_DIGIT_BITS) * (8 * bytes_per_value // ROW_DIGIT_BITS)
    return 4 * counts <= shards * first_candidates(k, shards) * bytes_per_value


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


# Of one H200, measured with d_in = 4,096 and k = 32: what a step of topk costs beside exchanges.
FIXED_S = 3e-3  # by the host
ROWS_S = 3e-3  # for 4,096 rows: the sparse products
FEATURE_S = 104e-9  # of a feature: Adam
FEATURE_ROWS_S = 73e-9  # of a feature for 4,096 rows: the encoder's product
# Assumed, in bytes per second that reach a rank, and in seconds of a call.
INSIDE_BYTES_PER_S, BETWEEN_BYTES_PER_S = 350e9, 45e9  # NVLink of eight GPUs; 400 Gb/s for each GPU between machines
CALL_S = 60e-6
CALLS = {"features": 6, "rows": 4}  # of a step, with more than one shard or row group


def modelled_step_s(
    row_groups: int, shards: int, *, d_sae: int, batch_tokens: int, on_one_machine: int = 8, d_in: int = 4096
) -> float:
    """Seconds of a topk step (k = 32) on H200 GPUs: a model, from measurements of one GPU and assumed bandwidths.

    Compute FIXED_S + ROWS_S · b/F + d_sae/F · (FEATURE_S + FEATURE_ROWS_S · b), b = B/(4,096 R) and all but FIXED_S
    times d_in/4,096; then the bytes of `exchanged_bytes` through the slowest link that each crosses, and calls. Nothing
    overlaps.
    """
    b, size = batch_tokens / row_groups / 4096, d_in / 4096
    compute = ROWS_S * b / shards + d_sae / shards * (FEATURE_S + FEATURE_ROWS_S * b)
    found = exchanged_bytes(row_groups, shards, d_in=d_in, d_sae=d_sae, batch_tokens=batch_tokens, k=32)
    among_rows = found.pop("reduce")
    inside = shards <= on_one_machine
    rows_inside = row_groups * shards <= on_one_machine
    exchange = sum(found.values()) / (INSIDE_BYTES_PER_S if inside else BETWEEN_BYTES_PER_S)
    exchange += among_rows / (INSIDE_BYTES_PER_S if rows_inside else BETWEEN_BYTES_PER_S)
    calls = CALLS["features"] * (shards > 1) + CALLS["rows"] * (row_groups > 1)
    return FIXED_S + compute * size + exchange + calls * CALL_S
