"""The app's pages without a browser: what they say, and what they send to the components."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from html import escape, unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from browser_fixture import DEAD, DNA, HOSTILE, HOSTILE_TOKENS, write_sae_directory
from browser_pages import APP, html, payloads, run_page
from streamlit.testing.v1 import AppTest

from browser import data, launch, live
from browser.live.ablation import Effect, Effects
from browser.registry import VIEWS
from browser.state import ROOT_VARIABLE
from browser.views import feature_examples
from store.features import FeatureIndex


@pytest.fixture
def root(planted_root: Path) -> Path:
    return planted_root


@pytest.fixture
def visit(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def go(where: Path = root, **params: str) -> AppTest:
        monkeypatch.setenv(ROOT_VARIABLE, str(where))
        return run_page(**params)

    return go


def tokens_of(page: AppTest) -> list[dict[str, Any]]:
    return [p for p in payloads(page.main) if "groups" in p]


def test_features_page_shows_the_whole_dictionary(visit: Any) -> None:
    page = visit(sae="demo/tm")
    table = page.dataframe[0].value
    assert len(table) == 64
    assert table["flag"][DEAD] == "dead"
    assert "features</span>64" in html(page)


def test_features_filters_come_from_the_url(visit: Any) -> None:
    page = visit(flag="dead", sort="number")
    assert list(page.dataframe[0].value["flag"].unique()) == ["dead"]
    page = visit(q=" the")
    assert 5 in list(page.dataframe[0].value["feature"])
    page = visit(q="nothing has this text")
    assert not page.dataframe
    assert "No feature passes these filters" in html(page)


def test_feature_page_sends_groups_of_tokens(visit: Any, root: Path) -> None:
    page = visit(view="Feature", feature=str(HOSTILE))
    index = FeatureIndex.open(root / "demo" / "tm" / "features.zarr")
    rows, values = index.firings(HOSTILE)
    (sent,) = tokens_of(page)
    assert sent["max"] == pytest.approx(values.max())
    titles = [group["title"] for group in sent["groups"]]
    assert titles == [
        "Top activations",
        *(f"Interval {i}" for i in range(11, 0, -1)),
        "Bottom activations",
        "Controls",
        "Hard negatives: its tokens",
        "Hard negatives: its neighbour",
    ]
    top = sent["groups"][0]["examples"]
    assert [e["value"] for e in top] == sorted((e["value"] for e in top), reverse=True)
    assert top[0]["value"] == pytest.approx(values.max())
    shares = [re.findall(r"([\d.]+)%", group["note"]) for group in sent["groups"][1:12]]
    for column in zip(*shares, strict=True):  # of the firings, of |Δloss|
        assert sum(map(float, column)) == pytest.approx(100, abs=0.6)
    weakest = [e["value"] for e in sent["groups"][12]["examples"]]
    assert weakest == sorted(weakest)
    fired = set(rows.tolist())
    controls, its_tokens, its_neighbour = (group["examples"] for group in sent["groups"][13:])
    assert len(controls) == 20
    for control in [*controls, *its_tokens, *its_neighbour]:
        assert control["value"] == 0
        assert control["context"] * index.seq_len + control["start"] + control["hit"] not in fired


def test_a_range_of_activations_comes_from_the_url(visit: Any, root: Path) -> None:
    page = visit(view="Feature", feature=str(HOSTILE), range="2–3.5")
    (sent,) = tokens_of(page)
    values = FeatureIndex.open(root / "demo" / "tm" / "features.zarr").firings(HOSTILE)[1]
    group = sent["groups"][0]
    assert group["title"] == "Your range"
    assert f"{((values > 2) & (values <= 3.5)).sum():,} firings" in group["note"]
    assert all(2 < e["value"] <= 3.5 for e in group["examples"])
    page.button(key="goRight").click().run()  # a range of another feature means nothing
    assert page.session_state["range"] == ""


def test_intervals_by_rank_hold_equally_many_firings(visit: Any) -> None:
    page = visit(view="Feature", feature=str(DNA), division="rank", intervals="4", single="false")
    (sent,) = tokens_of(page)
    notes = {group["title"]: group["note"] for group in sent["groups"]}
    shares = [float(re.findall(r"([\d.]+)%", notes[f"Rank interval {i}"])[0]) for i in (4, 3, 2, 1)]
    assert shares == pytest.approx([25] * 4, abs=1.5)
    assert "the 20 weakest firings" in notes["Bottom activations"]


def test_a_range_of_logit_weights_needs_the_model_and_says_so(visit: Any) -> None:
    page = visit(view="Feature", feature=str(DNA), weights="0.5…2")
    (sent,) = tokens_of(page)
    group = next(g for g in sent["groups"] if g["title"] == "Your logit weights")
    assert "no sae.safetensors" in group["note"]
    assert group["examples"] == []


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("1.5-3", (1.5, 3)),
        ("-0.5…1.2", (-0.5, 1.2)),
        ("2 , 1e1", (2, 10)),
        ("2,1", (1, 2)),
        ("-2–-1", (-2, -1)),
        ("", None),
        ("x–3", None),
        ("1e999…2e999", None),
        ("3…3", None),
    ],
)
def test_ranges_as_they_are_typed_and_dragged(text: str, bounds: tuple[float, float] | None) -> None:
    assert feature_examples.parse_range(text) == bounds


def test_lists_of_the_feature_page(visit: Any) -> None:
    page = visit(view="Feature", feature=str(HOSTILE))
    (lists,) = [p["lists"] for p in payloads(page.main) if "lists" in p]
    titles = {each["title"] for each in lists}
    assert {"Raises", "Lowers", "Fires next", "Fires together", "Similar activations", "Aligned neurons"} <= titles
    (charts,) = [p["charts"] for p in payloads(page.main) if "charts" in p]
    assert [chart["which"] for chart in charts] == ["range", "weights"]
    assert "label by rule" in html(page)


def test_ablation_reaches_the_tokens_it_changes(visit: Any, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    index = FeatureIndex.open(root / "demo" / "tm" / "features.zarr")
    rows, values = index.firings(HOSTILE)
    row = int(rows[values.argmax()])
    context, position = divmod(row, index.seq_len)
    effect = Effect(1.0, 0.5, [(5, 0.3)], [(6, -0.2)])
    monkeypatch.setattr(live, "load", lambda entry, **_: object())
    monkeypatch.setattr(feature_examples, "effects", lambda *a, **k: Effects({(context, position): effect}, True, 0.1))
    page = visit(view="Feature", feature=str(HOSTILE))
    (sent,) = [p for p in payloads(page.main) if "scale" in p]
    (drawn,) = tokens_of(page)
    assert sent["key"] == drawn["key"]
    found = sent["examples"]["0,0"]  # the top example
    assert found["d"] == [0.5]
    assert (found["p"], found["q"]) == ([pytest.approx(0.3679)], [pytest.approx(0.2231)])
    assert drawn["groups"][0]["examples"][0]["hit"] == found["i"][0]


def test_specificity_of_a_rule(visit: Any) -> None:
    page = visit(view="Feature", feature=str(DNA), rule="alphabet", rule_text="ACGT")
    assert "best F1" not in html(page)  # a closed panel computes nothing


def test_hostile_tokens_are_sent_as_data_and_never_as_markup(visit: Any) -> None:
    page = visit(view="Feature", feature=str(HOSTILE))
    (sent,) = tokens_of(page)
    texts = {"".join(t for kind, t in shown if kind == "text") for _, shown in sent["vocab"]}
    assert len(texts & set(HOSTILE_TOKENS)) > 10
    written = html(page) + "".join(m.value for m in (*page.markdown, *page.caption))
    assert not any(token in written for token in HOSTILE_TOKENS if len(token) > 4)


def test_dead_feature_explains_itself(visit: Any) -> None:
    page = visit(view="Feature", feature=str(DEAD))
    assert f"Feature {DEAD} is dead" in html(page)
    assert tokens_of(page) == []
    assert any("lists" in p for p in payloads(page.main))  # its weights are still shown


def test_previous_and_next_wrap_around(visit: Any) -> None:
    page = visit(view="Feature", feature="63")
    page.button(key="goRight").click().run()
    assert page.session_state["feature"] == 0
    page.button(key="goLeft").click().run()
    assert page.session_state["feature"] == 63


def test_bad_settings_in_a_link_fall_back(visit: Any) -> None:
    page = visit(density="x", q="<script>", around="?", draw="1e9")
    assert page.session_state["feature"] == 0
    assert page.session_state["sae"] == "demo/tm"


def linked(page: AppTest) -> dict[str, dict[str, str]]:
    """Text → parameters of the links in the page's notice."""
    found = re.findall(r'<a href="([^"]*)" target="_self">([^<]*)</a>', html(page))
    return {text: dict(parse_qsl(urlsplit(unescape(address)).query)) for address, text in found}


