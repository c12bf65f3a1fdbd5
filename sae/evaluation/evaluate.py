"""Evaluation on the frozen held-out split: fidelity, sparsity, domains, and the model's losses with x̂ in place of x.

A transcoder reads x and predicts y, the activations at its target hook point: there y stands for x in every formula.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.inference import Placed
from sae.evaluation import metrics
from sae.evaluation.domains import domain_quality
from sae.evaluation.feature_stats import Firings, by_density, density_histogram, firing_summary
from sae.evaluation.geometry import beside_a1, geometry
from sae.jobs.progress import progress
from sae.kernels import matmul
from sae.kernels.activations import SparseActs
from sae.lm import LanguageModel
from sae.lm.splice import replaced_losses, splice_identity_error

EVAL_FORMAT = 2  # 2: domains' features are chosen on text spread over the store
DONOR_SEED = 0

Ablated = dict[int, dict[str, Tensor]]  # by block: what the model loses there whatever the dictionary


class Block(NamedTuple):
    """Some whole contexts with their activations; `domain` numbers each position's domain (-1: none of those named).

    `target` is a transcoder's y.
    """

    acts: Float[Tensor, "contexts pos d_in"]
    tokens: Int[Tensor, "contexts pos"]
    keep: Bool[Tensor, "contexts pos"]
    domain: Int[np.ndarray, "contexts pos"]
    target: Float[Tensor, "contexts pos d_out"] | None = None

    @property
    def wanted(self) -> Float[Tensor, "contexts pos d_out"]:
        """What a dictionary is to give back: x, or y of a transcoder."""
        return self.acts if self.target is None else self.target


@torch.inference_mode()
def evaluate(
    sae: SAE,
    model: LanguageModel,
    blocks: Iterable[Block],
    *,
    training: Iterable[Block],
    hook_point: str,
    heldout_mean: np.ndarray,
    train_mean: np.ndarray,
    donors: Float[Tensor, "n d_out"],
    domains: list[str],
    kept_tokens: int,
    device: str = "auto",
    kernels: str = "auto",
    ablated: Ablated | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of eval.json and of feature_stats.safetensors.

    x is replaced at kept positions only; a prediction counts when the token it is made from and its target are kept.
    `hook_point`, the means and the donors are of what is replaced: x, or y of a transcoder.
    `training` blocks choose each domain's feature, which the held-out ones judge.
    `donors` are training rows: resample ablation puts one of them, drawn at random, in place of each x.
    The dictionary runs on `device`; statistics are counted on the CPU. `ablated`, empty at first, is filled with the
    losses under ablation, which the next dictionary at the same hook point and blocks need not measure again.
    Raises: ValueError when there is no held-out token.
    """
    if kept_tokens < 1:
        raise ValueError(
            "evaluation: the store has no held-out tokens. One document in twenty is held out, by its hash; "
            "harvest more documents."
        )
    placed = Placed(sae, device, kernels)
    sums = ContextSums(len(domains))
    firings = Firings(sae.d_sae, n_places=len(domains) + 1)
    identity_error = 0.0
    centre = torch.from_numpy(heldout_mean.astype(np.float32))
    baseline = {"zero": torch.zeros(sae.d_out), "mean": torch.from_numpy(train_mean.astype(np.float32))}
    draw = np.random.default_rng(DONOR_SEED)
    with progress("eval", kept_tokens, "tok") as bar, matmul.using(matmul.choose("auto", model.device)):
        for number, block in enumerate(blocks):
            x = block.wanted
            acts, x_hat = placed.reconstruct(block.acts.flatten(0, 1))
            x_hat = x_hat.view_as(x)
            l0 = _record(firings, acts, block)
            given = donors[torch.from_numpy(draw.integers(len(donors), size=block.keep.shape))]
            known = {} if ablated is None else ablated.get(number, {})
            replacements = {"sae": x_hat} if known else {"sae": x_hat, **baseline, "resample": given}
            losses = known | replaced_losses(
                model, block.tokens, block.keep, hook_point, replacements, divergence_of="sae"
            )
            if ablated is not None:
                ablated[number] = {f"ce_{name}": losses[f"ce_{name}"] for name in metrics.ABLATIONS}
            if number == 0:
                identity_error = splice_identity_error(model, block.tokens, hook_point, x_hat)
            sums.add(block, _position_sums(block, x, x_hat, centre, l0, losses))
            bar.update(int(block.keep.sum()))
    found = metrics.summarise(sums.by_context()) | firing_summary(firings.count, kept_tokens)
    gap = _ablation_gap(found)
    norms = sae.W_dec.norm(dim=-1)
    # A transcoder's two directions live in different spaces.
    d_dot_e = torch.full((sae.d_sae,), torch.nan) if sae.is_transcoder else (sae.W_enc.T * sae.W_dec).sum(-1)
    result = {
        "format": EVAL_FORMAT,
        "tokens": kept_tokens,
        **({"transcodes": {"x": sae.config.get("hook_point"), "y": hook_point}} if sae.is_transcoder else {}),
        "metrics": found,
        "by_domain": {
            domain: {"tokens": tokens, **entry}
            for domain, tokens, entry in zip(domains, firings.tokens.tolist(), sums.by_domain(), strict=False)
        },
        "l0": firings.l0(),
        "density": density_histogram(firings.count, kept_tokens),
        "by_density": by_density(firings.count, kept_tokens, sae.b_enc.numpy(), d_dot_e.numpy()),
        "domains": domain_quality(
            _domain_counts(placed, sae.d_sae, training, len(domains)), (firings.by_place(), firings.tokens), domains
        ),
        "decoder": geometry(sae.W_dec, firings.count > 0),
        "beside_a1": beside_a1(
            firings.count, kept_tokens, firings.largest, sae.W_dec, found["ce_loss_score_zero"]["value"]
        ),
        "checks": {
            "splice_identity_error": metrics.number(identity_error),
            "decoder_norm_min": norms.min().item(),
            "decoder_norm_max": norms.max().item(),
            "ablation_gap_nats": gap,
            "scores_are_noise": gap is None or gap < metrics.MIN_ABLATION_GAP_NATS,
        },
    }
    return result, firings.statistics()


