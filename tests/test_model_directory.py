"""Model directories that are not whole are refused by what they lack; nothing random is put in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from sae.lm import BridgeModel, ModelError, load_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module", params=["one file", "parts"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A Llama of random weights with a head of its own, in one file or in several with an index."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("whole") / "model"
    torch.manual_seed(5)
    vocabulary = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=32, num_key_value_heads=2, **SIZES, **vocabulary))
    model.save_pretrained(directory, max_shard_size="5GB" if request.param == "one file" else "15KB")
    PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_model_dir / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def drop(directory: Path, *names: str) -> None:
    """Removes tensors from whichever file holds them."""
    for file in parts(directory):
        held = load_file(file)
        kept = {name: tensor for name, tensor in held.items() if not name.startswith(names)}
        if len(kept) < len(held):
            save_file(kept, str(file), metadata={"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] = {k: v for k, v in content["weight_map"].items() if not k.startswith(names)}
        index.write_text(json.dumps(content))


def change(directory: Path, **settings: Any) -> None:
    """Sets keys of config.json; None removes one."""
    config = json.loads((directory / "config.json").read_text()) | settings
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def refused(directory: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(directory)
    return str(caught.value)


def test_a_whole_directory_opens(copy: Path) -> None:
    """Its logits are those of plain transformers: nothing was left random."""
    from transformers import LlamaForCausalLM

    tokens = torch.arange(1, 9)[None]
    plain = LlamaForCausalLM.from_pretrained(copy)
    with torch.inference_mode():
        assert (load_model(copy).logits(tokens) - plain(tokens).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("lm_head",), "no weights for lm_head.weight, which LlamaForCausalLM needs"),
        (("model.layers.1.mlp",), "no weights for model.layers.1.mlp.down_proj.weight, .*up_proj"),
        (("model.embed_tokens",), "no weights for model.embed_tokens.weight"),
        (("model.layers",), "and [0-9]+ more, which LlamaForCausalLM needs"),
    ],
)
def test_weights_that_the_files_lack(copy: Path, names: tuple[str, ...], said: str) -> None:
    drop(copy, *names)
    with pytest.raises(ModelError, match=said):
        load_model(copy)


def test_a_head_that_is_the_embedding_need_not_be_in_the_file(copy: Path) -> None:
    drop(copy, "lm_head")
    change(copy, tie_word_embeddings=True)
    model = load_model(copy)
    W_U = model.readout().W_U
    held = {name: tensor for file in parts(copy) for name, tensor in load_file(file).items()}
    assert torch.equal(W_U, held["model.embed_tokens.weight"].T)


def test_a_missing_part_is_named(copy: Path) -> None:
    lost = parts(copy)[0]
    lost.unlink()
    said = refused(copy)
    assert (lost.name if len(parts(copy)) else "has no weights") in said
    assert "Download or copy" in said


def test_parts_without_their_index_are_named_by_their_numbers(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    if not index.is_file():
        pytest.skip("one file has no index")
    index.unlink()
    assert "lacks model.safetensors.index.json" in refused(copy)
    parts(copy)[1].unlink()
    assert "lacks model-00002-of-" in refused(copy)


def test_a_config_of_another_architecture(copy: Path) -> None:
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 300, "tie_word_embeddings": True}
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | shape))
    assert "config.json is another model's" in refused(copy)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": None}, "config.json has no model_type"),
        ({"num_attention_heads": None}, "lacks the number of attention heads"),
        ({"num_hidden_layers": None}, "lacks the number of layers"),
        ({"hidden_size": None}, "lacks the width"),
        ({"vocab_size": None}, "lacks the size of the vocabulary"),
        ({"vocab_size": 200}, "could not be opened"),  # another shape than the weights
    ],
)
def test_a_config_that_does_not_say_all(copy: Path, settings: dict[str, Any], said: str) -> None:
    change(copy, **settings)
    assert said in refused(copy)


def empty(directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"] |= {"vocab": {}, "merges": []}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def of_another_model(directory: Path) -> None:
    words = {f"word{i}": i for i in range(400)}
    Tokenizer(models.WordLevel(words, unk_token="word0")).save(str(directory / "tokenizer.json"))


def smaller(directory: Path) -> None:
    words = {f"word{i}": i for i in range(100)}
    Tokenizer(models.WordLevel(words, unk_token="word0")).save(str(directory / "tokenizer.json"))


def no_files(directory: Path) -> None:
    for file in directory.glob("token*"):
        file.unlink()


def only_settings(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_files, "has no tokenizer: none of tokenizer.json"),
        (only_settings, "has no tokenizer: none of tokenizer.json"),
        (empty, "vocabulary is empty"),
        (smaller, "fewer than half of the 300"),
        (of_another_model, "token ids up to 399, and the model embeds 300 tokens"),
    ],
)
def test_a_tokenizer_that_is_missing_or_not_this_models(copy: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(copy)
    assert said in refused(copy)


def test_a_tokenizer_without_a_fast_form_is_refused() -> None:
    class Opened(torch.nn.Linear):
        tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=0)  # as those written in Python
        cfg = SimpleNamespace(n_ctx=32, d_vocab=300, device="cpu")

    with pytest.raises(ModelError, match=r"a kind that cannot be read here \(SimpleNamespace\)"):
        BridgeModel(Opened(2, 2), "slow")
