"""Models: the native path against TransformerLens, both against transformers, and the errors for a wrong one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import HOOK_POINT, SHAPE, random_transformer, write_model
from tokenizers import Tokenizer, models
from torch import Tensor

from sae.lm import BridgeModel, ModelError, NativeModel, load_model
from sae.lm import load as loading

HOOK_POINTS = list(random_transformer().hook_widths)
HEADS = [f"attn.hook_{part}" for part in "qkvz"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(SHAPE.d_vocab, (3, SHAPE.n_ctx), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bridge(tiny_model: NativeModel) -> Any:
    return tiny_model.bridge()


def mixed(x: Tensor) -> Tensor:
    """A splice that no later norm undoes."""
    return 0.5 * x + 0.3 * x.flip(-1).relu()


# --- native against the bridge ---------------------------------------------------------------------------------------


def test_native_logits_are_the_bridges(tiny_model: NativeModel, bridge: Any, tokens: Tensor) -> None:
    expected = bridge(tokens, return_type="logits")
    assert (tiny_model.logits(tokens) - expected).abs().max() <= TOLERANCE
    assert expected.std() > 0.1  # not all zero


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_native_capture_is_the_bridges_cache(
    tiny_model: NativeModel, bridge: Any, tokens: Tensor, hook_point: str
) -> None:
    _, cache = bridge.run_with_cache(tokens, names_filter=[hook_point])
    captured = tiny_model.capture(tokens, hook_point)
    assert captured.shape == (*tokens.shape, tiny_model.hook_width(hook_point))
    assert (captured - cache[hook_point].flatten(2)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_native_splice_is_the_bridges_hook(
    tiny_model: NativeModel, bridge: Any, tokens: Tensor, hook_point: str
) -> None:
    hooks = [(hook_point, lambda value, hook: mixed(value.flatten(2)).view_as(value))]
    if hook_point == "blocks.0.hook_resid_mid":  # the bridge's replaces the MLP's input alone: set the stream itself
        _, cache = bridge.run_with_cache(tokens, names_filter=["blocks.0.hook_resid_pre"])
        pre = cache["blocks.0.hook_resid_pre"]
        hooks = [("blocks.0.hook_attn_out", lambda value, hook: mixed(pre + value) - pre)]
    expected = bridge.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    spliced = tiny_model.logits(tokens, hook_point, mixed)
    assert (spliced - expected).abs().max() <= TOLERANCE
    assert (spliced - tiny_model.logits(tokens)).abs().max() > 0.01


@pytest.mark.parametrize("act_fn", ["gelu", "solu_ln"])
def test_a_two_layer_model_equals_its_bridge(tmp_path: Path, tokens: Tensor, act_fn: str) -> None:
    model = load_model(write_model(tmp_path / "two", shape=replace(SHAPE, n_layers=2, act_fn=act_fn)))
    assert isinstance(model, NativeModel)
    logits, cache = model.bridge().run_with_cache(tokens, names_filter=["blocks.1.hook_mlp_out"])
    torch.testing.assert_close(model.logits(tokens), logits, atol=TOLERANCE, rtol=1e-6)  # rounding of the largest
    expected = cache["blocks.1.hook_mlp_out"]
    difference = (model.capture(tokens, "blocks.1.hook_mlp_out") - expected).abs().max()
    assert difference <= TOLERANCE * max(1, expected.abs().max())
    assert model.logit_weights(torch.eye(4, SHAPE.d_mlp), "blocks.1.mlp.hook_post").shape == (4, SHAPE.d_vocab)


def test_solu_neurons_are_measured_after_the_layer_norm(tmp_path: Path, tokens: Tensor) -> None:
    """hook_post is what W_out reads: LayerNorm(x · softmax(x)), in float64 by hand."""
    model = load_model(write_model(tmp_path / "solu", shape=replace(SHAPE, act_fn="solu_ln")))
    mlp = model.module.blocks[0].mlp
    pre = getattr(mlp, "in")(model.capture(tokens, "blocks.0.mlp.hook_in")).double()
    solu = pre * pre.exp() / pre.exp().sum(-1, keepdim=True)
    centred = solu - solu.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * mlp.ln.weight + mlp.ln.bias
    assert (model.capture(tokens, "blocks.0.mlp.hook_post") - expected).abs().max() <= TOLERANCE


def test_an_attention_only_model_equals_its_bridge(tmp_path: Path, tokens: Tensor) -> None:
    model = load_model(write_model(tmp_path / "attn", shape=replace(SHAPE, n_layers=2, attn_only=True)))
    hook_points = [f"blocks.{n}.{name}" for n in (0, 1) for name in ("hook_resid_pre", *HEADS, "hook_attn_out")]
    assert set(hook_points) == {name for name in model.module.hook_widths if not name.endswith("hook_resid_post")}
    logits, cache = model.bridge().run_with_cache(tokens, names_filter=hook_points)
    assert (model.logits(tokens) - logits).abs().max() <= TOLERANCE
    for hook_point in hook_points:
        assert (model.capture(tokens, hook_point) - cache[hook_point].flatten(2)).abs().max() <= TOLERANCE
    with pytest.raises(ModelError, match=r"no hook point 'blocks\.0\.mlp\.hook_post'"):
        model.hook_width("blocks.0.mlp.hook_post")


def test_splicing_the_identity_changes_nothing(tiny_model: NativeModel, tokens: Tensor) -> None:
    assert torch.equal(tiny_model.logits(tokens, HOOK_POINT, lambda x: x), tiny_model.logits(tokens))


def test_token_losses_are_cross_entropy_in_nats(tiny_model: NativeModel, tokens: Tensor) -> None:
    log_p = tiny_model.logits(tokens).double().log_softmax(-1)
    expected = torch.stack([-log_p[b, range(31), tokens[b, 1:]] for b in range(3)])
    assert (tiny_model.token_losses(tokens) - expected).abs().max() <= TOLERANCE


# --- nothing after the hook ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_nothing_after_the_hook_is_computed(tiny_model_dir: Path, tokens: Tensor, hook_point: str) -> None:
    """Modules whose work comes after the hook must not run; those before it must."""
    model = NativeModel(tiny_model_dir, "counted")
    called: list[str] = []
    for name in ("blocks.0.attn", "blocks.0.mlp.in", "blocks.0.mlp.out", "ln_final", "unembed"):
        model.module.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    model.capture(tokens, hook_point)
    order = {
        "blocks.0.hook_resid_pre": [],
        **{f"blocks.0.{name}": [] for name in HEADS},
        "blocks.0.hook_attn_out": ["blocks.0.attn"],
        "blocks.0.hook_resid_mid": ["blocks.0.attn"],
        "blocks.0.mlp.hook_in": ["blocks.0.attn"],
        HOOK_POINT: ["blocks.0.attn", "blocks.0.mlp.in"],
        "blocks.0.hook_mlp_out": ["blocks.0.attn", "blocks.0.mlp.in", "blocks.0.mlp.out"],
        "blocks.0.hook_resid_post": ["blocks.0.attn", "blocks.0.mlp.in", "blocks.0.mlp.out"],
    }
    assert called == order[hook_point]


# --- logit weights ---------------------------------------------------------------------------------------------------


def test_logit_weights_are_those_of_the_folded_and_centred_model(tiny_model: NativeModel) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.module.state_dict().items()}
    directions = torch.randn(7, SHAPE.d_mlp, generator=torch.Generator().manual_seed(2))
    found = tiny_model.logit_weights(directions, HOOK_POINT)
    folded = tiny_model.bridge()
    folded.enable_compatibility_mode()
    expected = directions @ folded.W_out[0] @ folded.W_U
    expected = expected - expected.median(-1, keepdim=True).values
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert found.median(-1).values.abs().max() == 0
    after = tiny_model.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_logit_weights_of_the_residual_stream_need_no_map(tiny_model: NativeModel) -> None:
    directions = torch.randn(3, SHAPE.d_model, generator=torch.Generator().manual_seed(3))
    m = tiny_model.module
    d = directions.double()
    effect = (d - d.mean(-1, keepdim=True)) * m.ln_final.weight.double() @ m.unembed.weight.T.double()
    expected = effect - effect.median(-1, keepdim=True).values
    for hook_point in ("blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"):
        assert (tiny_model.logit_weights(directions, hook_point) - expected).abs().max() <= TOLERANCE


# --- Hugging Face directories ----------------------------------------------------------------------------------------


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


FAMILIES = {
    "gpt2": (_gpt2, lambda hf: hf.transformer.h[0].mlp.act, lambda hf: hf.transformer.h[1]),
    "llama": (_llama, None, lambda hf: hf.model.layers[1]),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def hugging_face(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> tuple[str, Any, BridgeModel, Path]:
    """A random model of the family, as plain transformers and as we open it from its directory."""
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(5)
    directory = tmp_path_factory.mktemp("hf") / request.param
    plain = FAMILIES[request.param][0]().eval()
    plain.save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_model_dir / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(directory)
    opened = load_model(directory)
    assert isinstance(opened, BridgeModel)
    return request.param, plain, opened, directory


def _with_plain_hook(plain: Any, where: Any, tokens: Tensor, replace: Any = None) -> tuple[Tensor, Tensor]:
    """Activations that leave `where`, and the logits (with them replaced): a torch hook on plain transformers."""
    seen: list[Tensor] = []

    def hook(_: Any, __: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        seen.append(value)
        if replace is None:
            return None
        return (replace(value), *output[1:]) if isinstance(output, tuple) else replace(value)

    handle = where.register_forward_hook(hook)
    try:
        with torch.inference_mode():
            logits = plain(tokens).logits
            return logits, seen[0]
    finally:
        handle.remove()


def test_hugging_face_directories_equal_plain_transformers(
    hugging_face: tuple[str, Any, BridgeModel, Path], tokens: Tensor
) -> None:
    family, plain, opened, _ = hugging_face
    places = {"blocks.1.hook_resid_post": FAMILIES[family][2]}
    if FAMILIES[family][1] is not None:
        places["blocks.0.mlp.hook_post"] = FAMILIES[family][1]
    for hook_point, place in places.items():
        logits, acts = _with_plain_hook(plain, place(plain), tokens)
        assert (opened.capture(tokens, hook_point) - acts).abs().max() <= TOLERANCE
        assert (opened.logits(tokens) - logits).abs().max() <= TOLERANCE
        spliced, _ = _with_plain_hook(plain, place(plain), tokens, mixed)
        assert (opened.logits(tokens, hook_point, mixed) - spliced).abs().max() <= TOLERANCE
        assert (spliced - logits).abs().max() > 1e-3
        assert opened.hook_width(hook_point) == acts.shape[-1]


def test_splicing_the_middle_of_a_block_changes_the_stream_and_not_only_the_mlp(
    hugging_face: tuple[str, Any, BridgeModel, Path], tokens: Tensor
) -> None:
    """On plain transformers: block 1's attention output is set so that the stream after it is the spliced one."""
    family, plain, opened, _ = hugging_face
    block = FAMILIES[family][2](plain)
    attention = block.attn if family == "gpt2" else block.self_attn
    pre: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, inputs: pre.append(inputs[0]))
    try:
        expected, _ = _with_plain_hook(plain, attention, tokens, lambda out: mixed(pre[0] + out) - pre[0])
    finally:
        handle.remove()
    assert (opened.logits(tokens, "blocks.1.hook_resid_mid", mixed) - expected).abs().max() <= TOLERANCE


