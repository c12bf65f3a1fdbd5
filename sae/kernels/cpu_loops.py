"""The loops of the CPU backend, compiled by numba. They fill the arrays they are given; `cpu` runs them in threads."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from sae.kernels.compiler_cache import VARIABLE, choose_cache_directory

choose_cache_directory()  # before numba reads its settings

from numba import njit  # noqa: E402
from numba.core.caching import FunctionCache  # noqa: E402

GROUP = 32  # features in a group: its largest sure value represents it in the search for a row's k-th largest value
LEAST = np.float32(-1e38)  # below any pre-activation, but finite, as `compiled_for_numbers` requires


class LoopCache(FunctionCache):
    """numba's cache on disk, which must not stop a training: what cannot be read or written is compiled again."""

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception as error:  # a damaged file can raise anything while it is read
            self._give_up(error)

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.disable()  # type: ignore[no-untyped-call]
        _compiled_again(f"{self.cache_path}: {error}")


def _compiled_again(reason: str) -> None:
    """Says once that loops are not kept."""
    if not _REASONS:
        warnings.warn(
            f"numba cannot keep its compiled loops ({reason}), so every command compiles them again, which takes about "
            f"half a minute. Set {VARIABLE} to a directory that can be written.",
            stacklevel=2,
        )
    _REASONS.append(reason)


_REASONS: list[str] = []


