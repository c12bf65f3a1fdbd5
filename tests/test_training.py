"""Training: planted dictionaries are found, dead features revived, an interrupted run ends as an unbroken one."""

from __future__ import annotations

import json
import re
import signal
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import load
from sae.dictionary.sites import Site
from sae.jobs.checkpoint import read_tensors
from sae.jobs.progress import Interrupted
from sae.kernels import choose, matmul
from sae.training import loop
from sae.training import state as training_state
from sae.training import step as training_step
from sae.training.config import TrainConfig
from sae.training.loop import train
from sae.training.recipes import RECIPES, resolve
from sae.training.rows import BATCHES_AHEAD, Batch, ModelRows, TargetRows
from sae.training.sparsity_penalty import LambdaController
from sae.training.state import TrainState

N_TRUE, D_IN, D_OUT, BATCH = 24, 16, 10, 256


class Planted:
    """Rows that are sparse sums of known directions; `batch` and `sample` are functions of their seeds alone."""

    def __init__(self, *, batch_tokens: int = BATCH, seed: int = 0, size: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(N_TRUE, D_IN, generator=generator)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.to_y = torch.randn(D_IN, D_OUT, generator=generator)
        self.to_logits = torch.randn(D_IN, 7, generator=generator) / size
        self.d_in, self.d_out, self.batch_tokens, self.size = D_IN, D_OUT, batch_tokens, size
        self.sites = [Site("first", 6, 0.5), Site("second", D_IN - 6, 2.0)]  # as a crosscoder sees them
        self.bad_step: int | None = None
        self.before_batch: Callable[[int], None] = lambda step: None
        self.samples: list[tuple[int, int]] = []

    def draw(self, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        on = torch.rand(n, N_TRUE, generator=generator) < 0.08
        return self.size * (on * (0.5 + torch.rand(n, N_TRUE, generator=generator))) @ self.directions

    def batch(self, step: int) -> Batch:
        self.before_batch(step)
        x = self.draw(self.batch_tokens, 1_000_000 + step)
        if step == self.bad_step:
            x[0, 0] = torch.nan
        return Batch(x, self.target(x), x[:, :7] / self.size)

    def sample_targets(self, n: int, seed: int) -> Tensor:
        return self.target(self.draw(min(n, 4096), seed))

    def target(self, x: Tensor) -> Tensor:
        # In float64, so that the float32 result is the same whatever a small product's order of summing is in a thread.
        return (x.double() @ self.to_y.double()).relu().float()

    def downstream(self, x: Tensor, resid: Tensor) -> Tensor:
        """A stand-in for the rest of a model: logits."""
        return resid + x @ self.to_logits

    def sample(self, n: int, seed: int) -> Tensor:
        self.samples.append((n, seed))
        return self.draw(min(n, 4096), seed)


def small(recipe: str = "topk", steps: int = 60, **overrides: object) -> TrainConfig:
    """A quick run; with L1, so steep that features die and are resampled at steps 12, 18 and 24."""
    numbers = {"d_sae": 40, "tokens": 32 * steps, "batch_tokens": 32}
    if "k" in RECIPES[recipe].settings:
        numbers |= {"k": 3, "lr": 3e-3}
    elif RECIPES[recipe].coefficient == "l1":
        numbers |= {"l1": {"end-to-end": 0.3, "gated": 30.0, "p-anneal": 10.0}.get(recipe, 3.0), "lr": 3e-2}
    return resolve(recipe, **numbers | overrides)[1]


def rows() -> Planted:
    return Planted(batch_tokens=32)


def log_of(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("rows_per_s", "stall_share")} for line in lines]


def mean_max_cosine(truth: Tensor, learned: Tensor) -> float:
    return float((truth @ torch.nn.functional.normalize(learned, dim=1).T).max(1).values.mean())


# --- recovery and revival --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "steps", "overrides"),
    [("topk", 450, {"k": 3}), ("towards-monosemanticity", 900, {"l1": 1.0})],
    ids=["topk", "tm"],
)
def test_a_planted_dictionary_is_recovered(tmp_path: Path, recipe: str, steps: int, overrides: dict) -> None:
    """24 directions in 16 dimensions, 2 on at a time. A random dictionary of this size has an MMCS of about 0.5."""
    planted = Planted(size=7.0)
    _, config = resolve(recipe, d_sae=32, tokens=BATCH * steps, batch_tokens=BATCH, lr=3e-3, **overrides)
    sae = train(planted, tmp_path, config)
    assert mean_max_cosine(planted.directions, torch.randn(32, D_IN)) < 0.65
    assert mean_max_cosine(planted.directions, sae.W_dec) > 0.95
    x = planted.draw(2000, 5)
    fvu = ((x - sae(x)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert fvu < 0.15
    # and in the units of the rows: an active direction comes back with about its own size
    alone = planted.size * planted.directions
    assert 0.5 < (sae.encode(alone).amax(1) / planted.size).median() < 1.3


def with_dead(state: TrainState, n: int) -> None:
    """Encoder biases so low that the first n features cannot fire."""
    with torch.no_grad():
        state.sae.b_enc[:n] = -50.0


def dead_at_the_end(sae: SAE, planted: Planted) -> int:
    return int((sae.encode(planted.draw(5000, 77)) > 0).any(0).logical_not().sum())


def test_resampling_revives_dead_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, start = rows(), loop.start

    def start_half_dead(*args: object) -> TrainState:
        state = start(*args)  # type: ignore[arg-type]
        with_dead(state, 20)
        return state

    monkeypatch.setattr(loop, "start", start_half_dead)
    config = small("towards-monosemanticity", steps=300, l1=0.5, lr=3e-3)
    revived = train(planted, tmp_path / "on", config)
    recipe = replace(loop.recipe_named(config.recipe), resample=None)
    monkeypatch.setattr(loop, "recipe_named", lambda _: recipe)
    left = train(planted, tmp_path / "off", config)
    assert dead_at_the_end(left, planted) >= 20
    assert dead_at_the_end(revived, planted) <= 3


def test_aux_k_revives_dead_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, start = rows(), loop.start

    def start_half_dead(*args: object) -> TrainState:
        state = start(*args)  # type: ignore[arg-type]
        with torch.no_grad():
            state.sae.b_enc[:20] = -2.5  # rarely positive, so that AuxK can change them
        return state

    monkeypatch.setattr(loop, "start", start_half_dead)
    config = small("topk", steps=300, dead_tokens=640, lr=1e-3, decay_share=0.2, resample_shares=())
    on = dead_at_the_end(train(planted, tmp_path / "on", config), planted)
    off = dead_at_the_end(train(planted, tmp_path / "off", replace(config, aux_coefficient=0.0)), planted)
    assert off >= 13
    assert on <= off - 3


# --- resampling in the loop ------------------------------------------------------------------------------------------


def test_silent_features_are_resampled_at_the_configured_steps_and_logged(tmp_path: Path, monkeypatch) -> None:
    """The test records each feature's last firing itself and checks the resampling events against it."""
    config = small("towards-monosemanticity", steps=100)
    planted, last_fired, events = rows(), np.zeros(config.d_sae, int), []
    recipe = RECIPES[config.recipe]
    step_of, restart = training_step.train_step, recipe.resample

    def watched_step(state, batch, *args):
        acts = state.sae.encode(batch.x * state.scale)
        last_fired[(acts > 0).any(0).numpy()] = state.step + 1
        found = step_of(state, batch, *args)
        watched_step.now = state.step
        return found

    def watched_resample(sae, optimizer, dead, sample, losses, generator):
        x_hat = (((sample - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()) @ sae.W_dec + sae.b_dec
        f = ((sample - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
        exact = ((sample - x_hat) ** 2).sum(1) + config.l1 * f.sum(1)
        torch.testing.assert_close(losses, exact, rtol=1e-4, atol=1e-4)
        window = config.resample_window_steps
        silent = [i for i, last in enumerate(last_fired) if watched_step.now - last >= window]
        assert dead.tolist() == silent
        chosen = restart(sae, optimizer, dead, sample, losses, generator)
        events.append({"step": watched_step.now, "features": silent, "sample_rows": chosen.tolist()})
        last_fired[silent] = watched_step.now  # a revived feature gets a whole window to fire in
        return chosen

    monkeypatch.setattr(loop, "train_step", watched_step)
    monkeypatch.setitem(RECIPES, recipe.name, replace(recipe, resample=watched_resample))
    planted.samples.clear()
    sae = train(planted, tmp_path, config)
    assert {e["step"] for e in events} <= set(config.resample_steps) == {10, 20, 30, 40}
    assert len(events) >= 2
    assert all(n == config.resample_rows for n, _ in planted.samples[1:])
    assert len({seed for _, seed in planted.samples}) == len(planted.samples)  # another subset each time
    logged = [json.loads(line) for line in (tmp_path / "resampled.jsonl").read_text().splitlines()]
    assert [(line["step"], line["feature"], line["parent_row"]) for line in logged] == [
        (e["step"], feature, row) for e in events for feature, row in zip(e["features"], e["sample_rows"], strict=True)
    ]
    assert all(line["silent_tokens"] >= config.resample_window_steps * 32 for line in logged)
    counts = [{"step": e["step"], "features": len(e["features"])} for e in events]
    assert sae.config["resample_events"] == counts
    # a header is limited to 100 MB, so the state only counts the features of each event
    assert read_tensors(tmp_path / "state.safetensors")[1]["resampled"] == counts


def test_a_feature_silent_one_step_less_than_the_window_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("towards-monosemanticity", steps=100)
    state = training_state.start(rows(), config, loop.recipe_named(config.recipe), choose())
    window = config.resample_window_steps * config.batch_tokens
    state.tokens_since_fired[:3] = torch.tensor([window - 32, window, window + 32])
    before = state.sae.W_dec.detach().clone()
    training_step.resample_dead(state, rows(), config, loop.recipe_named(config.recipe))
    changed = (state.sae.W_dec.detach() != before).any(1).nonzero().squeeze(1).tolist()
    assert changed == [1, 2]
    assert state.tokens_since_fired[:3].tolist() == [window - 32, 0, 0]


def test_exact_uses_the_papers_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(small("towards-monosemanticity", steps=100), exact=True)
    planted = rows()
    state = training_state.start(planted, config, loop.recipe_named(config.recipe), choose())
    state.tokens_since_fired[5] = 12_500 * 32
    state.tokens_since_fired[6] = 12_500 * 32 - 32
    training_step.resample_dead(state, planted, config, loop.recipe_named(config.recipe))
    assert planted.samples[-1][0] == 819_200
    assert [e["features"] for e in state.resampled] == [1]
    assert state.tokens_since_fired[5:7].tolist() == [0, 12_500 * 32 - 32]


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-2, 1.0, 300.0])
def test_the_input_scale_is_folded_into_what_is_saved(tmp_path: Path, size: float) -> None:
    planted = Planted(batch_tokens=32, size=size)
    sae = train(planted, tmp_path, small("towards-monosemanticity", steps=20))
    tensors, header = read_tensors(tmp_path / "state.safetensors")
    sample = planted.draw(4096, 0).double()
    assert header["scale"] ** 2 * float((sample**2).sum(1).mean()) == pytest.approx(D_IN, rel=1e-6)
    unfolded = SAE(D_IN, 40)
    unfolded.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("sae.")})
    x, s = planted.draw(50, 3), header["scale"]
    torch.testing.assert_close(sae.encode(x), unfolded.encode(s * x) / s, rtol=1e-4, atol=1e-5 * size)
    torch.testing.assert_close(sae(x), unfolded(s * x) / s, rtol=1e-4, atol=1e-5 * size)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40), rtol=0, atol=1e-6)
    again = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True))


