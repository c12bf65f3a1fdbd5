"""How a dictionary is trained: one frozen dataclass, checked before any work starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from math import isfinite
from typing import Any

from sae.kernels import matmul

PAPER_RESAMPLE_STEPS = (25_000, 50_000, 75_000, 100_000)
PAPER_DEAD_STEPS = 12_500
PAPER_RESAMPLE_ROWS = 819_200
NOT_NEGATIVE = (
    "l1",
    "k",
    "aux_coefficient",
    "dead_tokens",
    "seed",
    "target_l0",
    "l0_penalty",
    "clip",
    "bandwidth",
    "threshold_init",
    "threshold_lr_ratio",
    "multi_k",
    "min_density",
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. One row is one token's activation vector.

    `l1` is λ in scaled units, where inputs have E‖x‖² = d_in: loss = ‖x − x̂‖² (sum over d_in, mean over the batch)
    + λ Σ f. Divide by the input scale (in config.json) for raw units, and by d_in for the paper's mean-squared form.
    `l0_penalty` is λ of a penalty on L0 itself. `target_l0` asks for a sparsity instead: k is set to it, or λ is found
    while training (`sae.training.sparsity_penalty`), starting from the value given here. Shares are of the run's steps.
    `matmul` names the dense products, see `sae.kernels.matmul`.
    """

    recipe: str = "topk"
    d_sae: int = 4096
    tokens: int = 4_000_000
    batch_tokens: int = 4096
    lr: float = 1e-3
    beta1: float = 0.9
    warmup_share: float = 0.02
    decay_share: float = 0.2
    l1: float = 0.0
    k: int = 0
    aux_coefficient: float = 0.0
    dead_tokens: int = 0
    resample_shares: tuple[float, ...] = ()
    seed: int = 0
    exact: bool = False
    matmul: str = "auto"
    target_l0: float = 0.0
    l0_penalty: float = 0.0
    penalty_warmup_share: float = 0.0  # λ rises linearly from 0
    rewarm_share: float = 0.0  # after each resampling the learning rate rises from a tenth
    clip: float = 0.0  # of the gradient's norm over all parameters; 0: none
    bandwidth: float = 0.0  # ε of the thresholds' pseudo-gradients
    threshold_init: float = 0.0
    threshold_lr_ratio: float = 1.0  # the thresholds' learning rate over lr
    min_density: float = 0.0  # share of rows on which every feature is made to fire, by its rank alone
    multi_k: int = 0  # Multi-TopK: also the loss with this many times k, at 1/8
    prefix_shares: tuple[float, ...] = ()  # of d_sae, rising to 1
    p_end: float = 1.0
    p_from_share: float = 0.0  # where p starts to fall from 1
    skip: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):  # 3 and 3.0 are one setting, and are written as one
            if field.type == "float":
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        if self.matmul not in matmul.NAMES:
            raise ValueError(f"training: matmul is one of {', '.join(matmul.NAMES)}; got {self.matmul!r}.")
        for name in ("d_sae", "tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"training: {name} must be at least 1, got {getattr(self, name)}.")
        if self.tokens < self.batch_tokens:
            raise ValueError(
                f"training: tokens = {self.tokens:,} is less than one batch of {self.batch_tokens:,}. Give more tokens."
            )
        if not (self.lr > 0 and isfinite(self.lr)):
            raise ValueError(f"training: lr must be positive and finite, got {self.lr}.")
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"training: beta1 is Adam's momentum, at least 0 and below 1; got {self.beta1}.")
        for name in ("warmup_share", "decay_share", "penalty_warmup_share", "rewarm_share", "p_from_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"training: {name} is a share of the run between 0 and 1, got {getattr(self, name)}.")
        for name in NOT_NEGATIVE:
            if not (getattr(self, name) >= 0 and isfinite(getattr(self, name))):
                raise ValueError(f"training: {name} must not be negative, and finite; got {getattr(self, name)}.")
        if not all(0 < share < 1 for share in self.resample_shares):
            raise ValueError(f"training: resample_shares lie between 0 and 1, got {self.resample_shares}.")
        if self.k > self.d_sae:
            raise ValueError(f"training: k = {self.k} is more than d_sae = {self.d_sae:,}.")
        if self.target_l0 > self.d_sae:
            raise ValueError(f"training: target_l0 = {self.target_l0:g} is more than d_sae = {self.d_sae:,}.")
        if self.prefix_shares and not (
            sorted(set(self.prefix_shares)) == list(self.prefix_shares)
            and self.prefix_shares[0] > 0
            and self.prefix_shares[-1] == 1
        ):
            raise ValueError(f"training: prefix_shares rise from above 0 to 1, got {self.prefix_shares}.")
        if not 0 < self.p_end <= 1:
            raise ValueError(f"training: p_end must be above 0 and at most 1, got {self.p_end}.")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def dead_after_tokens(self) -> int:
        """A feature silent for this many tokens counts as dead.

        By default the paper's eightieth of the run, at most 10M; in a short run 100,000 (or a tenth of it), because a
        feature of density 1e-5 is rare, not dead.
        """
        share = max(self.tokens // 80, min(100_000, self.tokens // 10))
        return self.dead_tokens or max(self.batch_tokens, min(10_000_000, share))

    @property
    def resample_steps(self) -> tuple[int, ...]:
        """Steps after which dead features are resampled: at shares of the run, or at the paper's counts."""
        return PAPER_RESAMPLE_STEPS if self.exact else tuple(max(1, int(self.steps * s)) for s in self.resample_shares)

    @property
    def prefix_sizes(self) -> tuple[int, ...]:
        """Numbers of features in the prefixes that are trained to stand alone."""
        return tuple(sorted({max(1, round(share * self.d_sae)) for share in self.prefix_shares}))

    @property
    def resample_window_steps(self) -> int:
        """Dead for resampling: no firing in this many steps before the event (the paper: an eightieth of its run)."""
        return PAPER_DEAD_STEPS if self.exact else max(1, self.dead_after_tokens // self.batch_tokens)

    @property
    def resample_rows(self) -> int:
        """Rows on which losses are measured to choose new directions (the paper: 100 batches of 8,192)."""
        return PAPER_RESAMPLE_ROWS if self.exact else min(PAPER_RESAMPLE_ROWS, 25 * self.batch_tokens)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parsed(assignments: Sequence[str]) -> dict[str, Any]:
    """Settings from texts like `multi_k=4`, `exact=true` or `resample_shares=0.1,0.5`, each of its setting's type.

    Raises: ValueError for an unknown setting, naming the nearest, and for a value that is not of its type.
    """
    types = {field.name: str(field.type) for field in fields(TrainConfig)}
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"expected NAME=VALUE, such as lr=0.001; got {assignment!r}.")
        _check_known(name)
        try:
            found[name] = _READ[types[name]](text)
        except (ValueError, KeyError) as error:
            raise ValueError(f"training: {name} is of type {types[name]}; got {text!r}.") from error
    return found


_READ: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: {"true": True, "false": False}[text],
    "tuple[float, ...]": lambda text: tuple(float(part) for part in text.split(",") if part),
}


def with_overrides(config: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    """A copy with some fields replaced. Raises: ValueError for an unknown field, naming the nearest one."""
    for name in overrides:
        _check_known(name)
    return replace(config, **overrides)


def _check_known(name: str) -> None:
    known = [field.name for field in fields(TrainConfig)]
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known are {', '.join(known)}."
        raise ValueError(f"training has no setting {name!r}.{hint}")
