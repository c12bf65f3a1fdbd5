"""What all peers' sides of scripts/check_peers.py share: answers on our exports, and dictionaries to import.

Runs in the peer's environment and imports nothing of ours. A working directory holds `exported/<case>/` (our exports)
and `exported/<case>.rows.safetensors`. The peer writes `exported/<case>.answers.safetensors`, and dictionaries of its
own as `made/<case>/` with their rows and answers in `made/<case>.answers.safetensors`.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D_IN, D_SAE, K, ROWS = 24, 96, 6, 512
Computed = tuple[torch.Tensor, torch.Tensor]  # feature activations [rows, d_sae], reconstructions [rows, d_in]


def work() -> Path:
    return Path(sys.argv[1])


def answer(compute: Callable[[Path, torch.Tensor], Computed]) -> None:
    """Writes what the peer computes from each of our exports. What it cannot load is recorded, not raised."""
    for directory in sorted(p for p in (work() / "exported").glob("*") if p.is_dir()):
        x = load_file(directory.with_name(f"{directory.name}.rows.safetensors"))["x"]
        try:
            with torch.no_grad():
                acts, x_hat = compute(directory, x)
        except Exception as error:
            directory.with_name(f"{directory.name}.error.txt").write_text(f"{type(error).__name__}: {error}")
            continue
        write(directory, {"acts": acts, "x_hat": x_hat})


def write(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    plain = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    save_file(plain, str(directory.with_name(f"{directory.name}.answers.safetensors")))


def place(name: str) -> Path:
    """An empty directory for a dictionary of the peer's own."""
    directory = work() / "made" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def weights(seed: int, *, unit_norms: bool = True) -> dict[str, torch.Tensor]:
    """A dictionary whose features fire on `rows`: decoder rows, an encoder near their transpose, biases."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=g), dim=-1)
    W_enc = W_dec.T + 0.05 * torch.randn(D_IN, D_SAE, generator=g)
    if not unit_norms:
        norms = 0.5 + 1.5 * torch.rand(D_SAE, generator=g)
        W_dec, W_enc = W_dec * norms[:, None], W_enc / norms
    return {
        "W_enc": W_enc.contiguous(),
        "b_enc": -0.2 * torch.rand(D_SAE, generator=g),
        "W_dec": W_dec.contiguous(),
        "b_dec": torch.randn(D_IN, generator=g),
        "threshold": 0.5 * torch.rand(D_SAE, generator=g),
        "r_mag": 0.3 * torch.randn(D_SAE, generator=g),
        "b_mag": 0.1 * torch.randn(D_SAE, generator=g),
    }


def rows(seed: int, about: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(1000 + seed)
    return about + torch.randn(ROWS, len(about), generator=g)


def report(distribution: str) -> None:
    """The last line printed: versions, for the table."""
    print(
        json.dumps({"version": version(distribution), "torch": torch.__version__, "python": platform.python_version()})
    )
