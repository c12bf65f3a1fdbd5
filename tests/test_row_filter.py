"""The row filter: one rule for training, evaluation, index, live rows; figures with and without outliers.

The model is a GPT-2 with a sink at position 0, harvested by the old rule (contexts that begin anywhere), so that one
row in 32 has a norm of many medians. Figures are computed again in float64 from the store's rows, losses by
`transformers`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FewRows, made_up_documents, text_source
from hypothesis import given
from hypothesis import strategies as st

from sae import pipeline
from sae.cli.tables import eval_table
from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import load, save
from sae.dictionary.outliers import outliers_among
from sae.lm import LanguageModel, load_model
from sae.pipeline.live import live_rows
from sae.pipeline.rows import StoreRows, training_view
from sae.training.config import TrainConfig, parsed
from store.activations import ActivationStore
from store.common import HELD_OUT, SPLITS, TRAIN, RowFilter, StoreError
from store.features import FeatureIndex
from store.filtered import FilteredStore, median_norm

HOOK, SEQ_LEN, FULL_STOP = "blocks.1.hook_resid_post", 32, 14
ALL = {"max_norm_multiple": 10.0, "skip_positions": 2, "skip_token_ids": (FULL_STOP, 33)}
Rows = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def model(model_with_sink: tuple[Path, Any]) -> LanguageModel:
    return load_model(model_with_sink[0])


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def store(model: LanguageModel, said: list[str], tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("acts") / "acts.zarr"
    pipeline.harvest(
        model,
        text_source(made_up_documents(2000)),
        out,
        tokens=8192,
        heldout_tokens=8192,
        dtype="float32",
        hook_points=[HOOK],
        context_bos=False,
        report=said.append,
    )
    return ActivationStore.open(out)


def read(store: ActivationStore, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows [n, pos, d_in] in float64, tokens and keep [n, pos] of a split, from the store without a filter."""
    shards = [shard for shard, marker in store.markers(split).items() if marker.contexts]
    contexts = [store.read_contexts(split, shard) for shard in shards]
    x = np.concatenate([store.read_acts(split, shard, HOOK) for shard in shards]).astype(np.float64)
    tokens = np.concatenate([c.tokens for c in contexts])
    return x.reshape(*tokens.shape, -1), tokens, np.concatenate([c.keep for c in contexts])


def by_hand(store: ActivationStore, split: str, settings: dict[str, Any]) -> np.ndarray:
    """The rows that count [n, pos], one at a time."""
    skipped, ids = settings.get("skip_positions", 0), settings.get("skip_token_ids", ())
    multiple = settings.get("max_norm_multiple", 0)
    x, tokens, keep = read(store, split)
    median = np.inf
    if multiple:
        train, its_tokens, its_keep = read(store, TRAIN)
        ordinary = [
            np.sqrt((train[c, p] ** 2).sum())
            for c, p in np.argwhere(its_keep)
            if p >= skipped and its_tokens[c, p] not in ids
        ]
        median = float(np.median(ordinary))
    found = np.zeros(keep.shape, bool)
    for c, p in np.argwhere(keep):
        small = not multiple or np.sqrt((x[c, p] ** 2).sum()) <= multiple * median
        found[c, p] = p >= skipped and tokens[c, p] not in ids and small
    return found


SETTINGS = [{"max_norm_multiple": 10.0}, {"skip_positions": 1}, {"skip_token_ids": (FULL_STOP,)}, ALL]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_filtered_store_keeps_the_rows_that_the_rule_says(store: ActivationStore, settings: dict[str, Any]) -> None:
    seen = training_view(store, HOOK, TrainConfig(**settings))
    for split in SPLITS:
        wanted = by_hand(store, split, settings)
        x, tokens, keep = read(store, split)
        found = read(seen, split)  # type: ignore[arg-type]
        assert np.array_equal(found[2], wanted)
        assert np.array_equal(found[0], x)
        assert np.array_equal(found[1], tokens)
        assert 0 < wanted.sum() < keep.sum()
        totals = seen.totals(split, HOOK)
        assert totals.kept_rows == wanted.sum()
        np.testing.assert_allclose(totals.mean, x[wanted].mean(0), rtol=1e-9, atol=1e-12)
        assert totals.mean_sq_norm == pytest.approx((x[wanted] ** 2).sum(1).mean())