def test_training_does_not_depend_on_the_units_of_the_rows(tmp_path: Path) -> None:
    """A power of two changes no bit of a float's mantissa: the same weights, the biases in the other unit."""
    config = small("towards-monosemanticity", steps=30)
    one = train(Planted(batch_tokens=32), tmp_path / "1", config)
    four = train(Planted(batch_tokens=32, size=4.0), tmp_path / "4", config)
    assert torch.equal(one.W_dec, four.W_dec)
    assert torch.equal(one.b_enc * 4, four.b_enc)
    assert torch.equal(one.b_dec * 4, four.b_dec)


def test_lambda_is_recorded_in_every_convention(tmp_path: Path) -> None:
    """The gradients of the raw losses, with the recorded λ, are those of the scaled loss up to one factor."""
    planted = Planted(batch_tokens=32, size=7.0)
    sae = train(planted, tmp_path, small("towards-monosemanticity", steps=20))
    recorded, s = sae.config["lambda"], sae.config["input_scale"]
    assert recorded["scaled"] == 3.0
    x = planted.draw(64, 9).double()
    directions = {}
    for convention in ("scaled", "raw", "raw_mean_squared"):
        twin = SAE(D_IN, 40).double()
        twin.load_state_dict(sae.state_dict())
        W_enc, b_enc, W_dec, b_dec = (twin.get_parameter(n) for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
        f = ((x - b_dec) @ W_enc + b_enc).relu()
        error = (x - f @ W_dec - b_dec) ** 2
        if convention == "scaled":  # the loss training minimised, written in the folded parameters
            loss = (s**2 * error).sum(1).mean() + recorded["scaled"] * (s * f).sum(1).mean()
        elif convention == "raw":
            loss = error.sum(1).mean() + recorded["raw"] * f.sum(1).mean()
        else:
            loss = error.mean() + recorded["raw_mean_squared"] * f.sum(1).mean()
        grads = torch.autograd.grad(loss, (W_enc, b_enc, W_dec, b_dec))
        directions[convention] = torch.cat([g.flatten() for g in grads])
    for convention, factor in (("raw", s**2), ("raw_mean_squared", s**2 * D_IN)):
        torch.testing.assert_close(directions["scaled"], factor * directions[convention], rtol=1e-9, atol=1e-12)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for recipe in RECIPES:
        found[recipe] = tmp_path_factory.mktemp("unbroken") / recipe
        sae = train(rows(), found[recipe], small(recipe))
        if RECIPES[recipe].resample:
            assert sae.config["resample_events"], recipe  # so that resuming is shown across real events
    return found


def assert_same_run(out: Path, reference: Path) -> None:
    for name in ("sae.safetensors", "state.safetensors", "config.json", "train.json", "resampled.jsonl"):
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    assert log_of(out) == log_of(reference)


# So far apart that no stop has been read before: a run may have read this many steps ahead of the one it is in when the
# signal reaches it, and one more after it.
APART_STEPS = BATCHES_AHEAD + 4
APART = st.tuples(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True), st.integers(0, 6)).map(
    lambda drawn: [APART_STEPS * n + drawn[1] for n in drawn[0]]
)


