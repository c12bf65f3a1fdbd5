"""The pages Heads and Patching: saved results of lenses with their controls, and the pattern of a head."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from browser_live_fixture import D_SAE, NAMES
from browser_pages import html, payloads, run_page
from fakes import HOOK_POINT, SHAPE, write_model
from streamlit.testing.v1 import AppTest

from browser import lens_charts, lens_results, state
from browser.data import read_config, scan
from browser.lens_results import LensFileError
from browser.state import ROOT_VARIABLE
from browser.tokens import label
from browser.views import lens_parts, lens_rows
from sae.circuits.results import Control, Measure, Result, write_result
from sae.cli import main as sae_command
from sae.lm import NativeModel
from store.features import FeatureIndex

PROMPT = "the quick brown fox"


def measure(value: torch.Tensor, axes: tuple[str, ...]) -> Measure:
    control = Control(value - 1, "one less")
    return Measure(value, 5, "texts", "a formula", {"no_repeats": control}, (value - 0.1, value + 0.1), axes)


@pytest.fixture(scope="module")
def results_root(live_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two results about the dictionary's model, one about another model, and one about the dictionary."""
    root = tmp_path_factory.mktemp("lenses")
    shutil.copytree(live_root / NAMES[0], root / NAMES[0])
    about = {"model": read_config(root / NAMES[0] / "config.json")["model"]}
    directory = root / "lenses" / Path(about["model"]["id"]).name
    scores = torch.tensor([[0.25, 0.5]])
    trigrams = [{"best": [{"skip_trigram": "a … b → <b>c", "score": 1.0}], "forced_pairs": []}]
    write_result(
        Result(
            "heads", {"prefix_matching": measure(scores, ("layer", "head"))}, about, labels={"skip_trigrams": trigrams}
        ),
        directory,
    )
    labels = {
        "site": ["L0.head.0"],
        "place": ["end", "first"],
        "first_prompts": ["a b <i>", "b a <i>"],
        "logit_difference": {"clean": 3.0, "corrupt": -3.0},
        "warning": "does not do <b>this</b>",
    }
    grid = measure(torch.tensor([[0.75, 0.125]]), ("site", "place"))
    patched = Result("circuit", {"restoring_head": grid}, about | {"task": "induction"}, "induction", labels)
    write_result(patched, directory)
    curve, path = torch.tensor([0.0, -0.125, -0.5]), torch.arange(6.0).view(3, 2)
    grown = {
        "in_context_learning": measure(curve, ("snapshot",)),
        "loss_path": Measure(
            path, 9, "tokens", "f", {"no_repeats": Control(-path, "*n*")}, None, ("snapshot", "component")
        ),
    }
    maps = {"tuned_weight": torch.zeros(2, 16, 16), "tuned_bias": torch.zeros(2, 16)}
    kl = Measure(
        torch.ones(2), 5, "tokens", "f", {"bias_only": Control(torch.tensor([3.0, 4.0]), "b")}, None, ("depth",)
    )
    write_result(Result("depth", {"kl_tuned_lens": kl}, about, arrays=maps), directory)
    labels = {"snapshot": ["<b>1", "|2|", "$4$"], "tokens": [1000, 2000, 4000]}
    write_result(Result("growth", grown, about, labels=labels), directory)
    write_result(Result("circuit", patched.measures, {"model": {"sha256": "other"}}, "foreign"), directory)
    rules = {"rule_token": torch.full((D_SAE,), 9), "rule_f1": torch.full((D_SAE,), 0.75)}
    rules |= {"rule_firings": torch.full((D_SAE,), 30), "rule_f1_shuffled_labels": torch.full((D_SAE,), 0.25)}
    share = {"share": Measure(0.5, 5, "texts", "f", {"none": Control(0.0, "nothing")})}
    write_result(Result("keys", share, about, arrays=rules), root / NAMES[0] / "lenses")
    by_feature = {
        "restoring_feature.first_order": measure(torch.arange(D_SAE) / 100, ("feature",)),
        "restoring_feature": measure(torch.tensor([[0.25], [0.5]]), ("site", "place")),
    }
    labels = {"site.restoring_feature": ["feature.7", "feature.5"], "place": ["all positions"]}
    carried = Result("circuit", by_feature, about, "induction-activation-feature", labels)
    write_result(carried, root / NAMES[0] / "lenses")
    projection = torch.zeros(SHAPE.d_mlp, SHAPE.d_mlp, dtype=torch.float64)
    projection[3, 3] = 9.0
    arrays = {"projection": projection, "mean": torch.ones(SHAPE.d_mlp, dtype=torch.float64)}
    probe = Measure(0.5, 5, "t", "f", {"before": Control(0.97, "b"), "random_subspace": Control(0.96, "r")})
    erased = Result("erase", {"probe_accuracy": probe}, about | {"rank": 1, "seed": 7}, "dna", arrays=arrays)
    write_result(erased, root / NAMES[0] / "lenses")
    return root


