"""The linear paths of a model that TransformerLens runs.

Weights name a path (W_O, W_out, the norm after a sublayer). The model's own forward pass decides whether it is right:
a small change at the hook point must arrive at the final norm as the path says, up to one factor, which is measured
(Granite's residual multiplier, for example). So an architecture that computes something else has no path, and says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.lm.paths import DirectPath, NoLinearPath, Norm, Readout

Hooks = list[tuple[str, Callable[..., Tensor]]]
Run = Callable[[Tensor, Hooks], Tensor]  # (tokens, hooks) → logits

FINAL = "ln_final.hook_in"
PROBE_TOKENS = 6
# Of a change that the path predicts: the share that the model's rounding may miss it by
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
SUBLAYERS = (("attn", "attn.o", "ln1_post"), ("mlp", "mlp.out", "ln2_post"))
REASONS = (
    (r"attn\..*(pattern|scores|hook_q|hook_k|hook_rot|q_norm|k_norm)", "it acts through the softmax of attention"),
    (r"attn\.(hook_v|v\.)", "it acts on other positions, through an attention pattern that depends on the text"),
    (r"mlp\..*(pre|gate|in\.hook_out|expert|router)", "an activation function or a gate lies between"),
    (r"(hook_in|hook_normalized|hook_scale|ln\w*\.hook_out|_input)$", "layers read it, and it is not a part of the "
     "residual stream"),
)  # fmt: off


@torch.no_grad()
def readout(bridge: Any, run: Run) -> Readout:
    """The final norm, W_U, the factor on the logits and their soft cap. Raises: NoLinearPath if they are something
    else."""
    name = "the residual stream of this model"
    try:
        norm, W_U = _norm(bridge.ln_final, bridge.cfg), bridge.W_U.detach()
    except AttributeError as error:
        raise NoLinearPath(name, "TransformerLens opens it without a final norm or an unembedding") from error
    if norm is None:
        raise NoLinearPath(name, "its final norm is neither a LayerNorm nor an RMSNorm")
    cap = float(getattr(bridge.cfg, "output_logits_soft_cap", None) or -1)
    found = Readout(norm, W_U.float(), soft_cap=cap if cap > 0 else None)
    tokens, place = _tokens(bridge), "ln_final.hook_out"
    h = _values(run, tokens, [place])[place]
    change = torch.zeros_like(h)
    change[0, -1] = _noise(h.shape[-1]).to(h) * h[0, -1].norm() * 0.1 / h.shape[-1] ** 0.5

    def logits(sign: int) -> Tensor:
        return found.uncapped(run(tokens, [(place, lambda value, hook: value + sign * change)])[0, -1].double())

    measured, predicted = (logits(1) - logits(-1)) / 2, change[0, -1].double() @ W_U.double()
    sure = measured.isfinite()  # a logit at its soft cap has lost its digits
    factor = _factor(measured[sure], predicted[sure], _tolerance(h.dtype))
    if factor is None:
        raise NoLinearPath(name, "its logits are not the product of the normalised residual stream with W_U")
    return replace(found, factor=factor)


@torch.no_grad()
def direct_path(bridge: Any, run: Run, hook_point: str) -> DirectPath:
    """The path that the model's forward pass confirms. Raises: NoLinearPath with the reason if there is none."""
    for claimed, own in _claims(bridge, hook_point):
        confirmed = _confirmed(bridge, run, hook_point, claimed, own)
        if confirmed is not None:
            return confirmed
    raise NoLinearPath(hook_point, "the forward pass of this model does not agree with the path through its weights")


