"""Steering: features set, added, scaled or ablated while the model writes, next to the same text unsteered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.trained_rows import trained_with_context_bos
from sae.interventions.edits import Edit, Erasure, change_by_edits, scaled, where_trained
from sae.lm import LanguageModel, Splice, layer_of
from sae.text.model_text import Messages
from sae.text.tokenizer import continuation

SWEEP = (0.0, 1.0, 2.0, 5.0, 10.0)
# Bricken et al. 2023, "pinned feature sampling": this prefix, the feature held at its largest observed activation.
PINNED_PROMPT = "1,2,3,4,5,6,7,8,9,10"


@dataclass(frozen=True)
class Generation:
    """How texts are written: `max_new_tokens` each, at this temperature, from the random stream of `seed`.

    At temperature 0 the likeliest token is taken. Raises: ValueError for a temperature below 0 or no new tokens.
    """

    seed: int = 0
    max_new_tokens: int = 40
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"steering: temperature must be 0 or a positive number; got {self.temperature}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"steering: max_new_tokens must be at least 1; got {self.max_new_tokens}.")


DEFAULT_GENERATION = Generation()


@dataclass
class Steered:
    """Two continuations of one prompt from one random stream.

    `kl[i]` compares the next-token distributions at the i-th steered token: KL(steered ‖ base), both given the steered
    text so far. `base_surprisal[i]` and `steered_surprisal[i]` are −log p of the i-th token of each text under the
    base model, given that text so far. Units: nats, at temperature 1.
    """

    prompt_ids: list[int]
    prompt_text: str = ""
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


def steer(
    model: LanguageModel,
    sae: SAE,
    prompt: str | Messages,
    edits: Sequence[Edit | Erasure],
    *,
    seed: int = 0,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    feature_max: Float[np.ndarray, " d_sae"] | None = None,
    feature_p99: Float[np.ndarray, " d_sae"] | None = None,
    hook_point: str | None = None,
    special_tokens: bool = False,
) -> Steered:
    """Continues `prompt` twice, without and with the edits; both texts draw from the same random stream.

    Edits act on every position but BOS and rows that the dictionary's row filter leaves out: training left them out
    too, and in many models BOS carries a vector of a hundred times the norm, whose features mean nothing.

    A prompt of messages, each with "role" and "content", is put in the model's own chat format, and the model writes
    the reply; with `special_tokens`, special tokens in a text are read as such.
    `feature_max` and `feature_p99` are the units of `set` and `add` (`sae.pipeline.feature_units` reads them);
    `hook_point` defaults to the one that the dictionary was trained on.
    The features of a transcoder are read at its hook point and written at its target, next to the MLP's own output:
    `y → y + Σ (v − a) · W_dec`, so that what the transcoder leaves unexplained stays.
    Raises: ValueError for bad edits or settings, an empty prompt of a model without a BOS token, or messages that the
    model has no chat template for.
    """
    steps = sweep_stream(
        model,
        sae,
        prompt,
        edits,
        (1.0,),
        Generation(seed, max_new_tokens, temperature),
        feature_max=feature_max,
        feature_p99=feature_p99,
        hook_point=hook_point,
        special_tokens=special_tokens,
    )
    *_, (result,) = steps
    return result


def sweep_stream(
    model: LanguageModel,
    sae: SAE,
    prompt: str | Messages,
    edits: Sequence[Edit | Erasure],
    factors: Sequence[float] = SWEEP,
    generation: Generation = DEFAULT_GENERATION,
    *,
    feature_max: Float[np.ndarray, " d_sae"] | None = None,
    feature_p99: Float[np.ndarray, " d_sae"] | None = None,
    hook_point: str | None = None,
    special_tokens: bool = False,
) -> Iterator[list[Steered]]:
    """As `steer`, with one steered text for each factor on the edits' values (`scaled`); all share one base text.

    Yields the growing results, one per factor, after every token. There is no key-value cache, because the edits
    change every position. Raises: as `steer`, before the first token; ValueError without a factor.
    """
    if not factors:
        raise ValueError("steering: a sweep needs at least one factor, e.g. 0,1,2,5,10.")
    return alternatives_stream(
        model,
        sae,
        prompt,
        [scaled(edits, factor) for factor in factors],
        generation,
        feature_max=feature_max,
        feature_p99=feature_p99,
        hook_point=hook_point,
        special_tokens=special_tokens,
    )


def alternatives_stream(
    model: LanguageModel,
    sae: SAE,
    prompt: str | Messages,
    alternatives: Sequence[Sequence[Edit | Erasure]],
    generation: Generation = DEFAULT_GENERATION,
    *,
    feature_max: Float[np.ndarray, " d_sae"] | None = None,
    feature_p99: Float[np.ndarray, " d_sae"] | None = None,
    hook_point: str | None = None,
    special_tokens: bool = False,
) -> Iterator[list[Steered]]:
    """As `sweep_stream`, with one steered text for each list of edits, such as an edit and its control.

    Raises: as `steer`, before the first token.
    """
    changes = [change_by_edits(sae, edits, feature_max, feature_p99) for edits in alternatives]
    steered = SteeredModel(model, sae, _place(sae, hook_point), changes)
    prompt_ids = _prompt_ids(model, prompt, special_tokens)
    shown = prompt if isinstance(prompt, str) else continuation(model.tokenizer, [], prompt_ids)
    return _generate(steered, [Steered(list(prompt_ids), shown) for _ in alternatives], generation)


@dataclass(frozen=True)
class Place:
    """The hook points at which a dictionary reads its activations and writes its features: one, or a transcoder's two.

    Raises: ValueError for a transcoder that writes before it reads: its edits would change what it reads.
    """

    reads: str
    writes: str

    def __post_init__(self) -> None:
        if _order(self.writes) < _order(self.reads):
            raise ValueError(
                f"steering: this transcoder reads {self.reads} and writes {self.writes}, which comes before it. Only "
                "transcoders that predict a later place can be steered with."
            )


# The parts of a block in the order of a run, as hook names begin.
IN_BLOCK = (
    *("resid_pre", "attn_in", "ln1", "attn", "ln1_post", "resid_mid"),
    *("mlp_in", "ln2", "mlp.hook_in", "mlp.hook_p", "mlp", "ln2_post", "resid_post"),
)


def _order(hook_point: str) -> tuple[int, int]:
    """Where a hook point is in a run: its block, and its part of the block."""
    name = hook_point.split(".", 2)[-1].removeprefix("hook_")
    part = max((part for part in IN_BLOCK if name.startswith(part)), key=len, default=IN_BLOCK[-1])
    return layer_of(hook_point), IN_BLOCK.index(part)


@dataclass(frozen=True)
class SteeredModel:
    """A model that reads several equally long texts, without edits or each with its own."""

    model: LanguageModel
    sae: SAE
    place: Place
    changes: list[Splice]  # one for each text: what its edits add, from x

    def base_logits(self, texts: list[list[int]]) -> Float[Tensor, "row d_vocab"]:
        """Next-token logits of the model as it is."""
        return self._last(self.model.logits(self._windows(texts)))

    def steered_logits(self, texts: list[list[int]]) -> Float[Tensor, "row d_vocab"]:
        """Next-token logits with the edits, on the rows that the dictionary was trained on (`edits.where_trained`)."""
        tokens, place = self._windows(texts), self.place

        def change(x: Float[Tensor, "row pos d_in"]) -> Float[Tensor, "row pos d_out"]:
            return torch.cat([change_row(row[None]) for change_row, row in zip(self.changes, x, strict=True)])

        trained = where_trained(change, self.sae, self.model, tokens, place.reads)
        if place.reads == place.writes:
            return self._last(self.model.logits(tokens, place.writes, lambda x: x + trained(x)))
        # what is read comes before what is written, so it is the same in a run without edits
        added = trained(self.model.capture(tokens, place.reads).float().to(self.model.device))

        def add(y: Float[Tensor, "row pos d_out"]) -> Float[Tensor, "row pos d_out"]:
            return y + where_trained(lambda _: added.to(y.device), self.sae, self.model, tokens, place.writes)(y)

        return self._last(self.model.logits(tokens, place.writes, add))

    @staticmethod
    def _last(logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row d_vocab"]:
        return logits[:, -1].float().cpu()

    def _windows(self, texts: list[list[int]]) -> Int[Tensor, "row pos"]:
        """What fits into the model's context of each text: its end, after BOS if the contexts of training began so."""
        limit = self.model.context_tokens
        first = texts[0][:1] if self._context_bos and texts[0][0] == self.model.bos_id else []
        if len(texts[0]) <= limit:
            return torch.tensor(texts)
        return torch.tensor([first + ids[len(ids) - limit + len(first) :] for ids in texts])

    @property
    def _context_bos(self) -> bool:
        recorded = trained_with_context_bos(self.sae.config)
        return self.model.context_bos if recorded is None else recorded


