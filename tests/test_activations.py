"""The activation store: written data is read back, damaged data never is."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from store.activations import ActivationStore
from store.common import StoreError

SEQ, CONTEXTS = 5, 4
SETTINGS = {
    "hook_points": {"blocks.0.mlp.hook_post": 3, "blocks.0.hook_resid_pre": 2},
    "seq_len": SEQ,
    "contexts_per_shard": CONTEXTS,
    "n_shards": {"heldout": 2, "train": 6},
    "dtype": "float16",
    "provenance": {"model": {"id": "toy", "sha256": "aa"}, "text": ["x"]},
}
POST = "blocks.0.mlp.hook_post"


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    """A kill does not lose data in the kernel's buffers; only a power cut does, which is not tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def make(path: Path | str, **changes) -> ActivationStore:
    return ActivationStore.create(path, **{**SETTINGS, **changes})


def shard_data(store: ActivationStore, split: str, shard: int, contexts: int = CONTEXTS) -> dict:
    """A shard's arrays, a function of its name alone; position 0 of every context is not kept."""
    rng = np.random.default_rng([("heldout", "train").index(split), shard])
    keep = np.ones((contexts, SEQ), bool)
    keep[:, 0] = False
    number = shard * 64
    return {
        "acts": {
            hook: rng.normal(size=(contexts * SEQ, d_in)).astype(np.float32) for hook, d_in in store.hook_points.items()
        },
        "tokens": rng.integers(0, 60000, (contexts, SEQ)),
        "keep": keep,
        "document": np.full((contexts, SEQ), number),
        "documents": {number: (f"{split}-{shard}", "toy text", "prose", "00")},
        "cursor": {"next": shard + 1},
    }


def fill(store: ActivationStore) -> None:
    """Write what is missing, as a harvest does, and finish."""
    with store.hold():
        for split, count in store.n_shards.items():
            written = store.markers(split)
            for shard in range(count):
                if shard not in written:
                    contexts = CONTEXTS if shard < count - 1 else 2
                    data = shard_data(store, split, shard, contexts)
                    store.write_shard(split, shard, **data)
        store.finish()


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_round_trip(tmp_path, dtype) -> None:
    store = make(tmp_path / "acts.zarr", dtype=dtype)
    data = shard_data(store, "train", 1, contexts=3)
    store.write_shard("train", 1, **data)
    store = ActivationStore.open(tmp_path / "acts.zarr")
    assert store.dtype == dict.fromkeys(store.hook_points, dtype)
    for hook, given in data["acts"].items():
        got = store.read_acts("train", 1, hook)
        assert got.dtype == np.float32
        assert got.shape == given.shape
        relative = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 0.0}[dtype]
        np.testing.assert_allclose(got, given, rtol=relative, atol=1e-7)
        if dtype == "float16":
            assert np.array_equal(got, given.astype(np.float16))
    contexts = store.read_contexts("train", 1)
    for name in ("tokens", "keep", "document"):
        assert np.array_equal(getattr(contexts, name), data[name])
    assert store.documents("train") == data["documents"]
    assert store.markers("train")[1].cursor == {"next": 2}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_read_is_what_zarr_reads(tmp_path, dtype) -> None:
    store = make(tmp_path / "acts.zarr", dtype=dtype)
    store.write_shard("train", 1, **shard_data(store, "train", 1))
    number, marker = store._number("train", 1), store.marker("train", 1)
    for name in (*(f"hooks/{hook}/acts" for hook in store.hook_points), "tokens", "keep", "document"):
        array = store._array(name)
        shard = slice(number * array.shard_shape[0], (number + 1) * array.shard_shape[0])
        ours = array.read(number, marker, "")
        zarrs = np.asarray(zarr.open_array(str(store.path / name), mode="r")[shard])
        assert (ours.dtype, ours.shape) == (zarrs.dtype, zarrs.shape)
        assert np.array_equal(ours, zarrs)
        ours[0] = 0  # it is a copy