def test_two_splices_in_one_run_are_those_of_plain_transformers(
    hugging_face: tuple[str, Any, BridgeModel, Path], tokens: Tensor
) -> None:
    """In the middle of block 1 and at its end: the second is given what follows from the first."""
    family, plain, opened, _ = hugging_face
    block = FAMILIES[family][2](plain)
    attention = block.attn if family == "gpt2" else block.self_attn
    pre: list[Tensor] = []
    given: list[Tensor] = []

    def replace_end(_: Any, __: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        given.append(value)
        return (mixed(value), *output[1:]) if isinstance(output, tuple) else mixed(value)

    def replace_and_look(x: Tensor) -> Tensor:
        seen.append(x)
        return mixed(x)

    seen: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, inputs: pre.append(inputs[0])),
        block.register_forward_hook(replace_end),
    ]
    try:
        expected, _ = _with_plain_hook(plain, attention, tokens, lambda out: mixed(pre[0] + out) - pre[0])
    finally:
        for handle in handles:
            handle.remove()
    splices = {"blocks.1.hook_resid_post": replace_and_look, "blocks.1.hook_resid_mid": mixed}
    assert (opened.spliced_logits(tokens, splices) - expected).abs().max() <= TOLERANCE
    assert (seen[0] - given[0]).abs().max() <= TOLERANCE


