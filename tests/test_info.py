"""A feature in the terminal: its description matches the index, and no token can control the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from browser_fixture import DEAD, HOSTILE, SEQ_LEN, Corpus, activations, build_index

from sae import cli, pipeline
from sae.pipeline.info import visible

N_CONTEXTS = 48


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "sae"
    build_index(path / "features.zarr", d_sae=64, n_contexts=N_CONTEXTS)
    return path


def test_a_feature_in_the_terminal(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = Corpus(N_CONTEXTS)
    acts = activations(corpus, 64, 0)[:, HOSTILE].reshape(N_CONTEXTS, SEQ_LEN)
    assert cli.main(["info", str(directory), "--feature", str(HOSTILE), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["firings"] == (acts > 0).sum()
    assert found["density"] == pytest.approx((acts > 0).sum() / corpus.keep.sum())
    strongest = [value for value in np.sort(acts.max(1))[::-1] if value > 0]
    assert [e["activation"] for e in found["examples"]] == pytest.approx(list(map(float, strongest[:12])))
    for each in found["examples"]:
        place = np.argwhere(acts == np.float32(each["activation"]))
        assert any(visible(corpus.vocabulary[corpus.tokens[c, p]]) == each["token"] for c, p in place)
    assert sum(found["fires_on"].values()) <= 1 + 1e-6


def test_text_in_the_terminal_is_shown_and_not_obeyed(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for feature in range(12):
        assert cli.main(["info", str(directory), "--feature", str(feature)]) == 0
    out = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in out)
    assert visible(b"\x1b[31m a\n\xc3") == "\\x1b[31m a\\n\\xc3"
    assert "feature 7" in out
    assert pipeline.describe_feature(directory, DEAD)["examples"] == []


def test_a_feature_that_is_not_there(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(directory), "--feature", "64"]) == 2
    assert "0 … 63" in capsys.readouterr().err
    assert cli.main(["info", str(directory / "features.zarr"), "--feature", "3"]) == 0
