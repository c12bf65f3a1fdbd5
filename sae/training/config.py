"""The settings of a training run: small dataclasses by concern, each setting declared with its range, one flat result.

`TrainConfig` inherits all of them, so that code, `--set NAME=VALUE` and the files on disk know one flat list of names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from math import isfinite
from typing import Any

from sae.kernels import matmul
from sae.kernels.bfloat16 import PRECISIONS
from store.common import RowFilter

PAPER_RESAMPLE_STEPS = (25_000, 50_000, 75_000, 100_000)
PAPER_DEAD_STEPS = 12_500
PAPER_RESAMPLE_ROWS = 819_200


@dataclass(frozen=True)
class Check:
    """The values that a setting may take, and how to say it: `<setting> <rule>, got <value>`."""

    holds: Callable[[Any], bool]
    rule: str


AT_LEAST_ONE = Check(lambda value: value >= 1, "must be at least 1")
POSITIVE = Check(lambda value: value > 0 and isfinite(value), "must be positive and finite")
NOT_NEGATIVE = Check(lambda value: value >= 0 and isfinite(value), "must not be negative and must be finite")
SHARE = Check(lambda value: 0 <= value <= 1, "is a share of the run between 0 and 1")
MOMENTUM = Check(lambda value: 0 <= value < 1, "must be at least 0 and below 1 (it is Adam's momentum)")
EXPONENT = Check(lambda value: 0 < value <= 1, "must be above 0 and at most 1")
INNER_SHARES = Check(lambda values: all(0 < value < 1 for value in values), "must lie between 0 and 1")
RISING_TO_ONE = Check(
    lambda values: not values or (values[0] > 0 and list(values) == sorted(set(values)) and values[-1] == 1),
    "must rise from above 0 to 1",
)
OFF_OR_ABOVE_ONE = Check(
    lambda value: value == 0 or (value > 1 and isfinite(value)), "must be above 1, or 0 to leave no row out"
)
TOKEN_IDS = Check(lambda values: all(value >= 0 for value in values), "must be token ids of 0 or more")
SELECTION = Check(lambda value: value in PRECISIONS, f"must be one of {', '.join(PRECISIONS)}")
PRODUCTS = Check(lambda value: value in matmul.NAMES, f"must be one of {', '.join(matmul.NAMES)}")


def setting(default: Any, check: Check | None = None, *, recipe_specific: bool = False) -> Any:
    """A dataclass field with its check. Recipes that have no use for a `recipe_specific` setting refuse it."""
    return field(default=default, metadata={"check": check, "recipe_specific": recipe_specific})


@dataclass(frozen=True)
class RunSettings:
    """What is trained, and for how long. One row is one token's activation vector."""

    recipe: str = "topk"
    d_sae: int = setting(4096, AT_LEAST_ONE)
    tokens: int = setting(4_000_000, AT_LEAST_ONE)  # rows seen in the whole run
    batch_tokens: int = setting(4096, AT_LEAST_ONE)  # rows per step
    seed: int = setting(0, NOT_NEGATIVE)
    row_lanes: int = setting(0, NOT_NEGATIVE)  # batches take rows evenly from so many parts of the data; 0: from all
    matmul: str = setting("auto", PRODUCTS)  # how dense products are computed, see `sae.kernels.matmul`
    precision: str = setting("float32", SELECTION)  # bf16: features are chosen straight from a bfloat16 product
    max_norm_multiple: float = setting(0.0, OFF_OR_ABOVE_ONE)  # leaves out rows of more than this many median norms
    skip_positions: int = setting(0, NOT_NEGATIVE)  # leaves out this many positions at the start of each context
    skip_token_ids: tuple[int, ...] = setting((), TOKEN_IDS)  # leaves out these tokens (BOS always is)
    skip: bool = setting(False, recipe_specific=True)  # a transcoder's linear skip connection
    shuffle_sites: bool = setting(False, recipe_specific=True)  # a crosscoder's control: sites paired at random

    @property
    def row_filter(self) -> RowFilter:
        """The rows to leave out; the median norms come from the rows."""
        return RowFilter(self.skip_positions, self.skip_token_ids, self.max_norm_multiple)

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def products(self) -> str:
        """How dense products are computed: with precision bf16 in bfloat16, too, unless `matmul` says otherwise."""
        return "bf16" if self.precision == "bf16" and self.matmul == "auto" else self.matmul


