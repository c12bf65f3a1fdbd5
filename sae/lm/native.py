"""Models trained by `sae pretrain`, run by our own transformer, which is faster than TransformerLens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.jobs.checkpoint import read_tensors
from sae.lm.base import Attended, Captured, Catch, LanguageModel, ModelError, Splice, layer_of, read_json_file
from sae.lm.bridge import bridge_with
from sae.lm.identity import sha256_of_model, sha256_of_parameters
from sae.lm.paths import DirectPath, NoLinearPath, Norm, Readout
from sae.lm.transformer import Attention, Transformer, TransformerConfig
from sae.lm.weights import TransformerWeights, weights_from
from sae.text.tokenizer import load_tokenizer


class NativeModel(LanguageModel):
    """A model trained by `sae pretrain`; its activations equal those of the bridge to 1e-5."""

    kind = "native-transformer"

    def __init__(self, directory: Path, model_id: str, device: str = "cpu") -> None:
        config = read_json_file(directory / "config.json")
        if missing := sorted({*TransformerConfig().to_dict(), "bos_token"} - config.keys()):
            raise ModelError(f"{directory}/config.json lacks {', '.join(missing)}.")
        self.module = Transformer(TransformerConfig.from_dict(config))
        tensors, _ = read_tensors(directory / "model.safetensors")
        try:
            self.module.load_state_dict({name: t.float() for name, t in tensors.items()})
        except RuntimeError as error:
            raise ModelError(f"{directory}: weights do not fit config.json: {error}") from error
        self.device = torch.device(device)
        self.module.to(self.device).eval().requires_grad_(False)
        self.id = model_id
        self.directory = directory
        parameters = sha256_of_parameters(self.module)
        self.weights_sha256 = sha256_of_model(parameters, self.module.config.to_dict())
        self.tokenizer = load_tokenizer(directory / "tokenizer.json")
        self.bos_id = self.tokenizer.token_to_id(config["bos_token"])
        self.trained_tokens: int | None = config.get("trained_tokens")
        self._context_bos = bool(config.get("context_bos", False))
        self.context_tokens = self.module.config.n_ctx
        self.d_vocab = self.module.config.d_vocab
        self.lock = threading.Lock()

    def hook_width(self, hook_point: str) -> int:
        widths = self.module.hook_widths
        if hook_point not in widths:
            raise ModelError(f"{self.id} has no hook point {hook_point!r}; it has {', '.join(widths)}.")
        return widths[hook_point]

    @torch.inference_mode()
    def capture_all(
        self, tokens: Int[Tensor, "batch pos"], hook_points: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        for hook_point in hook_points:
            self.hook_width(hook_point)
        self.require_rows(tokens)
        caught = Catch(hook_points)

        def look(name: str, value: Tensor) -> Tensor:
            if name in caught.wanted:
                caught.take(name, value)
            return value

        with suppress(Captured):
            self.module.final(tokens.to(self.device), look)
        assert caught.keys() == caught.wanted
        return caught

    def _logits(
        self, tokens: Int[Tensor, "batch pos"], splices: Mapping[str, Splice]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        self.require_rows(tokens)
        for hook_point in splices:
            self.hook_width(hook_point)  # raises for an unknown name
        logits: Tensor = self.module(
            tokens.to(self.device), lambda name, value: splices[name](value) if name in splices else value
        )
        return logits

    def direct_path(self, hook_point: str) -> DirectPath:
        self.hook_width(hook_point)
        layer = layer_of(hook_point)
        name = hook_point.removeprefix(f"blocks.{layer}.")
        if name == "mlp.hook_in":
            raise NoLinearPath(hook_point, "the MLP reads it, and it is not a part of the residual stream")
        if name in ("attn.hook_q", "attn.hook_k"):
            raise NoLinearPath(hook_point, "it acts through the softmax of attention")
        if name == "attn.hook_v":
            raise NoLinearPath(hook_point, "it acts on other positions, through a pattern that depends on the text")
        writers = {"mlp.hook_post": "mlp.out", "attn.hook_z": "attn.o"}
        matrix = None
        if name in writers:
            matrix = self.module.blocks[layer].get_submodule(writers[name]).get_parameter("weight").T
        unread = ["mlp.hook_post", "hook_mlp_out", "hook_resid_post"]  # by layers, in the last block
        unread += ["attn.hook_z", "hook_attn_out"] if self.module.config.attn_only else []
        return DirectPath(matrix, alone=layer == self.n_layers - 1 and name in unread)

    def attention(self, tokens: Int[Tensor, "1 pos"], layer: int) -> Attended:
        if not 0 <= layer < self.n_layers:
            raise ModelError(f"{self.id} has layers 0 … {self.n_layers - 1}; got {layer}.")
        attn, ln1 = (self.module.blocks[layer].get_submodule(name) for name in ("attn", "ln1"))
        assert isinstance(attn, Attention)
        x = ln1(self.capture(tokens, f"blocks.{layer}.hook_resid_pre")[0])
        return Attended(attn.pattern(x), attn.v(x).view(len(x), attn.n_heads, attn.d_head))

    @property
    def n_heads(self) -> int:
        return self.module.config.n_heads

    def readout(self) -> Readout:
        norm = self.module.ln_final
        return Readout(Norm(norm.weight, True, norm.eps), self.module.unembed.weight.T)

    @property
    def context_bos(self) -> bool:
        """False unless the model was trained so: `sae pretrain` cuts `[BOS] document [BOS] document …` anywhere."""
        return self._context_bos

    @property
    def n_layers(self) -> int:
        return self.module.config.n_layers

    def downstream(self, hook_point: str) -> Callable[[Tensor, Tensor], Tensor]:
        if self.module.config.n_layers != 1 or hook_point != "blocks.0.mlp.hook_post":
            raise ModelError(
                f"{self.id}: end-to-end training needs a one-layer model and blocks.0.mlp.hook_post; got "
                f"{self.module.config.n_layers} layers and {hook_point}."
            )

        @lru_cache  # copies the weights once to a device that has rows but not the model
        def on(device: torch.device) -> Transformer:
            here = next(self.module.parameters()).device
            return self.module if device == here else deepcopy(self.module).to(device)

        def logits(x: Tensor, resid: Tensor) -> Tensor:
            module = on(x.device)
            result: Tensor = module.unembed(module.ln_final(resid + module.blocks[0].get_submodule("mlp.out")(x)))
            return result

        return logits

    def weights(self) -> TransformerWeights:
        config, modules = self.module.config, dict(self.module.named_modules())
        by_head = (config.n_heads, config.d_head)

        def find(name: str) -> Tensor:
            place, _, part = name.rpartition(".")
            kind, _, letter = part.partition("_")
            if kind in ("w", "b") and not letter:  # of a norm
                of_norm: Tensor = modules[place].get_parameter("weight" if kind == "w" else "bias")
                return of_norm
            if part == "b_U":
                return torch.zeros(config.d_vocab, device=self.device)
            child = f"{place}.{letter.lower()}".lstrip(".")
            child = {"e": "embed", "pos": "pos_embed", "u": "unembed"}.get(child, child)
            found: Tensor = modules[child].get_parameter("weight" if kind == "W" else "bias")
            if letter in ("Q", "K", "V"):
                found = found.view(*by_head, -1).transpose(1, 2) if kind == "W" else found.view(by_head)
            elif part == "W_O":
                found = found.T.reshape(*by_head, -1)
            elif part in ("W_U", "W_out"):
                found = found.T
            return found

        return weights_from(find, n_layers=config.n_layers, eps=self.module.ln_final.eps, has_mlp=not config.attn_only)

    def bridge(self) -> Any:
        """The same weights as a TransformerLens `TransformerBridge`: slower, but with every TransformerLens tool."""
        return bridge_with(self.module, self.device)
