"""The sparse autoencoder: parameters, encode, decode. No losses, no counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.dictionary.row_norm import ROW_NORMS, normalised, restored
from sae.kernels import choose, dense
from sae.kernels.activations import DenseActs, FeatureActs, SparseActs, sparse_or_dense
from sae.kernels.autograd import Kernels
from sae.kernels.sparsity import Above, BatchTopK, PreparedEncoder, Rule, TopK

ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu", "gated")
WHOLE = ("b_dec", "W_skip")  # parameters without a row or column per feature
SHAPE = ("d_in", "d_sae", "activation", "k", "d_out", "pre_bias", "skip", "row_norm")


class SAE(nn.Module):
    """Sparse autoencoder: `pre = (x − b_dec) W_enc + b_enc`, `f = act(pre)`, `x̂ = f W_dec + b_dec`.

    `act` is one of
    - `relu`: ReLU(pre);
    - `topk`: ReLU of the k largest of each row;
    - `batchtopk`: while training, ReLU of the k · rows entries of the batch with the largest pre − threshold; in
      `eval()`, as `jumprelu`;
    - `jumprelu`: pre where pre > threshold, else 0 (a negative threshold counts as 0);
    - `gated`: ReLU(exp(r_mag) · (pre − b_enc) + b_mag) where pre > 0, else 0: b_enc is the gate's bias.

    Without `pre_bias` nothing is subtracted from x. A transcoder may have another `d_out`; `skip` adds x W_skip.
    With a `row_norm` (dictionaries of other tools only), each row is normalised before, and x̂ scaled back after, as
    `sae.dictionary.row_norm` says; activations are then in units of the normalised rows, and `decode` gives x̂ before
    it is scaled back.
    Shapes: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_out]`, `b_dec [d_out]`, and by activation
    `threshold`, `r_mag`, `b_mag [d_sae]`; `W_skip [d_in, d_out]`. A feature is a row of W_dec and a column of W_enc,
    stored contiguously, so that reading one feature is one contiguous read.
    Units: x and f are in the model's own units.
    Raises: ValueError for an unknown activation or row_norm, a missing k or one outside 1 … d_sae, or a pre-bias or a
    row_norm if d_out ≠ d_in.
    Source: Bricken et al. 2023, "Sparse autoencoder setup"; Gao et al. 2024 (arXiv 2406.04093), §2.3; Bussmann et al.
    2024 (arXiv 2412.06410); Rajamanoharan et al. 2024 (arXiv 2407.14435, 2404.16014); Dunefsky et al. 2024
    (arXiv 2406.11944) for transcoders.
    """

    threshold: Tensor
    r_mag: Tensor
    b_mag: Tensor
    W_skip: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        activation: str = "relu",
        k: int | None = None,
        d_out: int | None = None,
        pre_bias: bool = True,
        skip: bool = False,
        row_norm: str | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
        if activation in ("topk", "batchtopk") and not (k and 1 <= k <= d_sae):
            raise ValueError(f"{activation} needs 1 <= k <= d_sae = {d_sae}; got k = {k}.")
        self.d_in, self.d_sae, self.activation, self.k = d_in, d_sae, activation, k
        self.d_out, self.pre_bias, self.skip = d_out or d_in, pre_bias, skip
        if pre_bias and self.d_out != d_in:
            raise ValueError(f"b_dec has d_out = {self.d_out} entries, x has d_in = {d_in}: set pre_bias=False.")
        if row_norm is not None and (row_norm not in ROW_NORMS or self.d_out != d_in or d_in < 2):
            raise ValueError(
                f"row_norm must be one of {', '.join(ROW_NORMS)}, for rows of 2 or more values that are reconstructed; "
                f"got {row_norm!r}, d_in = {d_in} and d_out = {self.d_out}."
            )
        self.row_norm = row_norm
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).t())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        if activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(d_sae))
        if activation == "batchtopk":  # estimated during training, not learned by gradient
            self.register_buffer("threshold", torch.zeros(d_sae))
        if activation == "gated":
            self.r_mag, self.b_mag = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_sae))
        if skip:
            self.W_skip = nn.Parameter(torch.zeros(d_in, self.d_out))
        self.config: dict[str, Any] = {}

    @property
    def shape(self) -> dict[str, Any]:
        """The constructor's arguments: `SAE(**sae.shape)` has parameters of the same shapes."""
        return {name: getattr(self, name) for name in SHAPE}

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts the activations of another hook point instead of x."""
        elsewhere = "target_hook_point" in self.config or self.config.get("recipe") == "transcoder"
        return elsewhere or self.skip or self.d_out != self.d_in

    @property
    def is_crosscoder(self) -> bool:
        """Whether its rows join the activations of several hook points or models (`sae.dictionary.sites`)."""
        return "sites" in self.config

    @property
    def scales_rows(self) -> bool:
        """Whether each row is divided by a scale of its own, so that no activation has a fixed size in units of x."""
        return self.row_norm in ("layer_norm", "unit_mean_square")

    @property
    def rule(self) -> Rule:
        """The rule by which kernels select active features."""
        match self.activation:
            case "topk":
                assert self.k is not None
                return TopK(self.k)
            case "batchtopk" if self.training:
                assert self.k is not None
                return BatchTopK(self.k, self.threshold.amax() - self.threshold)
            case "batchtopk" | "jumprelu":
                return Above(self.threshold.detach().clamp_min(0.0))
        return Above(torch.zeros_like(self.b_enc))

    @property
    def input_bias(self) -> Float[Tensor, " d_in"]:
        """What is subtracted from x: b_dec, or zero without a pre-bias."""
        return self.b_dec if self.pre_bias else self.b_enc.new_zeros(self.d_in)

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """`(x − b_dec) W_enc + b_enc`, dense."""
        # Folding b_dec into the bias changes no gradient and saves a tensor of the size of x.
        bias = self.b_enc - self.b_dec @ self.W_enc if self.pre_bias else self.b_enc
        return nn.functional.linear(normalised(x, self.row_norm), self.W_enc.t(), bias)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, dense and differentiable, without a gradient for thresholds (a loss adds that)."""
        pre = self.pre_acts(x)
        match rule := self.rule:
            case TopK(k):
                values, features = pre.topk(k, dim=-1, sorted=False)
                return torch.zeros_like(pre).scatter(-1, features, values.relu())
            case BatchTopK(k):
                flat = pre.flatten()
                entries = rule.rank(pre).flatten().topk(k * (len(flat) // self.d_sae), sorted=False).indices
                return torch.zeros_like(flat).scatter(-1, entries, flat[entries].relu()).view_as(pre)
            case Above(threshold):
                if self.activation == "relu":
                    return pre.relu()
                return torch.where(pre > threshold, self.magnitudes(pre), 0.0)

    def magnitudes(
        self, pre: Float[Tensor, "*entries"], features: Int[Tensor, " nnz"] | None = None
    ) -> Float[Tensor, "*entries"]:
        """Activations of active features from their pre-activations; `features` are their numbers, None means all."""
        if self.activation != "gated":
            return pre
        chosen = slice(None) if features is None else features
        return (self.r_mag[chosen].exp() * (pre - self.b_enc[chosen]) + self.b_mag[chosen]).relu()

    def encode_sparse(
        self, x: Float[Tensor, "rows d_in"], kernels: Kernels | None = None, prepared: PreparedEncoder | None = None
    ) -> SparseActs:
        """Feature activations at the cost of one screening product and the active features, differentiable as `encode`.

        `prepared` is what `kernels.prepare(W_enc)` returned, if W_enc has not changed since.
        Raises: NotSparse if too many features are active.
        """
        kernels = kernels or choose(device=x.device)
        x = normalised(x, self.row_norm)
        pre = SparseActs.pre_activations(kernels, x, self.W_enc, self.b_enc, self.input_bias, self.rule, prepared)
        return pre.with_values(self.magnitudes(pre.values, pre.support.features.long()))

    def feature_acts(self, x: Float[Tensor, "rows d_in"], kernels: Kernels | None = None) -> FeatureActs:
        """`encode_sparse`, or `encode_dense` if too many features are active: the same activations in either form."""
        return sparse_or_dense(lambda: self.encode_sparse(x, kernels), lambda: self.encode_dense(x))

    def encode_dense(self, x: Float[Tensor, "rows d_in"]) -> DenseActs:
        """`encode`; for ReLU together with sums and counts that cost nothing extra there."""
        if self.activation == "relu":
            return DenseActs(*dense.relu(normalised(x, self.row_norm), self.W_enc, self.b_enc, self.input_bias))
        return DenseActs(self.encode(x))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """`f W_dec + b_dec`, without the skip connection of a transcoder and before a `row_norm` is undone."""
        return feature_acts @ self.W_dec + self.b_dec

    def output(self, acts: FeatureActs, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        """x̂ from the activations on x, sparse or dense, including the skip connection."""
        return self._output(self.decoded(acts) + self.b_dec, x)

    def gathered(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "gathered d_in"]:
        """The rows to encode for these rows: with a shard of a dictionary those of all ranks that hold the others."""
        return x

    def decoded(self, acts: FeatureActs) -> Float[Tensor, "rows d_out"]:
        """`f W_dec`, from the activations on `gathered(x)`."""
        return acts.decode(self.W_dec)

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """`decode(encode(x))`, including the skip connection and with the `row_norm` undone."""
        return self._output(self.decode(self.encode(x)), x)

    def _output(self, x_hat: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"]) -> Tensor:
        x_hat = restored(x_hat, x, self.row_norm)
        return x_hat + x @ self.W_skip if self.skip else x_hat

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.reconstruct(x)

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and the estimated threshold, without gradients."""
        return {name: tensor.detach() for name, tensor in (*self.named_parameters(), *self.named_buffers())}

    def show_shape(self) -> str:
        sparsity = f"{self.activation} k={self.k}" if self.k else self.activation
        sparsity += f", row_norm {self.row_norm}" if self.row_norm else ""
        width = f"{self.d_in}" if self.d_in == self.d_out else f"{self.d_in} to {self.d_out}"
        return f"{width} → {self.d_sae:,} features ({sparsity})"


@torch.no_grad()
def fold_scale(sae: SAE, scale: float, target_scale: float | None = None) -> SAE:
    """The dictionary that does on raw x what `sae` does on `scale`·x: biases and thresholds divided by `scale`.

    Weights stay, so decoder rows keep their norm, and activations are in the model's own units. If the target is
    `target_scale`·y instead of x, activations are in y's units and the encoder is multiplied by scale / target_scale.
    Raises: ValueError for a dictionary that scales each row by itself: its activations have no units of x.
    """
    if sae.scales_rows:
        raise ValueError(f"row_norm = {sae.row_norm}: a scale of all rows cannot be folded into this dictionary.")
    target_scale = target_scale or scale
    factors = {"W_enc": scale / target_scale, "W_skip": scale / target_scale}
    factors |= dict.fromkeys(("b_enc", "b_dec", "b_mag", "threshold"), 1 / target_scale)
    return rescaled(sae, {name: torch.tensor(factor, dtype=torch.float64) for name, factor in factors.items()})


@torch.no_grad()
def fold_decoder_norms(sae: SAE) -> SAE:
    """The same function with unit decoder rows: each row's norm moves into its activation. Zero rows stay zero.

    Raises: ValueError for `topk`, because the k largest activations would then be those of other features.
    Source: Anthropic's April 2024 update: a feature's activation is f_i ‖d_i‖, its direction d_i / ‖d_i‖.
    """
    if sae.activation == "topk":
        raise ValueError("topk: unit decoder rows would change which features are the k largest.")
    norms = sae.W_dec.double().norm(dim=-1)
    norms = torch.where(norms > 0, norms, 1.0)
    factors = dict.fromkeys(("W_enc", "b_enc", "b_mag", "threshold"), norms)
    return rescaled(sae, {**factors, "W_dec": 1 / norms[:, None]})


def rescaled(sae: SAE, factors: Mapping[str, Tensor]) -> SAE:
    """A copy whose tensors are multiplied by these factors, in float64."""
    twin = SAE(**sae.shape).to(sae.W_dec.dtype).train(sae.training)
    mine = sae.tensors()
    for name, tensor in twin.tensors().items():
        factor = factors.get(name)
        tensor.copy_(mine[name] if factor is None else mine[name].double() * factor)
    twin.config = sae.config
    return twin


def refuse_transcoder(sae: SAE, verb: str, error: type[Exception] = ValueError) -> None:
    """Raises `error` for a transcoder: `verb` needs decoder rows that are directions in the space of x."""
    if sae.is_transcoder:
        target = sae.config.get("target_hook_point") or "another place's activations"
        raise error(
            f"{verb}: this dictionary is a transcoder: it reads {sae.config.get('hook_point') or 'x'} and predicts "
            f"{target}, so its output and its decoder rows cannot be added where it reads. Transcoders work with "
            "training, evaluation, the index, comparison, steering and native export."
        )


def refuse_row_scale(sae: SAE, verb: str, error: type[Exception] = ValueError) -> None:
    """Raises `error` if rows are scaled one by one: `verb` adds multiples of decoder rows, which need units of x."""
    if sae.scales_rows:
        raise error(
            f"{verb}: this dictionary normalises each row of activations by itself (row_norm = {sae.row_norm}), so an "
            "activation has no fixed size in the model. Evaluation, the index and SAELens export work."
        )
