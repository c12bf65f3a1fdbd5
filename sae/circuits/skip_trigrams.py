"""Skip-trigrams `source … destination → out` of a head that reads embeddings, and whether text has them.

A head's OV and QK circuits factor through the source, so that every good pair of a source is combined with every
other: where text wants `A … B → C` and `A … D → E`, the head also raises `A … B → E`.
Source: Elhage et al. 2021, "Skip-trigrams" and "Skip-trigram bugs".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.circuits.weights import Circuits


class SkipTrigrams(NamedTuple):
    """Token places (in the circuits' rows) of `source … destination → out`, the highest scores first."""

    source: Int[Tensor, " n"]
    destination: Int[Tensor, " n"]
    out: Int[Tensor, " n"]
    score: Float[Tensor, " n"]


def skip_trigrams(circuits: Circuits, n: int, *, among: Int[Tensor, " k"] | None = None) -> SkipTrigrams:
    """The n skip-trigrams with the highest `QK[dst, src] · OV[src, out]`, both positive.

    QK is centred over sources, because a softmax over them ignores what is common to all; OV over outputs, likewise.
    `among` restricts all three tokens, to those that are frequent for example.
    """
    among = torch.arange(len(circuits.read_Q)) if among is None else among
    QK = circuits.read_Q[among] @ (circuits.read_K[among] - circuits.read_K[among].mean(0)).T
    OV = circuits.read_V[among] @ circuits.write_U[:, among]
    OV = OV - OV.mean(1, keepdim=True)
    each = min(n, len(among))  # the n best products of a source are among its n best factors
    attends, dst = QK.T.clamp_min(0).topk(each)
    raises, out = OV.clamp_min(0).topk(each)
    best = min(n, each * each)
    scores, places = [], []
    for a, b in zip(attends, raises, strict=True):
        found, place = (a[:, None] * b[None]).flatten().topk(best)
        scores.append(found)
        places.append(place)
    score, place = torch.stack(scores).flatten().topk(min(n, best * len(among)))
    kept = score > 0
    score, place = score[kept], place[kept]
    source = place // best
    pair = torch.stack(places)[source, place % best]
    dst, out = dst[source, pair // each], out[source, pair % each]
    return SkipTrigrams(among[source], among[dst], among[out], score)


class Lift(NamedTuple):
    """How much likelier `out` is after `destination` when `source` came earlier in the context: P(o|d,s) / P(o|d).

    `seen` counts destinations with the source before them, `hits` those of them that `out` follows; `expected` is
    `seen · P(o|d)`. The lift is `(hits + 1) / (expected + 1)`, so that rare trigrams stay near 1.
    """

    lift: Float[Tensor, " n"]
    hits: Int[Tensor, " n"]
    seen: Int[Tensor, " n"]
    expected: Float[Tensor, " n"]


def lift(trigrams: SkipTrigrams, tokens: Int[Tensor, "contexts pos"], ids: Int[Tensor, " token"]) -> Lift:
    """Counts each skip-trigram in contexts of a text; `ids` are the tokens of the circuits' rows.

    The source must come before the destination itself, anywhere in the context.
    """
    source, destination, out = (ids[part] for part in trigrams[:3])
    hits, seen, base = [], [], []
    before: dict[int, Bool[Tensor, "contexts pos"]] = {}
    at: dict[int, Bool[Tensor, "contexts pos"]] = {}
    here, after = tokens[:, :-1], tokens[:, 1:]
    for s, d, o in zip(source.tolist(), destination.tolist(), out.tolist(), strict=True):
        if s not in before:
            came = (here == s).cumsum(1) > 0
            before[s] = torch.cat([torch.zeros_like(came[:, :1]), came[:, :-1]], 1)
        if d not in at:
            at[d] = here == d
        both, followed = at[d] & before[s], after == o
        hits.append(int((both & followed).sum()))
        seen.append(int(both.sum()))
        base.append(int((at[d] & followed).sum()) / max(1, int(at[d].sum())))
    expected = torch.tensor(seen, dtype=torch.float64) * torch.tensor(base, dtype=torch.float64)
    ratio = (torch.tensor(hits) + 1) / (expected + 1)
    return Lift(ratio, torch.tensor(hits), torch.tensor(seen), expected)


def with_shuffled_destinations(trigrams: SkipTrigrams, *, seed: int = 0) -> SkipTrigrams:
    """The control: the same sources and outputs, each with the destination of another skip-trigram."""
    order = torch.randperm(len(trigrams.source), generator=torch.Generator().manual_seed(seed))
    return trigrams._replace(destination=trigrams.destination[order])


class ForcedPair(NamedTuple):
    """A source with two skip-trigrams that text supports, and the cross pair that the factors force with them."""

    source: int
    destination: int
    out: int
    score: float  # of the forced pair
    lift: float
    supported: tuple[tuple[int, int], tuple[int, int]]  # (destination, out), the two that text has


def forced_pairs(
    trigrams: SkipTrigrams, counted: Lift, *, supported: float = 2.0, unsupported: float = 1.0, least: float = 1.0
) -> list[ForcedPair]:
    """Skip-trigrams of the list that text does not support and that follow from two that it does: "bugs".

    `A … B → E` with lift ≤ `unsupported` and at least `least` expected occurrences, where `A … B → C` and `A … D → E`
    of the same list have lift ≥ `supported`. Best scores first.
    """
    good: dict[int, list[tuple[int, int]]] = {}
    rows = list(
        zip(*(part.tolist() for part in trigrams), counted.lift.tolist(), counted.expected.tolist(), strict=True)
    )
    for s, d, o, _, found, _ in rows:
        if found >= supported:
            good.setdefault(s, []).append((d, o))
    forced = []
    for s, d, o, score, found, expected in rows:
        if found > unsupported or expected < least:
            continue
        same_destination = [pair for pair in good.get(s, []) if pair[0] == d]
        same_out = [pair for pair in good.get(s, []) if pair[1] == o]
        if same_destination and same_out:
            forced.append(ForcedPair(s, d, o, score, found, (same_destination[0], same_out[0])))
    return forced