def test_bfloat16_bits_are_stored_as_given(tmp_path) -> None:
    store = make(tmp_path / "acts.zarr", dtype="bfloat16", hook_points={POST: 3})
    data = shard_data(store, "train", 0)
    bits = np.random.default_rng(0).integers(0, 0x7F80, (CONTEXTS, SEQ, 3)).astype(np.uint16)
    store.write_shard("train", 0, **{**data, "acts": {POST: bits}})
    assert np.array_equal(store.read_stored("train", 0, POST), bits.reshape(-1, 3))


def test_row_is_context_times_length_plus_position_heldout_first(tmp_path) -> None:
    """Read with bare zarr: row c * seq_len + p of acts is position p of context c of tokens."""
    path = tmp_path / "acts.zarr"
    store = make(path, dtype="float32", hook_points={"h": 1}, n_shards={"heldout": 1, "train": 2})
    for split, shard in (("train", 1), ("heldout", 0), ("train", 0)):
        data = shard_data(store, split, shard)
        tokens = data["tokens"]
        store.write_shard(split, shard, **{**data, "acts": {"h": tokens.reshape(-1, 1) + 0.5}})
    assert [store.first_context("heldout", 0), store.first_context("train", 0)] == [0, CONTEXTS]
    assert store.first_context("train", 1) == 2 * CONTEXTS
    tokens = np.asarray(zarr.open_array(str(path / "tokens"), mode="r")[:])
    acts = np.asarray(zarr.open_array(str(path / "hooks/h/acts"), mode="r")[:])
    for context in range(3 * CONTEXTS):
        for position in range(SEQ):
            assert acts[context * SEQ + position, 0] == tokens[context, position] + 0.5
    second = store.read_contexts("train", 1)
    assert second.first_context == 2 * CONTEXTS
    assert np.array_equal(second.tokens, tokens[2 * CONTEXTS :])


def test_shard_without_kept_rows_and_shard_without_text(tmp_path) -> None:
    """Blocks that hold only the fill value must still be files; an exhausted lane needs no files."""
    store = make(tmp_path / "acts.zarr", n_shards={"heldout": 0, "train": 2})
    data = shard_data(store, "train", 0)
    blank = {name: np.zeros((CONTEXTS, SEQ), int) for name in ("tokens", "keep")}
    zeros = {hook: np.zeros((CONTEXTS * SEQ, d)) for hook, d in store.hook_points.items()}
    store.write_shard("train", 0, **{**data, **blank, "acts": zeros})
    store.write_shard("train", 1, **{**shard_data(store, "train", 1, 0), "documents": {}})
    store.finish()
    assert store.verify() == []
    assert [store.markers("train")[shard].rows for shard in (0, 1)] == [CONTEXTS * SEQ, 0]
    assert store.read_acts("train", 0, POST).shape == (CONTEXTS * SEQ, 3)
    assert store.read_acts("train", 1, POST).shape == (0, 3)
    assert store.read_contexts("train", 1).tokens.shape == (0, SEQ)
    with pytest.raises(StoreError, match="no kept rows"):
        store.totals("train", POST)


