"""Steering: features set, added, scaled or ablated while the model writes, beside the same text unsteered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.autoencoder import SAE, refuse_transcoder
from sae.lm import LanguageModel, Splice

MODES = ("set", "add", "scale", "ablate")
UNITS = ("max", "p99")
MAX_EDITS = 32
SWEEP = (0.0, 1.0, 2.0, 5.0, 10.0)
# Bricken et al. 2023, "pinned feature sampling": this prefix, the feature held at its largest observed activation.
PINNED_PROMPT = "1,2,3,4,5,6,7,8,9,10"


@dataclass(frozen=True)
class Edit:
    """One change to one feature's activation a, at every position (`only_active`: only where a > 0).

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
        return self.mode in ("set", "add")

    def __str__(self) -> str:
        """`FEATURE:MODE[:VALUE][:p99][:active]`, what `Edit.parse` reads."""
        parts = [str(self.feature), self.mode]
        if self.mode != "ablate":
            parts.append(f"{self.value:g}")
        if self.needs_unit and self.unit != "max":
            parts.append(self.unit)
        return ":".join([*parts, "active"] if self.only_active else parts)

    @classmethod
    def parse(cls, text: str) -> Edit:
        """The edit written as `FEATURE:MODE[:VALUE][:max|p99][:active]`: `12:set:5`, `7:ablate`, `9:add:2:p99:active`.

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
            raise ValueError(f"steering: {text!r} says no value for {mode!r}; {expected}.")
        return cls(int(feature), mode, **settings)  # type: ignore[arg-type]


def _multiple(option: str, text: str, expected: str) -> float:
    try:
        return float(option.removesuffix("x"))
    except ValueError:
        raise ValueError(f"steering: {option!r} in {text!r} is no number, unit or 'active'; {expected}.") from None


def scaled(edits: Sequence[Edit], factor: float) -> list[Edit]:
    """The edits with every value times `factor` (0 sets to 0, adds nothing, scales to 0); `ablate` has no strength."""
    return [edit if edit.mode == "ablate" else replace(edit, value=edit.value * factor) for edit in edits]


@dataclass
class Steered:
    """Two continuations of one prompt from one random stream.

    `kl[i]` compares the next-token distributions at the i-th steered token: KL(steered ‖ base), both given the steered
    text so far. `base_surprisal[i]` and `steered_surprisal[i]` are −log p of the i-th token of each text under the
    base model, given that text so far. Units: nats, at temperature 1.
    """

    prompt_ids: list[int]
    base_ids: list[int] = field(default_factory=list)
    steered_ids: list[int] = field(default_factory=list)
    base_text: str = ""
    steered_text: str = ""
    kl: list[float] = field(default_factory=list)
    base_surprisal: list[float] = field(default_factory=list)
    steered_surprisal: list[float] = field(default_factory=list)

    @property
    def first_divergence(self) -> int | None:
        """Number of the first new token that differs; None when the texts are the same."""
        pairs = zip(self.base_ids, self.steered_ids, strict=True)
        return next((i for i, (base, steered) in enumerate(pairs) if base != steered), None)

    @property
    def base_perplexity(self) -> float:
        """Of the unsteered text under the base model: exp(mean surprisal)."""
        return _perplexity(self.base_surprisal)

    @property
    def steered_perplexity(self) -> float:
        """Of the steered text under the base model."""
        return _perplexity(self.steered_surprisal)


def _perplexity(surprisal: list[float]) -> float:
    return math.exp(sum(surprisal) / len(surprisal)) if surprisal else math.nan


def splice_edits(
    sae: SAE, edits: Sequence[Edit], feature_max: np.ndarray, feature_p99: np.ndarray | None = None
) -> Splice:
    """`x + Σ (v − a) · W_dec`: the delta form, which keeps what the dictionary does not explain of x.

    The sum is over features: several edits of one feature are made one after another, and count once.
    Raises: ValueError for a transcoder, an unknown feature, or `set`/`add` on a feature whose unit is 0 (it never
    fired).
    """
    units = {"max": feature_max} if feature_p99 is None else {"max": feature_max, "p99": feature_p99}
    _check(sae, edits, units)
    numbers = list(dict.fromkeys(edit.feature for edit in edits))
    features = torch.tensor(numbers, dtype=torch.long)

    def splice(x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        acts = sae.encode(x)[..., features]
        wanted = list(acts.unbind(-1))
        for edit in edits:
            place = numbers.index(edit.feature)
            unit = float(units[edit.unit][edit.feature]) if edit.needs_unit else 0.0
            changed = _edited(edit, wanted[place], unit)
            wanted[place] = torch.where(acts[..., place] > 0, changed, wanted[place]) if edit.only_active else changed
        return x + (torch.stack(wanted, -1) - acts) @ sae.W_dec[features] if wanted else x

    return splice


def _check(sae: SAE, edits: Sequence[Edit], units: dict[str, np.ndarray]) -> None:
    refuse_transcoder(sae, "steering")
    for name, values in units.items():
        if len(values) != sae.d_sae:
            raise ValueError(f"steering: feature_{name} has {len(values):,} entries, the dictionary {sae.d_sae:,}.")
    if len(edits) > MAX_EDITS:
        raise ValueError(f"steering: at most {MAX_EDITS} features at once; got {len(edits)}.")
    for edit in edits:
        if not 0 <= edit.feature < sae.d_sae:
            raise ValueError(f"steering: feature {edit.feature} does not exist; features are 0 … {sae.d_sae - 1:,}.")
        if not edit.needs_unit:
            continue
        if edit.unit not in units:
            raise ValueError(
                f"steering: {edit} is in multiples of the {edit.unit}, but no feature_{edit.unit} is given."
            )
        if not units[edit.unit][edit.feature] > 0:
            largest = "maximum" if edit.unit == "max" else "99th percentile"
            raise ValueError(
                f"steering: feature {edit.feature} never fired, so multiples of its {largest} mean nothing."
            )


def _edited(edit: Edit, act: Tensor, unit: float) -> Tensor:
    if edit.mode == "set":
        return torch.full_like(act, edit.value * unit)
    if edit.mode == "add":
        return act + edit.value * unit
    if edit.mode == "scale":
        return act * edit.value
    return torch.zeros_like(act)


def steer(
    model: LanguageModel,
    sae: SAE,
    prompt: str,
    edits: Sequence[Edit],
    *,
    seed: int = 0,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    feature_max: np.ndarray,
    feature_p99: np.ndarray | None = None,
    hook_point: str | None = None,
) -> Steered:
    """Both continuations of `prompt`, `max_new_tokens` long; the same seed gives the same random stream to each.

    Raises: ValueError for bad edits, an empty model context, or a temperature below 0.
    """
    steps = steer_stream(
        model,
        sae,
        prompt,
        edits,
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        feature_max=feature_max,
        feature_p99=feature_p99,
        hook_point=hook_point,
    )
    return list(steps)[-1]


def steer_stream(
    model: LanguageModel,
    sae: SAE,
    prompt: str,
    edits: Sequence[Edit],
    *,
    seed: int = 0,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    feature_max: np.ndarray,
    feature_p99: np.ndarray | None = None,
    hook_point: str | None = None,
) -> Iterator[Steered]:
    """As `steer`, yielding the growing result after every token. Both columns are held back by no cache: hooks act on
    every position, as in the definition."""
    rows = sweep_stream(
        model,
        sae,
        prompt,
        edits,
        (1.0,),
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        feature_max=feature_max,
        feature_p99=feature_p99,
        hook_point=hook_point,
    )
    return (row for (row,) in rows)


def sweep_stream(
    model: LanguageModel,
    sae: SAE,
    prompt: str,
    edits: Sequence[Edit],
    factors: Sequence[float] = SWEEP,
    *,
    seed: int = 0,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    feature_max: np.ndarray,
    feature_p99: np.ndarray | None = None,
    hook_point: str | None = None,
) -> Iterator[list[Steered]]:
    """One continuation for each factor on the edits' values (`scaled`), all from one random stream, beside one base
    text; yields the growing rows after every token. Raises: as `steer`."""
    if not (temperature >= 0 and np.isfinite(temperature)):
        raise ValueError(f"steering: temperature must not be negative, and finite; got {temperature}.")
    if max_new_tokens < 1:
        raise ValueError(f"steering: max_new_tokens must be at least 1; got {max_new_tokens}.")
    if not factors:
        raise ValueError("steering: a sweep needs at least one factor, e.g. 0,1,2,5,10.")
    splices = [splice_edits(sae, scaled(edits, factor), feature_max, feature_p99) for factor in factors]
    hook = _hook_point(sae, hook_point)
    prompt_ids = _prompt_ids(model, prompt)

    def splice(x: Float[Tensor, "row pos d_in"]) -> Float[Tensor, "row pos d_in"]:
        return torch.cat([row(part[None]) for row, part in zip(splices, x, strict=True)])

    rows = [Steered(list(prompt_ids)) for _ in factors]
    return _grow(model, rows, hook, splice, max_new_tokens, temperature, torch.Generator().manual_seed(seed))


def _grow(
    model: LanguageModel,
    rows: list[Steered],
    hook_point: str,
    splice: Splice,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Iterator[list[Steered]]:
    prompt_ids = rows[0].prompt_ids
    for _ in range(max_new_tokens):
        noise = _gumbel(model.d_vocab, generator)
        texts = [prompt_ids + row.steered_ids for row in rows]
        with model.lock:
            base = _next_logits(model, [prompt_ids + rows[0].base_ids])[0]
            steered = _next_logits(model, texts, hook_point, splice)
            apart = [i for i, row in enumerate(rows) if row.steered_ids != row.base_ids]
            plain = dict(zip(apart, _next_logits(model, [texts[i] for i in apart]), strict=True)) if apart else {}
        base_id = _sample(base, temperature, noise)
        for i, row in enumerate(rows):
            given_text = plain.get(i, base)
            steered_id = _sample(steered[i], temperature, noise)
            row.kl.append(_kl(steered[i], given_text))
            row.base_surprisal.append(_surprisal(base, base_id))
            row.steered_surprisal.append(_surprisal(given_text, steered_id))
            row.base_ids.append(base_id)
            row.steered_ids.append(steered_id)
            row.base_text = model.tokenizer.decode(row.base_ids, skip_special_tokens=False)
            row.steered_text = model.tokenizer.decode(row.steered_ids, skip_special_tokens=False)
        yield rows


class NextTokens(NamedTuple):
    """The next-token distributions without and with the edits: the likeliest `ids` of either, likeliest first."""

    ids: list[int]
    base: list[float]
    steered: list[float]
    kl: float


def next_tokens(
    model: LanguageModel,
    sae: SAE,
    ids: Sequence[int],
    edits: Sequence[Edit],
    *,
    n: int = 10,
    feature_max: np.ndarray,
    feature_p99: np.ndarray | None = None,
    hook_point: str | None = None,
) -> NextTokens:
    """Probabilities (temperature 1) of the `n` likeliest next tokens after `ids` in either distribution.

    Units: kl in nats, KL(steered ‖ base).
    """
    splice = splice_edits(sae, edits, feature_max, feature_p99)
    with model.lock:
        base = _next_logits(model, [list(ids)])[0]
        steered = _next_logits(model, [list(ids)], _hook_point(sae, hook_point), splice)[0]
    p, q = base.double().softmax(-1), steered.double().softmax(-1)
    found = torch.maximum(p, q).topk(min(n, len(p))).indices
    return NextTokens(found.tolist(), p[found].tolist(), q[found].tolist(), _kl(steered, base))


def _hook_point(sae: SAE, asked: str | None) -> str:
    hook = asked or sae.config.get("hook_point")
    if hook is None:
        raise ValueError("steering: this dictionary does not say which hook point it was trained on; name hook_point.")
    return str(hook)


def _prompt_ids(model: LanguageModel, prompt: str) -> list[int]:
    ids = model.encode_prompt(prompt)
    if not ids:
        raise ValueError("steering: the prompt is empty and this model has no BOS token; type some text.")
    return ids


def _next_logits(
    model: LanguageModel, texts: list[list[int]], hook_point: str | None = None, splice: Splice | None = None
) -> Float[Tensor, "row d_vocab"]:
    """Logits after each of the texts, which are equally long."""
    window = torch.tensor([ids[-model.context_tokens :] for ids in texts])
    return model.logits(window, hook_point, splice)[:, -1].float().cpu()


def _gumbel(size: int, generator: torch.Generator) -> Float[Tensor, " d_vocab"]:
    """−log(−log u): the largest of logits + noise is a sample of their softmax; shared noise couples the columns."""
    uniform = torch.rand(size, generator=generator, dtype=torch.float64).clamp(1e-300, 1 - 1e-16)
    return -torch.log(-torch.log(uniform))


def _sample(logits: Tensor, temperature: float, noise: Tensor) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int((logits.double() / temperature + noise).argmax())


def _surprisal(logits: Tensor, token: int) -> float:
    """−log softmax(logits)[token] in nats."""
    return float(-torch.log_softmax(logits.double(), -1)[token])


def _kl(p_logits: Tensor, q_logits: Tensor) -> float:
    """KL(p ‖ q) in nats."""
    log_p, log_q = torch.log_softmax(p_logits.double(), -1), torch.log_softmax(q_logits.double(), -1)
    return float((log_p.exp() * (log_p - log_q)).sum().clamp_min(0))
