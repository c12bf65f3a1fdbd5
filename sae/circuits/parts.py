"""The residual stream as a sum of parts, and what reads it.

A part writes to the stream: an embedding, a head, an MLP or its neurons, a dictionary's features and what they miss, a
bias. A reader is linear in the normalised stream: a pair of logits, a feature's pre-activation, a head's q, k or v.
Parts × readers is direct logit attribution, attribution of features to heads, and QK scores by part.
Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (the residual stream as a sum).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE, refuse_row_scale, refuse_transcoder
from sae.lm import LanguageModel, ModelError, layer_of
from sae.lm.weights import AffineNorm, TransformerWeights

Kind = Literal["embedding", "position", "head", "mlp", "neuron", "feature", "error", "bias", "stream"]
NormScale = Literal["held", "recomputed"]
WHOLE_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
OF_ATTENTION, OF_MLP = ("attn.hook_z", "hook_attn_out"), ("mlp.hook_post", "hook_mlp_out")


@dataclass(frozen=True)
class Parts:
    """Parts of one kind in one layer. What part i writes at a position is `acts[pos, i] · directions[i]`, or
    `written[i, pos]` where it has no fixed direction."""

    kind: Kind
    layer: int | None
    written: Float[Tensor, "part pos d_model"] | None = None
    acts: Float[Tensor, "pos part"] | None = None
    directions: Float[Tensor, "part d_model"] | None = None
    label: str | None = None  # in names, instead of `kind`

    def __len__(self) -> int:
        return len(self.written if self.written is not None else self._scaled[1])

    @property
    def _scaled(self) -> tuple[Tensor, Tensor]:
        assert self.acts is not None
        assert self.directions is not None
        return self.acts, self.directions

    @property
    def names(self) -> list[str]:
        """`embedding`, `L0.head.2`, `L1.mlp`, `L0.feature.17`, `L1.attention_bias` …"""
        stem = self.label or self.kind
        stem = stem if self.layer is None else f"L{self.layer}.{stem}"
        return [f"{stem}.{i}" for i in range(len(self))] if self.kind in ("head", "neuron", "feature") else [stem]

    def total(self) -> Float[Tensor, "pos d_model"]:
        """Σ over the parts."""
        if self.written is not None:
            return self.written.sum(0)
        acts, directions = self._scaled
        return acts @ directions

    def part(self, index: int) -> Float[Tensor, "pos d_model"]:
        if self.written is not None:
            return self.written[index]
        acts, directions = self._scaled
        return acts[:, index, None] * directions[index]

    def times(self, vector: Float[Tensor, "d_model out"]) -> Float[Tensor, "part pos out"]:
        """Each part times a matrix, without the parts in memory where they have fixed directions."""
        if self.written is not None:
            return self.written @ vector
        acts, directions = self._scaled
        return acts.T[:, :, None] * (directions @ vector)[:, None]


@dataclass(frozen=True)
class Reader:
    """What is read at `point` of the stream (a residual hook point): `norm(x) @ matrix + bias`, or without a norm."""

    name: str
    point: str
    matrix: Float[Tensor, "d_model out"]
    bias: Float[Tensor, " out"]
    norm: AffineNorm | None = None

    def read(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch out"]:
        """The reading of a whole stream."""
        return (x if self.norm is None else self.norm(x)) @ self.matrix + self.bias

    @property
    def constant(self) -> Float[Tensor, " out"]:
        """What no part accounts for: the norm's bias and the reader's own."""
        return self.bias if self.norm is None else self.norm.bias @ self.matrix + self.bias


@dataclass(frozen=True)
class Contributions:
    """What each part adds to a reading, and what no part accounts for.

    With norm_scale "held" the norm's σ is that of the whole stream, and `Σ values + constant = reading`. With
    "recomputed" a value is `reading − reading without the part`, σ measured anew: these do not sum to the reading.
    """

    reader: str
    names: list[str]
    values: Float[Tensor, "part pos out"]
    constant: Float[Tensor, " out"]
    reading: Float[Tensor, "pos out"]
    norm_scale: NormScale


@torch.inference_mode()
def stream_parts(
    model: LanguageModel,
    ids: Sequence[int],
    *,
    point: str | None = None,
    neurons: bool = False,
    dictionaries: Mapping[str, SAE] | None = None,
) -> list[Parts]:
    """The parts whose sum is the residual stream at `point` (default: where the final norm reads), for one text.

    With `neurons` an MLP is its neurons and a bias. A dictionary, named by its hook point, stands in for what it
    reconstructs: features, its bias, and the error x − x̂, so that the sum stays exact. At hook_z, hook_attn_out,
    mlp.hook_post or hook_mlp_out it replaces heads or MLP of its layer; at a residual hook point all parts before it.
    Raises: ModelError for a model whose weights do not reproduce its forward pass (`LanguageModel.weights`), or for a
    hook point that does not exist; ValueError for a dictionary that no part matches.
    """
    weights, tokens = model.weights(), torch.tensor([list(ids)])
    point = point or last_point(model)
    layers, after_attention = _reach(model, point)
    saes = dict(dictionaries or {})
    found = _of_embeddings(weights, tokens[0])
    for number, layer in enumerate(weights.layers):
        block = f"blocks.{number}"
        found = _replaced(model, saes, f"{block}.hook_resid_pre", tokens, found)
        if number < layers or after_attention:
            attention = _heads(model, weights, number, tokens)
            found = found + _replaced(model, saes, _first(saes, block, OF_ATTENTION), tokens, attention)
            if layer.mlp is not None:
                found = _replaced(model, saes, f"{block}.hook_resid_mid", tokens, found)
        if number < layers and layer.mlp is not None:
            mlp = _mlp(model, weights, number, tokens, neurons)
            found = found + _replaced(model, saes, _first(saes, block, OF_MLP), tokens, mlp)
        if number < layers:
            found = _replaced(model, saes, f"{block}.hook_resid_post", tokens, found)
        if number >= layers:
            break
    if saes:
        raise ValueError(
            f"parts: {', '.join(saes)} does not come before {point}, or a dictionary cannot stand in there; it can at "
            f"{', '.join((*OF_ATTENTION, *OF_MLP, *WHOLE_STREAM))} of a layer before it."
        )
    return found


def last_point(model: LanguageModel) -> str:
    """The hook point of what the final norm reads."""
    return f"blocks.{model.n_layers - 1}.hook_resid_post"


def _reach(model: LanguageModel, point: str) -> tuple[int, bool]:
    """How many whole layers come before a residual hook point, and whether the attention of the next one does."""
    name = point.partition(".")[2].partition(".")[2]
    if name not in WHOLE_STREAM or not 0 <= layer_of(point) < model.n_layers:
        raise ModelError(
            f"parts: {point} is no place of the residual stream of {model.id}; expected {', '.join(WHOLE_STREAM)} of "
            f"layer 0 … {model.n_layers - 1}, such as {last_point(model)}."
        )
    model.hook_width(point)  # raises where there is none: hook_resid_mid of an attention-only model
    return layer_of(point) + (name == "hook_resid_post"), name == "hook_resid_mid"


def _of_embeddings(weights: TransformerWeights, tokens: Int[Tensor, " pos"]) -> list[Parts]:
    return [
        Parts("embedding", None, weights.W_E[tokens][None]),
        Parts("position", None, weights.W_pos[: len(tokens)][None]),
    ]


def _heads(model: LanguageModel, weights: TransformerWeights, layer: int, tokens: Int[Tensor, "1 pos"]) -> list[Parts]:
    attn = weights.layers[layer].attn
    z = model.capture(tokens, f"blocks.{layer}.attn.hook_z")[0].view(tokens.shape[1], model.n_heads, -1)
    return [
        Parts("head", layer, torch.einsum("phd,hdm->hpm", z, attn.W_O)),
        _bias("attention_bias", layer, attn.b_O, tokens),
    ]


def _mlp(
    model: LanguageModel, weights: TransformerWeights, layer: int, tokens: Int[Tensor, "1 pos"], neurons: bool
) -> list[Parts]:
    mlp = weights.layers[layer].mlp
    assert mlp is not None
    post = model.capture(tokens, f"blocks.{layer}.mlp.hook_post")[0]
    whole = Parts("mlp", layer, (post @ mlp.W_out)[None])
    return [
        Parts("neuron", layer, None, post, mlp.W_out) if neurons else whole,
        _bias("mlp_bias", layer, mlp.b_out, tokens),
    ]


def _bias(label: str, layer: int, bias: Float[Tensor, " d_model"], tokens: Int[Tensor, "1 pos"]) -> Parts:
    return Parts("bias", layer, bias.expand(1, tokens.shape[1], -1), label=label)


def _first(saes: Mapping[str, SAE], block: str, names: Sequence[str]) -> str:
    return next((f"{block}.{name}" for name in names if f"{block}.{name}" in saes), "")


def _replaced(
    model: LanguageModel, saes: dict[str, SAE], hook_point: str, tokens: Int[Tensor, "1 pos"], parts: list[Parts]
) -> list[Parts]:
    """The features, bias and error of the dictionary at `hook_point` instead of `parts`; `parts` if there is none."""
    sae = saes.pop(hook_point, None)
    if sae is None:
        return parts
    refuse_transcoder(sae, "parts")
    refuse_row_scale(sae, "parts")
    path = model.direct_path(hook_point)
    x = model.capture(tokens, hook_point)[0]
    acts = sae.encode(x)
    decoded, b_dec = path.linear(sae.W_dec), path.linear(sae.b_dec)
    error = path.linear(x - sae(x))
    layer = layer_of(hook_point)
    kept_bias = [part for part in parts if part.kind == "bias"] if path.matrix is not None else []
    return [
        Parts("feature", layer, None, acts, decoded),
        _bias("dictionary_bias", layer, b_dec, tokens),
        Parts("error", layer, error[None]),
        *kept_bias,
    ]


# --- readers ---------------------------------------------------------------------------------------------------------


def logit_reader(model: LanguageModel, token: int, other: int | None = None) -> Reader:
    """The logit of `token` minus that of `other`; without `other`, minus the mean over the vocabulary's tokens."""
    weights = model.weights()
    for each in (token, other):
        if each is not None and not 0 <= each < model.d_vocab:
            raise ValueError(f"reader: token {each} is outside the vocabulary's 0 … {model.d_vocab - 1:,}.")
    columns, bias = (model.of_tokens(values).mean(-1) for values in (weights.W_U, weights.b_U))
    if other is not None:
        columns, bias = weights.W_U[:, other], weights.b_U[other]
    name = f"logit of {token} minus {'the mean logit' if other is None else f'that of {other}'}"
    matrix = (weights.W_U[:, token] - columns)[:, None]
    return Reader(name, last_point(model), matrix, (weights.b_U[token] - bias)[None], weights.ln_final)


