"""Evaluation on the frozen held-out split: fidelity, sparsity, and what the model loses with x̂ in place of x."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae import metrics
from sae.lm import LanguageModel, Splice
from sae.model import SAE
from sae.progress import progress

EVAL_FORMAT = 1


class Block(NamedTuple):
    """Some whole contexts with their activations; `domain` numbers each position's domain (-1: padding)."""

    acts: Float[Tensor, "contexts pos d_in"]
    tokens: Int[Tensor, "contexts pos"]
    keep: Bool[Tensor, "contexts pos"]
    domain: Int[np.ndarray, "contexts pos"]


@dataclass
class Firings:
    """Counts and values of every activation, collected over the held-out rows."""

    count: np.ndarray
    largest: np.ndarray
    features: list[np.ndarray]
    values: list[np.ndarray]

    @classmethod
    def empty(cls, d_sae: int) -> Firings:
        return cls(np.zeros(d_sae, np.int64), np.zeros(d_sae, np.float32), [], [])

    def add(self, features: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
        """Activations of kept rows, in any order; what is not positive is none."""
        fired = values > 0
        self.features.append(features[fired].numpy().astype(np.uint32))
        self.values.append(values[fired].float().numpy())
        self.count += np.bincount(self.features[-1], minlength=len(self.count))
        np.maximum.at(self.largest, self.features[-1], self.values[-1])

    def statistics(self) -> dict[str, Tensor]:
        """count, max, mean and P99 (both over the firings) per feature; zero where a feature never fired."""
        features = np.concatenate(self.features) if self.features else np.empty(0, np.uint32)
        values = np.concatenate(self.values) if self.values else np.empty(0, np.float32)
        order = np.lexsort((values, features))
        features, values = features[order], values[order]
        ends = np.cumsum(self.count)
        fired = self.count > 0
        p99 = np.zeros_like(self.largest)
        # The smallest value with at least 99% of the firings at or below it.
        place = (ends - self.count + np.ceil(0.99 * self.count).astype(np.int64) - 1)[fired]
        p99[fired] = values[place]
        sums = np.bincount(features, values, minlength=len(self.count)).astype(np.float64)  # int64 of nothing
        mean = np.divide(sums, self.count, out=np.zeros_like(sums), where=fired)
        return {
            "count": torch.from_numpy(self.count.copy()),
            "max": torch.from_numpy(self.largest.copy()),
            "mean": torch.from_numpy(mean.astype(np.float32)),
            "p99": torch.from_numpy(p99),
        }


@torch.inference_mode()
def evaluate(
    sae: SAE,
    model: LanguageModel,
    blocks: Iterable[Block],
    *,
    hook_point: str,
    heldout_mean: np.ndarray,
    train_mean: np.ndarray,
    domains: list[str],
    kept_tokens: int,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of eval.json and of feature_stats.safetensors.

    x is replaced at kept positions only; a prediction counts when the token it is made from and its target are kept.
    Raises: ValueError when there is no held-out token.
    """
    if kept_tokens < 1:
        raise ValueError(
            "evaluation: the store has no held-out tokens. One document in twenty is held out, by its hash; "
            "harvest more documents."
        )
    per_context: dict[str, list[np.ndarray]] = {name: [] for name in metrics.SUMS}
    per_domain = {name: np.zeros(len(domains)) for name in metrics.SUMS}
    firings = Firings.empty(sae.d_sae)
    identity_error = 0.0
    centre = torch.from_numpy(heldout_mean.astype(np.float32))
    replacements = {"zero": torch.zeros(sae.d_in), "mean": torch.from_numpy(train_mean.astype(np.float32))}
    with progress("eval", kept_tokens, "tok") as bar:
        for number, block in enumerate(blocks):
            x = block.acts
            acts = sae.feature_acts(x.flatten(0, 1)).sparse()
            x_hat = sae.output(acts, x.flatten(0, 1)).view_as(x)
            kept = block.keep.flatten()[acts.support.rows]
            firings.add(acts.support.features[kept], acts.values[kept])
            l0 = torch.bincount(acts.support.rows[kept & (acts.values > 0)], minlength=block.keep.numel())
            l0 = l0.view(block.keep.shape)
            losses = _losses(model, block, hook_point, x_hat, replacements)
            if number == 0:
                identity_error = _splice_identity_error(model, block, hook_point, x_hat)
            sums = _position_sums(block, x, x_hat, centre, l0, losses)
            for name, positions in sums.items():
                per_context[name].append(positions.sum(1))
                known = block.domain >= 0
                per_domain[name] += np.bincount(block.domain[known], positions[known], minlength=len(domains))
            bar.update(int(block.keep.sum()))
    sums = {name: np.concatenate(parts) for name, parts in per_context.items()}
    found = metrics.summarise(sums) | metrics.firing_summary(firings.count, kept_tokens)
    gap = _ablation_gap(found)
    norms = sae.W_dec.norm(dim=-1)
    grouped = metrics.by_group(per_domain)
    result = {
        "format": EVAL_FORMAT,
        "tokens": kept_tokens,
        "metrics": found,
        "by_domain": {
            domain: {"tokens": int(per_domain["rows"][i]), **grouped[str(i)]} for i, domain in enumerate(domains)
        },
        "density": metrics.density_histogram(firings.count, kept_tokens),
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


def _losses(
    model: LanguageModel, block: Block, hook_point: str, x_hat: Tensor, replacements: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Next-token losses, aligned to the position they are predicted from; the last position has none (0)."""
    splices: dict[str, Splice | None] = {"clean": None, "sae": _splice(block.keep, x_hat)}
    splices |= {name: _splice(block.keep, row.expand_as(x_hat)) for name, row in replacements.items()}
    found = {}
    for name, splice in splices.items():
        losses = model.token_losses(block.tokens, hook_point if splice else None, splice)
        found[name] = torch.nn.functional.pad(losses, (0, 1))
    return found


def _splice(keep: Tensor, replacement: Tensor) -> Splice:
    return lambda x: torch.where(keep[..., None].to(x.device), replacement.to(x.device), x)


def _splice_identity_error(model: LanguageModel, block: Block, hook_point: str, x_hat: Tensor) -> float:
    """max |loss(x̂ + (x − x̂)) − loss(x)|: near zero when the splice replaces what it should and nothing else."""
    clean = model.token_losses(block.tokens)
    back = model.token_losses(block.tokens, hook_point, lambda x: x_hat.to(x.device) + (x - x_hat.to(x.device)))
    return (clean - back).abs().max().item()


def _position_sums(
    block: Block, x: Tensor, x_hat: Tensor, centre: Tensor, l0: Tensor, losses: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    """What each position adds to each sum: float64 [contexts, pos], zero where it does not count."""
    keep = block.keep
    predicts = keep & torch.nn.functional.pad(keep[:, 1:], (0, 1))
    x, x_hat = x.double(), x_hat.double()
    dot = (x * x_hat).sum(-1)
    values = {
        "rows": torch.ones_like(dot),
        "l0": l0.double(),
        "error": (x - x_hat).pow(2).sum(-1),
        "variance": (x - centre.double()).pow(2).sum(-1),
        "cosine": dot / (x.norm(dim=-1) * x_hat.norm(dim=-1)).clamp_min(1e-12),
        "hat_hat": x_hat.pow(2).sum(-1),
        "x_hat": dot,
    }
    sums = {name: torch.where(keep, value, 0.0).numpy() for name, value in values.items()}
    sums["predictions"] = predicts.double().numpy()
    for name, loss in losses.items():
        sums[f"ce_{name}"] = torch.where(predicts, loss.double().cpu(), 0.0).numpy()
    return sums
