"""Crosscoders: several layers or models under one set of features, and what the decoder says of each feature there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import SHAPE, made_up_documents, write_jsonl, write_model
from starlette.applications import Starlette
from starlette.testclient import TestClient
from streamlit.testing.v1 import AppTest
from torch import Tensor

import browser
from browser import api
from browser.refusals import HOSTS_VARIABLE
from browser.state import ROOT_VARIABLE
from sae import pipeline
from sae.cli import main
from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import load
from sae.dictionary.sites import Site, fold_site_scales, norm_shares, site_cosines, site_decoders, sites_of
from sae.interventions.attribution import inspect
from sae.jobs.checkpoint import read_tensors
from sae.kernels import choose, device_named
from sae.lm import NativeModel
from sae.pipeline.sites import JoinedRows, open_sites
from sae.training.config import TrainConfig
from sae.training.loop import train
from sae.training.objectives import ScaledBatch, StepContext, l1_of_site_norms
from sae.training.recipes import resolve
from sae.training.rows import Batch
from store.activations import ActivationStore
from store.common import HELD_OUT, TRAIN, StoreError

IN, POST = "blocks.0.mlp.hook_in", "blocks.0.mlp.hook_post"
TOKENS = {"tokens": 4096, "heldout_tokens": 512}
FEW = {"recipe": "crosscoder", "d_sae": 24, "tokens": 4096, "config": {"batch_tokens": 128}}


# --- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_loss_and_gradients_are_those_of_the_formula(sparse: bool) -> None:
    """Σ_s ‖x^s − x̂^s‖² + λ Σ_i f_i Σ_s ‖W_dec,i^s‖ for three sites of 3, 4 and 2 values, in float64."""
    widths, d_sae, rows, weight = (3, 4, 2), 7, 11, 0.3
    generator = torch.Generator().manual_seed(0)
    sae = SAE(sum(widths), d_sae, pre_bias=False).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(rows, sum(widths), generator=generator, dtype=torch.float64)
    _, config = resolve("crosscoder", d_sae=d_sae, tokens=rows, batch_tokens=rows)
    dead = torch.zeros(d_sae, dtype=torch.bool)
    context = StepContext(config, choose("reference"), weight, sparse, dead, site_widths=widths)
    found = l1_of_site_norms(sae, ScaledBatch(x, x), context).loss
    found.backward()
    ours = {name: parameter.grad for name, parameter in sae.named_parameters()}

    W_enc, b_enc, W_dec, b_dec = (
        tensor.detach().clone().requires_grad_() for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    )
    expected = torch.zeros((), dtype=torch.float64)
    starts = [0, 3, 7]
    for row in x:
        pre = b_enc + sum(row[a : a + w] @ W_enc[a : a + w] for a, w in zip(starts, widths, strict=True))
        f = pre.clamp_min(0)
        for a, w in zip(starts, widths, strict=True):
            expected = expected + (row[a : a + w] - f @ W_dec[:, a : a + w] - b_dec[a : a + w]).pow(2).sum() / rows
            for i in range(d_sae):
                expected = expected + weight * f[i] * W_dec[i, a : a + w].pow(2).sum().sqrt() / rows
    expected.backward()
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-12, atol=0)
    for name, wanted in {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}.items():
        torch.testing.assert_close(ours[name], wanted.grad, rtol=1e-9, atol=1e-12)


# --- planted truth ---------------------------------------------------------------------------------------------------

N_SHARED, N_FIRST, N_SECOND, WIDTH = 6, 4, 4, 16


class PlantedSites:
    """Two sites of 16 values made from 6 shared features (with a direction at each) and 4 of each site alone.

    The second site is seven times as large, which its scale undoes.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        n = N_SHARED + N_FIRST + N_SECOND
        directions = torch.stack([torch.linalg.qr(torch.randn(WIDTH, n, generator=generator))[0].T for _ in range(2)])
        directions[1, N_SHARED : N_SHARED + N_FIRST] = 0
        directions[0, N_SHARED + N_FIRST :] = 0
        self.directions = torch.cat([directions[0], 7 * directions[1]], dim=-1)  # [features, 2 · WIDTH], raw
        raw = self._raw(4096, 99)
        scales = [float(part.pow(2).sum(-1).mean() ** -0.5) for part in raw.split(WIDTH, dim=-1)]
        self.sites = [Site("first", WIDTH, scales[0]), Site("second", WIDTH, scales[1])]
        self.d_in = 2 * WIDTH

    def _raw(self, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        on = torch.rand(n, len(self.directions), generator=generator) < 0.1
        return (on * (1 + torch.rand(on.shape, generator=generator))) @ self.directions

    def sample(self, n: int, seed: int) -> Tensor:
        scale = torch.tensor([s.scale for s in self.sites]).repeat_interleave(WIDTH)
        return self._raw(min(n, 4096), seed) * scale

    def batch(self, step: int) -> Batch:
        return Batch(self.sample(256, 1_000_000 + step))


def test_it_finds_which_planted_features_belong_to_which_site(tmp_path: Path) -> None:
    rows = PlantedSites()
    _, config = resolve("crosscoder", d_sae=32, tokens=256 * 1500, batch_tokens=256, lr=3e-3, l1=1.0)
    sae = train(rows, tmp_path, config, provenance={"sites": [site._asdict() for site in rows.sites]})
    assert sites_of(load(tmp_path)) == rows.sites
    raw = rows._raw(2000, 5)  # raw rows: the scales of the sites are folded in
    for part, part_hat in zip(raw.split(WIDTH, -1), sae(raw).split(WIDTH, -1), strict=True):
        assert (part - part_hat).pow(2).sum() / (part - part.mean(0)).pow(2).sum() < 0.1
    shares = norm_shares(site_decoders(sae, rows.sites))[:, 1]
    normal = torch.nn.functional.normalize
    cosine, learned = (normal(rows.directions) @ normal(sae.W_dec).T).max(-1)
    assert cosine.min() > 0.95
    found = shares[learned]
    assert ((found[:N_SHARED] > 0.35) & (found[:N_SHARED] < 0.65)).all()
    assert found[N_SHARED : N_SHARED + N_FIRST].max() < 0.1
    assert found[N_SHARED + N_FIRST :].min() > 0.9


def test_folding_the_scales_of_sites_keeps_the_function() -> None:
    generator = torch.Generator().manual_seed(3)
    sites = [Site("a", 3, 0.2), Site("b", 5, 7.0)]
    sae = SAE(8, 6, pre_bias=False).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    scale = torch.tensor([0.2] * 3 + [7.0] * 5, dtype=torch.float64)
    x = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    folded = fold_site_scales(sae, sites)
    torch.testing.assert_close(folded(x), sae(x * scale) / scale, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded.encode(x), sae.encode(x * scale), rtol=1e-12, atol=1e-12)
    for decoder, part in zip(site_decoders(folded, sites), sae.W_dec.split([3, 5], -1), strict=True):
        torch.testing.assert_close(decoder, part.detach(), rtol=1e-12, atol=1e-12)


def test_shares_and_cosines_by_hand() -> None:
    first, second = (
        torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]),
        torch.tensor([[0.0, 5.0], [1.0, 1.0], [0.0, 3.0]]),
    )
    assert norm_shares([first, second])[:, 1].tolist() == pytest.approx([0.5, 1.0, 0.75])
    cosine = site_cosines([first, second])[0, 1]
    assert cosine[[0, 2]].tolist() == pytest.approx([0.8, 0.0])
    assert cosine[1].isnan()
    assert not site_cosines([first, torch.ones(3, 5)])  # of other widths


