"""Pages of a dictionary whose activations came as arrays: images, row numbers, and views that need a model."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_pages import html, payloads, run_page
from PIL import Image
from streamlit.testing.v1 import AppTest

from browser.pictures import SIDE, patch_grid, picture_of
from browser.registry import VIEWS
from browser.state import ROOT_VARIABLE
from sae import pipeline
from store.features import FeatureIndex

GRID, LEADING, D_IN = 3, 1, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images`: samples of 1 + 3² rows with an image each (number 0 is no image). `rows`: rows without samples."""
    top = tmp_path_factory.mktemp("arrays")
    rng = np.random.default_rng(0)
    acts = rng.standard_normal((60, LEADING + GRID**2, D_IN)).astype(np.float32)
    for i in range(1, 60):
        Image.new("RGB", (40, 20), (4 * i, 0, 255 - 4 * i)).save(top / f"{i}.png")
    (top / "0.png").write_text("<svg onload=alert(1)>")
    (top / "list.txt").write_text("".join(f"{i}.png\n" for i in range(60)))
    made = {
        "images": pipeline.store_activations(acts, top / "images.zarr", images=str(top / "list.txt")),
        "rows": pipeline.store_activations(acts.reshape(-1, D_IN), top / "rows.zarr"),
    }
    for name, store in made.items():
        settings: dict[str, Any] = {"d_sae": 24, "l0": 4, "tokens": 4000, "config": {"batch_tokens": 200}}
        pipeline.train(store, top / name, **settings)
        pipeline.evaluate(top / name)
        pipeline.index(top / name)
    return top


def visit(root: Path, monkeypatch: pytest.MonkeyPatch, **params: str) -> AppTest:
    monkeypatch.setenv(ROOT_VARIABLE, str(root))
    return run_page(**params)


def busiest(root: Path, name: str) -> tuple[FeatureIndex, int]:
    index = FeatureIndex.open(root / name / "features.zarr")
    return index, int(np.argmax(index.stats["count"]))


def test_examples_are_the_images_of_their_samples(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, feature = busiest(root, "images")
    page = visit(root, monkeypatch, sae="images", view="Feature", feature=str(feature))
    (sent,) = [each for each in payloads(page.main) if "groups" in each]
    checked = 0
    for example in (example for group in sent["groups"] for example in group["examples"]):
        sample = int(re.findall(r"\[(\d+), \d+\]$", example["row"])[0])
        if sample == 0:  # no image: a line of row numbers, as without a list of images
            assert "picture" not in example
            continue
        shown = Image.open(io.BytesIO(base64.b64decode(sent["pictures"][example["picture"]].split(",")[1])))
        assert shown.size == (SIDE, SIDE)
        red, _, blue = shown.getpixel((50, 50))  # type: ignore[misc]
        assert abs(red - 4 * sample) < 6
        assert abs(blue - (255 - 4 * sample)) < 6
        assert (example["grid"], example["leading"], len(example["a"])) == (GRID, LEADING, LEADING + GRID**2)
        checked += 1
    assert checked > 20


def test_rows_without_samples_are_shown_by_their_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, feature = busiest(root, "rows")
    page = visit(root, monkeypatch, sae="rows", view="Feature", feature=str(feature))
    (sent,) = [each for each in payloads(page.main) if "groups" in each]
    example = sent["groups"][0]["examples"][0]
    number = int(re.findall(r"\[(\d+)\]$", example["row"])[0])
    _, shown = sent["vocab"][example["v"][example["hit"]]]
    assert shown == [["text", f"{number} "]]
    rows, values = index.firings(feature)
    assert index.row_name(int(rows[values.argmax()])) == example["row"]


@pytest.mark.parametrize("view", [view.title for view in VIEWS.values()])
def test_every_view_opens_or_says_that_there_is_no_model(
    root: Path, monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    page = visit(root, monkeypatch, sae="images", view=view, token="#3")
    needs = {each.title for each in VIEWS.values() if each.needs_model}
    assert ("runs the model, and images has none" in html(page)) == (view in needs)


def test_what_is_no_image_is_not_shown(root: Path, tmp_path: Path) -> None:
    index = FeatureIndex.open(root / "images" / "features.zarr")
    names = [index.document_of(context * index.seq_len).id for context in range(index.n_contexts)]
    assert [picture_of(index, c) is None for c in range(len(names))] == [name == "0.png" for name in names]


@pytest.mark.parametrize(
    ("positions", "grid"),
    [(197, (14, 1)), (196, (14, 0)), (257, (16, 1)), (261, (16, 5)), (50, (7, 1)), (1, (0, 0)), (1500, (0, 0))],
)
def test_the_patches_of_known_vision_transformers_are_a_square(positions: int, grid: tuple[int, int]) -> None:
    assert patch_grid(positions) == grid
