"""Which entries are among the largest of a row or of a batch, where each shard sees its own features only.

Exact: the same entries as if one process saw all features. Among equal values the first are kept, in the order of
ranks and then of a rank's own entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.kernels.activations import DenseActs, FeatureActs, SparseActs
from sae.kernels.sparsity import Support
from sae.parallel.cost import ROW_DIGIT_BITS, counts_are_fewer, first_candidates
from sae.parallel.mesh import Mesh

DIGIT_BITS = 11  # of a value's bits, counted at once: 3 rounds of 2,048 counts for float32
AS_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def largest_of_rows(mesh: Mesh, support: Support, values: Float[Tensor, " nnz"], k: int) -> Bool[Tensor, " nnz"]:
    """Of this shard's entries, at most k a row, those among the k largest positive ones of the row on all shards."""
    places = torch.arange(len(values), device=values.device) - support.offsets[support.rows]
    candidates = values.new_zeros((support.n_rows, k))
    candidates[support.rows, places] = values.detach()
    return kept_candidates(mesh, candidates)[support.rows, places]


def kept_candidates(mesh: Mesh, own: Float[Tensor, "rows k"]) -> Bool[Tensor, "rows k"]:
    """Of this shard's k candidates a row, those among the k largest positive ones of the row on all shards.

    On many shards each sends its largest `first_candidates`. If the last of a shard is as large as the smallest that
    would be kept, those that it did not send may be as well: such rows, which all shards see alike, send all k.
    Where k is large, as for AuxK, counts are exchanged instead (`kept_by_counts`).
    """
    k, few = own.shape[1], first_candidates(own.shape[1], mesh.shards)
    if counts_are_fewer(k, mesh.shards, own.element_size()):
        return kept_by_counts(mesh, own, k)
    if few == k:
        return _of_shard(mesh, among_largest(_everyones(mesh, own), k), k)
    ranked, order = own.sort(dim=-1, descending=True, stable=True)  # stable: of equal ones the first come first
    sent = _everyones(mesh, ranked[:, :few])
    kept = torch.nn.functional.pad(_of_shard(mesh, among_largest(sent, k), few), (0, k - few))
    bar, last = sent.topk(k, dim=-1).values[:, -1:], sent[:, few - 1 :: few]
    short = ((last >= bar) & (last > 0)).any(-1)
    if short.any():
        kept[short] = _of_shard(mesh, among_largest(_everyones(mesh, ranked[short]), k), k)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def kept_by_counts(mesh: Mesh, own: Float[Tensor, "rows n"], k: int) -> Bool[Tensor, "rows n"]:
    """`kept_candidates` without the candidates: each row's smallest kept value is found digit by digit from counts.

    The bits of positive floats are in the order of the floats.
    """
    bits = own.detach().contiguous().view(AS_BITS[own.dtype]).long()
    positive = own > 0
    among, bar = positive, bits.new_zeros((len(own), 1))
    room = torch.full_like(bar, k)
    for shift in reversed(range(0, 8 * own.element_size(), ROW_DIGIT_BITS)):
        digits = (bits >> shift) & ((1 << ROW_DIGIT_BITS) - 1)
        counts = digits.new_zeros((len(own), 1 << ROW_DIGIT_BITS), dtype=torch.int32)
        counts = mesh.reduce(counts.scatter_add_(1, digits, among.int()), "sum", "features").long()
        from_top = counts.flip(1).cumsum(1)
        place = (from_top < room).sum(1, keepdim=True).clamp(max=counts.shape[1] - 1)  # the last if all are wanted
        digit = counts.shape[1] - 1 - place
        room = room - from_top.gather(1, place) + counts.gather(1, digit)
        bar, among = (bar << ROW_DIGIT_BITS) | digit, among & (digits == digit)
    before = mesh.stack(among.sum(1, keepdim=True), "features")[: mesh.shard].sum(0)
    return (positive & (bits > bar)) | (among & (among.cumsum(1) <= room - before))


def _everyones(mesh: Mesh, own: Float[Tensor, "rows n"]) -> Float[Tensor, "rows all"]:
    """The candidates of all shards, one shard's after another's."""
    return mesh.stack(own, "features").transpose(0, 1).flatten(1)


def _of_shard(mesh: Mesh, kept: Bool[Tensor, "rows all"], n: int) -> Bool[Tensor, "rows n"]:
    return kept[:, mesh.shard * n : (mesh.shard + 1) * n]


@overload
def largest_acts(mesh: Mesh, acts: DenseActs, k: int) -> DenseActs: ...


@overload
def largest_acts(mesh: Mesh, acts: FeatureActs, k: int) -> FeatureActs: ...