def feature_reader(model: LanguageModel, sae: SAE, feature: int, hook_point: str) -> Reader:
    """A feature's pre-activation, for a dictionary that reads the stream: a residual hook point, or mlp.hook_in.

    Raises: ValueError for a feature that does not exist or a dictionary at another place.
    """
    refuse_row_scale(sae, "reader")
    if not 0 <= feature < sae.d_sae:
        raise ValueError(f"reader: feature {feature} does not exist; features are 0 … {sae.d_sae - 1:,}.")
    name = hook_point.partition(".")[2].partition(".")[2]
    with torch.no_grad():
        matrix = sae.W_enc[:, feature, None].clone()
        bias = sae.pre_acts(torch.zeros(1, sae.d_in))[0, feature, None].clone()
    label = f"feature {feature} at {hook_point}"
    if name in WHOLE_STREAM:
        return Reader(label, hook_point, matrix, bias)
    layer = model.weights().layers[layer_of(hook_point)]
    if name == "mlp.hook_in" and layer.mlp is not None:
        return Reader(label, f"blocks.{layer_of(hook_point)}.hook_resid_mid", matrix, bias, layer.ln2)
    raise ValueError(
        f"reader: a dictionary at {hook_point} does not read the residual stream; expected mlp.hook_in or one of "
        f"{', '.join(WHOLE_STREAM)}. Features of head outputs are split into sources by `sae.interventions`."
    )


