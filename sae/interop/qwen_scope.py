"""Qwen Scope (Qwen 3 and 3.5): `layerN.sae.pt` in a repository named `SAE-Res-<model>-W<width>K-L0_<k>`.

TopK without a pre-bias at the residual stream after layer N. The file does not hold k; the repository's name does.
Source: the repositories' README (Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50); SAELens'
`qwen_scope_sae_huggingface_loader`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files

NAME = "qwen-scope"
FILES = "layerN.sae.pt"

_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_REPOSITORY = re.compile(r"SAE-Res-(?P<model>.+?)-W(?P<width>\d+)K-L0_(?P<k>\d+)")
_TENSORS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def detect(path: Path) -> bool:
    file = files.only_pt(path)
    return file is not None and _FILE.fullmatch(file.name) is not None


def read(path: Path, ignore: Collection[str] = ()) -> SAE:
    """The dictionary of one file. Raises: InteropError when it is damaged, or no directory above it tells k."""
    file = files.only_pt(path) or path
    layer, repository = _FILE.fullmatch(file.name), _REPOSITORY.search(str(file.absolute().parent))
    assemble.require(
        layer is not None and repository is not None,
        file,
        "its k is not in the file. Put it into a directory named as its repository, such as "
        "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50 (k = 50), or import it by hub:Qwen/<repository>/layerN.sae.pt.",
    )
    assert layer is not None
    assert repository is not None
    tensors = assemble.take_tensors(files.read_pt(file), _TENSORS, file)
    assemble.transpose(tensors, ("W_enc", "W_dec"), file)
    return assemble.dictionary(
        file,
        tensors,
        {"activation": "topk", "k": int(repository["k"]), "pre_bias": False},
        peer=NAME,
        kind="topk",
        hook_point=f"blocks.{layer[1]}.hook_resid_post",
        model=f"Qwen/{repository['model']}",
        config={},
    )