@pytest.mark.parametrize(
    ("asked", "said", "nearest"),
    [
        ("99999", "demo/tm has no feature 99999", 63),
        ("64", "demo/tm has no feature 64", 63),
        ("-1", "demo/tm has no feature -1", 0),
        ("abc", "“abc” is not a feature number", 0),
        ("4.5", "“4.5” is not a feature number", 0),
        ("", "“” is not a feature number", 0),
        ("<img src=x>", "“&lt;img src=x&gt;” is not a feature number", 0),
        ("9" * 5000, "is not a feature number", 0),
    ],
)
def test_a_link_to_an_unknown_feature_offers_the_nearest_one(visit: Any, asked: str, said: str, nearest: int) -> None:
    for known in ({"sae": "demo/tm"}, {}):  # without a name it is the first dictionary
        page = visit(feature=asked, view="Microscope", **known)
        assert said in html(page)
        assert "The features of demo/tm are numbered 0 to 63." in html(page)
        assert linked(page) == {
            f"Feature {nearest}": {"sae": "demo/tm", "view": "Microscope", "feature": str(nearest)},
            "All features of demo/tm": {"sae": "demo/tm", "view": "Features"},
        }
        assert page.query_params["feature"] == asked  # the link is not replaced by another one
        assert not page.number_input


