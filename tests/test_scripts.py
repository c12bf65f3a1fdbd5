"""Every script explains itself; scripts without a separate test file run here on tiny input."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from fakes import HOOK_POINT, SHAPE, made_up_documents, write_jsonl, write_model

from sae import pipeline
from sae.evaluation.blocks import Block
from sae.lm import NativeModel
from sae.pipeline.controls import Setup
from store.activations import ActivationStore

SCRIPTS = Path(__file__).parents[1] / "scripts"
PROGRAMS = sorted(path.stem for path in SCRIPTS.glob("*.py") if "ArgumentParser" in path.read_text())


@pytest.fixture(autouse=True)
def neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other, as when they are run; one thread, as all tests."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("BENCH_THREADS", "1")


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    status: int | None = script(name).main()
    return status or 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_shows_how_a_script_is_run_and_what_each_option_is(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, name, "--help")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert f"    python scripts/{name}.py" in said
    lines = [*said.partition("\noptions:\n")[2].splitlines(), ""]
    pairs = [(line, below) for line, below in pairwise(lines) if line.startswith("  -")]
    silent = [line for line, below in pairs if "  " not in line.strip() and not below.startswith(" " * 20)]
    assert pairs
    assert not silent, "these options have no help"


def test_a_dictionary_from_text_and_the_features_of_its_domains(
    tmp_path: Path,
    tiny_model_dir: Path,
    tiny_text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result, seconds = script("dictionary").build(
        [str(tiny_text)],
        tmp_path,
        model=str(tiny_model_dir),
        tokens=8192,
        recipe="topk",
        d_sae=48,
        train_tokens=8192,
        index_tokens=8192,
        config={"k": 4, "batch_tokens": 256},
    )
    assert list(seconds) == ["harvest", "train", "eval", "index"]
    assert result["metrics"]["l0"]["value"] == pytest.approx(4, abs=0.1)
    capsys.readouterr()
    cases = tmp_path / "domains.svg"
    assert run(monkeypatch, "domains", tmp_path / "topk-48-s0", "--svg", cases) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {"domain", "prose", "dna", "numbers"}
    assert len(lines["dna"]) == len(lines["prose"]) + 1  # only DNA has one of the paper's proxies
    assert all(0 <= float(share) <= 1 for share in lines["dna"][3:6])
    assert cases.read_text().count("<polyline") == 3  # specificity, sensitivity, the share of all text
    results, drawing = tmp_path / "rules.json", tmp_path / "rules.svg"
    options = ("--firings", "20", "--tokens", "4096", "--json", results, "--svg", drawing)
    assert run(monkeypatch, "rules", tmp_path / "topk-48-s0", *options) == 0
    measured = json.loads(results.read_text())["topk-48-s0"]["measured"]
    assert measured.keys() == {"features", "neurons", "pca", "ica", "random"}
    assert all(found["scored"] + found["silent"] <= found["units"] for found in measured.values())
    assert drawing.read_text().count("<polyline") == 5


def test_solu_and_relu_twins_are_scored_by_the_same_rules(
    tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neurons before the norm are x · softmax(x), and the model's own LayerNorm makes of them what it calls neurons."""
    model = NativeModel(write_model(tmp_path / "lm", shape=replace(SHAPE, act_fn="solu_ln")), str(tmp_path / "lm"))
    tokens = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    mlp = model.module.blocks[0].mlp
    x = model.capture(tokens, "blocks.0.mlp.hook_in").double().flatten(0, 1)
    pre = x @ mlp.get_submodule("in").weight.double().T + mlp.get_submodule("in").bias.double()
    block = Block(torch.zeros(2, 20, 1), tokens, torch.ones(2, 20, dtype=torch.bool), np.zeros((2, 20)))
    found = script("solu").before_the_norm(model, HOOK_POINT)(block)
    torch.testing.assert_close(found.double(), pre * pre.exp() / pre.exp().sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mlp.ln(found), model.capture(tokens, HOOK_POINT).flatten(0, 1), rtol=1e-4, atol=1e-5)

    out = tmp_path / "solu"
    pipeline.harvest(model, tiny_text, out / "acts.zarr", tokens=1024, heldout_tokens=1024)
    pipeline.train(
        out / "acts.zarr", out / "d", recipe="topk", d_sae=24, tokens=1024, config={"k": 4, "batch_tokens": 128}
    )
    options = ("--firings", "20", "--tokens", "1024", "--json", tmp_path / "solu.json")
    assert run(monkeypatch, "solu", out / "d", *options) == 0
    measured = json.loads((tmp_path / "solu.json").read_text())["solu"]["figures"]["measured"]
    names = ["neurons", "neurons before the norm", "shuffled model", "random directions", "features"]
    assert set(measured) == set(names)
    assert all(0 < each["scored"] <= each["units"] for each in measured.values())
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_a_unit_that_fires_on_one_token_has_a_perfect_rule(tiny_model: NativeModel, tiny_store: Path) -> None:
    solu, setup = script("solu"), Setup(ActivationStore.open(tiny_store), tiny_model, HOOK_POINT, 1024, "cpu")
    text = script("rules").text_of(setup)
    tokens = torch.cat([block.tokens[block.keep] for block in setup.blocks("heldout")])
    counts = tokens.bincount(minlength=300)
    token = int((counts - 20).abs().argmin())  # about 20 times in the text
    n = int(counts[token])
    found = solu.scored(setup, lambda block: (block.tokens.flatten()[:, None] == token).float(), text, n)
    assert found["f1"]["median"]["value"] == 1
    noise = torch.Generator().manual_seed(0)
    blind = solu.scored(setup, lambda block: torch.rand(block.tokens.numel(), 8, generator=noise), text, n)
    assert blind["f1"]["median"]["value"] < 0.3


