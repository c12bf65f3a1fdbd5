"""Every lens on a GPT-2 of random weights in Hugging Face's layout: shapes, sums and identities, through the verb.

Its tokenizer has the words of the made-up world, and one head attends to the token before, so that each lens has
something to measure; all other weights are random.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import made_up_documents, random_sae, text_source
from torch import Tensor

from sae import pipeline
from sae.circuits import world
from sae.circuits.parts import contributions, logit_reader, stream_parts, total
from sae.circuits.results import Result, read_result
from sae.dictionary.files import save
from sae.lm import LanguageModel, load_model
from sae.text.sources import TextSource
from sae.text.tokenizer import train_tokenizer

LAYERS, HEADS, WIDTH, VOCAB, POSITIONS = 2, 2, 64, 840, 32
ATTN_OUT, NEURONS = "blocks.0.hook_attn_out", "blocks.1.mlp.hook_post"

Lens = Callable[..., Result]


def previous_token_head(attention: Any, wpe: Tensor) -> None:
    """Head 0 of a GPT-2 layer looks at the position before: positions are one-hot, queries are keys of the next."""
    wpe[:] = 8 * torch.eye(POSITIONS, WIDTH)
    weight = attention.c_attn.weight
    weight[:, :POSITIONS] = weight[:, WIDTH : WIDTH + POSITIONS] = 0
    for pos in range(1, POSITIONS):
        weight[pos, pos] = weight[pos - 1, WIDTH + pos] = 3.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    made = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, initializer_range=0.2, **sizes))  # type: ignore[arg-type]
    with torch.no_grad():
        made.transformer.wte.weight[:, :POSITIONS] = 0
        previous_token_head(made.transformer.h[0].attn, made.transformer.wpe.weight)
    made.save_pretrained(directory)
    tokenizer = train_tokenizer([document.text for document in world.documents(8000)], VOCAB)
    tokenizer.save(str(directory / "words.json"))
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(directory / "words.json"), bos_token="<|endoftext|>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> LanguageModel:
    return load_model(directory)


@pytest.fixture(scope="module")
def text() -> TextSource:
    return text_source(made_up_documents(900))


@pytest.fixture(scope="module")
def run(model: LanguageModel, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Lens:
    """Runs a lens on the model, or on a random dictionary of a hook point, and reads its file back."""

    def lens(name: str, hook_point: str | None = None, **settings: Any) -> Result:
        path: Any = model
        out = tmp_path_factory.mktemp("results")
        if hook_point is not None:
            identity = model.identity() | {"id": str(directory)}
            config = {"kind": "sae", "format": 1, "hook_point": hook_point, "model": identity, "activation": "relu"}
            path = out / "sae"
            save(random_sae(model.hook_width(hook_point), hook_point), path, config)
        return read_result(pipeline.lens(name, path, out=out, **settings))

    return lens


def check(found: Result, *, features: int | None = None) -> None:
    """Each measure has finite values, controls, and axes of the length of their labels."""
    assert found.measures
    for name, measure in found.measures.items():
        assert measure.controls
        if isinstance(measure.value, Tensor):
            assert measure.value.ndim == len(measure.axes)
            for axis, size in zip(measure.axes, measure.value.shape, strict=True):
                labels = found.labels.get(f"{axis}.{name}", found.labels.get(axis))
                assert labels is None or len(labels) == size, (name, axis)
                assert axis != "feature" or size == features
            if not {"feature", "writer"} & set(measure.axes):  # NaN: never fires, not before it
                assert torch.isfinite(measure.value).all(), name


@pytest.mark.parametrize(
    "asked",
    [
        {"by": "position"},
        {"by": "head", "task": "ioi"},
        {"by": "neuron", "layer": 1},
        {"by": "head", "method": "path", "task": "ioi"},
        {"by": "head", "method": "judge"},
        {"by": "feature", "hook_point": NEURONS},
        {"by": "feature", "hook_point": ATTN_OUT, "method": "path"},
    ],
    ids=lambda asked: "-".join(str(value) for value in asked.values()),
)
def test_circuit(run: Lens, asked: dict[str, Any]) -> None:
    found = run("circuit", n=4, **asked)
    check(found, features=24)
    for name, measure in found.measures.items():
        nothing = 0.0 if name.startswith("restoring") else 1.0
        if "identity" in measure.controls:
            assert (measure.controls["identity"].value == nothing).all()  # type: ignore[union-attr]
        if name == "restoring_resid_post":  # at all positions the stream is the whole run
            assert measure.value[:, 0].tolist() == pytest.approx([1.0] * (LAYERS + 1), abs=1e-4)  # type: ignore[index]
        if name.endswith("neuron.together"):  # all neurons are the whole hook point
            whole = measure.controls["whole_hook_point"].value
            assert measure.value[-1] == pytest.approx(float(whole[-1]), abs=1e-4)  # type: ignore[index]
        if name.startswith("into_"):  # nothing travels back into the first layer
            labels = found.labels[f"receiver.{name}"]
            first = [i for i, label in enumerate(labels) if label.startswith("L0")]
            assert (measure.value[:, first] - 1).abs().max() < 1e-5  # type: ignore[index]


def test_depth(run: Lens, text: TextSource) -> None:
    found = run("depth", NEURONS, text=text, n=6)
    check(found, features=24)
    kl = found.measures["kl_logit_lens"].value
    assert kl.shape == (LAYERS + 1,)  # type: ignore[union-attr]
    assert kl[-1] == pytest.approx(0.0, abs=1e-6)  # type: ignore[index]
    assert kl[0] > 0.01  # type: ignore[index]


def test_heads(run: Lens, text: TextSource) -> None:
    found = run("heads", text=text, n=6)
    check(found)
    assert found.measures["previous_token"].value[0, 0] > 0.9  # type: ignore[index]
    assert found.measures["previous_token"].value[1].max() < 0.2  # type: ignore[index]
    assert found.measures["ov_eigenvalues"].value.shape == (LAYERS, HEADS)  # type: ignore[union-attr]


def test_keys(model: LanguageModel, run: Lens, text: TextSource) -> None:
    """A random dictionary has no rules for enough tokens, and the lens says so."""
    with pytest.raises(ValueError, match="tokens"):
        run("keys", ATTN_OUT, text=text, n=6)
    with pytest.raises(ValueError, match="hook_attn_out"):
        run("keys", NEURONS, text=text, n=6)


def test_erase(run: Lens, text: TextSource) -> None:
    pytest.importorskip("concept_erasure", reason="the optional package concept-erasure is not installed")
    found = run("erase", concept="dna", text=text, n=40)
    check(found)
    accuracy = found.measures["probe_accuracy"]
    assert float(accuracy.controls["before"].value) > 0.7
    assert abs(float(accuracy.value) - 0.5) < 0.1
    projection = found.arrays["projection"]
    assert torch.allclose(projection @ projection, projection, atol=1e-4)  # erasing twice is erasing once


@pytest.mark.parametrize("method", ["gaussian", "swap", "rome"])
def test_facts(run: Lens, method: str) -> None:
    found = run("facts", method=method, n=3)
    check(found)
    if method == "rome":
        efficacy = found.measures["efficacy"]
        assert float(efficacy.value) > float(efficacy.controls["unedited"].value)
    else:
        restored = found.measures["restored_resid_post"].value
        assert restored.shape[0] == LAYERS  # type: ignore[union-attr]
        places = found.labels["place"]
        whole = restored[-1, places.index("end")]  # type: ignore[index]
        assert whole == pytest.approx(float(found.measures["total_effect"].value), abs=1e-6)


def test_growth_needs_snapshots(run: Lens, text: TextSource) -> None:
    with pytest.raises(pipeline.PipelineError, match="no snapshots"):
        run("growth", text=text)


def test_parts_sum_to_the_stream_and_to_the_logits(model: LanguageModel) -> None:
    ids = model.encode_prompt("when a person plays")
    tokens = torch.tensor([ids])
    sae = random_sae(WIDTH, ATTN_OUT)
    for point in ("blocks.0.hook_resid_mid", "blocks.1.hook_resid_post"):
        for dictionaries in ({}, {ATTN_OUT: sae}):
            summed = total(stream_parts(model, ids, point=point, neurons=True, dictionaries=dictionaries))
            stream = model.capture(tokens, point)[0]
            assert (summed - stream).norm() <= 1e-5 * stream.norm()
    found = contributions(stream_parts(model, ids), logit_reader(model, 7, 9))
    logits = model.logits(tokens)[0]
    assert torch.allclose(found.values.sum(0)[:, 0] + found.constant, logits[:, 7] - logits[:, 9], atol=1e-3)
