"""SAELens' side of scripts/synthetic_world.py: makes the world, draws its samples, trains SAELens' own, judges all.

    python synthetic_world.py make SIZE WORLD
    python synthetic_world.py sample WORLD FILE.npy N SEED
    python synthetic_world.py train WORLD FILE.npy OUT SETTINGS_JSON
    python synthetic_world.py judge WORLD N SEED DICTIONARY …

`train` is SAELens' `SyntheticSAERunner`, which reads the samples of the file instead of drawing its own. `judge` is
its `eval_sae_on_synthetic_data` with the same fresh samples for every dictionary; prints one JSON object per line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
    feature_dictionary,
    synthetic_sae_runner,
)

SAMPLE_BLOCK, JUDGE_BATCH = 64, 1024  # activations of all features of a small block stay in the cache
# The published world, and one that a laptop learns in a minute.
WORLDS: dict[str, dict[str, Any]] = {
    "16k": {"num_features": 16_384, "hidden_dim": 768, "roots": 128, "orthogonal_steps": 100, "seed": 42},
    "2k": {"num_features": 2048, "hidden_dim": 192, "roots": 16, "orthogonal_steps": 30, "seed": 7},
}
ARCHITECTURES = {
    "batchtopk": BatchTopKTrainingSAEConfig,
    "matryoshka": MatryoshkaBatchTopKTrainingSAEConfig,
    "jumprelu": JumpReLUTrainingSAEConfig,
    "standard": StandardTrainingSAEConfig,
}


def world_config(
    num_features: int, hidden_dim: int, roots: int, orthogonal_steps: int, seed: int
) -> SyntheticModelConfig:
    """Chanin & Garriga-Alonso 2026 (arXiv 2602.14687), SynthSAEBench-16k, at any size."""
    return SyntheticModelConfig(
        num_features=num_features,
        hidden_dim=hidden_dim,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=HierarchyConfig(
            total_root_nodes=roots,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=OrthogonalizationConfig(num_steps=orthogonal_steps, lr=3e-4),
        correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=seed,
    )


def make(size: str, world: Path) -> None:
    check_orthogonalized()
    feature_dictionary.orthogonalize_embeddings = orthogonalized
    SyntheticModel(world_config(**WORLDS[size])).save(world)


def orthogonalized(embeddings: torch.Tensor, num_steps: int, lr: float, **_: object) -> torch.Tensor:
    """SAELens' `orthogonalize_embeddings` without the n² products: a minute instead of half an hour.

    Its loss is Σ_{i≠j} (e_i·e_j)² + n Σ_i (e_i·e_i − 1)², whose gradient needs only the d × d matrix EᵀE:
    4 (E EᵀE − |e_i|² e_i + n (|e_i|² − 1) e_i).
    """
    e = torch.nn.functional.normalize(embeddings.detach().double(), dim=1).requires_grad_(True)
    optimizer = torch.optim.Adam([e], lr=lr)
    for _step in range(num_steps):
        with torch.no_grad():
            squares = e.square().sum(1, keepdim=True)
            e.grad = 4 * (e @ (e.T @ e) - squares * e + len(e) * (squares - 1) * e)
        optimizer.step()
    return torch.nn.functional.normalize(e.detach(), dim=1).to(embeddings.dtype)


def check_orthogonalized() -> None:
    """Compares `orthogonalized` with SAELens' own on a few vectors; raises SystemExit if they differ."""
    start = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    theirs = feature_dictionary.orthogonalize_embeddings(start, num_steps=30, lr=3e-4)
    worst = float((orthogonalized(start, num_steps=30, lr=3e-4) - theirs).abs().max())
    moved = float((torch.nn.functional.normalize(start, dim=1) - theirs).abs().max())
    if worst > 1e-2 * moved:
        sys.exit(f"the orthogonalisation here differs from SAELens' by {worst:.1e}, of a change of {moved:.1e}")


def sample(world: Path, file: Path, n: int, seed: int) -> None:
    """n samples in 16 bits, drawn by one process for each core.

    Each block has a seed of its own: the file depends on no number of processes, and an interrupted or shorter one is
    continued.
    """
    width = SyntheticModel.load_from_disk(world).cfg.hidden_dim
    partial = file.with_suffix(".partial")
    if file.exists():
        file.rename(partial)
    if not partial.exists():
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(n, width)).flush()
    elif len(np.load(partial, mmap_mode="r")) < n:
        _grow(partial, n)
    processes = os.cpu_count() or 1
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        drawing = [pool.submit(_draw, world, partial, seed, first, processes) for first in range(processes)]
        for drawn in drawing:
            drawn.result()
    partial.rename(file)
    print(file=sys.stderr)