def test_the_proxy_of_dna_finds_sequences_in_capitals_and_in_small_letters() -> None:
    """Two tokens of nucleotides or more, of one case; one such token alone, or a change of case, is a word."""
    vocabulary = [b"GATT", b"gatt", b"act", b" of", b"the", b" and"]
    text = np.array([[3, 0, 0, 3, 4, 3], [3, 1, 1, 1, 3, 4], [4, 2, 3, 4, 3, 2], [0, 1, 3, 4, 3, 4]])
    tokens = np.concatenate([text, np.full((200, 6), 5)])  # else a token would be rarer in a sequence than elsewhere
    found = script("domains").proxy("dna", tokens, np.ones(tokens.shape, bool), vocabulary)[:4]
    assert found.tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0] * 6, [0] * 6]


def test_a_models_card_knows_its_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "lm")
    rng = np.random.default_rng(0)
    for split in ("train", "heldout"):
        np.save(model / f"tokens-{split}.npy", rng.integers(0, 300, 5000).astype(np.uint16))
    text = write_jsonl(tmp_path / "validation.jsonl", made_up_documents(60))
    assert run(monkeypatch, "model_card", model, "--validation", text, "--json", tmp_path / "card.json") == 0
    found = json.loads((tmp_path / "card.json").read_text())
    assert found["by_domain"].keys() == {"prose", "dna", "numbers"}
    assert sum(domain["tokens"] for domain in found["by_domain"].values()) == found["tokens"]
    assert found["all"]["unigram"] == pytest.approx(np.log(300), abs=0.1)  # counted on uniform tokens
    assert "| **all** |" in capsys.readouterr().out


def test_a_search_over_pretraining_settings(
    tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "d_model=16,d_mlp=32,n_heads=2,d_head=8,n_ctx=16,d_vocab=300,batch_contexts=4"
    tried = (f"{shape},lr=0.01", f"{shape},lr=0.01,n_layers=2")
    options = ["--text", tiny_text, "--tokens", "640", "--json", tmp_path / "search.json"]
    options += [part for text in tried for part in ("--try", text)]
    assert run(monkeypatch, "pretrain_search", tmp_path / "runs", *options) == 0
    found = json.loads((tmp_path / "search.json").read_text())
    assert [len(found[text]["neurons"]) for text in tried] == [1, 2]
    assert all(found[text]["tokens"] == 640 for text in tried)
    assert capsys.readouterr().out.count("n_layers=2") == 2
    with pytest.raises(ValueError, match="no setting 'learning'"):
        run(monkeypatch, "pretrain_search", tmp_path / "none", "--text", tiny_text, "--try", "learning=1")
    assert not (tmp_path / "none").exists()


def test_python_sources_of_a_smaller_size_are_some_of_a_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, library = script("python_sources"), tmp_path / "library"
    for number in range(40):
        path = library / ("tests" if number % 4 == 3 else "package") / f"{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {number}\n" * 200)
    (library / "package" / "short.py").write_text("x = 1\n")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(library))
    few, few_bytes = module.gather(tmp_path / "few", 8000)
    many, many_bytes = module.gather(tmp_path / "many", 10**6)
    assert 0 < few < many == 30
    assert few_bytes <= 8000 < many_bytes
    for path in (tmp_path / "few").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


def test_memory_over_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    path.write_text('{"another section": 1}')
    assert run(monkeypatch, "store_memory", "epochs", "--rows", "16384", "--epochs", "2", "--json", path) == 0
    found = json.loads(path.read_text())
    assert found["another section"] == 1
    assert {"date", "cpu", "zarr", "load_average"} <= found["memory, epochs"]["measured"].keys()
    for reading in found["memory, epochs"]["figures"].values():
        assert reading["rows"] == 16384
        assert len(reading["rss_mb_after_epoch"]) == 2


def test_the_store_is_compared_with_other_formats() -> None:
    found = script("bench_store").compare(rows=8192, rounds=1, shard_rows=1024)
    assert [entry["format"] for entry in found] == ["numpy memmap", "safetensors shards", "activation store"]
    assert all(entry["exact_rows_per_s"] > 0 for entry in found)
    assert 0 < found[-1]["mixing_two_level"] <= 1


def test_bf16_products_beside_the_default_ones(
    tmp_path: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokens", "4096", "--d-sae", "48", "--seeds", "0", "--set", "batch_tokens=512", "--set", "l1=2"]
    places = ["--acts", tiny_store, "--out", tmp_path / "runs", "--hook-point", HOOK_POINT]
    assert run(monkeypatch, "bench_bf16", *places, *options, "--json", tmp_path / "bf16.json") == 0
    runs = json.loads((tmp_path / "bf16.json").read_text())["runs"]
    assert [each["matmul"] for each in runs] == ["auto", "bf16"]
    assert "bf16" in runs[1]["chosen"]
    assert "mean difference" in capsys.readouterr().out


def test_a_made_up_index_is_as_large_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from store.features import FeatureIndex

    text = tmp_path / "long.txt"
    text.write_text(" ".join(document.text for document in made_up_documents(100)))
    size = ["--tokens", "2048", "--d-sae", "64"]
    assert run(monkeypatch, "bench_browser_index", tmp_path / "runs", "--text", text, *size) == 0
    index = FeatureIndex.open(Path(capsys.readouterr().out.strip()) / "features.zarr")
    assert (index.d_sae, index.n_contexts) == (64, 8)
