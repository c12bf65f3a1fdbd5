"""Llamascopium's side of scripts/check_peers.py. Only its own dictionaries are checked: we do not write its layout."""

from __future__ import annotations

import math

import sides
import torch
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

HOOK = "blocks.3.hook_mlp_out"
OURS = {
    "W_E": "W_enc",
    "b_E": "b_enc",
    "W_D": "W_dec",
    "b_D": "b_dec",
    "activation_function.log_jumprelu_threshold": "threshold",
}


def make(name: str, seed: int, *, norm: float | None = None, weighted: bool = False, **more: object) -> None:
    """A dictionary that Llamascopium saves, with its answers.

    `norm`: trained on activations scaled by their average norm. `weighted`: features are chosen by activation times
    decoder norm; for topk the answers are weighted in the same way.
    """
    config = SAEConfig(
        hook_point_in=HOOK,
        hook_point_out=HOOK,
        d_model=sides.D_IN,
        expansion_factor=sides.D_SAE / sides.D_IN,
        norm_activation="inference" if norm is None else "dataset-wise",
        sparsity_include_decoder_norm=weighted,
        device="cpu",
        dtype=torch.float32,
        top_k=sides.K,
        **more,
    )
    sae = SparseAutoEncoder(config)
    given = sides.weights(seed, unit_norms=False)
    with torch.no_grad():
        for theirs, parameter in sae.named_parameters():
            value = given[OURS[theirs]]
            parameter.copy_(value.clamp_min(0.01).log() if "threshold" in theirs else value)
    if norm is not None:
        sae.set_dataset_average_activation_norm({HOOK: norm})
    directory = sides.place(name)
    sae.cfg.save_hyperparameters(directory)
    sae.save_checkpoint(directory / "sae_weights.safetensors")
    scale = 1.0 if norm is None else math.sqrt(sides.D_IN) / norm
    x = sides.rows(seed, given["b_dec"]) / scale
    with torch.no_grad():
        acts = sae.encode(x * scale)
        x_hat = sae.decode(acts) / scale
        if weighted and config.act_fn == "topk":
            acts = acts * sae.decoder_norm()
    sides.write(directory, {"x": x, "acts": acts / scale, "x_hat": x_hat})


if __name__ == "__main__":
    sides.answer(lambda directory, x: (x, x))
    make("relu", 0, act_fn="relu")
    make("relu, no decoder bias", 2, act_fn="relu", use_decoder_bias=False)
    make("relu, input scale, weighted by decoder norm", 1, act_fn="relu", norm=17.0, weighted=True)
    make("jumprelu", 4, act_fn="jumprelu")
    make("jumprelu, input scale, weighted by decoder norm", 5, act_fn="jumprelu", norm=3.0, weighted=True)
    make("topk", 6, act_fn="topk")
    make("topk, input scale, weighted by decoder norm", 7, act_fn="topk", norm=3.0, weighted=True)
    sides.report("llamascopium")
