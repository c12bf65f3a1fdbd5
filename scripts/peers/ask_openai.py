"""OpenAI's side of scripts/check_peers.py. Only its own dictionaries are checked: we do not write its layout."""

from __future__ import annotations

import sides
import torch
from sparse_autoencoder.model import Autoencoder

OURS = {"pre_bias": "b_dec", "latent_bias": "b_enc", "encoder.weight": "W_enc", "decoder.weight": "W_dec"}


def make(name: str, seed: int) -> None:
    sae = Autoencoder(sides.D_SAE, sides.D_IN)
    given = sides.weights(seed, unit_norms=False)
    with torch.no_grad():
        for theirs, parameter in sae.named_parameters():
            parameter.copy_(given[OURS[theirs]].T)
    directory = sides.place(name)
    torch.save(sae.state_dict(), directory / "8.pt")
    loaded = Autoencoder.from_state_dict(torch.load(directory / "8.pt", weights_only=True))
    x = sides.rows(seed, given["b_dec"])
    with torch.no_grad():
        acts, info = loaded.encode(x)
        sides.write(directory, {"x": x, "acts": acts, "x_hat": loaded.decode(acts, info)})


if __name__ == "__main__":
    make("relu", 0)
    sides.report("sparse_autoencoder")
