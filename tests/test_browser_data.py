"""What the pages select, compared with plain loops over the dense activations."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser_fixture import DEAD, DENSE, DNA, HOSTILE, HOSTILE_TOKENS, SEQ_LEN, build_root
from hypothesis import given
from hypothesis import strategies as st

from browser import catalogue, data
from browser.tokens import label, pieces
from store.features import FeatureIndex


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def acts(root: Path) -> np.ndarray:
    return build_root(root)


@pytest.fixture(scope="module")
def index(root: Path, acts: np.ndarray) -> FeatureIndex:
    return FeatureIndex.open(root / "demo" / "tm" / "features.zarr")


def test_top_rows_are_the_largest_one_for_each_context(index: FeatureIndex, acts: np.ndarray) -> None:
    for feature in (DNA, HOSTILE, DENSE, DEAD):
        best = [
            (-context.max(), c * SEQ_LEN + int(context.argmax()))
            for c, context in enumerate(acts[:, feature].reshape(-1, SEQ_LEN))
            if context.max() > 0
        ]
        expected = [row for _, row in sorted(best)[:20]]
        assert data.top_rows(*index.firings(feature), 20, SEQ_LEN).tolist() == expected


@given(
    values=st.lists(st.integers(1, 110), min_size=1, max_size=60),
    per_interval=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_intervals_partition_the_firings(values: list[int], per_interval: int, seed: int) -> None:
    firings = np.array(values, np.float32)
    rows = np.arange(len(values)) * 3
    found = data.intervals(rows, firings, per_interval=per_interval, seed=seed)
    assert len(found) == 11
    edges = np.linspace(0, float(firings.max()), 12)
    for i, each in enumerate(reversed(found)):
        assert (each.low, each.high) == (edges[i], edges[i + 1])
        inside = {int(r) for r, v in zip(rows, firings, strict=True) if edges[i] < v <= edges[i + 1]}
        assert each.count == len(inside)
        assert each.share == len(inside) / len(values)
        drawn = each.rows.tolist()
        assert set(drawn) <= inside
        assert len(drawn) == len(set(drawn)) == min(per_interval, len(inside))
        assert sorted(-firings[r // 3] for r in drawn) == [-firings[r // 3] for r in drawn]
    assert sum(each.count for each in found) == len(values)


@given(values=st.lists(st.integers(1, 60), min_size=1, max_size=80), n=st.integers(1, 20))
def test_intervals_by_rank_partition_the_firings(values: list[int], n: int) -> None:
    value, row = np.array(values, np.float32), np.arange(len(values))
    found = data.intervals(row, value, per_interval=len(values), seed=0, n=n, by_rank=True)
    assert sorted(r for each in found for r in each.rows.tolist()) == row.tolist()
    for each in found:
        assert all(each.low < value[r] <= each.high for r in each.rows)
    if len(set(values)) == len(values):
        counts = [each.count for each in found]
        assert max(counts) - min(counts) <= 1


def test_hard_negatives_are_silent_and_look_alike(index: FeatureIndex, acts: np.ndarray) -> None:
    tokens, keep = index.all_tokens.reshape(-1), index.all_kept.reshape(-1)
    for feature in (5, DENSE, 20):
        rows, _ = index.firings(feature)
        ids, counts = np.unique(tokens[rows], return_counts=True)
        fifth = np.sort(counts)[-5:][0]
        alike = data.same_token_rows(index, rows, 10, 0)
        assert (acts[alike, feature] == 0).all()
        assert keep[alike].all()
        assert all(counts[ids == tokens[row]] >= fifth for row in alike)
        nearest, strong = data.neighbour_rows(index, feature, rows, 10, 0)
        assert nearest == index.panel("neighbours/id", feature)[0]
        its = acts[:, nearest]
        assert (acts[strong, feature] == 0).all()
        assert (its[strong] >= np.median(its[its > 0])).all()


def test_firings_that_a_token_follows(index: FeatureIndex, acts: np.ndarray) -> None:
    tokens = index.all_tokens.reshape(-1)
    rows, values = index.firings(DENSE)
    wanted = np.unique(tokens)[::7]
    expected = [r for r in rows.tolist() if (r + 1) % SEQ_LEN and tokens[r + 1] in wanted]
    drawn, n = data.rows_before_tokens(index, rows, values, wanted, 10_000, 0)
    assert n == len(expected)
    assert sorted(drawn.tolist()) == expected
    assert (np.diff(acts[drawn, DENSE]) <= 0).all()


def test_interval_draws_are_uniform_and_follow_the_seed() -> None:
    rows, values = np.arange(10), np.ones(10, np.float32)  # all in the highest interval
    drawn = np.zeros(10)
    for seed in range(400):
        first = data.intervals(rows, values, per_interval=3, seed=seed)[0].rows
        again = data.intervals(rows, values, per_interval=3, seed=seed)[0].rows
        np.testing.assert_array_equal(first, again)
        drawn[first] += 1
    assert drawn.min() > 80  # 120 expected, standard deviation 9
    assert drawn.max() < 160


def test_histograms_count_every_firing_and_no_zero(index: FeatureIndex, acts: np.ndarray) -> None:
    column = acts[:, HOSTILE]
    frame = data.activation_histogram(index.firings(HOSTILE)[1], bins=10)
    for low, high, count in frame.itertuples(index=False):
        assert count == ((column > low) & (column <= high)).sum()
    assert frame["count"].sum() == (column > 0).sum()
    assert data.activation_histogram(np.zeros(0)).empty
    assert data.logit_histogram(index, 3)["count"].sum() == index.d_vocab


def test_examples_show_the_feature_on_every_token(index: FeatureIndex, acts: np.ndarray) -> None:
    rows, values = index.firings(DENSE)
    for example in data.examples(index, rows, values, rows[:50:7], before=9, after=5):
        first = example.context * SEQ_LEN + example.start
        assert example.start == max(0, example.row % SEQ_LEN - 9)
        np.testing.assert_array_equal(example.acts, acts[first : first + len(example.token_ids), DENSE])
        assert example.acts[example.hit] == example.value == acts[example.row, DENSE]
        assert len(example.shown) == len(example.token_ids)
        assert example.document == index.document_of(example.row)


def test_a_window_that_starts_inside_a_character_still_shows_it(index: FeatureIndex) -> None:
    euro = "€".encode()
    context = np.concatenate([index.tokens_at(c) for c in range(index.n_contexts)])
    raw = [index.token_bytes(int(t)) for t in context]
    row = next(i for i in range(2, len(raw)) if b"".join(raw[i - 2 : i + 1]) == euro and i % SEQ_LEN >= 2)
    nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    (example,) = data.examples(index, *nothing, np.array([row]), before=0, after=0)
    assert example.shown == [[("text", "€")]]


def test_token_shares(index: FeatureIndex, acts: np.ndarray) -> None:
    tokens = np.concatenate([index.tokens_at(c) for c in range(index.n_contexts)])
    fired = acts[:, DENSE] > 0
    for each in data.token_shares(index, *index.firings(DENSE), 5):
        here = fired & (tokens == each.token_id)
        assert each.count == here.sum()
        assert each.share == here.sum() / fired.sum()
        np.testing.assert_allclose(each.mean, acts[here, DENSE].mean(), rtol=1e-5)
    counts = np.bincount(tokens[fired])
    assert data.token_shares(index, *index.firings(DENSE), 1)[0].count == counts.max()
    assert data.token_shares(index, *index.firings(DEAD), 5) == []


def test_feature_table_and_its_filters(index: FeatureIndex, acts: np.ndarray) -> None:
    table = catalogue.feature_table(index)
    fired = (acts > 0).sum(0)
    np.testing.assert_allclose(table["density"], fired / index.kept_tokens)
    assert set(table["feature"][table["flag"] == "dead"]) == set(np.flatnonzero(fired == 0))
    assert table["flag"][DENSE] == "dense"
    assert table["domain"][DNA] == "dna"
    assert table["top_token"][5] == "␣the"

    def numbers(**filters: object) -> set[int]:
        return set(catalogue.select_features(table, **filters)["feature"])  # type: ignore[arg-type]

    everything = set(range(index.d_sae))
    assert numbers() == everything
    assert numbers(flag="dead") | numbers(flag="alive") == everything
    assert numbers(flag="dense") == {DENSE}
    assert DNA in numbers(domain="dna")
    share = fired / index.kept_tokens
    assert numbers(log_density=(-3.0, -1.0)) == set(np.flatnonzero((share >= 1e-3) & (share <= 0.1)))
    assert 5 in numbers(text=" THE")
    assert numbers(text="no such token") == set()
    assert numbers(text="(.*") == {
        int(f) for f in table["feature"] if "(.*" in table["top_logits"][f] + table["top_token"][f]
    }


def test_csv_is_exact_and_contains_no_formula() -> None:
    table = pd.DataFrame({"feature": [1, 2], "top_token": ["=1+1", '"a,b\n'], "density": [0.5, 0.25]})
    back = pd.read_csv(io.BytesIO(catalogue.to_csv(table)))
    assert [json.loads(text) for text in back["top_token"]] == ["=1+1", '"a,b\n']
    assert all(text.startswith('"') for text in back["top_token"])


def test_scan_finds_saes_four_levels_deep_and_follows_no_link(tmp_path: Path) -> None:
    def sae(name: str, text: str = '{"kind": "sae", "d_sae": 8}') -> None:
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "config.json").write_text(text)

    sae("a/tm")
    sae("a/sweep/x/s0")
    sae("a/b/c/d/too-deep")
    sae("a/model", '{"kind": "model"}')
    sae("a/broken", "{")
    sae("a/list", "[1]")
    sae("a/acts.zarr/inside")
    sae(".hidden/tm")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text('{"kind": "sae"}')
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    found = data.scan(tmp_path / "root")
    assert [entry.id for entry in found] == ["a/sweep/x/s0", "a/tm"]
    assert not found[1].has_index
    assert [entry.id for entry in data.scan(tmp_path / "root" / "a" / "tm")] == ["."]


@given(text=st.text(max_size=12), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_pieces_lose_no_character_however_the_bytes_are_cut(text: str, cuts: list[int]) -> None:
    raw = text.encode()
    bounds = sorted({0, len(raw), *(c for c in cuts if c < len(raw))})
    tokens = [raw[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    shown = pieces(tokens)
    assert len(shown) == len(tokens)
    assert "".join(t for token in shown for kind, t in token if kind == "text") == text


@given(raw=st.binary(max_size=12))
def test_pieces_of_any_bytes_agree_with_python(raw: bytes) -> None:
    (shown,) = pieces([raw])
    back = b"".join(t.encode() if kind == "text" else bytes.fromhex(t) for kind, t in shown)
    assert back == raw
    text = "".join(t if kind == "text" else "\ufffd" for kind, t in shown)
    # Python joins the bytes of one broken character into one mark; compare what is whole
    assert text.replace("\ufffd", "") == raw.decode(errors="ignore")


def test_pieces_of_a_cut_character() -> None:
    assert pieces([b"a\xe2", b"\x82", b"\xacb"]) == [[("text", "a"), ("hex", "e2")], [("hex", "82")], [("text", "€b")]]
    assert pieces([b"\xc3", b"x", b"\xa9"]) == [[("hex", "c3")], [("text", "x")], [("hex", "a9")]]
    assert pieces([b"\xed\xa0\x80"]) == [[("hex", "ed"), ("hex", "a0"), ("hex", "80")]]


def test_labels_make_everything_visible() -> None:
    assert label(b" the") == "␣the"
    assert label(b"\n\t\x00") == "↵⇥‹00›"
    assert label("\u202eevil".encode()) == "‹202e›evil"
    assert label(b"\xe2") == "‹e2›"
    for token in HOSTILE_TOKENS:
        assert all(character.isprintable() for character in label(token.encode()))
