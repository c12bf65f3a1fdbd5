"""Models that TransformerLens runs. Only this module imports transformer_lens, inside functions: it takes seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from sae.lm import bridge_paths, bridge_weights
from sae.lm.base import Attended, Captured, Catch, LanguageModel, ModelError, Splice
from sae.lm.identity import sha256_of_model, sha256_of_parameters
from sae.lm.model_directory import require_whole
from sae.lm.paths import DirectPath, NoLinearPath, Readout
from sae.lm.transformer import Transformer
from sae.lm.weights import TransformerWeights
from sae.text.model_text import Messages

Found = TypeVar("Found")
Hooked = tuple[str, Callable[..., Tensor]]
Hooks = list[Hooked]

LEGACY_HUB_IDS = {
    "gelu-1l": "NeelNanda/GELU_1L512W_C4_Code",
    "solu-1l": "NeelNanda/SoLU_1L512W_C4_Code",
    "gelu-2l": "NeelNanda/GELU_2L512W_C4_Code",
    "attn-only-1l": "NeelNanda/Attn_Only_1L512W_C4_Code",
}
# Settings that change what the bridge computes from its parameters. Its other settings follow from these or are names.
DECISIVE_SETTINGS = (
    "n_heads",
    "n_key_value_heads",
    "act_fn",
    "normalization_type",
    "eps",
    "positional_embedding_type",
    "rotary_base",
)


class BridgeModel(LanguageModel):
    """Any model that TransformerLens opens: a Hugging Face directory, a hub id, gelu-1l and its relatives."""

    kind = "transformer-bridge"

    def __init__(self, bridge: Any, model_id: str) -> None:
        self.module = bridge.eval().requires_grad_(False)
        self.id = model_id
        parameters = sha256_of_parameters(bridge)
        self.weights_sha256 = sha256_of_model(
            parameters, {name: getattr(bridge.cfg, name, None) for name in DECISIVE_SETTINGS}
        )
        self.tokenizer = _tokenizer_of(bridge, model_id)
        self._hf_tokenizer = bridge.tokenizer  # of transformers
        self.tokenizer.encode_special_tokens = True
        self.bos_id = _bos_id_of(bridge.tokenizer)
        self.context_tokens = int(bridge.cfg.n_ctx)
        self.d_vocab = int(bridge.cfg.d_vocab)
        self.device = torch.device(bridge.cfg.device or "cpu")
        self.lock = threading.Lock()
        self._widths: dict[str, int] = {}
        self._paths: dict[str, Any] = {}

    @property
    def chat_template(self) -> str | None:
        template = getattr(self._hf_tokenizer, "chat_template", None)
        return template.get("default") if isinstance(template, dict) else template

    def chat_text(self, messages: Messages, *, reply: bool = False) -> str:
        if not self.chat_template:
            return super().chat_text(messages, reply=reply)
        try:
            text: str = self._hf_tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=reply
            )
            return text
        except Exception as error:  # templates are programs, and raise what they like
            raise ModelError(f"the chat template of {self.id} refuses these messages: {error}") from error

    def hook_width(self, hook_point: str) -> int:
        if hook_point not in self._widths:
            # Only the position axis has this length, so `capture_all` recognises attention patterns and refuses them.
            probe = torch.zeros((1, min(int(self.module.cfg.n_heads) + 1, self.context_tokens)), dtype=torch.long)
            self._widths[hook_point] = int(self.capture(probe, hook_point).shape[-1])
        return self._widths[hook_point]

    @torch.inference_mode()
    def capture_all(
        self, tokens: Int[Tensor, "batch pos"], hook_points: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        # `Captured` is raised inside the hook, because `stop_at_layer` has no effect on a one-layer model.
        self.require_rows(tokens)
        caught = Catch(hook_points)

        def look(value: Tensor, hook: Any, name: str) -> Tensor:
            caught.take(name, value)
            return value

        with suppress(Captured):
            self._run(tokens, [(name, partial(look, name=name)) for name in caught.wanted])
        for name in caught.wanted:
            if name not in caught:
                raise ModelError(f"{self.id}: the hook point {name!r} exists but the forward pass never reached it.")
            if caught[name].shape[:2] != tokens.shape or caught[name].ndim < 3:
                raise ModelError(
                    f"{self.id}: {name!r} has shape {list(caught[name].shape)} for {list(tokens.shape)} tokens; "
                    "a dictionary needs [batch, pos, …], one vector per token."
                )
        return {name: value.flatten(2).float() for name, value in caught.items()}

    def _logits(
        self, tokens: Int[Tensor, "batch pos"], splices: Mapping[str, Splice]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        self.require_rows(tokens)
        if not splices:
            logits: Tensor = self.module(tokens.to(self.device), return_type="logits")
            return logits.float()
        pairs = [self._splicing(hook_point, splice) for hook_point, splice in splices.items()]
        # What catches up comes first: at hook_resid_post, a splice there has the last word.
        hooks = [*(late for _, late in pairs if late), *(replace for replace, _ in pairs)]
        return self._run(tokens, hooks).float()

    def _splicing(self, hook_point: str, splice: Splice) -> tuple[Hooked, Hooked | None]:
        """The hook that replaces x, and a later one that the replacement needs at hook_resid_mid."""
        bypassed: list[Tensor] = []

        def replace(value: Tensor, hook: Any) -> Tensor:
            replaced = splice(value.flatten(2).float()).to(value.dtype).view(value.shape)
            bypassed.append(replaced - value)
            return replaced

        def catch_up(value: Tensor, hook: Any) -> Tensor:
            return value + bypassed.pop()

        if not hook_point.endswith(".hook_resid_mid"):
            return (hook_point, replace), None
        # The bridge's hook_resid_mid is only the input of the MLP's norm: replacing it leaves the residual stream
        # itself unchanged. So the difference is added to the stream at the end of the block.
        block = hook_point.removesuffix("hook_resid_mid")
        held = self.module.hook_dict
        if held.get(hook_point) is not held.get(f"{block}ln2.hook_in", ""):
            raise ModelError(f"{self.id}: splicing at {hook_point} is not supported; use {block}hook_resid_post.")
        return (hook_point, replace), (f"{block}hook_resid_post", catch_up)

    def _run(self, tokens: Tensor, hooks: Hooks) -> Tensor:
        try:
            logits: Tensor = self.module.run_with_hooks(tokens.to(self.device), return_type="logits", fwd_hooks=hooks)
            return logits
        except KeyError as error:
            raise self._unknown(next((name for name, _ in hooks if name in str(error)), hooks[0][0])) from error

    def _unknown(self, hook_point: str) -> ModelError:
        close = get_close_matches(hook_point, self.module.hook_dict, n=4)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        return ModelError(f"{self.id} has no hook point {hook_point!r}.{hint}")

    def direct_path(self, hook_point: str) -> DirectPath:
        if hook_point not in self.module.hook_dict:
            raise self._unknown(hook_point)
        return self._kept(hook_point, lambda: bridge_paths.direct_path(self.module, self._run, hook_point))

    @torch.inference_mode()
    def attention(self, tokens: Int[Tensor, "1 pos"], layer: int) -> Attended:
        names = [f"blocks.{layer}.attn.{name}" for name in ("hook_pattern", "hook_v", "hook_z")]
        caught = Catch(names)

        def look(value: Tensor, hook: Any, name: str) -> Tensor:
            caught.take(name, value)
            return value

        with suppress(Captured):
            self._run(tokens, [(name, partial(look, name=name)) for name in names])
        if caught.keys() == set(names):
            pattern, z = caught[names[0]][0].float(), caught[names[2]][0].float()
            z = z.view(tokens.shape[1], self.n_heads, -1)
            values = caught[names[1]][0].float().view(len(z), -1, z.shape[-1])
            values = values.repeat_interleave(self.n_heads // values.shape[1], 1)  # queries that share a value head
            missed = torch.einsum("hts,shd->thd", pattern, values) - z
            if missed.norm() <= 1e-2 * z.norm():
                return Attended(pattern, values)
        raise ModelError(
            f"{self.id}: what block {layer} adds by attention is not a sum of values over source tokens, or "
            "TransformerLens does not show its parts, so it cannot be attributed to them."
        )

    @property
    def n_heads(self) -> int:
        return int(self.module.cfg.n_heads)

    def readout(self) -> Readout:
        return self._kept("readout", lambda: bridge_paths.readout(self.module, self._run))

    @torch.inference_mode()
    def weights(self) -> TransformerWeights:
        return bridge_weights.weights(self.module, self._run, self.id)

    def _kept(self, name: str, find: Callable[[], Found]) -> Found:
        """What `find` gives, or the NoLinearPath that it raises; found once, because it runs the model."""
        if name not in self._paths:
            try:
                self._paths[name] = find()
            except NoLinearPath as error:
                self._paths[name] = error
        if isinstance(self._paths[name], NoLinearPath):
            raise self._paths[name]
        return cast(Found, self._paths[name])

    @property
    def n_layers(self) -> int:
        return int(self.module.cfg.n_layers)


def _tokenizer_of(bridge: Any, model_id: str) -> Tokenizer:
    """The model's tokenizer. Raises: ModelError if it has none, another kind, or one that is not this model's."""
    if bridge.tokenizer is None:
        raise ModelError(f"{model_id} has no tokenizer. Put its tokenizer.json into the model's directory.")
    tokenizer = getattr(bridge.tokenizer, "backend_tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise ModelError(
            f"{model_id}: its tokenizer is of a kind that cannot be read here ({type(bridge.tokenizer).__name__}); a "
            "tokenizer.json is needed. Convert it with transformers' AutoTokenizer and save_pretrained."
        )
    ids, rows = tokenizer.get_vocab(with_added_tokens=False).values(), int(bridge.cfg.d_vocab)
    if not ids:
        raise ModelError(
            f"{model_id}: its tokenizer's vocabulary is empty. Copy the model's own tokenizer.json into its directory."
        )
    if max(ids) >= rows:
        raise ModelError(
            f"{model_id}: its tokenizer has token ids up to {max(ids):,}, and the model embeds {rows:,} tokens: it is "
            "another model's tokenizer. Copy the model's own tokenizer.json into its directory."
        )
    size = tokenizer.get_vocab_size()
    if size < rows / 2:  # padding adds a few rows, never as many again
        raise ModelError(
            f"{model_id}: its tokenizer has {size:,} tokens, fewer than half of the {rows:,} that are embedded: it is "
            "another model's tokenizer. Copy the model's own tokenizer.json into its directory."
        )
    return tokenizer


END_OF_TEXT = "<|endoftext|>"


def _bos_id_of(tokenizer: Any) -> int | None:
    """BOS; without one the end-of-text token, which separated documents in training (Qwen, NeoX).

    Not the EOS of an instruct model, which ends a turn in the middle of a conversation.
    """
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id)
    found = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    return None if found is None else int(found)


def open_directory(path: Path, model_id: str, device: str) -> BridgeModel:
    """A model in Hugging Face's layout. Raises: ModelError if a part of it is missing or it cannot be opened."""
    require_whole(path)
    try:
        bridge = _boot(str(path.resolve()), device)
    except ModelError:
        raise
    except Exception as error:  # transformers and TransformerLens raise many types of errors
        raise ModelError(f"model {str(path)!r} could not be opened: {error}") from error
    return BridgeModel(bridge, model_id)