def head_reader(model: LanguageModel, layer: int, head: int, input_of: Literal["q", "k", "v"]) -> Reader:
    """A head's query, key or value, d_head numbers. Raises: ValueError for a head that does not exist."""
    weights = model.weights()
    if not (0 <= layer < model.n_layers and 0 <= head < weights.n_heads):
        raise ValueError(
            f"reader: head {layer}.{head} does not exist; {model.id} has layers 0 … {model.n_layers - 1} of "
            f"{weights.n_heads} heads."
        )
    attn = weights.layers[layer].attn
    W, b = {"q": (attn.W_Q, attn.b_Q), "k": (attn.W_K, attn.b_K), "v": (attn.W_V, attn.b_V)}[input_of]
    point = f"blocks.{layer}.hook_resid_pre"
    return Reader(f"{input_of} of head {layer}.{head}", point, W[head], b[head], weights.layers[layer].ln1)


@torch.inference_mode()
def contributions(parts: Sequence[Parts], reader: Reader, *, norm_scale: NormScale = "held") -> Contributions:
    """What each part adds to a reading. With norm_scale "held":

        value(part) = (part − mean part) · w / σ(stream) @ matrix,   Σ values + constant = reading

    With "recomputed": value(part) = read(stream) − read(stream − part).
    """
    stream = total(parts)
    reading = reader.read(stream)
    if norm_scale == "held":
        values = torch.cat([_held(each, reader, stream) for each in parts])
    else:
        values = torch.stack([reading - reader.read(stream - part) for part in _each(parts)])
    names = [name for each in parts for name in each.names]
    return Contributions(reader.name, names, values, reader.constant, reading, norm_scale)