def chart(page: AppTest, text: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """The first Vega-Lite chart of a page whose specification has this text, and its data."""
    proto = next(each.proto for each in page.get("vega_lite_chart") if text in each.proto.spec)
    sent = proto.datasets[0].data.data
    return json.loads(proto.spec), pa.ipc.open_stream(sent).read_pandas()


@pytest.fixture
def visit(results_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def go(where: Path = results_root, **params: str) -> AppTest:
        monkeypatch.setenv(ROOT_VARIABLE, str(where))
        return run_page(**({"sae": NAMES[0], "prompt": PROMPT} | params))

    return go


def test_results_are_found_by_the_model_and_read_as_they_were_written(results_root: Path) -> None:
    (entry,) = scan(results_root)
    found = lens_results.find(entry, results_root)
    assert set(found) == {
        "circuit-induction",
        "circuit-induction-activation-feature",
        "depth",
        "erase-dna",
        "growth",
        "heads",
        "keys",
    }
    result = lens_results.read(found["circuit-induction"])
    table = lens_results.table(result, "restoring_head")
    assert table["value"].tolist() == [0.75, 0.125]
    assert table["no_repeats"].tolist() == [-0.25, -0.875]
    assert table["low"].tolist() == pytest.approx([0.65, 0.025])
    assert table["place"].tolist() == ["end", "first"]
    assert lens_results.table(lens_results.read(found["keys"]), "share")["none"].tolist() == [0.0]


def test_a_damaged_result_says_what_to_do(results_root: Path, tmp_path: Path) -> None:
    (entry,) = scan(results_root)
    source = lens_results.find(entry, results_root)["heads"]
    shutil.copy(source, tmp_path / "heads.json")
    with pytest.raises(LensFileError, match="Run `sae lens` again"):
        lens_results.read(tmp_path / "heads.json")
    (tmp_path / "new.json").write_text('{"format": 99}')
    with pytest.raises(LensFileError, match="format 99"):
        lens_results.read(tmp_path / "new.json")


def test_heads_shows_scores_controls_and_the_pattern(visit: Any, tiny_model: NativeModel) -> None:
    page = visit(view="Heads", head="1")
    every, one = (page.dataframe[i].value for i in (0, 1))
    assert every["prefix_matching"].tolist() == [0.25, 0.5]
    assert one["no_repeats"].tolist() == [-0.75, -0.5]
    assert any("no\\_repeats\\: one less" in caption.value for caption in page.caption)
    (grid,) = (p for p in payloads(page.main) if "cells" in p)
    ids = torch.tensor([tiny_model.encode_prompt(PROMPT)])
    pattern = tiny_model.attention(ids, 0).pattern[1].numpy()
    sent = np.zeros_like(pattern)
    for row, column, value in grid["cells"]:
        sent[row, column] = value
    assert np.abs(sent - np.where(pattern > 0.005, pattern, 0)).max() < 1e-4


def test_patching_shows_both_prompts_and_a_measure_with_its_controls(visit: Any) -> None:
    page = visit(view="Patching", result="circuit-induction")
    assert page.dataframe[0].value["value"].tolist() == [0.75, 0.125]
    shown = html(page)
    assert "a b &lt;i&gt;" in shown
    assert "+3.00" in shown
    assert "does not do &lt;b&gt;this&lt;/b&gt;" in shown
    page = visit(view="Patching", result="keys")
    assert page.dataframe[0].value["none"].tolist() == [0.0]


@pytest.mark.parametrize(
    ("identity", "values", "domain"), [(1, [0.95, 1.02], (0.95, 1.05)), (0, [-0.2, 0.6], (-0.6, 0.6))]
)
def test_white_is_where_the_identity_patch_lies(
    identity: int, values: list[float], domain: tuple[float, float]
) -> None:
    table = pd.DataFrame({"row": ["a", "b"], "column": ["c", "c"], "value": values, "identity": [identity] * 2})
    chart = lens_charts.lens_grid_chart(table, "row", "column").to_dict()
    assert chart["encoding"]["color"]["scale"]["domain"] == pytest.approx(domain)


@pytest.mark.parametrize(("view", "command"), [("Heads", "sae lens heads"), ("Patching", "sae lens circuit")])
def test_without_a_result_the_page_names_the_command(visit: Any, live_root: Path, view: str, command: str) -> None:
    assert command in html(visit(where=live_root, view=view))


# --- growth ----------------------------------------------------------------------------------------------------------


def test_growth_curves_are_on_the_run_page_with_their_controls(visit: Any) -> None:
    page = visit(view="Run")
    curve, data = chart(page, "tokens of training")
    assert data["tokens"].tolist() == [1000, 2000, 4000]
    assert data["value"].tolist() == [0.0, -0.125, -0.5]
    assert data["no_repeats"].tolist() == [-1.0, -1.125, -1.5]
    assert {layer["encoding"]["y"]["field"] for layer in curve["layer"]} == {"low", "value", "no_repeats"}
    _, points = chart(page, "first component")
    training = points[points["path"] == "training"]
    assert training[["x", "y"]].to_numpy().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert (points["path"] == "no_repeats").sum() == 3


def test_without_growth_the_run_page_names_the_command(visit: Any, live_root: Path) -> None:
    shown = html(visit(where=live_root, view="Run"))
    assert "sae lens growth" in shown
    assert f"--out {live_root}/lenses/" in shown  # the app looks below its root


# --- lens rows -------------------------------------------------------------------------------------------------------


def test_lens_rows_end_in_the_model_and_stand_beside_other_positions(
    visit: Any, results_root: Path, tiny_model: NativeModel
) -> None:
    page = visit(view="Microscope", lens="true", at="2")
    ids = tiny_model.encode_prompt(PROMPT)
    logits = tiny_model.logits(torch.tensor([ids]))[0]
    _, drawn = chart(page, "KL to the last layer")
    last = drawn[drawn["layer"] == "after layer 0"]
    index = FeatureIndex.open(results_root / NAMES[0] / "features.zarr")
    n = len(last)
    assert n == min(len(ids), lens_rows.WINDOW)
    assert last["reads"].tolist() == [label(index.token_bytes(int(i))) for i in logits.argmax(-1)[:n]]
    assert last["p"].tolist() == pytest.approx(logits.softmax(-1).max(-1).values.tolist()[:n], abs=1e-5)
    table = page.dataframe[-1].value
    assert table["KL, logit"].iloc[-1] == pytest.approx(0, abs=1e-5)
    assert table["KL elsewhere, logit"].iloc[-1] > 0
    assert table["p(next), logit"].iloc[-1] == pytest.approx(float(logits[2].softmax(-1)[ids[3]]), abs=1e-5)
    for name in ("KL", "rank", "KL elsewhere"):  # maps of zeros change nothing
        assert table[f"{name}, tuned"].tolist() == pytest.approx(table[f"{name}, logit"].tolist())
    assert table["held-out KL, bias only"].tolist() == [3, 4]


def test_without_a_tuned_lens_the_rows_name_the_command(visit: Any, live_root: Path) -> None:
    page = visit(where=live_root, view="Microscope", lens="true")
    assert "sae lens depth" in html(page)
    assert not [name for name in page.dataframe[-1].value if "tuned" in name]


# --- erasure ---------------------------------------------------------------------------------------------------------


def written(model: NativeModel, erase: Any, n: int) -> list[int]:
    """Greedy text after the prompt, with `erase` at every position but BOS."""
    ids = model.encode_prompt(PROMPT)
    new: list[int] = []
    for _ in range(n):
        edited = model.logits(
            torch.tensor([ids + new]), HOOK_POINT, lambda x: torch.cat([x[:, :1], erase(x[:, 1:])], 1)
        )
        new.append(int(edited[0, -1].argmax()))
    return new


def test_a_concept_is_erased_beside_a_random_subspace(
    visit: Any, results_root: Path, tiny_model: NativeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    page = visit(view="Steering", edits="erase:dna", temperature="0.0", new="5")
    assert "0.50 (0.97 before, 0.96 random subspace)" in html(page)
    next(b for b in page.button if b.label == "Generate").click().run()
    assert not page.exception, page.exception
    found = page.session_state["steered"]
    axis = torch.zeros(SHAPE.d_mlp)
    axis[3] = 1.0
    erase = lambda x: x - 9 * ((x - 1) @ axis)[..., None] * axis  # noqa: E731
    assert found["rows"][0].steered_ids == written(tiny_model, erase, 5)
    noise = torch.randn(SHAPE.d_mlp, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).float()
    noise /= noise.norm()
    random = lambda x: x - ((x - 1) @ noise) @ noise.T  # noqa: E731
    assert found["control"].steered_ids == written(tiny_model, random, 5)
    titles = [p["groups"][0]["title"] for p in payloads(page.main) if "groups" in p]
    assert titles == ["Base", "Steered: dna erased", "Control: a random subspace of equal rank"]
    command, python = (code.value for code in page.code)
    assert sae_command([*shlex.split(command)[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steered"][0]["ids"] == found["rows"][0].steered_ids
    assert "pipeline.erasure(" in python


def test_steering_names_the_command_that_lets_a_concept_be_erased(visit: Any, live_root: Path) -> None:
    shown = html(visit(where=live_root, view="Steering", edits="erase:dna"))
    assert "sae lens erase" in shown
    assert "named &#x27;dna&#x27;; there is none" in shown


# --- features in circuits --------------------------------------------------------------------------------------------


def test_the_feature_page_says_in_which_circuits_it_is(visit: Any, results_root: Path, tiny_model: NativeModel) -> None:
    page = visit(view="Feature", feature="5")
    page.session_state["circuits-open"] = True
    page.run()
    assert not page.exception, page.exception
    shown = html(page)
    index = FeatureIndex.open(results_root / NAMES[0] / "features.zarr")
    assert f"<span>the token before is</span>{escape(label(index.token_bytes(9)))}" in shown
    assert "<span>held-out F1</span>0.75" in shown
    assert "<span>F1, random order</span>0.25" in shown
    tasks = next(rows for rows in lists(page) if rows["title"] == "Tasks that it carries")["rows"]
    assert [(row["label"], row["value"], row["extra"]) for row in tasks] == [
        ("induction-activation-feature restoring_feature", "+0.500", "random -0.500"),
        ("induction-activation-feature restoring_feature.first_order", "+0.050", "random -0.950"),
    ]
    heads = {rows["title"]: rows["rows"] for rows in lists(page) if rows["title"].startswith("Heads that can")}
    assert heads["Heads that can write it"] == []  # a feature of neurons
    assert heads["Heads that can read it"] == []  # of the last layer
    assert "sae lens depth" in shown  # what has not been measured yet


def lists(page: AppTest) -> list[dict[str, Any]]:
    return [each for p in payloads(page.main) if "lists" in p for each in p["lists"]]


def test_rows_of_results_lead_to_features_and_heads(visit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = visit(view="Patching", result="circuit-induction-activation-feature", measure="restoring_feature")
    assert any("Choose a row to open" in caption.value for caption in page.caption)
    opened: list[Any] = []
    monkeypatch.setattr(state, "open_feature", opened.append)
    monkeypatch.setattr(state, "open_head", lambda *head: opened.append(head))
    for name in ("feature.5", "L0.feature.17", "L1.head.0", "L10.head.3.k"):
        found = lens_parts.opener(name)
        assert found is not None
        found()
    assert opened == [5, 17, (1, 0), (10, 3)]
    assert [lens_parts.opener(name) for name in ("end", "feature.x", "L0.neuron.3", "<b>")] == [None] * 4


# --- QK by feature ---------------------------------------------------------------------------------------------------


def test_attention_shows_any_layer_and_says_where_features_are_not_read(visit: Any, tiny_model: NativeModel) -> None:
    page = visit(view="Attention", paths="Pattern of one head, every destination", layer="0", head="1", at="3")
    pattern = tiny_model.attention(torch.tensor([tiny_model.encode_prompt(PROMPT)]), 0).pattern[:, 3]
    (read,) = lists(page)
    assert [float(row["value"]) for row in read["rows"]] == pytest.approx(pattern.max(-1).values.tolist(), abs=0.006)
    assert "it is in the last one" in html(visit(view="Attention", paths="QK by feature"))


@pytest.fixture(scope="module")
def two_layers(live_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NativeModel]:
    """The same dictionary, on the first layer of a model with two."""
    root = tmp_path_factory.mktemp("two-layers")
    directory = write_model(root / "model", shape=replace(SHAPE, n_layers=2))
    model = NativeModel(directory, str(directory))
    shutil.copytree(live_root / NAMES[0], root / "runs" / NAMES[0])
    config = root / "runs" / NAMES[0] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model": model.identity()}))
    return root / "runs", model


def test_pairs_of_features_stand_beside_random_directions(visit: Any, two_layers: tuple[Path, NativeModel]) -> None:
    root, model = two_layers
    page = visit(where=root, view="Attention", paths="QK by feature", layer="1", head="1", at="4", source="2")
    ids, d_head = model.encode_prompt(PROMPT)[:5], SHAPE.d_head
    q, k = (
        model.capture(torch.tensor([ids]), f"blocks.1.attn.hook_{part}")[0, :, d_head : 2 * d_head] for part in "qk"
    )
    score = float(q[4] @ (k[2] - k[[1, 3, 4]].mean(0)) / d_head**0.5)
    assert f"<span>score above other sources</span>{score:+.3f}" in html(page)
    assert "<span>features × features</span>" in html(page)
    (grid,) = (p for p in payloads(page.main) if "cells" in p)
    assert any(column["open"] is not None for column in grid["columns"])
    pairs = next(each for each in lists(page) if each["title"].startswith("Strongest pairs"))["rows"]
    assert [abs(float(row["value"])) for row in pairs] == sorted((abs(float(r["value"])) for r in pairs), reverse=True)
    assert any("random ±" in row["extra"] for row in pairs)


def test_heads_that_read_a_feature_lead_to_their_page(visit: Any, two_layers: tuple[Path, NativeModel]) -> None:
    page = visit(where=two_layers[0], view="Feature", feature="5")
    page.session_state["circuits-open"] = True
    page.run()
    reading = next(each for each in lists(page) if each["title"] == "Heads that can read it")["rows"]
    assert {row["label"] for row in reading} == {f"head 1.{head} {way}" for head in (0, 1) for way in "qkv"}
    assert all("random ×" in row["extra"] for row in reading)