def _ablation_gap(found: dict[str, dict[str, Any]]) -> float | None:
    """ce_zero − ce_clean, nats; None when nothing could be predicted."""
    zero, clean = found["ce_zero"]["value"], found["ce_clean"]["value"]
    return None if zero is None or clean is None else zero - clean


def _record(firings: Firings, acts: SparseActs, block: Block) -> Int[Tensor, "contexts pos"]:
    """Adds what fires on kept tokens, by domain (tokens of no named domain last); returns how many do by position."""
    rows = acts.support.rows
    kept = block.keep.flatten()[rows]
    place = np.where(block.domain < 0, firings.n_places - 1, block.domain).reshape(-1)
    firings.add(acts.support.features[kept], acts.values[kept], place[rows[kept].numpy()])
    l0 = torch.bincount(rows[kept & (acts.values > 0)], minlength=block.keep.numel()).view(block.keep.shape)
    firings.add_rows(l0[block.keep], place[block.keep.flatten().numpy()])
    return l0


def _domain_counts(
    placed: Placed, d_sae: int, blocks: Iterable[Block], n_domains: int
) -> tuple[np.ndarray, np.ndarray]:
    """Firings [d_sae, domains + 1] and kept tokens [domains + 1] of some blocks."""
    firings = Firings(d_sae, n_places=n_domains + 1)
    for block in blocks:
        _record(firings, placed.encode(block.acts.flatten(0, 1)), block)
    return firings.by_place(), firings.tokens


class ContextSums:
    """What each context adds to each sum, domain by domain: kept only for the domains a context has."""

    def __init__(self, n_domains: int) -> None:
        self.n_domains, self.n_contexts = n_domains, 0
        self._context: list[np.ndarray] = []
        self._domain: list[np.ndarray] = []
        self._sums: dict[str, list[np.ndarray]] = {name: [] for name in metrics.SUMS}

    def add(self, block: Block, positions: metrics.Sums) -> None:
        """`positions[name]` is [contexts, pos], zero where a position does not count."""
        known = block.domain >= 0
        context = np.broadcast_to(np.arange(len(block.domain))[:, None], known.shape)[known]
        cells, cell = np.unique(context * self.n_domains + block.domain[known], return_inverse=True)
        self._context.append(cells // self.n_domains + self.n_contexts)
        self._domain.append(cells % self.n_domains)
        for name, values in positions.items():
            self._sums[name].append(np.bincount(cell, values[known], minlength=len(cells)))
        self.n_contexts += len(block.domain)

    def by_context(self) -> metrics.Sums:
        context, _, sums = self._joined()
        return {name: np.bincount(context, values, minlength=self.n_contexts) for name, values in sums.items()}

    def by_domain(self) -> list[dict[str, Any]]:
        context, domain, sums = self._joined()
        return metrics.by_group(sums, context, domain, self.n_domains, metrics.Bootstrap(self.n_contexts))

    def _joined(self) -> tuple[np.ndarray, np.ndarray, metrics.Sums]:
        context, domain = (np.concatenate([np.empty(0, np.int64), *part]) for part in (self._context, self._domain))
        return context, domain, {name: np.concatenate([np.empty(0), *parts]) for name, parts in self._sums.items()}


def _position_sums(
    block: Block, x: Tensor, x_hat: Tensor, centre: Tensor, l0: Tensor, losses: dict[str, Tensor]
) -> metrics.Sums:
    """What each position adds to each sum: float64 [contexts, pos], zero where it does not count."""
    keep = block.keep
    predicts = keep & torch.nn.functional.pad(keep[:, 1:], (0, 1))
    x, x_hat = x.double(), x_hat.double()
    dot, norm, norm_hat = (x * x_hat).sum(-1), x.norm(dim=-1), x_hat.norm(dim=-1)
    values = {
        "rows": torch.ones_like(dot),
        "l0": l0.double(),
        "error": (x - x_hat).pow(2).sum(-1),
        "variance": (x - centre.double()).pow(2).sum(-1),
        "cosine": dot / (norm * norm_hat).clamp_min(1e-12),
        "hat_hat": norm_hat.pow(2),
        "x_hat": dot,
        "norm": norm,
        "norm_hat": norm_hat,
    }
    sums = {name: torch.where(keep, value, 0.0).numpy() for name, value in values.items()}
    sums["predictions"] = predicts.double().numpy()
    for name, loss in losses.items():
        sums[name] = torch.where(predicts, loss.double(), 0.0).numpy()
    return sums