@dataclass(frozen=True)
class AdamSettings:
    """Adam and its learning rate schedule. Shares are of the run's steps."""

    lr: float = setting(1e-3, POSITIVE)
    beta1: float = setting(0.9, MOMENTUM)
    warmup_share: float = setting(0.02, SHARE)
    decay_share: float = setting(0.2, SHARE)
    rewarm_share: float = setting(0.0, SHARE)  # after each resampling the learning rate rises again from a tenth
    clip: float = setting(0.0, NOT_NEGATIVE)  # largest norm of the gradient over all parameters; 0: no limit


@dataclass(frozen=True)
class PenaltySettings:
    """Sparsity by a penalty λ, or by a target L0.

    `l1` is λ in scaled units, where inputs have E‖x‖² = d_in: loss = ‖x − x̂‖² (sum over d_in, mean over the batch)
    + λ Σ f. Divide it by the input scale (in config.json) for raw units, and by d_in for the paper's mean-squared form.
    `l0_penalty` is the λ of a penalty on L0 itself. `target_l0` sets k, or lets the run search for λ
    (`sae.training.sparsity_penalty`) starting from the λ given here.
    """

    l1: float = setting(0.0, NOT_NEGATIVE, recipe_specific=True)
    l0_penalty: float = setting(0.0, NOT_NEGATIVE, recipe_specific=True)
    target_l0: float = setting(0.0, NOT_NEGATIVE)
    penalty_warmup_share: float = setting(0.0, SHARE)  # λ rises linearly from 0 over this share of the run
    p_end: float = setting(1.0, EXPONENT, recipe_specific=True)  # last exponent of Σ f^p
    p_from_share: float = setting(0.0, SHARE, recipe_specific=True)  # when p starts to fall from 1


@dataclass(frozen=True)
class JumpReLUSettings:
    """Learned thresholds."""

    bandwidth: float = setting(0.0, NOT_NEGATIVE, recipe_specific=True)  # ε of the thresholds' pseudo-gradients
    threshold_init: float = setting(0.0, NOT_NEGATIVE, recipe_specific=True)
    threshold_lr_ratio: float = setting(1.0, NOT_NEGATIVE, recipe_specific=True)  # thresholds' learning rate over lr


@dataclass(frozen=True)
class TopKSettings:
    """Sparsity by rank: the k largest activations."""

    k: int = setting(0, NOT_NEGATIVE, recipe_specific=True)
    aux_coefficient: float = setting(0.0, NOT_NEGATIVE, recipe_specific=True)  # weight of AuxK
    multi_k: int = setting(0, NOT_NEGATIVE, recipe_specific=True)  # Multi-TopK: adds the loss at multi_k · k, times 1/8
    min_density: float = setting(0.0, NOT_NEGATIVE, recipe_specific=True)  # share of rows on which each feature fires
    prefix_shares: tuple[float, ...] = setting((), RISING_TO_ONE, recipe_specific=True)  # of d_sae
    calibrate_threshold: bool = setting(False, recipe_specific=True)  # at the end, so that L0 is k on a sample of rows