@torch.no_grad()
def _draw(world: Path, partial: Path, seed: int, first: int, every: int) -> None:
    """The missing ones of the blocks first, first + every, …"""
    torch.set_num_threads(1)
    model = SyntheticModel.load_from_disk(world)
    rows = np.load(partial, mmap_mode="r+")
    for start in range(first * SAMPLE_BLOCK, len(rows), every * SAMPLE_BLOCK):
        block = rows[start : start + SAMPLE_BLOCK]
        if not block[-1].any():  # a sample is never 0, because it has a bias
            torch.manual_seed(seed + start)
            block[:] = embedded(model.activation_generator.sample(len(block)), model.feature_dict).numpy()
            print(f"\r{start + len(block):,} of {len(rows):,} samples", end="", file=sys.stderr, flush=True)
    rows.flush()


def embedded(feature_acts: torch.Tensor, feature_dict: feature_dictionary.FeatureDictionary) -> torch.Tensor:
    """What `feature_dict(feature_acts)` is, from the active features alone: 34 of 16,384 are."""
    row, feature = feature_acts.nonzero(as_tuple=True)
    starts = torch.searchsorted(row, torch.arange(len(feature_acts)))
    return feature_dict.bias + torch.nn.functional.embedding_bag(
        feature, feature_dict.feature_vectors, starts, mode="sum", per_sample_weights=feature_acts[row, feature]
    )


def _grow(file: Path, n: int) -> None:
    """Makes room for n samples; those not drawn yet are 0. A last block that was shorter than others is drawn again."""
    held = np.load(file, mmap_mode="r")
    whole = len(held) // SAMPLE_BLOCK * SAMPLE_BLOCK
    grown = np.lib.format.open_memmap(file.with_suffix(".grown"), mode="w+", dtype=held.dtype, shape=(n, held.shape[1]))
    grown[:whole] = held[:whole]
    grown.flush()
    file.with_suffix(".grown").rename(file)


class FileSamples(Iterator[torch.Tensor]):
    """Batches of the file from its first sample on, instead of `SyntheticActivationIterator`."""

    def __init__(self, file: Path, batch_size: int) -> None:
        self.rows, self.batch_size, self.start = np.load(file, mmap_mode="r"), batch_size, 0

    def __next__(self) -> torch.Tensor:
        start = self.start % (len(self.rows) - self.batch_size + 1)
        self.start = start + self.batch_size
        return torch.from_numpy(self.rows[start : start + self.batch_size].astype(np.float32))


def train(world: Path, file: Path, out: Path, settings: dict[str, Any]) -> None:
    """One training by SAELens' runner; what `settings` leaves out are the runner's defaults."""
    torch.manual_seed(settings["seed"])
    model = SyntheticModel.load_from_disk(world)
    sae = ARCHITECTURES[settings["architecture"]](d_in=model.cfg.hidden_dim, **settings["sae"])
    synthetic_sae_runner.SyntheticActivationIterator = lambda batch_size, **_: FileSamples(file, batch_size)
    config = SyntheticSAERunnerConfig(
        synthetic_model=str(world),
        sae=sae,
        training_samples=settings["samples"],
        batch_size=settings["batch_samples"],
        output_path=str(out),
        checkpoint_path=None,
        run_final_eval=False,
        logger=LoggingConfig(log_to_wandb=False),
        **settings["runner"],
    )
    started = time.monotonic()
    SyntheticSAERunner(config, override_synthetic_model=model).run()
    print(json.dumps({"seconds": round(time.monotonic() - started, 1)}))


def judge(world: Path, n: int, seed: int, directories: list[Path]) -> None:
    model = SyntheticModel.load_from_disk(world)
    for directory in directories:
        sae = SAE.load_from_disk(str(directory), device="cpu")
        torch.manual_seed(seed)
        found = eval_sae_on_synthetic_data(
            sae, model.feature_dict, model.activation_generator, num_samples=n, batch_size=JUDGE_BATCH
        )
        print(json.dumps({"dictionary": str(directory), **found.to_dict()}), flush=True)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "make":
        make(rest[0], Path(rest[1]))
    elif verb == "sample":
        sample(Path(rest[0]), Path(rest[1]), int(rest[2]), int(rest[3]))
    elif verb == "train":
        train(Path(rest[0]), Path(rest[1]), Path(rest[2]), json.loads(rest[3]))
    elif verb == "judge":
        judge(Path(rest[0]), int(rest[1]), int(rest[2]), [Path(name) for name in rest[3:]])
    else:
        sys.exit(f"unknown verb {verb!r}; expected make, sample, train or judge")