def test_totals_are_those_of_kept_rows_in_float64(tmp_path) -> None:
    store = make(tmp_path / "acts.zarr", n_shards={"heldout": 1, "train": 4})
    fill(store)
    rows = []
    for shard in range(4):
        keep = store.read_contexts("train", shard).keep.reshape(-1)
        rows.append(store.read_acts("train", shard, POST)[keep])
    kept = np.concatenate(rows).astype(np.float64)
    totals = store.totals("train", POST)
    assert totals.kept_rows == len(kept) == (3 * CONTEXTS + 2) * (SEQ - 1)
    np.testing.assert_allclose(totals.mean, kept.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(totals.mean_sq_norm, (kept**2).sum(axis=1).mean(), rtol=1e-13)


def test_create_again_resumes(tmp_path) -> None:
    path = tmp_path / "acts.zarr"
    store = make(path)
    store.write_shard("train", 2, **shard_data(store, "train", 2))
    again = make(path, n_shards={"train": np.int64(6), "heldout": 2})
    assert list(again.markers("train")) == [2]
    fill(again)
    assert again.is_complete
    assert again.verify() == []


def test_create_with_other_settings_names_them_and_changes_nothing(tmp_path) -> None:
    path = tmp_path / "acts.zarr"
    fill(make(path))
    before = contents(path)
    with pytest.raises(StoreError) as caught:
        make(path, seq_len=7, provenance={"model": {"id": "toy", "sha256": "bb"}, "text": ["x"]})
    message = str(caught.value)
    assert "seq_len: the store has 5, this call asks for 7" in message
    assert "provenance.model.sha256: the store has 'aa', this call asks for 'bb'" in message
    assert "n_shards" not in message
    assert "provenance.text" not in message
    assert contents(path) == before


def test_create_refuses_a_foreign_directory_and_takes_an_empty_one(tmp_path) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.png").write_text("meow")
    with pytest.raises(StoreError, match="photos is not an activation store"):
        make(foreign)
    assert contents(foreign) == {"cat.png": b"meow"}
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty").markers("train") == {}


def test_killed_create_leaves_nothing_or_a_whole_store(tmp_path, monkeypatch) -> None:
    """Fail at every step that touches the disk, as a kill would, then create again."""
    from store import places

    calls = {"left": 0}

    def dying(function):
        def wrapper(*args, **kwargs):
            if calls["left"] == 0:
                raise KeyboardInterrupt
            calls["left"] -= 1
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(places, "fsync", dying(places.fsync))
    monkeypatch.setattr(Path, "write_bytes", dying(Path.write_bytes))
    path = tmp_path / "acts.zarr"
    died = 0
    for step in range(1000):
        calls["left"] = step
        try:
            make(path)
            break
        except KeyboardInterrupt:
            died += 1
            if path.exists():
                ActivationStore.open(path)
                shutil.rmtree(path)
    assert died > 10
    monkeypatch.undo()
    fill(ActivationStore.open(path))
    assert ActivationStore.open(path).verify() == []
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith("creating")] == []


def test_open_names_what_is_wrong(tmp_path) -> None:
    with pytest.raises(StoreError, match="nothing is not an activation store"):
        ActivationStore.open(tmp_path / "nothing")
    path = tmp_path / "acts.zarr"
    make(path)
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"]["format"] = 99
    (path / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match="format 99"):
        ActivationStore.open(path)
    metadata["attributes"]["format"] = 1
    (path / "zarr.json").write_text(json.dumps(metadata))
    (path / "keep" / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"keep/zarr\.json"):
        ActivationStore.open(path)


def test_float16_overflow_is_refused_and_nothing_is_marked(tmp_path) -> None:
    store = make(tmp_path / "acts.zarr")
    data = shard_data(store, "train", 1)
    data["acts"][POST][2 * SEQ + 3, 1] = -70000.0
    row = (2 + 1) * CONTEXTS * SEQ + 2 * SEQ + 3  # two held-out shards and train shard 0 before it
    with pytest.raises(StoreError, match=rf"row {row} .*position 3.*70000.*65504.*bfloat16"):
        store.write_shard("train", 1, **data)
    assert store.markers("train") == {}
    data["acts"][POST][2 * SEQ + 3, 1] = np.nan
    with pytest.raises(StoreError, match=rf"row {row} .*the model itself"):
        store.write_shard("train", 1, **data)
    assert store.markers("train") == {}
    wide = make(tmp_path / "wide.zarr", dtype="bfloat16")
    data["acts"][POST][2 * SEQ + 3, 1] = -70000.0
    wide.write_shard("train", 1, **data)
    assert wide.read_acts("train", 1, POST).min() == pytest.approx(-70000, rel=2**-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((CONTEXTS, SEQ + 1), int)}, "tokens has shape"),
        ({"keep": np.zeros((CONTEXTS - 1, SEQ), bool)}, "keep has shape"),
        ({"tokens": np.full((CONTEXTS, SEQ), -1)}, "does not fit uint32"),
        ({"keep": np.full((CONTEXTS, SEQ), 2)}, "does not fit bool"),
        ({"tokens": np.zeros((CONTEXTS, SEQ))}, "integers"),
        ({"acts": {POST: np.zeros((CONTEXTS * SEQ, 3))}}, "hook_resid_pre"),
        ({"documents": {0: ("a", "b", "c")}}, "document 0"),
        ({"cursor": {"at": float("nan")}}, "JSON"),
    ],
)
def test_wrong_shards_are_refused(tmp_path, change, message) -> None:
    store = make(tmp_path / "acts.zarr")
    with pytest.raises(StoreError, match=message):
        store.write_shard("train", 0, **{**shard_data(store, "train", 0), **change})
    assert store.markers("train") == {}


