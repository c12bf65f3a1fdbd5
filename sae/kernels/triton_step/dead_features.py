"""The launches of AuxK: dead features explain what the reconstruction leaves, and learn from it.

Its products are dense. On a GPU they round their factors to TF32 (10 bits, relative error 5e-4), as no product of the
reconstruction itself does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sae.kernels.triton_step import dead_select
from sae.kernels.triton_step.buffers import Buffers, Constants, Learned, Sizes, power_of_two

SLOTS = 512  # of a row at once


@dataclass(frozen=True)
class DeadFeatures:
    """From the error of the reconstruction to the gradients of the dead features."""

    sizes: Sizes
    constants: Constants
    learned: Learned
    held: Buffers

    def explain_error(self, warps: int) -> None:
        """`e − ê`, ê from the strongest dead features of each row."""
        held, sizes, learned = self.held, self.sizes, self.learned
        acts, residual = held.dead_acts[0], held.dead_sources[0]
        dead_select.gather_dead[(sizes.dead_room,)](
            learned.W_enc,
            learned.b_enc,
            learned.W_dec,
            held.dead,
            held.n_dead,
            held.dead_enc,
            held.dead_b,
            held.dead_dec,
            held.flags,
            sizes.d_in,
            COLUMNS=power_of_two(sizes.d_in),
            num_warps=warps,
        )
        with tf32(acts.device):
            torch.addmm(held.dead_b, held.centred, held.dead_enc.t(), out=acts)
        dead_select.keep_strongest[(sizes.rows,)](
            acts,
            held.n_dead,
            held.flags,
            sizes.d_in // 2,
            sizes.dead_room,
            SLOTS=min(SLOTS, sizes.dead_room),
            num_warps=8,
        )
        # the gradient of the last prefix is −2 e / rows
        with tf32(acts.device):
            torch.addmm(held.gradient[-1], acts, held.dead_dec, beta=-sizes.rows / 2, alpha=-1, out=residual)

    def pass_back(self) -> None:
        """The gradients of the dead features' encoder and decoder rows and biases, but for one factor."""
        held, sizes = self.held, self.sizes
        acts, residual = held.dead_acts, held.dead_sources[0]
        with tf32(acts.device):
            torch.mm(residual, held.dead_dec.t(), out=acts[1])
        parts = held.aux_parts.shape[1]
        dead_select.pass_back[(-(-sizes.dead_room // 32),)](
            acts[0],
            acts[1],
            held.dead_d_b,
            held.aux_parts,
            parts,
            held.n_dead,
            held.aux_factor,
            held.losses,
            held.flags,
            self.constants.aux_coefficient,
            sizes.rows,
            sizes.dead_room,
            ROWS=32,
            COLUMNS=32,
            PARTS=power_of_two(parts),
            num_warps=4,
        )
        with tf32(acts.device):
            torch.bmm(acts.transpose(1, 2), held.dead_sources, out=held.dead_gradients)


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """On a GPU float32 products may round their factors to TF32 inside the block."""
    before: Any = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
