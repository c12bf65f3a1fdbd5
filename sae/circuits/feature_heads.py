"""Which attention heads write what a feature reads, and read what it writes: by the weights alone.

A head can move a feature through its output matrix, and hear it through its query, key or value matrix. How strongly is
the norm of the product, beside that of random directions: every matrix passes on some of every direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae.circuits.parts import WHOLE_STREAM
from sae.dictionary.autoencoder import SAE, refuse_row_scale, refuse_transcoder
from sae.lm import LanguageModel, layer_of

DRAWS = 200
Way = Literal["writes", "q", "k", "v"]


@dataclass(frozen=True)
class HeadLink:
    """One head and one feature: `strength` is ‖matrix · direction‖, `random` its mean over random directions of equal
    norm, and 95% of those are below `random_95`."""

    layer: int
    head: int
    way: Way
    strength: float
    random: float
    random_95: float


@torch.inference_mode()
def heads_of_feature(
    model: LanguageModel, sae: SAE, feature: int, hook_point: str, *, seed: int = 0
) -> tuple[list[HeadLink], list[HeadLink]]:
    """Heads that write the feature, and heads that read it, the strongest in proportion to random directions first.

        writes: ‖W_O e‖, e the feature's encoder column        reads: ‖(d − mean d) · w @ W_{Q,K,V}‖

    d is what the feature adds to the residual stream, w the weight of the norm before attention; its scale, which
    differs by position, is left out. Both lists may be empty: a feature of neurons has no linear path from heads, one
    of the last layer has no head that reads it.
    Raises: ModelError for a model whose weights are not known by what they do; ValueError for a feature that does not
    exist, or a dictionary of another kind.
    """
    refuse_transcoder(sae, "heads of a feature")
    refuse_row_scale(sae, "heads of a feature")
    if not 0 <= feature < sae.d_sae:
        raise ValueError(f"heads: feature {feature} does not exist; features are 0 … {sae.d_sae - 1:,}.")
    generator = torch.Generator().manual_seed(seed)
    writing = _writing(model, sae.W_enc[:, feature].cpu(), hook_point, generator)
    written = model.direct_path(hook_point).linear(sae.W_dec[feature][None].to(model.device))[0].cpu()
    reading = _reading(model, written, hook_point, generator)
    writing, reading = (sorted(each, key=lambda link: -link.strength / link.random) for each in (writing, reading))
    return writing, reading


def _writing(
    model: LanguageModel, encoder: Float[Tensor, " d_in"], hook_point: str, generator: torch.Generator
) -> list[HeadLink]:
    layer, name = layer_of(hook_point), hook_point.split(".", 2)[2]
    layers = model.weights().layers
    if name == "attn.hook_z":  # columns of x are the heads' own
        width = len(encoder) // model.n_heads
        own = [torch.eye(len(encoder))[h * width : (h + 1) * width] for h in range(model.n_heads)]
        return [_link(layer, h, "writes", rows, encoder, generator) for h, rows in enumerate(own)]
    if name == "hook_attn_out":
        reached = [layer]
    elif name in WHOLE_STREAM:
        reached = list(range(layer + (name != "hook_resid_pre")))
    else:
        return []
    return [
        _link(number, head, "writes", W_O.cpu(), encoder, generator)
        for number in reached
        for head, W_O in enumerate(layers[number].attn.W_O)
    ]


def _reading(
    model: LanguageModel, written: Float[Tensor, " d_model"], hook_point: str, generator: torch.Generator
) -> list[HeadLink]:
    first = layer_of(hook_point) + (not hook_point.endswith("hook_resid_pre"))
    found = []
    for number, layer in list(enumerate(model.weights().layers))[first:]:
        for way, W in (("q", layer.attn.W_Q), ("k", layer.attn.W_K), ("v", layer.attn.W_V)):
            for head, matrix in enumerate(W):
                read = layer.ln1.norm.transposed(matrix.T).cpu()  # [d_head, d_model], with centring and the weight
                found.append(_link(number, head, way, read, written, generator))  # type: ignore[arg-type]
    return found


def _link(
    layer: int,
    head: int,
    way: Way,
    matrix: Float[Tensor, "out d"],
    direction: Float[Tensor, " d"],
    generator: torch.Generator,
) -> HeadLink:
    random = torch.randn(DRAWS, len(direction), generator=generator)
    random = random / random.norm(dim=-1, keepdim=True) * direction.norm()
    blind = (random @ matrix.float().T).norm(dim=-1)
    strength = float((matrix.float() @ direction.float()).norm())
    return HeadLink(layer, head, way, strength, float(blind.mean().clamp_min(1e-12)), float(blind.quantile(0.95)))