def test_a_written_shard_is_not_written_again(tmp_path) -> None:
    store = make(tmp_path / "acts.zarr")
    fill(store)
    before = contents(store.path)
    with pytest.raises(StoreError, match="written already"):
        store.write_shard("train", 0, **shard_data(store, "train", 1))
    with pytest.raises(StoreError, match="no number 6"):
        store.write_shard("train", 6, **shard_data(store, "train", 6))
    assert contents(store.path) == before


def damage_truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def damage_empty(file: Path) -> None:
    os.truncate(file, 0)


def damage_delete(file: Path) -> None:
    file.unlink()


def damage_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[3] ^= 0x10
    file.write_bytes(data)


def damage_swap(file: Path) -> None:
    """Another shard's file: as a file it is sound, its own checksum included."""
    shutil.copy(file.parent.parent / "3" / "0", file)


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_delete, damage_bit, damage_swap])
@pytest.mark.parametrize("name", [f"hooks/{POST}/acts", "tokens", "keep", "document"])
def test_damage_is_never_read_as_data_and_is_repaired(tmp_path, damage, name) -> None:
    path = tmp_path / "acts.zarr"
    store = make(path, n_shards={"heldout": 1, "train": 3})
    fill(store)
    sound = contents(path)
    file = path / name / "c" / "2" / "0"  # train shard 1
    damage(file)
    store = ActivationStore.open(path)
    read = (
        functools.partial(store.read_acts, "train", 1, POST)
        if name.endswith("acts")
        else functools.partial(store.read_contexts, "train", 1)
    )
    with pytest.raises(StoreError) as caught:
        read()
    marker = path / "markers" / "train" / "00000001.json"
    assert str(file) in str(caught.value)
    assert "verify --repair" in str(caught.value)
    said = {damage_delete: "missing", damage_truncate: "bytes", damage_empty: "got 0 bytes"}
    assert said.get(damage, "checksum") in str(caught.value)
    problems = store.verify()
    assert [(problem.split, problem.shard) for problem in problems] == [("train", 1)]
    assert str(file) in problems[0].text
    if damage in (damage_truncate, damage_empty, damage_delete):  # the size alone shows it
        assert 1 not in store.markers("train")
        assert not store.is_complete
    else:
        marker.unlink()
    assert list(store.markers("train")) == [0, 2]
    with store.hold():
        store.write_shard("train", 1, **shard_data(store, "train", 1))
        store.finish()
    assert store.verify() == []
    assert contents(path) == sound


def test_damaged_marker_counts_as_unwritten(tmp_path) -> None:
    store = make(tmp_path / "acts.zarr")
    fill(store)
    markers = store.path / "markers" / "train"
    (markers / "00000001.json").write_text("{")
    shutil.copy(markers / "00000003.json", markers / "00000002.json")
    assert list(store.markers("train")) == [0, 3, 4, 5]
    assert [problem.text.split(":")[0].split("/")[-1] for problem in store.verify()] == [
        "00000001.json",
        "00000002.json",
    ]


def test_finish_wants_every_shard(tmp_path) -> None:
    store = make(tmp_path / "acts.zarr")
    store.write_shard("train", 0, **shard_data(store, "train", 0))
    with pytest.raises(StoreError, match="2 of 2 heldout shards"):
        store.finish()
    assert not store.is_complete
    assert any("1 of 6 train shards" in problem.text for problem in store.verify())
    fill(store)
    complete = json.loads((store.path / "complete.json").read_text())
    assert complete["kept_rows"] == {"heldout": 6 * (SEQ - 1), "train": 22 * (SEQ - 1)}
    assert complete["rows"] == {"heldout": 6 * SEQ, "train": 22 * SEQ}


def test_documents_merge_and_conflicts_are_named(tmp_path) -> None:
    store = make(tmp_path / "acts.zarr")
    for shard in (0, 1):
        data = shard_data(store, "train", shard)
        store.write_shard("train", shard, **data)
    assert list(store.documents("train")) == [0, 64]
    assert store.documents("train")[64] == ("train-1", "toy text", "prose", "00")
    data = shard_data(store, "train", 2)
    store.write_shard("train", 2, **{**data, "documents": {64: ("other", "s", "d", "11")}})
    with pytest.raises(StoreError, match="document 64 'other'"):
        store.documents("train")


