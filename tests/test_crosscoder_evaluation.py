"""A crosscoder's fidelity at each site and at all sites of a model at once, against sums written out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import SHAPE, write_model
from torch import Tensor

from browser.runs import share_table, site_table
from sae.cli.crosscoder_table import crosscoder_table
from sae.dictionary.autoencoder import SAE
from sae.evaluation import crosscoder
from sae.evaluation.crosscoder import Means, SiteBlock, SiteModel
from sae.lm import NativeModel
from store.common import is_control_of

ATTN, MLP = "blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"
CONTEXTS, POS, D_SAE = 6, 16, 20


def run_by_hand(model: NativeModel, tokens: Tensor, keep: Tensor, **put: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What attention and the MLP write, and the logits; `put` takes the place of `attn` or `mlp` at kept positions."""
    module = model.module
    (block,) = module.blocks

    def replaced(name: str, value: Tensor) -> Tensor:
        return torch.where(keep[..., None], put[name], value) if name in put else value

    with torch.inference_mode():
        resid = module.embed(tokens) + module.pos_embed(torch.arange(tokens.shape[1]))
        attn = replaced("attn", block.attn(block.ln1(resid)))
        resid = resid + attn
        mlp = replaced("mlp", block.mlp.out(block.mlp.post(block.ln2(resid))))
        return attn, mlp, module.unembed(module.ln_final(resid + mlp))


def cross_entropy(model: NativeModel, tokens: Tensor, keep: Tensor, **put: Tensor) -> float:
    """The mean in nats over predictions made at a kept position, of a kept token."""
    *_, logits = run_by_hand(model, tokens, keep, **put)
    log_p = logits.double().log_softmax(-1)
    found = [
        -float(log_p[c, t, tokens[c, t + 1]])
        for c in range(len(tokens))
        for t in range(tokens.shape[1] - 1)
        if keep[c, t] and keep[c, t + 1]
    ]
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def models(tiny_model: NativeModel, tmp_path_factory: pytest.TempPathFactory) -> list[NativeModel]:
    """Two models of other weights and widths."""
    path = write_model(tmp_path_factory.mktemp("other") / "m", seed=3, shape=replace(SHAPE, d_model=24, n_heads=3))
    return [tiny_model, NativeModel(path, str(path))]


@pytest.fixture
def text() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    keep = torch.rand(CONTEXTS, POS, generator=generator) < 0.8
    return torch.randint(1, SHAPE.d_vocab, (CONTEXTS, POS), generator=generator), keep


def crosscoder_of(parts: list[Tensor]) -> SAE:
    """A random crosscoder of sites with these rows, scaled as training would."""
    generator = torch.Generator().manual_seed(7)
    widths = [part.shape[-1] for part in parts]
    sae = SAE(sum(widths), D_SAE, pre_bias=False)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    scales = [float(part.pow(2).sum(-1).mean() ** -0.5) for part in parts]
    sae.config["sites"] = [
        {"name": f"place {n}", "width": width, "scale": scale}
        for n, (width, scale) in enumerate(zip(widths, scales, strict=True), 1)
    ]
    return sae


def evaluated(
    sae: SAE, groups: list[SiteModel], parts: list[Tensor], text: tuple[Tensor, Tensor], donors: list[Tensor]
) -> tuple[dict, list[Tensor]]:
    """The evaluation in two blocks, and the training means that it was given."""
    (tokens, keep), x = text, torch.cat(parts, -1)
    blocks = [SiteBlock(x[at], tokens[at], keep[at]) for at in (slice(0, 2), slice(2, None))]
    train = [part[0, 0] + 0.5 for part in parts]
    means = Means(x[keep].double().mean(0).numpy(), torch.cat(train).double().numpy())
    found, _ = crosscoder.evaluate(sae, groups, blocks, means=means, donors=donors, kept_tokens=int(keep.sum()))
    return found, train


def reconstruction(sae: SAE, x: Tensor) -> Tensor:
    """x̂ written out, in float64."""
    f = (x.double() @ sae.W_enc.double() + sae.b_enc.double()).clamp_min(0)
    return (f @ sae.W_dec.double() + sae.b_dec.double()).detach()


