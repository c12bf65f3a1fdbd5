"""What a dictionary's config.json says about the rows it was trained on, and which rows count by that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from store.common import RowFilter, can_run, contexts_begin_with_bos


def trained_with_context_bos(config: Mapping[str, Any]) -> bool | None:
    """Whether the contexts of training began with BOS; None if the config.json does not say, or rows came as arrays."""
    if not can_run(config.get("model") or {}):
        return None
    for origin in ("store", "live"):
        if isinstance(config.get(origin), Mapping):
            return contexts_begin_with_bos(config[origin])
    return None


def rows_that_count(
    sae: SAE,
    bos_id: int | None,
    tokens: Int[Tensor, "*batch pos"],
    x: Float[Tensor, "*batch pos d_in"],
    hook_point: str | None = None,
) -> Bool[Tensor, "*batch pos"]:
    """The rows x of whole contexts that training would have kept: no BOS, and none that the row filter leaves out.

    `hook_point` names where x comes from; default: where the dictionary reads.
    """
    row_filter = RowFilter.of_json(sae.config.get("row_filter"))
    keep = torch.from_numpy(row_filter.keeps_tokens(tokens.cpu().numpy()))
    if bos_id is not None:
        keep = keep & (tokens.cpu() != bos_id)
    largest = row_filter.max_norms.get(hook_point or str(sae.config.get("hook_point")))
    keep = keep.to(x.device)
    return keep if largest is None else keep & (x.float().norm(dim=-1) <= largest)
