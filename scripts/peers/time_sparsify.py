"""Times steps of sparsify's own trainer, whose loop hooks a model: here one that only looks rows up.

    python scripts/peers/time_sparsify.py --d-in 512 --d-sae 16384 --optimizer adam

Prints one line of JSON: milliseconds of each step, from one look-up to the next, and the largest memory. Everything in
between is the trainer's: its data loader, its step and its bookkeeping, without logging to Weights & Biases.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch
from sparsify import SparseCoderConfig, TrainConfig, Trainer

CONTEXT, BATCHES = 128, 4


class LookUp(torch.nn.Module):
    """Stands for a language model: its "hidden states" are rows of a table, ReLU-MLP-like and of rank d_in / 4."""

    def __init__(self, rows: int, d_in: int) -> None:
        super().__init__()
        g, rank = torch.Generator().manual_seed(0), max(1, d_in // 4)
        basis = torch.randn(rank, d_in, generator=g)
        table = torch.relu(torch.randn(rows, rank, generator=g) @ basis / rank**0.5 - 0.5)
        self.rows = torch.nn.Embedding.from_pretrained(table)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
        self.times: list[Any] = []

    @property
    def base_model(self) -> LookUp:
        return self

    @property
    def device(self) -> torch.device:
        return self.rows.weight.device

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.times.append(event)
        else:
            self.times.append(time.perf_counter())
        return self.rows(input_ids)

    def milliseconds(self) -> list[float]:
        """Of each step but the first ones: the first call is the trainer's question for the width."""
        pairs = list(zip(self.times[1:], self.times[2:], strict=False))
        if self.device.type != "cuda":
            return [1000 * (end - start) for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096, help="rows per step")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--optimizer", default="adam", help="adam, like ours, or signum, its default")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    context = min(CONTEXT, args.batch)
    model = LookUp(BATCHES * args.batch, args.d_in).to(args.device)
    sequences = torch.arange(BATCHES * args.batch).view(-1, context)
    dataset = [{"input_ids": sequences[n % len(sequences)]} for n in range(args.steps * args.batch // context)]
    with tempfile.TemporaryDirectory() as out:
        config = TrainConfig(
            SparseCoderConfig(num_latents=args.d_sae, k=args.k),
            batch_size=args.batch // context,
            optimizer=args.optimizer,
            hookpoints=["rows"],
            log_to_wandb=False,
            save_every=10**9,
            save_dir=out,
        )
        Trainer(config, dataset, model).fit()  # type: ignore[arg-type]
    peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else None
    print(json.dumps({"ms": [round(each, 3) for each in model.milliseconds()], "peak GB": peak}))


if __name__ == "__main__":
    main()