def assert_scores(metrics: dict, where: str, ce: dict[str, float]) -> None:
    """`ce` by hand: clean, sae, zero, mean, resample."""
    for name, value in ce.items():
        assert metrics[f"ce_{name}_{where}"]["value"] == pytest.approx(value, abs=2e-5), (name, where)
    assert metrics[f"delta_ce_{where}"]["value"] == pytest.approx(ce["sae"] - ce["clean"], abs=2e-5)
    for ablation in ("zero", "mean", "resample"):
        score = (ce[ablation] - ce["sae"]) / (ce[ablation] - ce["clean"])
        assert metrics[f"ce_loss_score_{ablation}_{where}"]["value"] == pytest.approx(score, rel=1e-3)


def test_two_models_each_with_one_site(models: list[NativeModel], text: tuple[Tensor, Tensor]) -> None:
    """x̂ of each site comes from the rows of both, and goes into its own model alone."""
    tokens, keep = text
    parts = [run_by_hand(model, tokens, keep)[1] for model in models]
    sae = crosscoder_of(parts)
    donors = [part[:1, 1] for part in parts]  # one row each: every draw is the same
    groups = [SiteModel(model, {n: MLP}) for n, model in enumerate(models, 1)]
    found, train = evaluated(sae, groups, parts, text, donors)
    x = torch.cat(parts, -1)
    x_hat = reconstruction(sae, x).float().split([part.shape[-1] for part in parts], -1)
    for n, model in enumerate(models):
        put = {"sae": x_hat[n], "zero": torch.zeros_like(train[n]), "mean": train[n], "resample": donors[n][0]}
        ce = {name: cross_entropy(model, tokens, keep, mlp=value) for name, value in put.items()}
        assert_scores(found["metrics"], f"site_{n + 1}", {**ce, "clean": cross_entropy(model, tokens, keep)})
        error, mean = (parts[n] - x_hat[n])[keep].double(), parts[n][keep].double().mean(0)
        fvu = float(error.pow(2).sum() / (parts[n][keep].double() - mean).pow(2).sum())
        assert found["metrics"][f"fvu_site_{n + 1}"]["value"] == pytest.approx(fvu, rel=1e-5)
        assert found["checks"][f"site_{n + 1}"]["splice_identity_error"] < 1e-4
        gap = found["metrics"][f"ce_zero_site_{n + 1}"]["value"] - found["metrics"][f"ce_clean_site_{n + 1}"]["value"]
        assert found["checks"][f"site_{n + 1}"]["ablation_gap_nats"] == pytest.approx(gap)
    assert not any("model_" in name for name in found["metrics"])  # each model has one site

    scales = torch.cat([torch.full((site["width"],), site["scale"]) for site in found["sites"]]).double()
    mean = x[keep].double().mean(0)
    paired = torch.cat([parts[0][keep], donors[1].expand(int(keep.sum()), -1)], -1)
    for name, rows in (("fvu", x[keep]), ("fvu_random_pairs", paired)):
        error = ((rows.double() - reconstruction(sae, rows)) * scales).pow(2).sum()
        value = float(error / ((rows.double() - mean) * scales).pow(2).sum())
        assert found["metrics"][name]["value"] == pytest.approx(value, rel=1e-5), name


def test_two_sites_of_one_model_one_at_a_time_and_at_once(
    models: list[NativeModel], text: tuple[Tensor, Tensor]
) -> None:
    (tokens, keep), model = text, models[0]
    parts = list(run_by_hand(model, tokens, keep)[:2])
    sae = crosscoder_of(parts)
    donors = [part[:1, 1] for part in parts]
    found, train = evaluated(sae, [SiteModel(model, {1: ATTN, 2: MLP})], parts, text, donors)
    x_hat = reconstruction(sae, torch.cat(parts, -1)).float().split([part.shape[-1] for part in parts], -1)
    put = {
        "sae": x_hat,
        "zero": [torch.zeros_like(mean) for mean in train],
        "mean": train,
        "resample": [donor[0] for donor in donors],
    }
    clean = cross_entropy(model, tokens, keep)
    for where, names in (("site_1", ["attn"]), ("site_2", ["mlp"]), ("model_1", ["attn", "mlp"])):
        ce = {
            kind: cross_entropy(model, tokens, keep, **{name: values[name == "mlp"] for name in names})
            for kind, values in put.items()
        }
        assert_scores(found["metrics"], where, {**ce, "clean": clean})
    alone = [found["metrics"][f"ce_sae_{where}"]["value"] for where in ("site_1", "site_2")]
    assert found["metrics"]["ce_sae_model_1"]["value"] not in alone
    assert found["models"] == [{"id": model.id, "sites": [1, 2]}]
    table = crosscoder_table(found)
    assert "model 1, all its sites at once" in table
    assert "no control was found" in table
    columns = site_table(found).set_index("metric")
    assert columns.loc["ce_sae", "all of model 1"] == found["metrics"]["ce_sae_model_1"]["value"]
    assert np.isnan(columns.loc["fvu", "all of model 1"])


