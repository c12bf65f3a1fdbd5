"""Evaluation of a tiny model against brute-force numpy, and dictionaries whose figures are known in advance."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import HOOK_POINT

from sae import pipeline
from sae.cli.tables import eval_table
from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import save
from sae.evaluation.domains import DomainFirings
from sae.evaluation.evaluate import DONOR_SEED, Block, evaluate
from sae.evaluation.feature_stats import FeatureStatistics
from sae.jobs.checkpoint import read_tensors
from sae.kernels.activations import DenseActs
from sae.lm import NativeModel
from store.activations import ActivationStore

CONTEXTS, SEQ_LEN, D_IN = 12, 20, 32
DOMAINS = ["dna", "prose", "unseen"]


def make_blocks(model: NativeModel, per_block: int = 5) -> list[Block]:
    """Random tokens with BOS (not kept) at the start and in the middle, and padding at the end of some contexts."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 300, (CONTEXTS, SEQ_LEN), generator=generator)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    tokens[:, 0], keep[:, 0] = 0, False
    tokens[:, 9], keep[:, 9] = 0, False
    domain = np.zeros((CONTEXTS, SEQ_LEN), np.int64)
    domain[:, 9:] = 1
    keep[-3:, 15:], domain[-3:, 15:] = False, -1
    acts = model.capture(tokens, HOOK_POINT)
    arrays = (acts, tokens, keep, domain)
    return [Block(*(array[i : i + per_block] for array in arrays)) for i in range(0, CONTEXTS, per_block)]


def whole(blocks: list[Block]) -> Block:
    acts, tokens, keep, domain, *_ = zip(*blocks, strict=True)
    return Block(torch.cat(acts), torch.cat(tokens), torch.cat(keep), np.concatenate(domain))


def donors() -> torch.Tensor:
    return torch.rand(7, D_IN, generator=torch.Generator().manual_seed(3))


def kept_mean(blocks: list[Block]) -> np.ndarray:
    block = whole(blocks)
    return block.acts[block.keep].double().mean(0).numpy()


def run(sae: SAE, model: NativeModel, blocks: list[Block], train_mean: np.ndarray | None = None) -> tuple[dict, dict]:
    mean = kept_mean(blocks)
    return evaluate(
        sae,
        model,
        blocks,
        hook_point=HOOK_POINT,
        heldout_mean=mean,
        domains=DOMAINS,
        train_mean=mean if train_mean is None else train_mean,
        kept_tokens=int(whole(blocks).keep.sum()),
        donors=donors(),
        training=blocks,
    )


def random_sae(d_sae: int = 50, **kind: object) -> SAE:
    sae = SAE(D_IN, d_sae, **kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        sae.b_enc -= 0.5
        sae.b_enc[:3] = -100.0  # three that never fire
    return sae.requires_grad_(False)


def identity() -> SAE:
    """x is not negative after a ReLU: f = x, x̂ = x."""
    sae = SAE(D_IN, D_IN)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(D_IN))
        sae.W_dec.copy_(torch.eye(D_IN))
    return sae.requires_grad_(False)


def values(result: dict) -> dict[str, float]:
    return {name: entry["value"] for name, entry in result["metrics"].items()}


def spliced_log_p(model: NativeModel, block: Block, replacement: torch.Tensor | None) -> np.ndarray:
    """Next-token log probabilities in float64, from the MLP's own weights and no hook."""
    x = block.acts.clone()
    if replacement is not None:
        x[block.keep] = replacement.expand_as(x)[block.keep]
    module, layer = model.module, model.module.blocks[0]
    resid = module.resid_pre(block.tokens)
    resid = resid + layer.attn(layer.ln1(resid))
    logits = module.unembed(module.ln_final(resid + layer.mlp.out(x))).double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def spliced_loss(model: NativeModel, block: Block, replacement: torch.Tensor | None) -> tuple[float, np.ndarray]:
    """Mean cross-entropy over predictions from a kept token of a kept token."""
    log_p = spliced_log_p(model, block, replacement)
    total, n = 0.0, 0
    per_position = np.full(block.tokens.shape, np.nan)
    for c in range(CONTEXTS):
        for p in range(SEQ_LEN - 1):
            if block.keep[c, p] and block.keep[c, p + 1]:
                per_position[c, p] = -log_p[c, p, int(block.tokens[c, p + 1])]
                total, n = total + per_position[c, p], n + 1
    return total / n, per_position