def _loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compiles a function at its first call; kept on disk where possible."""

    def decorate(function: Callable[..., Any]) -> Any:
        loop = njit(nogil=True, error_model="numpy", **options)(function)
        try:
            loop._cache = LoopCache(function)  # type: ignore[no-untyped-call]  # as its enable_caching() does with a FunctionCache
        except (RuntimeError, OSError) as error:  # no directory can be written
            _compiled_again(str(error))
        return loop

    return decorate


# Sums may be reordered so that they vectorise; NaN and infinity behave as IEEE says.
compiled = _loop(fastmath={"reassoc", "contract", "arcp", "nsz"})
# These loops search for maxima, which vectorise only if no number is NaN or infinite: `cpu.select` checks that first.
compiled_for_numbers = _loop(fastmath=True)


@compiled
def norms_and_errors(rows, bits, shift, start, stop, norm, error):
    """`max(‖row‖, ‖rounded row‖)` and `‖row − rounded row‖`; `bits` are those of the rounded rows."""
    wide_bits = np.empty(rows.shape[1], np.uint32)
    rounded = wide_bits.view(np.float32)
    for j in range(start, stop):
        square, rounded_square, error_square = np.float32(0), np.float32(0), np.float32(0)
        for d in range(rows.shape[1]):
            wide_bits[d] = np.uint32(bits[j, d]) << shift
        for d in range(rows.shape[1]):
            difference = rows[j, d] - rounded[d]
            square += rows[j, d] * rows[j, d]
            rounded_square += rounded[d] * rounded[d]
            error_square += difference * difference
        norm[j], error[j] = np.sqrt(max(square, rounded_square)), np.sqrt(error_square)


@compiled_for_numbers
def choose(
    bits,
    x_norm,
    margin,
    base,
    doubt,
    rounding,
    shift,
    x,
    W,
    bias,
    threshold,
    k,
    first,
    start,
    stop,
    features,
    values,
    counts,
):
    """Selects in rows start … stop − 1 of one screened block, whose row 0 is row `first` of x.

    For each feature, the exact value minus its threshold is in [sure, reach] = screened + base ± slack.
    """
    n_groups, space = len(margin) // GROUP, features.shape[1]
    group_sure = np.empty(n_groups, np.float32)
    wide_bits = np.empty(len(margin), np.uint32)
    screened = wide_bits.view(np.float32)
    sure, reach = np.empty(len(margin), np.float32), np.empty(len(margin), np.float32)
    exact = np.empty(len(margin), np.float32)
    candidates = np.empty(len(margin), np.int32)
    for i in range(start, stop):
        row = first + i
        norm = x_norm[row]
        for feature in range(len(margin)):
            wide_bits[feature] = np.uint32(bits[i, feature]) << shift
        # A group's features are n_groups apart, so that the maxima of neighbouring groups vectorise.
        group_sure[:] = LEAST
        for member in range(GROUP):
            for group in range(n_groups):
                feature = member * n_groups + group
                slack = norm * margin[feature] + rounding * abs(screened[feature]) + doubt[feature]
                value = screened[feature] + base[feature]
                reach[feature] = value + slack
                group_sure[group] = max(group_sure[group], value - slack)
        # At least k features surely reach `bar`. The bar from groups is lower than that from features but cheap, and
        # leaves few features for the second, closer one.
        bar = floor_of_kth(group_sure, k) if k else np.float32(0)
        possible = 0
        for feature in range(len(margin)):
            if reach[feature] >= bar:
                candidates[possible] = feature
                reach[possible] = reach[feature]
                sure[possible] = screened[feature] + base[feature]
                sure[possible] -= norm * margin[feature] + rounding * abs(screened[feature]) + doubt[feature]
                possible += 1
        if 0 < k <= possible:
            bar = max(bar, floor_of_kth(sure[:possible], k))
        kept = 0
        for n in range(possible):
            candidates[kept] = candidates[n]
            kept += reach[n] >= bar
        for n in range(kept):  # no branch between the products: the next row is fetched while this one is summed
            feature = candidates[n]
            dot = np.float32(0)
            for d in range(x.shape[1]):
                dot += x[row, d] * W[feature, d]
            exact[n] = dot + bias[feature]
        found = 0
        for n in range(kept):
            candidates[found], exact[found] = candidates[n], exact[n]
            found += exact[n] > threshold[candidates[n]]
        if k and found > k:
            found = keep_largest(candidates, exact, found, k, sure)
        counts[row] = found
        for n in range(min(found, space)):
            features[row, n], values[row, n] = candidates[n], exact[n]


@compiled_for_numbers
def floor_of_kth(values, k):
    """A number ≥ 0 that at least k values reach, close below the k-th largest; 0 if fewer than k are positive."""
    low, high = np.float32(0), np.float32(0)
    for n in range(len(values)):
        high = values[n] if values[n] > high else high
    for _ in range(10):
        middle = (low + high) * np.float32(0.5)
        reached = np.int32(0)
        for n in range(len(values)):
            reached += np.int32(values[n] >= middle)
        if reached >= k:
            low = middle
        else:
            high = middle
    return low


@compiled_for_numbers
def keep_largest(candidates, exact, found, k, scratch):
    """Moves the k largest to the front, in their order; among equal values the lowest features are kept."""
    scratch[:found] = exact[:found]
    kth = kth_largest(scratch, found, k)
    ties = k
    for n in range(found):
        ties -= exact[n] > kth
    kept = 0
    for n in range(found):
        tie = exact[n] == kth
        if exact[n] > kth or (tie and ties > 0):
            ties -= tie
            candidates[kept], exact[kept] = candidates[n], exact[n]
            kept += 1
    return kept


@compiled_for_numbers
def kth_largest(values, n, k):
    """The k-th largest of values[:n], by Hoare's quickselect, which reorders them."""
    left, right, place = 0, n - 1, k - 1
    while left < right:
        pivot = values[(left + right) // 2]
        i, j = left, right
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if place <= j:
            right = j
        elif place >= i:
            left = i
        else:
            break
    return values[place]


@compiled
def compact(features, values, offsets, start, stop, flat_features, flat_values):
    """Copies the entries of each row, which have space for more, to one flat array."""
    for row in range(start, stop):
        for n in range(offsets[row + 1] - offsets[row]):
            flat_features[offsets[row] + n] = features[row, n]
            flat_values[offsets[row] + n] = values[row, n]


@compiled
def dots(a, b, features, offsets, start, stop, out):
    """`out[entry] = a[row] · b[feature]`."""
    for row in range(start, stop):
        for entry in range(offsets[row], offsets[row + 1]):
            feature = features[entry]
            dot = np.float32(0)
            for d in range(a.shape[1]):
                dot += a[row, d] * b[feature, d]
            out[entry] = dot


@compiled
def combine(values, features, offsets, b, out, start, stop):
    """`out[row] = Σ values · b[feature]` over the row's entries."""
    for row in range(start, stop):
        out[row] = np.float32(0)
        for entry in range(offsets[row], offsets[row + 1]):
            feature, value = features[entry], values[entry]
            for d in range(b.shape[1]):
                out[row, d] += value * b[feature, d]


@compiled
def add_by_feature(values, entries, rows, offsets, a, out, start, stop):
    """`out[feature] += Σ values · a[row]` over the feature's entries."""
    for feature in range(start, stop):
        for n in range(offsets[feature], offsets[feature + 1]):
            value, row = values[entries[n]], rows[n]
            for d in range(a.shape[1]):
                out[feature, d] += value * a[row, d]


@compiled
def transpose(features, offsets, entries, rows, by_feature):
    """The entries sorted by feature: counts per feature, then their cumulative sum, then one pass over the entries."""
    for entry in range(len(features)):
        by_feature[features[entry] + 1] += 1
    for feature in range(len(by_feature) - 1):
        by_feature[feature + 1] += by_feature[feature]
    cursor = by_feature[:-1].copy()
    for row in range(len(offsets) - 1):
        for entry in range(offsets[row], offsets[row + 1]):
            place = cursor[features[entry]]
            cursor[features[entry]] = place + 1
            entries[place], rows[place] = entry, row


@compiled
def adam(p, g, m, v, rate, beta1, rest1, beta2, rest2, eps, correction, unit_rows, start, stop):
    """`reference.adam_` for rows start … stop − 1; `rate` and `correction` include the bias corrections."""
    for row in range(start, stop):
        along = np.float32(0)
        if unit_rows:
            for d in range(p.shape[1]):
                along += g[row, d] * p[row, d]
        square = np.float32(0)
        for d in range(p.shape[1]):
            gradient = g[row, d] - along * p[row, d]
            m[row, d] = beta1 * m[row, d] + rest1 * gradient
            v[row, d] = beta2 * v[row, d] + rest2 * gradient * gradient
            p[row, d] -= rate * m[row, d] / (np.sqrt(v[row, d]) * correction + eps)
            square += p[row, d] * p[row, d]
        if unit_rows:
            scale = np.float32(1) / max(np.sqrt(square), np.float32(1e-12))
            for d in range(p.shape[1]):
                p[row, d] *= scale
