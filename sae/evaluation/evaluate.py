"""Evaluation on the frozen held-out split: fidelity, sparsity, domains, and the model's losses with x̂ in place of x.

A transcoder reads x and predicts y, the activations at its target hook point; for it, y takes the place of x in every
formula.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.inference import FrozenSAE
from sae.evaluation import metrics
from sae.evaluation.blocks import Ablated, Accumulator, Block, Blocks, EvaluatedBlock
from sae.evaluation.domains import DomainCounts, DomainFeatures, DomainFirings
from sae.evaluation.feature_stats import FeatureActivity
from sae.evaluation.geometry import a1_match, geometry
from sae.evaluation.outliers import inliers_of
from sae.evaluation.own_units import UnitsBaseline, verdict
from sae.evaluation.ratio_metrics import RatioMetrics
from sae.jobs.progress import progress
from sae.kernels import device_named, matmul
from sae.lm import LanguageModel
from sae.lm.splice import replaced_losses, splice_identity_error
from sae.lm.units import units_to_match
from sae.parallel.mesh import ONE, Mesh

__all__ = ["Ablated", "Block", "Blocks", "evaluate"]

EVAL_FORMAT = 2  # 2: the domains' features are chosen on text spread over the whole store
DONOR_SEED = 0
ABLATED = tuple(f"ce_{name}" for name in metrics.ABLATIONS)


@torch.inference_mode()
def evaluate(
    sae: SAE,
    model: LanguageModel | None,
    blocks: Iterable[Block],
    *,
    training: Iterable[Block],
    hook_point: str,
    heldout_mean: Float[np.ndarray, " d_out"],
    train_mean: Float[np.ndarray, " d_out"],
    donors: Float[Tensor, "n d_out"],
    domains: list[str],
    kept_tokens: int,
    device: str = "auto",
    kernels: str = "auto",
    ablated: Ablated | None = None,
    mesh: Mesh = ONE,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of eval.json and of feature_stats.safetensors, from the held-out `blocks`.

    x is replaced at kept positions only. A prediction counts when the position that makes it and its target are kept.
    `hook_point`, the means and the donors belong to what is replaced: x, or y for a transcoder.
    `blocks` are read several times: for the outliers, for the dictionary, and with x replaced by its k largest units, k
    being the dictionary's L0.
    `training` blocks choose each domain's feature; the held-out blocks judge it.
    Without a model, metrics of its losses are left out; those that depend on the rows alone are the same.
    `donors` are training rows: resample ablation replaces each x by one of these rows, drawn at random.
    The dictionary runs on `device`; statistics are counted on the CPU.
    `ablated` (at first {}) collects the losses under ablation, so that they are not measured again for the next
    dictionary at the same hook point and blocks.
    On a `mesh` of several ranks each passes its own blocks, of held-out and training text: block i of a rank is block
    i · world + rank of the whole. Rank 0 returns what one process returns, bit for bit, the others ({}, {}).
    Raises: ValueError when there is no held-out token.
    """
    assert iter(blocks) is not blocks, "the blocks are read several times, an iterator cannot be"
    if kept_tokens < 1:
        raise ValueError(
            "evaluation: the store has no held-out tokens. Harvest more text into a new store: of short documents one "
            "in twenty is held out, by its hash, and a twentieth of each long one."
        )
    placed = FrozenSAE(sae, device, kernels)
    runner = BlockRunner(placed, model, hook_point, train_mean, donors, ablated)
    activity = FeatureActivity(sae, kept_tokens)
    ratios = RatioMetrics(domains, heldout_mean, inliers_of(blocks, heldout_mean, kept_tokens, mesh))
    accumulators: list[Accumulator] = [
        ratios,
        activity,
        DomainFeatures(domains, sae.d_sae, _domain_counts(placed, sae.d_sae, training, len(domains), mesh)),
        *([SpliceCheck(model, hook_point)] if model else []),
    ]
    place = model.device if model else device_named(device)
    products, own_tokens = mesh.tell(matmul.choose("auto", place)), -(-kept_tokens // mesh.world)
    with progress("eval", own_tokens, "tok", shown=mesh.is_first) as bar, matmul.using(products):
        for block in blocks:
            evaluated = runner.run(block)
            for accumulator in accumulators:
                accumulator.add(evaluated)
            bar.update(int(block.keep.sum()))
    k = units_to_match(ratios.l0(mesh), sae.d_out)
    units = UnitsBaseline(model, hook_point, k, ablated)
    with progress("eval, own units", own_tokens, "tok", shown=mesh.is_first) as bar, matmul.using(products):
        for block in blocks:
            ratios.add_sums(block, units.sums(block))
            bar.update(int(block.keep.sum()))
    for accumulator in accumulators:
        accumulator.gather(mesh)
    if not mesh.is_first:
        return {}, {}
    sections = _joined(accumulator.result() for accumulator in accumulators)
    statistics, checks = activity.statistics, sections.pop("checks", {})
    score = sections["metrics"]["ce_loss_score_zero"]["value"] if model else None
    scores = _score_checks(sections["metrics"]) if model else {}
    result = {
        "format": EVAL_FORMAT,
        "tokens": kept_tokens,
        **({"transcodes": {"x": sae.config.get("hook_point"), "y": hook_point}} if sae.is_transcoder else {}),
        **sections,
        "units": verdict(sections["metrics"], k, sae.d_out),
        "decoder": geometry(sae.W_dec, statistics.count > 0),
        "beside_a1": a1_match(statistics.count, kept_tokens, statistics.largest, sae.W_dec, score),
        "checks": checks | _decoder_norms(sae) | scores,
    }
    return result, statistics.tensors()


class BlockRunner:
    """Runs a dictionary, and the model with what replaces x, on one block after another."""

    def __init__(
        self,
        placed: FrozenSAE,
        model: LanguageModel | None,
        hook_point: str,
        train_mean: Float[np.ndarray, " d_out"],
        donors: Float[Tensor, "n d_out"],
        ablated: Ablated | None,
    ) -> None:
        self._placed, self._model, self._hook_point = placed, model, hook_point
        self._mean = torch.from_numpy(train_mean.astype(np.float32))
        self._donors, self._draw = donors, np.random.default_rng(DONOR_SEED)
        self._ablated = ablated
        self._block = 0

    def run(self, block: Block) -> EvaluatedBlock:
        acts, x_hat = self._placed.reconstruct(block.acts.flatten(0, 1))
        x_hat = x_hat.view_as(block.wanted)
        return EvaluatedBlock(block, acts.firings(block.keep.flatten()), x_hat, self._losses(block, x_hat))

    def _losses(self, block: Block, x_hat: Float[Tensor, "contexts pos d_out"]) -> dict[str, Tensor]:
        """The losses with each replacement; those under ablation only if no earlier dictionary has measured them."""
        if self._model is None:
            return {}
        for contexts in block.skipped:
            self._drawn(contexts, block.keep.shape[1])
        donated = self._donors[torch.from_numpy(self._drawn(*block.keep.shape))]
        measured = (self._ablated or {}).get(self._block, {})
        known = {name: measured[name] for name in ABLATED if name in measured}
        ablations = {"zero": torch.zeros_like(self._mean), "mean": self._mean, "resample": donated}
        replacements = {"sae": x_hat, **({} if known else ablations)}
        losses = known | replaced_losses(
            self._model, block.tokens, block.keep, self._hook_point, replacements, divergence_of="sae"
        )
        if self._ablated is not None:
            self._ablated[self._block] = measured | {name: losses[name] for name in ABLATED}
        self._block += 1
        return losses

    def _drawn(self, contexts: int, positions: int) -> Int[np.ndarray, "contexts pos"]:
        return self._draw.integers(len(self._donors), size=(contexts, positions))


class SpliceCheck:
    """Accumulator of `checks`: the identity error of the splice on the first block."""

    def __init__(self, model: LanguageModel, hook_point: str) -> None:
        self._model, self._hook_point = model, hook_point
        self._error: float | None = None

    def add(self, evaluated: EvaluatedBlock) -> None:
        if self._error is None:
            self._error = splice_identity_error(self._model, evaluated.block.tokens, self._hook_point, evaluated.x_hat)

    def gather(self, mesh: Mesh) -> None:
        """The first block is rank 0's."""

    def result(self) -> dict[str, Any]:
        return {"checks": {"splice_identity_error": metrics.number(self._error or 0.0)}}


def _joined(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sections of all accumulators; if several give the same section, their entries are joined."""
    sections: dict[str, Any] = {}
    for result in results:
        for name, section in result.items():
            sections[name] = sections[name] | section if name in sections else section
    return sections


def _domain_counts(placed: FrozenSAE, d_sae: int, blocks: Iterable[Block], n_domains: int, mesh: Mesh) -> DomainCounts:
    """Firings and kept tokens of all ranks' blocks by domain."""
    firings = DomainFirings(d_sae, n_domains)
    for block in blocks:
        firings.add_block(placed.encode(block.acts.flatten(0, 1)).firings(block.keep.flatten()), block)
    firings.gather(mesh)
    return firings.counts


def _decoder_norms(sae: SAE) -> dict[str, float]:
    norms = sae.W_dec.norm(dim=-1)
    return {"decoder_norm_min": norms.min().item(), "decoder_norm_max": norms.max().item()}


def _score_checks(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """ce_zero − ce_clean in nats (None when nothing could be predicted), and whether it is too small for scores."""
    zero, clean = found["ce_zero"]["value"], found["ce_clean"]["value"]
    gap = None if zero is None or clean is None else zero - clean
    return {"ablation_gap_nats": gap, "scores_are_noise": gap is None or gap < metrics.MIN_ABLATION_GAP_NATS}