def test_without_a_model_the_losses_are_left_out_and_the_rest_is_the_same(
    models: list[NativeModel], text: tuple[Tensor, Tensor]
) -> None:
    parts = [run_by_hand(model, *text)[1] for model in models]
    sae = crosscoder_of(parts)
    donors = [part[0] for part in parts]
    groups = [SiteModel(model, {n: MLP}) for n, model in enumerate(models, 1)]
    whole, _ = evaluated(sae, groups, parts, text, donors)
    second, _ = evaluated(sae, groups[1:], parts, text, donors)
    none, _ = evaluated(sae, [], parts, text, donors)
    assert none["metrics"] == {k: v for k, v in whole["metrics"].items() if "ce" not in k.split("_")}
    assert second["metrics"] == {k: whole["metrics"][k] for k in second["metrics"]}
    assert "ce_sae_site_2" in second["metrics"]
    assert "ce_sae_site_1" not in second["metrics"]
    assert "not measured at site 1" in crosscoder_table(second)


def test_rows_that_are_paired_at_random_are_as_good_where_sites_share_nothing(text: tuple[Tensor, Tensor]) -> None:
    """Two sites, half of the features at each: which rows stand together makes no difference, but for the draw."""
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(CONTEXTS, POS, 8, generator=generator) for _ in range(2)]
    sae = crosscoder_of(parts)
    with torch.no_grad():
        for at, columns in ((slice(0, 10), slice(8, 16)), (slice(10, 20), slice(0, 8))):
            sae.W_enc[columns, at] = 0
            sae.W_dec[at, columns] = 0
    _, keep = text
    donors = [part[keep] for part in parts]
    found, _ = evaluated(sae, [], parts, text, donors)
    fvu, control = (found["metrics"][name]["value"] for name in ("fvu", "fvu_random_pairs"))
    assert control == pytest.approx(fvu, rel=0.1)
    assert found["norm_share"]["one_site"] == [10, 10]
    assert found["norm_share"]["shared"] == 0


def test_the_control_is_the_same_run_with_its_sites_shuffled() -> None:
    site = {"name": "a", "hook_point": "h", "width": 3, "model": {"sha256": "1"}, "store": {"path": "../a.zarr"}}
    run = {"sites": [site, {**site, "hook_point": "g"}], "d_sae": 8, "train": {"seed": 0, "shuffle_sites": False}}
    control = {**run, "train": {**run["train"], "shuffle_sites": True}}
    assert is_control_of(control, run)
    others = [
        run,
        {**control, "d_sae": 9},
        {**control, "train": {**control["train"], "seed": 1}},
        {**control, "sites": run["sites"][:1]},
        {**control, "sites": [{**site, "model": {"sha256": "2"}}, run["sites"][1]]},
        {},
    ]
    for other in others:
        assert not is_control_of(other, run)
    assert not is_control_of(control, control)
    assert not is_control_of({}, {})


def test_the_histogram_stands_beside_the_controls_scaled_to_as_many_features() -> None:
    def report(counts: list[list[int]]) -> dict:
        return {"norm_share": {"features": sum(counts[0]), "histogram": {"edges": [0.0, 0.5, 1.0], "features": counts}}}

    two = share_table(report([[3, 5], [5, 3]]), report([[2, 0], [0, 2]]))
    assert two.to_dict("list") == {
        "site": [2, 2],
        "low": [0.0, 0.5],
        "high": [0.5, 1.0],
        "features": [5, 3],
        "control": [0.0, 8.0],
    }
    three = share_table(report([[3, 5], [5, 3], [8, 0]]), {})
    assert three["site"].tolist() == [1, 1, 2, 2, 3, 3]
    assert three["control"].isna().all()
    assert share_table({}, {}).empty
