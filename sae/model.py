"""The sparse autoencoder: parameters, encode, decode. No losses, no counters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.checkpoint import CheckpointError, read_tensors, write_json, write_tensors
from sae.kernels import reference as kernels

FORMAT = 1
ACTIVATIONS = ("relu", "topk")


class SAE(nn.Module):
    """Sparse autoencoder with a pre-bias tied to the decoder's.

    `f = act((x − b_dec) W_enc + b_enc)`, `x̂ = f W_dec + b_dec`; act is ReLU, or ReLU of the k largest (`topk`).

    Shapes: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_in]`, `b_dec [d_in]`; a feature is a row of W_dec.
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
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.config: dict[str, Any] = {}

    def pre_acts(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        return kernels.pre_acts(x, self.W_enc, self.b_enc, self.b_dec)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, dense."""
        pre = self.pre_acts(x.reshape(-1, self.d_in))
        if self.activation == "topk":
            assert self.k is not None
            acts = kernels.scatter(*kernels.topk(pre, self.k), self.d_sae)
        else:
            acts = pre.relu()
        return acts.view(*x.shape[:-1], self.d_sae)

    def encode_topk(self, x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
        """The activations of a `topk` dictionary as values and feature numbers."""
        assert self.k is not None
        return kernels.topk(self.pre_acts(x), self.k)

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return feature_acts @ self.W_dec + self.b_dec

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """`decode(encode(x))`, at the cost of the active features where the activation is sparse by construction."""
        if self.activation == "topk":
            flat = x.reshape(-1, self.d_in)
            values, indices = self.encode_topk(flat)
            return (kernels.sparse_decode(values, indices, self.W_dec) + self.b_dec).view(x.shape)
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
