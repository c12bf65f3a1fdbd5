"""Every kernel of every backend against the dense formula in float64: supports, values and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels import BACKENDS, autograd, choose, cpu_screen, reference
from sae.kernels.activations import SparseActs, l0
from sae.kernels.sparsity import Above, BatchTopK, NotSparse, Rule, Support, TopK

SHAPES = [(1, 1, 1), (3, 5, 7), (70, 33, 129), (257, 64, 512)]  # rows, d_in, d_sae: odd, and beyond one block or chunk


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Each backend; Triton's on a GPU where there is one, else in its interpreter (slow: keep shapes small)."""
    if request.param == "triton":
        pytest.importorskip("triton")
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    with torch.device(device):
        yield choose(request.param, device)


def random(seed: int, *shape: int) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return numbers.to(torch.get_default_device())


def weights(d_in: int, d_sae: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc, feature-major in memory as a dictionary keeps it; b_enc; W_dec."""
    return random(seed, d_sae, d_in).t() * 0.5, random(seed + 1, d_sae) * 0.3, random(seed + 2, d_sae, d_in)


def active_by_rule(pre: Tensor, rule: Rule) -> Tensor:
    """The definition, by sorting."""
    match rule:
        case TopK(k):
            kth = pre.sort(-1, descending=True).values[:, min(k, pre.shape[1]) - 1 : min(k, pre.shape[1])]
            return (pre >= kth) & (pre > 0)
        case BatchTopK(k, lift):
            ranked = (pre if lift is None else pre + lift).masked_fill(pre <= 0, 0)
            kth = ranked.flatten().sort(descending=True).values[min(k * len(pre), pre.numel()) - 1]
            return (ranked >= kth) & (pre > 0)
        case Above(threshold):
            return pre > threshold
    raise AssertionError


def rules(d_sae: int) -> list[Rule]:
    thresholds = random(9, d_sae).double()
    ranked = [BatchTopK(1), BatchTopK(3), BatchTopK(3, thresholds.abs().float())]
    return [TopK(1), TopK(3), TopK(d_sae + 5), *ranked, Above(thresholds * 0), Above(thresholds)]


def chosen(kernels: ModuleType, x: Tensor, W_enc: Tensor, bias: Tensor, rule: Rule) -> tuple[Support, Tensor]:
    support, pre = kernels.select(x, kernels.prepare(W_enc), bias, rule)
    assert support.features.dtype == torch.int32
    assert support.offsets.dtype == torch.int64
    assert support.offsets[0] == 0
    assert support.offsets[-1] == len(support.features) == len(pre)
    return support, pre


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_finds_what_the_rule_says_with_float32_values(kernels: ModuleType, shape: tuple[int, int, int]) -> None:
    rows, d_in, d_sae = shape
    if kernels.NAME == "triton" and rows > 100 and not torch.cuda.is_available():
        pytest.skip("takes long in Triton's interpreter, and has no more blocks than the one before")
    W_enc, bias, _ = weights(d_in, d_sae)
    x = random(5, rows, d_in)
    pre = x.double() @ W_enc.double() + bias.double()
    for rule in rules(d_sae):
        active = active_by_rule(pre, rule)
        exact_rule = Above(rule.threshold.float()) if isinstance(rule, Above) else rule
        try:
            support, values = chosen(kernels, x, W_enc, bias, exact_rule)
        except NotSparse:
            assert (active.sum(-1) > d_sae // 4).any(), rule
            continue
        assert torch.equal(support.dense(torch.ones(len(values))) > 0, active), rule
        torch.testing.assert_close(support.dense(values).double(), torch.where(active, pre, 0.0), rtol=1e-5, atol=1e-5)


def test_screening_in_bfloat16_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values so close to each other that bfloat16 cannot distinguish them; the float32 product can."""
    cpu = choose("cpu")
    d_in, d_sae, rows = 64, 300, 40
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(1, d_in, generator=g)
    W_enc = (shared + 1e-3 * torch.randn(d_sae, d_in, generator=g)).t()
    x = shared.sign() + 1e-4 * torch.randn(rows, d_in, generator=g)
    bias = torch.linspace(-1e-3, 1e-3, d_sae)
    pre = x.double() @ W_enc.double() + bias.double()
    assert len(torch.unique((x.bfloat16() @ W_enc.bfloat16())[0])) < 20  # so the screen alone could not decide
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(cpu_screen, "screen_dtype", lambda dtype=dtype: dtype)
        for rule in (TopK(7), BatchTopK(7), Above(pre.quantile(0.98).float().expand(d_sae).contiguous())):
            support, values = chosen(cpu, x, W_enc, bias, rule)
            dense = support.dense(values)
            if (rule_name := type(rule).__name__) in found:
                assert torch.equal(found[rule_name], dense), "the screen's precision must not matter, bit for bit"
            found[rule_name] = dense
            gap = 2e-5 * pre.abs().max()  # float32's own rounding may decide a tie
            active = active_by_rule(pre, rule)
            wrong = active != (dense != 0)
            smallest = torch.where(active, pre, torch.inf)
            bar = smallest.amin(-1, keepdim=True) if isinstance(rule, TopK) else smallest.amin()
            assert ((pre - bar)[wrong].abs() < gap).all()
            assert wrong.float().mean() < 0.01


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 70), st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_cpu_selects_as_the_reference_does(seed: int, rows: int, d_sae: int, scale: float) -> None:
    W_enc, bias, _ = weights(16, d_sae, seed)
    x = random(seed + 7, rows, 16) * scale
    lift = torch.where(torch.arange(d_sae) % 2 == 0, scale, 0.0)
    for rule in (TopK(4), BatchTopK(2), BatchTopK(2, lift), Above(bias.abs())):
        mine, theirs = (s.dense(v) for s, v in (chosen(k, x, W_enc, bias, rule) for k in (choose("cpu"), reference)))
        both = (mine != 0) & (theirs != 0)
        torch.testing.assert_close(mine[both], theirs[both], rtol=1e-4, atol=1e-5 * scale)
        # Where only one has the entry, float32's rounding of two sums has decided a tie at the bar.
        if isinstance(rule, BatchTopK):
            mine, theirs = rule.rank(mine), rule.rank(theirs)
        smallest = torch.where(theirs != 0, theirs, torch.inf)
        bar = {TopK: smallest.amin(-1, keepdim=True), BatchTopK: smallest.amin(), Above: bias.abs()}[type(rule)]
        differ = (mine != 0) != (theirs != 0)
        assert ((mine + theirs - bar).abs()[differ] <= 1e-5 * (scale + (mine + theirs)[differ])).all()