def by_hand_of_units(model: NativeModel, block: Block, wanted: dict[str, float]) -> dict[str, float]:
    """The figures of the layer's own units, token by token in float64, and the model's loss with the k largest."""
    k = max(1, round(wanted["l0"]))
    rows = block.acts.double().numpy()
    largest = np.zeros_like(rows)
    active, ratio, of_largest, error = [], [], [], 0.0
    for c, p in np.ndindex(block.tokens.shape):
        a = rows[c, p]
        for unit in sorted(range(D_IN), key=lambda unit: -abs(a[unit]))[:k]:
            largest[c, p, unit] = a[unit]
        if block.keep[c, p]:
            active.append(sum(value != 0 for value in a))
            ratio.append(sum(a**2) ** 2 / sum(a**4))
            of_largest.append(sum(value != 0 for value in largest[c, p]))
            error += sum((a - largest[c, p]) ** 2)
    kept = rows[block.keep.numpy()]
    ce, _ = spliced_loss(model, block, torch.from_numpy(largest).float())
    return {
        "units_l0": np.mean(active),
        "units_participation_ratio": np.mean(ratio),
        "topk_units_l0": np.mean(of_largest),
        "topk_units_fvu": error / ((kept - kept.mean(0)) ** 2).sum(),
        "ce_units": ce,
        "topk_units_delta_ce": ce - wanted["ce_clean"],
        "ce_gain_over_units": ce - wanted["ce_sae"],
        **{
            f"topk_units_ce_loss_score_{name}": (wanted[f"ce_{name}"] - ce)
            / (wanted[f"ce_{name}"] - wanted["ce_clean"])
            for name in ("zero", "mean", "resample")
        },
    }


@pytest.mark.parametrize("kind", [{}, {"activation": "topk", "k": 4}], ids=["relu", "topk"])
def test_every_figure_against_brute_force(tiny_model: NativeModel, kind: dict) -> None:
    sae, blocks = random_sae(**kind), make_blocks(tiny_model)
    train_mean = np.linspace(0, 1, D_IN)
    result, _ = run(sae, tiny_model, blocks, train_mean)
    block = whole(blocks)
    x = block.acts[block.keep].double().numpy()
    f = sae.encode(block.acts[block.keep]).double().numpy()
    x_hat = f @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()
    wanted = {
        "l0": (f > 0).sum(1).mean(),
        "fvu": ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "fvu_without_outliers": ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),  # none is known here
        "outlier_share": 0.0,
        "outlier_variance_share": 0.0,
        "cosine": np.mean((x * x_hat).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(x_hat, axis=1)),
        "shrinkage": (x_hat**2).sum() / (x * x_hat).sum(),
        "relative_norm": np.linalg.norm(x_hat, axis=1).sum() / np.linalg.norm(x, axis=1).sum(),
        "dead_share": ((f > 0).sum(0) == 0).mean(),
    }
    x_hat_everywhere = sae.decode(sae.encode(block.acts))
    drawn = np.random.default_rng(DONOR_SEED).integers(7, size=(CONTEXTS, SEQ_LEN))
    for name, replacement in {
        "clean": None,
        "sae": x_hat_everywhere,
        "zero": torch.zeros(D_IN),
        "mean": torch.from_numpy(train_mean).float(),
        "resample": donors()[torch.from_numpy(drawn)],
    }.items():
        wanted[f"ce_{name}"], _ = spliced_loss(tiny_model, block, replacement)
    wanted["delta_ce"] = wanted["ce_sae"] - wanted["ce_clean"]
    clean, replaced = (spliced_log_p(tiny_model, block, x) for x in (None, x_hat_everywhere))
    predicts = (block.keep[:, :-1] & block.keep[:, 1:]).numpy()
    wanted["kl"] = (np.exp(clean) * (clean - replaced)).sum(-1)[:, :-1][predicts].mean()
    for name in ("zero", "mean", "resample"):
        gap = wanted[f"ce_{name}"] - wanted["ce_clean"]
        wanted[f"ce_loss_score_{name}"] = (wanted[f"ce_{name}"] - wanted["ce_sae"]) / gap
    wanted |= by_hand_of_units(tiny_model, block, wanted)
    found = values(result)
    assert found.pop("ultra_low_share") is None  # a feature that fires once in so few tokens is above the bound
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=2e-5), name
    l0 = np.sort((f > 0).sum(1))
    assert result["l0"]["quantiles"]["p50"] == np.percentile(l0, 50, method="inverted_cdf")
    assert result["l0"]["quantiles"]["p95"] == np.percentile(l0, 95, method="inverted_cdf")
    assert sum(result["l0"]["histogram"]["tokens"]) == len(x)
    d_dot_e = (sae.W_enc.T * sae.W_dec).sum(-1).numpy()
    dead = (f > 0).sum(0) == 0
    assert result["by_density"][0] == {
        "log10_density_from": None,
        "features": dead.sum(),
        "median_b_enc": np.median(sae.b_enc.numpy()[dead]),
        "median_d_dot_e": pytest.approx(np.median(d_dot_e[dead]), abs=1e-6),
    }
    assert sum(entry["features"] for entry in result["by_density"]) == sae.d_sae
    assert result["tokens"] == len(x)
    assert result["checks"]["ablation_gap_nats"] == pytest.approx(wanted["ce_zero"] - wanted["ce_clean"], abs=1e-5)
    norms = np.linalg.norm(sae.W_dec.numpy(), axis=1)
    assert result["checks"]["decoder_norm_min"] == pytest.approx(norms.min())
    assert result["checks"]["decoder_norm_max"] == pytest.approx(norms.max())
    assert sum(result["density"]["features"]) + result["density"]["dead"][0] == sae.d_sae


