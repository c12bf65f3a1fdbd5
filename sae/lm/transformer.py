"""The native transformer in plain torch, with scaled-dot-product attention.

Its parameters have the names of TransformerLens' native bridge, so both open the same safetensors file: the bridge has
all TransformerLens tools, `sae.lm.NativeModel` is faster. Shapes: batch, pos, d_model, d_mlp, d_vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def solu(x: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
    """SoLU(x) = x · softmax(x). Source: Elhage et al. 2022, "Softmax Linear Units"."""
    return x * x.softmax(-1)


INITIAL_STD = 0.02  # of GPT-2's initial weights
SINUSOID_SIZE = 0.5
# `solu_ln`: TransformerLens' name for SoLU followed by a LayerNorm, as in the paper.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "solu_ln": solu}


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a native transformer; `n_ctx` is the context length in tokens, `attn_only` leaves out the MLPs."""

    d_model: int = 128
    d_mlp: int = 512
    n_heads: int = 12
    d_head: int = 16
    n_layers: int = 1
    n_ctx: int = 256
    d_vocab: int = 8192
    act_fn: str = "relu"
    attn_only: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("act_fn", "attn_only") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"transformer config: {name} must be a positive integer, got {value!r}")
        if self.act_fn not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise ValueError(f"transformer config: act_fn must be one of {known}, got {self.act_fn!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields; those added after version 0.1 only where they differ from their default, because a model's
        identity is a hash of this."""
        return {k: v for k, v in asdict(self).items() if k != "attn_only" or v}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TransformerConfig:
        """The reverse of `to_dict`; other keys are ignored. Raises: KeyError for a missing field."""
        added = {"attn_only": settings.get("attn_only", False)}
        return cls(**{name: settings[name] for name in cls.__dataclass_fields__.keys() - added.keys()}, **added)


Hook = Callable[[str, Tensor], Tensor]


def no_hook(name: str, value: Tensor) -> Tensor:
    return value


class Attention(nn.Module):
    """Causal multi-head attention with biases on q, k, v and o."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.n_heads * config.d_head
        self.n_heads, self.d_head = config.n_heads, config.d_head
        self.q = nn.Linear(config.d_model, width)
        self.k = nn.Linear(config.d_model, width)
        self.v = nn.Linear(config.d_model, width)
        self.o = nn.Linear(width, config.d_model)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], hook: Hook = no_hook
    ) -> Float[Tensor, "batch pos d_model"]:
        """`o(z)`, z the heads' outputs; q, k, v and z are [batch, pos, n_heads · d_head], head by head."""
        batch, pos, _ = x.shape

        def heads(name: str, projected: Tensor) -> Tensor:  # [batch, n_heads, pos, d_head]
            return hook(name, projected).view(batch, pos, self.n_heads, self.d_head).transpose(1, 2)

        parts = (("hook_q", self.q), ("hook_k", self.k), ("hook_v", self.v))
        q, k, v = (heads(name, part(x)).to(x.dtype) for name, part in parts)
        with torch.autocast(x.device.type, enabled=False):  # narrow heads: bfloat16 takes twice as long on a CPU
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(hook("hook_z", z.transpose(1, 2).reshape(batch, pos, -1)))
        return out

    def pattern(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "head dst src"]:
        """softmax(q k / √d_head), causal: how much each head at position `dst` attends to position `src`."""
        q, k = (part(x).view(len(x), self.n_heads, self.d_head).transpose(0, 1) for part in (self.q, self.k))
        scores: Tensor = q @ k.transpose(1, 2) / self.d_head**0.5
        later = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1)


class Mlp(nn.Module):
    """`out(act(in(x)))`; `post` computes `act(in(x))`, which dictionaries are trained on by default.

    With SoLU, `post` includes the LayerNorm that follows it: neurons are measured after the norm, as `out` reads them.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.add_module("in", nn.Linear(config.d_model, config.d_mlp))
        self.out = nn.Linear(config.d_mlp, config.d_model)
        self.act_fn = ACTIVATIONS[config.act_fn]
        self.ln = nn.LayerNorm(config.d_mlp) if config.act_fn == "solu_ln" else None

    def post(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        post = self.act_fn(self.get_submodule("in")(x))
        return post if self.ln is None else self.ln(post)


def norm_scale(norm: nn.LayerNorm, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
    """σ of a LayerNorm at x: √(variance + ε)."""
    return (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()


def norm_part(
    norm: nn.LayerNorm, part: Float[Tensor, "*batch d"], scale: Float[Tensor, "*broadcast 1"]
) -> Float[Tensor, "*batch d"]:
    """What one summand of x adds to LayerNorm(x), given σ of x: linear in the summand, without the norm's bias."""
    return (part - part.mean(-1, keepdim=True)) / scale * norm.weight


