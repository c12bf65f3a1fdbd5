"""Hugging Face directories (random weights) harvested at several hook points, against plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import made_up_documents, text_source, write_jsonl
from torch import Tensor

from sae import pipeline
from sae.lm import BridgeModel, ModelError, load_model
from store.activations import ActivationStore
from store.common import TRAIN

COMMON = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, **COMMON))


def neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return GPTNeoXForCausalLM(GPTNeoXConfig(max_position_embeddings=32, **sizes, **COMMON))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=32, num_key_value_heads=2, **sizes, **COMMON))


OUT, IN = "output", "input"
Places = dict[str, tuple[Callable[[Any], Any], str]]
# hook point → module of plain transformers, and whether the activations are its input or its output
FAMILIES: dict[str, tuple[Callable[[], Any], Places]] = {
    "gpt2": (
        gpt2,
        {
            "blocks.0.hook_resid_pre": (lambda m: m.transformer.h[0], IN),
            "blocks.0.mlp.hook_post": (lambda m: m.transformer.h[0].mlp.c_proj, IN),
            "blocks.0.hook_mlp_out": (lambda m: m.transformer.h[0].mlp, OUT),
            "blocks.1.attn.hook_z": (lambda m: m.transformer.h[1].attn.c_proj, IN),
            "blocks.1.hook_attn_out": (lambda m: m.transformer.h[1].attn, OUT),
            "blocks.1.hook_resid_mid": (lambda m: m.transformer.h[1].ln_2, IN),
            "blocks.1.hook_resid_post": (lambda m: m.transformer.h[1], OUT),
        },
    ),
    "neox": (
        neox,
        {
            "blocks.0.hook_resid_pre": (lambda m: m.gpt_neox.layers[0], IN),
            "blocks.0.mlp.hook_post": (lambda m: m.gpt_neox.layers[0].mlp.dense_4h_to_h, IN),
            "blocks.0.hook_mlp_out": (lambda m: m.gpt_neox.layers[0].mlp, OUT),
            "blocks.1.hook_attn_out": (lambda m: m.gpt_neox.layers[1].attention, OUT),
            "blocks.1.hook_resid_post": (lambda m: m.gpt_neox.layers[1], OUT),
        },
    ),
    "llama": (
        llama,
        {
            "blocks.0.hook_resid_pre": (lambda m: m.model.layers[0], IN),
            "blocks.0.mlp.hook_post": (lambda m: m.model.layers[0].mlp.down_proj, IN),
            "blocks.0.hook_mlp_out": (lambda m: m.model.layers[0].mlp, OUT),
            "blocks.1.hook_attn_out": (lambda m: m.model.layers[1].self_attn, OUT),
            "blocks.1.hook_resid_mid": (lambda m: m.model.layers[1].post_attention_layernorm, IN),
            "blocks.1.hook_resid_post": (lambda m: m.model.layers[1], OUT),
        },
    ),
}


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def plain_activations(plain: Any, tokens: Tensor, places: Places) -> dict[str, Tensor]:
    """From torch hooks on plain transformers, one forward pass."""
    seen: dict[str, Tensor] = {}

    def leaving(name: str) -> Callable[..., None]:
        return lambda _, __, output: seen.update({name: first(output).clone()})

    def entering(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: seen.update({name: (args[0] if args else kwargs["hidden_states"]).clone()})

    handles = [
        module(plain).register_forward_hook(leaving(name))
        if side == OUT
        else module(plain).register_forward_pre_hook(entering(name), with_kwargs=True)
        for name, (module, side) in places.items()
    ]
    try:
        with torch.inference_mode():
            plain(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def saved(family: str, directory: Path, tokenizer: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(5)
    plain = FAMILIES[family][0]().eval()
    plain.save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(directory)
    return plain


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_store_of_several_hook_points_holds_what_plain_transformers_computes(
    family: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    plain = saved(family, tmp_path / "model", tiny_model_dir / "tokenizer.json")
    places = FAMILIES[family][1]
    model = load_model(tmp_path / "model")
    assert isinstance(model, BridgeModel)
    dtypes = dict.fromkeys(places, "float32") | {"blocks.1.hook_resid_post": "bfloat16"}
    out = pipeline.harvest(
        model,
        text_source(made_up_documents(300)),
        tmp_path / "acts.zarr",
        tokens=512,
        heldout_tokens=32,
        hook_points=list(places),
        dtype=dtypes,
    )
    store = ActivationStore.open(out)
    assert store.dtype == dtypes
    for shard in (0, 9):
        tokens = torch.from_numpy(store.read_contexts(TRAIN, shard).tokens.astype(np.int64))
        expected = plain_activations(plain, tokens, places)
        for hook in places:
            found = store.read_acts(TRAIN, shard, hook)
            relative = 2**-8 if dtypes[hook] == "bfloat16" else 0
            np.testing.assert_allclose(found, expected[hook].flatten(0, 1).numpy(), atol=1e-5, rtol=relative)
    assert store.hook_points["blocks.0.mlp.hook_post"] == (64 if family == "gpt2" else 24)
    totals = store.totals(TRAIN, "blocks.0.hook_mlp_out")
    keep = [store.read_contexts(TRAIN, shard).keep.reshape(-1) for shard in range(16)]
    kept = np.concatenate([store.read_acts(TRAIN, s, "blocks.0.hook_mlp_out")[keep[s]] for s in range(16)])
    np.testing.assert_allclose(totals.mean, kept.astype(np.float64).mean(0), rtol=1e-10, atol=1e-12)
    if family == "gpt2":
        with pytest.raises(ModelError, match=r"one vector per token"):
            model.hook_width("blocks.0.attn.hook_pattern")
        with pytest.raises(ModelError, match="no hook point 'blocks.0.mlp.hook_pots'"):
            model.capture_all(tokens, ["blocks.0.mlp.hook_post", "blocks.0.mlp.hook_pots"])


def test_a_residual_stream_dictionary_of_a_hugging_face_gpt2_through_the_whole_pipeline(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    saved("gpt2", tmp_path / "model", tiny_model_dir / "tokenizer.json")
    text = write_jsonl(tmp_path / "text.jsonl", made_up_documents(600))
    hook = "blocks.1.hook_resid_post"
    store = pipeline.harvest(
        str(tmp_path / "model"), text, tmp_path / "acts.zarr", tokens=2048, heldout_tokens=512, hook_points=[hook]
    )
    dictionary = pipeline.train(
        store, tmp_path / "d", recipe="topk", d_sae=48, tokens=4096, config={"k": 4, "batch_tokens": 256}
    )
    assert dictionary.config["hook_point"] == hook
    result = pipeline.evaluate(tmp_path / "d")
    assert 0 < result["metrics"]["fvu"]["value"] < 1.5
    assert result["metrics"]["l0"]["value"] <= 4.001
    assert pipeline.index(tmp_path / "d").is_dir()
    assert pipeline.describe(tmp_path / "d" / "features.zarr")["hook_point"] == hook
    assert pipeline.verify(store) == []
    (tmp_path / "model").rename(tmp_path / "moved")
    pipeline.evaluate(tmp_path / "d", model=str(tmp_path / "moved"))  # the same weights, moved, are accepted
