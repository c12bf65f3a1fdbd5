"""The sparse autoencoder: parameters, encode, decode. No losses, no counters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.checkpoint import CheckpointError, read_tensors, write_json, write_tensors
from sae.kernels import choose, ops
from sae.kernels.acts import DenseActs, FeatureActs, SparseActs
from sae.kernels.ops import Kernels
from sae.kernels.support import Above, NotSparse, Rule, TopK

FORMAT = 1
ACTIVATIONS = ("relu", "topk")


class SAE(nn.Module):
    """Sparse autoencoder with a pre-bias tied to the decoder's.

    `f = act((x − b_dec) W_enc + b_enc)`, `x̂ = f W_dec + b_dec`; act is ReLU, or ReLU of the k largest (`topk`).

    Shapes: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_in]`, `b_dec [d_in]`; a feature is a row of W_dec,
    and in memory a row of W_enc too (its columns are contiguous): what touches one feature reads one line.
    Units: x and f are in the model's own units.
    Raises: ValueError for an unknown activation, or `topk` without 1 ≤ k ≤ d_sae.
    Source: Bricken et al. 2023, "Sparse autoencoder setup"; Gao et al. 2024 (arXiv 2406.04093), §2.3 for TopK.
    """

    def __init__(self, d_in: int, d_sae: int, *, activation: str = "relu", k: int | None = None) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}.")
        if activation == "topk" and not (k and 1 <= k <= d_sae):
            raise ValueError(f"topk needs 1 <= k <= d_sae = {d_sae}; got k = {k}.")
        self.d_in, self.d_sae, self.activation, self.k = d_in, d_sae, activation, k
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).t())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.config: dict[str, Any] = {}

    @property
    def rule(self) -> Rule:
        """Which features are active, as the kernels know it."""
        if self.activation == "topk":
            assert self.k is not None
            return TopK(self.k)
        return Above(torch.zeros_like(self.b_enc))

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """`(x − b_dec) W_enc + b_enc`, dense."""
        # With the pre-bias folded into the bias no gradient changes, and none as large as x is asked for.
        return nn.functional.linear(x, self.W_enc.t(), self.b_enc - self.b_dec @ self.W_enc)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, dense and differentiable."""
        pre = self.pre_acts(x)
        if self.activation == "relu":
            return pre.relu()
        assert self.k is not None
        values, features = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, features, values.relu())

    def encode_sparse(self, x: Float[Tensor, "rows d_in"], kernels: Kernels | None = None) -> SparseActs:
        """Feature activations at the cost of the active ones (and one product), differentiable."""
        kernels = kernels or choose(device=x.device)
        values, support = ops.encode(kernels, x, self.W_enc, self.b_enc, self.b_dec, self.rule)
        return SparseActs(values, support, kernels)

    def feature_acts(self, x: Float[Tensor, "rows d_in"], kernels: Kernels | None = None) -> FeatureActs:
        """`encode_sparse` where that pays, else `encode`: in either form the same activations."""
        try:
            return self.encode_sparse(x, kernels)
        except NotSparse:
            return DenseActs(self.encode(x))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return feature_acts @ self.W_dec + self.b_dec

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """`decode(encode(x))`."""
        return self.decode(self.encode(x))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return self.reconstruct(x)

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def show_shape(self) -> str:
        sparsity = f"topk k={self.k}" if self.activation == "topk" else self.activation
        return f"{self.d_in} → {self.d_sae:,} features ({sparsity})"


@torch.no_grad()
def fold_scale(sae: SAE, scale: float) -> SAE:
    """The dictionary that does on raw x what `sae` does on `scale`·x: biases divided by `scale`, weights kept.

    Decoder rows keep unit norm and activations come out in the model's own units.
    """
    folded = SAE(sae.d_in, sae.d_sae, activation=sae.activation, k=sae.k)
    for name, tensor in sae.tensors().items():
        folded.get_parameter(name).copy_(tensor / scale if name.startswith("b_") else tensor)
    folded.config = sae.config
    return folded


def save(sae: SAE, directory: str | Path, config: Mapping[str, Any]) -> Path:
    """Writes `sae.safetensors` and then `config.json` (kind, format, shape, and what `config` adds)."""
    directory = Path(directory)
    write_tensors(directory / "sae.safetensors", sae.tensors(), {"kind": "sae", "format": FORMAT})
    shape = {"d_in": sae.d_in, "d_sae": sae.d_sae, "activation": sae.activation, "k": sae.k}
    write_json(directory / "config.json", {**config, "kind": "sae", "format": FORMAT, **shape})
    return directory


def load(path: str | Path) -> SAE:
    """Opens a dictionary written by `save` (or `sae train`).

    Raises: CheckpointError when the directory is none, is of a newer format, or its tensors do not fit.
    """
    directory = Path(path)
    config = read_config(directory)
    missing = [key for key in ("d_in", "d_sae", "activation") if key not in config]
    if missing:
        raise CheckpointError(f"{directory}/config.json lacks {', '.join(missing)}; train or export it again.")
    sae = SAE(config["d_in"], config["d_sae"], activation=config["activation"], k=config.get("k"))
    tensors, _ = read_tensors(directory / "sae.safetensors")
    expected = {name: tuple(t.shape) for name, t in sae.tensors().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        raise CheckpointError(
            f"{directory}/sae.safetensors does not fit config.json: expected {expected}, got {found}."
        )
    sae.load_state_dict(tensors)
    sae.config = config
    return sae.eval().requires_grad_(False)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a dictionary. Raises: CheckpointError naming what is there instead."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a dictionary: it has no config.json. `sae train` makes one.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("kind") != "sae":
        raise CheckpointError(
            f'{path}: expected "kind": "sae", got {config.get("kind") if isinstance(config, dict) else config!r}.'
        )
    if config.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{path} has format {config['format']}; this version reads up to {FORMAT}. Update monosem."
        )
    return config
