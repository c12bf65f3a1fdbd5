"""The interface of a language model. Weights are used as they are: nothing is folded or centred."""

from __future__ import annotations

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from sae.text.model_text import Messages
from sae.text.tokenizer import reading_special_tokens

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
        self, tokens: Int[Tensor, "batch pos"], hook_point: str | None = None, splice: Splice | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """As `logits`, but differentiable with respect to what `splice` returns."""

    @abstractmethod
    def to_residual(self, hook_point: str) -> Float[Tensor, "d_in d_model"] | None:
        """The linear map from `hook_point` into the residual stream (W_out for hook_post); None means identity."""

    def downstream(self, hook_point: str) -> Callable[[Tensor, Tensor], Tensor]:
        """`(x, resid) → logits` for single positions: what the model computes after `hook_point`, given hook_resid_mid.

        Raises: ModelError if the rest of the model needs other positions.
        """
        raise ModelError(f"{self.id}: end-to-end training needs a native one-layer model (one made by sae pretrain).")

    @abstractmethod
    def unembedding(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model d_vocab"], bool]:
        """The final norm's weight, W_U, and whether the norm subtracts the mean (LayerNorm, not RMSNorm)."""

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
    def norm_eps(self) -> float:
        """The ε that the final norm adds to the variance."""

    @torch.inference_mode()
    def logits(
        self, tokens: Int[Tensor, "batch pos"], hook_point: str | None = None, splice: Splice | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits; with `splice`, the activations x at `hook_point` are replaced by `splice(x)`."""
        return self._logits(tokens, hook_point, splice)

    def gradient(
        self, tokens: Int[Tensor, "batch pos"], hook_point: str, objective: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_in"]]:
        """The activations at `hook_point`, and the gradient there of the scalar `objective(logits)`."""
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            leaves.append(x.detach().clone().requires_grad_(True))
            return leaves[-1]

        with torch.inference_mode(False), torch.enable_grad():
            (found,) = torch.autograd.grad(objective(self._logits(tokens.clone(), hook_point, leaf)), leaves)
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
        """Direct effect of each direction on the logits: `(d − mean d) · diag(w_ln) · W_U`, median per row at 0.

        The final LayerNorm is linearised without its scale (so rows are comparable), the model is not changed.
        Units: logits per unit of activation times the final LayerNorm's standard deviation.
        Source: Bricken et al. 2023, "feature logit weights"; reference formula of the folded-and-centred model.
        """
        out = self.to_residual(hook_point)
        d = directions if out is None else directions @ out
        weight, W_U, centred = self.unembedding()
        if centred:
            d = d - d.mean(-1, keepdim=True)
        effect = (d * weight) @ W_U
        return effect - effect.median(-1, keepdim=True).values

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
