"""Live rows: the training rows of a store, each once per epoch, shuffled, the same wherever reading begins."""

from __future__ import annotations

import random
import signal
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Commands
from fakes import HOOK_POINT, made_up_documents, text_source
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import assert_same_dictionary, logged_steps, saved_step
from torch import Tensor

import sae
from sae import pipeline
from sae.cli import main
from sae.lm import NativeModel
from sae.parallel.mesh import ONE, Mesh
from sae.pipeline import PipelineError
from sae.text.documents import split_of
from sae.text.packing import FORWARD_TOKENS
from sae.text.sources import TextSource, open_text
from sae.training.live_rows import Contexts, LiveError, LiveLanes, LiveRows
from sae.training.shuffle_buffer import ShuffleBuffer, ShufflePlan
from store.activations import ActivationStore
from store.common import HELD_OUT, TRAIN

SEQ_LEN, BATCH = 32, 64


@pytest.fixture(scope="module")
def source() -> TextSource:
    """Few enough documents for many epochs: about 12,000 tokens."""
    return text_source(made_up_documents(200))


@pytest.fixture(scope="module")
def contexts(tiny_model: NativeModel, source: TextSource) -> Contexts:
    return Contexts(tiny_model, source, SEQ_LEN)


def live(contexts: Contexts, *, held_rows: int = 800, steps: int = 4000, hooks: Any = None, **options: Any) -> LiveRows:
    """Float32 rows of width 32, in a buffer of this many rows."""
    options = {"dtype": "float32", "memory_bytes": held_rows * 32 * 4, "seed": 3, **options}
    return LiveRows(contexts, hooks or {"x": HOOK_POINT}, batch_tokens=BATCH, steps=steps, **options)


