"""The weights of a model that TransformerLens runs, if they reproduce its forward pass.

The model's own activations decide: each layer's attention pattern, head outputs and MLP output must follow from the
weights, and the logits from the last residual stream. A model that computes something else is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sae.lm.base import ModelError
from sae.lm.weights import TransformerWeights, weights_from

Hooks = list[tuple[str, Callable[..., Tensor]]]
Run = Callable[[Tensor, Hooks], Tensor]  # (tokens, hooks) → logits

KNOWN = ("GPT2LMHeadModel",)
PROBE_TOKENS = 8
TOLERANCE = 1e-4  # relative to the norm; float32 rounding is 100 times smaller


def weights(bridge: Any, run: Run, model_id: str) -> TransformerWeights:
    """Raises: ModelError for an architecture of another kind, or one whose forward pass does not follow from them."""
    kind = str(bridge.cfg.architecture)
    if kind not in KNOWN:
        raise ModelError(
            f"{model_id} is a {kind}. Lenses on weights and parts are exact for models of `sae pretrain` and for GPT-2 "
            "(learned positions, LayerNorm, attention before the MLP), and are refused for others: rotary positions, "
            "RMSNorm, gated MLPs or parallel blocks need other formulas."
        )

    def find(name: str) -> Tensor:
        place, _, part = name.rpartition(".")
        owner = bridge
        for step in place.split(".") if place else []:
            owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
        found: Tensor = getattr(owner, {"w": "weight", "b": "bias"}.get(part, part))
        return found

    found = weights_from(find, n_layers=int(bridge.cfg.n_layers), eps=float(bridge.cfg.eps), has_mlp=True)
    if missed := _missed(found, bridge, run):
        raise ModelError(
            f"{model_id}: {missed} does not follow from the weights as in GPT-2, so sums of parts would not be exact."
        )
    return found


def _missed(weights: TransformerWeights, bridge: Any, run: Run) -> str | None:
    """The first thing in a forward pass that does not follow from the weights; None if everything does."""
    size = min(PROBE_TOKENS, int(bridge.cfg.n_ctx))
    tokens = torch.randint(int(bridge.cfg.d_vocab), (1, size), generator=torch.Generator().manual_seed(0))
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any, name: str) -> Tensor:
        seen[name] = value.detach().float()
        return value

    parts = ("hook_resid_pre", "attn.hook_pattern", "attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out")
    names = [f"blocks.{layer}.{part}" for layer in range(len(weights.layers)) for part in parts]
    names.append("ln_final.hook_in")
    logits = run(tokens, [(name, partial(keep, name=name)) for name in names]).float()
    resid = weights.embedded(tokens)
    for number, layer in enumerate(weights.layers):
        pre, pattern, z, attn_out, post, mlp_out = (seen[f"blocks.{number}.{part}"] for part in parts)
        x = layer.ln1(pre)
        mixed = (pattern @ layer.attn.values(x)).transpose(1, 2)
        written = torch.einsum("bphd,hdm->bpm", z.view_as(mixed), layer.attn.W_O) + layer.attn.b_O
        assert layer.mlp is not None
        pairs = {
            "the residual stream": (resid, pre),
            "the attention pattern": (layer.attn.pattern(x), pattern),
            "the heads' output": (mixed, z.view_as(mixed)),
            "what attention writes": (written, attn_out),
            "what the MLP writes": (post @ layer.mlp.W_out + layer.mlp.b_out, mlp_out),
        }
        for what, (computed, found) in pairs.items():
            if not _close(computed, found):
                return f"{what} of layer {number}"
        resid = pre + attn_out + mlp_out
    if not _close(resid, seen["ln_final.hook_in"]):
        return "the last residual stream"
    return None if _close(weights.logits(resid), logits) else "the logits"


def _close(computed: Tensor, found: Tensor) -> bool:
    return float((computed - found).norm()) <= TOLERANCE * float(found.norm())