def open_hub(name: str, device: str) -> BridgeModel:
    """A model from the Hugging Face hub. Raises: ModelError if it is not available."""
    from transformer_lens.model_bridge.sources import boot_tl_legacy

    legacy = LEGACY_HUB_IDS.get(name)
    try:
        bridge = boot_tl_legacy(legacy, device=device) if legacy else _boot(name, device)
    except ModelError:
        raise
    except Exception as error:  # network, repository and format errors all mean: not available
        raise ModelError(f"model {name!r} could not be loaded from the hub: {error}") from error
    return BridgeModel(bridge, name)


def _boot(name: str, device: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, device=device, model_class=_WholeWeights())


class _WholeWeights:
    """Loads a model as TransformerLens does, and refuses one whose file lacks weights: they would be random numbers."""

    def from_pretrained(self, name: str, **settings: Any) -> Any:
        """The Hugging Face model. Raises: ModelError naming the weights that are missing or of another shape."""
        from transformer_lens.model_bridge.sources.transformers import source

        theirs: Any = source  # the steps by which TransformerLens itself chooses the class
        kind = theirs.determine_architecture_from_hf_config(theirs.AutoConfig.from_pretrained(name))
        loader = theirs.get_hf_model_class_for_architecture(kind)
        model, report = loader.from_pretrained(name, output_loading_info=True, **settings)
        if missing := sorted(map(str, report.get("missing_keys", ()))):
            shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6:,} more" if len(missing) > 6 else "")
            raise ModelError(
                f"model {name!r} has no weights for {shown}, which {kind} needs. If all are missing, config.json is "
                "another model's; otherwise the file is incomplete: download or save the model again."
            )
        return model


def bridge_with(module: Transformer, device: torch.device) -> Any:
    """A TransformerLens `TransformerBridge` with a native transformer's weights."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources import boot_native

    config = TransformerBridgeConfig(**module.config.to_dict(), normalization_type="LN", seed=0, device=str(device))
    bridge = boot_native(config, device=str(device))
    state = dict(module.state_dict())
    for name, held in bridge.state_dict().items():  # type: ignore[no-untyped-call]
        if name not in state:  # the bridge's unembedding has a bias; ours is zero
            state[name] = torch.zeros_like(held)
    bridge.load_state_dict(state)  # type: ignore[no-untyped-call]
    return bridge.eval()
