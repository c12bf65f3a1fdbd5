"""Steering: features set, added, scaled or ablated while the model writes, beside the same text unsteered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.lm import LanguageModel, Splice
from sae.model import SAE

MODES = ("set", "add", "scale", "ablate")
MAX_EDITS = 32


@dataclass(frozen=True)
class Edit:
    """One change to one feature's activation a, at every position.

    `set`: a → value · max; `add`: a → a + value · max; `scale`: a → value · a; `ablate`: a → 0.
    Units: `value` is in multiples of the feature's largest observed activation (for `scale`, a factor).
    """

    feature: int
    mode: str = "set"
    value: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"steering: mode must be one of {', '.join(MODES)}; got {self.mode!r}.")
        if not np.isfinite(self.value):
            raise ValueError(f"steering: value must be a finite number; got {self.value}.")


@dataclass
class Steered:
    """Two continuations of one prompt from one random stream; `kl[i]` compares the next-token distributions at the
    i-th steered token: KL(steered ‖ base) in nats, both given the steered text so far."""

    prompt_ids: list[int]
    base_ids: list[int] = field(default_factory=list)
    steered_ids: list[int] = field(default_factory=list)
    base_text: str = ""
    steered_text: str = ""
    kl: list[float] = field(default_factory=list)

    @property
    def first_divergence(self) -> int | None:
        """Number of the first new token that differs; None when the texts are the same."""
        pairs = zip(self.base_ids, self.steered_ids, strict=True)
        return next((i for i, (base, steered) in enumerate(pairs) if base != steered), None)


def splice_edits(sae: SAE, edits: Sequence[Edit], feature_max: np.ndarray) -> Splice:
    """`x + Σ (v − a) · W_dec`: the delta form, which keeps what the dictionary does not explain of x.

    The sum is over features: several edits of one feature are made one after another, and count once.
    Raises: ValueError for an unknown feature, or `set`/`add` on a feature whose maximum is 0 (it never fired).
    """
    if len(feature_max) != sae.d_sae:
        raise ValueError(f"steering: feature_max has {len(feature_max):,} entries, the dictionary {sae.d_sae:,}.")
    if len(edits) > MAX_EDITS:
        raise ValueError(f"steering: at most {MAX_EDITS} features at once; got {len(edits)}.")
    for edit in edits:
        if not 0 <= edit.feature < sae.d_sae:
            raise ValueError(f"steering: feature {edit.feature} does not exist; features are 0 … {sae.d_sae - 1:,}.")
        if edit.mode in ("set", "add") and not feature_max[edit.feature] > 0:
            raise ValueError(f"steering: feature {edit.feature} never fired, so multiples of its maximum mean nothing.")
    numbers = list(dict.fromkeys(edit.feature for edit in edits))
    features = torch.tensor(numbers, dtype=torch.long)

    def splice(x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        acts = sae.encode(x)[..., features]
        wanted = list(acts.unbind(-1))
        for edit in edits:
            place = numbers.index(edit.feature)
            wanted[place] = _edited(edit, wanted[place], float(feature_max[edit.feature]))
        return x + (torch.stack(wanted, -1) - acts) @ sae.W_dec[features] if wanted else x

    return splice


def _edited(edit: Edit, act: Tensor, largest: float) -> Tensor:
    if edit.mode == "set":
        return torch.full_like(act, edit.value * largest)
    if edit.mode == "add":
        return act + edit.value * largest
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
    hook_point: str | None = None,
) -> Iterator[Steered]:
    """As `steer`, yielding the growing result after every token. Both columns are held back by no cache: hooks act on
    every position, as in the definition."""
    if not (temperature >= 0 and np.isfinite(temperature)):
        raise ValueError(f"steering: temperature must not be negative, and finite; got {temperature}.")
    if max_new_tokens < 1:
        raise ValueError(f"steering: max_new_tokens must be at least 1; got {max_new_tokens}.")
    splice = splice_edits(sae, edits, feature_max)
    hook = hook_point or sae.config.get("hook_point")
    if hook is None:
        raise ValueError("steering: this dictionary does not say which hook point it was trained on; name hook_point.")
    result = Steered(model.encode_prompt(prompt))
    if not result.prompt_ids:
        raise ValueError("steering: the prompt is empty and this model has no BOS token; type some text.")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        noise = _gumbel(model.d_vocab, generator)
        with model.lock:
            base = _next_logits(model, result.prompt_ids + result.base_ids)
            steered = _next_logits(model, result.prompt_ids + result.steered_ids, hook, splice)
            same_text = result.base_ids == result.steered_ids
            plain = base if same_text else _next_logits(model, result.prompt_ids + result.steered_ids)
        result.kl.append(_kl(steered, plain))
        result.base_ids.append(_sample(base, temperature, noise))
        result.steered_ids.append(_sample(steered, temperature, noise))
        result.base_text = model.tokenizer.decode(result.base_ids, skip_special_tokens=False)
        result.steered_text = model.tokenizer.decode(result.steered_ids, skip_special_tokens=False)
        yield result


def _next_logits(
    model: LanguageModel, ids: list[int], hook_point: str | None = None, splice: Splice | None = None
) -> Float[Tensor, " d_vocab"]:
    window = torch.tensor([ids[-model.context_tokens :]])
    return model.logits(window, hook_point, splice)[0, -1].float().cpu()


def _gumbel(size: int, generator: torch.Generator) -> Float[Tensor, " d_vocab"]:
    """−log(−log u): the largest of logits + noise is a sample of their softmax; shared noise couples the columns."""
    uniform = torch.rand(size, generator=generator, dtype=torch.float64).clamp(1e-300, 1 - 1e-16)
    return -torch.log(-torch.log(uniform))


def _sample(logits: Tensor, temperature: float, noise: Tensor) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int((logits.double() / temperature + noise).argmax())


def _kl(p_logits: Tensor, q_logits: Tensor) -> float:
    """KL(p ‖ q) in nats."""
    log_p, log_q = torch.log_softmax(p_logits.double(), -1), torch.log_softmax(q_logits.double(), -1)
    return float((log_p.exp() * (log_p - log_q)).sum().clamp_min(0))