def _claims(bridge: Any, hook_point: str) -> Iterator[tuple[DirectPath, str | None]]:
    """What the weights say about the path, and the sublayer that computes it (None: x is a part of the stream)."""
    hooks = bridge.hook_dict
    block = (re.match(r"blocks\.\d+\.", hook_point) or [""])[0]

    def here(*names: str) -> bool:
        """Names are aliases: `hook_z` is `o.hook_in`, and a mixture's `mlp.hook_post` its `hook_out`."""
        return any(hooks.get(f"{block}{name}") is hooks[hook_point] for name in names)

    stream = ("hook_in", "hook_out") if block else ("embed.hook_out", "pos_embed.hook_out")
    if hook_point.endswith(".hook_resid_mid") or here(*stream):
        yield DirectPath(), None
        return
    for part, writer, post in SUBLAYERS:
        if not block:
            break
        if here(f"{post}.hook_out"):
            yield DirectPath(), None
            return
        if hook_point == f"{block}hook_{part}_out" and not here(f"{part}.hook_out"):  # already times the multiplier
            yield DirectPath(), part
            return
        norm, at = None, f"{block}{post}.hook_in"
        if at in hooks:
            norm = _norm(getattr(bridge.blocks[_layer(hook_point)], post), bridge.cfg)
            if norm is None:
                raise NoLinearPath(hook_point, f"{block}{post} is neither a LayerNorm nor an RMSNorm")
        path = DirectPath(norm=norm, norm_input=at if norm else None)
        if here(f"{writer}.hook_in"):
            weight = _weight(bridge.blocks[_layer(hook_point)], writer)
            yield replace(path, matrix=weight.T), part  # torch's Linear
            yield replace(path, matrix=weight), part  # GPT-2's Conv1D
            return
        if here(f"{writer}.hook_out", f"{part}.hook_out", f"{post}.hook_in"):
            yield path, part
            return
    reason = next(
        (why for pattern, why in REASONS if re.search(pattern, hook_point)),
        "TransformerLens shows no linear layer from it to the residual stream",
    )
    raise NoLinearPath(hook_point, reason)


def _layer(hook_point: str) -> int:
    return int(hook_point.split(".")[1])


def _weight(block: Any, name: str) -> Tensor:
    for part in name.split("."):
        block = getattr(block, part)
    weight: Tensor = block.original_component.weight.detach()
    return weight.float()


def _confirmed(bridge: Any, run: Run, hook_point: str, path: DirectPath, own: str | None) -> DirectPath | None:
    """The path with its measured factor; None if the forward pass disagrees."""
    tokens = _tokens(bridge)
    block = hook_point.rpartition("hook_resid_mid")[0]
    place = f"{block}hook_resid_post" if block else hook_point  # the middle of a block stays in the stream
    held = [name for name in _sublayer_outputs(bridge, hook_point) if not own or not _is_of(name, hook_point, own)]
    clean = _values(run, tokens, [*held, place, FINAL, *([path.norm_input] if path.norm_input else [])])
    x, resid = clean[place], clean[FINAL][0, -1].double()
    flat = x[0, -1].flatten()
    if path.matrix is not None and path.matrix.shape[0] != len(flat):
        return None
    read = clean[path.norm_input][0, -1].double() if path.norm_input else resid
    step = _noise(len(flat)).double().to(flat.device)
    written = step if path.matrix is None else step @ path.matrix.double()
    step, written = (part * read.norm() / (2 * written.norm()) for part in (step, written))
    predicted = written
    if path.norm is not None:
        up, down = (path.norm.numerator(y) / path.norm.scale(y) for y in (read + written, read - written))
        predicted = (up - down) / 2

    def arrived(sign: int, hold: Sequence[str]) -> Tensor:
        change = torch.zeros_like(x)
        change[0, -1] = (sign * step).to(x).view_as(change[0, -1])
        hooks: Hooks = [(name, partial(lambda value, hook, kept: kept, kept=clean[name])) for name in hold]
        hooks.append((place, lambda value, hook: value + change))
        return _values(run, tokens, [FINAL], hooks)[FINAL][0, -1].double()

    def measured(hold: Sequence[str]) -> Tensor:
        return (arrived(1, hold) - arrived(-1, hold)) / 2

    through, tolerance = measured(held), _tolerance(x.dtype) * (1 + float(1e-2 * resid.norm() / predicted.norm()))
    factor = _factor(through, predicted, tolerance)
    if factor is None:
        return None
    alone = not block and float((measured([]) - through).norm()) <= tolerance * float(through.norm())
    return replace(path, factor=factor, alone=alone)