def _generate(steered_model: SteeredModel, results: list[Steered], generation: Generation) -> Iterator[list[Steered]]:
    """Adds one token to every text, again and again."""
    model = steered_model.model
    generator = torch.Generator().manual_seed(generation.seed)
    for _ in range(generation.max_new_tokens):
        noise = _gumbel(model.d_vocab, generator)
        base, on_steered, steered = _three_logits(steered_model, results)
        base_id = _sample(base, generation.temperature, noise)
        for result, base_here, steered_here in zip(results, on_steered, steered, strict=True):
            steered_id = _sample(steered_here, generation.temperature, noise)
            result.kl.append(_kl(steered_here, base_here))
            result.base_surprisal.append(_surprisal(base, base_id))
            result.steered_surprisal.append(_surprisal(base_here, steered_id))
            result.base_ids.append(base_id)
            result.steered_ids.append(steered_id)
            result.base_text = continuation(model.tokenizer, result.prompt_ids, result.base_ids)
            result.steered_text = continuation(model.tokenizer, result.prompt_ids, result.steered_ids)
        yield results


def _three_logits(
    steered_model: SteeredModel, results: list[Steered]
) -> tuple[Float[Tensor, " d_vocab"], list[Float[Tensor, " d_vocab"]], Float[Tensor, "text d_vocab"]]:
    """Next-token logits of the base model on the base text and on each steered text, and of the steered model there.

    For a steered text that still equals the base text, the base model is not run again.
    """
    prompt_ids = results[0].prompt_ids
    texts = [prompt_ids + result.steered_ids for result in results]
    apart = [i for i, result in enumerate(results) if result.steered_ids != result.base_ids]
    with steered_model.model.lock:
        base = steered_model.base_logits([prompt_ids + results[0].base_ids])[0]
        steered = steered_model.steered_logits(texts)
        own = dict(zip(apart, steered_model.base_logits([texts[i] for i in apart]), strict=True)) if apart else {}
    return base, [own.get(i, base) for i in range(len(results))], steered


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
    edits: Sequence[Edit | Erasure],
    *,
    n: int = 10,
    feature_max: Float[np.ndarray, " d_sae"] | None = None,
    feature_p99: Float[np.ndarray, " d_sae"] | None = None,
    hook_point: str | None = None,
) -> NextTokens:
    """Probabilities (temperature 1) of the `n` likeliest next tokens after `ids` in either distribution.

    Units: kl in nats, KL(steered ‖ base).
    """
    change = change_by_edits(sae, edits, feature_max, feature_p99)
    steered_model = SteeredModel(model, sae, _place(sae, hook_point), [change])
    with model.lock:
        base = steered_model.base_logits([list(ids)])[0]
        steered = steered_model.steered_logits([list(ids)])[0]
    p, q = base.double().softmax(-1), steered.double().softmax(-1)
    _, found = model.top_tokens(torch.maximum(p, q), n)
    return NextTokens(found.tolist(), p[found].tolist(), q[found].tolist(), _kl(steered, base))


def _place(sae: SAE, asked: str | None) -> Place:
    hook = asked or sae.config.get("hook_point")
    if hook is None:
        raise ValueError("steering: this dictionary does not say which hook point it was trained on; name hook_point.")
    if not sae.is_transcoder:
        return Place(str(hook), str(hook))
    if "target_hook_point" not in sae.config:
        raise ValueError("steering: this transcoder does not say which hook point it predicts (target_hook_point).")
    return Place(str(hook), str(sae.config["target_hook_point"]))


def _prompt_ids(model: LanguageModel, prompt: str | Messages, special_tokens: bool) -> list[int]:
    ids = model.encode_prompt(prompt, special_tokens=special_tokens)
    if not ids:
        raise ValueError("steering: the prompt is empty and this model has no BOS token; type some text.")
    return ids


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
