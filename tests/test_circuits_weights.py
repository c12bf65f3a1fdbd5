"""Circuits from weights against closed forms, brute force over the vocabulary, and heads whose circuits are known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import SHAPE, write_model
from torch import Tensor

from sae.circuits import orders, skip_trigrams, weights
from sae.circuits.skip_trigrams import SkipTrigrams
from sae.circuits.weights import Circuits, HeadMatrices
from sae.lm import LanguageModel, ModelError, load_model

ATTN = replace(SHAPE, n_layers=2, attn_only=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(write_model(tmp_path_factory.mktemp("weights") / "m", shape=ATTN))


def test_eigenvalue_score_is_that_of_the_whole_product() -> None:
    """Against numpy's eigenvalues of the n × n product, and matrices whose eigenvalues are known."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 6), (6, 40)))
    whole = torch.linalg.eigvals(left @ right)
    expected = float(whole.real.sum() / whole.abs().sum())
    assert weights.eigenvalue_score(left, right) == pytest.approx(expected, abs=1e-9)
    assert torch.allclose(
        weights.eigenvalues(left, right).abs(), whole.abs().sort(descending=True).values[:6], atol=1e-8
    )
    basis = torch.linalg.qr(left).Q
    assert weights.eigenvalue_score(basis, basis.T) == pytest.approx(1)
    assert weights.eigenvalue_score(basis, -basis.T) == pytest.approx(-1)
    half = torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=torch.float64)
    assert weights.eigenvalue_score(basis * half, basis.T) == pytest.approx(0, abs=1e-12)
    turn = basis @ torch.block_diag(*[torch.tensor([[0.0, -1], [1, 0]], dtype=torch.float64)] * 3)
    assert weights.eigenvalue_score(turn, basis.T) == pytest.approx(0, abs=1e-12)  # rotations: ±i
    assert weights.eigenvalue_score(torch.zeros(4, 2), torch.zeros(2, 4)) == 0


def test_circuits_are_the_products_of_the_paper(model: LanguageModel) -> None:
    """Token by token from the module's own layers: its norms at scale 1, its projections, its unembedding."""
    found = weights.Folded.of(model).circuits(1, 1)
    module = model.module.double()  # type: ignore[attr-defined]
    block, rows = module.blocks[1], slice(8, 16)

    def normed(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) * norm.weight

    x = normed(block.ln1, module.embed.weight)
    v = x @ block.attn.v.weight[rows].T
    logits = normed(module.ln_final, v @ block.attn.o.weight[:, rows].T) @ module.unembed.weight.T
    q, k = (x @ part.weight[rows].T for part in (block.attn.q, block.attn.k))
    ids = model.token_ids
    assert torch.allclose(found.ov(), (logits - logits[:, ids].mean(1, keepdim=True))[ids][:, ids], atol=1e-5)
    assert torch.allclose(found.qk(), (q @ k.T)[ids][:, ids], atol=1e-5)
    whole = torch.linalg.eigvals(found.ov())
    score = float(whole.real.sum() / whole.abs().sum())
    module.float()
    assert weights.copying_scores(model)[1, 1] == pytest.approx(score, abs=1e-6)
    whole = torch.linalg.eigvals(found.qk())
    assert weights.matching_scores(model)[1, 1] == pytest.approx(float(whole.real.sum() / whole.abs().sum()), abs=1e-6)


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_composition_is_the_ratio_of_norms_of_whole_matrices(model: LanguageModel, kind: weights.Composition) -> None:
    found = weights.composition_scores(model, kind)
    w = model.weights()
    centre = torch.eye(16, dtype=torch.float64) - 1 / 16
    fold = centre @ torch.diag(w.layers[1].ln1.norm.weight.double())
    first, second = w.layers[0].attn, w.layers[1].attn
    for a, b in itertools.product(range(2), range(2)):
        OV = first.W_V[a].double() @ first.W_O[a].double()
        OV = centre @ torch.diag(w.layers[0].ln1.norm.weight.double()) @ OV
        QK = fold @ second.W_Q[b].double() @ second.W_K[b].double().T @ fold.T
        OV2 = fold @ second.W_V[b].double() @ second.W_O[b].double()
        product, rest = {"q": (OV @ QK, QK), "k": (QK @ OV.T, QK), "v": (OV @ OV2, OV2)}[kind]
        assert found[a, 2 + b] == pytest.approx(float(product.norm() / (OV.norm() * rest.norm())), abs=1e-9)
    assert found[:, :2].isnan().all()
    assert found[2:].isnan().all()


