"""The pages that run the model, with a real tiny one: their figures against the mathematics."""

from __future__ import annotations

import base64
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from browser_live_fixture import D_SAE, NAMES
from browser_pages import html, payloads
from streamlit.testing.v1 import AppTest

import browser
from browser import data, live
from browser.live import LiveError, prompts, steering
from browser.state import ROOT_VARIABLE
from browser.views.steering import _as_text
from sae.cli import main as sae_command
from sae.dictionary.files import load
from sae.interventions.attribution import attribute, inspect
from sae.interventions.edits import Edit
from sae.interventions.steering import Generation
from sae.lm import NativeModel
from store.features import FeatureIndex

APP = Path(browser.__file__).with_name("app.py")
PROMPT = "the quick brown fox"


@pytest.fixture
def root(live_root: Path) -> Path:
    return live_root


@pytest.fixture
def visit(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def go(**params: str) -> AppTest:
        monkeypatch.setenv(ROOT_VARIABLE, str(root))
        page = AppTest.from_file(str(APP), default_timeout=120)
        for name, value in ({"sae": NAMES[0], "prompt": PROMPT} | params).items():
            page.query_params[name] = value
        page.run()
        assert not page.exception, page.exception
        return page

    return go


def grid_of(page: AppTest) -> dict[str, Any]:
    (found,) = (p for p in payloads(page.main) if "cells" in p)
    return found


def rows_of(page: AppTest, title: str) -> list[dict[str, Any]]:
    (found,) = (
        each for p in payloads(page.main) if "lists" in p for each in p["lists"] if each["title"].startswith(title)
    )
    return found["rows"]


# --- microscope ------------------------------------------------------------------------------------------------------


def test_the_microscope_shows_what_fires(visit: Any, root: Path, tiny_model: NativeModel) -> None:
    page = visit(view="Microscope", columns="60", hide="false")
    sae, ids = load(root / NAMES[0]), tiny_model.encode_prompt(PROMPT)
    found = inspect(tiny_model, sae, ids, hook_point=sae.config["hook_point"])
    sent = grid_of(page)
    assert [sent["vocab"][v][0] for v in sent["rows"]] == ids
    dense = np.zeros((len(ids), D_SAE))
    dense[found.positions, found.features] = found.acts
    dense[0] = 0  # BOS is not shown
    shown = np.zeros_like(dense)
    for row, column, value in sent["cells"]:
        shown[row, sent["columns"][column]["open"]] = value
    np.testing.assert_allclose(shown, dense, atol=1e-4)
    assert sent["selected"] == len(ids) - 1
    by_title = {bar["title"]: bar["values"] for bar in sent["bars"]}
    assert by_title["loss"][0] is None
    np.testing.assert_allclose(by_title["loss"][1:], found.loss[1:], atol=1e-4)
    np.testing.assert_allclose(by_title["Δloss, spliced"][1:], (found.loss_spliced - found.loss)[1:], atol=1e-4)


def test_a_chosen_token_and_what_pushes_the_one_after_it(visit: Any, root: Path, tiny_model: NativeModel) -> None:
    page = visit(view="Microscope", at="3", hide="false")
    sae, ids = load(root / NAMES[0]), tiny_model.encode_prompt(PROMPT)
    found = attribute(tiny_model, sae, ids, position=3, token=ids[4], hook_point=sae.config["hook_point"])
    pushing = rows_of(page, "Pushes")
    by_feature = {int(row["prefix"]): float(row["value"]) for row in pushing if row["prefix"]}
    expected = dict(zip(found.features.tolist(), found.by_feature.tolist(), strict=True))
    assert by_feature == pytest.approx({f: expected[f] for f in by_feature}, abs=6e-4)
    parts = [float(row["value"]) for row in pushing[:-1]]
    assert sum(parts) == pytest.approx(float(pushing[-1]["value"]), abs=0.01)  # what the page shows adds up
    assert rows_of(page, "Fires on 3")
    assert len(rows_of(page, "Predicted after it")) == 8


@pytest.mark.parametrize("view", ["Microscope", "Attention"])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ", "The prompt is empty"),
        ("the quick brown fox jumps " * 30, "tokens; at most 32"),
        ("x" * 2001, "tokens; at most 32"),  # the box cuts at 2,000 characters
    ],
)
def test_prompts_that_cannot_be_shown(visit: Any, view: str, prompt: str, message: str) -> None:
    assert message in html(visit(view=view, prompt=prompt))


