"""A root of the app with everything real and tiny: a model, its store, two dictionaries with index and comparison."""

from __future__ import annotations

from pathlib import Path

import torch
from fakes import HOOK_POINT, SHAPE

from sae import pipeline
from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import save
from sae.lm import NativeModel

D_SAE = 48
NAMES = ("tiny/a", "tiny/b")


def trained(seed: int, d_sae: int = D_SAE) -> SAE:
    """A dictionary of random directions: `seed` 1 has half of its features from `seed` 0."""
    made = SAE(SHAPE.d_mlp, d_sae, activation="topk", k=6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        directions = torch.nn.functional.normalize(torch.randn(d_sae, SHAPE.d_mlp, generator=generator), dim=-1)
        if seed:
            other = torch.randn(d_sae, SHAPE.d_mlp, generator=torch.Generator().manual_seed(seed))
            directions[d_sae // 2 :] = torch.nn.functional.normalize(other, dim=-1)[d_sae // 2 :]
        made.W_dec.copy_(directions)
        made.W_enc.copy_(directions.T)
    return made.requires_grad_(False).eval()


def build_live_root(root: Path, model: NativeModel, store: Path, *, compared: bool = True) -> Path:
    """`tiny/a` and `tiny/b` with weights, statistics and index, and A compared with B."""
    for seed, name in enumerate(NAMES):
        directory = root / name
        config = {"kind": "sae", "recipe": "topk", "hook_point": HOOK_POINT, "model": model.identity()}
        save(trained(seed), directory, config)
        pipeline.evaluate(directory, store=store)
        pipeline.index(directory, store=store, tokens=4096)
    if compared:
        pipeline.compare(root / NAMES[0], root / NAMES[1], store=store, tokens=4096)
    return root
