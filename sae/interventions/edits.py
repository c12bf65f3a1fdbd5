"""Edits of features: written as text, checked, and turned into a splice of the model's activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE, refuse_row_scale, refuse_transcoder
from sae.dictionary.sites import refuse_crosscoder
from sae.dictionary.trained_rows import rows_that_count
from sae.lm import LanguageModel, Splice

MODES = ("set", "add", "scale", "ablate")
UNITS = ("max", "p99")
MAX_EDITS = 32
ERASE, CONTROL = "erase", ":random"  # `erase:CONCEPT`, and with the random subspace instead


@dataclass(frozen=True)
class Edit:
    """One change to one feature's activation a, at every position that counts (`only_active`: only where a > 0).

    BOS and rows that the dictionary's row filter leaves out do not count: training left them out too.

    `set`: a → value · unit; `add`: a → a + value · unit; `scale`: a → value · a; `ablate`: a → 0.
    Units: `value` is in multiples of the feature's largest (`max`) or 99th-percentile (`p99`) observed activation;
    for `scale`, a factor.
    """

    feature: int
    mode: str = "set"
    value: float = 1.0
    unit: str = "max"
    only_active: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"steering: mode must be one of {', '.join(MODES)}; got {self.mode!r}.")
        if not np.isfinite(self.value):
            raise ValueError(f"steering: value must be a finite number; got {self.value}.")
        if self.unit not in UNITS:
            raise ValueError(f"steering: unit must be one of {', '.join(UNITS)}; got {self.unit!r}.")

    @property
    def needs_unit(self) -> bool:
        """Whether `value` is in multiples of `unit`."""
        return self.mode in ("set", "add")

    def __str__(self) -> str:
        """Writes `FEATURE:MODE[:VALUE][:p99][:active]`, which `Edit.parse` reads."""
        parts = [str(self.feature), self.mode]
        if self.mode != "ablate":
            parts.append(f"{self.value:g}")
        if self.needs_unit and self.unit != "max":
            parts.append(self.unit)
        return ":".join([*parts, "active"] if self.only_active else parts)

    @classmethod
    def parse(cls, text: str) -> Edit:
        """Reads `FEATURE:MODE[:VALUE][:max|p99][:active]`, e.g. `12:set:5`, `7:ablate` or `9:add:2:p99:active`.

        Raises: ValueError naming the part that is wrong.
        """
        expected = "expected FEATURE:MODE[:VALUE][:p99][:active], e.g. 12:set:5 or 7:ablate"
        feature, _, rest = text.strip().partition(":")
        mode, *options = rest.split(":")
        if not feature.isdecimal():
            raise ValueError(f"steering: {feature!r} in {text!r} is not a feature number; {expected}.")
        settings: dict[str, str | float | bool] = {}
        for option in options:
            if option in UNITS:
                settings["unit"] = option
            elif option == "active":
                settings["only_active"] = True
            else:
                settings["value"] = _multiple(option, text, expected)
        if mode in MODES and mode != "ablate" and "value" not in settings:
            raise ValueError(f"steering: {text!r} has no value for {mode!r}; {expected}.")
        return cls(int(feature), mode, **settings)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Erasure:
    """One change to the whole of x at every position that counts, after the edits of features: `x → erase(x)`.

    `name` is the concept that can no longer be read from x; with `is_control`, `erase` removes a random subspace of
    equal rank instead.
    """

    name: str
    erase: Splice
    is_control: bool = False

    def __str__(self) -> str:
        """Writes `erase:CONCEPT`, or `erase:CONCEPT:random` for the control."""
        return f"{ERASE}:{self.name}" + (CONTROL if self.is_control else "")


def erased_concept(text: str) -> tuple[str, bool] | None:
    """The concept of `erase:CONCEPT`, and whether its control is meant (`:random`); None for an edit of a feature."""
    verb, _, rest = text.strip().partition(":")
    return (rest.removesuffix(CONTROL), rest.endswith(CONTROL)) if verb == ERASE else None


def _multiple(option: str, text: str, expected: str) -> float:
    try:
        return float(option.removesuffix("x"))
    except ValueError:
        raise ValueError(f"steering: {option!r} in {text!r} is not a number, a unit or 'active'; {expected}.") from None


def scaled(edits: Sequence[Edit | Erasure], factor: float) -> list[Edit | Erasure]:
    """The edits with every value multiplied by `factor`; `ablate` and erasures have no value and stay as they are.

    With factor 0, `set` and `scale` give 0 and `add` changes nothing.
    """
    return [
        edit if isinstance(edit, Erasure) or edit.mode == "ablate" else replace(edit, value=edit.value * factor)
        for edit in edits
    ]


def splice_edits(
    sae: SAE,
    edits: Sequence[Edit | Erasure],
    feature_max: Float[np.ndarray, " d_sae"] | None = None,
    feature_p99: Float[np.ndarray, " d_sae"] | None = None,
) -> Splice:
    """The splice `x → x + Σ (v − a) · W_dec` (`change_by_edits`); what the dictionary leaves unexplained stays.

    Raises: ValueError for a transcoder, which does not write where it reads, and as `change_by_edits`.
    """
    refuse_transcoder(sae, "steering in one place")
    change = change_by_edits(sae, edits, feature_max, feature_p99)
    return lambda x: x + change(x)


def change_by_edits(
    sae: SAE,
    edits: Sequence[Edit | Erasure],
    feature_max: Float[np.ndarray, " d_sae"] | None = None,
    feature_p99: Float[np.ndarray, " d_sae"] | None = None,
) -> Splice:
    """`x → Σ (v − a) · W_dec`, v the edited activation: what edits add to x, or to the target y of a transcoder.

    The sum is over features. Several edits of one feature are made one after another and count once. Erasures act
    last, on x with the sum added.
    Raises: ValueError for an unknown feature, `set`/`add` on a feature whose unit is missing or 0 (it never fired), or
    an erasure with a transcoder, which does not write where it reads.
    """
    erasures = [edit for edit in edits if isinstance(edit, Erasure)]
    features = _change_of_features(sae, [edit for edit in edits if isinstance(edit, Edit)], feature_max, feature_p99)
    if not erasures:
        return features
    refuse_transcoder(sae, "erasing a concept")

    def change(x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        moved = x + features(x)
        for each in erasures:
            moved = each.erase(moved)
        return moved - x

    return change


def _change_of_features(
    sae: SAE,
    edits: Sequence[Edit],
    feature_max: Float[np.ndarray, " d_sae"] | None,
    feature_p99: Float[np.ndarray, " d_sae"] | None,
) -> Splice:
    given = {"max": feature_max, "p99": feature_p99}
    units = {name: values for name, values in given.items() if values is not None}
    _check(sae, edits, units)
    numbers = list(dict.fromkeys(edit.feature for edit in edits))
    features = torch.tensor(numbers, dtype=torch.long)

    def change(x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if not edits:
            return x.new_zeros(*x.shape[:-1], sae.d_out)
        acts = sae.encode(x)[..., features]
        edited = list(acts.unbind(-1))
        for edit in edits:
            column = numbers.index(edit.feature)
            unit = float(units[edit.unit][edit.feature]) if edit.needs_unit else 0.0
            changed = _edited(edit, edited[column], unit)
            edited[column] = (
                torch.where(acts[..., column] > 0, changed, edited[column]) if edit.only_active else changed
            )
        return (torch.stack(edited, -1) - acts) @ sae.W_dec[features]

    return change


def where_trained(
    change: Splice, sae: SAE, model: LanguageModel, tokens: Int[Tensor, "row pos"], hook_point: str
) -> Splice:
    """`change` where the dictionary was trained, 0 at BOS and on rows that its row filter leaves out.

    The rows of x belong to `tokens`, whole contexts, at `hook_point`.
    """

    def change_rows(x: Float[Tensor, "row pos d_in"]) -> Float[Tensor, "row pos d_out"]:
        keep = rows_that_count(sae, model.bos_id, tokens, x, hook_point)
        return torch.where(keep[..., None], change(x), 0.0)

    return change_rows


def _check(sae: SAE, edits: Sequence[Edit], units: dict[str, Float[np.ndarray, " d_sae"]]) -> None:
    refuse_crosscoder(sae, "steering")
    refuse_row_scale(sae, "steering")
    for name, values in units.items():
        if len(values) != sae.d_sae:
            raise ValueError(
                f"steering: feature_{name} has {len(values):,} entries, the dictionary {sae.d_sae:,} features."
            )
    if len(edits) > MAX_EDITS:
        raise ValueError(f"steering: at most {MAX_EDITS} edits at once; got {len(edits)}.")
    for edit in edits:
        if not 0 <= edit.feature < sae.d_sae:
            raise ValueError(f"steering: feature {edit.feature} does not exist; features are 0 … {sae.d_sae - 1:,}.")
        if edit.needs_unit:
            _check_unit(edit, units)


def _check_unit(edit: Edit, units: dict[str, Float[np.ndarray, " d_sae"]]) -> None:
    if edit.unit not in units:
        raise ValueError(
            f"steering: {edit} is in multiples of the {edit.unit}, but feature_{edit.unit} was not given; "
            "sae.pipeline.feature_units reads it."
        )
    if not units[edit.unit][edit.feature] > 0:
        name = "maximum" if edit.unit == "max" else "99th percentile"
        raise ValueError(f"steering: feature {edit.feature} never fired, so it has no {name} to take multiples of.")


def _edited(edit: Edit, act: Float[Tensor, "*batch"], unit: float) -> Float[Tensor, "*batch"]:
    if edit.mode == "set":
        return torch.full_like(act, edit.value * unit)
    if edit.mode == "add":
        return act + edit.value * unit
    if edit.mode == "scale":
        return act * edit.value
    return torch.zeros_like(act)