WRITER = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from test_activations import make, fill
from pathlib import Path
print("ready", flush=True)
fill(make(Path(sys.argv[1])))
"""


def start_writer(path: Path, program: str = WRITER) -> subprocess.Popen:
    tests = Path(__file__).parent
    program = program.format(tests=str(tests), root=str(tests.parent))
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


HOLDER = WRITER.replace(
    'print("ready", flush=True)\nfill(make(Path(sys.argv[1])))',
    'with make(Path(sys.argv[1])).hold():\n    print("ready", flush=True)\n    time.sleep(60)',
)


def test_second_writer_is_refused_by_pid_and_a_dead_one_is_not_in_the_way(tmp_path) -> None:
    store = make(tmp_path / "acts.zarr")
    stray = store.path / "tokens" / "c" / "0" / "0.abc.partial"
    holder = start_writer(store.path, HOLDER)
    try:
        stray.parent.mkdir(parents=True)
        stray.write_bytes(b"half")
        with pytest.raises(StoreError, match=rf"being written by pid {holder.pid} on "):
            store.write_shard("train", 0, **shard_data(store, "train", 0))
        with pytest.raises(StoreError, match=rf"lane 63.* pid {holder.pid} "), store.hold([63]):
            pass
        assert stray.exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with store.hold():
        assert not stray.exists()
        store.write_shard("train", 0, **shard_data(store, "train", 0))
    assert list(store.markers("train")) == [0]


def test_killed_writers_leave_the_bytes_of_an_unbroken_one(tmp_path) -> None:
    whole, broken = tmp_path / "whole.zarr", tmp_path / "broken.zarr"
    fill(make(whole))
    rng = random.Random(7)
    left_incomplete = 0
    for written in (0, 2, 5):  # kill at a random moment after so many shards
        process = start_writer(broken)
        while len(list(broken.glob("markers/*/*.json"))) < written and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.05))
        process.kill()
        process.wait()
        process.stdout.close()
        if not broken.exists():
            left_incomplete += 1
            continue
        store = ActivationStore.open(broken)  # what is marked is sound at any moment
        left_incomplete += not store.is_complete
        for split in ("heldout", "train"):
            for shard, marker in store.markers(split).items():
                data = shard_data(store, split, shard, marker.contexts)
                expected = data["acts"][POST].astype(np.float16)
                assert np.array_equal(store.read_acts(split, shard, POST), expected)
    assert left_incomplete > 0
    fill(make(broken))
    assert contents(broken) == contents(whole)
    assert ActivationStore.open(broken).verify() == []


def test_a_kill_before_the_oldest_shard_goes_leaves_no_row_too_many_in_a_ring(tmp_path, monkeypatch) -> None:
    store = ActivationStore.create(
        tmp_path / "ring.zarr",
        hook_points={"h": 2},
        seq_len=4,
        contexts_per_shard=1,
        n_shards={"heldout": 1, "train": 128},
        dtype="float32",
        provenance={},
        ring_shards_per_lane=1,
    )
    text = np.ones((1, 4), int)

    def write(shard: int) -> None:
        store.write_shard(
            "train",
            shard,
            acts={"h": np.ones((4, 2), np.float32)},
            tokens=text,
            keep=text > 0,
            document=text,
            documents={},
            cursor={"at": shard},
        )

    def killed(self: ActivationStore, shard: int) -> None:
        if shard >= 0:
            raise KeyboardInterrupt

    write(0)
    write(1)
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "_drop", killed)
        with pytest.raises(KeyboardInterrupt):
            write(64)
    assert {shard: m.contexts for shard, m in store.markers("train").items()} == {0: 1, 1: 1, 64: 1}
    with store.hold([0]):
        pass
    assert {shard: m.contexts for shard, m in store.markers("train").items()} == {0: 0, 1: 1, 64: 1}
    assert store.marker("train", 0).cursor == {"at": 0}  # its place in the text is kept
