"""Language models: one interface over the fast native transformer and TransformerLens' bridge.

The only door to transformer_lens. Weights are used as they are (nothing folded or centred).
"""

from __future__ import annotations

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from sae.checkpoint import read_tensors
from sae.tokenizer import load_tokenizer
from sae.transformer import Transformer, TransformerConfig

Splice = Callable[[Tensor], Tensor]
Hooks = list[tuple[str, Callable[..., Tensor]]]

LEGACY_HUB_IDS = {
    "gelu-1l": "NeelNanda/GELU_1L512W_C4_Code",
    "solu-1l": "NeelNanda/SoLU_1L512W_C4_Code",
    "gelu-2l": "NeelNanda/GELU_2L512W_C4_Code",
    "attn-only-1l": "NeelNanda/Attn_Only_1L512W_C4_Code",
}


class ModelError(ValueError):
    """A model cannot be found, read or hooked; the message names what exists."""


class _Captured(Exception):
    """Ends a forward pass at the last activation asked for, so that nothing after it is computed."""


class _Catch(dict[str, Tensor]):
    """Activations by hook point, ended by `_Captured` once all are there; copies, since a model may go on in place."""

    def __init__(self, wanted: Sequence[str]) -> None:
        super().__init__()
        self.wanted = set(wanted)

    def take(self, name: str, value: Tensor) -> None:
        last = len(self) + 1 == len(self.wanted)
        self[name] = value if last else value.clone()
        if last:
            raise _Captured