@pytest.mark.parametrize("screen", [torch.bfloat16, torch.float32], ids=str)
def test_huge_biases_do_not_hide_what_is_active(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, screen: torch.dtype
) -> None:
    """x · w + bias is small while both are large, so that float32's rounding of the bias matters."""
    if kernels.NAME == "cpu":
        monkeypatch.setattr(cpu_screen, "screen_dtype", lambda: screen)
        monkeypatch.setattr(kernels, "MIN_ROW_SPACE", 150)
    elif screen == torch.float32:
        pytest.skip("only the cpu kernels have a choice of screens")
    W_enc, _, _ = weights(33, 150)
    x = random(4, 20, 33)
    for scale in (1024.0, 1e-6):  # of the product next to a bias of 1024
        W_scaled = W_enc * scale
        product = x.double() @ W_scaled.double()
        bias = -product[0].float() if scale > 1 else torch.full((150,), -1024.0)
        for threshold in (torch.zeros(150), bias.abs(), -bias.abs()):
            support, _ = chosen(kernels, x, W_scaled, bias, Above(threshold))
            pre = product + bias.double()
            active = support.dense(torch.ones(len(support.features))) > 0
            sure = (pre - threshold).abs() > 1e-6 * (product.abs() + bias.abs() + threshold.abs())
            assert torch.equal(active[sure], (pre > threshold)[sure])


