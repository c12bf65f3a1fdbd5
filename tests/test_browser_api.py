"""The app's data as JSON: against the index itself, for the app's own hosts only, and nothing but reading."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_fixture import DEAD, DENSE, DNA
from starlette.applications import Starlette
from starlette.testclient import TestClient

from browser import api, launch
from browser.launch import Proxy
from browser.named_lists import Lists
from browser.refusals import BASE_PATH_VARIABLE, HOSTS_VARIABLE
from browser.state import ROOT_VARIABLE
from store.features import FeatureIndex
from store.notes import NAME, Note, Notes


@pytest.fixture
def directory(planted_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "runs"
    shutil.copytree(planted_root, root)
    (root / "demo" / "tm" / NAME).unlink(missing_ok=True)
    monkeypatch.setenv(ROOT_VARIABLE, str(root))
    monkeypatch.setenv(HOSTS_VARIABLE, "localhost 127.0.0.1 *.example.org")
    return root / "demo" / "tm"


@pytest.fixture
def client(directory: Path) -> TestClient:
    return TestClient(Starlette(routes=api.routes()), base_url="http://localhost:8501")


def get(client: TestClient, address: str, status: int = 200) -> Any:
    answer = client.get(address)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert "access-control-allow-origin" not in answer.headers  # other web pages cannot read it
    return answer.json()


def test_the_table_and_the_pages_hold_what_the_index_holds(client: TestClient, directory: Path) -> None:
    index = FeatureIndex.open(directory / "features.zarr")
    known = get(client, "/api/dictionaries")["dictionaries"]
    assert [(each["id"], each["indexed"]) for each in known] == [("demo/no-index", False), ("demo/tm", True)]
    table = get(client, "/api/features?sae=demo/tm")["features"]
    assert [row["feature"] for row in table] == list(range(index.d_sae))
    for row in table:
        count = len(index.firings(row["feature"])[0])
        assert row["density"] == pytest.approx(count / index.kept_tokens, rel=1e-12)
    assert table[DEAD]["delta_loss"] is None  # nan, which JSON cannot hold
    dense, dna = get(client, f"/api/feature?sae=demo/tm&feature={DENSE},{DNA}")["features"]
    assert (dense["feature"], dna["feature"]) == (DENSE, DNA)
    rows, values = index.firings(DENSE)
    histogram = dense["histograms"]["activations"]
    expected, _ = np.histogram(values.astype(np.float64), [0.0, *histogram["high"]])
    assert sum(histogram["count"]) == len(rows)
    assert np.abs(np.array(histogram["count"]) - expected).sum() <= 4  # values on an edge are counted below it here
    near = index.panel("neighbours/id", DNA).tolist()
    assert [each["feature"] for each in dna["neighbours"]] == near
    assert [each["cosine"] for each in dna["neighbours"]] == index.panel("neighbours/cosine", DNA).tolist()
    assert dna["aligned_neurons"][0]["neuron"] == int(index.panel("neurons/weight_id", DNA)[0])


def test_filters_notes_and_lists(client: TestClient, directory: Path) -> None:
    assert not (directory / NAME).exists()
    assert get(client, "/api/notes?sae=demo/tm") == {"sae": "demo/tm", "notes": [], "lists": {}}
    assert not (directory / NAME).exists()  # reading leaves nothing behind
    Notes(directory).put(Note(3, "mine"))
    Lists(directory).add("a & b", [DEAD, 3])
    told = get(client, "/api/notes?sae=demo/tm")
    assert (told["notes"][0]["label"], told["lists"]) == ("mine", {"a & b": [DEAD, 3]})

    def numbers(query: str) -> list[int]:
        return [row["feature"] for row in get(client, f"/api/features?sae=demo/tm&{query}")["features"]]

    assert numbers("list=a+%26+b") == [3, DEAD]
    assert numbers("list=a+%26+b&flag=dead") == [DEAD]
    assert numbers("q=mine") == [3]
    assert numbers("q=nothing has this text") == []


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        ("/api/else", 404, "no such address"),
        ("/api/features", 404, "no dictionary"),
        ("/api/features?sae=../../etc", 404, "no dictionary"),
        ("/api/features?sae=demo/no-index", 409, "no feature index"),
        ("/api/features?sae=demo/tm&list=gone", 404, "no list"),
        ("/api/features?sae=demo/tm&flagg=dead", 400, "unknown parameter flagg; this address has sae, list, flag,"),
        ("/api/dictionaries?sae=demo/tm", 400, "unknown parameter sae; this address has none"),
        ("/api/features?sae=demo/tm&flag=deed", 404, "flag=deed: expected one of alive, dead,"),
        ("/api/features?sae=demo/tm&domain=latin", 404, "domain=latin: expected one of"),
        ("/api/feature?sae=demo/tm", 404, "0 to 63"),
        ("/api/feature?sae=demo/tm&feature=64", 404, "0 to 63"),
        ("/api/feature?sae=demo/tm&feature=-1", 404, "0 to 63"),
        ("/api/feature?sae=demo/tm&feature=" + "9" * 5000, 404, "0 to 63"),
        ("/api/feature?sae=demo/tm&feature=" + ",".join(["1"] * 201), 400, "at most 200"),
    ],
)
def test_what_does_not_exist_is_named(client: TestClient, address: str, status: int, message: str) -> None:
    assert message in get(client, address, status)["error"]


def test_the_addresses_are_named_with_and_without_a_slash(client: TestClient) -> None:
    told = get(client, "/api")
    assert told == get(client, "/api/")
    assert set(told["addresses"]) == set(api.ADDRESSES)


def test_damaged_notes_are_an_answer(client: TestClient, directory: Path) -> None:
    (directory / NAME).write_bytes(b"no database, but long enough to look at" * 40)
    assert "not a database" in get(client, "/api/notes?sae=demo/tm", 409)["error"]


@pytest.mark.parametrize("host", ["evil.example.com", "localhost.evil.com", "example.org", "", "127.0.0.1.evil.com:80"])
def test_other_hosts_are_refused(client: TestClient, host: str) -> None:
    assert client.get("/api/dictionaries", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8501", "127.0.0.1:1", "hub.example.org:443"])
def test_the_hosts_of_the_app_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/dictionaries", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_nothing_but_reading(client: TestClient, method: str) -> None:
    for name in ("", "dictionaries", "notes", "else"):
        assert client.request(method, f"/api/{name}?sae=demo/tm").status_code == 405


def test_it_is_below_the_base_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BASE_PATH_VARIABLE, "user/ann")
    client = TestClient(Starlette(routes=api.routes()), base_url="http://localhost")
    assert client.get("/user/ann/api/dictionaries").status_code == 200
    assert client.get("/api/dictionaries").status_code == 404


def test_the_running_app_serves_it(directory: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    root, proxy = directory.parent.parent, Proxy((), "/lab")
    line = launch.command(port=port, open_browser=False, proxy=proxy)
    environment = launch.environment(root, proxy)
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        assert server.stdout is not None
        while b"URL:" not in server.stdout.readline():
            assert server.poll() is None, "the server ended before it served"
        try:
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}/lab/api/features?sae=demo/tm", headers={"Accept": "text/html"}
            )
            with urllib.request.urlopen(asked, timeout=60) as answer:
                assert len(json.load(answer)["features"]) == 64
        finally:
            server.terminate()
            server.wait(30)