def test_domain_features_are_counted_on_kept_tokens(tiny_model: NativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature made for one domain's rows, chosen on one text and judged on another, against a count made here."""
    monkeypatch.setattr("sae.evaluation.domains.MIN_TOKENS", 5)
    sae, blocks = random_sae(), make_blocks(tiny_model)
    block = whole(blocks)
    other = [b._replace(domain=np.where(b.domain == 1, -1, b.domain)) for b in blocks]  # prose is of no named domain
    mean = kept_mean(blocks)
    result, _ = evaluate(
        sae,
        tiny_model,
        blocks,
        hook_point=HOOK_POINT,
        heldout_mean=mean,
        train_mean=mean,
        donors=donors(),
        training=other,
        domains=["dna", "prose"],
        kept_tokens=int(block.keep.sum()),
    )
    keep = block.keep.numpy()
    fired = (sae.encode(block.acts) > 0).numpy()
    dna = keep & (block.domain == 0)
    hits, firings = fired[dna].sum(0), fired[keep].sum(0)
    precision, recall = hits / np.maximum(firings, 1), hits / dna.sum()
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = result["domains"]["best_feature"]
    assert best["dna"]["f1"] == pytest.approx(f1.max())
    assert best["dna"]["feature"] == f1.argmax()
    assert best["prose"] is None  # none of it in the choosing text


def test_domains_against_brute_force(tiny_model: NativeModel) -> None:
    sae, blocks = random_sae(), make_blocks(tiny_model)
    result, _ = run(sae, tiny_model, blocks)
    block = whole(blocks)
    x, mean = block.acts.double(), torch.from_numpy(kept_mean(blocks))
    error = ((x - sae.decode(sae.encode(block.acts)).double()) ** 2).sum(-1).numpy()
    variance = ((x - mean) ** 2).sum(-1).numpy()
    _, ce = spliced_loss(tiny_model, block, None)
    for number, domain in enumerate(DOMAINS[:2]):
        mine = block.keep.numpy() & (block.domain == number)
        entry = result["by_domain"][domain]
        assert entry["tokens"] == mine.sum()
        assert entry["fvu"] == pytest.approx(error[mine].sum() / variance[mine].sum(), rel=1e-5)
        assert entry["ce_clean"] == pytest.approx(np.nanmean(ce[mine]), rel=1e-5)
        assert entry["l0"] == pytest.approx((sae.encode(block.acts)[torch.from_numpy(mine)] > 0).sum(-1).float().mean())
        low, high = entry["ci95"]["fvu"]
        assert low < entry["fvu"] < high
    assert result["by_domain"]["unseen"]["tokens"] == 0
    assert result["by_domain"]["unseen"]["fvu"] is None
    assert result["by_domain"]["unseen"]["ci95"]["fvu"] == [None, None]
    assert sum(entry["tokens"] for entry in result["by_domain"].values()) == result["tokens"]


def test_the_size_of_a_block_does_not_matter(tiny_model: NativeModel) -> None:
    sae = random_sae()
    one, _ = run(sae, tiny_model, make_blocks(tiny_model, per_block=12))
    many, _ = run(sae, tiny_model, make_blocks(tiny_model, per_block=1))
    found = values(many)
    for name, value in values(one).items():
        assert found[name] == (value if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)), name


