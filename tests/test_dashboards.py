"""Feature pages of other tools: what is read equals what was written; damaged files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dump_files
import numpy as np
import pytest
from browser_pages import html, payloads
from dump_files import TEXTS, acts_of
from streamlit.testing.v1 import AppTest

import browser
from browser import data, dumps, export
from browser.catalogue import feature_table
from browser.state import ROOT_VARIABLE
from sae import cli, pipeline
from sae.interop.dashboards import token_bytes
from sae.interop.files import InteropError
from sae.pipeline import PipelineError
from store.features import FeatureIndex
from store.notes import Note

MAKE: dict[str, Callable[[Path], Path]] = {"sae-dashboard": dump_files.dashboard, "paper": dump_files.paper}
ORDER = {"sae-dashboard": [0, 1, 2], "paper": [1, 2, 0]}


def imported(folder: Path, format: str) -> FeatureIndex:
    pipeline.import_dump(MAKE[format](folder / "dump"), folder / "runs" / "theirs", format=format)
    return FeatureIndex.open(folder / "runs" / "theirs" / "features.zarr")


@pytest.mark.parametrize("format", list(MAKE))
def test_every_text_and_activation_is_kept(tmp_path: Path, format: str) -> None:
    index = imported(tmp_path, format)
    assert index.sampled
    for feature in (0, 1):
        first, count = index.panel("dump/contexts", feature).tolist()
        assert count == len(TEXTS)
        rows, values = index.firings(feature)
        found = np.zeros((index.n_contexts, index.seq_len), np.float32)
        found.reshape(-1)[rows] = values
        for context, text in enumerate(ORDER[format], first):
            tokens = [index.token_bytes(t) for t in index.tokens_at(context)[: len(TEXTS[text])]]
            assert tokens == [token_bytes(token) for token in TEXTS[text]]
            size = int(index.keep_at(context).sum())
            assert size == len(TEXTS[text])
            np.testing.assert_array_equal(found[context, :size], dump_files.dense(feature, [text])[0])
            assert int(index.panel("dump/hit", context)) == TEXTS[text].index(" cat")


def test_groups_statistics_and_losses_of_the_papers_pages(tmp_path: Path) -> None:
    index = imported(tmp_path, "paper")
    groups = dumps.groups(index, 10, before=100, after=100)
    assert [(title, n) for title, n, _ in groups] == [("Top", 2), ("Subsample <interval> 1", 1)]
    assert groups[1][2][0].value == pytest.approx(acts_of(10, 0)[1])
    effects = dumps.effects(index, groups[0][2])
    assert {e.change for e in effects.at.values()} == {0.25}
    assert len(effects.at) == 2
    assert dumps.histogram(index, "act", 10).to_dict("list") == {"low": [0, 1], "high": [1, 2], "count": [8, 2]}
    assert data.logit_weights(index, "top", 10, 5) == [(index_of(index, b" dog"), 1.5)]
    table = feature_table(index)
    assert table["density"][10] == pytest.approx(0.002)
    assert table["max"][10] == pytest.approx(9.5)
    assert table["flag"][[0, 5, 10]].tolist() == ["", "absent", ""]
    assert "mean" not in table
    assert "domain" not in table


def index_of(index: FeatureIndex, token: bytes) -> int:
    return next(i for i in range(index.d_vocab) if index.token_bytes(i) == token)


def test_bars_given_by_their_centre_and_the_bins_of_a_dashboard(tmp_path: Path) -> None:
    index = imported(tmp_path, "sae-dashboard")
    assert dumps.histogram(index, "logit", 3).to_dict("list") == {
        "low": [-1.5, -0.5, 0.5],
        "high": [-0.5, 0.5, 1.5],
        "count": [5, 90, 5],
    }
    titles = [title for title, _, _ in dumps.groups(index, 3, before=9, after=9)]
    assert titles == ["Top activations", "Activation 0 … 1 (12.500% of all tokens)"]
    assert index.attributes["model"]["id"] == "made-up"


@pytest.mark.parametrize(
    ("text", "raw"),
    [
        ("cat", b"cat"),
        ("\\xc3", b"\xc3"),
        (" \\xe2\\x80", b" \xe2\x80"),
        ("\\x41", b"\\x41"),
        ("\\", b"\\"),
        ("é", "é".encode()),
        ("\\xc3é\\xAF", b"\xc3\xc3\xa9\xaf"),
    ],
)
def test_bytes_written_as_text_become_bytes(text: str, raw: bytes) -> None:
    assert token_bytes(text) == raw


def broken(change: Callable[[dict[str, Any]], Any]) -> str:
    feature = dump_files.paper_feature(1)
    change(feature)
    return json.dumps(feature)


BROKEN = {
    "no JSON": "{",
    "a list": "[1, 2]",
    "nested too deep": "[" * 100_000,
    "another object": '{"index": 3, "examples": []}',
    "no number": broken(lambda f: f.update(index="first")),
    "a huge number": broken(lambda f: f.update(index=1 << 40)),
    "a negative number": broken(lambda f: f.update(index=-1)),
    "an activation too few": broken(lambda f: f["examples_quantiles"][0]["examples"][0]["tokens_acts_list"].pop()),
    "an infinite activation": broken(
        lambda f: f["examples_quantiles"][0]["examples"][0].update(tokens_acts_list=[float("inf"), 1, 1])
    ),
    "an activation beyond float16": broken(
        lambda f: f["examples_quantiles"][0]["examples"][0].update(tokens_acts_list=[1e9, 1, 1])
    ),
    "a token that is no text": broken(
        lambda f: f["examples_quantiles"][0]["examples"][0].update(tokens_str_list=[1, 2, 3])
    ),
    "edges of another length": broken(lambda f: f.update(act_bucket_edges=[0.0])),
    "a density in words": broken(lambda f: f["statistics"].update(density_frac="rare")),
    "a feature twice": broken(lambda f: f.update(index=0)),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_damaged_file_is_named_and_no_output_is_left(tmp_path: Path, what: str) -> None:
    source = dump_files.paper(tmp_path / "dump", (0,))
    (source / "1.json").write_text(BROKEN[what])
    with pytest.raises(ValueError, match=r"1\.json|65504"):
        pipeline.import_dump(source, tmp_path / "out", format="paper")
    assert not (tmp_path / "out").exists()


def test_empty_sources_and_filled_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InteropError, match=r"no \.json file"):
        pipeline.import_dump(tmp_path / "empty", tmp_path / "out", format="paper")
    source = dump_files.paper(tmp_path / "dump")
    with pytest.raises(PipelineError, match="one of sae-dashboard, paper"):
        pipeline.import_dump(source, tmp_path / "out", format="html")
    with pytest.raises(PipelineError, match="not empty"):
        pipeline.import_dump(source, source, format="paper")


def test_import_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = dump_files.dashboard(tmp_path / "dump"), tmp_path / "out"
    assert cli.main(["import", str(source), "--format", "sae-dashboard", "--out", str(out)]) == 0
    assert cli.main(["info", str(out)]) == 0
    assert "feature dump" in capsys.readouterr().out
    assert cli.main(["import", str(source), "--format", "paper", "--out", str(tmp_path / "b")]) == 2
    assert cli.main(["import", str(source), "--format", "paper", "--model", "m", "--out", str(tmp_path / "b")]) == 2


def test_a_dump_in_the_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported(tmp_path, "paper")
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "runs"))

    def visit(**params: str) -> AppTest:
        page = AppTest.from_file(str(Path(browser.__file__).with_name("app.py")), default_timeout=60)
        for name, value in params.items():
            page.query_params[name] = value
        page.run()
        assert not page.exception, page.exception
        return page

    assert "sampled" in visit(view="Features").caption[0].value
    page = visit(view="Feature", feature="10")
    (shown,) = (p for p in payloads(page.main) if "groups" in p)
    assert [group["title"] for group in shown["groups"]] == ["Top", "Subsample <interval> 1"]
    assert "Controls" not in json.dumps(shown)
    drawn = [[shown["vocab"][v][1] for v in e["v"]] for group in shown["groups"] for e in group["examples"]]
    assert [len(tokens) for tokens in drawn] == [len(TEXTS[i]) for i in (1, 2, 0)]
    assert "".join(text for pieces in drawn[0] for kind, text in pieces) == "".join(TEXTS[1])
    assert drawn[1][1:3] == [[["hex", "c3"]], [["text", "ï"]]]
    charts = next(p for p in payloads(page.main) if "charts" in p)["charts"]
    assert charts[0]["bars"] == [[0, 1, 8], [1, 2, 2]]
    effects = next(p for p in payloads(page.main) if "examples" in p)["examples"]
    assert {tuple(found["d"]) for found in effects.values()} == {(0.25,)}
    assert "is not in this dump" in html(visit(view="Feature", feature="5"))
    assert "imported pages" in html(visit(view="Run"))
    for view in ("Microscope", "Steering", "Map", "Compare", "Token", "Attention"):
        assert f"{view} needs more than theirs has" in html(visit(view=view))


def test_an_exported_feature_of_a_dump_claims_no_more_than_it_holds(tmp_path: Path) -> None:
    described = export.describe(imported(tmp_path, "paper"), 10, Note(10))
    assert described["sampled"]
    assert not {"count", "mean", "p99"} & set(described["statistics"])
    assert "recall" not in described["fires_on"][0]
    page = export.to_html("theirs", [described]).decode()
    assert "<script>" not in page
    assert "Subsample &lt;interval&gt; 1" in page
