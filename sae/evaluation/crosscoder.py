"""Evaluation of a crosscoder: fidelity at each site, sparsity, and which features belong to which sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.inference import FrozenSAE
from sae.dictionary.sites import Site, norm_shares, site_cosines, site_decoders, sites_of
from sae.evaluation import metrics
from sae.evaluation.metrics import Bootstrap, Metric, Sums, number
from sae.evaluation.site_shares import cosine_summary, shares_summary
from sae.jobs.progress import progress
from sae.kernels import device_named, matmul
from sae.lm import LanguageModel
from sae.lm.splice import jointly_replaced_losses, splice_identity_error
from sae.parallel.mesh import ONE, Mesh

CROSSCODER_FORMAT = 1
DONOR_SEED = 0
OF_ROWS = ("fvu",)
OF_LOSSES = (
    *(f"ce_loss_score_{ablation}" for ablation in metrics.ABLATIONS),
    "delta_ce",
    *(f"ce_{which}" for which in ("clean", "sae", *metrics.ABLATIONS)),
)
WHOLE = {
    "l0": metrics.METRICS["l0"],
    "fvu": Metric(
        "Σ‖x−x̂‖² / Σ‖x−μ‖² over all sites, each in units where its mean ‖x‖² in training is 1; μ the mean held-out row",
        metrics.METRICS["fvu"].of,
        "One number for all sites: a bad reconstruction at one hides behind good ones. Read fvu_site_n.",
    ),
    "fvu_random_pairs": Metric(
        "fvu with each token's row at the other sites than the first replaced by that of a training token drawn at "
        "random, for each site by itself: the control",
        lambda s: np.asarray(s["random_error"]) / np.asarray(s["random_variance"]),
        "Near fvu, the features do not depend on which tokens the sites' rows belong to: nothing is shared.",
    ),
}


class SiteBlock(NamedTuple):
    """Some whole contexts with the joined rows of all sites, in the models' own units."""

    x: Float[Tensor, "contexts pos d_in"]
    tokens: Int[Tensor, "contexts pos"]
    keep: Bool[Tensor, "contexts pos"]
    skipped: tuple[int, ...] = ()  # contexts of the blocks since the last one here, which other ranks evaluate


class SiteModel(NamedTuple):
    """A model with the sites that are hook points of it: `hook_points` by the number of the site, from 1."""

    model: LanguageModel
    hook_points: dict[int, str]


class Means(NamedTuple):
    """Mean rows of all sites, joined."""

    heldout: Float[np.ndarray, " d_in"]
    train: Float[np.ndarray, " d_in"]


