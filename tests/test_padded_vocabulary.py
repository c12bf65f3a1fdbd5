"""Models whose embedding has more rows than the tokenizer has tokens, fewer, or ids without a token between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import made_up_documents, text_source
from tokenizers import AddedToken, Tokenizer

from sae import pipeline
from sae.interventions.ablation import ablate
from sae.interventions.attribution import attribute, predictions
from sae.interventions.edits import Edit
from sae.interventions.steering import next_tokens, steer
from sae.lm import LanguageModel, ModelError, load_model
from sae.text.tokenizer import decode, token_bytes, token_ids, token_name
from store.features import FeatureIndex

TOKENS, ROWS = 300, 340
HOOK_POINT = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> LanguageModel:
    """A GPT-2 whose 40 padding rows have the largest logits, so that they lead every list that does not leave them
    out; id 7 has no token either."""
    import transformers

    directory = tmp_path_factory.mktemp("padded") / "model"
    torch.manual_seed(2)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=ROWS, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.3, bos_token_id=0
        )
    )
    with torch.no_grad():
        model.transformer.wte.weight[TOKENS:] *= 4
        model.transformer.wte.weight[7] *= 4
    model.save_pretrained(directory)
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(without_token_7(tiny_model_dir, tmp_path_factory.mktemp("tokenizer"))),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    ).save_pretrained(directory)
    return load_model(directory)


def without_token_7(model: Path, out: Path) -> Path:
    """The tiny model's tokenizer, with the token 7 at the unused id 305 in place of 7."""
    content: dict[str, Any] = json.loads((model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    (name,) = [token for token, number in vocabulary.items() if number == 7]
    vocabulary[name] = 305
    (out / "tokenizer.json").write_text(json.dumps(content))
    return out / "tokenizer.json"


def real(model: LanguageModel) -> set[int]:
    return {*range(TOKENS), 305} - {7}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, padded: LanguageModel) -> Path:
    run = tmp_path_factory.mktemp("run")
    text = text_source(made_up_documents(400))
    pipeline.harvest(
        padded, text, run / "a.zarr", tokens=2048, heldout_tokens=512, hook_points=[HOOK_POINT], seq_len=32
    )
    pipeline.train(run / "a.zarr", run / "sae", d_sae=32, tokens=2048, config={"k": 4, "batch_tokens": 256})
    pipeline.index(run / "sae", model=padded)
    return run / "sae"


def test_padding_rows_are_not_tokens(padded: LanguageModel) -> None:
    assert padded.d_vocab == ROWS
    assert set(padded.token_ids.tolist()) == real(padded)
    assert padded.of_tokens(torch.zeros(2, ROWS)).shape == (2, TOKENS)
    values, ids = padded.top_tokens(torch.arange(float(ROWS)), 3)
    assert ids.tolist() == values.tolist() == [305, 299, 298]


def test_logit_weights_leave_padding_rows_out_of_the_median_too(padded: LanguageModel) -> None:
    direction = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    found = padded.logit_weights(direction, HOOK_POINT)
    known = sorted(real(padded))
    assert found.shape == (2, ROWS)
    assert found[:, known].isfinite().all()
    assert sorted(torch.nonzero(found[0].isnan())[:, 0].tolist()) == sorted(set(range(ROWS)) - real(padded))
    norm, W_U = padded.module.ln_final, padded.module.W_U.double()
    effect = (direction - direction.mean(-1, keepdim=True)).double() * norm.weight.double() @ W_U[:, known]
    expected = effect - effect.median(-1, keepdim=True).values
    torch.testing.assert_close(found[:, known].double(), expected, rtol=1e-4, atol=1e-5)


def test_every_feature_of_the_index_can_be_shown_and_names_tokens_only(trained: Path, padded: LanguageModel) -> None:
    index = FeatureIndex.open(trained / "features.zarr")
    for side in ("top", "bottom"):
        assert set(index.column(f"logits/{side}_id").reshape(-1).tolist()) <= real(padded)
    assert (index.column("logits/histogram").sum(1) == TOKENS).all()
    for feature in range(index.d_sae):
        said = pipeline.describe_feature(trained, feature)
        assert not [name for name in (*said["raises"], *said["lowers"]) if name.startswith("[3")]
    assert index.token_bytes(320) == b"[320]"
    assert index.token_bytes(7) == b"[7]"


def test_an_older_index_that_lists_padding_rows_is_read_without_them(trained: Path, tmp_path: Path) -> None:
    """Its vocabulary ends with the tokenizer's last token, and its lists name rows beyond."""
    import shutil

    import zarr

    old = tmp_path / "features.zarr"
    shutil.copytree(trained / "features.zarr", old)
    words = json.loads((old / "vocabulary.json").read_text())[:TOKENS]
    (old / "vocabulary.json").write_text(json.dumps(words))
    lists = zarr.open_group(old, mode="r+")["logits/top_id"]
    assert isinstance(lists, zarr.Array)
    lists[:, 0] = np.int32(ROWS - 1)
    index = FeatureIndex.open(old)
    found = index.logit_weights("top", 3)
    assert found
    assert max(token for token, _ in found) < TOKENS
    assert index.token_bytes(ROWS - 1) == f"[{ROWS - 1}]".encode()
    assert pipeline.describe_feature(old, 3)["raises"]


def test_lists_of_tokens_never_show_padding_rows(padded: LanguageModel, trained: Path) -> None:
    sae, _ = pipeline.open_pair(trained, padded.id)
    ids = [0, 40, 50, 60, 70]
    logits = padded.logits(torch.tensor([ids]))[0, -1].double()
    assert int(logits.argmax()) not in real(padded)  # the control: a padding row would lead the list
    likely = predictions(padded, ids, 10)
    assert {token for token, _ in likely} <= real(padded)
    assert likely[0][1] == pytest.approx(float(logits.softmax(-1)[sorted(real(padded))].max()))
    assert set(next_tokens(padded, sae, ids, [Edit(1, "set", 1.0)], feature_max=np.ones(32)).ids) <= real(padded)
    changed = ablate(padded, sae.W_dec[1], torch.tensor([ids]), torch.ones(1, 5), HOOK_POINT, top=300)
    assert {*changed.raised_ids.reshape(-1).tolist(), *changed.lowered_ids.reshape(-1).tolist()} == real(padded)
    found = attribute(padded, sae, ids, position=4, token=11, hook_point=HOOK_POINT)
    assert found.logit == pytest.approx(float(logits[11] - logits[sorted(real(padded))].mean()), abs=1e-4)


def test_a_generated_padding_row_is_its_id(padded: LanguageModel, trained: Path) -> None:
    sae, _ = pipeline.open_pair(trained, padded.id)
    found = steer(padded, sae, "the fox", [Edit(1, "set", 1.0)], feature_max=np.ones(32), max_new_tokens=20)
    unknown = [token for token in found.base_ids if token not in real(padded)]
    assert unknown  # the control
    assert all(f"[{token}]" in found.base_text for token in unknown)


def test_names_bytes_and_text_of_ids_without_a_token(padded: LanguageModel) -> None:
    tokenizer: Tokenizer = padded.tokenizer
    table = token_bytes(tokenizer, ROWS)
    assert len(table) == ROWS
    assert table[320] == b"[320]"
    assert token_name(tokenizer, 320) == "[320]"
    ids = tokenizer.encode("the fox", add_special_tokens=False).ids
    assert decode(tokenizer, ids) == "the fox"
    assert decode(tokenizer, [*ids, 320, 7, *ids]) == "the fox[320][7]the fox"
    assert decode(tokenizer, []) == ""


def test_a_token_that_was_added_to_the_tokenizer_only_is_named(padded: LanguageModel, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = load_model(padded.id)
    tokenizer = AutoTokenizer.from_pretrained(padded.id)
    tokenizer.add_tokens([AddedToken(f"<extra {i}>", normalized=False) for i in range(50)])
    model.tokenizer = tokenizer.backend_tokenizer
    assert max(token_ids(model.tokenizer, model.d_vocab)) < ROWS
    ids = model.encode_prompt("the <extra 49> fox")
    assert max(ids) >= ROWS
    for run in (lambda: model.logits(torch.tensor([ids])), lambda: model.capture(torch.tensor([ids]), HOOK_POINT)):
        with pytest.raises(ModelError, match=r"embeds 340 tokens, and its tokenizer gave the id \d+ \('<extra 49>'\)"):
            run()
    assert model.logits(torch.tensor([[0, 40, 50]])).shape == (1, 3, ROWS)
