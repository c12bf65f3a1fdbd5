"""Checks an exported dictionary with the sae-lens package: same encode and decode as our file, to 1e-5.

    python scripts/check_saelens.py EXPORTED_DIR NATIVE_DIR

Run it with a Python that has sae-lens installed: that package wants an older transformer-lens and cannot share our
environment. Ours is not imported; the native file is read and computed by formula, in float64.
Exit status: 0 when both agree, 1 when they differ, 2 when sae-lens is missing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROWS = 1024
TOLERANCE = 1e-5


def by_formula(native: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f = act((x − b_dec) W_enc + b_enc) and x̂ = f W_dec + b_dec of a native dictionary."""
    config = json.loads((native / "config.json").read_text())
    tensors = {name: tensor.double() for name, tensor in load_file(native / "sae.safetensors").items()}
    acts = ((x.double() - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    if config["activation"] == "topk":
        values, indices = acts.topk(config["k"], dim=-1)
        acts = torch.zeros_like(acts).scatter(-1, indices, values)
    return acts, acts @ tensors["W_dec"] + tensors["b_dec"]


def rows_for(native: Path, generator: torch.Generator) -> torch.Tensor:
    """Random rows about the decoder bias, of a size at which features fire: some alone, some together."""
    tensors = load_file(native / "sae.safetensors")
    d_sae, d_in = tensors["W_dec"].shape
    features = torch.rand(ROWS, d_sae, generator=generator) * (torch.rand(ROWS, d_sae, generator=generator) < 8 / d_sae)
    noise = torch.randn(ROWS, d_in, generator=generator)
    return tensors["b_dec"] + 2 * features @ tensors["W_dec"] + 0.1 * noise


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        from sae_lens import SAE
    except ImportError as error:
        print(f"check_saelens: needs a Python with sae-lens installed ({error}).", file=sys.stderr)
        return 2
    exported, native = map(Path, arguments)
    loaded = SAE.load_from_disk(str(exported), device="cpu")
    x = rows_for(native, torch.Generator().manual_seed(0))
    with torch.no_grad():
        acts = loaded.encode(x)
        x_hat = loaded.decode(acts)
    expected_acts, expected_x_hat = by_formula(native, x)
    worst = 0.0
    for name, found, expected in (("encode", acts, expected_acts), ("decode", x_hat, expected_x_hat)):
        difference = (found.double() - expected).abs().max().item()
        worst = max(worst, difference)
        print(f"{name}: largest difference {difference:.2e} (largest value {expected.abs().max():.3g})")
    hook_name = json.loads((native / "config.json").read_text()).get("hook_point")
    active = (expected_acts > 0).sum(-1).double().mean()
    print(f"{len(x)} rows, {active:.1f} features on in each; hook {loaded.cfg.metadata.hook_name}")
    if loaded.cfg.metadata.hook_name != hook_name:
        print(f"hook_name was lost: expected {hook_name}")
        return 1
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
