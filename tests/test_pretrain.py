"""Pretraining against float64 cross-entropy and against an unbroken run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sae.jobs.checkpoint import read_tensors
from sae.jobs.progress import Interrupted
from sae.lm import pretrain as module
from sae.lm.pretrain import ChunkedCrossEntropy, PretrainConfig, TokenStream, learning_rate, pretrain
from sae.lm.transformer import TransformerConfig
from sae.text.documents import Document, TextReport
from sae.text.sources import TextSource, open_text
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
        flat = tokens.flatten().numpy().astype(np.uint16)
        assert module.held_out_loss(model, flat) == pytest.approx(exact, rel=1e-5)


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


def test_a_finished_run_stays_as_it_is(unbroken: Path) -> None:
    before = {p.name: p.read_bytes() for p in unbroken.iterdir()}
    pretrain(source(), unbroken, shape=SHAPE, config=CONFIG)
    assert {p.name: p.read_bytes() for p in unbroken.iterdir()} == before


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
from sae.lm import pretrain as module
from sae.text.sources import open_text
from sae.lm.pretrain import PretrainConfig
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
