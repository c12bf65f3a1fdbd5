"""The feature index against a dense matrix [rows, d_sae] held in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from store import feature_writer
from store.common import StoreError
from store.features import FeatureIndex, FeatureWriter

VOCABULARY = [bytes([i]) for i in range(256)]
DOCUMENTS = [("a", "s", "prose", "0"), ("b", "s", "code", "1"), ("c", "s", "prose", "2")]


class Truth:
    """Random contexts and a dense activation matrix on kept rows, float16-exact."""

    def __init__(self, seed: int, n_contexts: int, seq_len: int, d_sae: int, share: float):
        rng = np.random.default_rng(seed)
        shape = (n_contexts, seq_len)
        self.shape, self.d_sae = shape, d_sae
        self.tokens = rng.integers(0, 7, shape).astype(np.uint32)
        self.keep = rng.random(shape) < 0.8
        self.document = rng.integers(0, len(DOCUMENTS), shape).astype(np.int32)
        dense = rng.exponential(2.0, (n_contexts * seq_len, d_sae)).astype(np.float16)
        fires = rng.random(dense.shape) < share
        self.acts = (dense * fires * self.keep.reshape(-1, 1)).astype(np.float32)
        self.rng = rng

    def write(self, path: Path, parts: int = 3, reverse: bool = False) -> Path:
        writer = self.writer(path)
        bounds = np.unique(np.linspace(0, self.shape[0], parts + 1).astype(int))
        pieces = list(zip(bounds[:-1], bounds[1:], strict=True))
        for lo, hi in reversed(pieces) if reverse else pieces:
            self.append(writer, int(lo), int(hi))
        return writer.finish({})

    def writer(self, path: Path) -> FeatureWriter:
        return FeatureWriter(
            path,
            d_sae=self.d_sae,
            seq_len=self.shape[1],
            n_contexts=self.shape[0],
            attributes={"model": "m", "hook_point": "h", "bos": 0},
            vocabulary=VOCABULARY,
            documents=DOCUMENTS,
        )

    def append(self, writer: FeatureWriter, lo: int, hi: int) -> None:
        first = lo * self.shape[1]
        rows, features = np.nonzero(self.acts[first : hi * self.shape[1]])
        order = self.rng.permutation(len(rows))
        rows, features = rows[order] + first, features[order]
        writer.append(
            lo, self.tokens[lo:hi], self.keep[lo:hi], self.document[lo:hi], rows, features, self.acts[rows, features]
        )


def check_against(truth: Truth, index: FeatureIndex) -> None:
    tokens, document = truth.tokens.reshape(-1), truth.document.reshape(-1)
    stats = index.stats
    for feature in range(truth.d_sae):
        dense = truth.acts[:, feature]
        rows, values = index.firings(feature)
        expected = np.flatnonzero(dense)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(values, dense[expected])
        assert stats["count"][feature] == len(expected)
        if not len(expected):
            assert stats["max"][feature] == stats["mean"][feature] == stats["p99"][feature] == 0
            assert stats["top_token"][feature] == stats["domain_top"][feature] == -1
            assert stats["domain_purity"][feature] == stats["top_token_share"][feature] == 0
            continue
        active = dense[expected].astype(np.float64)
        assert stats["max"][feature] == active.max()
        np.testing.assert_allclose(stats["mean"][feature], active.mean(), rtol=1e-6)
        np.testing.assert_allclose(stats["mean_sq"][feature], (active**2).mean(), rtol=1e-6)
        np.testing.assert_allclose(stats["p99"][feature], np.quantile(active, 0.99, method="inverted_cdf"), rtol=1e-6)
        by_count = np.bincount(tokens[expected])
        assert stats["top_token"][feature] == by_count.argmax()
        assert stats["top_token_share"][feature] == np.float32(by_count.max() / len(expected))
        names = [DOCUMENTS[d][2] for d in document[expected]]
        counts = [names.count(domain) for domain in index.domains]
        assert stats["domain_top"][feature] == np.argmax(counts)
        assert stats["domain_purity"][feature] == np.float32(max(counts) / len(names))
    np.testing.assert_array_equal(index.token_counts[:8], np.bincount(truth.tokens[truth.keep], minlength=8))
    followed = np.full(truth.tokens.shape, -1)
    for context in range(truth.shape[0]):
        for position in range(truth.shape[1] - 1):
            if truth.keep[context, position + 1]:
                followed[context, position] = truth.tokens[context, position + 1]
    for token in range(8):
        before = truth.acts[followed.reshape(-1) == token]
        feature, count, total, largest = index.features_before_token(token)
        expected = np.flatnonzero(before.any(axis=0)) if len(before) else np.zeros(0, int)
        np.testing.assert_array_equal(feature, expected)
        np.testing.assert_array_equal(count, (before[:, expected] > 0).sum(axis=0))
        np.testing.assert_allclose(total, before[:, expected].sum(axis=0), rtol=1e-5)
        on_token = truth.acts[tokens == token]
        on_this, count, total, largest = index.features_of_token(token)
        expected = np.flatnonzero(on_token.any(axis=0)) if len(on_token) else np.zeros(0, int)
        np.testing.assert_array_equal(on_this, expected)
        np.testing.assert_array_equal(count, (on_token[:, expected] > 0).sum(axis=0))
        np.testing.assert_allclose(total, on_token[:, expected].sum(axis=0), rtol=1e-5)
        if len(expected):
            np.testing.assert_array_equal(largest, on_token[:, expected].max(axis=0))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_contexts=st.integers(1, 6),
    seq_len=st.integers(1, 9),
    d_sae=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    reverse=st.booleans(),
)
def test_index_equals_dense_truth(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    n_contexts: int,
    seq_len: int,
    d_sae: int,
    share: float,
    reverse: bool,
) -> None:
    path = tmp_path_factory.mktemp("index") / "features.zarr"
    truth = Truth(seed, n_contexts, seq_len, d_sae, share)
    index = FeatureIndex.open(truth.write(path, reverse=reverse))
    assert (index.d_sae, index.seq_len, index.n_contexts) == (d_sae, seq_len, n_contexts)
    assert index.kept_tokens == truth.keep.sum()
    check_against(truth, index)


def test_small_blocks_give_the_same_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_writer, "BLOCK", 16)  # many blocks, features longer than a block
    monkeypatch.setattr(feature_writer, "CHUNK", 32)
    truth = Truth(3, 5, 8, 11, 0.4)
    truth.acts[:, 4] = 0  # a dead feature between two live ones
    check_against(truth, FeatureIndex.open(truth.write(tmp_path / "features.zarr")))


def test_windows_documents_and_token_bytes(tmp_path: Path) -> None:
    truth = Truth(0, 4, 6, 3, 0.5)
    index = FeatureIndex.open(truth.write(tmp_path / "features.zarr"))
    window = index.window(2 * 6 + 1, before=3, after=2)
    assert (window.context, window.position, window.start) == (2, 1, 0)
    np.testing.assert_array_equal(window.token_ids, truth.tokens[2, :4])
    last = index.window(3 * 6 + 5, before=2, after=9)
    assert last.start == 3
    np.testing.assert_array_equal(last.token_ids, truth.tokens[3, 3:])
    np.testing.assert_array_equal(index.keep_at(1), truth.keep[1])
    rows = np.array([23, 0, 7, 7])
    np.testing.assert_array_equal(index.tokens_of(rows), truth.tokens.reshape(-1)[rows])
    assert index.document_of(9) == DOCUMENTS[truth.document[1, 3]]
    assert index.token_bytes(0xE2) == b"\xe2"
    with pytest.raises(StoreError, match="context 4"):
        index.window(4 * 6, 1, 1)
    with pytest.raises(StoreError, match=r"feature 3 .* 0\.\.2"):
        index.firings(3)


def test_panels(tmp_path: Path) -> None:
    truth = Truth(0, 2, 4, 5, 0.5)
    writer = truth.writer(tmp_path / "features.zarr")
    truth.append(writer, 0, 2)
    ids = np.arange(10, dtype=np.int64).reshape(5, 2)
    index = FeatureIndex.open(writer.finish({"neighbours/id": ids, "stats/cos_enc_dec": ids[:, 0]}))
    np.testing.assert_array_equal(index.panel("neighbours/id", 3), [6, 7])
    assert index.panel("neighbours/id", 3).dtype == np.int32
    assert index.stats["cos_enc_dec"].dtype == np.float32
    assert index.has("neighbours/id")
    assert not index.has("logits/top_id")
    with pytest.raises(StoreError, match="no panel logits/top_id"):
        index.panel("logits/top_id", 0)


def test_tiny_firings_stay_firings(tmp_path: Path) -> None:
    truth = Truth(0, 1, 2, 1, 0.0)
    truth.keep[:] = True
    truth.acts[:, 0] = [1e-12, 1.0]  # the first rounds to zero in float16
    rows, values = FeatureIndex.open(truth.write(tmp_path / "f.zarr", 1)).firings(0)
    np.testing.assert_array_equal(rows, [0, 1])
    assert (values > 0).all()


def bad(truth: Truth, **change: object) -> dict[str, object]:
    call = {
        "first_context": 0,
        "tokens": truth.tokens,
        "keep": np.ones(truth.shape, bool),
        "document": truth.document,
        "rows": np.array([1]),
        "features": np.array([0]),
        "values": np.array([1.0]),
    }
    return call | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.array([1e6])}, r"feature 0 has activation 1000000\.0 on row 1"),
        ({"values": np.array([np.nan])}, "activation nan"),
        ({"values": np.array([-1.0])}, r"activation -1\.0"),
        ({"features": np.array([5])}, r"outside 0\.\.4"),
        ({"rows": np.array([8])}, "outside contexts"),
        ({"keep": np.zeros((2, 4), bool)}, "not kept"),
        ({"first_context": 1}, "outside the 2 contexts"),
        ({"tokens": np.full((2, 4), 999)}, "token id 999"),
        ({"document": np.full((2, 4), 3)}, "document number 3"),
        ({"document": np.zeros((2, 3))}, r"document is \(2, 3\)"),
        ({"rows": np.array([1, 1]), "features": np.zeros(2, int), "values": np.ones(2)}, "appended twice"),
    ],
)
def test_append_refuses(tmp_path: Path, change: dict[str, object], message: str) -> None:
    truth = Truth(0, 2, 4, 5, 0.0)
    writer = truth.writer(tmp_path / "features.zarr")
    with pytest.raises(StoreError, match=message):
        writer.append(**bad(truth, **change))  # type: ignore[arg-type]
    writer.abandon()


def test_finish_refuses_missing_contexts_and_computed_panels(tmp_path: Path) -> None:
    truth = Truth(0, 3, 4, 5, 0.5)
    writer = truth.writer(tmp_path / "features.zarr")
    truth.append(writer, 0, 2)
    with pytest.raises(StoreError, match="2 of 3 contexts.* missing one is 2"):
        writer.finish({})
    truth.append(writer, 2, 3)
    with pytest.raises(StoreError, match="appended before"):
        truth.append(writer, 2, 3)
    with pytest.raises(StoreError, match="stats/max is computed"):
        writer.finish({"stats/max": np.zeros(5)})
    assert not (tmp_path / "features.zarr").exists()


def test_killed_build_leaves_the_old_index(tmp_path: Path) -> None:
    path = tmp_path / "features.zarr"
    old, new = Truth(1, 2, 4, 3, 0.5), Truth(2, 3, 4, 3, 0.5)
    old.write(path)
    writer = new.writer(path)
    new.append(writer, 0, 2)
    with pytest.raises(StoreError, match=r"is being written by pid \d+"):
        new.writer(path)
    writer._release()  # what the kernel does for a killed process
    (tmp_path / "features.zarr.lock").touch()  # and what such a process leaves behind
    check_against(old, FeatureIndex.open(path))
    with pytest.raises(StoreError, match="did not finish"):
        FeatureIndex.open(writer.partial)
    check_against(new, FeatureIndex.open(new.write(path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.zarr"]


def test_open_refuses_anything_else(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no feature index here; build it with `sae index`"):
        FeatureIndex.open(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="not a feature index"):
        FeatureIndex.open(tmp_path / "folder")
    zarr.open_group(tmp_path / "group", mode="w", zarr_format=3)
    with pytest.raises(StoreError, match="kind None"):
        FeatureIndex.open(tmp_path / "group")
    path = Truth(0, 1, 2, 1, 1.0).write(tmp_path / "newer.zarr", 1)
    zarr.open_group(path, mode="a").attrs["format"] = 99
    with pytest.raises(StoreError, match="format 99"):
        FeatureIndex.open(path)


def test_a_slice_touches_few_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_writer, "CHUNK", 16)
    truth = Truth(5, 20, 8, 10, 0.5)
    path = truth.write(tmp_path / "features.zarr")
    rows, _ = FeatureIndex.open(path).firings(3)
    ptr = np.asarray(zarr.open_array(path / "firings" / "ptr", mode="r")[:])
    needed = {str(i) for i in range(ptr[3] // 16, -(-ptr[4] // 16))}
    for name in ("row", "value"):
        for chunk in (path / "firings" / name / "c").iterdir():
            if chunk.name not in needed:
                chunk.write_bytes(b"broken")  # reading it is an error
    np.testing.assert_array_equal(FeatureIndex.open(path).firings(3)[0], rows)