class LanguageModel(ABC):
    """What the pipeline needs of a model. Guard concurrent use with `lock`: hooks live on the module."""

    id: str
    kind: str
    weights_sha256: str
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
        """`logits`, differentiable in what `splice` returns."""

    @abstractmethod
    def to_residual(self, hook_point: str) -> Float[Tensor, "d_in d_model"] | None:
        """The linear map from `hook_point` into the residual stream (W_out for hook_post); None means identity."""

    def downstream(self, hook_point: str) -> Callable[[Tensor, Tensor], Tensor]:
        """`(x, resid) → logits`, row by row: what the model computes from `hook_point` on, resid being hook_resid_mid.

        Raises: ModelError where other positions or layers come in after the hook point.
        """
        raise ModelError(f"{self.id}: only a native one-layer model goes on from a hook point row by row.")

    @abstractmethod
    def unembedding(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model d_vocab"], bool]:
        """Final norm weight, W_U, and whether the norm subtracts the mean (LayerNorm) or not (RMS)."""

    @property
    @abstractmethod
    def n_layers(self) -> int: ...

    @property
    @abstractmethod
    def norm_eps(self) -> float:
        """What the final norm adds to the variance."""

    @torch.inference_mode()
    def logits(
        self, tokens: Int[Tensor, "batch pos"], hook_point: str | None = None, splice: Splice | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits; with `splice`, the activations x at `hook_point` are replaced by splice(x)."""
        return self._logits(tokens, hook_point, splice)

    def gradient(
        self, tokens: Int[Tensor, "batch pos"], hook_point: str, objective: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_in"]]:
        """x at `hook_point`, and the gradient there of `objective(logits)`, a scalar."""
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            leaves.append(x.detach().clone().requires_grad_(True))
            return leaves[-1]

        with torch.inference_mode(False), torch.enable_grad():
            (found,) = torch.autograd.grad(objective(self._logits(tokens.clone(), hook_point, leaf)), leaves)
        return leaves[0].detach(), found

    def identity(self) -> dict[str, Any]:
        return {"id": self.id, "kind": self.kind, "sha256": self.weights_sha256}

    @torch.inference_mode()
    def token_losses(
        self, tokens: Int[Tensor, "batch pos"], hook_point: str | None = None, splice: Splice | None = None
    ) -> Float[Tensor, "batch next"]:
        """Cross-entropy in nats of each token but the first, given those before it."""
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

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, BOS first where the model has one."""
        ids = list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return ids if self.bos_id is None else [self.bos_id, *ids]


class NativeModel(LanguageModel):
    """A `sae pretrain` model on the scaled-dot-product-attention path (equal to the bridge to 1e-5)."""

    kind = "native-transformer"

    def __init__(self, directory: Path, model_id: str, device: str = "cpu") -> None:
        config = read_json_file(directory / "config.json")
        names = TransformerConfig.__dataclass_fields__
        if missing := sorted({*names, "bos_token"} - config.keys()):
            raise ModelError(f"{directory}/config.json lacks {', '.join(missing)}.")
        self.module = Transformer(TransformerConfig(**{k: config[k] for k in names}))
        tensors, _ = read_tensors(directory / "model.safetensors")
        try:
            self.module.load_state_dict({name: t.float() for name, t in tensors.items()})
        except RuntimeError as error:
            raise ModelError(f"{directory}: weights do not fit config.json: {error}") from error
        self.device = torch.device(device)
        self.module.to(self.device).eval().requires_grad_(False)
        self.id = model_id
        self.directory = directory
        self.weights_sha256 = _sha256_of([directory / "model.safetensors"])
        self.tokenizer = load_tokenizer(directory / "tokenizer.json")
        self.bos_id = self.tokenizer.token_to_id(config["bos_token"])
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
        caught = _Catch(hook_points)

        def look(name: str, value: Tensor) -> Tensor:
            if name in caught.wanted:
                caught.take(name, value)
            return value

        with suppress(_Captured):
            self.module.final(tokens.to(self.device), look)
        assert caught.keys() == caught.wanted
        return caught

    def _logits(
        self, tokens: Int[Tensor, "batch pos"], hook_point: str | None = None, splice: Splice | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        if hook_point is None or splice is None:
            return self.module(tokens.to(self.device))
        self.hook_width(hook_point)
        return self.module(tokens.to(self.device), lambda name, value: splice(value) if name == hook_point else value)

    def to_residual(self, hook_point: str) -> Float[Tensor, "d_in d_model"] | None:
        self.hook_width(hook_point)
        if hook_point.endswith("mlp.hook_post"):
            block = self.module.blocks[layer_of(hook_point)]
            return block.get_submodule("mlp.out").get_parameter("weight").T
        return None

    def unembedding(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model d_vocab"], bool]:
        return self.module.ln_final.weight, self.module.unembed.weight.T, True

    @property
    def n_layers(self) -> int:
        return self.module.config.n_layers

    @property
    def norm_eps(self) -> float:
        return self.module.ln_final.eps

    def downstream(self, hook_point: str) -> Callable[[Tensor, Tensor], Tensor]:
        if self.module.config.n_layers != 1 or hook_point != "blocks.0.mlp.hook_post":
            raise ModelError(f"{self.id}: end to end goes from blocks.0.mlp.hook_post of one layer, not {hook_point}.")
        out = self.module.blocks[0].get_submodule("mlp.out")
        return lambda x, resid: self.module.unembed(self.module.ln_final(resid + out(x)))

    def bridge(self) -> Any:
        """The same weights as a TransformerLens `TransformerBridge`: the slow twin, with every TransformerLens tool."""
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge.sources import boot_native

        config = self.module.config.to_dict()
        bridge = boot_native(
            TransformerBridgeConfig(**config, normalization_type="LN", seed=0, device=str(self.device)),
            device=str(self.device),
        )
        state = dict(self.module.state_dict())
        for name, held in bridge.state_dict().items():
            if name not in state:  # the bridge's unembedding has a bias; ours is zero
                state[name] = torch.zeros_like(held)
        bridge.load_state_dict(state)
        return bridge.eval()


class BridgeModel(LanguageModel):
    """Any model TransformerLens opens (a Hugging Face directory, a hub id, gelu-1l and kin)."""

    kind = "transformer-bridge"

    def __init__(self, bridge: Any, model_id: str, weights_sha256: str) -> None:
        self.module = bridge.eval().requires_grad_(False)
        self.id, self.weights_sha256 = model_id, weights_sha256
        if bridge.tokenizer is None:
            raise ModelError(f"{model_id} comes without a tokenizer; put its tokenizer.json into the directory.")
        self.tokenizer = bridge.tokenizer.backend_tokenizer
        self.tokenizer.encode_special_tokens = True
        bos = bridge.tokenizer.bos_token_id
        self.bos_id = bridge.tokenizer.eos_token_id if bos is None else bos
        self.context_tokens = int(bridge.cfg.n_ctx)
        self.d_vocab = int(bridge.cfg.d_vocab)
        self.device = torch.device(bridge.cfg.device or "cpu")
        self.lock = threading.Lock()
        self._widths: dict[str, int] = {}

    def hook_width(self, hook_point: str) -> int:
        if hook_point not in self._widths:
            # No axis but that of the positions has this length, so that an attention pattern is known for one.
            probe = torch.zeros((1, min(int(self.module.cfg.n_heads) + 1, self.context_tokens)), dtype=torch.long)
            self._widths[hook_point] = int(self.capture(probe, hook_point).shape[-1])
        return self._widths[hook_point]

    @torch.inference_mode()
    def capture_all(
        self, tokens: Int[Tensor, "batch pos"], hook_points: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        # Raised inside the hook, because `stop_at_layer` does nothing on a one-layer model.
        caught = _Catch(hook_points)

        def look(value: Tensor, hook: Any, name: str) -> Tensor:
            caught.take(name, value)
            return value

        with suppress(_Captured):
            self._run(tokens, [(name, partial(look, name=name)) for name in caught.wanted])
        for name in caught.wanted:
            if name not in caught:
                raise ModelError(f"{self.id}: the hook point {name!r} exists but was never reached.")
            if caught[name].shape[:2] != tokens.shape or caught[name].ndim < 3:
                raise ModelError(
                    f"{self.id}: {name!r} gives {list(caught[name].shape)} for {list(tokens.shape)} tokens; "
                    "a dictionary needs [batch, pos, …], one vector for each token."
                )
        return {name: value.flatten(2).float() for name, value in caught.items()}

    def _logits(
        self, tokens: Int[Tensor, "batch pos"], hook_point: str | None = None, splice: Splice | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        if hook_point is None or splice is None:
            return self.module(tokens.to(self.device), return_type="logits").float()

        bypassed: list[Tensor] = []

        def replace(value: Tensor, hook: Any) -> Tensor:
            replaced = splice(value.flatten(2).float()).to(value.dtype).view(value.shape)
            bypassed.append(replaced - value)
            return replaced

        def catch_up(value: Tensor, hook: Any) -> Tensor:
            return value + bypassed.pop()

        hooks: Hooks = [(hook_point, replace)]
        if hook_point.endswith(".hook_resid_mid"):
            # The bridge's hook_resid_mid is the input of the MLP's norm: what is replaced there still flows on
            # unchanged in the residual stream, so the difference is added where the stream leaves the block.
            block = hook_point.removesuffix("hook_resid_mid")
            held = self.module.hook_dict
            if held.get(hook_point) is not held.get(f"{block}ln2.hook_in", ""):
                raise ModelError(f"{self.id}: splicing at {hook_point} is not supported; use {block}hook_resid_post.")
            hooks.append((f"{block}hook_resid_post", catch_up))
        return self._run(tokens, hooks).float()

    def _run(self, tokens: Tensor, hooks: Hooks) -> Tensor:
        try:
            return self.module.run_with_hooks(tokens.to(self.device), return_type="logits", fwd_hooks=hooks)
        except KeyError as error:
            hook_point = next((name for name, _ in hooks if name in str(error)), hooks[0][0])
            close = get_close_matches(hook_point, self.module.hook_dict, n=4)
            hint = f" Did you mean {', '.join(close)}?" if close else ""
            raise ModelError(f"{self.id} has no hook point {hook_point!r}.{hint}") from error

    def to_residual(self, hook_point: str) -> Float[Tensor, "d_in d_model"] | None:
        if hook_point.endswith("mlp.hook_post"):
            return self.module.W_out[layer_of(hook_point)].float()
        return None

    @property
    def n_layers(self) -> int:
        return int(self.module.cfg.n_layers)

    @property
    def norm_eps(self) -> float:
        return float(self.module.cfg.eps)

    def unembedding(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model d_vocab"], bool]:
        centred = "RMS" not in str(self.module.cfg.normalization_type)
        return self.module.ln_final.weight.float(), self.module.W_U.float(), centred


def load_model(name: str | Path, *, device: str = "cpu") -> LanguageModel:
    """Resolves an existing directory, then a shipped name, then a hub id.

    Raises: ModelError when nothing is found, listing the shipped names.
    """
    path = Path(name)
    if path.is_dir():
        return _from_directory(path, str(name), device)
    shipped = shipped_models()
    if str(name) in shipped:
        return NativeModel(shipped[str(name)], str(name), device)
    if str(name) not in LEGACY_HUB_IDS and str(name).count("/") != 1:
        raise ModelError(
            f"model {str(name)!r}: no such directory, and no shipped model of that name "
            f"(shipped: {', '.join(sorted(shipped)) or 'none'}). Hub models are named owner/name."
        )
    return _from_hub(str(name), device)


def shipped_models() -> dict[str, Path]:
    """Names and directories of the models inside the package."""
    root = Path(str(files("sae"))) / "models"
    return {p.parent.name: p.parent for p in sorted(root.glob("*/model.safetensors"))}


def _from_directory(path: Path, model_id: str, device: str) -> LanguageModel:
    config = read_json_file(path / "config.json")
    if config.get("kind") == NativeModel.kind:
        return NativeModel(path, model_id, device)
    weights = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    if not weights:
        raise ModelError(f"{path} has a config.json but no weights (*.safetensors).")
    try:
        bridge = _boot(str(path.resolve()), device)
    except Exception as error:  # transformers and TransformerLens raise many kinds for one they cannot open
        raise ModelError(f"model {str(path)!r} could not be opened: {error}") from error
    return BridgeModel(bridge, model_id, _sha256_of(weights))


def _from_hub(name: str, device: str) -> LanguageModel:
    from transformer_lens.model_bridge.sources import boot_tl_legacy

    legacy = LEGACY_HUB_IDS.get(name)
    try:
        bridge = boot_tl_legacy(legacy, device=device) if legacy else _boot(name, device)
    except Exception as error:  # network, repository and format errors all mean: not to be had
        raise ModelError(f"model {name!r} could not be loaded from the hub: {error}") from error
    return BridgeModel(bridge, name, _sha256_of_parameters(bridge))


def _boot(name: str, device: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, device=device)


def layer_of(hook_point: str) -> int:
    match = re.match(r"blocks\.(\d+)\.", hook_point)
    if not match:
        raise ModelError(f"hook point {hook_point!r} names no layer (blocks.<layer>.…).")
    return int(match[1])


def read_json_file(path: Path) -> dict[str, Any]:
    """A JSON object from disk. Raises: ModelError naming the file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; a model directory needs one.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return content


def _sha256_of(paths: list[Path]) -> str:
    digest = sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _sha256_of_parameters(module: torch.nn.Module) -> str:
    digest = sha256()
    for name, parameter in sorted(module.state_dict().items()):
        digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