def test_a_prompt_too_long_for_the_box_is_refused_without_it() -> None:
    with pytest.raises(LiveError, match="2,001 characters; at most 2,000"):
        prompts.check_prompt("x" * 2001)


# --- attention -------------------------------------------------------------------------------------------------------


def test_attention_paths_sum_to_the_pre_activation(visit: Any, root: Path, tiny_model: NativeModel) -> None:
    page = visit(view="Attention", feature="5", at="4")
    sae, ids = load(root / NAMES[0]), tiny_model.encode_prompt(PROMPT)
    x = tiny_model.capture(torch.tensor([ids]), sae.config["hook_point"])[0, 4]
    pre_act = float(sae.pre_acts(x)[5])
    assert f"<span>pre-activation</span>{pre_act:+.3f}" in html(page)
    sent = grid_of(page)
    assert [column["title"] for column in sent["columns"]] == ["direct", "head 0", "head 1"]
    pushed = sum(cell[2] for cell in sent["cells"])
    (biases,) = [part.split("</div>")[0] for part in html(page).split("<span>biases</span>")[1:]]
    assert pushed + float(biases) == pytest.approx(pre_act, abs=5e-3)
    assert max(cell[0] for cell in sent["cells"]) <= 4  # nothing comes from later tokens


def test_the_pattern_of_a_head(visit: Any, tiny_model: NativeModel) -> None:
    sent = grid_of(visit(view="Attention", paths="Pattern of one head, every destination", head="1"))
    rows = np.zeros(len(sent["rows"]))
    for row, column, value in sent["cells"]:
        assert column <= row
        rows[row] += value
    np.testing.assert_allclose(rows, 1, atol=0.05)  # weights below 0.005 are left out


# --- steering --------------------------------------------------------------------------------------------------------


def generate(page: AppTest) -> AppTest:
    next(b for b in page.button if b.label == "Generate").click().run()
    assert not page.exception, page.exception
    return page


def texts_of(page: AppTest) -> list[dict[str, Any]]:
    return [p["groups"][0] for p in payloads(page.main) if "groups" in p]


