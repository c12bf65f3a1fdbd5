"""Pretraining against float64 cross-entropy and against an unbroken run."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import random_transformer
from torch import Tensor
from torch.nn import functional as F

from sae.jobs.checkpoint import read_tensors
from sae.jobs.progress import Interrupted
from sae.lm import load_model
from sae.lm import pretrain as module
from sae.lm.cross_entropy import ChunkedCrossEntropy
from sae.lm.held_out import held_out_contexts, held_out_loss, neuron_figures
from sae.lm.pretrain import TokenStream, learning_rate, pretrain
from sae.lm.pretrain_config import PretrainConfig, configured, shape_of
from sae.lm.token_stream import Repeats
from sae.lm.transformer import Transformer, TransformerConfig, sinusoids
from sae.text.documents import Document, TextReport, split_of
from sae.text.sources import TextSource, open_text
from sae.text.splits import DIVIDED
from sae.text.tokenizer import load_tokenizer, token_bytes

ROOT = Path(__file__).resolve().parent.parent
SHAPE = TransformerConfig(d_model=16, d_mlp=32, n_heads=2, d_head=8, n_ctx=16, d_vocab=300)
CONFIG = PretrainConfig(train_tokens=12 * 4 * 16, batch_contexts=4, warmup_steps=3, eval_steps=5, seed=3)
WORDS = "the quick brown fox jumps over lazy dogs while curious cats watch from sunny windows".split()  # noqa: SIM905
DOCUMENTS = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(40)) + f" {i}" for i in range(60)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def source(fingerprint: str = "f") -> TextSource:
    def read(_: TextReport) -> Iterator[Document]:
        return (Document(str(i), text, "d", "s") for i, text in enumerate(DOCUMENTS))

    return TextSource("made up", read, fingerprint)


# --- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 512, 513, 1200])
def test_chunked_loss_and_gradients_are_those_of_cross_entropy(rows: int) -> None:
    """Against float64; the factors are bfloat16-exact, so what differs is the rounding of products: 2^-8 relative."""
    generator = torch.Generator().manual_seed(rows)
    h = torch.randn(rows, 24, generator=generator).bfloat16().float().requires_grad_()
    W = torch.randn(50, 24, generator=generator).bfloat16().float().requires_grad_()
    target = torch.randint(50, (rows,), generator=generator)
    exact_h, exact_W = (t.detach().double().requires_grad_() for t in (h, W))
    exact = F.cross_entropy(exact_h @ exact_W.T, target)
    loss = ChunkedCrossEntropy.apply(h, W, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=4e-3)
    (3 * exact).backward()
    (3 * loss).backward()
    for mine, theirs in ((h.grad, exact_h.grad), (W.grad, exact_W.grad)):
        assert mine is not None
        assert theirs is not None
        assert (mine.double() - theirs).norm() / theirs.norm() < 1e-2


def test_batch_loss_is_the_next_token_loss() -> None:
    model = module.Transformer(SHAPE, seed=1)
    tokens = torch.randint(300, (5, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.double()(tokens[:, :-1])
        exact = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
        assert module.batch_loss(model.float(), tokens).item() == pytest.approx(exact, rel=4e-3)
        assert held_out_loss(model, tokens) == pytest.approx(exact, rel=1e-5)


def test_held_out_contexts_are_spread_over_the_text() -> None:
    tokens = np.arange(1_000, dtype=np.uint16)
    contexts = held_out_contexts(tokens, 9, 5)
    assert contexts[:, 0].tolist() == [0, 240, 490, 740, 990]
    assert (contexts.diff(dim=1) == 1).all()
    assert len(held_out_contexts(tokens, 9, 200)) == 100
    assert held_out_contexts(tokens[:9], 9, 5).shape == (0, 10)
    assert math.isnan(held_out_loss(module.Transformer(SHAPE), torch.empty(0, 10, dtype=torch.int64)))
    assert neuron_figures(module.Transformer(SHAPE), torch.empty(0, 10, dtype=torch.int64)) == []


@pytest.mark.parametrize("act_fn", ["relu", "solu_ln"])
def test_neuron_figures_equal_a_loop_over_tokens(act_fn: str) -> None:
    """Two layers, float64, the model's own modules called one after the other."""
    shape = replace(SHAPE, n_layers=2, act_fn=act_fn)
    model = random_transformer(4, shape).double()
    with torch.no_grad():
        getattr(model.blocks[1].mlp, "in").bias[:5] = -1e3  # dead with ReLU
    contexts = torch.randint(300, (3, 17), generator=torch.Generator().manual_seed(0))

    def posts_and_loss(layer: int, edit: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
        resid, found = model.resid_pre(contexts[:, :-1]), torch.empty(0)
        for number, block in enumerate(model.blocks):
            resid = resid + block.attn(block.ln1(resid))
            post = block.mlp.post(block.ln2(resid))
            if number == layer:
                found, post = post, edit(post)
            resid = resid + block.mlp.out(post)
        log_p = model.unembed(model.ln_final(resid)).log_softmax(-1)
        return found, -log_p.gather(-1, contexts[:, 1:, None]).mean().item()

    def ten_largest(post: Tensor) -> Tensor:
        rows = post.flatten(0, 1).clone()
        for row in rows:
            for place in sorted(range(len(row)), key=lambda i: abs(row[i].item()))[:-10]:
                row[place] = 0.0
        return rows.view_as(post)

    figures = neuron_figures(model, contexts)
    for layer in (0, 1):
        x, clean = posts_and_loss(layer, lambda post: post)
        zero, top10 = (posts_and_loss(layer, edit)[1] for edit in (torch.zeros_like, ten_largest))
        rows = x.flatten(0, 1).tolist()
        ratios = [sum(a * a for a in row) ** 2 / max(sum(a**4 for a in row), 1e-300) for row in rows]
        assert figures[layer]["l0"] == pytest.approx(np.mean([sum(a != 0 for a in row) for row in rows]), abs=0.01)
        assert figures[layer]["dead"] == pytest.approx(np.mean([not any(c) for c in zip(*rows, strict=True)]), abs=1e-4)
        assert figures[layer]["participation_ratio"] == pytest.approx(np.mean(ratios), abs=0.01)
        assert figures[layer]["ce_gap"] == pytest.approx(zero - clean, abs=1e-4)
        expected = (zero - top10) / (zero - clean) if zero > clean else None
        assert figures[layer]["score_zero_top10"] == (
            expected if expected is None else pytest.approx(expected, abs=1e-3)
        )
    assert figures[1]["dead"] >= (5 / 32 if act_fn == "relu" else 0)
    assert neuron_figures(random_transformer(0, replace(shape, attn_only=True)), contexts) == []


def test_settings_are_read_from_texts() -> None:
    shape, config = configured(["n_ctx=64", "lr=0.5", "attn_only=true", "keep_at=1,2"], n_layers=2, lr=0.1, seed=4)
    assert (shape.n_ctx, shape.n_layers, shape.attn_only) == (64, 2, True)
    assert (config.lr, config.seed, config.keep_at) == (0.5, 4, (1, 2))
    with pytest.raises(ValueError, match=r"no setting 'warmup'\. Did you mean 'warmup_steps'"):
        configured(["warmup=3"])
    with pytest.raises(ValueError, match="d_mlp must be of type int, got 'wide'"):
        configured(["d_mlp=wide"])


def test_learning_rate_warms_up_and_decays() -> None:
    config = PretrainConfig(lr=1.0, warmup_steps=10, final_lr_share=0.1)
    rates = [learning_rate(step, 110, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == max(rates) == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    tokens = np.arange(5_000, dtype=np.uint16)
    forward, backward = (TokenStream(tokens, 16, 4, seed=1) for _ in range(2))
    steps = range(2 * forward.steps_per_epoch + 3)
    first = [forward.batch(step) for step in steps]
    assert all(torch.equal(backward.batch(step), first[step]) for step in reversed(steps))
    other = TokenStream(tokens, 16, 4, seed=2)
    assert not torch.equal(other.batch(0), first[0])
    assert not torch.equal(first[forward.steps_per_epoch], first[0])


@pytest.mark.parametrize("n_tokens", [16 + 4 * 17, 999, 5_000])
def test_an_epoch_covers_the_text_without_overlap(n_tokens: int) -> None:
    stream = TokenStream(np.arange(n_tokens, dtype=np.uint16), 16, 4, seed=0)
    for epoch in range(3):
        first = epoch * stream.steps_per_epoch
        rows = torch.cat([stream.batch(first + i) for i in range(stream.steps_per_epoch)])
        assert (rows.diff(dim=1) == 1).all()  # whole stretches of the text, in order
        seen = rows.flatten()
        assert len(seen.unique()) == len(seen)
        assert len(seen) > n_tokens - 16 - 4 * 17 - 17  # an offset, and less than a batch, are left over


def test_a_share_of_contexts_repeats_one_segment() -> None:
    """Every planted row is one stretch of the text over and over; the others are those of the plain stream."""
    tokens = np.arange(5_000, dtype=np.uint16)
    plain = TokenStream(tokens, 60, 8, seed=1)
    stream = TokenStream(tokens, 60, 8, seed=1, repeats=Repeats(0.25, 5, 9), bos_id=7_777)
    planted, lengths = 0, set()
    for step in range(40):
        rows, before = stream.batch(step), plain.batch(step)
        assert (rows[:, 0] == 7_777).all()
        for row, old in zip(rows[:, 1:], before[:, 1:], strict=True):
            if torch.equal(row, old):
                continue
            planted += 1
            length = int((row == row[0]).nonzero()[1])
            lengths.add(length)
            assert (row[:length].diff() == 1).all()
            assert torch.equal(row[length:], row[:-length])
    assert lengths == {5, 6, 7, 8, 9}
    assert 50 < planted < 110  # 80 expected of 320
    again = TokenStream(tokens, 60, 8, seed=1, repeats=Repeats(0.25, 5, 9), bos_id=7_777)
    assert torch.equal(again.batch(30), stream.batch(30))
    assert torch.equal(TokenStream(tokens, 60, 8, seed=1, repeats=Repeats(0.0)).batch(3), plain.batch(3))


def test_a_share_of_contexts_begins_where_a_document_begins() -> None:
    """Such a row is the plain stream's, moved back to the last BOS at or before it; the others stay."""
    lengths = np.random.default_rng(3).integers(1, 30, 400)
    tokens = np.concatenate([[0, *range(1, length)] for length in lengths]).astype(np.uint16)
    starts = np.flatnonzero(tokens == 0)
    plain = TokenStream(tokens, 20, 8, seed=1)
    stream = TokenStream(tokens, 20, 8, seed=1, document_share=0.75, starts=starts)
    moved = 0
    for step in range(30):
        for row, old in zip(stream.batch(step), plain.batch(step), strict=True):
            if torch.equal(row, old):
                continue
            moved += 1
            assert row[0] == 0
            back = int(old[0])  # the place in its document
            shared = max(21 - back, 0)
            assert torch.equal(row[21 - shared :], old[:shared])
            assert row[: min(back, 21)].tolist() == list(range(min(back, 21)))
    assert 140 < moved < 200  # 180 expected of 240, and a few begin there already
    again = TokenStream(tokens, 20, 8, seed=1, document_share=0.75, starts=starts)
    assert torch.equal(again.batch(11), stream.batch(11))
    assert torch.equal(TokenStream(tokens, 20, 8, seed=1, starts=starts).batch(3), plain.batch(3))


def test_initial_weights_of_attention_and_positions(tmp_path: Path) -> None:
    """Against the formulas, number by number; and the defaults are those of version 0.1."""
    shape = replace(SHAPE, d_model=32, n_heads=4, n_layers=2, n_ctx=40)
    wide = Transformer(shape, seed=2, attention_std=0.5, sinusoid_positions=True).state_dict()
    plain = Transformer(shape, seed=2).state_dict()
    for name, tensor in wide.items():
        expected = plain[name] * 25 if ".attn." in name and name.endswith("weight") else plain[name]
        if name != "pos_embed.weight":
            assert torch.allclose(tensor, expected, rtol=1e-5), name
    for pos in (0, 1, 39):
        for i in range(16):
            angle = pos / 1000 ** (2 * i / 32)
            for column, value in ((2 * i, math.sin(angle)), (2 * i + 1, math.cos(angle))):
                assert wide["pos_embed.weight"][pos, column] == pytest.approx(0.5 * value, abs=1e-5)
    assert sinusoids(3, 5).shape == (3, 5)
    config = replace(CONFIG, train_tokens=64, context_bos=True, repeat_share=0.5, repeat_tokens=(3, 4))
    model = load_model(pretrain(source(), tmp_path / "lm", shape=SHAPE, config=config))
    assert model.context_bos
    with pytest.raises(ValueError, match="repeat_tokens must be two lengths"):
        replace(CONFIG, repeat_tokens=(5, 4))
    with pytest.raises(ValueError, match="repeat_share must be between 0 and 1, got 2"):
        replace(CONFIG, repeat_share=2.0)
    with pytest.raises(ValueError, match="document_share must be between 0 and 1, got -1"):
        replace(CONFIG, document_share=-1.0)


def test_too_few_tokens_for_one_batch() -> None:
    TokenStream(np.zeros(16 + 4 * 17, np.uint16), 16, 4, seed=0)
    with pytest.raises(ValueError, match="83 tokens, too few for one batch of 4 contexts of 16"):
        TokenStream(np.zeros(16 + 4 * 17 - 1, np.uint16), 16, 4, seed=0)


def test_token_files_hold_bos_and_documents_of_their_split(tmp_path: Path) -> None:
    out = pretrain(source(), tmp_path / "lm", shape=SHAPE, config=replace(CONFIG, train_tokens=64))
    table = token_bytes(load_tokenizer(out / "tokenizer.json"))
    for split in ("train", "heldout"):
        tokens = np.load(out / f"tokens-{split}.npy")
        text = b"".join(b"\0" if t == 0 else table[t] for t in tokens).decode()
        expected = [d.text for d in source().documents() if d.split == split]
        assert text == "".join(f"\0{document}" for document in expected)
        assert expected


def text_of(documents: list[str]) -> TextSource:
    return TextSource("made up", lambda _: (Document(str(i), t, "d", "s") for i, t in enumerate(documents)), "f")


def test_one_long_document_is_in_both_splits_and_no_word_of_it_in_two(tmp_path: Path) -> None:
    long = " ".join(f"{i:05d}" for i in range(4000))
    out = pretrain(text_of([long]), tmp_path / "lm", shape=SHAPE, config=replace(CONFIG, train_tokens=64))
    table = token_bytes(load_tokenizer(out / "tokenizer.json"))
    words = {}
    for split in ("train", "heldout"):
        tokens = np.load(out / f"tokens-{split}.npy")
        words[split] = b"".join(b" " if t == 0 else table[t] for t in tokens).decode().split()
        assert all(len(word) == 5 for word in words[split])
    assert not set(words["train"]) & set(words["heldout"])
    assert len(words["heldout"]) > 4000 / 25
    assert json.loads((out / "pretrain.json").read_text())["held_out"] == DIVIDED.held_out


def test_a_text_with_nothing_held_out_is_refused_before_training(tmp_path: Path) -> None:
    short = [text for text in DOCUMENTS if split_of(text) == "train"]
    with pytest.raises(ValueError, match="0 held-out tokens, too few for one context of 16 tokens"):
        pretrain(text_of(short), tmp_path / "lm", shape=SHAPE, config=CONFIG)
    assert not (tmp_path / "lm" / "model.safetensors").exists()


def test_a_run_that_version_0_1_began_keeps_whole_documents(tmp_path: Path) -> None:
    """Its pretrain.json has no rule; here its token files are still to be made."""
    documents = [*DOCUMENTS, " ".join(f"{i:05d}" for i in range(4000))]
    new = pretrain(text_of(documents), tmp_path / "new", shape=SHAPE, config=replace(CONFIG, train_tokens=64))
    settings = json.loads((new / "pretrain.json").read_text())
    del settings["held_out"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pretrain.json").write_text(json.dumps(settings))
    old = pretrain(text_of(documents), tmp_path / "old", shape=SHAPE, config=replace(CONFIG, train_tokens=64))
    table = token_bytes(load_tokenizer(old / "tokenizer.json"))
    tokens = np.load(old / f"tokens-{split_of(documents[-1])}.npy")
    assert documents[-1] in b"".join(b"\0" if t == 0 else table[t] for t in tokens).decode()


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return pretrain(source(), tmp_path_factory.mktemp("lm") / "unbroken", shape=SHAPE, config=CONFIG)


def test_a_run_leaves_a_loadable_model_and_learns(unbroken: Path) -> None:
    tensors, header = read_tensors(unbroken / "model.safetensors")
    assert header == {"kind": "native-transformer"}
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    module.Transformer(SHAPE).load_state_dict(tensors)
    config = json.loads((unbroken / "config.json").read_text())
    assert {k: config[k] for k in SHAPE.to_dict()} == SHAPE.to_dict()
    assert config["kind"] == "native-transformer"
    last = json.loads((unbroken / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 12
    assert last["loss"] < np.log(300)
    assert last["held_out_loss"] < np.log(300)


@pytest.mark.parametrize("stop_after", [1, 7, 11])
def test_an_interrupted_run_continues_to_the_same_bytes(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    out, taken, step = tmp_path / "lm", 0, module._step

    def step_then_ctrl_c(*args: object) -> float:
        nonlocal taken
        taken += 1
        if taken == stop_after:
            signal.raise_signal(signal.SIGINT)
        return step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_step", step_then_ctrl_c)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_after} of 12"):
        pretrain(source(), out, shape=SHAPE, config=CONFIG)
    assert taken == stop_after
    assert not (out / "model.safetensors").exists()
    pretrain(source(), out, shape=SHAPE, config=CONFIG)
    assert taken == 12  # nothing was done twice
    for name in ("model.safetensors", "state.safetensors", "metrics.jsonl", "tokenizer.json", "config.json"):
        assert (out / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_copies_are_kept_at_the_chosen_tokens(tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept copy equals the model of a run cut off there; an interruption changes none of them."""
    config = replace(CONFIG, keep_at=(0, 200, 448, 768))
    straight = pretrain(source(), tmp_path / "straight", shape=SHAPE, config=config)
    assert (straight / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    kept = {path.name: load_model(path) for path in sorted((straight / "kept").iterdir())}
    assert set(kept) == {"0-tokens", "200-tokens", "448-tokens", "768-tokens"}
    assert [kept[f"{n}-tokens"].trained_tokens for n in (0, 200, 448, 768)] == [0, 256, 448, 768]  # whole batches
    assert load_model(straight).trained_tokens == 768
    expected = {"0-tokens": module.Transformer(SHAPE, seed=3).state_dict(), "768-tokens": load_model(straight).module}
    initial, last = expected["0-tokens"], expected["768-tokens"].state_dict()
    for name, tensor in kept["0-tokens"].module.state_dict().items():
        assert torch.equal(tensor, initial[name].half().float())
        assert torch.equal(kept["768-tokens"].module.state_dict()[name], last[name])

    step, taken = module._step, 0

    def step_then_ctrl_c(*args: object) -> float:
        nonlocal taken
        taken += 1
        if taken == 4:
            signal.raise_signal(signal.SIGINT)
        return step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_step", step_then_ctrl_c)
    with pytest.raises(Interrupted):
        pretrain(source(), tmp_path / "cut", shape=SHAPE, config=config)
    for name, tensor in _parameters_in_state(tmp_path / "cut").items():  # step 4 is the first that has seen 200 tokens
        assert torch.equal(kept["200-tokens"].module.state_dict()[name], tensor.half().float())
    pretrain(source(), tmp_path / "cut", shape=SHAPE, config=config)
    for name in kept:
        file = f"kept/{name}/model.safetensors"
        assert (tmp_path / "cut" / file).read_bytes() == (straight / file).read_bytes()
    with pytest.raises(ValueError, match=r"keep_at is 800; expected 0 … train_tokens = 768"):
        replace(CONFIG, keep_at=(800,))


def test_the_blocks_learn_at_their_share_of_the_rate(tmp_path: Path) -> None:
    """One step of AdamW without decay moves every weight by the learning rate (its first moments are the gradient)."""
    config = replace(CONFIG, train_tokens=64, warmup_steps=1, weight_decay=0.0, lr=1e-3, block_lr_share=0.25)
    out = pretrain(source(), tmp_path / "lm", shape=SHAPE, config=config)
    start = module.Transformer(SHAPE, seed=3).state_dict()
    for name, tensor in _parameters_in_state(out).items():
        if name.endswith("attn.k.bias"):  # attention does not depend on it, so its gradient is rounding
            continue
        moved = (tensor - start[name]).abs().max().item()
        assert moved == pytest.approx(2.5e-4 if name.startswith("blocks.") else 1e-3, rel=0.02), name


def test_training_starts_from_the_weights_of_another_model(unbroken: Path, tmp_path: Path) -> None:
    """At a rate too small to move a weight, the new model is the old one; another shape or no model is refused."""
    config = replace(CONFIG, train_tokens=64, lr=1e-12, weight_decay=0.0, seed=9)
    out = pretrain(source(), tmp_path / "lm", shape=shape_of(unbroken), config=config, start=unbroken)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (unbroken / name).read_bytes(), name
    here, there = (json.loads((directory / "config.json").read_text()) for directory in (out, unbroken))
    assert here == there | {"trained_tokens": 64}  # of this run
    pretrain(source(), out, shape=SHAPE, config=config, start=unbroken)  # finished: nothing to do
    with pytest.raises(ValueError, match="start_sha256 is '[0-9a-f]{64}' there, None asked for"):
        pretrain(source(), out, shape=SHAPE, config=config)
    with pytest.raises(ValueError, match="has the shape .*'d_mlp': 32.* asked for .*'d_mlp': 64"):
        pretrain(source(), tmp_path / "other", shape=replace(SHAPE, d_mlp=64), config=config, start=unbroken)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="no finished model of `sae pretrain`"):
        shape_of(tmp_path)


def _parameters_in_state(out: Path) -> dict[str, Tensor]:
    tensors, _ = read_tensors(out / "state.safetensors")
    return {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}


def test_a_finished_run_stays_as_it_is(unbroken: Path) -> None:
    before = {p.name: p.read_bytes() for p in unbroken.iterdir()}
    pretrain(source(), unbroken, shape=SHAPE, config=CONFIG)
    assert {p.name: p.read_bytes() for p in unbroken.iterdir()} == before


def test_a_run_from_before_a_setting_existed_continues(unbroken: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(unbroken, tmp_path / "old"))
    settings = json.loads((old / "pretrain.json").read_text())
    for name in ("block_lr_share", "keep_at", "repeat_share", "repeat_tokens", "context_bos", "attention_std"):
        del settings["train"][name]
    for name in ("sinusoid_positions", "document_share"):
        del settings["train"][name]
    (old / "pretrain.json").write_text(json.dumps(settings))
    pretrain(source(), old, shape=SHAPE, config=CONFIG)
    with pytest.raises(ValueError, match=r"train\.repeat_share is 0\.0 there, 0\.5 asked for"):
        pretrain(source(), old, shape=SHAPE, config=replace(CONFIG, repeat_share=0.5))


def test_other_settings_are_refused_and_nothing_is_touched(unbroken: Path) -> None:
    before = {p.name: p.read_bytes() for p in unbroken.iterdir()}
    with pytest.raises(ValueError, match=r"train\.lr is 0\.004 there, 0\.1 asked for"):
        pretrain(source(), unbroken, shape=SHAPE, config=replace(CONFIG, lr=0.1))
    with pytest.raises(ValueError, match=r"shape\.d_mlp is 32 there, 64 asked for"):
        pretrain(source(), unbroken, shape=replace(SHAPE, d_mlp=64), config=CONFIG)
    with pytest.raises(ValueError, match="text_sha256 is"):
        pretrain(source("g"), unbroken, shape=SHAPE, config=CONFIG)
    assert {p.name: p.read_bytes() for p in unbroken.iterdir()} == before


KILLED = """
import sys, torch
from pathlib import Path
from sae.lm import load_model
from sae.lm import pretrain as module
from sae.lm.held_out import held_out_contexts, held_out_loss, neuron_figures
from sae.text.sources import open_text
from sae.lm.pretrain_config import PretrainConfig
from sae.lm.transformer import TransformerConfig
torch.set_num_threads(1)
step, taken = module._step, 0
def slow(*args):
    global taken
    taken += 1
    if taken == 9:
        print("here", flush=True)
        sys.stdin.read()  # killed here
    return step(*args)
module._step = slow
shape = TransformerConfig(**{shape})
module.pretrain(open_text({text}), Path({out}), shape=shape, config=PretrainConfig(**{config}))
"""


def test_a_killed_run_continues_from_its_last_checkpoint(tmp_path: Path) -> None:
    """SIGKILL in step 9, a checkpoint after each step: the end is that of an unbroken run."""
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.txt").write_text(document)
    config = replace(CONFIG, save_minutes=0.0)
    program = KILLED
    for name, value in {
        "shape": SHAPE.to_dict(),
        "text": str(tmp_path / "text"),
        "out": str(tmp_path / "killed"),
        "config": vars(config),
    }.items():
        program = program.replace("{" + name + "}", repr(value))
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as child:
        assert child.stdout is not None
        reached = child.stdout.readline()
        child.kill()
    assert reached == b"here\n"
    text = open_text(tmp_path / "text")
    assert read_tensors(tmp_path / "killed" / "state.safetensors")[1]["step"] == 8
    pretrain(text, tmp_path / "killed", shape=SHAPE, config=config)
    pretrain(text, tmp_path / "straight", shape=SHAPE, config=config)
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
