"""SAELens' directory layout: `cfg.json` and `sae_weights.safetensors`. By file, not by import: it cannot share our
environment (it needs an older transformer-lens)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae.checkpoint import write_json, write_tensors
from sae.model import SAE

ARCHITECTURES = {"relu": "standard", "topk": "topk"}
# Without a version its loader takes an old path that loses hook_name; the layout is the one introduced with 6.0.
LAYOUT_VERSION = "6.0.0"


def config_of(sae: SAE) -> dict[str, Any]:
    """SAELens' cfg.json for a dictionary whose pre-bias is its decoder bias."""
    trained = sae.config.get("train", {})
    config: dict[str, Any] = {
        "architecture": ARCHITECTURES[sae.activation],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": LAYOUT_VERSION,
            "model_name": sae.config.get("model", {}).get("id", "unknown"),
            "hook_name": sae.config.get("hook_point", "unknown"),
            "hook_head_index": None,
            "prepend_bos": True,
            "dataset_path": sae.config.get("store", {}).get("text", "unknown"),
            "training_tokens": trained.get("tokens"),
            "recipe": trained.get("recipe"),
        },
    }
    if sae.activation == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    return config


def write(sae: SAE, out: Path) -> Path:
    """Writes the layout into `out`; encode and decode are the same functions there, without loss."""
    write_tensors(out / "sae_weights.safetensors", sae.tensors(), {})
    write_json(out / "cfg.json", config_of(sae))
    return out
