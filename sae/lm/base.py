"""The interface of a language model. Weights are used as they are: nothing is folded or centred."""

from __future__ import annotations

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from sae.lm.paths import DirectPath, NoLinearPath, Readout
from sae.lm.weights import TransformerWeights
from sae.text.model_text import Messages
from sae.text.tokenizer import reading_special_tokens, token_ids, token_name

Splice = Callable[[Tensor], Tensor]


class ModelError(ValueError):
    """A model cannot be found, opened or hooked; the message says what is available."""


class Captured(Exception):
    """Ends a forward pass once the last requested activation is there, so that nothing after it is computed."""


class Catch(dict[str, Tensor]):
    """Activations by hook point. Raises `Captured` at the last one; the others are copied, because models may continue
    in place."""

    def __init__(self, wanted: Sequence[str]) -> None:
        super().__init__()
        self.wanted = set(wanted)

    def take(self, name: str, value: Tensor) -> None:
        last = len(self) + 1 == len(self.wanted)
        self[name] = value if last else value.clone()
        if last:
            raise Captured


class Attended(NamedTuple):
    """Attention in one text: a head's output at `dst` is `Σ_src pattern[head, dst, src] · values[src, head]`."""

    pattern: Float[Tensor, "head dst src"]
    values: Float[Tensor, "src head d_head"]