@torch.inference_mode()
def evaluate(
    sae: SAE,
    models: Sequence[SiteModel],
    blocks: Iterable[SiteBlock],
    *,
    means: Means,
    donors: Sequence[Float[Tensor, "n _"]],
    kept_tokens: int,
    device: str = "auto",
    kernels: str = "auto",
    mesh: Mesh = ONE,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of eval.json and of sites.safetensors of a crosscoder, from the held-out `blocks`.

    x̂ is computed from the rows of all sites as they are. It takes the place of x at one site at a time and, where a
    model has several sites, at all of these at once. Sites whose model is not in `models` have no losses.
    `donors` are training rows of each site: random pairs and resample ablation draw from them, for each site by itself.
    The tensors: `fired` [d_sae], on how many held-out rows a feature is active; `norm_share` [d_sae, n_sites];
    `cosine_<a>_<b>` [d_sae] for each pair of sites of one width, from 1.
    On a `mesh` each rank passes its own blocks, as in `sae.evaluation.evaluate`, and rank 0 alone returns the result.
    Raises: ValueError when there is no held-out token.
    """
    if kept_tokens < 1:
        raise ValueError("evaluation: the store has no held-out tokens. Harvest more text into a new store.")
    sites, placed = sites_of(sae), FrozenSAE(sae, device, kernels)
    runner = SiteRunner(placed, sites, models, means, donors)
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    sums: list[Sums] = []
    place = models[0].model.device if models else device_named(device)
    products, own_tokens = mesh.tell(matmul.choose("auto", place)), -(-kept_tokens // mesh.world)
    with progress("eval", own_tokens, "tok", shown=mesh.is_first) as bar, matmul.using(products):
        for block in blocks:
            found, features = runner.run(block)
            fired += torch.bincount(features, minlength=sae.d_sae)
            sums.append(found)
            bar.update(int(block.keep.sum()))
    mesh.reduce_(fired, "sum", "world")
    names = mesh.tell(sorted(sums[0]) if sums else [])  # rank 0 has the first block
    pieces = {name: mesh.in_order([each[name] for each in sums], np.empty(0)) for name in names}
    if not mesh.is_first:
        return {}, {}
    by_context = {name: np.concatenate(parts) for name, parts in pieces.items()}
    measured = _measured(by_context, sites, models)
    measured["dead_share"] = {
        "value": int((fired == 0).sum()) / sae.d_sae,
        "ci95": None,
        "formula": "share of features with no firing in the kept held-out tokens",
        "version": 1,
    }
    decoders = site_decoders(sae, sites)
    shares, cosines = norm_shares(decoders), site_cosines(decoders)
    result = {
        "format": CROSSCODER_FORMAT,
        "kind": "crosscoder",
        "tokens": kept_tokens,
        "sites": [site._asdict() for site in sites],
        "models": [{"id": each.model.id, "sites": sorted(each.hook_points)} for each in models],
        "shuffled_in_training": bool(sae.config.get("train", {}).get("shuffle_sites", False)),
        "metrics": measured,
        "norm_share": shares_summary(shares[fired > 0]),
        "cosine": [cosine_summary(pair, found[fired > 0], sites) for pair, found in cosines.items()],
        "checks": _checks(measured, models, runner.splice_identity_errors),
    }
    tensors = {"fired": fired, "norm_share": shares.float()}
    tensors |= {f"cosine_{a + 1}_{b + 1}": found.float() for (a, b), found in cosines.items()}
    return result, tensors


class SiteRunner:
    """Runs a crosscoder, and its models with what replaces x at their sites, on one block after another."""

    def __init__(
        self,
        placed: FrozenSAE,
        sites: Sequence[Site],
        models: Sequence[SiteModel],
        means: Means,
        donors: Sequence[Float[Tensor, "n _"]],
    ) -> None:
        self._placed, self._sites, self._models = placed, sites, models
        self._heldout_mean = torch.from_numpy(means.heldout)
        self._train_mean = _parts(torch.from_numpy(means.train.astype(np.float32)), sites)
        self._donors, self._draw = donors, np.random.default_rng(DONOR_SEED)
        self.splice_identity_errors: dict[int, float] = {}  # by site, on the first block

    def run(self, block: SiteBlock) -> tuple[Sums, Int[Tensor, " firings"]]:
        """The sums of each context, by the names of `metrics.SUMS` and of the site or model, and what fires."""
        for contexts in block.skipped:
            for donors in (*self._donors[1:], *self._donors):  # as for random pairs, and for resample ablation
                self._drawn(donors, (contexts, block.keep.shape[1]))
        acts, x_hat = self._placed.reconstruct(block.x.flatten(0, 1))
        x_hat = x_hat.view_as(block.x)
        fired = acts.firings(block.keep.flatten())
        of_rows = {
            "rows": torch.ones(block.keep.shape),
            "l0": fired.support.offsets.diff().view(block.keep.shape),
            **self._squares("error", block.x.double() - x_hat.double()),
            **self._squares("variance", block.x.double() - self._heldout_mean),
            **self._random_pairs(block),
        }
        drawn = [self._donated(part, block) for part in self._donors]  # also without a model: the same draws
        of_predictions: dict[str, Tensor] = {}
        for number_of, each in enumerate(self._models, 1):
            of_predictions |= self._losses(number_of, each, block, x_hat, drawn)
        predicts = block.keep & torch.nn.functional.pad(block.keep[:, 1:], (0, 1))
        if of_predictions:
            of_predictions["predictions"] = torch.ones(block.keep.shape)
        counted = [(block.keep, of_rows), (predicts, of_predictions)]
        sums = {
            name: torch.where(counts, value.double(), 0.0).sum(-1).numpy()
            for counts, values in counted
            for name, value in values.items()
        }
        return sums, fired.support.features.long()

    def _squares(self, name: str, difference: Float[Tensor, "contexts pos d_in"]) -> dict[str, Tensor]:
        """`‖difference‖²` at each site; over all sites, `Σ_s s² ‖difference^s‖²`: all have one mean squared norm."""
        squares = [part.pow(2).sum(-1) for part in _parts(difference, self._sites)]
        whole = torch.stack([square * site.scale**2 for square, site in zip(squares, self._sites, strict=True)]).sum(0)
        return {name: whole} | {f"{name}_site_{n}": square for n, square in enumerate(squares, 1)}

    def _random_pairs(self, block: SiteBlock) -> dict[str, Tensor]:
        first, *_ = _parts(block.x, self._sites)
        x = torch.cat([first, *(self._donated(part, block) for part in self._donors[1:])], dim=-1)
        _, x_hat = self._placed.reconstruct(x.flatten(0, 1))
        return {
            "random_error": self._squares("", x.double() - x_hat.view_as(x).double())[""],
            "random_variance": self._squares("", x.double() - self._heldout_mean)[""],
        }

    def _donated(self, donors: Float[Tensor, "n _"], block: SiteBlock) -> Float[Tensor, "contexts pos _"]:
        return donors[torch.from_numpy(self._drawn(donors, block.keep.shape))]

    def _drawn(self, donors: Float[Tensor, "n _"], shape: tuple[int, ...]) -> Int[np.ndarray, "contexts pos"]:
        return self._draw.integers(len(donors), size=shape)

    def _losses(
        self,
        number_of: int,
        group: SiteModel,
        block: SiteBlock,
        x_hat: Float[Tensor, "contexts pos d_in"],
        drawn: Sequence[Float[Tensor, "contexts pos _"]],
    ) -> dict[str, Float[Tensor, "contexts pos"]]:
        """The losses of a model with each replacement, at one site at a time and at all of its sites at once."""
        parts = _parts(x_hat, self._sites)
        zeros = [torch.zeros_like(mean) for mean in self._train_mean]
        by_name = {"sae": parts, "zero": zeros, "mean": self._train_mean, "resample": drawn}
        runs: dict[str, dict[str, Tensor]] = {f"clean_model_{number_of}": {}}
        for where, at in places(number_of, group):
            for name, values in by_name.items():
                runs[f"{name}_{where}"] = {group.hook_points[n]: values[n - 1] for n in at}
        for n, hook_point in group.hook_points.items():
            if n not in self.splice_identity_errors:
                error = splice_identity_error(group.model, block.tokens, hook_point, parts[n - 1])
                self.splice_identity_errors[n] = error
        losses = jointly_replaced_losses(group.model, block.tokens, block.keep, runs)
        clean = losses[f"ce_clean_model_{number_of}"]
        return losses | {f"ce_clean_{where}": clean for where, _ in places(number_of, group)}


def places(number_of: int, group: SiteModel) -> Iterator[tuple[str, list[int]]]:
    """Where a model's activations are replaced: `site_n` for each site and, if it has several, `model_n` for all."""
    for n in group.hook_points:
        yield f"site_{n}", [n]
    if len(group.hook_points) > 1:
        yield f"model_{number_of}", list(group.hook_points)


def _parts(x: Tensor, sites: Sequence[Site]) -> list[Tensor]:
    return list(torch.split(x, [site.width for site in sites], dim=-1))


def _measured(by_context: Sums, sites: Sequence[Site], models: Sequence[SiteModel]) -> dict[str, dict[str, Any]]:
    """Each metric with its 95% bootstrap interval over contexts: of all sites, then of each site, then of models."""
    contexts = len(by_context["rows"])
    drawn = Bootstrap(contexts).drawn(by_context, np.arange(contexts))
    whole = {name: values.sum() for name, values in by_context.items()}

    def entry(metric: Metric, where: str = "", what: str = "") -> dict[str, Any]:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.asarray(metric.of(_at(drawn, where)))
            value = number(metric.of(_at(whole, where)))
        defined = values[np.isfinite(values)]
        ends = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
        formula = metric.formula + (f"; {what}" if what else "")
        return {"value": value, "ci95": [number(end) for end in ends], "formula": formula, "version": metric.version}

    found = {name: entry(metric) for name, metric in WHOLE.items()}
    for n, site in enumerate(sites, 1):
        for name in OF_ROWS:
            found[f"{name}_site_{n}"] = entry(metrics.METRICS[name], f"site_{n}", f"x the row at {site.name}")
    for number_of, group in enumerate(models, 1):
        for where, at in places(number_of, group):
            what = f"x the row{'s' if len(at) > 1 else ''} at {' and '.join(sites[n - 1].name for n in at)}"
            for name in OF_LOSSES:
                found[f"{name}_{where}"] = entry(metrics.METRICS[name], where, what)
    return found


def _at(sums: Mapping[str, Float64[np.ndarray, ...] | float], where: str) -> dict[str, Any]:
    """The sums of one place under the names of `metrics.SUMS`."""
    if not where:
        return dict(sums)
    here = {name.removesuffix(f"_{where}"): values for name, values in sums.items() if name.endswith(f"_{where}")}
    return {name: sums[name] for name in ("rows", "predictions") if name in sums} | here


def _checks(
    measured: Mapping[str, Mapping[str, Any]], models: Sequence[SiteModel], errors: Mapping[int, float]
) -> dict[str, dict[str, Any]]:
    """For each place where x is replaced: ce_zero − ce_clean, whether scores are noise, the splice's identity error."""
    found: dict[str, dict[str, Any]] = {}
    for number_of, group in enumerate(models, 1):
        for where, at in places(number_of, group):
            zero, clean = (measured[f"{name}_{where}"]["value"] for name in ("ce_zero", "ce_clean"))
            gap = None if zero is None or clean is None else zero - clean
            found[where] = {
                "ablation_gap_nats": gap,
                "scores_are_noise": gap is None or gap < metrics.MIN_ABLATION_GAP_NATS,
                "splice_identity_error": number(max(errors[n] for n in at)),
            }
    return found