def test_steering_with_several_features_and_the_command_that_repeats_it(
    visit: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = FeatureIndex.open(root / NAMES[0] / "features.zarr").stats
    first, second = np.argsort(-stats["max"])[:2].tolist()
    edits = f"{first}:set:6:p99 {second}:add:3:active"
    page = generate(visit(view="Steering", edits=edits, seed="4", new="9"))
    base, steered = texts_of(page)
    assert base["title"] == "Base"
    assert steered["title"] == f"Steered: {first} set to 6 × P99, {second} raised by 3 × max where active"
    assert "under the base model" in steered["note"]
    command, python = (code.value for code in page.code)
    assert sae_command([*shlex.split(command)[1:], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (row,) = page.session_state["steered"]["rows"]
    assert said["steered"][0]["ids"] == row.steered_ids
    assert said["base"]["ids"] == row.base_ids
    namespace: dict[str, Any] = {}
    exec(python, namespace)
    assert namespace["rows"][0].steered_ids == row.steered_ids


def test_a_sweep_has_a_text_for_each_strength(visit: Any) -> None:
    page = generate(visit(view="Steering", edits="3:set:1", sweep="true", new="5"))
    assert [text["title"] for text in texts_of(page)] == ["Base", "× 0", "× 1", "× 2", "× 5", "× 10"]


def test_the_papers_pinned_sampling(visit: Any) -> None:
    page = visit(view="Steering", feature="3", new="4")
    next(b for b in page.button if "pinned" in b.label).click().run()
    assert not page.exception
    assert page.session_state["edits"] == "3:set:1"
    assert page.session_state["prompt"] == "1,2,3,4,5,6,7,8,9,10"
    assert len(texts_of(page)) == 2


def test_the_table_of_edits_is_the_text_in_the_address(visit: Any) -> None:
    page = visit(view="Steering", feature="7")
    assert page.session_state["edits"] == ""
    next(b for b in page.button if b.label == "Add feature 7").click().run()
    assert page.session_state["edits"] == "7:set:5"

    frame = pd.DataFrame(
        {
            "feature": [7, 9],
            "mode": ["set", "ablate"],
            "value": [5.0, np.nan],
            "unit": ["max", "max"],
            "where active": False,
        }
    )
    changes = {
        "edited_rows": {0: {"mode": "scale", "value": 0.5, "where active": True}},
        "deleted_rows": [1],
        "added_rows": [{"feature": 11, "unit": "p99"}],
    }
    now = type("Page", (), {"feature": 7})()
    assert _as_text(now, frame, changes) == "7:scale:0.5:active 11:set:5:p99"


def test_steering_explains_what_it_cannot_do(visit: Any) -> None:
    assert "cannot be read" in html(visit(view="Steering", edits="7:clamp:5"))
    page = generate(visit(view="Steering"))
    assert "Nothing is steered yet" in html(page)
    page = generate(visit(view="Steering", edits="99999:set:5"))
    assert "feature 99999 does not exist" in html(page)


def test_steering_keeps_its_limits_whatever_the_page_sends() -> None:
    call: dict[str, Any] = {
        "prompt": "x",
        "edits": [Edit(0)],
        "factors": [1.0],
        "generation": Generation(),
        "units": {},
    }
    for change, message in (
        ({"prompt": "x" * 2001}, "2,001 characters; at most 2,000"),
        ({"prompt": " "}, "prompt is empty"),
        ({"generation": Generation(max_new_tokens=129)}, "at most 128"),
        ({"edits": [Edit(i) for i in range(17)]}, "17 edits; at most 16"),
        ({"factors": [1.0] * 7}, "7 strengths; allowed are 1 to 6"),
    ):
        with pytest.raises(LiveError, match=message):
            next(steering.sweep(live.Live(None, None), **(call | change)))
    with pytest.raises(LiveError, match="at most 16"):
        steering.parse(" ".join(f"{i}:ablate" for i in range(17)))


def test_a_prompt_is_read_in_the_form_that_the_page_chooses(visit: Any, tiny_model: NativeModel) -> None:
    marked = tiny_model.encode_prompt("a<|endoftext|>b", special_tokens=True)
    for form, ids in (("Text", tiny_model.encode_prompt("a<|endoftext|>b")), ("Special tokens", marked)):
        page = visit(view="Microscope", prompt="a<|endoftext|>b", form=form)
        assert page.number_input(key="at").max == len(ids) - 1
    assert "has no chat template" in html(visit(view="Microscope", form="Chat"))
    assert "has no chat template" in html(generate(visit(view="Steering", form="Chat", edits="1:ablate")))


@pytest.mark.parametrize(("form", "flags"), [("text", []), ("special", ["--special-tokens"]), ("chat", ["--chat"])])
def test_the_command_and_the_code_read_the_prompt_as_the_page_does(form: str, flags: list[str]) -> None:
    asked: dict[str, Any] = {"path": "d", "prompt": prompts.Prompt("why?", form), "edits": [Edit(0)], "factors": [1.0]}
    words = shlex.split(steering.as_command(**asked, generation=Generation()))
    assert [word for word in words if word in ("--special-tokens", "--chat")] == flags
    code = steering.as_python(**asked, generation=Generation())
    assert ("special_tokens=True" in code, "'role': 'user'" in code) == (form == "special", form == "chat")


def test_simultaneous_users_get_the_same_results_as_alone(root: Path, tiny_model: NativeModel) -> None:
    """Microscope, attention and steering of several sessions share one model: one lock protects its hooks."""
    (entry, _) = data.scan(root)
    loaded = live.Live(tiny_model, load(entry.path))
    stats = FeatureIndex.open(entry.index_path).stats
    units = {"feature_max": stats["max"], "feature_p99": stats["p99"]}
    feature = int(np.argmax(stats["max"]))

    def user(number: int) -> Any:
        prompt = f"the quick {'brown fox ' * (number % 3)}"
        ids = prompts.encode(loaded, prompt)
        kind = number % 4
        if kind == 0:
            found = inspect(tiny_model, loaded.sae, ids, hook_point=entry.config["hook_point"])
            return found.loss_spliced[1:].tolist()
        if kind == 1:
            return prompts.attribute(loaded, entry, ids, len(ids) - 1, 9).by_feature.tolist()
        if kind == 2:
            return prompts.paths(loaded, entry, ids, feature=feature, position=len(ids) - 1).heads.tolist()
        edits, generation = steering.parse(f"{feature}:set:{number}"), Generation(number, max_new_tokens=6)
        *_, rows = steering.sweep(loaded, prompt, edits, [0.0, 5.0], generation, units)
        return [row.steered_ids for row in rows]

    numbers = list(range(12)) * 2
    alone = [user(number) for number in numbers]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(user, numbers)) == alone
    assert not tiny_model.lock.locked()


# --- map, token, compare ---------------------------------------------------------------------------------------------


def test_the_map_holds_every_feature(visit: Any, root: Path) -> None:
    page = visit(view="Map", colour="density", feature="11")
    (sent,) = (p for p in payloads(page.main) if "xy" in p)
    index = FeatureIndex.open(root / NAMES[0] / "features.zarr")
    xy = np.frombuffer(base64.b64decode(sent["xy"]), "<f4").reshape(-1, 2)
    np.testing.assert_array_equal(xy, index.column("map/pca"))
    colour = np.frombuffer(base64.b64decode(sent["colour"]), "<f4")
    count = index.stats["count"]
    assert np.array_equal(np.isnan(colour), count == 0)
    alive = np.flatnonzero(count)
    assert np.all(np.diff(colour[alive[np.argsort(count[alive], kind="stable")]]) >= 0)
    assert sent["chosen"] == 11
    token = page.dataframe  # the map has no table
    assert not token
    faint = np.frombuffer(base64.b64decode(sent["faint"]), "u1")
    assert np.array_equal(faint.astype(bool), count == 0)


def test_a_token_by_precision_and_recall(visit: Any, root: Path) -> None:
    """Compared with counts made here from the firings and the text."""
    index = FeatureIndex.open(root / NAMES[0] / "features.zarr")
    token = int(np.argmax(index.token_counts))
    tokens = np.concatenate([index.tokens_at(c) for c in range(index.n_contexts)])
    keep = np.concatenate([index.keep_at(c) for c in range(index.n_contexts)])
    follows = np.zeros(len(tokens), bool)
    for row in range(len(tokens) - 1):
        follows[row] = (row + 1) % index.seq_len != 0 and keep[row + 1] and tokens[row + 1] == token
    for which, hit in (("Fire on it", keep & (tokens == token)), ("Fire just before it", follows)):
        page = visit(view="Token", token=f"#{token}", list=which, least="1")
        table = page.dataframe[0].value.set_index("feature")
        occurs = (keep & (tokens == token)).sum()
        expected = {}
        for feature in range(D_SAE):
            rows, _ = index.firings(feature)
            if hit[rows].any():
                expected[feature] = (hit[rows].sum() / len(rows), hit[rows].sum() / occurs)
        assert sorted(table.index) == sorted(expected)
        for feature, (precision, recall) in expected.items():
            assert table["precision"][feature] == pytest.approx(precision)
            assert table["recall"][feature] == pytest.approx(recall)
        assert list(table["f1"]) == sorted(table["f1"], reverse=True)
    page = visit(view="Token", token=f"#{token}", list="Raise its logit", least="1")
    if page.dataframe:
        found = page.dataframe[0].value
        assert all(token in index.panel("logits/top_id", int(f)) for f in found["feature"])


def test_a_word_that_is_not_a_token_suggests_tokens_that_contain_it(visit: Any, root: Path) -> None:
    index = FeatureIndex.open(root / NAMES[0] / "features.zarr")
    names = [index.token_bytes(i) for i in range(index.d_vocab)]
    words = [name.strip() for name in names if name.strip().isalpha()]
    parts = (word[i : i + 2] for word in sorted(words, key=len)[::-1] for i in range(len(word) - 1))
    part = next(part for part in parts if part not in names)
    page = visit(view="Token", token=part.decode())
    assert f"No token is exactly “{part.decode()}”" in html(page)
    rows = rows_of(page, "Tokens that contain it")
    assert rows
    assert all(part in names[row["open"]].lower() for row in rows)
    page = visit(view="Token", token="<script>alert(1)</script>")
    assert "&lt;script&gt;" in html(page)


def test_compare_reads_what_sae_compare_wrote(visit: Any, root: Path) -> None:
    page = visit(view="Compare", other=NAMES[1])
    table = page.dataframe[0].value
    shared = table[table["feature"] < D_SAE // 2]
    assert len(shared)
    same = shared[shared["feature"] == shared["B"]]
    assert len(same) / len(shared) > 0.7  # half of the features are the same in both
    np.testing.assert_allclose(same["cosine"], 1, atol=1e-5)
    written = json.loads((root / NAMES[0] / "compare" / "tiny--b" / "compare.json").read_text())
    assert f"<span>tokens</span>{written['tokens']:,}" in html(page)
    turned = visit(sae=NAMES[1], view="Compare", other=NAMES[0])
    back = turned.dataframe[0].value
    pairs = set(zip(table["feature"], table["B"], strict=True))
    assert {(b, a) for a, b in zip(back["feature"], back["B"], strict=True)} == pairs
    for side in ("Unmatched in A", "Unmatched in B", "Splitting"):
        visit(view="Compare", other=NAMES[1], side=side)


def test_without_a_comparison_the_decoders_are_compared(visit: Any, root: Path) -> None:
    folder = root / NAMES[0] / "compare"
    folder.rename(root / "away")
    try:
        page = visit(view="Compare", other=NAMES[1])
        assert f"sae compare {root / NAMES[0]} {root / NAMES[1]}" in html(page)
        table = page.dataframe[0].value.set_index("feature")
        decoders = [load(root / name).W_dec for name in NAMES]
        cosines = decoders[0] @ decoders[1].T
        np.testing.assert_allclose(table["cosine"].sort_index(), cosines.max(1).values, atol=1e-5)
    finally:
        (root / "away").rename(folder)


def test_another_model_under_the_same_name_is_refused(root: Path) -> None:
    (entry, _) = data.scan(root)
    entry.config["model"]["sha256"] = "ab" * 32
    with pytest.raises(LiveError, match="has changed since tiny/a was trained"):
        live.load(entry)


def test_deep_links_hold_the_whole_state(visit: Any) -> None:
    page = visit(view="Microscope", at="2", next="17", by="Σ activation", columns="5", hide="false")
    state = page.session_state
    assert (state["at"], state["next"], state["by"], state["columns"], state["hide"]) == (2, 17, "sum", 5, False)
    page = visit(view="Attention", at="99", head="50")
    assert not page.exception