@given(recipe=st.sampled_from(list(RECIPES)), stops=APART)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(unbroken: dict, recipe: str, stops: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out, source, seen = Path(folder) / "run", rows(), []
        for stop in sorted(stops):

            def signal_at(step: int, stop: int = stop) -> None:
                again = step in seen
                seen.append(step)
                if step == stop and not again:
                    signal.raise_signal(signal.SIGUSR1 if step % 2 else signal.SIGTERM)

            source.before_batch = signal_at
            with pytest.raises(Interrupted, match=r"stopped at step \d+ of 60"):
                train(source, out, small(recipe))
            assert not (out / "sae.safetensors").exists()
        train(source, out, small(recipe))
        assert sorted(set(seen)) == list(range(60))  # no step is left out; prefetched steps are read again
        assert_same_run(out, unbroken[recipe])


class PowerCut(BaseException):
    pass


@given(recipe=st.sampled_from(list(RECIPES)), cut=st.integers(0, 59), every_step=st.booleans())
@settings(max_examples=8, deadline=None)
def test_cut_off_anywhere_it_ends_with_the_same_bytes(unbroken: dict, recipe: str, cut: int, every_step: bool) -> None:
    """Cut off without warning: steps that were not saved are repeated, after their log lines are dropped."""
    with tempfile.TemporaryDirectory() as folder:
        out, source = Path(folder) / "run", rows()

        def fail(step: int) -> None:
            if step == cut:
                raise PowerCut

        source.before_batch = fail
        save_minutes = 0.0 if every_step else 60.0
        with pytest.raises(PowerCut):
            train(source, out, small(recipe), save_minutes=save_minutes)
        assert (out / "state.safetensors").exists() == (every_step and cut > 0)
        with (out / "metrics.jsonl").open("a") as log:
            log.write('{"step": 59, "loss"')  # torn
        train(rows(), out, small(recipe), save_minutes=save_minutes)
        assert_same_run(out, unbroken[recipe])


@pytest.mark.filterwarnings("ignore:.*L0 3 was asked for:UserWarning")  # 20 steps are too few to find λ
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_at_any_step_every_recipe_ends_with_the_same_bytes(tmp_path: Path, recipe: str) -> None:
    """The state saved at each step, and cuts before, right after and well after a resampling, while λ is searched."""
    config = small(recipe, steps=20, target_l0=3)
    train(rows(), tmp_path / "whole", config)
    source, cuts = rows(), [1, 9, 15]

    def fail(step: int) -> None:
        if cuts and step == cuts[0]:
            cuts.pop(0)
            raise PowerCut

    source.before_batch = fail
    for _ in range(3):
        with pytest.raises(PowerCut):
            train(source, tmp_path / "cut", config, save_minutes=0)
    train(source, tmp_path / "cut", config)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_earlier_states_are_kept_if_asked(tmp_path: Path) -> None:
    train(rows(), tmp_path, small(steps=10), save_minutes=0, keep=3)
    kept = sorted(p.name for p in tmp_path.glob("state*.safetensors"))
    assert kept == ["state-000000008.safetensors", "state-000000009.safetensors", "state.safetensors"]
    assert read_tensors(tmp_path / kept[0])[1]["step"] == 8
    (tmp_path / kept[0]).rename(tmp_path / "state.safetensors")  # an earlier state is restored by renaming it
    (tmp_path / "sae.safetensors").unlink()
    train(rows(), tmp_path, small(steps=10))
    train(rows(), tmp_path / "whole", small(steps=10))
    assert (tmp_path / "sae.safetensors").read_bytes() == (tmp_path / "whole" / "sae.safetensors").read_bytes()


@pytest.mark.parametrize("began_with", ["medium", "highest", "bf16"])
def test_a_resumed_run_keeps_its_matrix_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began_with: str
) -> None:
    """Another machine may choose another back end at the second start; the run keeps the one it recorded."""
    used, using = [], matmul.using

    def noted(name: str) -> object:
        used.append(name)
        return using(name)

    config = small("towards-monosemanticity", matmul="bf16" if began_with == "bf16" else "auto")
    monkeypatch.setattr(matmul, "choose", lambda name, device="cpu": began_with)
    monkeypatch.setattr(matmul, "_medium_is_float32", lambda: True)  # where it is not, the run goes on with `highest`
    monkeypatch.setattr(matmul, "using", noted)
    source = rows()
    source.before_batch = lambda step: signal.raise_signal(signal.SIGTERM) if step == 20 else None
    with pytest.raises(Interrupted):
        train(source, tmp_path / "sae", config)
    assert began_with in used
    used.clear()
    monkeypatch.setattr(matmul, "choose", lambda name, device="cpu": "highest")
    sae = train(rows(), tmp_path / "sae", config)
    assert began_with in used
    assert sae.config["matmul"] == began_with