# --- from stores -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_models(tiny_model_dir: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Stores of one text by two models with other weights and widths and the same tokenizer."""
    root = tmp_path_factory.mktemp("two")
    other = write_model(root / "other", seed=1, shape=replace(SHAPE, d_mlp=48))
    shutil.copy(tiny_model_dir / "tokenizer.json", other / "tokenizer.json")
    return [
        pipeline.harvest(
            NativeModel(path, str(path)),
            tiny_text,
            root / f"{name}.zarr",
            hook_points=[POST],
            dtype="float32",
            **TOKENS,
        )
        for name, path in (("a", tiny_model_dir), ("b", other))
    ]


@pytest.fixture(scope="module")
def two_layers(tiny_model: NativeModel, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layers") / "acts.zarr"
    return pipeline.harvest(tiny_model, tiny_text, out, hook_points=[IN, POST], dtype="float32", **TOKENS)


@pytest.fixture(scope="module")
def trained(two_models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "cross"
    pipeline.train(pipeline.Sites(two_models), out, **FEW)
    return out


@pytest.fixture(scope="module")
def control(two_models: list[Path], trained: Path) -> Path:
    """The same run with its sites paired at random, beside it, and both evaluated."""
    out = trained.parent / "control"
    settings = {**FEW, "config": {**FEW["config"], "shuffle_sites": True}}
    pipeline.train(pipeline.Sites(two_models), out, **settings)
    for run in (trained, out):
        pipeline.evaluate(run)
    return out


def kept(store: Path, split: str, hook: str = POST) -> Tensor:
    acts = ActivationStore.open(store)
    return torch.cat(
        [
            torch.from_numpy(acts.read_acts(split, shard, hook)[acts.read_keep(split, shard).reshape(-1)])
            for shard in sorted(acts.markers(split))
        ]
    )


def test_rows_of_two_stores_are_joined_token_by_token_and_scaled(two_models: list[Path]) -> None:
    wanted = [kept(path, TRAIN) for path in two_models]
    wanted = [part / part.double().pow(2).sum(-1).mean().sqrt().float() for part in wanted]
    rows = JoinedRows(open_sites(pipeline.Sites(two_models)), batch_tokens=200, seed=3)
    assert [site.width for site in rows.sites] == [part.shape[1] for part in wanted]
    for x in (rows.batch(0).x, rows.batch(7).x, rows.sample(150, 4)):
        parts = x.split([site.width for site in rows.sites], -1)
        found = torch.cat([part[:, :3] for part in parts], -1)
        distance = torch.cdist(found.double(), torch.cat([part[:, :3] for part in wanted], -1).double()).amin(-1)
        assert distance.max() < 1e-5
    shuffled = JoinedRows(open_sites(pipeline.Sites(two_models)), batch_tokens=200, seed=3, shuffle_sites=True)
    mine, theirs = rows.batch(5).x, shuffled.batch(5).x
    width = rows.sites[0].width
    assert torch.equal(mine[:, :width], theirs[:, :width])
    assert not torch.equal(mine[:, width:], theirs[:, width:])
    order = lambda x: x[np.lexsort(x.numpy().T)]  # noqa: E731
    assert torch.equal(order(mine[:, width:]), order(theirs[:, width:]))
    assert torch.equal(theirs, shuffled.batch(5).x)


@pytest.mark.parametrize("shuffle", [False, True])
def test_joined_rows_that_lie_on_the_device_are_those_of_the_host(two_models: list[Path], shuffle: bool) -> None:
    """All of them, two pools of them, or none."""
    places, device = open_sites(pipeline.Sites(two_models)), device_named()
    usual: dict[str, Any] = {"batch_tokens": 200, "seed": 3, "shuffle_sites": shuffle, "max_ram_bytes": 10**6}
    host, kinds = JoinedRows(places, **usual), []
    for n_bytes in (10**9, 2 * 10**6, 100):
        rows = JoinedRows(places, **usual, device=device, device_bytes=lambda n=n_bytes: n)
        for step in (0, 1, 60):
            one, other = rows.batch(step), host.batch(step)
            assert torch.equal(one.x.cpu(), other.x)
            assert one.mixing is not None
            assert other.mixing is not None
            assert one.mixing() == other.mixing()
        assert torch.equal(rows.sample(50, 7), host.sample(50, 7))
        kinds.append([each._place.everything for each in rows._resident])
    assert kinds[0] == [True, True]
    assert kinds[-1] == []


def test_a_run_records_its_sites_and_its_evaluation_is_that_of_the_formulas(
    trained: Path, two_models: list[Path]
) -> None:
    sae = load(trained)
    sites = sae.config["sites"]
    assert [site["hook_point"] for site in sites] == [POST, POST]
    assert {"hook_point", "model", "store"}.isdisjoint(sae.config)
    assert sae.config["lambda"].keys() == {"of", "scaled", "meaning"}  # raw rows of several scales have no λ
    result = pipeline.evaluate(trained)
    assert json.loads((trained / "eval.json").read_text()) == result
    parts = [kept(path, HELD_OUT).double() for path in two_models]
    x = torch.cat(parts, -1)
    f = (x @ sae.W_enc.double() + sae.b_enc.double()).clamp_min(0)
    x_hat = f @ sae.W_dec.double() + sae.b_dec.double()
    sums, at = [], 0
    for part, site in zip(parts, sites, strict=True):
        width = part.shape[1]
        error = (part - x_hat[:, at : at + width]).pow(2).sum()
        variance = (part - part.mean(0)).pow(2).sum()
        sums.append((site["scale"] ** 2 * error, site["scale"] ** 2 * variance))
        at += width
    wanted = {
        "l0": (f > 0).sum(-1).double().mean(),
        "fvu_site_1": sums[0][0] / sums[0][1],
        "fvu_site_2": sums[1][0] / sums[1][1],
        "fvu": (sums[0][0] + sums[1][0]) / (sums[0][1] + sums[1][1]),
        "dead_share": (f > 0).any(0).logical_not().double().mean(),
    }
    for name, value in wanted.items():
        assert result["metrics"][name]["value"] == pytest.approx(float(value), rel=1e-3), name
    assert result["metrics"]["fvu_random_pairs"]["value"] > 0
    tensors, _ = read_tensors(trained / "sites.safetensors")
    assert tensors["fired"].tolist() == (f > 0).sum(0).tolist()
    first = sae.W_dec[:, : sites[0]["width"]].double().norm(dim=-1) * sites[0]["scale"]
    second = sae.W_dec[:, sites[0]["width"] :].double().norm(dim=-1) * sites[1]["scale"]
    torch.testing.assert_close(tensors["norm_share"][:, 1].double(), second / (first + second), rtol=1e-5, atol=1e-6)
    alive = tensors["fired"] > 0
    share = (second / (first + second))[alive]
    assert result["norm_share"]["one_site"] == [int((share < 0.1).sum()), int((share > 0.9).sum())]
    assert sum(result["norm_share"]["histogram"]["features"][1]) == int(alive.sum())


def test_several_layers_of_one_store(two_layers: Path, tmp_path: Path) -> None:
    out = pipeline.train(pipeline.Sites([two_layers], [IN, POST]), tmp_path / "c", **FEW)
    assert [site["name"] for site in out.config["sites"]] == [IN, POST]
    result = pipeline.evaluate(tmp_path / "c")
    assert result["cosine"] == []  # of other widths
    assert {"fvu_site_1", "fvu_site_2"} <= result["metrics"].keys()


def test_a_stopped_run_continues_bit_for_bit(trained: Path, two_models: list[Path], tmp_path: Path) -> None:
    sites = pipeline.Sites(two_models)

    class Stopped(BaseException):
        pass

    read = JoinedRows.batch

    def stops(self: JoinedRows, step: int) -> Batch:
        if step == 17:
            raise Stopped
        return read(self, step)

    out = tmp_path / "cross"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JoinedRows, "batch", stops)
        patch.setattr("sae.training.loop.time.monotonic", iter(range(0, 10**9, 1000)).__next__)  # saves at each step
        with pytest.raises(Stopped):
            pipeline.train(sites, out, **FEW)
    assert (out / "state.safetensors").exists()
    pipeline.train(sites, out, **FEW)
    assert (out / "sae.safetensors").read_bytes() == (trained / "sae.safetensors").read_bytes()


def test_it_starts_from_a_crosscoder_with_its_function(trained: Path, two_models: list[Path], tmp_path: Path) -> None:
    """With a learning rate of almost nothing, the result is the dictionary that it started from."""
    sites = pipeline.Sites(two_models)
    settings = {"batch_tokens": 128, "lr": 1e-12}
    again = pipeline.train(sites, tmp_path / "c", recipe="crosscoder", tokens=128, config=settings, start_from=trained)
    source, x = load(trained), torch.cat([kept(path, HELD_OUT) for path in two_models], -1)
    torch.testing.assert_close(again(x), source(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="joins blocks.0.mlp.hook_post and blocks.0.mlp.hook_post, this run one hook"):
        pipeline.train(two_models[0], tmp_path / "d", recipe="anthropic-2024-04", tokens=4096, start_from=trained)


def test_a_model_that_moved_is_named_and_another_is_refused(
    trained: Path, two_models: list[Path], tmp_path: Path
) -> None:
    recorded = Path(ActivationStore.open(two_models[1]).provenance["model"]["id"])
    before = pipeline.evaluate(trained)
    moved = Path(shutil.move(recorded, tmp_path / "moved"))
    try:
        with pytest.raises(ValueError, match="site 2, .*: its losses need a model that cannot be opened here"):
            pipeline.evaluate(trained)
        assert pipeline.evaluate(trained, model=str(moved))["metrics"] == before["metrics"]
    finally:
        shutil.move(moved, recorded)
    another = write_model(tmp_path / "another", seed=9)
    with pytest.raises(ValueError, match="no site of this crosscoder has the weights of"):
        pipeline.evaluate(trained, model=str(another))


def test_the_control_stands_beside_the_shares(trained: Path, control: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = pipeline.crosscoder_control(trained)
    assert found is not None
    assert found["directory"] == control.name
    assert found["norm_share"] == json.loads((control / "eval.json").read_text())["norm_share"]
    assert pipeline.crosscoder_control(control) is None
    assert main(["eval", str(trained)]) == 0
    said = capsys.readouterr().out
    assert f"beside it the control, {control.name}: trained on rows of the sites paired at random" in said
    assert "no control was found" not in said


def test_from_the_command_line(two_models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = ["--acts", str(two_models[0]), "--acts", str(two_models[1])]
    few = ["--d-sae", "24", "--tokens", "4096", "--batch-tokens", "128"]
    out = str(tmp_path / "c")
    control = ["--set", "shuffle_sites=true"]
    assert main(["train", *stores, "--recipe", "crosscoder", *few, *control, "--out", out]) == 0
    assert main(["eval", out]) == 0
    said = capsys.readouterr().out
    assert "a control: in training, the sites' rows were paired at random" in said
    assert "share of site 2" in said
    assert "at all sites alike (every share from 0.40 to 0.60)" in said
    assert main(["info", out]) == 0


# --- what is refused -------------------------------------------------------------------------------------------------


def test_stores_of_other_tokens_are_refused(two_models: list[Path], tiny_model: NativeModel, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", made_up_documents(4000, seed=5))
    text = pipeline.harvest(tiny_model, other, tmp_path / "t.zarr", hook_points=[POST], **TOKENS)
    longer = {**TOKENS, "tokens": 12_288}
    more = pipeline.harvest(tiny_model, other, tmp_path / "m.zarr", hook_points=[POST], **longer)
    for store, message in ((text, "has other"), (more, "do not hold the same rows")):
        with pytest.raises(StoreError, match=message):
            pipeline.train(pipeline.Sites([two_models[0], store]), tmp_path / "c", **FEW)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("sites", "settings", "message"),
    [
        (([0], ()), {}, "a crosscoder joins at least two sites"),
        (([0, 0], ()), {}, "is named twice"),
        (([0, 1], ()), {"recipe": "topk"}, "recipe topk takes one hook point of one store"),
        (([0, 1], ("blocks.0.hook_resid_mid",)), {}, "holds the hook points"),
        (([0, 1], ()), {"hook_point": POST}, "a crosscoder's hook points are named in its rows"),
        (([0, 1], ()), {"config": {"max_norm_multiple": 10.0}}, "of several stores it would leave out other"),
    ],
)
def test_sites_that_cannot_be_joined_are_refused(
    two_models: list[Path], tmp_path: Path, sites: tuple, settings: dict, message: str
) -> None:
    stores, hooks = sites
    with pytest.raises(ValueError, match=message):
        pipeline.train(pipeline.Sites([two_models[n] for n in stores], hooks), tmp_path / "c", **{**FEW, **settings})
    assert not (tmp_path / "c").exists()


def test_one_store_one_place_or_rows_without_sites_are_refused(two_models: list[Path], tmp_path: Path) -> None:
    class OnePlace:
        d_in = 4

        def batch(self, step: int) -> Batch:
            return Batch(torch.ones(4, 4))

        def sample(self, n: int, seed: int) -> Tensor:
            return torch.ones(4, 4)

    with pytest.raises(ValueError, match="name two hook points of one store"):
        pipeline.train(two_models[0], tmp_path / "a", **FEW)
    with pytest.raises(ValueError, match="needs rows that join at least two sites"):
        train(OnePlace(), tmp_path / "b", TrainConfig(recipe="crosscoder", tokens=8, batch_tokens=4, d_sae=4, l1=1.0))
    with pytest.raises(ValueError, match="cannot be on a frontier of one hook point"):
        pipeline.sweep(two_models[0], tmp_path / "s", recipes=["crosscoder"], d_sae=[24])


def test_verbs_that_need_one_hook_point_refuse_it_in_words(
    trained: Path, two_models: list[Path], tiny_model: NativeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cross, out = str(trained), str(tmp_path / "out")
    for arguments in (
        ["index", cross],
        ["compare", cross, cross],
        ["controls", cross],
        ["steer", cross, "--edit", "1:set:5", "--prompt", "the"],
        ["export", cross, "--format", "sae-lens", "--out", out],
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert "this dictionary is a crosscoder: its rows join 2 sites" in said, (arguments, said)
    assert not Path(out).exists()
    assert main(["eval", cross, "--acts", str(two_models[0])]) == 2
    assert "evaluated on the stores that its config.json names" in capsys.readouterr().err
    assert main(["export", cross, "--format", "native", "--out", out]) == 0
    with pytest.raises(ValueError, match="microscope: this dictionary is a crosscoder"):
        inspect(tiny_model, load(trained), [1, 2], hook_point=POST)


def test_the_apps_pages_show_its_evaluation_and_say_what_does_not_work(
    trained: Path, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ROOT_VARIABLE, str(trained.parent))
    monkeypatch.setenv(HOSTS_VARIABLE, "localhost")
    said = {}
    for view in ("Run", "Features", "Feature", "Steering", "Compare", "Map", "Token", "Microscope", "Attention"):
        page = AppTest.from_file(str(Path(browser.__file__).with_name("app.py")), default_timeout=120)
        for name, value in {"sae": trained.name, "feature": "5", "view": view, "prompt": "the"}.items():
            page.query_params[name] = value
        page.run()
        assert not page.exception, page.exception
        said[view] = " ".join(element.body for element in page.get("html")) + " ".join(c.value for c in page.caption)
    assert "crosscoder" in said["Run"]
    assert "Features by the share of site 2 in their decoder norms" in said["Run"]
    assert f"Grey: the control {control.name}" in said["Run"]
    answers = TestClient(Starlette(routes=api.routes()), base_url="http://localhost")
    answer = answers.get(f"/api/features?sae={trained.name}")
    assert "is a crosscoder, of several sites" in answer.text
    for view in set(said) - {"Run"}:
        assert f"{trained.name} is a crosscoder" in said[view], view


def test_an_evaluation_on_stores_that_changed_is_refused(two_models: list[Path], tmp_path: Path) -> None:
    """The directory that was the second model's store now holds the first model's."""
    stores = [Path(shutil.copytree(path, tmp_path / path.name)) for path in two_models]
    pipeline.train(pipeline.Sites(stores), tmp_path / "c", **FEW)
    shutil.rmtree(stores[1])
    shutil.copytree(two_models[0], stores[1])
    with pytest.raises(ValueError, match="the crosscoder was trained on those of"):
        pipeline.evaluate(tmp_path / "c")
