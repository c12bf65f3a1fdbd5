"""Splits a feature's pre-activation into what comes from source tokens through each head and by the direct path.

In the block of the dictionary's hook point, the pre-activation is linear in what enters the block once three things are
held fixed: the attention pattern, the norms' scales, and which neurons of a ReLU are on. It is then a case of parts and
readers (`sae.circuits.parts`): the parts of the stream that enters the block, read at each source through each head's
OV circuit, and at the position itself past attention; they sum to it exactly. For another activation function its slope
replaces the ReLU's gate: gradient × input.
Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (paths through OV).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.circuits.parts import Parts, Reader, contributions, stream_parts
from sae.dictionary.autoencoder import SAE, refuse_row_scale
from sae.lm import LanguageModel, ModelError, NativeModel, layer_of
from sae.lm.transformer import Block, norm_part, norm_scale

HOOK_Z = "attn.hook_z"
HOOKS = ("hook_attn_out", "hook_resid_mid", "mlp.hook_post", "hook_mlp_out", "hook_resid_post")


class Paths(NamedTuple):
    """The parts of one feature's pre-activation at one position, in units of the pre-activation.

    `direct[part]` comes from the position's own residual stream, bypassing attention; `heads[part, head, source]` from
    a source token through one head. `parts` names the parts of the stream that enters the block: token and position
    embedding in the first block, the whole stream in later ones. `rest` is the sum of all biases and, unless `exact`,
    of what the slope misses.
    """

    parts: list[str]
    direct: Float[Tensor, " part"]
    heads: Float[Tensor, "part head source"]
    rest: float
    pre_act: float
    exact: bool


def patterns(model: LanguageModel, ids: Sequence[int], *, layer: int) -> Float[Tensor, "head dst src"]:
    """Attention pattern of each head of a block; rows sum to 1. Raises: ModelError if the model does not show it."""
    with model.lock, torch.inference_mode():
        return model.attention(torch.tensor([list(ids)]), layer).pattern.cpu()


def paths(model: LanguageModel, sae: SAE, ids: Sequence[int], *, feature: int, position: int, hook_point: str) -> Paths:
    """Splits the pre-activation of `feature` at `position` into its paths.

    A dictionary of head outputs (hook_z) reads values only, so that its parts are `pattern · value · W_enc`: exact, and
    in any model (Kissane et al. 2024, "direct feature attribution"). Raises: ModelError for other hook points unless
    the model is native, and for a hook point before attention; ValueError for a feature or position that does not
    exist.
    """
    refuse_row_scale(sae, "paths")
    layer, name = layer_of(hook_point), hook_point.partition(".")[2].partition(".")[2]
    if name not in (*HOOKS, HOOK_Z):
        raise ModelError(f"{hook_point} comes before attention, so no head of its block pushes its features.")
    if not 0 <= feature < sae.d_sae:
        raise ValueError(f"paths: feature {feature} does not exist; features are 0 … {sae.d_sae - 1:,}.")
    if not 0 <= position < len(ids):
        raise ValueError(f"paths: position {position} is outside the prompt's 0 … {len(ids) - 1}.")
    if name == HOOK_Z:
        return _through_values(model, sae, ids[: position + 1], feature, layer)
    seen = ids[: position + 1]
    block = _block(model, layer)
    parts = _entering(model, seen, layer)
    into_attn, into_stream = _pushes(model, block, sae, hook_point, feature, seen)
    weights, point = model.weights().layers[layer], f"blocks.{layer}.hook_resid_pre"
    through_ov = torch.einsum("hmd,hde,e->mh", weights.attn.W_V, weights.attn.W_O, into_attn)
    by_head = Reader("what attention writes", point, through_ov, torch.zeros_like(through_ov[0]), weights.ln1)
    past_attention = Reader("the stream past attention", point, into_stream[:, None], torch.zeros_like(into_stream[:1]))
    read = contributions(parts, by_head).values.transpose(1, 2)  # [part, head, source]
    heads = (read * model.attention(torch.tensor([list(seen)]), layer).pattern[:, -1].to(read)).cpu()
    direct = contributions(parts, past_attention).values[:, -1, 0].cpu()
    with torch.no_grad():
        x = model.capture(torch.tensor([list(seen)]), hook_point)[0, -1].cpu()
        pre_act = float(sae.pre_acts(x)[feature])
    names = ["token", "position"] if layer == 0 else ["residual stream"]
    exact = (
        block.attn_only or block.mlp.act_fn is torch.nn.functional.relu or name in ("hook_attn_out", "hook_resid_mid")
    )
    return Paths(names, direct, heads, pre_act - float(heads.sum() + direct.sum()), pre_act, exact)


@torch.inference_mode()
def _through_values(model: LanguageModel, sae: SAE, ids: Sequence[int], feature: int, layer: int) -> Paths:
    """Σ over heads and source tokens of `pattern · (value · W_enc)`, at the last position."""
    with model.lock:
        tokens = torch.tensor([list(ids)])
        attended = model.attention(tokens, layer)
        z = model.capture(tokens, f"blocks.{layer}.{HOOK_Z}")[0, -1].cpu()
    pattern, values = attended.pattern[:, -1].cpu(), attended.values.cpu()
    encoder = sae.W_enc[:, feature].view(values.shape[1:])
    heads = pattern * torch.einsum("shd,hd->hs", values, encoder)
    pre_act = float(sae.pre_acts(z)[feature])
    return Paths(["value"], torch.zeros(1), heads[None], pre_act - float(heads.sum()), pre_act, True)


def _block(model: LanguageModel, layer: int) -> Block:
    """Raises: ModelError for a model that is not native, or a layer that it does not have."""
    if not isinstance(model, NativeModel):
        raise ModelError(
            f"{model.id} runs through TransformerLens; there, attention paths are available for dictionaries of head "
            "outputs (attn.hook_z) only. For other hook points use a native model (tiny-relu-1l, or one that `sae "
            "pretrain` makes)."
        )
    if not 0 <= layer < model.n_layers:
        raise ModelError(f"{model.id} has layers 0 … {model.n_layers - 1}; got {layer}.")
    block = model.module.blocks[layer]
    assert isinstance(block, Block)
    return block


def _entering(model: LanguageModel, ids: Sequence[int], layer: int) -> list[Parts]:
    """What enters a block: token and position embedding, or in later blocks the whole stream."""
    point = f"blocks.{layer}.hook_resid_pre"
    if layer == 0:
        return stream_parts(model, ids, point=point)
    return [Parts("stream", None, model.capture(torch.tensor([list(ids)]), point)[:1])]


def _pushes(
    model: LanguageModel, block: Block, sae: SAE, hook_point: str, feature: int, ids: Sequence[int]
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Gradient of the pre-activation by attention's output and by the stream past it, at a fixed norm scale."""
    at, _, name = hook_point.removeprefix("blocks.").partition(".")
    points = [f"blocks.{at}.hook_attn_out", f"blocks.{at}.hook_resid_pre"]
    streams = model.capture_all(torch.tensor([list(ids)]), points)
    with model.lock, torch.inference_mode(False), torch.enable_grad():
        attn_leaf, stream_leaf = (streams[point][0, -1].detach().clone().requires_grad_(True) for point in points)
        resid_mid = attn_leaf + stream_leaf
        x = {"hook_attn_out": attn_leaf, "hook_resid_mid": resid_mid, "hook_resid_post": resid_mid}
        if not block.attn_only:
            # LayerNorm at a fixed scale: only the gates of the neurons are then not linear
            normed = norm_part(block.ln2, resid_mid, norm_scale(block.ln2, resid_mid.detach())) + block.ln2.bias
            post = block.mlp.post(normed)
            mlp_out = block.mlp.out(post)
            x |= {"mlp.hook_post": post, "hook_mlp_out": mlp_out, "hook_resid_post": resid_mid + mlp_out}
        encoder = sae.W_enc[:, feature].detach().to(resid_mid.device)
        found = torch.autograd.grad(x[name] @ encoder, [attn_leaf, stream_leaf], allow_unused=True)
    into_attn, into_stream = (torch.zeros_like(resid_mid) if g is None else g for g in found)
    return into_attn.detach(), into_stream.detach()