class Block(nn.Module):
    """Pre-LayerNorm block: attention, then the MLP if the model has one, both added to the residual stream."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.name = f"blocks.{layer}"
        self.ln1 = nn.LayerNorm(config.d_model)
        self.attn = Attention(config)
        self.attn_only = config.attn_only
        if not config.attn_only:
            self.ln2 = nn.LayerNorm(config.d_model)
            self.mlp = Mlp(config)

    def forward(self, resid: Tensor, hook: Hook = no_hook) -> Tensor:
        resid = hook(f"{self.name}.hook_resid_pre", resid)
        attn_out = self.attn(self.ln1(resid), lambda name, value: hook(f"{self.name}.attn.{name}", value))
        resid = resid + hook(f"{self.name}.hook_attn_out", attn_out)
        if self.attn_only:
            return hook(f"{self.name}.hook_resid_post", resid)
        resid = hook(f"{self.name}.hook_resid_mid", resid)
        normalised = hook(f"{self.name}.mlp.hook_in", self.ln2(resid))
        post = hook(f"{self.name}.mlp.hook_post", self.mlp.post(normalised))
        resid = resid + hook(f"{self.name}.hook_mlp_out", self.mlp.out(post))
        return hook(f"{self.name}.hook_resid_post", resid)


def sinusoids(n_ctx: int, d_model: int) -> Float[Tensor, "pos d_model"]:
    """sin and cos, in turns, of pos · 1000^(−2i / d_model).

    As in Vaswani et al. 2017, section 3.5, but with 1000 instead of 10,000, because contexts are short.
    """
    rates = 1000.0 ** (-torch.arange((d_model + 1) // 2) / (d_model / 2))
    angles = torch.arange(n_ctx)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :d_model]


class Transformer(nn.Module):
    """Token and learned position embeddings, `n_layers` blocks, final LayerNorm, untied unembedding."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        seed: int = 0,
        attention_std: float = INITIAL_STD,
        sinusoid_positions: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.d_vocab, config.d_model)
        self.pos_embed = nn.Embedding(config.n_ctx, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_final = nn.LayerNorm(config.d_model)
        self.unembed = nn.Linear(config.d_model, config.d_vocab, bias=False)
        self._initialise(seed, attention_std)
        if sinusoid_positions:
            self.pos_embed.weight.data.copy_(SINUSOID_SIZE * sinusoids(config.n_ctx, config.d_model))

    @torch.no_grad()
    def _initialise(self, seed: int, attention_std: float) -> None:
        """GPT-2's initialisation: N(0, 0.02), output projections divided by sqrt(2 n_layers), zero biases.

        Weights of attention have the spread `attention_std` instead of 0.02.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = attention_std if ".attn." in name else INITIAL_STD
                if name.endswith(("attn.o.weight", "mlp.out.weight")):
                    std /= (2 * self.config.n_layers) ** 0.5
                parameter.normal_(0.0, std, generator=generator)

    def resid_pre(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        resid: Tensor = self.embed(tokens) + self.pos_embed(positions)
        return resid

    def forward(self, tokens: Int[Tensor, "batch pos"], hook: Hook = no_hook) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits; `hook(name, value)` is called at each hook point and returns the value to continue with."""
        logits: Tensor = self.unembed(self.final(tokens, hook))
        return logits

    def final(self, tokens: Int[Tensor, "batch pos"], hook: Hook = no_hook) -> Float[Tensor, "batch pos d_model"]:
        """The normalised residual stream that the unembedding reads."""
        resid = self.resid_pre(tokens)
        for block in self.blocks:
            resid = block(resid, hook)
        normalised: Tensor = self.ln_final(resid)
        return normalised

    @property
    def hook_widths(self) -> dict[str, int]:
        """Width of the activations at each hook point."""
        d_model, d_mlp = self.config.d_model, self.config.d_mlp
        d_z = self.config.n_heads * self.config.d_head
        heads = {f"attn.hook_{part}": d_z for part in "qkvz"}
        attention = {"hook_resid_pre": d_model, **heads, "hook_attn_out": d_model}
        mlp = {"hook_resid_mid": d_model, "mlp.hook_in": d_model, "hook_mlp_out": d_model, "mlp.hook_post": d_mlp}
        of_block = attention | ({} if self.config.attn_only else mlp) | {"hook_resid_post": d_model}
        return {f"blocks.{n}.{name}": width for n in range(self.config.n_layers) for name, width in of_block.items()}
