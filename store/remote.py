"""Objects behind a URL as the place of an activation store: s3://, gs://, az:// and all others that obstore reaches.

The same protocol as for a directory. A PUT is atomic, and a marker is put only if it is absent. A lane's owner is an
object, too, because no kernel frees locks across machines: the owner object of a dead worker is taken over on request
(`--take-over`), and a worker that has lost its lane in this way marks no more shards.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np

from store.common import StoreError, writer_name
from store.schema import json_bytes

METADATA = "zarr.json"
CONNECTIONS = 16
RETRY: dict[str, Any] = {  # cut connections and status 500 are retried for about 90 s
    "max_retries": 12,
    "retry_timeout": timedelta(seconds=90),
    "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=10), "base": 2},
}
TIMEOUT_S = "60s"
T = TypeVar("T")


class RemotePlace:
    """The objects under a URL. Credentials and endpoint come from the environment (AWS_…, GOOGLE_…, AZURE_…)."""

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ImportError as error:
            raise StoreError(f"{url}: remote stores need obstore: pip install 'monosem[remote]'") from error
        self.path = url.rstrip("/")
        self.errors: tuple[type[Exception], ...] = (obstore.exceptions.BaseError,)
        self._obstore = obstore
        with self._named(""):
            connect: Any = from_url
            self._objects = connect(
                self.path,
                client_options={"timeout": TIMEOUT_S, "allow_http": os.environ.get("AWS_ALLOW_HTTP") == "true"},
                retry_config=RETRY,
            )

    def where(self, key: str) -> str:
        return f"{self.path}/{key}" if key else self.path

    @contextlib.contextmanager
    def _named(self, key: str) -> Iterator[None]:
        """Turns errors of obstore into StoreErrors that name the object."""
        try:
            yield
        except FileNotFoundError:
            raise
        except self.errors as error:
            reason = str(error).strip().splitlines()[0]
            raise StoreError(
                f"{self.where(key)}: cannot be reached ({reason}). Every shard written before is complete; "
                "check the URL, the credentials and the network, then repeat the command to continue"
            ) from error

    def read(self, key: str) -> bytes:
        try:
            with self._named(key):
                return bytes(self._obstore.get(self._objects, key).bytes())
        except FileNotFoundError as error:
            raise StoreError(f"{self.where(key)}: no such object") from error

    def load(self, key: str) -> np.ndarray:
        return np.frombuffer(bytearray(self._obstore.get(self._objects, key).bytes()), np.uint8)

    def read_all(self, prefix: str) -> dict[str, bytes]:
        keys = sorted(key for key in self._list(f"{prefix}/") if key.endswith(".json"))
        return dict(zip(keys, self._each(self.read, keys), strict=True))

    def size(self, key: str) -> int | None:
        try:
            with self._named(key):
                return int(self._obstore.head(self._objects, key)["size"])
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        return self._list(None)

    def _list(self, prefix: str | None) -> dict[str, int]:
        with self._named(prefix or ""):
            return {
                str(entry["path"]): int(entry["size"])
                for batch in self._obstore.list(self._objects, prefix=prefix)
                for entry in batch
            }

    def write(self, key: str, data: bytes, *, replace: bool = False) -> None:
        with self._named(key):
            try:
                self._obstore.put(self._objects, key, data, mode="overwrite" if replace else "create")
                return
            except self._obstore.exceptions.AlreadyExistsError:
                pass
        if self.read(key) != data:  # the same bytes are our own PUT whose answer was lost, or an equal one
            raise StoreError(f"{self.where(key)}: another writer has written it already; nothing was overwritten")

    def write_chunk(self, key: str, data: bytes) -> None:
        self.write(key, data, replace=True)

    def delete(self, *keys: str) -> None:
        def remove(key: str) -> None:
            with self._named(key), contextlib.suppress(FileNotFoundError):
                self._obstore.delete(self._objects, key)

        self._each(remove, keys)

    def leftovers(self) -> list[str]:
        return []  # an interrupted PUT leaves nothing

    def create(self, files: Mapping[str, bytes], directories: Iterable[str]) -> None:
        for key, content in sorted(files.items(), key=lambda item: item[0] == METADATA):
            self.write(key, content, replace=key != METADATA)

    def is_vacant(self) -> bool:
        """Empty, or only with what a killed creation leaves: the arrays' metadata without the store's own."""
        keys = self._list(None)
        return METADATA not in keys and all(key.endswith(f"/{METADATA}") for key in keys)

    @contextlib.contextmanager
    def owned(self, lanes: Iterable[int], *, take_over: bool = False) -> Iterator[Callable[[int], None]]:
        lanes = list(lanes)
        mine = json_bytes({"holder": writer_name(), "token": uuid.uuid4().hex}, self.path)
        taken: list[int] = []

        def claim(lane: int) -> None:
            try:
                self.write(_owner(lane), mine, replace=take_over)
            except StoreError:
                holder = self._holder(lane)
                if holder is None:
                    raise
                raise StoreError(
                    f"{self.path} (lane {lane}) is being written by {holder}: wait for it to end. "
                    "If that process is dead, repeat the command with --take-over"
                ) from None
            taken.append(lane)

        def check(lane: int) -> None:
            if self.read(_owner(lane)) != mine:
                raise StoreError(
                    f"{self.path} (lane {lane}) was taken over by {self._holder(lane) or 'another worker'}; this one "
                    "stops. Every shard written before is complete"
                )

        def release(lane: int) -> None:
            with contextlib.suppress(StoreError):  # cannot be reached: the next worker takes the lane over
                if self.read(_owner(lane)) == mine:
                    self.delete(_owner(lane))

        try:
            self._each(claim, lanes)
            yield check
        finally:
            self._each(release, taken)

    def _holder(self, lane: int) -> str | None:
        try:
            return str(json.loads(self.read(_owner(lane)))["holder"])
        except (StoreError, ValueError, KeyError, TypeError):
            return None

    def _each(self, work: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="objects") as pool:
            return list(pool.map(work, items))


def _owner(lane: int) -> str:
    return f"owners/{lane:02d}.json"
