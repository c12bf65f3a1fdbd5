"""Gemma Scope (Gemma 2): `params.npz` in a directory `layer_L/width_W/average_l0_N` of its repository.

A file names neither model nor hook point; the directories above it do, as in the repositories
`google/gemma-scope-<size>-<pt|it>-<res|mlp|att>`. JumpReLU without a pre-bias. MLP dictionaries read what the block
adds to the residual stream (after the norm), attention dictionaries the heads joined into one vector (hook_z).
Source: Lieberum et al. 2024 (arXiv 2408.05147); the repositories' README; SAELens' `gemma_2_sae_huggingface_loader`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files

NAME = "gemma-scope"
FILES = "params.npz"

_REPOSITORY = re.compile(r"gemma-scope-(?P<size>\d+b)-(?P<kind>pt|it)-(?P<site>res|mlp|att|transcoders)\b")
_LAYER = re.compile(r"/layer_(\d+)(?=/|$)")
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def file_at(path: Path) -> Path:
    return path if path.is_file() else path / "params.npz"


def detect(path: Path) -> bool:
    return file_at(path).name == "params.npz" and file_at(path).is_file()


def read(path: Path, ignore: Collection[str] = ()) -> SAE:
    """The dictionary of one directory or file. The model and hook point are those of the path, if it names them.

    Raises: InteropError when it is damaged, or a transcoder by its path.
    """
    where = file_at(path)
    inside = "/".join(where.absolute().parts[1:-1])
    repository, layer = _REPOSITORY.search(inside), _LAYER.search(f"/{inside}")
    assemble.require(
        "transcoder" not in inside, where, "it is a transcoder, by its path: it predicts the MLP's output."
    )
    held = files.read_npz(where)
    names = {ours: ours if ours in held else ours.replace("W_", "w_") for ours in ("W_enc", "W_dec")}
    names |= {name: name for name in ("b_enc", "b_dec", "threshold")}
    tensors = assemble.take_tensors(held, names, where)
    embedding = "/embedding/" in f"/{inside}/"
    site = _HOOKS.get(repository["site"]) if repository else None
    place = f"blocks.{layer[1]}.{site}" if site and layer else None
    return assemble.dictionary(
        where,
        tensors,
        {"activation": "jumprelu", "pre_bias": False},
        peer=NAME,
        kind="jumprelu",
        hook_point="hook_embed" if embedding else place,
        model=_model(repository) if repository else None,
        config={},
        notes=[_fold_embedding_scale(tensors)] if embedding else [],
    )


def _model(repository: re.Match[str]) -> str:
    return f"google/gemma-2-{repository['size']}" + ("-it" if repository["kind"] == "it" else "")


def _fold_embedding_scale(tensors: dict[str, Tensor]) -> str:
    """Embedding dictionaries read rows of the embedding matrix; Gemma multiplies them by √d_model (hook_embed)."""
    scale = math.sqrt(len(tensors["b_dec"]))
    assemble.rescale(tensors, {"W_enc": 1 / scale, "W_dec": scale, "b_dec": scale})
    return "the factor √d_model between Gemma's embedding matrix and hook_embed is folded into the weights"