def test_without_settings_nothing_changes(store: ActivationStore) -> None:
    assert training_view(store, HOOK, TrainConfig()) is store
    assert RowFilter.of_json(None).is_off
    recorded = {"skip_positions": 1, "skip_token_ids": [3], "max_norm_multiple": 5.0, "median_norms": {HOOK: 2.0}}
    assert RowFilter.of_json(recorded).to_json() == recorded
    assert RowFilter.of_json(recorded).max_norms == {HOOK: 10.0}


def test_an_epoch_of_training_rows_is_every_row_that_counts_once(store: ActivationStore) -> None:
    x, _, _ = read(store, TRAIN)
    wanted = by_hand(store, TRAIN, ALL)
    n = int(wanted.sum())
    rows = StoreRows(training_view(store, HOOK, TrainConfig(**ALL)), HOOK, batch_tokens=n, seed=0)
    assert rows.n_rows == n
    ours, theirs = rows.batch(0).x.numpy(), x[wanted].astype(np.float32)
    assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_the_median_is_of_rows_that_positions_and_tokens_leave(store: ActivationStore) -> None:
    with pytest.raises(StoreError, match="leaves no training row"):
        median_norm(store, HOOK, RowFilter(skip_positions=SEQ_LEN))


@given(st.integers(0, 4), st.sets(st.integers(0, 5)), st.integers(0, 3), st.integers(1, 5))
def test_tokens_and_positions(skipped: int, ids: set[int], contexts: int, seq_len: int) -> None:
    tokens = np.arange(contexts * seq_len).reshape(contexts, seq_len) % 7
    found = RowFilter(skipped, tuple(ids)).keeps_tokens(tokens)
    assert found.tolist() == [[p >= skipped and t not in ids for p, t in enumerate(row)] for row in tokens.tolist()]


# --- training and evaluation -----------------------------------------------------------------------------------------


def train(store: ActivationStore, out: Path, **settings: Any) -> SAE:
    config = {"k": 3, "batch_tokens": 256, **settings}
    return pipeline.train(str(store.path), out, recipe="topk", d_sae=24, tokens=8192, config=config)