def _sublayer_outputs(bridge: Any, hook_point: str) -> list[str]:
    """Hook points of what attention, MLPs and their like add to the stream, from the hook point's block on."""
    first = _layer(hook_point) if hook_point.startswith("blocks.") else 0
    found: dict[int, str] = {}
    for name, hook in bridge.hook_dict.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(?!ln|norm|layer_norm)(\w+)\.hook_out", name)
        if match and int(match[1]) >= first and hook is not bridge.hook_dict[hook_point]:
            found.setdefault(id(hook), name)
    return list(found.values())


def _is_of(name: str, hook_point: str, sublayer: str) -> bool:
    return name.startswith(f"blocks.{_layer(hook_point)}.{sublayer}.")


def _factor(measured: Tensor, predicted: Tensor, tolerance: float) -> float | None:
    """The f with `measured = f · predicted`; 1 if that is within the tolerance, None if there is no such f."""
    size = float(predicted.norm())
    if float((measured - predicted).norm()) <= tolerance * size:
        return 1.0
    factor = float(measured @ predicted) / max(size**2, 1e-30)
    fits = float((measured - factor * predicted).norm()) <= tolerance * abs(factor) * size
    return factor if fits and factor > 0 else None


def _norm(component: Any, cfg: Any) -> Norm | None:
    """A norm by what it does to vectors, whatever its parameters mean (Gemma's weight is an offset from 1).

    For x of ±1 the output's odd part is x · weight / √(1 + ε); a smaller x gives ε, and a constant x tells LayerNorm.
    None if another vector is not normalised accordingly.
    """
    like = next(component.parameters(), None)
    width = int(cfg.d_model)
    sign = torch.ones(width, dtype=torch.float32 if like is None else like.dtype)
    sign[1::2] = -1
    if like is not None:
        sign = sign.to(like.device)

    @torch.no_grad()
    def odd(x: Tensor) -> Tensor:
        up, down = (component(y[None, None])[0, 0].double() for y in (x, -x))
        found: Tensor = (up - down) / 2
        return found

    whole = odd(sign)
    mean = float(sign.double().mean())
    centred = float(odd(torch.ones_like(sign)).norm()) < 1e-2 * float(whole.norm())
    x = sign.double() - mean if centred else sign.double()
    small = 1e-3
    share = float(odd(small * sign).norm() / whole.norm())  # √((v + ε) / (v + ε / small²)), v the mean square of x
    v = float(x.pow(2).mean())
    eps = max(0.0, v * (1 - share**2) / (share**2 / small**2 - 1)) if share < 1 else 0.0
    norm = Norm((whole * (v + eps) ** 0.5 / x).float(), centred, eps)
    other = _noise(width).to(sign)
    expected = norm.numerator(other.double()) / norm.scale(other.double())
    fits = float((odd(other) - expected).norm()) <= _tolerance(sign.dtype) * float(expected.norm())
    return norm if fits else None


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, 1e-3)


def _noise(size: int) -> Float[Tensor, " size"]:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _tokens(bridge: Any) -> Int[Tensor, "1 pos"]:
    size = min(PROBE_TOKENS, int(bridge.cfg.n_ctx))
    return torch.randint(int(bridge.cfg.d_vocab), (1, size), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _values(run: Run, tokens: Tensor, names: Sequence[str], hooks: Hooks | None = None) -> Mapping[str, Tensor]:
    """The values at some hook points; a value that a hook of `hooks` changes at the same place is the changed one."""
    found: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any, name: str) -> Tensor:
        found[name] = value.clone()
        return value

    run(tokens, [*(hooks or []), *((name, partial(keep, name=name)) for name in names)])
    return found