def test_composition_is_1_where_a_head_reads_what_another_writes_and_0_elsewhere() -> None:
    e = torch.eye(8, dtype=torch.float64)
    first = HeadMatrices(e[:, :1], e[:, :1], e[:, :1], e[1:2])  # writes direction 1
    reads_1 = HeadMatrices(e[:, 2:3], e[:, 1:2], e[:, 4:5], e[5:6])  # by its keys only
    assert weights.composition(first, reads_1, "k") == pytest.approx(1)
    assert weights.composition(first, reads_1, "q") == weights.composition(first, reads_1, "v") == 0
    mean, spread = weights.random_composition(64, 16, n=50)
    assert mean == pytest.approx(1 / math.sqrt(64), rel=0.1)  # E‖AB‖² of independent random directions: 1/d_model
    assert 0 < spread < 0.02


def test_skip_trigrams_are_the_best_of_all_triples(model: LanguageModel) -> None:
    circuits = weights.Folded.of(model).circuits(0, 1)
    among = torch.arange(20, 32)
    QK, OV = circuits.qk()[among][:, among], circuits.ov()[among][:, among]
    QK, OV = QK - QK.mean(1, keepdim=True), OV - OV.mean(1, keepdim=True)
    triples = [
        (float(QK[d, s].clamp_min(0) * OV[s, o].clamp_min(0)), s, d, o)
        for s, d, o in itertools.product(range(12), repeat=3)
    ]
    best = sorted(triples, reverse=True)[:30]
    found = skip_trigrams.skip_trigrams(circuits, 30, among=among)
    assert found.score.tolist() == pytest.approx([score for score, *_ in best])
    rows = torch.stack([found.source, found.destination, found.out], 1).tolist()
    assert {tuple(row) for row in rows} == {(s + 20, d + 20, o + 20) for _, s, d, o in best}


def test_lift_counts_what_a_loop_over_the_text_counts() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(6, (40, 20), generator=generator)
    triples = torch.randint(6, (25, 3), generator=generator)
    found = skip_trigrams.lift(SkipTrigrams(*triples.T, torch.ones(25)), tokens, torch.arange(6))
    for i, (s, d, o) in enumerate(triples.tolist()):
        seen = hits = at = followed = 0
        for row in tokens.tolist():
            for j in range(19):
                if row[j] != d:
                    continue
                at, followed = at + 1, followed + (row[j + 1] == o)
                if s in row[:j]:
                    seen, hits = seen + 1, hits + (row[j + 1] == o)
        assert (int(found.seen[i]), int(found.hits[i])) == (seen, hits)
        assert float(found.expected[i]) == pytest.approx(seen * followed / at)
        assert float(found.lift[i]) == pytest.approx((hits + 1) / (seen * followed / at + 1))


def test_a_head_that_joins_two_skip_trigrams_is_caught_with_the_pairs_it_forces() -> None:
    """`0 … 1 → 2` and `0 … 3 → 4` stand in the text; the head cannot raise them without `0 … 1 → 4` and `0 … 3 → 2`."""
    Q, K, V, U = (torch.zeros(6, 1, dtype=torch.float64) for _ in range(4))
    Q[[1, 3]], K[0], V[0] = 1, 1, 1
    U[[2, 4]] = 1
    circuits = Circuits(Q, K, V, U.T)
    with_source = torch.tensor([[0, 5, 1, 2, 5, 3, 4, 5]] * 20)
    without = torch.tensor([[5, 5, 1, 4, 5, 3, 2, 5], [5, 5, 1, 5, 5, 3, 5, 5]] * 20)
    tokens = torch.cat([with_source, without])
    found = skip_trigrams.skip_trigrams(circuits, 4)
    assert {tuple(t) for t in torch.stack(found[:3], 1).tolist()} == {(0, d, o) for d in (1, 3) for o in (2, 4)}
    counted = skip_trigrams.lift(found, tokens, torch.arange(6))
    forced = skip_trigrams.forced_pairs(found, counted)
    assert {(pair.source, pair.destination, pair.out) for pair in forced} == {(0, 1, 4), (0, 3, 2)}
    assert all(pair.lift < 0.5 for pair in forced)
    shuffled = skip_trigrams.with_shuffled_destinations(found, seed=1)
    assert sorted(shuffled.destination.tolist()) == sorted(found.destination.tolist())
    assert torch.equal(shuffled.out, found.out)


