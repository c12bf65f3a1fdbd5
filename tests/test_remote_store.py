"""The activation store on S3 (moto's server, a process on loopback): the same protocol, failures included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import s3_server
from test_activations import POST, fill, make, shard_data

from store import remote
from store.activations import ActivationStore
from store.batches import ShuffledRows
from store.common import StoreError

pytest.importorskip("obstore")
pytest.importorskip("moto")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s3") / "faults"


@pytest.fixture(scope="module", autouse=True)
def server(faults: Path) -> Iterator[str]:
    process, url = s3_server.start(faults)
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        backoff = remote.RETRY["backoff"] | {"init_backoff": timedelta(milliseconds=2)}
        patch.setattr(remote, "RETRY", remote.RETRY | {"backoff": backoff})  # the server needs no time to recover
        for name, value in environment.items():
            patch.setenv(name, value)
        yield url
    s3_server.stop(process)


@pytest.fixture
def url(request: pytest.FixtureRequest, faults: Path) -> Iterator[str]:
    yield f"s3://bucket/{request.node.name}/acts.zarr"
    faults.unlink(missing_ok=True)


def same_rows(remote: ActivationStore, local: ActivationStore) -> None:
    for split in ("heldout", "train"):
        assert remote.markers(split).keys() == local.markers(split).keys()
        for shard, marker in local.markers(split).items():
            assert remote.markers(split)[shard].to_json() == marker.to_json()
            for hook in local.hook_points:
                assert np.array_equal(remote.read_stored(split, shard, hook), local.read_stored(split, shard, hook))
            a, b = remote.read_contexts(split, shard), local.read_contexts(split, shard)
            assert np.array_equal(a.tokens, b.tokens)
            assert np.array_equal(a.document, b.document)


def test_a_remote_store_holds_what_a_local_one_does(url: str, tmp_path: Path) -> None:
    local = make(tmp_path / "acts.zarr")
    fill(local)
    fill(make(url))
    remote = ActivationStore.open(url)
    assert remote.is_complete
    assert remote.verify() == []
    same_rows(remote, local)
    assert not [key for key in remote.place.sizes() if key.startswith("owners/")]
    batches = [ShuffledRows(s, POST, batch_rows=7, seed=1).batch(3) for s in (remote, local)]
    assert np.array_equal(*batches)
    with pytest.raises(StoreError, match="seq_len: the store has 5"):
        make(url, seq_len=6)
    with pytest.raises(StoreError, match="is not an activation store"):
        ActivationStore.open(url + "-not-there")


def test_every_damage_is_named(url: str) -> None:
    store = make(url)
    fill(store)
    objects = store.place._objects  # type: ignore[attr-defined]
    import obstore

    name = f"hooks/{POST}/acts/c/3/0"
    raw = bytearray(store.place.read(name))
    raw[5] ^= 4
    obstore.put(objects, name, bytes(raw))
    store.place.delete("tokens/c/4/0", "markers/train/00000005.json")
    obstore.put(objects, "keep/c/5/0", b"")
    said = sorted(problem.text for problem in store.verify())
    assert len(said) == 4
    for words in ("keep/c/5/0: got 0 bytes", "checksum", "00000005.json: missing", "tokens/c/4/0: the file"):
        assert any(words in text for text in said), words
    assert list(store.markers("train")) == [0, 1, 4]
    store.place.write("markers/train/00000005.json", b"{}")
    with pytest.raises(StoreError, match="another writer has written it already"):
        store.place.write("markers/train/00000005.json", b"[]")


@pytest.mark.parametrize("kinds", ["500", "slow", "cut", "lost", "500 slow cut lost"])
def test_failures_in_between_change_nothing(url: str, faults: Path, tmp_path: Path, kinds: str) -> None:
    local = make(tmp_path / "acts.zarr", n_shards={"heldout": 1, "train": 3})
    fill(local)
    store = make(url.replace("[", "-").replace("]", "").replace(" ", "-"), n_shards={"heldout": 1, "train": 3})
    faults.write_text(f"0.15 {kinds}")
    fill(store)
    same_rows(store, local)
    faults.unlink()
    assert store.verify() == []


def test_a_server_that_is_gone_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(remote, "RETRY", {**remote.RETRY, "max_retries": 1, "retry_timeout": timedelta(seconds=1)})
    with pytest.raises(StoreError, match=r"s3://bucket/x.*cannot be reached .*repeat the command to continue"):
        ActivationStore.open("s3://bucket/x")


HOLDER = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from store import remote
from store.activations import ActivationStore
with ActivationStore.open(sys.argv[1]).hold([1, 2]):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_owners_of_lanes_and_taking_over(url: str) -> None:
    store = make(url)
    root = Path(__file__).parent.parent
    program = HOLDER.format(tests=str(root / "tests"), root=str(root))
    holder = subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    refused = rf"lane [12]\) is being written by pid {holder.pid} .*--take-over"
    with pytest.raises(StoreError, match=refused), store.hold():
        pass
    with store.hold([0, 3]):  # the other lanes are free, and were given back
        store.write_shard("train", 0, **shard_data(store, "train", 0))
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with pytest.raises(StoreError, match=f"pid {holder.pid} "), store.hold([1]):  # nothing says that it is dead
        pass
    with store.hold([1], take_over=True):
        store.write_shard("train", 1, **shard_data(store, "train", 1))
    assert list(store.markers("train")) == [0, 1]


def test_a_worker_that_lost_its_lane_marks_nothing_more(url: str) -> None:
    store, other = make(url), ActivationStore.open(url)
    with store.hold():
        store.write_shard("train", 0, **shard_data(store, "train", 0))
        with other.hold(take_over=True):
            with pytest.raises(StoreError, match=rf"was taken over by pid {os.getpid()}"):
                store.write_shard("train", 1, **shard_data(store, "train", 1))
            other.write_shard("train", 1, **shard_data(other, "train", 1))
    assert list(ActivationStore.open(url).markers("train")) == [0, 1]
