"""Evaluation of a crosscoder: fidelity at each site, sparsity, and which features belong to which sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.inference import FrozenSAE
from sae.dictionary.sites import Site, norm_shares, site_cosines, site_decoders, sites_of
from sae.evaluation.metrics import Bootstrap, Sums, number
from sae.jobs.progress import progress

CROSSCODER_FORMAT = 1
ONE_SITE_ABOVE = 0.9  # of a feature's decoder norms
SHARED_WITHIN = 0.2  # of an equal share, as a part of it: of two sites, between 0.4 and 0.6
BINS = 20
SHUFFLE_SEED = 0


class SiteBlock(NamedTuple):
    """Joined rows in the model's own units, and the number of the context of each."""

    x: Float[Tensor, "rows d_in"]
    context: Int[np.ndarray, " rows"]


def shuffled(x: Float[Tensor, "rows d_in"], sites: Sequence[Site], seed: Sequence[int]) -> Float[Tensor, "rows d_in"]:
    """The rows with those of each site but the first permuted, so that sites are paired at random."""
    parts = list(torch.split(x, [site.width for site in sites], dim=-1))
    for n in range(1, len(parts)):
        order = np.random.default_rng([*seed, n]).permutation(len(x))
        parts[n] = parts[n][torch.from_numpy(order)]
    return torch.cat(parts, dim=-1)