def test_hugging_face_directories_know_their_bos_and_context(hugging_face: tuple[str, Any, BridgeModel, Path]) -> None:
    _, _, opened, directory = hugging_face
    assert (opened.bos_id, opened.context_tokens, opened.d_vocab) == (0, 32, 300)
    assert opened.id == str(directory)
    assert 0 not in opened.tokenizer.encode("a <|endoftext|> b", add_special_tokens=False).ids
    assert opened.encode_prompt("the fox")[0] == 0


def test_bridge_capture_computes_nothing_after_the_hook(
    hugging_face: tuple[str, Any, BridgeModel, Path], tokens: Tensor
) -> None:
    _, _, opened, _ = hugging_face
    called: list[int] = []
    handle = opened.module.unembed.register_forward_hook(lambda *_: called.append(1))
    try:
        opened.capture(tokens, "blocks.1.hook_resid_post")
        assert not called
        opened.logits(tokens)
        assert called
    finally:
        handle.remove()


def test_bridge_logit_weights_are_the_plain_products(hugging_face: tuple[str, Any, BridgeModel, Path]) -> None:
    family, plain, opened, _ = hugging_face
    d = torch.randn(3, 16, generator=torch.Generator().manual_seed(4)).double()
    norm = plain.transformer.ln_f if family == "gpt2" else plain.model.norm
    centred = d - d.mean(-1, keepdim=True) if family == "gpt2" else d
    effect = centred * norm.weight.double() @ plain.lm_head.weight.T.double()
    expected = effect - effect.median(-1, keepdim=True).values
    assert (opened.logit_weights(d.float(), "blocks.1.hook_resid_post") - expected).abs().max() <= TOLERANCE