@dataclass(frozen=True)
class DeadFeatureSettings(RunSettings):
    """When a feature counts as dead, and when dead features are resampled."""

    dead_tokens: int = setting(0, NOT_NEGATIVE)  # 0: decided by the length of the run
    resample_shares: tuple[float, ...] = setting((), INNER_SHARES, recipe_specific=True)
    exact: bool = setting(False, recipe_specific=True)  # resample at the paper's step counts

    @property
    def dead_after_tokens(self) -> int:
        """A feature that has not fired for this many tokens counts as dead.

        By default the paper's eightieth of the run, at most 10M. In a short run 100,000 (or a tenth of the run),
        because a feature of density 1e-5 is rare, not dead.
        """
        share = max(self.tokens // 80, min(100_000, self.tokens // 10))
        return self.dead_tokens or max(self.batch_tokens, min(10_000_000, share))

    @property
    def resample_steps(self) -> tuple[int, ...]:
        """Steps after which dead features are resampled: at shares of the run, or at the paper's counts."""
        return PAPER_RESAMPLE_STEPS if self.exact else tuple(max(1, int(self.steps * s)) for s in self.resample_shares)

    @property
    def resample_window_steps(self) -> int:
        """A feature is resampled if it has not fired in this many steps (the paper: an eightieth of its run)."""
        return PAPER_DEAD_STEPS if self.exact else max(1, self.dead_after_tokens // self.batch_tokens)

    @property
    def resample_rows(self) -> int:
        """Rows on which losses are measured to choose new directions (the paper: 100 batches of 8,192)."""
        return PAPER_RESAMPLE_ROWS if self.exact else min(PAPER_RESAMPLE_ROWS, 25 * self.batch_tokens)


@dataclass(frozen=True)
class TrainConfig(DeadFeatureSettings, TopKSettings, JumpReLUSettings, PenaltySettings, AdamSettings, RunSettings):
    """All settings of one training run, checked before any work starts.

    Raises: ValueError naming the setting, what it may be and what was given.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.type == "float":  # 3 and 3.0 are one setting, and are written as one
                object.__setattr__(self, each.name, float(getattr(self, each.name)))
            check, value = each.metadata.get("check"), getattr(self, each.name)
            if check is not None and not check.holds(value):
                raise ValueError(f"training: {each.name} {check.rule}, got {value!r}.")
        if self.tokens < self.batch_tokens:
            raise ValueError(
                f"training: tokens = {self.tokens:,} is less than one batch of {self.batch_tokens:,}. Give more tokens."
            )
        if self.k > self.d_sae:
            raise ValueError(f"training: k = {self.k} is more than d_sae = {self.d_sae:,}.")
        if self.target_l0 > self.d_sae:
            raise ValueError(f"training: target_l0 = {self.target_l0:g} is more than d_sae = {self.d_sae:,}.")

    @property
    def prefix_sizes(self) -> tuple[int, ...]:
        """Numbers of features in the prefixes that are trained to reconstruct alone."""
        return tuple(sorted({max(1, round(share * self.d_sae)) for share in self.prefix_shares}))

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, as train.json and config.json hold them."""
        return asdict(self)


DEFAULTS = {each.name: each.default for each in fields(TrainConfig)}
RECIPE_SPECIFIC = frozenset(each.name for each in fields(TrainConfig) if each.metadata.get("recipe_specific"))


def with_overrides(config: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    """A copy with some settings replaced. Raises: ValueError for an unknown setting, naming the nearest one."""
    for name in overrides:
        _check_known(name)
    return replace(config, **overrides)


def parsed(assignments: Sequence[str]) -> dict[str, Any]:
    """Settings from texts like `multi_k=4`, `exact=true` or `resample_shares=0.1,0.5`, each converted to its type.

    Raises: ValueError for an unknown setting, naming the nearest one, and for a value of the wrong type.
    """
    types = {each.name: str(each.type) for each in fields(TrainConfig)}
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"expected NAME=VALUE, such as lr=0.001; got {assignment!r}.")
        _check_known(name)
        try:
            found[name] = _PARSERS[types[name]](text)
        except (ValueError, KeyError) as error:
            raise ValueError(f"training: {name} must be of type {types[name]}, got {text!r}.") from error
    return found


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: {"true": True, "false": False}[text],
    "tuple[int, ...]": lambda text: tuple(int(part) for part in text.split(",") if part),
    "tuple[float, ...]": lambda text: tuple(float(part) for part in text.split(",") if part),
}


def _check_known(name: str) -> None:
    if name not in DEFAULTS:
        near = get_close_matches(name, DEFAULTS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known settings: {', '.join(DEFAULTS)}."
        raise ValueError(f"training has no setting {name!r}.{hint}")
