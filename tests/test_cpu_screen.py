"""The screen of the CPU backend: its bound against float64 on hostile rows, and that its format changes no bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels import cpu, cpu_screen, matmul, processor
from sae.kernels.cpu_screen import Factor, Screen, prepare_in
from sae.kernels.sparsity import Above, BatchTopK, NotSparse, Rule, TopK

FORMATS = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture(autouse=True, scope="module")
def exact_int8_products() -> Iterator[None]:
    """PyTorch's int8 product where it is exact, else one in int32, so that these tests run on any processor."""

    def product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return out.copy_(a.int() @ b.int())

    with pytest.MonkeyPatch.context() as patch:
        if not cpu_screen.int8_products_are_exact():
            patch.setattr(torch, "_int_mm", product)
        yield


def plain(g: np.random.Generator, d: int) -> np.ndarray:
    return g.standard_normal(d)


def wide(g: np.random.Generator, d: int) -> np.ndarray:
    return g.standard_normal(d) * 10.0 ** g.uniform(-12, 6, d)


def outliers(g: np.random.Generator, d: int) -> np.ndarray:
    row = g.standard_normal(d)
    row[g.integers(d)] *= 1e4
    return row


def equal(g: np.random.Generator, d: int) -> np.ndarray:
    return np.full(d, g.standard_normal())


def zero(g: np.random.Generator, d: int) -> np.ndarray:
    return np.zeros(d)


def halves(g: np.random.Generator, d: int) -> np.ndarray:
    """Whole numbers and a half in units of int8: the largest rounding error there is, always in one direction."""
    row = np.full(d, 62.5)
    row[0] = 127
    return row * g.choice([0.01, 1, 3])


def subnormal(g: np.random.Generator, d: int) -> np.ndarray:
    return g.standard_normal(d) * 10.0 ** g.uniform(-44, -37)


def tiny(g: np.random.Generator, d: int) -> np.ndarray:
    return g.standard_normal(d) * 10.0 ** g.uniform(-37, -15)


def huge(g: np.random.Generator, d: int) -> np.ndarray:
    return g.standard_normal(d) * 10.0 ** g.uniform(6, 15)


KINDS = [plain, wide, outliers, equal, zero, halves, subnormal, tiny, huge]
kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=6)


def rows_of(kinds: list[Callable[[np.random.Generator, int], np.ndarray]], seed: int, d: int) -> Tensor:
    g = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([kind(g, d) for kind in kinds]).astype(np.float32))


def screened(screen: Screen, n_rows: int) -> np.ndarray:
    """The screen's values in float32, by the definition: the product times the units."""
    product = screen.product(0, n_rows)
    if screen.x.unit is not None:
        assert screen.weights.unit is not None
        return product.astype(np.float32) * screen.weights.unit * screen.x.unit[:, None]
    return (product.astype(np.uint32) << np.uint32(32 - 8 * product.itemsize)).view(np.float32)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@given(kinds, kinds, st.integers(0, 10**6), st.sampled_from([1, 3, 64, 257]), st.sampled_from([0.0, 1e-6, 1.0, 1e8]))
@settings(max_examples=60, deadline=None)
def test_no_exact_value_is_farther_from_the_screen_than_the_bound(
    dtype: torch.dtype, x_kinds: list, w_kinds: list, seed: int, d: int, bias_scale: float
) -> None:
    x, W = rows_of(x_kinds, seed, d), rows_of(w_kinds, seed + 1, d)
    g = np.random.default_rng(seed + 2)
    bias, threshold = (torch.from_numpy((g.standard_normal(len(W)) * bias_scale).astype(np.float32)) for _ in range(2))
    screen = Screen.of(x, prepare_in(dtype, W.t()), bias, threshold)
    assert screen.is_finite
    _, _, x_norm, x_error, norm, margin, base, doubt, rounding = (
        None if a is None else np.asarray(a, np.float64) for a in screen.arrays
    )
    s = screened(screen, len(x)).astype(np.float64)
    slack = x_norm[:, None] * margin + x_error[:, None] * norm + rounding * np.abs(s) + doubt
    n = len(W)
    exact = x.double().numpy() @ W.double().numpy().T + bias.double().numpy() - threshold.double().numpy()
    assert (np.abs(exact - (s + base)[:, :n]) <= slack[:, :n]).all()
    terms = x.numpy()[:, None] * W.numpy()
    in_float32 = terms.cumsum(-1, dtype=np.float32)[..., -1] + bias.numpy()  # one of the orders of summation
    from_float32 = in_float32.astype(np.float64) - threshold.double().numpy()
    assert (np.abs(from_float32 - (s + base)[:, :n]) <= slack[:, :n]).all()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@given(kinds, st.integers(0, 10**6), st.sampled_from([1, 5, 64, 300]))