@pytest.fixture(scope="module")
def store(tiny_model: NativeModel, source: TextSource, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """All of that text, harvested."""
    out = tmp_path_factory.mktemp("whole") / "acts.zarr"
    pipeline.harvest(tiny_model, source, out, tokens=40_000, heldout_tokens=5000, dtype="float32")
    return ActivationStore.open(out)


def stored_rows(store: ActivationStore, split: str) -> np.ndarray:
    parts = [
        store.read_acts(split, shard, HOOK_POINT)[store.read_contexts(split, shard).keep.reshape(-1)]
        for shard, marker in store.markers(split).items()
        if marker.contexts
    ]
    return np.concatenate(parts)


def places_in(rows: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The number of the equal row among the others, found along one random direction, on which rows differ."""
    direction = np.random.default_rng(0).normal(size=rows.shape[1])
    order = np.argsort(among @ direction)
    held = (among @ direction)[order]
    at = np.searchsorted(held, rows @ direction).clip(1, len(held) - 1)
    nearer = np.abs(held[at - 1] - rows @ direction) < np.abs(held[at] - rows @ direction)
    found = order[at - nearer]
    assert np.abs(rows - among[found]).max() <= 1e-5
    return found


def is_one_of_a_kind(rows: np.ndarray) -> np.ndarray:
    """Which rows are different from all others: contexts may begin with the same tokens."""
    along = rows @ np.random.default_rng(0).normal(size=rows.shape[1])
    order = np.argsort(along)
    gaps = np.diff(along[order], prepend=-np.inf, append=np.inf)
    alone = np.empty(len(rows), bool)
    alone[order] = np.minimum(gaps[1:], gaps[:-1]) > 5e-5
    return alone


# --- lanes -----------------------------------------------------------------------------------------------------------


def in_lanes(contexts: Contexts, lanes: int, mesh: Mesh = ONE) -> LiveLanes:
    def lane_named(lane: int) -> LiveRows:
        own = replace(contexts, lane=lane, lanes=lanes)
        given: dict[str, Any] = {"seed": lane, "steps": 4000, "memory_bytes": 200 * 32 * 4, "dtype": "float32"}
        return LiveRows(own, {"x": HOOK_POINT}, batch_tokens=BATCH // lanes, **given)

    return LiveLanes(lane_named, lanes, mesh)


def test_lanes_divide_the_contexts_of_a_text(contexts: Contexts) -> None:
    def counted(of: Contexts) -> Counter[bytes]:
        return Counter(t.tobytes() for tokens, _ in of.epoch() for t in tokens)

    lanes = [counted(replace(contexts, lane=lane, lanes=4)) for lane in range(4)]
    assert sum(lanes, Counter()) == counted(contexts)
    assert min(map(len, lanes)) > 20


def test_a_rank_runs_the_model_on_its_own_lanes_alone(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together the ranks have the rows of one process, also from a step in the middle on."""
    whole = in_lanes(contexts, 4)
    steps = [0, 1, 2, 9, 10]
    expected = [whole.batch(step).x for step in steps]
    allowed = {
        t.tobytes() for lane in (2, 3) for some, _ in replace(contexts, lane=lane, lanes=4).epoch() for t in some
    }
    assert all(len(x) == BATCH for x in expected)
    parts = []
    for rank in range(2):
        mesh = Mesh()
        mesh.rank, mesh.world = rank, 2
        rows, seen = in_lanes(contexts, 4, mesh), set()
        run = contexts.model.capture_all

        def spied(tokens: Tensor, hooks: Any, run: Any = run, seen: set[bytes] = seen) -> Any:
            seen.update(t.astype(np.uint32).tobytes() for t in tokens.numpy())
            return run(tokens, hooks)

        monkeypatch.setattr(contexts.model, "capture_all", spied)
        parts.append([rows.batch(step).x for step in steps])
        monkeypatch.undo()
        assert seen
        assert seen <= allowed if rank else not seen & allowed
    for x, *of_ranks in zip(expected, *parts, strict=True):
        assert torch.equal(x, torch.cat(of_ranks))


# --- the same rows as a store ----------------------------------------------------------------------------------------


def test_an_epoch_has_the_contexts_of_a_harvest_and_no_others(contexts: Contexts, store: ActivationStore) -> None:
    harvested: Counter[tuple[bytes, bytes]] = Counter()
    for shard in store.markers(TRAIN):
        held = store.read_contexts(TRAIN, shard)
        harvested.update(
            (t.astype(np.uint32).tobytes(), k.tobytes()) for t, k in zip(held.tokens, held.keep, strict=True)
        )
    ours: Counter[tuple[bytes, bytes]] = Counter()
    for tokens, keep in contexts.epoch():
        assert tokens.size <= FORWARD_TOKENS
        ours.update((t.tobytes(), k.tobytes()) for t, k in zip(tokens, keep, strict=True))
    assert ours == harvested
    assert sum(ours.values()) > 300


def test_batches_hold_each_row_of_the_store_once_an_epoch(contexts: Contexts, store: ActivationStore) -> None:
    rows, train = live(contexts), stored_rows(store, TRAIN)
    steps = 3 * len(train) // BATCH
    seen = torch.cat([rows.batch(step).x for step in range(steps)]).numpy()
    times = np.bincount(places_in(seen, train), minlength=len(train))[is_one_of_a_kind(train)]
    assert len(times) > len(train) / 2
    assert times.max() <= 4
    assert (times != 3).sum() <= 2 * rows.plan.waiting_rows  # what waits at the end, and what came a fourth time
    assert len(train) > 5 * rows.plan.waiting_rows


def test_the_tokens_are_those_of_the_training_documents(contexts: Contexts, tiny_model: NativeModel) -> None:
    bos = tiny_model.bos_id
    ours = np.concatenate([t[k | (t == bos)] for t, k in contexts.epoch()])
    expected: Counter[int] = Counter()
    for document in made_up_documents(200):
        if split_of(document.text) == TRAIN:
            expected.update([bos, *tiny_model.tokenizer.encode(document.text, add_special_tokens=False).ids])
    padding = sum(int((~k & (t == 0)).sum()) for t, k in contexts.epoch()) - expected[bos]  # BOS is token 0
    assert Counter(ours.tolist()) - Counter({bos: padding}) == expected


# --- mixing ----------------------------------------------------------------------------------------------------------


def counting(start: int, part: int) -> Any:
    """The stream 0, 1, 2, … from `start` on, in parts."""
    while True:
        yield torch.arange(start, start + part)[:, None]
        start += part


@settings(max_examples=60, deadline=None)
@given(
    batch_rows=st.integers(1, 40),
    batches=st.integers(1, 40),
    part=st.integers(1, 200),
    start=st.integers(0, 90),
    seed=st.integers(0, 5),
)
def test_every_row_of_the_stream_goes_to_one_batch_the_same_wherever_reading_begins(
    batch_rows: int, batches: int, part: int, start: int, seed: int
) -> None:
    plan = ShufflePlan(batch_rows, min(batches, batch_rows), seed)
    whole = ShuffleBuffer(plan, 0, counting(0, 7))
    taken = [whole.take()[:, 0] for _ in range(start + 3)]
    assert all(len(batch) == batch_rows for batch in taken)
    rows = torch.cat(taken)
    assert len(rows.unique()) == len(rows)
    complete = plan.first_row(start + 4 - plan.batches)  # every row of the blocks before has had its batch
    assert set(range(complete)) <= set(rows.tolist())
    assert rows.max() < plan.first_row(start + 3)
    begun = ShuffleBuffer(plan, start, counting(plan.first_row(plan.first_block(start)), part))
    assert all(torch.equal(begun.take()[:, 0], batch) for batch in taken[start:])


def test_a_batch_has_as_many_rows_of_each_of_its_blocks() -> None:
    plan = ShufflePlan(64, 16, seed=0)
    buffer = ShuffleBuffer(plan, 40, counting(plan.first_row(plan.first_block(40)), 100))
    blocks = (buffer.take()[:, 0] - plan.waiting_rows) // 64
    assert Counter(blocks.tolist()) == dict.fromkeys(range(25, 41), 4)


def test_another_seed_shuffles_differently_and_neighbours_are_separated() -> None:
    one, other = (
        ShuffleBuffer(ShufflePlan(256, 64, seed), 100, counting(ShufflePlan(256, 64, seed).first_row(37), 512))
        for seed in (0, 1)
    )
    first, second = one.take()[:, 0], other.take()[:, 0]
    assert not torch.equal(first, second)
    together = (first.sort().values.diff() == 1).float().mean()
    assert together < 3 / 64  # 1/64 of neighbours are expected to meet


def test_mixing_equals_a_count_and_grows_with_the_buffer(contexts: Contexts) -> None:
    measured = {held: live(contexts, held_rows=held).mixing() for held in (100, 800, 6000)}
    rows = live(contexts, held_rows=800)
    context = torch.from_numpy(
        np.concatenate([np.full(k.sum(), i) for i, k in enumerate(k for _, keep in contexts.epoch() for k in keep)])
    )
    endless = context.repeat(20)[:, None]
    buffer = ShuffleBuffer(rows.plan, 0, [endless])
    batches = [buffer.take() for _ in range(rows.plan.batches + 8)][rows.plan.batches :]
    distinct = np.mean([len(batch.unique()) for batch in batches])
    picked = torch.randperm(len(context), generator=torch.Generator().manual_seed(0))
    perfect = np.mean([len(context[some].unique()) for some in picked.split(BATCH)[:-1]])
    assert measured[800] == pytest.approx(distinct / perfect, rel=0.03)
    assert measured[100] < 0.5
    assert measured[100] < measured[800] < measured[6000]
    assert measured[6000] > 0.97


# --- a pure function of the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7, 30, 700])  # 700 is in the fourth epoch
def test_a_step_gets_the_same_rows_bit_for_bit_wherever_reading_begins(contexts: Contexts, step: int) -> None:
    unbroken, begun = live(contexts), live(contexts)
    expected = [unbroken.batch(n).x for n in range(step + 3)][step:]
    assert all(torch.equal(begun.batch(step + i).x, x) for i, x in enumerate(expected))
    assert torch.equal(begun.batch(0).x, live(contexts).batch(0).x)  # and back


def test_the_buffer_stays_within_its_memory_and_no_forward_pass_is_repeated(
    contexts: Contexts, tiny_model: NativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    capture = NativeModel.capture_all

    def counted(self: NativeModel, tokens: Tensor, hooks: Any) -> Any:
        passes.append(tokens.numel())
        return capture(self, tokens, hooks)

    monkeypatch.setattr(NativeModel, "capture_all", counted)
    for held in (65, 500, 2000):
        rows = live(contexts, held_rows=held)
        passes.clear()
        for step in range(100):
            rows.batch(step)
        assert rows._buffer is not None
        assert rows._buffer._rows is not None
        assert BATCH * 32 * 4 <= rows._buffer._rows.nbytes <= max(held, BATCH) * 32 * 4
        assert rows.plan.batches == max(1, 2 * held // BATCH - 1)
        needed = rows.plan.first_row(100)
        assert needed <= sum(passes) <= 1.1 * needed + 2 * FORWARD_TOKENS  # BOS and padding are no rows


def test_a_short_run_does_not_wait_for_a_large_buffer(contexts: Contexts) -> None:
    assert live(contexts, held_rows=100_000, steps=40).plan.waiting_rows <= 40 * BATCH / 8


def test_samples_are_of_the_beginning_of_the_text_and_a_function_of_the_seed(
    contexts: Contexts, store: ActivationStore
) -> None:
    rows, train = live(contexts), stored_rows(store, TRAIN)
    sample = rows.sample(500, 1)
    rows.batch(0)
    assert torch.equal(sample, rows.sample(500, 1))
    assert not torch.equal(sample, rows.sample(500, 2))
    beginning = torch.cat(list(islice(rows._rows_from(0), 2)))[:2000].numpy()
    assert len(np.unique(places_in(sample.numpy(), beginning))) > 400
    everything = rows.sample(100_000, 0)  # more than there is
    assert len(everything) == len(train)
    places_in(train, everything.numpy())


def test_y_and_the_residual_stream_are_of_the_same_token(contexts: Contexts, tiny_model: NativeModel) -> None:
    hooks = {"x": HOOK_POINT, "y": "blocks.0.hook_mlp_out", "resid": "blocks.0.hook_resid_mid"}
    rows = live(contexts, hooks=hooks)
    batch = rows.batch(5)
    out = tiny_model.module.blocks[0].get_submodule("mlp.out")
    assert batch.y is not None
    assert batch.resid is not None
    assert (out(batch.x) - batch.y).abs().max() <= 1e-5
    assert (batch.resid.shape, rows.d_out) == ((BATCH, 16), 16)
    assert (out(rows.sample(50, 1)) - rows.sample_targets(50, 1)).abs().max() <= 1e-5


# --- refusals --------------------------------------------------------------------------------------------------------


def test_rows_that_do_not_fit_the_dtype_are_refused(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = NativeModel.capture_all
    monkeypatch.setattr(
        NativeModel, "capture_all", lambda self, t, h: {k: v * 1e6 for k, v in capture(self, t, h).items()}
    )
    with pytest.raises(LiveError, match="float16.*float32"):
        live(contexts, dtype="float16").batch(0)
    assert live(contexts, dtype="float32").batch(0).x.max() > 65504
    with pytest.raises(LiveError, match="one of float16, bfloat16, float32; got 'int8'"):
        live(contexts, dtype="int8")


def test_a_text_of_held_out_documents_alone_is_refused(tiny_model: NativeModel) -> None:
    documents = [d for d in made_up_documents(200) if d.split == HELD_OUT]
    rows = live(Contexts(tiny_model, text_source(documents), SEQ_LEN))
    for call in (lambda: rows.batch(0), lambda: rows.sample(5, 0)):
        with pytest.raises(LiveError, match="no training text"):
            call()


# --- the verb --------------------------------------------------------------------------------------------------------


def training(model: object, text: object, out: Path) -> list[str]:
    return [
        "train",
        "--live",
        str(model),
        "--text",
        str(text),
        "--out",
        str(out),
        "--recipe",
        "towards-monosemanticity",
        "--d-sae",
        "96",
        "--tokens",
        str(600 * 256),
        "--batch-tokens",
        "256",
        "--set",
        "l1=60",
        "--set",
        "lr=0.01",
    ]


def test_killed_and_repeated_it_ends_in_the_same_bytes(
    tiny_model_dir: Path, tiny_text: Path, tmp_path: Path, rng: random.Random
) -> None:
    """Killed twice at random; the runs resample (sample rows in the main thread while the next batch is made)."""
    commands = Commands(tmp_path / "sae.log")
    whole, out = tmp_path / "whole", tmp_path / "sae"
    assert commands.run(*training(tiny_model_dir, tiny_text, whole)) == 0
    command = training(tiny_model_dir, tiny_text, out)
    for earliest, latest in ((30, 130), (200, 400)):
        wanted = rng.randrange(earliest, latest)
        status = commands.stop(
            signal.SIGKILL,
            lambda n=wanted: saved_step(out) >= n,
            *command,
            save_minutes=0,
            after_s=rng.random() * 0.004,
        )
        assert status == -signal.SIGKILL
    assert commands.run(*command) == 0
    assert logged_steps(out)[-1] == 600
    assert_same_dictionary(out, whole)


def test_another_text_is_refused_on_resume_and_a_store_can_be_made_to_measure_it(
    tiny_model_dir: Path, tiny_text: Path, tiny_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "live"
    model = str(tiny_model_dir)
    options: dict[str, Any] = {"recipe": "topk", "d_sae": 64, "tokens": 20_000, "config": {"batch_tokens": 256, "k": 4}}
    trained = sae.train(sae.Live(model, tiny_text), out, **options)
    live_config = trained.config["live"]
    assert (trained.config["model"]["id"], trained.config["hook_point"]) == (model, HOOK_POINT)
    assert live_config["text_sha256"] == open_text(tiny_text).fingerprint
    with pytest.raises(ValueError, match="text_sha256"):
        sae.train(sae.Live(model, text_source(made_up_documents(50))), out, **options)
    wanted = f"trained live(?s:.*)sae harvest --model {model} --text {tiny_text}(?s:.*)--acts"
    for measure in (sae.evaluate, sae.index):
        with pytest.raises(PipelineError, match=wanted):
            measure(out)
    result = sae.evaluate(out, store=tiny_store)
    assert result["metrics"]["fvu"]["value"] < 1
    assert sae.index(out, store=tiny_store, tokens=2000).is_dir()


def test_the_model_uses_its_own_matrix_products_whatever_the_steps_use(
    tiny_model: NativeModel, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's choice of products holds for the whole process, and the next batch is made while a step runs."""
    found: list[str] = []
    capture = NativeModel.capture_all

    def looked(*arguments: Any) -> dict[str, Tensor]:
        found.append(torch.get_float32_matmul_precision())
        rows = capture(*arguments)
        found.append(torch.get_float32_matmul_precision())
        return rows

    monkeypatch.setattr(NativeModel, "capture_all", looked)
    config = {"batch_tokens": 2048, "k": 4, "matmul": "bf16"}
    sae.train(sae.Live(tiny_model, tiny_text), tmp_path / "o", recipe="topk", d_sae=512, tokens=100_000, config=config)
    assert len(found) > 30
    assert set(found) == {"highest"}


def test_a_transcoder_learns_live(tiny_model_dir: Path, tiny_text: Path, tmp_path: Path) -> None:
    trained = sae.train(
        sae.Live(str(tiny_model_dir), tiny_text),
        tmp_path / "t",
        recipe="transcoder",
        d_sae=64,
        tokens=5120,
        config={"batch_tokens": 256},
        hook_point=HOOK_POINT,
        target_hook_point="blocks.0.hook_mlp_out",
    )
    assert (trained.d_in, trained.d_out) == (32, 16)
    assert trained.config["target_hook_point"] == "blocks.0.hook_mlp_out"
    with pytest.raises(PipelineError, match="name a second hook point"):
        sae.train(sae.Live(str(tiny_model_dir), tiny_text), tmp_path / "u", recipe="transcoder", tokens=5120)


@pytest.mark.parametrize(
    "arguments", ["--acts A --live M --text T", "--live M", "--text T", "--acts A --text T", ""], ids=str
)
def test_rows_come_from_one_place(arguments: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--out", str(tmp_path / "o"), *arguments.split()]) == 2
    assert "--acts STORE, or --live MODEL with --text SOURCE" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_buffer_lives_there(tiny_model_dir: Path, source: TextSource) -> None:
    model = NativeModel(tiny_model_dir, "tiny", "cuda")
    rows = live(Contexts(model, source, SEQ_LEN))
    assert rows.batch(0).x.device.type == "cuda"
    assert rows._buffer is not None
    assert rows._buffer._rows is not None
    assert rows._buffer._rows.device.type == "cuda"