def test_an_unknown_hook_point_of_a_bridge_is_named_with_near_ones(
    hugging_face: tuple[str, Any, BridgeModel, Path],
) -> None:
    _, _, opened, _ = hugging_face
    with pytest.raises(ModelError, match=r"blocks\.9\.mlp\.hook_out.*Did you mean blocks\.1\.mlp\.hook_out"):
        opened.hook_width("blocks.9.mlp.hook_out")


# --- what is said when a model is wrong ------------------------------------------------------------------------------


def test_an_unknown_hook_point_is_named_with_those_there_are(tiny_model: NativeModel, tokens: Tensor) -> None:
    for call in (
        lambda: tiny_model.hook_width("blocks.1.mlp.hook_post"),
        lambda: tiny_model.capture(tokens, "blocks.1.mlp.hook_post"),
        lambda: tiny_model.logits(tokens, "blocks.1.mlp.hook_post", lambda x: x),
    ):
        with pytest.raises(ModelError, match=r"blocks\.1\.mlp\.hook_post.*blocks\.0\.mlp\.hook_post"):
            call()


def test_an_unknown_model_is_refused_with_the_shipped_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "shipped_models", lambda: {"shipped-one": Path("x")})
    with pytest.raises(ModelError, match=r"'nothing-here'.*shipped-one"):
        load_model("nothing-here")


def test_a_shipped_name_opens_and_keeps_its_name(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    monkeypatch.setattr(loading, "shipped_models", lambda: {"shipped-one": tiny_model_dir})
    model = load_model("shipped-one")
    assert (model.id, model.kind) == ("shipped-one", "native-transformer")


def _broken(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "broken"))


