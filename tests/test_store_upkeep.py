"""All damage is detected, named and repaired; leftovers are deleted; stores are merged, cut and written as numpy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fakes import HOOK_POINT, made_up_documents, text_source, write_jsonl, write_model

from sae import pipeline
from sae.cli import main
from sae.lm import NativeModel
from sae.pipeline import PipelineError
from store.activations import ActivationStore
from store.common import HELD_OUT, TRAIN, StoreError

RESID = "blocks.0.hook_resid_post"
TOKENS = {"tokens": 2048, "heldout_tokens": 2048}  # one shard of one context for each lane and split


def contents(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "t.jsonl", made_up_documents(1200))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_model: NativeModel, text: Path) -> Path:
    out = tmp_path_factory.mktemp("sound") / "acts.zarr"
    pipeline.harvest(tiny_model, text, out, hook_points=[HOOK_POINT, RESID], **TOKENS)
    return out


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "acts.zarr"))


def shard_file(store: Path) -> Path:
    return store / "hooks" / HOOK_POINT / "acts" / "c" / "70" / "0"  # training shard 6


def marker_file(store: Path) -> Path:
    return store / "markers" / "train" / "00000006.json"


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def foreign_marker(store: Path) -> None:
    shutil.copy(store / "markers" / "train" / "00000007.json", marker_file(store))


def marker_of_no_shard(store: Path) -> None:
    shutil.copy(marker_file(store), store / "markers" / "train" / "00009999.json")


def another_shards_file(store: Path) -> None:
    shutil.copy(shard_file(store).parent.parent / "71" / "0", shard_file(store))


def silently_unkept(store: Path) -> None:
    """A marker whose count of kept rows is not its shard's."""
    marker = json.loads(marker_file(store).read_text())
    marker_file(store).write_text(json.dumps(marker | {"kept_rows": marker["kept_rows"] - 1}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip in data": (lambda s: flip(shard_file(s), 100), "checksum"),
    "bit flip in the file's own checksum": (lambda s: flip(shard_file(s), -2), "checksum"),
    "bit flip in the tokens": (lambda s: flip(s / "tokens" / "c" / "70" / "0", 5), "checksum"),
    "truncated": (lambda s: os.truncate(shard_file(s), 1000), "got 1000 bytes"),
    "0-byte shard": (lambda s: os.truncate(shard_file(s), 0), "got 0 bytes"),
    "deleted shard": (lambda s: shard_file(s).unlink(), "the file is missing"),
    "another shard's file": (another_shards_file, "checksum"),
    "deleted marker": (lambda s: marker_file(s).unlink(), "00000006.json: missing"),
    "foreign marker": (foreign_marker, "it is of shard 7"),
    "marker of no shard": (marker_of_no_shard, "no number 9999"),
    "torn marker": (lambda s: os.truncate(marker_file(s), 40), "00000006.json: cannot be read as JSON"),
    "empty marker": (lambda s: os.truncate(marker_file(s), 0), "00000006.json: cannot be read as JSON"),
    "marker that contradicts its shard": (silently_unkept, "kept rows but the shard has"),
    "deleted array metadata": (lambda s: (s / "keep" / "zarr.json").unlink(), "keep/zarr.json: no such file"),
    "array metadata of another shape": (
        lambda s: (s / "keep" / "zarr.json").write_text((s / "tokens" / "zarr.json").read_text()),
        "keep/zarr.json: damaged",
    ),
    "deleted complete.json": (lambda s: (s / "complete.json").unlink(), "the harvest did not finish"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_every_damage_is_detected_named_and_repaired_to_the_same_bytes(
    damage: str, store: Path, sound: Path, tiny_model_dir: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act, said = DAMAGE[damage]
    act(store)
    if damage == "deleted array metadata":
        with pytest.raises(StoreError, match="verify --repair"):
            pipeline.verify(store)
    else:
        assert main(["verify", str(store)]) == 1
        assert said in capsys.readouterr().out
    assert main(["verify", str(store), "--repair"]) == 0  # model and text are those it names
    shown = capsys.readouterr().out
    assert said in shown
    assert "every checksum holds" in shown
    assert contents(store) == contents(sound)


def test_only_what_is_bad_is_harvested_again(
    store: Path, tiny_model: NativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(shard_file(store), 0)
    flip(store / "document" / "c" / "3" / "0", 3)
    written: list[tuple[str, int]] = []
    real = ActivationStore.write_shard

    def watching(self: ActivationStore, split: str, shard: int, **rest: object) -> object:
        written.append((split, shard))
        return real(self, split, shard, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ActivationStore, "write_shard", watching)
    found, left = pipeline.repair(store, model=tiny_model)
    assert (len(found), left) == (2, [])
    assert sorted(written) == [(HELD_OUT, 3), (TRAIN, 6)]


def test_repair_with_another_model_or_text_is_refused_and_changes_nothing(store: Path, tmp_path: Path) -> None:
    os.truncate(shard_file(store), 0)
    before = contents(store)
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(PipelineError, match=r"model_sha256: the store has '.*', this call asks for"):
        pipeline.repair(store, model=str(other))
    with pytest.raises(PipelineError, match="text_sha256"):
        pipeline.repair(store, text=text_source(made_up_documents(3)))
    assert contents(store) == before


def test_a_flip_in_the_settings_is_named(store: Path) -> None:
    settings = (store / "zarr.json").read_bytes()
    (store / "zarr.json").write_bytes(settings.replace(b"one BOS before each", b"two BOS before each"))
    assert any("did not finish, or a shard" in problem for problem in pipeline.verify(store))
    (store / "zarr.json").write_bytes(settings.replace(b'"seq_len": 32', b'"seq_len": -2'))
    with pytest.raises(StoreError, match="seq_len wrong or missing"):
        pipeline.verify(store)


# --- clean -----------------------------------------------------------------------------------------------------------


def test_clean_removes_leftovers_and_nothing_else(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(store)
    (shard_file(store).parent / "0.ab12.partial").write_bytes(b"x" * 100)
    (store / "markers" / "train" / "00000006.json.77-88.partial").write_bytes(b"y" * 10)
    orphan = shutil.copytree(shard_file(store).parent, shard_file(store).parent.parent / "9999")
    draft = store.with_name("acts.zarr.creating")
    draft.mkdir()
    assert main(["clean", str(store), "--dry-run"]) == 0
    assert "would be free" in capsys.readouterr().out
    assert (orphan / "0").exists()
    assert main(["clean", str(store)]) == 0
    assert "0.ab12.partial" in capsys.readouterr().out
    assert contents(store) == before
    assert [p.name for p in store.parent.iterdir()] == ["acts.zarr"]


def test_clean_deletes_the_store_only_when_no_dictionary_needs_it(store: Path) -> None:
    run = store.parent
    pipeline.train(store, run / "d", d_sae=16, tokens=512, config={"k": 2, "batch_tokens": 128}, hook_point=HOOK_POINT)
    with pytest.raises(PipelineError, match="sae index"):
        pipeline.clean(run, acts=True)
    assert store.exists()
    pipeline.index(run / "d")
    removed = pipeline.clean(run, acts=True)
    assert removed[str(store)] > 0
    assert not store.exists()
    with pytest.raises(PipelineError, match="no activation store"):
        pipeline.clean(run)


# --- info, merge, subset, numpy --------------------------------------------------------------------------------------


def test_info_tells_all_there_is(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(store), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["complete"]
    assert found["hook_points"][RESID] == {"d_in": 16, "dtype": "float16"}
    train = found["splits"][TRAIN]
    assert (train["shards"], train["shards_written"], train["rows"]) == (64, 64, 2048)
    opened = ActivationStore.open(store)
    rows = np.concatenate(
        [opened.read_acts(TRAIN, s, RESID)[opened.read_contexts(TRAIN, s).keep.reshape(-1)] for s in range(64)]
    ).astype(np.float64)
    assert train["kept_rows"] == len(rows)
    moments = train["hook_points"][RESID]
    assert moments["mean_sq_norm"] == pytest.approx((rows**2).sum(1).mean())
    assert moments["variance_share"] == pytest.approx(rows.var(0).sum() / (rows**2).sum(1).mean())
    files = [p for p in store.rglob("*") if p.is_file() and p.suffix != ".json"]
    assert found["disk_bytes"] == sum(p.stat().st_size for p in files)
    assert main(["info", str(store)]) == 0
    assert "variance_share" in capsys.readouterr().out


def test_merged_stores_hold_the_rows_of_both(
    store: Path, sound: Path, tiny_model: NativeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {document.text for document in made_up_documents(1200)}
    more = [d for d in made_up_documents(2600, seed=3) if d.text not in there]
    other = tmp_path / "other.zarr"
    pipeline.harvest(tiny_model, text_source(more), other, hook_points=[HOOK_POINT, RESID], **TOKENS)
    out = tmp_path / "both.zarr"
    assert main(["store", "merge", str(store), str(other), "--out", str(out)]) == 0
    parts = [ActivationStore.open(p) for p in (store, other)]
    both = ActivationStore.open(out)
    assert both.verify() == []
    for split in (HELD_OUT, TRAIN):
        expected = [(part, shard) for part in parts for shard, marker in part.markers(split).items() if marker.contexts]
        assert both.n_shards[split] == len(expected) > 64
        tables = {part.path: part.documents(split) for part in (*parts, both)}
        for shard in (0, len(expected) // 2, len(expected) - 1):
            part, number = expected[shard]
            assert np.array_equal(both.read_stored(split, shard, RESID), part.read_stored(split, number, RESID))
            mine, theirs = both.read_contexts(split, shard), part.read_contexts(split, number)
            assert np.array_equal(mine.tokens, theirs.tokens)
            for a, b in zip(mine.document.ravel(), theirs.document.ravel(), strict=True):
                assert (a < 0) == (b < 0)
                assert a < 0 or tables[both.path][int(a)] == tables[part.path][int(b)]
    assert both.totals(TRAIN, RESID).kept_rows == sum(p.totals(TRAIN, RESID).kept_rows for p in parts)
    assert main(["store", "merge", str(store), str(sound), "--out", str(tmp_path / "twice.zarr")]) == 0
    assert "documents are in more than one store" in capsys.readouterr().err
    marker_file(out).unlink()
    with pytest.raises(PipelineError, match="a merged or cut store does not"):
        pipeline.repair(out)


def test_stores_of_different_rows_are_not_merged(store: Path, tiny_model: NativeModel, tmp_path: Path) -> None:
    other = tmp_path / "other.zarr"
    pipeline.harvest(
        tiny_model, text_source(made_up_documents(400)), other, hook_points=[HOOK_POINT], tokens=32, heldout_tokens=32
    )
    with pytest.raises(StoreError, match=rf"hook_points.{RESID}.*\(absent\)"):
        pipeline.merge_stores([store, other], tmp_path / "both.zarr")
    assert not (tmp_path / "both.zarr").exists()


def test_stores_that_hold_out_by_different_rules_are_merged_only_without_a_common_document(
    store: Path, tiny_model: NativeModel, tmp_path: Path
) -> None:
    """Version 0.1 divided no document: what it trained on may be held out of a newer store of the same text."""
    old = Path(shutil.copytree(store, tmp_path / "old.zarr"))
    raw = json.loads((old / "zarr.json").read_text())
    raw["attributes"]["provenance"]["held_out"] = "documents with blake2b(text) mod 20 == 0"
    (old / "zarr.json").write_text(json.dumps(raw))
    ActivationStore.open(old).finish()
    with pytest.raises(StoreError, match="chose held-out text by different rules"):
        pipeline.merge_stores([store, old], tmp_path / "both.zarr")
    assert not (tmp_path / "both.zarr").exists()
    there = {document.text for document in made_up_documents(1200)}
    more = [d for d in made_up_documents(1500, seed=3) if d.text not in there]
    other = tmp_path / "other.zarr"
    hooks = {"hook_points": [HOOK_POINT, RESID]}
    pipeline.harvest(tiny_model, text_source(more), other, **hooks, **TOKENS)
    assert pipeline.merge_stores([old, other], tmp_path / "both.zarr") == 0
    assert "; or " in ActivationStore.open(tmp_path / "both.zarr").provenance["held_out"]


def test_a_subset_has_some_hook_points_and_the_first_shards(store: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.zarr"
    assert main(["store", "subset", str(store), "--hook-point", RESID, "--tokens", "300", "--out", str(out)]) == 0
    small, whole = ActivationStore.open(out), ActivationStore.open(store)
    assert small.verify() == []
    assert small.hook_points == {RESID: 16}
    heldout = [marker for marker in whole.markers(HELD_OUT).values() if marker.contexts]
    assert small.n_shards == {HELD_OUT: len(heldout), TRAIN: 10}  # 32 rows a shard
    assert np.array_equal(small.read_stored(TRAIN, 9, RESID), whole.read_stored(TRAIN, 9, RESID))
    marker_file(out).unlink()
    with pytest.raises(PipelineError, match="a merged or cut store does not"):
        pipeline.repair(out, text=text)  # its shards may have other numbers than the text gave them
    assert len(small.markers(TRAIN)) == 9  # nothing was rebuilt


def test_numpy_files_are_the_kept_rows(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows"
    command = ["store", "export-numpy", str(store), "--hook-point", RESID, "--split", HELD_OUT, "--out", str(out)]
    assert main(command) == 0
    opened = ActivationStore.open(store)
    acts, row, token = (np.load(out / f"{name}.npy") for name in (RESID, "row", "token"))
    assert acts.dtype == np.float16
    assert len(acts) == len(row) == len(token) == opened.totals(HELD_OUT, RESID).kept_rows
    for i in range(0, len(row), 97):
        shard, inside = divmod(int(row[i]), opened.rows_per_shard)
        assert np.array_equal(acts[i], opened.read_acts(HELD_OUT, shard, RESID)[inside])
        assert token[i] == opened.read_contexts(HELD_OUT, shard).tokens.ravel()[inside]
    assert main(command) == 2  # it is there
    assert not (tmp_path / "rows.partial").exists()
