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
SMALLEST = np.float32(2.0**-126)  # float32's smallest normal number
SMALLEST_RANGE = np.float32(1e-30)  # numbers of rows that are smaller are rounded as if this were their largest
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
def norms_and_errors(rows, bits, start, stop, norm, error):
    """`max(‖row‖, ‖rounded row‖)` and `‖row − rounded row‖`; `bits` are those of the rounded rows.

    Squares below float32's smallest normal number, 2⁻¹²⁶, may vanish: √d · 2⁻⁶³ covers what they take from a norm.
    """
    vanished = np.float32(np.sqrt(rows.shape[1]) * 2.0**-63)
    shift = np.uint32(32 - 8 * bits.itemsize)
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
        norm[j] = np.sqrt(max(square, rounded_square)) + vanished
        error[j] = np.sqrt(error_square) + vanished


@compiled
def round_to_int8(rows, numbers, unit, start, stop, norm, error):
    """`row ≈ unit · numbers`, `max(‖row‖, ‖unit · numbers‖)` and `‖row − unit · numbers‖`.

    The squares are of numbers in units, so that they neither overflow nor vanish, and SMALLEST covers what rounding in
    subnormal numbers may take from a norm.
    """
    row_bits = rows.view(np.uint32)
    largest_bits = np.empty(1, np.uint32)
    for j in range(start, stop):
        most = np.uint32(
            0
        )  # bits of positive numbers are in their order, NaN the largest, and maxima of integers vectorise
        for d in range(rows.shape[1]):
            most = max(most, row_bits[j, d] & np.uint32(0x7FFFFFFF))
        largest_bits[0] = most
        largest = largest_bits.view(np.float32)[0]
        largest = SMALLEST_RANGE if largest < SMALLEST_RANGE else largest
        per_unit = np.float32(127) / largest
        square, rounded_square, error_square = np.float32(0), np.float32(0), np.float32(0)
        for d in range(rows.shape[1]):
            scaled = rows[j, d] * per_unit
            number = np.int32(scaled + (np.float32(0.5) if scaled >= 0 else np.float32(-0.5)))
            numbers[j, d] = number
            rounded = np.float32(number)
            square += scaled * scaled
            rounded_square += rounded * rounded
            error_square += (scaled - rounded) * (scaled - rounded)
        unit[j] = largest / np.float32(127)
        norm[j] = unit[j] * np.sqrt(max(square, rounded_square)) + SMALLEST
        error[j] = unit[j] * np.sqrt(error_square) + SMALLEST


@compiled_for_numbers
def choose(
    product,
    x_unit,
    unit,
    x_norm,
    x_error,
    norm,
    margin,
    base,
    doubt,
    rounding,
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
    tried,
):
    """Selects in rows start … stop − 1 of one screened block, whose row 0 is row `first` of x.

    For each feature, the exact value minus its threshold is in [sure, reach] = screened + base ± slack. With k, all
    thresholds are zero. `tried` counts the exact products of each row.
    """
    n_features, space = len(margin), features.shape[1]
    n_groups = n_features // GROUP
    group_sure = np.empty(n_groups, np.float32)
    bits = np.empty(n_features, np.uint32)
    screened = bits.view(np.float32)
    scratch, reach = np.empty(n_features, np.float32), np.empty(n_features, np.float32)
    guess, exact = np.empty(n_features, np.float32), np.empty(n_features, np.float32)
    candidates, waiting = np.empty(n_features, np.int32), np.empty(n_features, np.int32)
    for i in range(start, stop):
        row = first + i
        row_norm, row_error = x_norm[row], x_error[row]
        if unit is None:
            shift = np.uint32(32 - 8 * product.itemsize)
            for feature in range(n_features):
                bits[feature] = np.uint32(product[i, feature]) << shift
        else:
            for feature in range(n_features):
                screened[feature] = np.float32(product[i, feature]) * unit[feature] * x_unit[row]
        # A group's features are n_groups apart, so that the maxima of neighbouring groups vectorise.
        group_sure[:] = LEAST
        for member in range(GROUP):
            for group in range(n_groups):
                feature = member * n_groups + group
                slack = row_norm * margin[feature] + rounding * abs(screened[feature]) + doubt[feature]
                if unit is not None:  # one array less to read for the other formats, which have it in margin
                    slack += row_error * norm[feature]
                value = screened[feature] + base[feature]
                reach[feature] = value + slack
                group_sure[group] = max(group_sure[group], value - slack)
        # At least k features surely reach `bar`. The bar from groups is lower than that from features but cheap, and
        # leaves few features for the closer ones.
        bar = floor_of_kth(group_sure, k) if k else np.float32(0)
        possible = 0
        for feature in range(n_features):
            if reach[feature] >= bar:
                candidates[possible] = feature
                possible += 1
        for n in range(possible):
            feature = candidates[n]
            guess[n] = screened[feature] + base[feature]
            reach[n] = reach[feature]  # n ≤ feature: what is overwritten has been read
            scratch[n] = guess[n] - (reach[n] - guess[n])
        if 0 < k <= possible:
            bar = max(bar, floor_of_kth(scratch[:possible], k))
        kept = 0
        for n in range(possible):
            candidates[kept], guess[kept], reach[kept] = candidates[n], guess[n], reach[n]
            kept += reach[n] >= bar
        # The exact values of the k largest guesses are a bar without slack; what cannot reach it needs no product.
        # Only int8 leaves so many candidates that this saves more than it costs.
        first_guess = LEAST
        if unit is not None and 0 < k < kept:
            scratch[:kept] = guess[:kept]
            first_guess = kth_largest(scratch, kept, k)
        n_waiting = 0
        for n in range(kept):
            waiting[n_waiting] = n
            n_waiting += guess[n] >= first_guess
        exact_values(x, row, W, bias, candidates, waiting, n_waiting, exact)
        tried[row] = n_waiting
        if unit is not None and 0 < k < kept:
            lowest = exact[waiting[0]]
            for n in range(n_waiting):
                lowest = min(lowest, exact[waiting[n]])
            bar = max(bar, lowest)
            still = 0
            for n in range(kept):
                candidates[still], guess[still], reach[still] = candidates[n], guess[n], reach[n]
                exact[still] = exact[n]
                still += (reach[n] >= bar) | (guess[n] >= first_guess)
            kept = still
            n_waiting = 0
            for n in range(kept):
                waiting[n_waiting] = n
                n_waiting += guess[n] < first_guess
            exact_values(x, row, W, bias, candidates, waiting, n_waiting, exact)
            tried[row] += n_waiting
        found = 0
        for n in range(kept):
            candidates[found], exact[found] = candidates[n], exact[n]
            found += exact[n] > threshold[candidates[n]]
        if k and found > k:
            found = keep_largest(candidates, exact, found, k, scratch)
        counts[row] = found
        for n in range(min(found, space)):
            features[row, n], values[row, n] = candidates[n], exact[n]


@compiled_for_numbers
def exact_values(x, row, W, bias, candidates, waiting, n_waiting, exact):
    """`exact[n] = x[row] · W[candidates[n]] + bias` for each n in `waiting`.

    No branch stands between the products: the next row is fetched while this one is summed.
    """
    for m in range(n_waiting):
        n = waiting[m]
        feature = candidates[n]
        dot = np.float32(0)
        for d in range(x.shape[1]):
            dot += x[row, d] * W[feature, d]
        exact[n] = dot + bias[feature]


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