@pytest.mark.filterwarnings("ignore:invalid value encountered in add:RuntimeWarning")  # numpy, in Triton's interpreter
def test_an_infinite_threshold_silences_its_feature_alone(kernels: ModuleType) -> None:
    W_enc, bias, _ = weights(16, 40)
    x = random(5, 30, 16)
    threshold = torch.full((40,), 3.0)
    threshold[7] = torch.inf
    support, values = chosen(kernels, x, W_enc, bias, Above(threshold))
    pre = (x.double() @ W_enc.double() + bias).float()
    torch.testing.assert_close(support.dense(values), torch.where(pre > threshold, pre, 0.0), rtol=1e-5, atol=1e-5)


def test_rows_without_any_active_feature_and_no_rows_at_all(kernels: ModuleType) -> None:
    W_enc, bias, W_dec = weights(8, 40)
    for x in (random(0, 6, 8), torch.zeros(0, 8)):
        for rule in (TopK(3), BatchTopK(3), Above(torch.zeros(40))):
            support, values = chosen(kernels, x, W_enc, bias - 1e4, rule)
            assert len(values) == 0
            assert kernels.combine(values, support, W_dec).shape == (len(x), 8)
            assert not kernels.combine(values, support, W_dec).any()
            out = torch.ones(40, 8)
            kernels.add_by_feature_(out, values, support, x)
            assert (out == 1).all()
            assert kernels.dots(x, W_dec, support).shape == (0,)
            assert not kernels.sum_by_feature(values, support).any()


def test_equal_values_are_cut_to_exactly_k(kernels: ModuleType) -> None:
    x, W_enc = torch.ones(5, 4), torch.ones(90, 4).t()
    support, values = chosen(kernels, x, W_enc, torch.zeros(90), TopK(3))
    assert support.offsets.diff().tolist() == [3] * 5
    assert (values == 4).all()
    support, _ = chosen(kernels, x, W_enc, torch.zeros(90), BatchTopK(3))
    assert len(support.features) == 15


def a_support(rows: int, d_sae: int, share: float, seed: int) -> Support:
    """Random pairs, some rows empty, feature 0 in every other row."""
    active = torch.rand(rows, d_sae, generator=torch.Generator().manual_seed(seed), device="cpu") < share
    active = active.to(torch.get_default_device())
    active[::3] = False
    active[1::2, 0] = True
    offsets = torch.nn.functional.pad(active.sum(-1).cumsum(0), (1, 0))
    return Support(active.nonzero()[:, 1].int(), offsets, d_sae)


