"""Two ways to restart dead features: the paper's resampling, and reseeding for TopK."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.directions import spread_rows
from sae.parallel.mesh import Mesh
from sae.parallel.selection import largest_values
from sae.training.adam import Adam
from sae.training.shard import mesh_of, own_features

ENCODER_SHARE_OF_ALIVE_NORM = 0.2
POOL_PER_DEAD = 4
ENCODED_AT_ONCE = 1 << 26  # activations of reseeding rows that are held: 256 MiB in float32, and a few times as much

# (sae, optimizer, dead features, rows, their losses, generator) → the rows chosen for the first of the dead features
Resample = Callable[[SAE, Adam, Tensor, Tensor, Tensor, torch.Generator], Tensor]


@torch.no_grad()
def resample_(
    sae: SAE,
    optimizer: Adam,
    dead: Int[Tensor, " n_dead"],
    rows: Float[Tensor, "n d_in"],
    losses: Float[Tensor, " n"],
    generator: torch.Generator,
) -> Int[Tensor, " n_dead"]:
    """Points dead features at badly reconstructed inputs and resets their Adam moments; returns the rows chosen.

    P(row) ∝ loss². The decoder row is the input at unit norm, the encoder column the same at 0.2 × the mean encoder
    norm of the features alive, the encoder bias 0.
    Source: Bricken et al. 2023, "Neuron resampling".
    """
    mesh = mesh_of(sae)
    chosen = torch.multinomial(losses.double().pow(2), len(dead), replacement=True, generator=generator)
    chosen = mesh.tell_numbers(chosen)
    directions = torch.nn.functional.normalize(rows[chosen].to(sae.W_enc.device), dim=-1)
    alive = torch.ones(sae.d_sae, dtype=torch.bool, device=sae.W_enc.device)
    alive[own_features(sae, dead)[1]] = False
    encoder_norms = sae.W_enc.norm(dim=0)
    alive_norm = mesh.mean_of_features(encoder_norms[alive] if mesh.agree(alive.any()) else encoder_norms)
    _restart(sae, optimizer, dead, directions * (ENCODER_SHARE_OF_ALIVE_NORM * alive_norm), directions)
    return chosen


@torch.no_grad()
def reseed_(
    sae: SAE,
    optimizer: Adam,
    dead: Int[Tensor, " n_dead"],
    rows: Float[Tensor, "n d_in"],
    losses: Float[Tensor, " n"],
    generator: torch.Generator,
) -> Int[Tensor, " n_placed"]:
    """Restarts dead TopK features: each ranks among the k largest on a badly reconstructed input. Returns these rows.

    P(row) ∝ loss, thinned to rows far from each other. The encoder column is the centred input x − b_dec, scaled so
    that on this input the feature ranks in the middle of the k active ones; the decoder row is the error x − x̂ at unit
    norm; the encoder bias is 0. A weaker start would stay dead, a stronger one would displace working features.
    Where there are fewer rows than dead features, the other features wait for the next event.
    """
    assert sae.k is not None
    mesh = mesh_of(sae)
    pool = min(POOL_PER_DEAD * len(dead), int((losses > 0).sum()))
    candidates = torch.multinomial(losses.double(), pool, replacement=False, generator=generator)
    centred = rows[candidates] - sae.b_dec.to(rows.device)
    chosen = candidates[spread_rows(torch.nn.functional.normalize(centred, dim=-1), len(dead), generator)]
    chosen = mesh.tell_numbers(chosen)
    dead, x = dead[: len(chosen)], rows[chosen].to(sae.W_enc.device)
    widest = mesh.reduce(torch.tensor(sae.d_sae, device=x.device), "max", "features")  # so that all take as many parts
    parts = [_reseeded(sae, mesh, part) for part in torch.split(x, max(1, ENCODED_AT_ONCE // int(widest)))]
    encoder, decoder = (torch.cat(part) for part in zip(*parts, strict=True))
    _restart(sae, optimizer, dead, encoder, decoder)
    return chosen


def _reseeded(
    sae: SAE, mesh: Mesh, x: Float[Tensor, "n d_in"]
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"]]:
    """The encoder column and the decoder row of a feature that starts at each of these rows."""
    assert sae.k is not None
    feature_acts = sae.encode(x)
    middle = largest_values(mesh, feature_acts, (sae.k + 1) // 2)[:, -1:]
    centred = x - sae.b_dec
    encoder = centred * (middle / centred.pow(2).sum(-1, keepdim=True).clamp_min(1e-12))
    return encoder, torch.nn.functional.normalize(x - sae.decode(feature_acts), dim=-1)


def _restart(sae: SAE, optimizer: Adam, features: Tensor, encoder: Tensor, decoder: Tensor) -> None:
    """Sets the encoder columns and decoder rows of some features as if they had just been initialised."""
    mine, features = own_features(sae, features)
    encoder, decoder = encoder[mine], decoder[mine]
    sae.W_enc[:, features] = encoder.T
    sae.W_dec[features] = decoder
    sae.b_enc[features] = 0.0
    if sae.activation == "gated":  # at the start the magnitude equals the gate's value
        sae.r_mag[features] = 0.0
        sae.b_mag[features] = 0.0
    optimizer.reset_rows(features)