def test_a_directory_without_a_config_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    directory = _broken(tmp_path, tiny_model_dir)
    (directory / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        load_model(directory)


@pytest.mark.parametrize("content", ["{torn", "[]"])
def test_a_damaged_config_is_named(tmp_path: Path, tiny_model_dir: Path, content: str) -> None:
    directory = _broken(tmp_path, tiny_model_dir)
    (directory / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(directory)


def test_a_config_that_lacks_a_setting_names_it(tmp_path: Path, tiny_model_dir: Path) -> None:
    directory = _broken(tmp_path, tiny_model_dir)
    config = json.loads((directory / "config.json").read_text())
    del config["bos_token"], config["n_heads"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json lacks bos_token, n_heads"):
        load_model(directory)


def test_weights_of_another_shape_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    directory = _broken(tmp_path, tiny_model_dir)
    config = json.loads((directory / "config.json").read_text()) | {"d_mlp": 48}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"do not fit config\.json"):
        load_model(directory)


def test_a_torn_weights_file_and_a_missing_tokenizer_are_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    directory = _broken(tmp_path, tiny_model_dir)
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(directory)
    (directory / "model.safetensors").write_bytes(weights)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such tokenizer"):
        load_model(directory)


def test_a_hugging_face_directory_that_cannot_be_opened_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family", "architectures": ["Nothing"]}')
    with pytest.raises(ModelError, match="no weights"):
        load_model(tmp_path)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 2, "vocab_size": 3}
    config = {"model_type": "no-such-family", "architectures": ["Nothing"]} | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="could not be opened"):
        load_model(tmp_path)


# --- the hub, without a network --------------------------------------------------------------------------------------


def _fake_bridge() -> Any:
    """What BridgeModel reads of a bridge."""

    class Fake(torch.nn.Linear):
        tokenizer = SimpleNamespace(
            backend_tokenizer=Tokenizer(models.WordLevel({f"word{i}": i for i in range(300)})),
            bos_token_id=None,
            get_vocab=dict,
            eos_token_id=7,
        )
        cfg = SimpleNamespace(n_ctx=32, d_vocab=300, device="cpu")

    return Fake(2, 2)


@pytest.mark.parametrize(
    ("name", "door", "asked"),
    [
        ("gelu-1l", "boot_tl_legacy", "NeelNanda/GELU_1L512W_C4_Code"),
        ("some-owner/some-model", "boot_transformers", "some-owner/some-model"),
    ],
)
def test_the_hub_is_asked_for_the_right_model(
    monkeypatch: pytest.MonkeyPatch, name: str, door: str, asked: str
) -> None:
    from transformer_lens.model_bridge import TransformerBridge, sources

    wanted: list[tuple[str, str]] = []

    def boot(door: str) -> Any:
        return lambda model, **_: (wanted.append((door, model)), _fake_bridge())[1]

    monkeypatch.setattr(sources, "boot_tl_legacy", boot("boot_tl_legacy"))
    monkeypatch.setattr(TransformerBridge, "boot_transformers", staticmethod(boot("boot_transformers")))
    model = load_model(name)
    assert wanted == [(door, asked)]
    assert (model.id, model.bos_id) == (name, 7)  # without a BOS token, the end-of-text token is used
    assert len(model.weights_sha256) == 64


@pytest.mark.parametrize("name", ["gelu-1l", "some-owner/some-model"])
def test_a_hub_that_cannot_be_reached_is_a_model_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from transformer_lens.model_bridge import TransformerBridge, sources

    def boot(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(sources, "boot_tl_legacy", boot)
    monkeypatch.setattr(TransformerBridge, "boot_transformers", staticmethod(boot))
    with pytest.raises(ModelError, match=f"{name}.*no route to host"):
        load_model(name)


def test_a_model_without_a_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = _fake_bridge()
    monkeypatch.setattr(bridge, "tokenizer", None, raising=False)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        BridgeModel(bridge, "bare")


@pytest.mark.parametrize(
    ("bos", "eos", "tokens", "expected"),
    [
        ("<s>", "</s>", ["<s>", "</s>", "<|endoftext|>"], "<s>"),
        (None, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"], "<|endoftext|>"),  # Qwen's instruct models
        (None, "</s>", ["</s>"], "</s>"),
        (None, None, ["a"], None),
    ],
)
def test_contexts_begin_with_the_token_that_separates_documents(
    bos: str | None, eos: str | None, tokens: list[str], expected: str | None
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from sae.lm.bridge import _bos_id_of

    vocabulary = {token: number for number, token in enumerate(["a", *tokens, "[UNK]"])}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")), bos_token=bos, eos_token=eos
    )
    assert _bos_id_of(made) == (None if expected is None else vocabulary[expected])
