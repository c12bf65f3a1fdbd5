"""The loss of an attention-only model cut off at paths through at most n heads.

With attention patterns and norm scales held at those of the full run, the logits are a sum over paths: the direct one
(order 0), through one head (order 1), through two heads of different layers (order 2: virtual heads) and so on.
Source: Elhage et al. 2021, "Term importance analysis", the algorithm "marginal effect of nth order terms".
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.lm import LanguageModel, ModelError
from sae.lm.weights import AffineNorm, LayerWeights


@torch.inference_mode()
def losses_by_order(
    model: LanguageModel, tokens: Int[Tensor, "contexts pos"], *, contexts_at_once: int = 16
) -> Float[Tensor, "order contexts"]:
    """Mean next-token loss per context, in nats, with paths through at most 0, 1, … n_layers heads.

    The last order is the model itself. Biases of values and outputs enter with the heads, from order 1 on.
    Raises: ModelError for a model with MLPs, whose logits are no such sum.
    """
    if any(layer.mlp is not None for layer in model.weights().layers):
        raise ModelError(
            f"{model.id} has MLPs: with attention patterns held its logits are still no sum over paths. Order-n terms "
            "exist for attention-only models, such as the shipped attn-2l."
        )
    found = [_orders(model, chunk) for chunk in tokens.split(contexts_at_once)]  # type: ignore[no-untyped-call]
    return torch.cat(found, 1)


def _orders(model: LanguageModel, tokens: Int[Tensor, "contexts pos"]) -> Float[Tensor, "order contexts"]:
    weights = model.weights()
    n_layers = len(weights.layers)
    points = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    points.append(f"blocks.{n_layers - 1}.hook_resid_post")
    streams = model.capture_all(tokens, points)
    held = [streams[point] for point in points]
    patterns = [layer.attn.pattern(layer.ln1(x)) for layer, x in zip(weights.layers, held, strict=False)]
    start = weights.embedded(tokens)
    written = [torch.zeros_like(start) for _ in weights.layers]
    losses = []
    for _ in range(n_layers + 1):
        streams_now = [start + sum(written[:layer], torch.zeros_like(start)) for layer in range(n_layers + 1)]
        logits = _at_scale(weights.ln_final, streams_now[-1], held[-1]) @ weights.W_U + weights.b_U
        losses.append(_losses(logits, tokens))
        written = [
            _attention(layer, pattern, x, at)
            for layer, pattern, x, at in zip(weights.layers, patterns, streams_now, held, strict=False)
        ]
    return torch.stack(losses)


def _at_scale(norm: AffineNorm, x: Tensor, held: Tensor) -> Float[Tensor, "contexts pos d_model"]:
    """The norm of x at the scale σ of `held`."""
    normed: Tensor = norm.norm.numerator(x) / norm.norm.scale(held) + norm.bias
    return normed


def _attention(layer: LayerWeights, pattern: Tensor, x: Tensor, held: Tensor) -> Float[Tensor, "contexts pos d_model"]:
    mixed = pattern @ layer.attn.values(_at_scale(layer.ln1, x, held))
    written: Tensor = torch.einsum("bhpd,hdm->bpm", mixed, layer.attn.W_O) + layer.attn.b_O
    return written


def _losses(logits: Tensor, tokens: Tensor) -> Float[Tensor, " contexts"]:
    found = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten().to(logits.device), reduction="none"
    )
    return found.view(len(tokens), -1).double().mean(1)