def test_a_link_to_an_unknown_view_offers_all_views(visit: Any) -> None:
    page = visit(sae="demo/tm", view="nowhere", feature="4")
    assert "There is no view “nowhere”" in html(page)
    views = linked(page)
    assert list(views) == [view.title for view in VIEWS.values()]
    assert views["Map"] == {"sae": "demo/tm", "feature": "4", "view": "Map"}


def test_a_view_is_found_by_its_name_in_any_case(visit: Any) -> None:
    for name in ("feature", "Feature", "FEATURE"):
        page = visit(sae="demo/tm", view=name, feature="4")
        assert page.session_state["view"] == "feature"
        assert "Feature 4" in html(page)


@pytest.mark.parametrize("asked", ["nope", "../../etc", "demo", "<b>"])
def test_a_link_to_an_unknown_dictionary_lists_all(visit: Any, asked: str) -> None:
    page = visit(sae=asked, view="Feature", feature="4")
    assert f"There is no dictionary “{escape(asked)}”" in html(page)
    (listed,) = (p for p in payloads(page.main) if "rows" in p)
    assert [row["id"] for row in listed["rows"]] == ["demo/no-index", "demo/tm"]
    assert not listed["in_place"]


def test_the_start_page_lists_every_run(visit: Any, tmp_path: Path) -> None:
    build_run(tmp_path / "a" / "trained", evaluated=False)
    build_run(tmp_path / "a" / "evaluated")
    build_run(tmp_path / "a" / "indexed")
    (tmp_path / "a" / "indexed" / "features.zarr").mkdir()
    for name, quiet_s in (("going", 0), ("stopped", 3600)):
        folder = tmp_path / "b" / name
        folder.mkdir(parents=True)
        (folder / "train.json").write_text('{"train": {"recipe": "topk", "d_sae": 8, "tokens": 200}, "rows": {}}')
        (folder / "metrics.jsonl").write_text('{"step": 25, "rows": 50}\n')
        os.utime(folder / "metrics.jsonl", (time.time() - quiet_s,) * 2)
    page = visit(tmp_path)
    (listed,) = (p for p in payloads(page.main) if "rows" in p)
    assert [column["title"] for column in listed["columns"]] == [
        "Dictionary",
        "Recipe",
        "d_in → d_sae",
        "L0",
        "CE loss score",
        "State",
    ]
    shown = {row["id"]: [cell["text"] for cell in row["cells"]][1:] for row in listed["rows"]}
    assert shown == {
        "a/evaluated": ["towards-monosemanticity", "128 → 8", "23.4", "0.9250", "evaluated"],
        "a/indexed": ["towards-monosemanticity", "128 → 8", "23.4", "0.9250", "indexed"],
        "a/trained": ["towards-monosemanticity", "128 → 8", "–", "–", "trained"],
        "b/going": ["topk", "? → 8", "–", "–", "in training, 25%"],
        "b/stopped": ["topk", "? → 8", "–", "–", "stopped, 25%"],
    }
    links = {row["id"]: row["href"] for row in listed["rows"]}
    assert links["a/indexed"] == "?sae=a%2Findexed&view=Features"
    assert links["a/evaluated"] == "?sae=a%2Fevaluated&view=Run"
    assert listed["in_place"]
    assert page.session_state["sae"] is None  # no dictionary is chosen for the visitor


def build_run(path: Path, *, evaluated: bool = True) -> None:
    """A trained dictionary with L0 23.4 and a score of 0.925, or without an evaluation."""
    write_sae_directory(path, d_sae=8)
    report = json.loads((path / "eval.json").read_text())
    report["metrics"]["ce_loss_score_zero"] = {"value": 0.925}
    (path / "eval.json").write_text(json.dumps(report))
    if not evaluated:
        (path / "eval.json").unlink()