@torch.inference_mode()
def evaluate(
    sae: SAE,
    blocks: Iterable[SiteBlock],
    *,
    means: Sequence[Float[np.ndarray, " _"]],
    kept_tokens: int,
    device: str = "auto",
    kernels: str = "auto",
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of eval.json and of sites.safetensors of a crosscoder, from held-out rows.

    `means` are the mean held-out rows of the sites. The tensors: `fired` [d_sae], on how many held-out rows a feature
    is active; `norm_share` [d_sae, n_sites]; `cosine_<a>_<b>` [d_sae] for each pair of sites of one width, from 1.
    Raises: ValueError when there is no held-out token.
    """
    if kept_tokens < 1:
        raise ValueError("evaluation: the store has no held-out tokens. Harvest more text into a new store.")
    sites, placed = sites_of(sae), FrozenSAE(sae, device, kernels)
    mean = torch.from_numpy(np.concatenate(means))
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    sums: list[Sums] = []
    contexts: list[np.ndarray] = []
    with progress("eval", kept_tokens, "tok") as bar:
        for number_of, block in enumerate(blocks):
            acts, x_hat = placed.reconstruct(block.x)
            active = acts.firings(torch.ones(len(block.x), dtype=torch.bool))
            features = active.support.features.long()
            fired += torch.bincount(features, minlength=sae.d_sae)
            random_pairs = shuffled(block.x, sites, [SHUFFLE_SEED, number_of])
            _, shuffled_hat = placed.reconstruct(random_pairs)
            rows = {"rows": np.ones(len(block.x)), "l0": active.support.offsets.diff().double().numpy()}
            rows |= _site_sums("error", block.x.double() - x_hat.double(), sites)
            rows |= _site_sums("variance", block.x.double() - mean, sites)
            rows |= _site_sums("shuffled_error", random_pairs.double() - shuffled_hat.double(), sites)
            sums.append(rows)
            contexts.append(block.context)
            bar.update(len(block.x))
    joined = {name: np.concatenate([each[name] for each in sums]) for name in sums[0]}
    measured = _measured(joined, np.concatenate(contexts), sites)
    dead = int((fired == 0).sum())
    measured["dead_share"] = {
        "value": dead / sae.d_sae,
        "ci95": None,
        "formula": "share of features that are active on no held-out row",
        "version": 1,
    }
    decoders = site_decoders(sae, sites)
    shares, cosines = norm_shares(decoders), site_cosines(decoders)
    result = {
        "format": CROSSCODER_FORMAT,
        "kind": "crosscoder",
        "tokens": kept_tokens,
        "sites": [site._asdict() for site in sites],
        "shuffled_in_training": bool(sae.config.get("train", {}).get("shuffle_sites", False)),
        "metrics": measured,
        "norm_share": _shares_summary(shares[fired > 0], sites),
        "cosine": [_cosine_summary(pair, found[fired > 0], sites) for pair, found in cosines.items()],
    }
    tensors = {"fired": fired, "norm_share": shares.float()}
    tensors |= {f"cosine_{a + 1}_{b + 1}": found.float() for (a, b), found in cosines.items()}
    return result, tensors


def _site_sums(name: str, difference: Float[Tensor, "rows d_in"], sites: Sequence[Site]) -> Sums:
    """`s² ‖difference‖²` of each row at each site: in units where all sites have the same mean squared norm."""
    parts = torch.split(difference, [site.width for site in sites], dim=-1)
    return {
        f"{name}_{n}": (part.pow(2).sum(-1) * site.scale**2).numpy()
        for n, (part, site) in enumerate(zip(parts, sites, strict=True), 1)
    }


def _measured(sums: Sums, context: Int[np.ndarray, " rows"], sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """Each metric with its 95% bootstrap interval over contexts."""
    _, context = np.unique(context, return_inverse=True)
    drawn = Bootstrap(int(context.max()) + 1).drawn(sums, context)
    whole = {name: values.sum() for name, values in sums.items()}
    every = range(1, len(sites) + 1)

    def ratio(top: str, over: Iterable[int]) -> Callable[[Mapping[str, Any]], Any]:
        return lambda s: sum(s[f"{top}_{n}"] for n in over) / sum(s[f"variance_{n}"] for n in over)

    fvu = "Σ‖x−x̂‖² / Σ‖x−μ‖², μ the mean held-out row"
    metrics: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
        "l0": ("mean number of features with f > 0 per kept token", lambda s: s["l0"] / s["rows"]),
        "fvu": (f"{fvu}, over all sites, each in units where its mean ‖x‖² is 1", ratio("error", every)),
        **{f"fvu_site_{n}": (f"{fvu}, at {site.name}", ratio("error", [n])) for n, site in enumerate(sites, 1)},
        "fvu_random_pairs": (
            "fvu with each token's row at the other sites replaced by that of a token drawn at random: the control",
            ratio("shuffled_error", every),
        ),
    }
    found = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, (formula, of) in metrics.items():
            values = of(drawn)
            defined = values[np.isfinite(values)]
            ends = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
            interval = [number(end) for end in ends]
            found[name] = {"value": number(of(whole)), "ci95": interval, "formula": formula, "version": 1}
    return found


def _shares_summary(shares: Float[Tensor, "alive n_sites"], sites: Sequence[Site]) -> dict[str, Any]:
    """How many features belong to one site or to all, and the histogram of each site's share."""
    equal = 1 / len(sites)
    edges = np.linspace(0, 1, BINS + 1)
    return {
        "formula": "‖W_dec,i^s‖ / Σ_t ‖W_dec,i^t‖ of features that are active on held-out rows, in units where each "
        "site's mean ‖x‖² is 1 (Lindsey et al. 2024)",
        "features": len(shares),
        "one_site_above": ONE_SITE_ABOVE,
        "one_site": [int((shares[:, n] > ONE_SITE_ABOVE).sum()) for n in range(len(sites))],
        "shared_between": [equal * (1 - SHARED_WITHIN), equal * (1 + SHARED_WITHIN)],
        "shared": int(((shares - equal).abs() <= equal * SHARED_WITHIN).all(-1).sum()),
        "histogram": {
            "edges": edges.tolist(),
            "features": [np.histogram(shares[:, n].numpy(), edges)[0].tolist() for n in range(len(sites))],
        },
    }


def _cosine_summary(pair: tuple[int, int], cosine: Float[Tensor, " alive"], sites: Sequence[Site]) -> dict[str, Any]:
    """The distribution of the cosine between the decoder rows of two sites."""
    defined = cosine[cosine.isfinite()].numpy()
    quantiles = np.percentile(defined, [5, 50, 95]) if len(defined) else np.full(3, np.nan)
    return {
        "sites": [sites[n].name for n in pair],
        "formula": "cosine of W_dec,i^s and W_dec,i^t; comparable where both sites have the same basis, such as layers "
        "of one residual stream or a model and its tuned copy",
        **dict(zip(("p5", "median", "p95"), map(number, quantiles), strict=True)),
    }