def test_losses_under_ablation_are_measured_once_for_several_dictionaries(
    tiny_model: NativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = make_blocks(tiny_model)
    mean = kept_mean(blocks)
    passes: list[str | None] = []
    logits = tiny_model._logits
    monkeypatch.setattr(
        tiny_model,
        "_logits",
        lambda tokens, splices: passes.append(next(iter(splices), None)) or logits(tokens, splices),
    )
    ablated: dict[int, dict[str, torch.Tensor]] = {}

    def again(sae: SAE) -> dict:
        return evaluate(
            sae,
            tiny_model,
            blocks,
            hook_point=HOOK_POINT,
            heldout_mean=mean,
            domains=DOMAINS,
            train_mean=mean,
            kept_tokens=int(whole(blocks).keep.sum()),
            donors=donors(),
            training=blocks,
            ablated=ablated,
        )[0]

    shared = []
    for sae in (random_sae(), identity()):
        passes.clear()
        shared.append(again(sae))
    # Each block as it is, with x̂ and with its k largest units (of another k), and twice for the check of the splice:
    # nothing is ablated again.
    assert len(passes) == 3 * len(blocks) + 2
    passes.clear()
    again(identity())
    assert len(passes) == 2 * len(blocks) + 2  # the same k: its losses are known too
    for sae, result in zip((random_sae(), identity()), shared, strict=True):
        assert result["metrics"] == run(sae, tiny_model, blocks)[0]["metrics"]


def test_a_perfect_dictionary(tiny_model: NativeModel) -> None:
    result, _ = run(identity(), tiny_model, make_blocks(tiny_model))
    found = values(result)
    assert found["fvu"] == 0
    assert found["delta_ce"] == pytest.approx(0, abs=1e-7)
    assert found["cosine"] == pytest.approx(1)
    assert found["shrinkage"] == pytest.approx(1)
    assert found["ce_loss_score_zero"] == pytest.approx(1, abs=1e-6)
    assert found["ce_loss_score_mean"] == pytest.approx(1, abs=1e-5)


def test_an_empty_dictionary_is_zero_ablation(tiny_model: NativeModel) -> None:
    result, stats = run(SAE(D_IN, 10).requires_grad_(False), tiny_model, make_blocks(tiny_model))
    found = values(result)
    assert found["ce_sae"] == found["ce_zero"]
    assert found["ce_loss_score_zero"] == 0
    assert found["dead_share"] == 1
    assert found["l0"] == 0
    assert found["shrinkage"] is None  # nothing to divide by
    assert not any(column.any() for column in stats.values())
    json.dumps(result, allow_nan=False)


def test_a_dictionary_that_always_gives_the_mean_is_mean_ablation(tiny_model: NativeModel) -> None:
    blocks = make_blocks(tiny_model)
    sae = SAE(D_IN, 10).requires_grad_(False)
    sae.b_dec.copy_(torch.from_numpy(kept_mean(blocks)).float())
    sae.b_enc.fill_(-100.0)
    found = values(run(sae, tiny_model, blocks)[0])
    assert found["ce_sae"] == pytest.approx(found["ce_mean"], abs=1e-7)
    assert found["ce_loss_score_mean"] == pytest.approx(0, abs=1e-6)
    assert found["fvu"] == pytest.approx(1, abs=1e-6)


def test_splicing_the_error_back_changes_nothing(tiny_model: NativeModel) -> None:
    result, _ = run(random_sae(), tiny_model, make_blocks(tiny_model))
    assert 0 <= result["checks"]["splice_identity_error"] < 1e-4


def test_the_identity_check_notices_a_model_that_a_splice_disturbs(tiny_model: NativeModel, monkeypatch) -> None:
    logits = tiny_model.logits

    def disturbed(tokens, hook_point=None, splice=None):  # noqa: ANN001, ANN202
        found = logits(tokens, hook_point, splice)
        return found if splice is None else found * 1.1

    monkeypatch.setattr(tiny_model, "logits", disturbed)
    result, _ = run(random_sae(), tiny_model, make_blocks(tiny_model))
    assert result["checks"]["splice_identity_error"] > 0.01


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_rows_that_are_not_kept_change_no_figure(tiny_model: NativeModel, value: float) -> None:
    """BOS and padding: their activations may have any value; no figure and no statistic changes."""
    sae, blocks = random_sae(), make_blocks(tiny_model)
    result, stats = run(sae, tiny_model, blocks)
    changed = [b._replace(acts=torch.where(b.keep[..., None], b.acts, value)) for b in blocks]
    other, other_stats = run(sae, tiny_model, changed)
    assert other["metrics"] == result["metrics"]
    assert other["by_domain"] == result["by_domain"]
    assert all(torch.equal(stats[name], other_stats[name]) for name in stats)


def test_padding_tokens_change_no_figure(tiny_model: NativeModel) -> None:
    sae, blocks = random_sae(), make_blocks(tiny_model)
    last = blocks[-1]
    padded = torch.where(torch.from_numpy(last.domain) < 0, 7, last.tokens)
    assert not torch.equal(padded, last.tokens)
    other = [*blocks[:-1], last._replace(tokens=padded)]
    found = values(run(sae, tiny_model, other)[0])
    for name, value in values(run(sae, tiny_model, blocks)[0]).items():
        assert found[name] == (value if value is None else pytest.approx(value, rel=1e-6)), name


def test_feature_statistics_against_numpy(tiny_model: NativeModel) -> None:
    sae, blocks = random_sae(), make_blocks(tiny_model)
    _, stats = run(sae, tiny_model, blocks)
    block = whole(blocks)
    f = sae.encode(block.acts[block.keep]).numpy()
    for feature in range(sae.d_sae):
        fired = f[:, feature][f[:, feature] > 0]
        assert stats["count"][feature] == len(fired)
        if not len(fired):
            assert stats["max"][feature] == stats["mean"][feature] == stats["p99"][feature] == 0
            continue
        assert stats["max"][feature].item() == pytest.approx(fired.max(), rel=1e-5)
        assert stats["mean"][feature].item() == pytest.approx(fired.mean(dtype=np.float64), rel=1e-5)
        p99 = np.percentile(fired, 99, method="inverted_cdf")
        assert stats["p99"][feature].item() == pytest.approx(p99, rel=1e-5)
    assert (stats["count"] == 0).sum() >= 3
    assert stats["count"].dtype == torch.int64


def test_p99_of_many_firings_is_below_the_maximum() -> None:
    statistics = FeatureStatistics(3)
    acts = torch.zeros(1000, 3)
    acts[:, 1] = torch.randperm(1000, generator=torch.Generator().manual_seed(0)) + 1.0
    for part in acts.split(130):
        rows, features = part.nonzero(as_tuple=True)
        statistics.add(features, part[rows, features])
    stats = statistics.tensors()
    assert stats["p99"].tolist() == [0, 990, 0]
    assert stats["max"].tolist() == [0, 1000, 0]
    assert stats["mean"].tolist() == [0, 500.5, 0]


def test_firings_by_domain_against_a_dense_count() -> None:
    rng = np.random.default_rng(0)
    acts = torch.from_numpy((rng.random((200, 6)) < 0.2) * rng.random((200, 6)))
    domain = rng.integers(-1, 3, 200)
    keep = rng.random(200) < 0.9
    firings = DomainFirings(6, 3)
    for part in (slice(0, 70), slice(70, 200)):
        fired = DenseActs(acts[part]).sparse().firings(torch.from_numpy(keep[part]))
        firings.add(fired, keep[part], domain[part])
    domain = np.where(domain < 0, 3, domain)  # tokens of no listed domain come last
    np.testing.assert_array_equal(firings.counts.tokens, np.bincount(domain[keep]))
    wanted = [[((acts[:, f] > 0).numpy() & keep & (domain == d)).sum() for d in range(4)] for f in range(6)]
    np.testing.assert_array_equal(firings.counts.fired, wanted)


def test_no_held_out_tokens_is_refused(tiny_model: NativeModel) -> None:
    with pytest.raises(
        ValueError, match="no held-out tokens. Harvest more text into a new store: of short documents one in twenty"
    ):
        evaluate(
            identity(),
            tiny_model,
            [],
            hook_point=HOOK_POINT,
            heldout_mean=np.zeros(D_IN),
            train_mean=np.zeros(D_IN),
            donors=donors(),
            training=[],
            domains=[],
            kept_tokens=0,
        )


def test_contexts_of_one_kept_token_predict_nothing(tiny_model: NativeModel) -> None:
    blocks = make_blocks(tiny_model)
    lonely = [b._replace(keep=b.keep & (torch.arange(SEQ_LEN) % 2 == 1)) for b in blocks]
    result, _ = run(random_sae(), tiny_model, lonely)
    assert result["metrics"]["ce_clean"]["value"] is None
    assert result["metrics"]["fvu"]["value"] > 0
    assert result["checks"]["scores_are_noise"]
    json.dumps(result, allow_nan=False)
    assert "–" in eval_table(result)


def test_files_of_an_evaluated_dictionary(tmp_path: Path, tiny_model: NativeModel, tiny_store: Path) -> None:
    """Through the store: the held-out rows alone, valid JSON, statistics where steering looks for them."""
    config = {"hook_point": HOOK_POINT, "model": tiny_model.identity()}
    save(random_sae(), tmp_path / "sae", config)
    result = pipeline.evaluate(tmp_path / "sae", store=tiny_store, model=tiny_model)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "sae" / "eval.json").read_text()
    assert json.loads(text, parse_constant=refuse) == json.loads(json.dumps(result))
    stats, header = read_tensors(tmp_path / "sae" / "feature_stats.safetensors")
    assert set(stats) == {"count", "max", "mean", "p99"}
    assert header == {"tokens": result["tokens"], "split": "heldout"}
    assert np.array_equal(pipeline.feature_max(tmp_path / "sae"), stats["max"].numpy())
    units = pipeline.feature_units(tmp_path / "sae")  # no index here
    assert np.array_equal(units["feature_p99"], stats["p99"].numpy())
    assert set(result["by_domain"]) == {"prose", "dna", "numbers"}
    wanted = (
        "l0",
        "fvu",
        "ce_clean",
        "ce_sae",
        "ce_zero",
        "ce_mean",
        "delta_ce",
        "ce_loss_score_zero",
        "ce_loss_score_mean",
        "dead_share",
        "ultra_low_share",
    )
    assert set(wanted) <= set(result["metrics"])
    assert sum(entry["tokens"] for entry in result["by_domain"].values()) == result["tokens"]