@settings(max_examples=40, deadline=None)
def test_norms_and_errors_are_never_below_the_true_ones(dtype: torch.dtype, kinds: list, seed: int, d: int) -> None:
    rows = rows_of(kinds, seed, d)
    factor = Factor.of(rows, dtype)
    unit = np.ones(len(rows)) if factor.unit is None else factor.unit.astype(np.float64)
    wide, rounded = rows.double().numpy(), factor.numbers.double().numpy() * unit[:, None]
    tolerated = 1 + (d + 8) * 2.0**-24
    assert (factor.norm * tolerated >= np.linalg.norm(wide, axis=1)).all()
    assert (factor.norm * tolerated >= np.linalg.norm(rounded, axis=1)).all()
    error = np.linalg.norm(wide - rounded, axis=1)
    assert (factor.error * tolerated + 8 * 2.0**-24 * factor.norm >= error).all()
    assert (error <= np.linalg.norm(wide, axis=1) * (1 + 1e-6)).all()  # as the bound on their own rounding assumes


def test_int8_numbers_use_the_whole_range_and_half_a_unit_of_error_at_most() -> None:
    rows = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    factor = Factor.of(rows, torch.int8)
    assert factor.unit is not None
    numbers = factor.numbers.int()
    assert (numbers.abs().amax(1) == 127).all()
    error = (rows - numbers * torch.from_numpy(factor.unit)[:, None]).abs() / torch.from_numpy(factor.unit)[:, None]
    assert error.max() <= 0.5001


def selected(dtype: torch.dtype, x: Tensor, W: Tensor, bias: Tensor, rule: Rule) -> tuple[Tensor, ...] | str:
    try:
        support, values = cpu.select(x, prepare_in(dtype, W.t()), bias, rule)
    except NotSparse as refused:
        return str(refused)
    return support.features, support.offsets, values


