"""Steering a model of two layers with a sink at BOS: edits act where training did; BOS stays in front of long texts.

Texts and distributions are computed again by plain `transformers` with a torch hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import random_sae
from sink_model import D_MODEL, N_CTX

from sae.dictionary.autoencoder import SAE
from sae.interventions.attribution import inspect
from sae.interventions.edits import Edit
from sae.interventions.steering import next_tokens, steer
from sae.lm import LanguageModel, NativeModel, load_model
from store.common import BOS_BEFORE_CONTEXTS, BOS_BEFORE_DOCUMENTS, RowFilter

HOOK, BOS, D_SAE = "blocks.0.hook_resid_post", 0, 20
EDITS = [Edit(3, "set", 2.0), Edit(5, "ablate")]
MAXIMA = {"feature_max": np.full(D_SAE, 3.0, np.float32)}
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def model(model_with_sink: tuple[Path, Any]) -> LanguageModel:
    return load_model(model_with_sink[0])


def dictionary(**config: Any) -> SAE:
    made = random_sae(D_MODEL, d_sae=D_SAE)
    made.config = {"hook_point": HOOK, **config}
    return made


@contextmanager
def hooked(plain: Any, sae: SAE, row_filter: RowFilter, tokens: torch.Tensor) -> Iterator[None]:
    """The edits by hand: x + Σ (v − a) W_dec, at each position of its own."""

    def edit(_: Any, __: Any, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        for row, ids in zip(x, tokens.tolist(), strict=True):
            for position, token in enumerate(ids):
                at = row[position]
                left_out = position < row_filter.skip_positions or token in row_filter.skip_token_ids
                largest = row_filter.max_norms.get(HOOK, np.inf)
                if token != BOS and not left_out and float(at.double().norm()) <= largest:
                    acts = sae.encode(at)
                    row[position] = at + (6.0 - acts[3]) * sae.W_dec[3] - acts[5] * sae.W_dec[5]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = plain.transformer.h[0].register_forward_hook(edit)
    yield
    handle.remove()


FILTERS = {
    "none": RowFilter(),
    "positions": RowFilter(skip_positions=3),
    "tokens": RowFilter(skip_token_ids=(ord("q") - ord("!") + 1,)),  # of the byte-level tokenizer
    "norms": RowFilter(max_norm_multiple=2.0, median_norms={HOOK: 1.5}),
}


@pytest.mark.parametrize("name", FILTERS)
@torch.inference_mode()
def test_edits_act_where_the_dictionary_was_trained(
    name: str, model_with_sink: tuple[Path, Any], model: LanguageModel
) -> None:
    row_filter = FILTERS[name]
    sae = dictionary(**({} if row_filter.is_off else {"row_filter": row_filter.to_json()}))
    tokens = torch.tensor([model.encode_prompt(PROMPT)])
    assert tokens[0, 0] == BOS
    found = next_tokens(model, sae, tokens[0].tolist(), EDITS, n=300, **MAXIMA)
    base = model_with_sink[1](tokens).logits[0, -1].softmax(-1)
    with hooked(model_with_sink[1], sae, row_filter, tokens):
        steered = model_with_sink[1](tokens).logits[0, -1].softmax(-1)
    np.testing.assert_allclose(found.base, base[found.ids].numpy(), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.steered, steered[found.ids].numpy(), rtol=1e-3, atol=1e-6)
    assert found.kl > 1e-4


def test_the_filters_differ(model: LanguageModel) -> None:
    """Otherwise the test above would say little."""
    ids = model.encode_prompt(PROMPT)
    kl = {
        name: next_tokens(model, dictionary(row_filter=row_filter.to_json()), ids, EDITS, **MAXIMA).kl
        for name, row_filter in FILTERS.items()
    }
    assert len({round(value, 5) for value in kl.values()}) == len(FILTERS)


def test_bos_alone_is_not_edited(model: LanguageModel, tiny_model: NativeModel) -> None:
    """The first new token after an empty prompt is the model's own; the edits act from then on."""
    for lm, sae in ((model, dictionary()), (tiny_model, random_sae(32, d_sae=D_SAE))):
        hook = HOOK if lm is model else "blocks.0.mlp.hook_post"
        sae.config["hook_point"] = hook
        found = steer(lm, sae, "", [Edit(3, "set", 9.0)], max_new_tokens=4, temperature=0.0, **MAXIMA)
        assert found.base_ids[0] == found.steered_ids[0]
        assert found.kl[0] == 0.0
        assert max(found.kl[1:]) > 0


@pytest.mark.parametrize(
    ("config", "keeps_bos"),
    [
        ({}, True),  # not recorded: as the model's contexts begin
        ({"store": {"bos": BOS_BEFORE_CONTEXTS}}, True),
        ({"live": {"bos": BOS_BEFORE_DOCUMENTS}}, False),
        ({"store": {}}, False),  # a store of version 0.1
    ],
)
@torch.inference_mode()
def test_a_long_text_keeps_bos_in_front_if_contexts_of_training_had_it(
    config: dict[str, Any], keeps_bos: bool, model_with_sink: tuple[Path, Any], model: LanguageModel
) -> None:
    found = steer(model, dictionary(**config), PROMPT * 4, [], max_new_tokens=6, temperature=0.0)
    ids = list(found.prompt_ids)
    assert len(ids) > N_CTX
    for new in found.base_ids:
        window = [BOS, *ids[1 - N_CTX :]] if keeps_bos else ids[-N_CTX:]
        assert int(model_with_sink[1](torch.tensor([window])).logits[0, -1].argmax()) == new
        ids.append(new)


def test_a_native_model_continues_from_the_end_of_a_long_text(tiny_model: NativeModel) -> None:
    sae = random_sae(32, d_sae=D_SAE)
    sae.config["hook_point"] = "blocks.0.mlp.hook_post"
    found = steer(tiny_model, sae, PROMPT * 8, [], max_new_tokens=2, temperature=0.0)
    window = torch.tensor([found.prompt_ids[-tiny_model.context_tokens :]])
    assert found.base_ids[0] == int(tiny_model.logits(window)[0, -1].argmax())


@torch.inference_mode()
def test_the_microscope_replaces_x_on_the_same_rows(model_with_sink: tuple[Path, Any], model: LanguageModel) -> None:
    row_filter = FILTERS["positions"]
    sae = dictionary(row_filter=row_filter.to_json())
    ids = model.encode_prompt(PROMPT)
    found = inspect(model, sae, ids, hook_point=HOOK)

    def replace(_: Any, __: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        replaced = torch.cat([x[:, :3], sae(x[:, 3:])], 1)
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    handle = model_with_sink[1].transformer.h[0].register_forward_hook(replace)
    log_p = model_with_sink[1](torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    handle.remove()
    expected = -log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    torch.testing.assert_close(found.loss_spliced[1:], expected, rtol=1e-3, atol=1e-4)