@pytest.mark.parametrize("shape", [(4, 3, 2), (70, 33, 129), (300, 40, 50)], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_products_on_a_support(kernels: ModuleType, shape: tuple[int, int, int], contiguous: bool) -> None:
    rows, d, d_sae = shape
    support = a_support(rows, d_sae, 0.1, 0)
    values, a, b = random(1, len(support.features)), random(2, rows, d), random(3, d_sae, d)
    if not contiguous:
        a, b = random(2, d, rows).t(), random(3, d, d_sae).t()
    mask, dense = support.dense(torch.ones_like(values)) > 0, support.dense(values).double()
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(kernels.combine(values, support, b).double(), dense @ b.double(), **close)
    torch.testing.assert_close(kernels.dots(a, b, support).double(), (a.double() @ b.double().T)[mask], **close)
    out = torch.full((d_sae, d), 2.0)
    kernels.add_by_feature_(out, values, support, a)
    torch.testing.assert_close(out.double(), 2.0 + dense.T @ a.double(), **close)
    torch.testing.assert_close(kernels.sum_by_feature(values, support).double(), dense.sum(0), **close)


def test_by_feature_is_the_transpose_of_the_support(kernels: ModuleType) -> None:
    support = a_support(50, 30, 0.2, 1)
    kernels.add_by_feature_(torch.zeros(30, 2), torch.zeros(len(support.features)), support, torch.zeros(50, 2))
    entries, rows, offsets = support.by_feature
    assert torch.equal(support.features[entries.long()].sort(stable=True).values, support.features[entries.long()])
    assert torch.equal(rows.long(), support.rows[entries.long()])
    assert torch.equal(offsets.diff(), torch.bincount(support.features.long(), minlength=30))


GRADIENT_RULES = [TopK(3), BatchTopK(3), BatchTopK(3, torch.linspace(0, 3, 60)), Above(torch.full((60,), 0.5))]


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("in_place", [True, False])
def test_every_gradient_of_a_dictionary_is_the_dense_float64_one(
    kernels: ModuleType, rule: Rule, in_place: bool
) -> None:
    d_in, d_sae, rows = 20, 60, 90
    W_enc, b_enc, W_dec = weights(d_in, d_sae)
    leaves = [
        t.clone(memory_format=torch.preserve_format).requires_grad_()
        for t in (random(3, rows, d_in), W_enc, b_enc, random(4, d_in) * 0.3, W_dec)
    ]
    x, W_enc, b_enc, b_dec, W_dec = leaves
    wide = [t.detach().double().requires_grad_() for t in leaves]
    X, WE, BE, BD, WD = wide
    pre = (X - BD) @ WE + BE
    active = active_by_rule(pre.detach(), Above(rule.threshold.double()) if isinstance(rule, Above) else rule)
    f = torch.where(active, pre, 0.0)
    weight = random(8, rows, d_in)
    exact = ((f @ WD + BD) * weight.double()).sum() + f.pow(2).sum() + ((f @ WD).pow(2)).sum()
    exact.backward()

    values, support = autograd.encode(kernels, x, W_enc, b_enc, b_dec, rule)
    acts = SparseActs(values, support, kernels)
    if in_place:  # as the optimiser has it: the gradients exist and are added to
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
    x_hat = acts.decode(W_dec)
    loss = ((x_hat + b_dec) * weight).sum() + values.pow(2).sum() + x_hat.pow(2).sum()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert l0(acts).item() == pytest.approx((f > 0).sum().item() / rows)
    assert torch.equal(acts.fired(), (f > 0).any(0))
    loss.backward()
    for name, mine, theirs in zip(("x", "W_enc", "b_enc", "b_dec", "W_dec"), leaves, wide, strict=True):
        scale = theirs.grad.abs().max().item()
        found = mine.grad.double() - (1.0 if in_place else 0.0)
        torch.testing.assert_close(found, theirs.grad, rtol=1e-4, atol=2e-6 * scale, msg=name)


def test_taken_features_send_their_gradient_home() -> None:
    for dim in (0, 1):
        weight = random(0, 6, 8).requires_grad_()
        features = torch.tensor([4, 1, 5])
        target = random(1, *weight.index_select(dim, features).shape)
        (theirs,) = torch.autograd.grad((weight.index_select(dim, features) * target).sum(), weight)
        (mine,) = torch.autograd.grad((autograd.take_features(weight, features, dim) * target).sum(), weight)
        assert torch.equal(mine, theirs)
        weight.grad = torch.ones_like(weight)
        (autograd.take_features(weight, features, dim) * target).sum().backward()
        torch.testing.assert_close(weight.grad, 1 + theirs)


@pytest.mark.parametrize("shape", [(1, 7), (130, 33)])
@pytest.mark.parametrize("unit_rows", [False, True])
def test_adam_is_torchs_with_the_decoders_constraint_around_it(
    kernels: ModuleType, shape: tuple[int, int], unit_rows: bool
) -> None:
    start = torch.nn.functional.normalize(random(0, *shape), dim=-1)
    mine, m, v = start.clone(), torch.zeros(shape), torch.zeros(shape)
    theirs = torch.nn.Parameter(start.double())
    adam = torch.optim.Adam([theirs], lr=3e-3, betas=(0.9, 0.99), eps=1e-7)
    for step in range(1, 6):
        gradient = random(step, *shape) * 10.0 ** (step - 3)
        kept = gradient.clone()
        kernels.adam_(mine, gradient, m, v, step=step, lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-7, unit_rows=unit_rows)
        assert torch.equal(gradient, kept)
        theirs.grad = gradient.double()
        if unit_rows:
            row = theirs.detach()
            theirs.grad = theirs.grad - (theirs.grad * row).sum(-1, keepdim=True) * row
        adam.step()
        if unit_rows:
            with torch.no_grad():
                theirs /= theirs.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(mine.double(), theirs.detach(), rtol=1e-4, atol=2e-6)


def test_threads_do_not_change_a_bit() -> None:
    cpu = choose("cpu")
    W_enc, bias, W_dec = weights(48, 700)
    x = random(5, 300, 48)

    def everything() -> list[Tensor]:
        support, values = chosen(cpu, x, W_enc, bias, TopK(9))
        out = torch.zeros(700, 48)
        cpu.add_by_feature_(out, values, support, x)
        return [support.features, values, cpu.combine(values, support, W_dec), cpu.dots(x, W_dec, support), out]

    alone = everything()
    torch.set_num_threads(3)
    try:
        together = everything()
    finally:
        torch.set_num_threads(1)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_choosing_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAE_KERNELS", raising=False)
    assert choose().NAME == "cpu"
    assert choose("reference").NAME == "reference"
    monkeypatch.setenv("SAE_KERNELS", "reference")
    assert choose().NAME == "reference"
    assert choose("cpu").NAME == "cpu"
    with pytest.raises(ValueError, match="no kernels 'fast'"):
        choose("fast")
    with pytest.raises(ValueError, match="run on a CPU"):
        choose("cpu", "cuda")


def test_choosing_kernels_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAE_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton")
    assert choose("auto", "cuda").NAME == "triton"
    with pytest.raises(ValueError, match="run on a CUDA device, the tensors are on cpu. Use --device cuda"):
        choose("triton", "cpu")
    monkeypatch.setenv("SAE_KERNELS", "triton")
    with pytest.raises(ValueError, match="run on a CUDA device"):
        choose()
    monkeypatch.delenv("SAE_KERNELS")
    monkeypatch.setattr("sae.kernels._installed", lambda name: name != "triton")
    assert choose("auto", "cuda").NAME == "reference"
    with pytest.raises(ValueError, match="need triton, which comes with torch for CUDA on Linux"):
        choose("triton", "cuda")


def test_weights_written_to_past_pytorch_are_noticed() -> None:
    """`encode` keeps nothing between calls. The numba kernels write to weights, which PyTorch does not notice."""
    kernels = choose("cpu")
    W_enc, bias, _ = weights(24, 96)
    x, no_bias = random(5, 40, 24), torch.zeros(24)
    for _ in range(3):
        values, support = autograd.encode(kernels, x, W_enc, bias, no_bias, TopK(4))
        exact, theirs = autograd.encode(choose("reference"), x, W_enc, bias, no_bias, TopK(4))
        assert torch.equal(support.features, theirs.features)
        torch.testing.assert_close(values, exact)
        rows = W_enc.t().numpy()
        rows[[3, 7]] = rows[[7, 3]]


def test_a_prepared_encoder_selects_as_a_new_one_does(kernels: ModuleType) -> None:
    W_enc, bias, _ = weights(24, 96)
    b_dec, prepared = torch.zeros(24), kernels.prepare(W_enc)
    for seed in (5, 6):
        x = random(seed, 20, 24)
        for rule in (TopK(4), BatchTopK(4), Above(torch.full((96,), 3.0))):
            values, support = autograd.encode(kernels, x, W_enc, bias, b_dec, rule, prepared)
            again, of_new = autograd.encode(kernels, x, W_enc, bias, b_dec, rule)
            assert torch.equal(support.features, of_new.features)
            assert torch.equal(values, again)