class LanguageModel(ABC):
    """What every model offers. Hold `lock` while using one from several threads: hooks belong to the module."""

    id: str
    kind: str
    weights_sha256: str  # of the parameters and what is computed with them, not of the files (`sae.lm.identity`)
    tokenizer: Tokenizer
    bos_id: int | None
    context_tokens: int
    d_vocab: int
    device: torch.device
    lock: threading.Lock

    @abstractmethod
    def hook_width(self, hook_point: str) -> int:
        """Width d_in of the activations at `hook_point`. Raises: ModelError for an unknown name."""

    @abstractmethod
    def capture_all(
        self, tokens: Int[Tensor, "batch pos"], hook_points: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        """Activations at each hook point from one forward pass; nothing after the last of them is computed.

        Heads and other trailing axes are flattened into d_in. Raises: ModelError for an unknown or unusable name.
        """

    def capture(self, tokens: Int[Tensor, "batch pos"], hook_point: str) -> Float[Tensor, "batch pos d_in"]:
        """Activations at one hook point; nothing after it is computed."""
        return self.capture_all(tokens, [hook_point])[hook_point]

    @abstractmethod
    def _logits(
        self, tokens: Int[Tensor, "batch pos"], splices: Mapping[str, Splice]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """As `spliced_logits`, but differentiable with respect to what the splices return."""

    @abstractmethod
    def direct_path(self, hook_point: str) -> DirectPath:
        """The linear map from `hook_point` into the residual stream: W_out for hook_post, W_O for hook_z, and so on.

        Raises: NoLinearPath, which says why there is none (an activation function, the softmax of attention, …).
        """

    @abstractmethod
    def attention(self, tokens: Int[Tensor, "1 pos"], layer: int) -> Attended:
        """What the heads of a block read in one text.

        Raises: ModelError if their outputs are not sums of values over source tokens.
        """

    def weights(self) -> TransformerWeights:
        """The weights by what they do. Raises: ModelError for a model that computes something else with its weights."""
        raise ModelError(
            f"{self.id}: its weights are not known by what they do. Lenses on weights and parts work for models of "
            "`sae pretrain` and for GPT-2."
        )

    def why_no_path(self, hook_point: str) -> str | None:
        """Why no linear map leads from `hook_point` to the logits; None if one does."""
        try:
            self.readout(), self.direct_path(hook_point)
        except NoLinearPath as error:
            return str(error)
        return None

    def downstream(self, hook_point: str) -> Callable[[Tensor, Tensor], Tensor]:
        """`(x, resid) → logits` for single positions: what the model computes after `hook_point`, given hook_resid_mid.

        Raises: ModelError if the rest of the model needs other positions.
        """
        raise ModelError(f"{self.id}: end-to-end training needs a native one-layer model (one made by sae pretrain).")

    @abstractmethod
    def readout(self) -> Readout:
        """How logits follow from the residual stream. Raises: NoLinearPath if that is not a norm and W_U."""

    @property
    def context_bos(self) -> bool:
        """Whether contexts of this model begin with BOS unless the user says otherwise: where it has one.

        Llama, Gemma and Mistral were trained so. GPT-2, NeoX and Qwen were not, but in them, too, whatever stands first
        gets a huge residual vector; a BOS there keeps it out of the rows.
        """
        return self.bos_id is not None

    @property
    @abstractmethod
    def n_layers(self) -> int: ...

    @property
    @abstractmethod
    def n_heads(self) -> int:
        """Attention heads of a block; hook_z holds their outputs one after the other."""

    @cached_property
    def token_ids(self) -> Int[Tensor, " tokens"]:
        """The ids that stand for a token and have a row in the embedding, ascending.

        Models embed more rows than their tokenizer has tokens (padding), tokenizers have gaps and added tokens.
        """
        return torch.tensor(token_ids(self.tokenizer, self.d_vocab))

    @cached_property
    def _tokens_added(self) -> bool:
        """Whether the tokenizer has tokens beyond the rows of the embedding."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) >= self.d_vocab

    def require_rows(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Raises: ModelError for a token without a row in the embedding: one that was added to the tokenizer only."""
        if self._tokens_added and tokens.numel() and int(tokens.max()) >= self.d_vocab:
            worst = int(tokens.max())
            raise ModelError(
                f"{self.id} embeds {self.d_vocab:,} tokens, and its tokenizer gave the id {worst:,} "
                f"({token_name(self.tokenizer, worst)!r}): that token was added to the tokenizer and not to the model. "
                "Use the tokenizer that the model was trained with, or resize the model's embedding."
            )

    def of_tokens(self, values: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch tokens"]:
        """The values of `token_ids`: without padding rows."""
        return values if len(self.token_ids) == values.shape[-1] else values[..., self.token_ids.to(values.device)]

    def top_tokens(
        self, values: Float[Tensor, "*batch d_vocab"], n: int, *, largest: bool = True
    ) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
        """The `n` largest (or smallest) values among tokens, and their ids; never a padding row."""
        found, place = self.of_tokens(values).topk(min(n, len(self.token_ids)), dim=-1, largest=largest)
        return found, self.token_ids.to(place.device)[place]

    @torch.inference_mode()
    def logits(
        self, tokens: Int[Tensor, "batch pos"], hook_point: str | None = None, splice: Splice | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits; with `splice`, the activations x at `hook_point` are replaced by `splice(x)`."""
        return self._logits(tokens, {} if hook_point is None or splice is None else {hook_point: splice})

    @torch.inference_mode()
    def spliced_logits(
        self, tokens: Int[Tensor, "batch pos"], splices: Mapping[str, Splice]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits with the activations x at several hook points replaced, each by its splice of x.

        The x that a splice is given follows from what earlier splices put in its place.
        """
        return self._logits(tokens, splices)

    def edited_logits(
        self, tokens: Int[Tensor, "batch pos"], splices: Mapping[str, Splice]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """As `spliced_logits`, but differentiable with respect to what the splices return."""
        return self._logits(tokens, splices)

    def gradient(
        self, tokens: Int[Tensor, "batch pos"], hook_point: str, objective: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_in"]]:
        """The activations at `hook_point`, and the gradient there of the scalar `objective(logits)`."""
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            leaves.append(x.detach().clone().requires_grad_(True))
            return leaves[-1]

        with torch.inference_mode(False), torch.enable_grad():
            (found,) = torch.autograd.grad(objective(self._logits(tokens.clone(), {hook_point: leaf})), leaves)
        return leaves[0].detach(), found

    def identity(self) -> dict[str, Any]:
        """What stores and dictionaries record about the model; `store.common.same_model` compares two of these."""
        return {"id": self.id, "kind": self.kind, "sha256": self.weights_sha256}

    @torch.inference_mode()
    def token_losses(
        self, tokens: Int[Tensor, "batch pos"], hook_point: str | None = None, splice: Splice | None = None
    ) -> Float[Tensor, "batch next"]:
        """Cross-entropy, in nats, of each token except the first, given the tokens before it."""
        logits = self.logits(tokens, hook_point, splice)[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten().long().to(logits.device), reduction="none"
        )
        return losses.view(tokens.shape[0], -1)

    @torch.inference_mode()
    def logit_weights(self, directions: Float[Tensor, "n d_in"], hook_point: str) -> Float[Tensor, "n d_vocab"]:
        """Direct effect of each direction on the logits: `(r − mean r) · diag(w_ln) · W_U`, median per row at 0.

        r is what the direction adds to the residual stream (`direct_path`), w_ln what the final norm multiplies by
        (1 + w in Gemma); RMSNorm keeps the mean. Norms on the way, the final one and any after the sublayer, are
        linear without their scale σ, so that rows are comparable. The logits are those before a soft cap.
        The median is over tokens; padding rows of the embedding have no logit weight (nan).
        Units: logits per unit of activation, times σ of each norm on the way.
        Source: Bricken et al. 2023, "feature logit weights"; reference formula of the folded-and-centred model.
        Raises: NoLinearPath if no linear map leads from `hook_point` to the logits.
        """
        path, read = self.direct_path(hook_point), self.readout()
        effect = read.norm.numerator(path.linear(directions)) @ read.W_U.to(directions)
        effect = effect if read.factor == 1.0 else effect * read.factor
        effect = effect - self.of_tokens(effect).median(-1, keepdim=True).values
        if len(self.token_ids) < effect.shape[-1]:
            padding = torch.ones(effect.shape[-1], dtype=torch.bool, device=effect.device)
            padding[self.token_ids.to(effect.device)] = False
            effect[..., padding] = torch.nan
        return effect

    def encode_prompt(self, prompt: str | Messages, *, special_tokens: bool = False) -> list[int]:
        """Token ids of a prompt, BOS first where the model has one.

        With `special_tokens`, special tokens in a text are read as such, and it may begin with BOS itself. Messages
        (each with "role" and "content") become the model's own chat format, up to where its reply begins; all tokens
        are then those of its template. Raises: ModelError when the model has no chat template, or it refuses them.
        """
        chat = not isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self.chat_text(prompt, reply=True)
        tokenizer = self.special_tokenizer if special_tokens or chat else self.tokenizer
        ids = list(tokenizer.encode(text, add_special_tokens=False).ids)
        has_its_own = special_tokens and ids[:1] == [self.bos_id]
        return ids if self.bos_id is None or chat or has_its_own else [self.bos_id, *ids]

    @cached_property
    def special_tokenizer(self) -> Tokenizer:
        """As `tokenizer`, but special tokens in a text are read as such."""
        return reading_special_tokens(self.tokenizer)

    @property
    def chat_template(self) -> str | None:
        """The template of the model's chat format, in Jinja's language; None if it has none."""
        return None

    def chat_text(self, messages: Messages, *, reply: bool = False) -> str:
        """Messages in the model's own chat format, as text with special tokens; with `reply` up to where it answers.

        Raises: ModelError when the model has no chat template, or the template refuses the messages.
        """
        raise ModelError(
            f"{self.id} has no chat template, so it cannot read chat messages. An instruct model has one in its "
            'directory: chat_template.jinja, or "chat_template" in tokenizer_config.json.'
        )


def layer_of(hook_point: str) -> int:
    """The layer of a TransformerLens hook name. Raises: ModelError if the name has none."""
    match = re.match(r"blocks\.(\d+)\.", hook_point)
    if not match:
        raise ModelError(f"hook point {hook_point!r} has no layer; expected a name such as blocks.0.mlp.hook_post.")
    return int(match[1])


def read_json_file(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: ModelError if it is missing or is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file. A model directory needs one.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content