def test_a_finished_run_stays_as_it_is(unbroken: dict[str, Path]) -> None:
    out = unbroken["topk"]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    source = rows()
    source.before_batch = lambda step: pytest.fail("nothing is left to do")
    train(source, out, small("topk"))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_other_settings_are_refused_and_no_file_changes(unbroken: dict[str, Path]) -> None:
    out = unbroken["topk"]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for other, message in (
        (small("topk", seed=1), r"train\.seed is 0 there, 1 asked for"),
        (small("topk", steps=61), r"train\.tokens is 1920 there, 1952 asked for"),
        (small("towards-monosemanticity"), r"train\.recipe is 'topk' there"),
    ):
        with pytest.raises(ValueError, match=message):
            train(rows(), out, other)
    with pytest.raises(ValueError, match="rows.*other"):
        train(rows(), out, small("topk"), provenance={"store": "other"})
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize(("asked", "warned"), [(0.0, False), (12.0, True)])
def test_a_missed_target_l0_is_reported(tmp_path: Path, asked: float, warned: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(rows(), tmp_path, small("towards-monosemanticity", steps=4, target_l0=asked))
    said = [str(entry.message) for entry in caught if "was asked for" in str(entry.message)]
    assert bool(said) == warned
    if warned:
        assert re.search(r"L0 12 was asked for; the search for λ ended at [\d.]+ in 4 steps", said[0])


@pytest.mark.parametrize(("l0", "missed"), [(3.59, False), (3.61, True), (2.51, False), (2.49, True)])
def test_an_l0_is_missed_by_more_than_a_fifth(l0: float, missed: bool) -> None:
    config = small("towards-monosemanticity", target_l0=3.0)
    assert bool(LambdaController(config, 1.0, mean_l0=l0).missed_target()) == missed


def test_a_run_begun_before_a_setting_was_known_continues_as_it_began(tmp_path: Path) -> None:
    """Its settings lack what was added later; it was begun with the default, and another value is refused."""
    for recipe in ("topk", "jumprelu"):
        train(rows(), tmp_path / recipe, small(recipe, threshold_lr_ratio=1.0))
        claimed = json.loads((tmp_path / recipe / "train.json").read_text())
        del claimed["train"]["threshold_lr_ratio"]
        (tmp_path / recipe / "train.json").write_text(json.dumps(claimed))
        train(rows(), tmp_path / recipe, small(recipe, threshold_lr_ratio=1.0))
    with pytest.raises(ValueError, match=r"train\.threshold_lr_ratio is 1\.0 there, 16\.0 asked for\. Repeat"):
        train(rows(), tmp_path / "jumprelu", small("jumprelu", threshold_lr_ratio=16.0))


def test_settings_at_their_defaults_may_be_absent(tmp_path: Path) -> None:
    """A setting that a later version adds has its default in earlier runs, also where the default is a list."""
    config = small("towards-monosemanticity", resample_shares=())
    train(rows(), tmp_path, config)
    path = tmp_path / "train.json"
    claimed = json.loads(path.read_text())
    defaults = json.loads(json.dumps(TrainConfig().to_dict()))
    claimed["train"] = {name: value for name, value in claimed["train"].items() if value != defaults[name]}
    assert {"k", "prefix_shares", "resample_shares", "exact"}.isdisjoint(claimed["train"])
    path.write_text(json.dumps(claimed))
    train(rows(), tmp_path, config)
    with pytest.raises(ValueError, match=r"train\.resample_shares is .* there, \[0\.5\] asked for"):
        train(rows(), tmp_path, replace(config, resample_shares=(0.5,)))


class PlainRows:
    """The three members of `Rows` and no more."""

    d_in = D_IN

    def batch(self, step: int) -> Batch:
        return Batch(rows().batch(step).x)

    def sample(self, n: int, seed: int) -> Tensor:
        return rows().sample(n, seed)


def test_rows_need_only_three_members_unless_a_recipe_asks_for_more(tmp_path: Path) -> None:
    train(PlainRows(), tmp_path / "topk", small("topk", steps=3))
    for recipe, message in (("transcoder", "these rows have no y"), ("end-to-end", "these rows bring no model to run")):
        with pytest.raises(ValueError, match=message):
            train(PlainRows(), tmp_path / recipe, small(recipe, steps=3))
    assert isinstance(rows(), TargetRows)
    assert isinstance(rows(), ModelRows)
    assert not isinstance(PlainRows(), TargetRows | ModelRows)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_seed_decides_the_run(tmp_path: Path, unbroken: dict[str, Path], recipe: str) -> None:
    again = train(rows(), tmp_path / "again", small(recipe))
    assert_same_run(tmp_path / "again", unbroken[recipe])
    other = train(rows(), tmp_path / "other", small(recipe, seed=1))
    assert not torch.equal(again.W_dec, other.W_dec)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_targets_that_are_not_finite_are_named_as_the_cause() -> None:
    config = small("transcoder")
    state = training_state.start(rows(), config, RECIPES["transcoder"], choose("reference", "cpu"))
    batch = rows().batch(0)
    assert batch.y is not None
    batch.y[3, 2] = torch.nan
    with pytest.raises(ValueError, match="rows of this batch are not finite"):
        training_step.train_step(state, batch, config)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad_step", [0, 4, 5, 30, 59])
def test_rows_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(
    tmp_path: Path, unbroken: dict[str, Path], recipe: str, bad_step: int
) -> None:
    source = rows()
    source.bad_step = bad_step
    with pytest.raises(
        ValueError, match=f"the loss is nan at step {bad_step + 1}[.].*rows of this batch are not finite"
    ):
        train(source, tmp_path, small(recipe), save_minutes=0)
    assert not (tmp_path / "sae.safetensors").exists()
    if bad_step:
        tensors, header = read_tensors(tmp_path / "state.safetensors")
        assert header["step"] == bad_step
        assert all(t.isfinite().all() for t in tensors.values())
    # with the rows repaired, the same call continues and ends as an unbroken run does
    train(rows(), tmp_path, small(recipe), save_minutes=0)
    assert_same_run(tmp_path, unbroken[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bad_row_between_two_log_lines_is_noticed_at_its_step(tmp_path: Path, recipe: str) -> None:
    source = rows()
    source.bad_step = 13
    with pytest.raises(ValueError, match="the loss is nan at step 14"):
        train(source, tmp_path, small(recipe))
    assert not (tmp_path / "state.safetensors").exists()


def test_rows_that_are_all_zero(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every sampled activation is zero; is the hook point right"):
        train(Planted(size=0.0), tmp_path, small())


def test_one_row_per_batch_and_its_log_is_json(tmp_path: Path) -> None:
    """A batch of one has no variance; the log must stay JSON (no NaN, no Infinity)."""
    train(Planted(batch_tokens=1), tmp_path, small(steps=960, tokens=40, batch_tokens=1))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_the_lines_of_the_log(tmp_path: Path) -> None:
    config = small("topk")
    train(rows(), tmp_path, config)
    log = log_of(tmp_path)
    assert [line["step"] for line in log] == [25, 50, 60]
    assert [line["rows"] for line in log] == [25 * 32, 50 * 32, 60 * 32]
    for line in log:
        assert 0 < line["l0"] <= 3
        assert 0 < line["fvu"] < 2
        assert 0 <= line["dead_share"] <= 1
        assert 0 < line["lr"] <= config.lr
    # one step before the end of a linear decay
    assert log[-1]["lr"] == pytest.approx(config.lr / (config.decay_share * 60))


def test_a_state_without_its_settings_is_refused(tmp_path: Path) -> None:
    """A run whose directory is deleted while it trains writes its last state there again: no run may resume from it."""
    (tmp_path / "state.safetensors").write_bytes(b"of a run that is gone")
    _, config = resolve("topk", d_sae=16, k=2, tokens=640, batch_tokens=64)
    with pytest.raises(ValueError, match=r"holds the state of a run but not its settings \(train\.json\)"):
        train(Planted(), tmp_path, config)
    assert not (tmp_path / "train.json").exists()