@pytest.fixture(scope="module")
def filtered(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("filtered") / "d"
    train(store, out, **ALL)
    return out


@pytest.fixture(scope="module")
def whole(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "d"
    with pytest.warns(UserWarning, match=r"of the rows carry \d+% of the variance"):
        train(store, out)
    return out


@pytest.fixture(scope="module")
def evaluated_filtered(filtered: Path) -> dict[str, Any]:
    return pipeline.evaluate(filtered)


@pytest.fixture(scope="module")
def evaluated_whole(whole: Path) -> dict[str, Any]:
    return pipeline.evaluate(whole)


def fvu(sae: SAE, x: np.ndarray) -> float:
    x_hat = sae(torch.from_numpy(x.astype(np.float32))).double().numpy()
    return float(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def test_training_scales_by_the_rows_that_count_and_records_the_filter(store: ActivationStore, filtered: Path) -> None:
    config = json.loads((filtered / "config.json").read_text())
    x, wanted = read(store, TRAIN)[0], by_hand(store, TRAIN, ALL)
    rows = x[wanted]
    assert config["input_scale"] == pytest.approx(np.sqrt(x.shape[-1] / (rows**2).sum(1).mean()), rel=1e-5)
    assert config["store"]["kept_rows"] == len(rows)
    recorded = RowFilter.of_json(config["row_filter"])
    assert (recorded.skip_positions, recorded.skip_token_ids, recorded.max_norm_multiple) == (2, (FULL_STOP, 33), 10.0)
    assert recorded.median_norms[HOOK] == pytest.approx(np.median(np.linalg.norm(x[wanted], axis=1)), rel=0.05)
    again = train(store, filtered, **ALL)  # resumes: nothing to do, and no other run
    assert again.config["row_filter"] == config["row_filter"]
    with pytest.raises(ValueError, match="skip_positions"):
        train(store, filtered, **(ALL | {"skip_positions": 1}))


def test_an_unfiltered_dictionary_has_no_record(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    assert "row_filter" not in config
    assert "row_filter" not in json.loads((whole / "train.json").read_text())["rows"]


def test_fvu_of_a_filtered_dictionary_is_over_the_rows_that_count(
    store: ActivationStore, filtered: Path, evaluated_filtered: dict[str, Any]
) -> None:
    result = evaluated_filtered
    x, _, keep = read(store, HELD_OUT)
    wanted, sae = by_hand(store, HELD_OUT, ALL), load(filtered)
    assert result["tokens"] == wanted.sum()
    assert result["metrics"]["fvu"]["value"] == pytest.approx(fvu(sae, x[wanted]), rel=1e-4)
    section = result["row_filter"]
    assert (section["rows"], section["rows_left_out"]) == (wanted.sum(), keep.sum() - wanted.sum())
    assert section["fvu_all_rows"]["value"] == pytest.approx(fvu(sae, x[keep]), rel=1e-4)
    assert f"{section['rows_left_out']:,} rows" in eval_table(result)
    counts = sae.encode(torch.from_numpy(x[wanted].astype(np.float32))) > 0
    stats = pipeline.feature_max(filtered)
    assert np.array_equal(stats > 0, counts.any(0).numpy())


def test_fvu_with_and_without_outliers_against_brute_force(
    store: ActivationStore, whole: Path, evaluated_whole: dict[str, Any]
) -> None:
    result = evaluated_whole
    x, _, keep = read(store, HELD_OUT)
    rows, sae = x[keep], load(whole)
    norms = np.linalg.norm(rows, axis=1)
    ordinary = norms <= 10 * np.median(norms)
    variance = ((rows - rows.mean(0)) ** 2).sum(1)
    assert 0 < (~ordinary).sum() < len(rows) / 20
    expected = {
        "fvu": fvu(sae, rows),
        "fvu_without_outliers": fvu(sae, rows[ordinary]),
        "outlier_share": (~ordinary).mean(),
        "outlier_variance_share": variance[~ordinary].sum() / variance.sum(),
    }
    assert abs(expected["fvu_without_outliers"] / expected["fvu"] - 1) > 0.1  # what the plain figure hides
    for name, value in expected.items():
        assert result["metrics"][name]["value"] == pytest.approx(value, rel=1e-4), name
    assert "row_filter" not in result
    table = eval_table(result)
    assert "fvu_without_outliers" in table
    assert f"{expected['outlier_variance_share']:.0%} of the variance" in table


@pytest.mark.parametrize("which", ["filtered", "whole"])
def test_x_hat_replaces_x_on_the_rows_that_count_and_nowhere_else(
    which: str, store: ActivationStore, model_with_sink: tuple[Path, Any], request: pytest.FixtureRequest
) -> None:
    """By plain transformers with a torch hook on the block."""
    directory: Path = request.getfixturevalue(which)
    result, sae = request.getfixturevalue(f"evaluated_{which}"), load(directory)
    _, ids, _ = read(store, HELD_OUT)
    counts = torch.from_numpy(by_hand(store, HELD_OUT, ALL if which == "filtered" else {}))
    tokens = torch.from_numpy(ids.astype(np.int64))

    def replace(_: Any, __: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        replaced = torch.where(counts[..., None], sae(x), x)
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    predicts = counts[:, :-1] & counts[:, 1:]

    def cross_entropy() -> float:
        with torch.inference_mode():
            log_p = model_with_sink[1](tokens).logits[:, :-1].double().log_softmax(-1)
        return float(-log_p.gather(-1, tokens[:, 1:, None])[..., 0][predicts].mean())

    assert result["metrics"]["ce_clean"]["value"] == pytest.approx(cross_entropy(), rel=1e-5)
    handle = model_with_sink[1].transformer.h[1].register_forward_hook(replace)
    spliced = cross_entropy()
    handle.remove()
    assert result["metrics"]["ce_sae"]["value"] == pytest.approx(spliced, rel=1e-5)


def test_the_index_keeps_the_rows_that_count(store: ActivationStore, filtered: Path) -> None:
    index = FeatureIndex.open(pipeline.index(filtered, tokens=1024))
    kept = np.asarray(index.all_kept)
    assert len(kept) > 20
    assert np.array_equal(kept, by_hand(store, HELD_OUT, ALL)[: len(kept)])


def test_controls_and_comparisons_count_the_same_rows(
    store: ActivationStore, filtered: Path, whole: Path, evaluated_filtered: dict[str, Any], tmp_path: Path
) -> None:
    wanted = int(by_hand(store, HELD_OUT, ALL).sum())
    found = pipeline.controls(filtered, tokens=10**6, train_tokens=1024, only=["random"])
    assert found["tokens"] == wanted
    fvu = evaluated_filtered["metrics"]["fvu"]["value"]
    assert found["measured"]["dictionary"]["fvu"] == pytest.approx(fvu, rel=1e-5)
    for a, b in ((whole, filtered), (filtered, whole)):
        compared = pipeline.compare(a, b, tokens=512, out=tmp_path / "compared")
        assert compared["tokens"] < wanted
    assert read(store, HELD_OUT)[2].sum() > wanted


def test_a_sweep_filters_all_its_runs(store: ActivationStore, tmp_path: Path) -> None:
    config = {"batch_tokens": 256, "max_norm_multiple": 10.0}
    pipeline.sweep(str(store.path), tmp_path, recipes=["topk"], d_sae=[32], l0=[2, 3], tokens=1024, config=config)
    for path in tmp_path.glob("topk-*"):
        assert json.loads((path / "config.json").read_text())["row_filter"]["max_norm_multiple"] == 10.0
        assert json.loads((path / "eval.json").read_text())["row_filter"]["rows_left_out"] > 0


# --- live rows -------------------------------------------------------------------------------------------------------


def test_live_rows_are_those_that_count_wherever_reading_begins(
    store: ActivationStore, model: LanguageModel, tmp_path: Path
) -> None:
    live = pipeline.Live(model, text_source(made_up_documents(2000)), dtype="float32", context_bos=False)
    how: dict[str, Any] = {"recipe": "topk", "d_sae": 8, "tokens": 4096, "hook_point": HOOK}
    config = {"k": 2, "batch_tokens": 256, **ALL}
    sae = pipeline.train(live, tmp_path / "d", config=config, **how)
    recorded = RowFilter.of_json(sae.config["row_filter"])
    x, tokens, keep = read(store, TRAIN)
    of_tokens = by_hand(store, TRAIN, {k: v for k, v in ALL.items() if "skip" in k})
    assert recorded.median_norms[HOOK] == pytest.approx(np.median(np.linalg.norm(x[of_tokens], axis=1)), rel=0.05)
    resolved = TrainConfig(recipe="topk", d_sae=8, tokens=4096, **config)
    rows, _ = live_rows(live, resolved, HOOK, None, "cpu", tmp_path)
    batches = [rows.batch(step).x for step in range(8)]
    norms = torch.cat(batches).norm(dim=-1)
    assert float(norms.max()) <= recorded.max_norms[HOOK]
    counts = x[keep & recorded.keeps_tokens(tokens)].astype(np.float32)
    known = {row.tobytes() for row in counts}
    assert np.mean([row.numpy().tobytes() in known for row in torch.cat(batches)[:200]]) > 0.5
    other, _ = live_rows(live, resolved, HOOK, None, "cpu", tmp_path)
    torch.testing.assert_close(other.batch(6).x, batches[6])


# --- refusals and warnings -------------------------------------------------------------------------------------------


def test_rows_of_your_own_are_not_filtered_silently(tmp_path: Path) -> None:
    config = {"k": 2, "skip_positions": 1}
    with pytest.raises(ValueError, match="need rows of a store or of a running model"):
        pipeline.train(FewRows(), tmp_path / "d", recipe="topk", d_sae=8, tokens=5000, config=config)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("max_norm_multiple=0.5", "must be above 1, or 0"),
        ("max_norm_multiple=inf", "must be above 1, or 0"),
        ("skip_positions=-1", "must not be negative"),
        ("skip_token_ids=-3", "must be token ids"),
        ("skip_token_ids=a", "must be of type"),
    ],
)
def test_wrong_settings_are_refused(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**parsed([given]))


def test_settings_are_read_from_the_command_line() -> None:
    found = TrainConfig(**parsed(["max_norm_multiple=10", "skip_positions=1", "skip_token_ids=0,50256"]))
    assert found.row_filter == RowFilter(1, (0, 50256), 10.0)


def test_a_harvest_says_that_few_rows_carry_the_variance(store: ActivationStore, said: list[str]) -> None:
    (warning,) = (line for line in said if line.startswith("warning"))
    x, _, keep = read(store, TRAIN)
    norms, variance = np.linalg.norm(x[keep], axis=1), ((x[keep] - x[keep].mean(0)) ** 2).sum(1)
    beyond = norms > 10 * np.median(norms)
    found = outliers_among(torch.from_numpy(x[keep]))
    assert found.share_of_rows == pytest.approx(beyond.mean())
    assert found.share_of_variance == pytest.approx(variance[beyond].sum() / variance.sum())
    assert HOOK in warning
    assert "max_norm_multiple=10" in warning
    assert found.share_of_variance > 0.9


def test_rows_without_outliers_give_none() -> None:
    rows = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    assert outliers_among(rows)[1:] == (0.0, 0.0)
    assert outliers_among(torch.zeros(5, 3))[1:] == (0.0, 0.0)
    mostly_zero = torch.cat([torch.zeros(60, 3), torch.ones(40, 3)])
    assert not outliers_among(mostly_zero).notable  # a median of 0 says nothing


def test_a_transcoder_leaves_out_rows_whose_target_is_an_outlier(model: LanguageModel, tmp_path: Path) -> None:
    x_hook, y_hook = "blocks.1.mlp.hook_in", "blocks.1.hook_resid_post"  # the norm hides the sink in x
    out = pipeline.harvest(
        model,
        text_source(made_up_documents(2000)),
        tmp_path / "acts.zarr",
        tokens=4096,
        heldout_tokens=4096,
        hook_points=[x_hook, y_hook],
        dtype="float32",
        context_bos=False,
    )
    config = {"l1": 1.0, "target_l0": 0.0, "batch_tokens": 256, "max_norm_multiple": 10.0}
    how: dict[str, Any] = {"hook_point": x_hook, "target_hook_point": y_hook, "recipe": "transcoder"}
    sae = pipeline.train(out, tmp_path / "d", d_sae=16, tokens=4096, config=config, **how)
    recorded = RowFilter.of_json(sae.config["row_filter"])
    assert recorded.median_norms.keys() == {x_hook, y_hook}
    store = ActivationStore.open(out)
    seen = FilteredStore(store, recorded, [x_hook, y_hook])
    contexts = [store.read_contexts(HELD_OUT, s) for s, m in store.markers(HELD_OUT).items() if m.contexts]
    left_out = sum(int(c.keep[:, 0].sum()) for c in contexts)
    assert 0 < left_out == store.totals(HELD_OUT, y_hook).kept_rows - seen.totals(HELD_OUT, y_hook).kept_rows
    assert pipeline.evaluate(tmp_path / "d")["row_filter"]["rows_left_out"] == left_out


def test_an_imported_dictionary_has_no_filter(filtered: Path, tmp_path: Path) -> None:
    """Its config travels in our own exports, and so does the filter."""
    sae = load(filtered)
    pipeline.export(sae, "sae-lens", tmp_path / "out")
    back = pipeline.import_dictionary(tmp_path / "out", tmp_path / "back")
    assert back.config["row_filter"] == sae.config["row_filter"]
    save(sae, tmp_path / "copy", {**sae.config})
    assert load(tmp_path / "copy").config["row_filter"] == sae.config["row_filter"]