def largest_acts(mesh: Mesh, acts: FeatureActs, k: int) -> FeatureActs:
    """Only those activations of this shard that are among the k largest of their row on all shards."""
    if isinstance(acts, SparseActs):
        if mesh.shards == 1:
            return acts.largest_of_rows(k)
        mine = acts.largest_of_rows(k)
        return mine.where(largest_of_rows(mesh, mine.support, mine.values, k))
    if mesh.shards == 1:
        return acts.largest_of_rows(k) if k < acts.values.shape[1] else acts
    return DenseActs(acts.values * largest_in_rows(mesh, acts.values, k))


def largest_in_rows(mesh: Mesh, values: Float[Tensor, "rows own"], k: int) -> Bool[Tensor, "rows own"]:
    """`largest_of_rows` for the values of all features of this shard."""
    n = min(k, values.shape[1])
    own = values.detach().topk(n, dim=-1)
    kept = kept_candidates(mesh, torch.nn.functional.pad(own.values, (0, k - n)))[:, :n]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, own.indices, kept)


def among_largest(values: Float[Tensor, "rows n"], k: int) -> Bool[Tensor, "rows n"]:
    """True for the k largest positive values of each row; among equal ones for the first."""
    if values.shape[1] <= k:
        return values > 0
    bar = values.topk(k, dim=-1).values[:, -1:]
    above, equal = values > bar, values == bar
    room = k - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))) & (values > 0)


def largest_of_batch(mesh: Mesh, values: Float[Tensor, " n"], wanted: int) -> Bool[Tensor, " n"]:
    """Of this rank's values, those among the `wanted` largest positive ones of all ranks.

    Exchanges counts: the bits of positive floats are in the order of the floats, so the smallest kept value is found
    digit by digit.
    """
    bits = values.detach().contiguous().view(AS_BITS[values.dtype])
    positive = values > 0
    rounds = -(-8 * values.element_size() // DIGIT_BITS)
    bar, room = smallest_kept(bits[positive].long(), wanted, lambda counts: mesh.reduce(counts, "sum", "world"), rounds)
    kept = positive & (bits > bar)
    equal = (positive & (bits == bar)).nonzero().squeeze(-1)
    before = mesh.stack(torch.tensor(len(equal), device=values.device), "world")[: mesh.rank].sum()
    kept[equal[: max(0, room - int(before))]] = True
    return kept


def largest_values(mesh: Mesh, values: Float[Tensor, "rows own"], k: int) -> Float[Tensor, "rows k"]:
    """The k largest values of each row over all shards, at least 0 on more than one."""
    if mesh.shards == 1:
        return values.topk(k, dim=-1).values
    n = min(k, values.shape[1])
    own = torch.nn.functional.pad(values.topk(n, dim=-1).values.relu(), (0, k - n))
    return mesh.stack(own, "features").transpose(0, 1).flatten(1).topk(k, dim=-1).values


def kth_largest(mesh: Mesh, values: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
    """The k-th largest of the positive values of all shards, of which there are k or more."""
    if mesh.shards == 1:
        return values.topk(k, sorted=False).values.amin()
    bits = values.view(AS_BITS[values.dtype])
    rounds = -(-8 * values.element_size() // DIGIT_BITS)
    bar, _ = smallest_kept(bits.long(), k, lambda counts: mesh.reduce(counts, "sum", "features"), rounds)
    if not bar:  # there are exactly k
        return mesh.reduce(values.amin() if len(values) else values.new_tensor(torch.inf), "min", "features")
    return bits.new_tensor([bar]).view(values.dtype)[0]


def smallest_kept(
    bits: Int[Tensor, " n"], wanted: int, over_ranks: Callable[[Tensor], Tensor], rounds: int
) -> tuple[int, int]:
    """The `wanted`-th largest of the non-negative integers of all ranks, and how many equal to it are wanted.

    (0, 0) if there are no more than `wanted`. `over_ranks` sums counts over the ranks; integers have at most `rounds`
    digits.
    """
    bar, room = 0, wanted
    for place_of_digit in reversed(range(rounds)):
        shift = DIGIT_BITS * place_of_digit
        digits = (bits >> shift) & ((1 << DIGIT_BITS) - 1)
        counts = over_ranks(torch.bincount(digits, minlength=1 << DIGIT_BITS)).cpu()
        from_top = counts.flip(0).cumsum(0)
        if place_of_digit == rounds - 1 and from_top[-1] <= wanted:
            return 0, 0
        place = int(torch.searchsorted(from_top, room))
        digit = len(counts) - 1 - place
        room -= int(from_top[place] - counts[digit])
        bar = (bar << DIGIT_BITS) | digit
        bits = bits[digits == digit]
    return bar, room