def test_without_an_index_the_page_says_which_command_builds_it(visit: Any, root: Path) -> None:
    for view in ("Features", "Feature", "Steering"):
        page = visit(sae="demo/no-index", view=view)
        assert "has no feature index yet" in html(page)
        assert f"sae index {root / 'demo' / 'no-index'}" in html(page)


def test_damaged_index_is_explained(visit: Any, tmp_path: Path) -> None:
    write_sae_directory(tmp_path / "run" / "tm", d_sae=8)
    (tmp_path / "run" / "tm" / "features.zarr").mkdir()
    (tmp_path / "run" / "tm" / "features.zarr" / "zarr.json").write_text("{}")
    assert "cannot be read" in html(visit(tmp_path, sae="run/tm"))


def test_run_page_of_a_trained_dictionary_without_weights_or_index(visit: Any) -> None:
    page = visit(view="Run", sae="demo/no-index")
    assert "trained" in html(page)
    assert "towards-monosemanticity" in html(page)
    fidelity = page.dataframe[0].value
    assert fidelity["metric"].tolist() == ["l0"]


def test_run_page_of_a_run_that_has_just_begun(visit: Any, tmp_path: Path) -> None:
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "train.json").write_text('{"train": {"recipe": "topk", "d_sae": 8, "tokens": 100}, "rows": {}}')
    assert "Nothing has been logged yet" in html(visit(tmp_path, view="Run"))
    assert "is not trained yet" in html(visit(tmp_path, view="Features"))
    (tmp_path / "sae" / "metrics.jsonl").write_text('{"step": 25, "rows": 50, "fvu": 0.5, "l0": 3.0}\n')
    page = visit(tmp_path, view="Run")
    assert "training now" in html(page)


def test_empty_root_is_explained(visit: Any, tmp_path: Path) -> None:
    page = visit(tmp_path)
    assert "No runs here yet" in html(page)
    assert "sae harvest" in html(page)
    assert "sae train" in html(page)


def test_steering_explains_what_is_missing(visit: Any) -> None:
    page = visit(view="Steering", feature="4")
    assert "has no sae.safetensors" in html(page)


def test_missing_model_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(name: str, **_: Any) -> None:
        raise ValueError(f"no model {name}")

    monkeypatch.setitem(sys.modules, "sae.lm", SimpleNamespace(load_model=load_model))
    write_sae_directory(tmp_path / "tm", d_sae=8)
    (tmp_path / "tm" / "sae.safetensors").write_bytes(b"")
    (entry,) = data.scan(tmp_path)
    entry.config["model"] = {"id": "no-such-model"}
    with pytest.raises(live.LiveError, match="'no-such-model' of tm could not be loaded: no model"):
        live.load(entry)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, seconds: float = 60) -> None:
    """Returns when the server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.2)


def websocket_status(port: int, host: str) -> int:
    """HTTP status of a WebSocket handshake that claims to be for `host`."""
    lines = (
        "GET /_stcore/stream HTTP/1.1",
        f"Host: {host}:{port}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "\r\n",
    )
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode())
        return int(connection.recv(64).split()[1])


def test_command_line_keeps_to_this_machine() -> None:
    line = launch.command(port=8123, open_browser=False)
    assert line[:5] == [sys.executable, "-P", "-m", "streamlit", "run"]
    assert Path(line[5]) == APP.with_name("server.py")
    for flag in (
        "--server.address=127.0.0.1",
        "--server.port=8123",
        "--server.headless=true",
        "--server.allowedHosts=localhost",
        "--server.allowedHosts=127.0.0.1",
        "--server.enableStaticServing=false",
        "--browser.gatherUsageStats=false",
        "--client.toolbarMode=minimal",
    ):
        assert flag in line
    assert "--server.headless=false" in launch.command(port=1, open_browser=True)


def test_launch_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        launch.launch(tmp_path / "nothing", port=1, open_browser=False)


def test_launch_serves_refuses_strange_hosts_and_ends_with_its_parent(root: Path, free_port: int) -> None:
    script = (
        "from pathlib import Path; from browser.launch import launch; "
        f"raise SystemExit(launch(Path({str(root)!r}), port={free_port}, open_browser=False))"
    )
    url = f"http://127.0.0.1:{free_port}/_stcore/health"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert f"http://localhost:{free_port}" in process.stdout.readline()
            wait_for(url)
            assert websocket_status(free_port, "evil.example") == 403
            assert websocket_status(free_port, "localhost") == 101
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)
