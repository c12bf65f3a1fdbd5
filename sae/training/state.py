"""The state of a running training: initialised from a sample, saved in one file, restored bit for bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.outliers import outliers_among
from sae.dictionary.sites import Site, fold_site_scales
from sae.kernels import choose, device_named, matmul
from sae.kernels.activations import FeatureActs
from sae.kernels.autograd import Kernels
from sae.kernels.bfloat16 import selecting_in
from sae.parallel.kernels import agreeing
from sae.parallel.mesh import ONE, Mesh
from sae.training.adam import Adam
from sae.training.config import TrainConfig
from sae.training.fixed_plan import FixedPlan, plan_for
from sae.training.recipes import Recipe
from sae.training.rows import Downstream, ModelRows, Rows, SiteRows, TargetRows, samples_together
from sae.training.shard import Shard, dealt
from sae.training.snapshots import Snapshots
from sae.training.sparsity_penalty import LambdaController
from sae.training.start_from import start_from_
from sae.training.state_files import read_state, write_state

SCALE_ROWS, SCALE_ROWS_AT_ONCE = 65_536, 4096


@dataclass
class TrainState:
    """Everything that changes while training; the training functions themselves have no state."""

    sae: SAE  # on scaled inputs
    optimizer: Adam
    scale: float
    tokens_since_fired: Int[Tensor, " d_sae"]
    penalty: LambdaController
    step: int = 0
    density: float = 1.0  # share of features active at the last step: decides between dense and sparse products
    # {"step", "features": how many} of each event; resampled.jsonl, which may be long, lists the features
    resampled: list[dict[str, int]] = field(default_factory=list)
    target_scale: float = 0.0  # of y, where it is not x
    downstream: Downstream | None = None  # not saved: it comes with the rows
    matmul: str = "highest"  # how dense products are computed: chosen at the start, kept when the run resumes
    sites: tuple[Site, ...] = ()  # of a crosscoder's rows; not saved: they come with the rows
    fixed_plan: FixedPlan | None = None  # of fixed-shape steps, which a run on a GPU takes
    mesh: Mesh = ONE  # the ranks that train together; this state is of the features of one shard

    @property
    def device(self) -> torch.device:
        return self.tokens_since_fired.device

    def dead(self, after_tokens: int) -> Bool[Tensor, " d_sae"]:
        """Features that have not fired for this many tokens."""
        return self.tokens_since_fired >= after_tokens

    def count_firings(self, acts: FeatureActs) -> None:
        """Takes in the firings of a batch."""
        self.tokens_since_fired += acts.n_rows * self.mesh.row_groups
        fired = acts.fired()
        if self.mesh.row_groups > 1:
            fired = self.mesh.reduce(fired.to(torch.uint8), "max", "rows").bool()
        self.tokens_since_fired[fired] = 0


def start(
    rows: Rows,
    config: TrainConfig,
    recipe: Recipe,
    kernels: Kernels,
    device: str | torch.device = "cpu",
    source: SAE | None = None,
    mesh: Mesh = ONE,
) -> TrainState:
    """A new run, from the dictionary `source` if there is one. On a mesh rank 0 makes it and deals out the shards.

    Raises: ValueError when the rows are all zero or lack what the recipe needs; CannotStart if the recipe cannot start
    from `source`.
    """
    downstream, sites = _downstream(rows, recipe), _sites(rows, recipe)
    place = torch.device(device if mesh.world == 1 else "cpu")  # one rank need not have room for the whole dictionary
    samples = _samples(rows, config, recipe) if mesh.is_first or samples_together(rows) else ()
    whole, scales = _initialised(rows, samples, config, recipe, source, place) if mesh.is_first else (None, (0.0, 0.0))
    sae = dealt(_dictionary(rows, config, recipe, mesh), whole, config.d_sae)
    scale, target_scale = mesh.tell(scales)
    products = mesh.tell(matmul.choose(config.products, device))  # one choice for all ranks, whatever their processors
    kernels = agreeing(selecting_in(config.precision, kernels), mesh)
    return TrainState(
        sae,
        _adam(sae.to(device), kernels, config, recipe, mesh),
        scale,
        torch.zeros(sae.d_sae, dtype=torch.int64, device=device),
        LambdaController.start(config, getattr(config, recipe.coefficient) if recipe.coefficient else 0.0),
        target_scale=target_scale,
        downstream=downstream,
        matmul=products,
        sites=sites,
        fixed_plan=plan_for(recipe, config, sae.W_enc.device, kernels.NAME) if mesh.world == 1 else None,
        mesh=mesh,
    )


def _samples(rows: Rows, config: TrainConfig, recipe: Recipe) -> tuple[Tensor, ...]:
    """Rows of x that decide the scale and the first weights, and for recipes with a target those of y."""
    x = rows.sample(SCALE_ROWS, config.seed)
    return (x, _with_targets(rows, recipe).sample_targets(SCALE_ROWS, config.seed)) if recipe.needs == "y" else (x,)


def _initialised(
    rows: Rows, samples: Sequence[Tensor], config: TrainConfig, recipe: Recipe, source: SAE | None, device: torch.device
) -> tuple[SAE, tuple[float, float]]:
    """The whole dictionary at the first step, on this device, and the scales of x and of the target."""
    with device:
        sae = _dictionary(rows, config, recipe, ONE)
    x, scale = _to_scale(samples[0])
    found = outliers_among(x)
    if found.notable:
        warnings.warn(
            f"{found}: the input scale, the loss and the FVU are mostly about them. Leave them out with "
            "--set max_norm_multiple=10; see the page Sinks and outliers.",
            stacklevel=2,
        )
    y, target_scale = _to_scale(samples[1]) if recipe.needs == "y" else (x, scale)
    if source is not None and (sites := _sites(rows, recipe)):
        source = fold_site_scales(source, [site._replace(scale=1 / site.scale) for site in sites])
    if source is None:
        recipe.initialise(sae, x.to(device), y.to(device), config)
    else:
        start_from_(sae, source, scale=scale, target_scale=target_scale, unit_norm=recipe.unit_norm)
    return sae, (scale, target_scale)


def save_state(out: Path, state: TrainState, *, keep: int = 1, snapshots: Snapshots | None = None) -> None:
    """Writes everything that is needed to resume (`sae.training.state_files`); keeps `keep` − 1 earlier states.

    With `snapshots` the file is written later, from a copy of the state as it is now.
    """
    tensors = {f"sae.{name}": tensor for name, tensor in state.sae.tensors().items()}
    tensors |= state.optimizer.tensors()
    tensors["tokens_since_fired"] = state.tokens_since_fired
    header = {
        "step": state.step,
        "scale": state.scale,
        "target_scale": state.target_scale,
        "resampled": list(state.resampled),
        "density": state.density,
        "penalty": state.penalty.saved(),
        "kernels": state.optimizer.kernels.NAME,
        "matmul": state.matmul,
        "device": state.device.type,
    }
    if state.fixed_plan is not None:
        header["fixed_step"] = state.fixed_plan.saved()

    def write(tensors: dict[str, Tensor]) -> None:
        write_state(out, state.mesh, tensors, header, state.penalty.config.d_sae, keep=keep)

    if snapshots is None:
        write(tensors)
    else:
        snapshots.take(tensors, write)


def restore(
    out: Path, rows: Rows, config: TrainConfig, recipe: Recipe, device: str = "auto", mesh: Mesh = ONE
) -> TrainState | None:
    """The saved state, with the kernels and on the kind of device the run began with; None without a saved state.

    The mesh need not be the one that saved it.

    Raises: ValueError for another device.
    """
    found = read_state(out, mesh, config.d_sae)
    if found is None:
        return None
    tensors, header = found
    sae = _dictionary(rows, config, recipe, mesh)
    sae.load_state_dict({k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")})
    began_on = header.get("device", "cpu")
    if device not in ("auto", began_on):
        raise ValueError(
            f"{out} was begun on {began_on}; on {device} the result would differ. Use --device {began_on}, or "
            "choose another --out."
        )
    place = device_named(began_on)
    kernels = agreeing(selecting_in(config.precision, choose(header["kernels"], place)), mesh)
    optimizer = _adam(sae.to(place), kernels, config, recipe, mesh)
    optimizer.restore(tensors, header["step"])
    return TrainState(
        sae,
        optimizer,
        header["scale"],
        tensors["tokens_since_fired"].to(place),
        LambdaController(config, step=header["step"], **header["penalty"]),
        header["step"],
        header["density"],
        header["resampled"],
        header["target_scale"],
        _downstream(rows, recipe),
        mesh.tell(matmul.resumed(header["matmul"], config.matmul)),
        _sites(rows, recipe),
        FixedPlan(**header["fixed_step"]) if "fixed_step" in header and mesh.world == 1 else None,
        mesh,
    )


def _dictionary(rows: Rows, config: TrainConfig, recipe: Recipe, mesh: Mesh) -> Shard:
    return Shard(
        mesh,
        rows.d_in,
        config.d_sae,
        activation=recipe.activation,
        k=config.k or None,
        d_out=_with_targets(rows, recipe).d_out if recipe.needs == "y" else None,
        pre_bias=recipe.pre_bias,
        skip=config.skip,
    )


def _adam(sae: SAE, kernels: Kernels, config: TrainConfig, recipe: Recipe, mesh: Mesh) -> Adam:
    return Adam(
        sae,
        kernels,
        beta1=config.beta1,
        unit_norm=recipe.unit_norm,
        clip=config.clip,
        threshold_lr_ratio=config.threshold_lr_ratio,
        mesh=mesh,
    )


def _to_scale(sample: Float[Tensor, "n width"]) -> tuple[Float[Tensor, "n width"], float]:
    """The rows in units where E‖x‖² = width, and the factor. Raises: ValueError for rows that are all zero."""
    # In parts: the whole sample and its squares in float64 would be the peak memory of a run.
    mean_square = sum(part.double().pow(2).sum().item() for part in torch.split(sample, SCALE_ROWS_AT_ONCE)) / len(
        sample
    )
    if not mean_square > 0:
        raise ValueError("training: every sampled activation is zero; is the hook point right?")
    scale = math.sqrt(sample.shape[1] / mean_square)
    return sample * scale, scale


def _with_targets(rows: Rows, recipe: Recipe) -> TargetRows:
    """The rows, which must have targets. Raises: ValueError if they have none."""
    if not isinstance(rows, TargetRows):
        raise ValueError(f"recipe {recipe.name} learns y from x; these rows have no y. Name a target hook point.")
    return rows


def _sites(rows: Rows, recipe: Recipe) -> tuple[Site, ...]:
    """The sites of a crosscoder's rows, else (). Raises: ValueError if there are fewer than two, or of other widths."""
    if recipe.needs != "sites":
        return ()
    sites = tuple(rows.sites) if isinstance(rows, SiteRows) else ()
    if len(sites) < 2 or sum(site.width for site in sites) != rows.d_in:
        raise ValueError(
            f"recipe {recipe.name} needs rows that join at least two sites, and says so by their `sites`; these have "
            f"{rows.d_in} values and {len(sites)} sites. Name two stores or two hook points."
        )
    return sites


def _downstream(rows: Rows, recipe: Recipe) -> Downstream | None:
    """The rest of the model for a recipe that runs it. Raises: ValueError if the rows bring no model."""
    if recipe.needs != "resid":
        return None
    downstream = rows.downstream if isinstance(rows, ModelRows) else None
    if downstream is None:
        raise ValueError(f"recipe {recipe.name} continues the model from x̂; these rows bring no model to run.")
    return downstream