@given(kinds, kinds, st.integers(0, 10**6), st.sampled_from([3, 64]), st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_every_format_selects_the_same_features_and_bits(
    x_kinds: list, w_kinds: list, seed: int, d: int, bias_scale: float
) -> None:
    x, W = rows_of(x_kinds * 3, seed, d), rows_of(w_kinds * 40, seed + 1, d)
    bias = torch.randn(len(W), generator=torch.Generator().manual_seed(seed)) * bias_scale
    median = (x @ W.t() + bias).median(0).values.clamp_min(0)
    for rule in (TopK(1), TopK(5), BatchTopK(3), BatchTopK(3, bias.abs()), Above(median)):
        first, *others = (selected(dtype, x, W, bias, rule) for dtype in FORMATS)
        for other in others:
            assert isinstance(first, str) == isinstance(other, str)
            assert all(map(torch.equal, first, other)) if not isinstance(first, str) else first == other


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_what_is_not_finite_or_can_overflow_is_left_to_dense_products(dtype: torch.dtype) -> None:
    W, bias = torch.ones(40, 8), torch.zeros(40)
    for number in (torch.nan, torch.inf, -torch.inf, 1e38):
        x = torch.ones(3, 8)
        x[1, 2] = number
        with pytest.raises(NotSparse, match="not finite"):
            cpu.select(x, prepare_in(dtype, W.t()), bias, TopK(2))
        with pytest.raises(NotSparse, match="not finite"):
            cpu.select(
                torch.ones(3, 8), prepare_in(dtype, W.index_fill(0, torch.tensor([4]), number).t()), bias, TopK(2)
            )
    with pytest.raises(NotSparse, match="not finite"):
        cpu.select(torch.ones(3, 8), prepare_in(dtype, W.t()), bias + torch.nan, TopK(2))


# --- the choice ------------------------------------------------------------------------------------------------------

AVX512 = ("avx2", "avx512_f", "avx512_bw", "avx512_vl")
FAMILIES = {  # name: (instruction sets, products of `auto`, format of the screen)
    "Intel Skylake-X": (AVX512, "medium", torch.float32),
    "Intel Cascade Lake, Ice Lake, Tiger Lake": ((*AVX512, "avx512_vnni"), "medium", torch.int8),
    "Intel Cooper Lake": ((*AVX512, "avx512_vnni", "avx512_bf16"), "medium", torch.bfloat16),
    "Intel Sapphire Rapids": (
        (*AVX512, "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
        "highest",
        torch.bfloat16,
    ),
    "Intel Alder Lake": (("avx2", "avx_vnni"), "medium", torch.float32),
    "Intel Lunar Lake": (("avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert"), "highest", torch.float32),
    "Intel Haswell, AMD Zen to Zen 3": (("avx2",), "medium", torch.float32),
    "AMD Zen 4": ((*AVX512, "avx512_vnni", "avx512_bf16"), "medium", torch.bfloat16),
    "AMD Zen 5": ((*AVX512, "avx512_vnni", "avx512_bf16", "avx_vnni"), "medium", torch.bfloat16),
    "x86 without AVX2": (("sse4_1", "avx"), "highest", torch.float32),
    "ARM without bfloat16": (("neon", "dot"), "highest", torch.float32),
    "ARM with bfloat16": (("neon", "dot", "bf16", "i8mm", "sve", "sve_bf16"), "highest", torch.float32),
}


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`has(*names)`: the processor's instruction sets from then on, with exact int8 products and no limit of oneDNN."""
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(cpu_screen, "int8_products_are_exact", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    def set_instructions(*names: str) -> None:
        for module in (matmul, processor):
            monkeypatch.setattr(module, "instructions", lambda: frozenset(names))

    return set_instructions


@pytest.mark.parametrize("family", FAMILIES)
def test_products_and_screen_of_each_family_of_processors(has: Callable[..., None], family: str) -> None:
    instructions, products, screen = FAMILIES[family]
    has(*instructions)
    assert matmul.choose("auto") == products
    assert cpu_screen.screen_dtype() == screen
    assert f"{str(screen).removeprefix('torch.')} product (" in cpu.describe()


def test_auto_never_emulates_bfloat16(has: Callable[..., None]) -> None:
    """Whatever else a processor has: bfloat16 products are emulated without avx512_bf16, and slower than float32."""
    everything = {name for instructions, _, _ in FAMILIES.values() for name in instructions}
    for missing in (set(), everything - {"avx2"}, {"avx512_vnni"}, {"amx_tile", "amx_bf16"}):
        has(*everything - missing - {"avx512_bf16"})
        assert cpu_screen.screen_dtype() != torch.bfloat16
        assert matmul.choose("auto") in ("highest", "medium")


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_the_limit_of_onednn_counts_as_the_processors(
    has: Callable[..., None], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    has(*FAMILIES["AMD Zen 4"][0])
    limits = {"": torch.bfloat16, "avx512_core_bf16": torch.bfloat16, "AVX512_CORE_VNNI": torch.int8}
    for limit, screen in {**limits, "AVX512_CORE": torch.float32, "avx2": torch.float32}.items():
        monkeypatch.setenv(variable, limit)
        assert cpu_screen.screen_dtype() == screen


def test_int8_products_that_saturate_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN adds 128 to one factor and, without VNNI, adds pairs of products in 16 bits; exact ones are accepted."""

    def product(a: Tensor, b: Tensor, largest: int) -> Tensor:
        pairs = ((a.int() + 128)[:, :, None] * b.int()).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-largest - 1, largest).sum(1) - 128 * b.int().sum(0)

    for bits, exact in ((32, True), (16, False)):
        monkeypatch.setattr(torch, "_int_mm", lambda a, b, bits=bits: product(a, b, 2 ** (bits - 1) - 1))
        assert cpu_screen.int8_products_are_exact.__wrapped__() == exact


def test_rows_of_a_length_that_int8_products_do_not_fit_are_screened_in_float32() -> None:
    shortest, longest = cpu_screen.INT8_D_IN[0], cpu_screen.INT8_D_IN[-1]
    assert 127**2 * longest < 2**31
    expected = {shortest - 1: torch.float32, shortest: torch.int8, longest: torch.int8, longest + 1: torch.float32}
    for d_in, dtype in expected.items():
        assert prepare_in(torch.int8, torch.zeros(d_in, 2)).rounded.numbers.dtype == dtype