def test_orders_are_sums_over_paths(model: LanguageModel) -> None:
    """Every path through at most n heads, one by one, at held patterns and scales: brute force in float64."""
    tokens = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(0))
    found = orders.losses_by_order(model, tokens, contexts_at_once=2)
    assert torch.allclose(found[-1], model.token_losses(tokens).double().mean(1), atol=1e-5)
    w = model.weights()
    points = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
    held = [x.double() for x in model.capture_all(tokens, points).values()]

    def normed(norm: object, x: Tensor, at: Tensor, bias: bool) -> Tensor:
        y: Tensor = norm.norm.numerator(x) / norm.norm.scale(at)  # type: ignore[attr-defined]
        return y + norm.bias if bias else y  # type: ignore[attr-defined]

    def head(layer: int, h: int, x: Tensor) -> Tensor:
        """What head h of a layer makes of a summand x of the stream, without constants."""
        attn = w.layers[layer].attn
        pattern = attn.pattern(w.layers[layer].ln1(held[layer].float()))[:, h].double()
        y = normed(w.layers[layer].ln1, x, held[layer], False)
        return pattern @ y @ attn.W_V[h].double() @ attn.W_O[h].double()

    def constant(layer: int) -> Tensor:
        attn = w.layers[layer].attn
        ones = torch.zeros_like(held[0]) + w.layers[layer].ln1.bias
        return (
            sum((ones @ attn.W_V[h].double() + attn.b_V[h]) @ attn.W_O[h].double() for h in range(2))
            + attn.b_O.double()
        )  # type: ignore[return-value]

    start = w.embedded(tokens).double()
    through: list[Tensor] = [start, torch.zeros_like(start), torch.zeros_like(start)]
    for layer in (0, 1):
        through[1] = through[1] + constant(layer) + head(layer, 0, start) + head(layer, 1, start)
    for a, b in itertools.product(range(2), range(2)):
        through[2] = through[2] + head(1, b, head(0, a, start))
    through[2] = through[2] + sum(head(1, b, constant(0)) for b in range(2))
    for order in range(3):
        resid = sum(through[: order + 1], torch.zeros_like(start))
        logits = normed(w.ln_final, resid, held[2], True) @ w.W_U.double() + w.b_U
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        assert torch.allclose(found[order], losses.mean(1), atol=1e-5), order


def test_orders_need_a_model_without_mlps(tiny_model: LanguageModel) -> None:
    with pytest.raises(ModelError, match="has MLPs"):
        orders.losses_by_order(tiny_model, torch.zeros(1, 5, dtype=torch.long))


def test_bigram_agreement_is_a_correlation_of_counted_rows() -> None:
    tokens = torch.randint(8, (200, 12), generator=torch.Generator().manual_seed(2))
    ids = torch.arange(7)
    counts = weights.bigram_counts(tokens, ids)
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for row in tokens.tolist():
        for a, b in itertools.pairwise(row):
            if a < 7 and b < 7:
                expected[a, b] += 1
    assert torch.equal(counts, expected)
    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found, rows = weights.bigram_agreement(logits, tokens, ids, least=200)
    assert rows.tolist() == (counts.sum(1) >= 200).nonzero()[:, 0].tolist() != []
    for value, row in zip(found.tolist(), rows.tolist(), strict=True):
        pair = torch.stack([logits[row], (counts[row] + 1).log()])
        assert value == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-9)


def test_the_direct_path_is_what_a_model_without_heads_predicts(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "m", shape=ATTN))
    module = model.module.double()  # type: ignore[attr-defined]
    x = module.embed.weight
    x = (x - x.mean(-1, keepdim=True)) * module.ln_final.weight
    logits = (x @ module.unembed.weight.T)[model.token_ids][:, model.token_ids]
    assert torch.allclose(weights.direct_bigrams(model), logits - logits.mean(1, keepdim=True), atol=1e-5)
