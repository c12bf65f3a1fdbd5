"""Which rank the others wait for, and why."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sae.parallel.mesh import Mesh

NOTABLE_SHARE = 0.1  # of the time: below it nobody is shown as slow


def slowest_rank(mesh: Mesh, stall_share: float, exchange_share: float) -> dict[str, float]:
    """The rank that waits least for the others in exchanges, as entries of a log line; {} on one rank.

    `slowest_rank`; what it did with its time, as shares: `slowest_stall_share` (waiting for its rows) and
    `slowest_step_share` (computing); and `slowest_costs_share`, how much longer the rank that waits most is in
    exchanges than this one. On GPUs the host's time counts: what NCCL waits on the device is in the step.
    """
    if mesh.world == 1:
        return {}
    shares = mesh.stack(torch.tensor([stall_share, exchange_share], dtype=torch.float64), "world")
    exchange = shares[:, 1]
    rank = int(exchange.argmin())
    stalled = float(shares[rank, 0])
    found = {
        "slowest_stall_share": stalled,
        "slowest_step_share": max(0.0, 1 - stalled - float(exchange[rank])),
        "slowest_costs_share": float(exchange.max() - exchange[rank]),
    }
    return {"slowest_rank": rank, **{name: round(share, 4) for name, share in found.items()}}


def shown_slowness(entry: Mapping[str, float]) -> str:
    """The slowest rank and why, for the progress bar; nothing while all are about as fast."""
    costs = entry.get("slowest_costs_share", 0.0)
    if costs < NOTABLE_SHARE:
        return ""
    why = "waits for its rows" if entry["slowest_stall_share"] > costs / 2 else "computes longer"
    return f", rank {entry['slowest_rank']} {why}, which costs {costs:.0%}"
