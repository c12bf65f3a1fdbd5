"""sparsify's side of scripts/check_peers.py."""

from __future__ import annotations

from pathlib import Path

import sides
import torch
from sparsify import SparseCoder, SparseCoderConfig


def compute(directory: Path, x: torch.Tensor) -> sides.Computed:
    return answers(SparseCoder.load_from_disk(directory), x)


def answers(coder: SparseCoder, x: torch.Tensor) -> sides.Computed:
    encoded = coder.encode(x)
    dense = torch.zeros(len(x), coder.num_latents).scatter(-1, encoded.top_indices, encoded.top_acts)
    return dense, coder.decode(encoded.top_acts, encoded.top_indices)


def make(name: str, config: SparseCoderConfig, seed: int, *, unit_norms: bool) -> None:
    coder = SparseCoder(sides.D_IN, config)
    given = sides.weights(seed, unit_norms=unit_norms)
    with torch.no_grad():
        coder.encoder.weight.copy_(given["W_enc"].T)
        coder.encoder.bias.copy_(given["b_enc"])
        coder.W_dec.copy_(given["W_dec"])
        coder.b_dec.copy_(given["b_dec"])
        directory = sides.place(name)
        coder.save_to_disk(directory)
        x = sides.rows(seed, given["b_dec"])
        acts, x_hat = answers(coder, x)
    sides.write(directory, {"x": x, "acts": acts, "x_hat": x_hat})


if __name__ == "__main__":
    sides.answer(compute)
    factor = sides.D_SAE // sides.D_IN
    make("layers.3.mlp", SparseCoderConfig(expansion_factor=factor, k=sides.K), 0, unit_norms=True)
    make("h.5", SparseCoderConfig(num_latents=sides.D_SAE, k=sides.K), 1, unit_norms=False)
    sides.report("eai-sparsify")