def test_features_are_chosen_on_text_from_the_whole_store(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard holds few documents: the first ones alone would lack whole domains."""
    store = ActivationStore.open(tiny_store)
    shards = sorted(store.markers("train"))
    chooser = import_module("sae.pipeline.evaluate")  # `pipeline.evaluate` is the function
    monkeypatch.setattr(chooser, "SPREAD_SHARDS", 4)
    monkeypatch.setattr(chooser, "CHOOSING_TOKENS", 2 * store.rows_per_shard)
    quarter = len(shards) // 4
    expected = [store.read_contexts("train", shards[i * quarter]) for i in range(4)]
    found = list(chooser.choosing_blocks(store, HOOK_POINT, ["prose", "dna", "numbers"]))
    assert len(shards) % 4 == 0
    assert len(found) == 4
    for i, (block, contexts) in enumerate(zip(found, expected, strict=True)):
        assert np.array_equal(block.tokens.numpy(), contexts.tokens[::2])
        assert np.array_equal(block.keep.numpy(), contexts.keep[::2])
        acts = store.read_acts("train", shards[i * quarter], HOOK_POINT).reshape(*contexts.tokens.shape, -1)
        assert np.array_equal(block.acts.numpy(), acts[::2])


@pytest.mark.parametrize("work", ["evaluate", "index", "controls"])
def test_the_markers_are_not_read_again_for_each_shard(
    work: str, tmp_path: Path, tiny_model: NativeModel, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading them takes time proportional to their number, so once per shard would be quadratic."""
    save(random_sae(), tmp_path / "sae", {"hook_point": HOOK_POINT, "model": tiny_model.identity()})
    calls, real = [0], ActivationStore.markers

    def counted(self: ActivationStore, split: str) -> dict[int, Any]:
        calls[0] += 1
        return real(self, split)

    monkeypatch.setattr(ActivationStore, "markers", counted)
    how = {"evaluate": {}, "index": {"tokens": 9216}, "controls": {"tokens": 1024, "only": []}}[work]
    getattr(pipeline, work)(tmp_path / "sae", store=tiny_store, model=tiny_model, **how)
    assert len(real(ActivationStore.open(tiny_store), "heldout")) == 32
    assert calls[0] < 16