def total(parts: Sequence[Parts]) -> Float[Tensor, "pos d_model"]:
    """The stream: Σ over all parts."""
    summed: Tensor = torch.stack([each.total() for each in parts]).sum(0)
    return summed


def _held(parts: Parts, reader: Reader, stream: Float[Tensor, "pos d_model"]) -> Float[Tensor, "part pos out"]:
    if reader.norm is None:
        return parts.times(reader.matrix)
    # numerator is linear and symmetric but for the weight: fold it into the matrix
    folded = reader.norm.norm.transposed(reader.matrix.T).T
    return parts.times(folded) / reader.norm.norm.scale(stream)


def _each(parts: Sequence[Parts]) -> Iterator[Float[Tensor, "pos d_model"]]:
    for each in parts:
        for index in range(len(each)):
            yield each.part(index)


@torch.inference_mode()
def qk_scores(
    queries: Contributions, keys: Contributions, *, dst: int, src: int
) -> Float[Tensor, "query_part key_part"]:
    """A head's attention score split over parts at the destination × parts at the source.

    `score = (Σ q_i + c_q) · (Σ k_j + c_k) / √d_head`; the last row and column are the constants, so that all entries
    sum to the score. Norm scales are held, each at its own position. Raises: ValueError for recomputed scales.
    """
    if "recomputed" in (queries.norm_scale, keys.norm_scale):
        raise ValueError("qk_scores: scores split into parts only with norm scales held; got recomputed ones.")
    q = torch.cat([queries.values[:, dst], queries.constant[None]])
    k = torch.cat([keys.values[:, src], keys.constant[None]])
    scores: Tensor = q @ k.T / q.shape[-1] ** 0.5
    return scores
