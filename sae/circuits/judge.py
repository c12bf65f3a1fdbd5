"""Knock-outs, and the judgement of a circuit: is it faithful, complete and minimal?

A circuit is a set of heads. All other heads are knocked out: their output is replaced by its mean over the corrupt
prompts at the same position. F(C) is the mean logit difference with circuit C, M all heads.
Source: Wang et al. 2022, arXiv 2211.00593, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sae.circuits.intervals import mean_interval, numbers, ratio_of_means
from sae.circuits.patching import Runs
from sae.circuits.results import Control, Measure
from sae.circuits.sites import Site
from sae.lm import Splice

Circuit = frozenset[int]  # of the numbers of heads
RANDOM_CIRCUITS = 10
SUBSETS = 10  # of a circuit, drawn for completeness
SIZE_WORDS = "heads, chosen at random; mean over 10 draws"


@dataclass(eq=False)
class Knockouts:
    """F(C): logit differences of a task's clean prompts with only the heads in C; each is computed once."""

    runs: Runs
    heads: Sequence[Site]
    known: dict[Circuit, Float[Tensor, " prompt"]] = field(default_factory=dict)

    @property
    def all(self) -> Circuit:
        return frozenset(range(len(self.heads)))

    def __call__(self, circuit: Iterable[int]) -> Float[Tensor, " prompt"]:
        chosen = frozenset(circuit)
        if chosen not in self.known:
            self.known[chosen] = self.runs.ld("breaking", self._splices(chosen)).double()
        return self.known[chosen]

    def mean(self, circuit: Iterable[int]) -> float:
        return float(self(circuit).mean())

    def _splices(self, kept: Circuit) -> dict[str, Splice]:
        gone: dict[str, list[slice]] = {}
        for number, site in enumerate(self.heads):
            if number not in kept:
                assert site.columns is not None
                gone.setdefault(site.hook_point, []).append(site.columns)
        return {name: _knocked_out(columns, self.runs.corrupt[name].mean(0)) for name, columns in gone.items()}


def _knocked_out(columns: Sequence[slice], mean: Float[Tensor, "pos d_in"]) -> Splice:
    def splice(x: Float[Tensor, "prompt pos d_in"]) -> Float[Tensor, "prompt pos d_in"]:
        found = x.clone()
        for part in columns:
            found[..., part] = mean[:, part].to(x)
        return found

    return splice


def greedy_circuits(knockouts: Knockouts) -> list[Circuit]:
    """Circuits of every size from all heads down to none; each leaves out the head whose loss changes F least."""
    whole = knockouts.mean(knockouts.all)
    found = [knockouts.all]
    while found[-1]:
        smaller = [found[-1] - {head} for head in sorted(found[-1])]
        found.append(min(smaller, key=lambda circuit: abs(whole - knockouts.mean(circuit))))
    return found


def smallest_faithful(knockouts: Knockouts, circuits: Iterable[Circuit], share: float) -> Circuit:
    """The smallest of the circuits with |F(M) − F(C)| ≤ (1 − share) · |F(M)|."""
    whole = knockouts.mean(knockouts.all)
    good = [c for c in circuits if abs(whole - knockouts.mean(c)) <= (1 - share) * abs(whole)]
    return min(good, key=len)


def judge(knockouts: Knockouts, circuit: Circuit, *, seed: int = 0) -> dict[str, Measure]:
    """The three criteria, each beside random circuits of equal size.

    faithfulness: F(C) / F(M), near 1. completeness: the largest |F(C∖K) − F(M∖K)| / |F(M)| over subsets K of C (single
    heads, all of C, random ones), small: what is not in C cannot take over. minimality: the smallest, over heads v of
    C, of the largest |F(C∖(K ∪ {v})) − F(C∖K)| / |F(M)| over those K, not near 0: each head matters somewhere.
    """
    generator = torch.Generator().manual_seed(seed)
    whole, n = knockouts(knockouts.all), len(knockouts.runs.task)
    others = [_draw(knockouts, len(circuit), generator) for _ in range(RANDOM_CIRCUITS)]
    value, interval = ratio_of_means(knockouts(circuit), whole)
    random_f = torch.stack([knockouts(each) for each in others]).mean(0)
    control, control_interval = ratio_of_means(random_f, whole)
    what = f"{len(circuit)} {SIZE_WORDS}"
    measures = {
        "faithfulness": Measure(
            float(value),
            n,
            "prompts",
            "F(C) / F(M), F the mean logit difference with all heads outside C at their mean over corrupt prompts",
            {"random_circuits": Control(float(control), what, numbers(control_interval))},
            numbers(interval),
        )
    }
    criteria: dict[str, tuple[Callable[[Knockouts, Circuit, torch.Generator], float], str]] = {
        "incompleteness": (incompleteness, "max over K ⊆ C of |F(C∖K) − F(M∖K)| / |F(M)|"),
        "minimality": (minimality, "min over v ∈ C of max over K of |F(C∖(K∪{v})) − F(C∖K)| / |F(M)|"),
    }
    for name, (criterion, formula) in criteria.items():
        of_random = torch.tensor([criterion(knockouts, each, generator) for each in others], dtype=torch.float64)
        measures[name] = Measure(
            criterion(knockouts, circuit, generator),
            n,
            "prompts",
            f"{formula}; K single heads, all of C and {SUBSETS} random subsets",
            {"random_circuits": Control(float(of_random.mean()), what, numbers(mean_interval(of_random)))},
        )
    return measures


def by_size(knockouts: Knockouts, circuits: Sequence[Circuit], *, seed: int = 0) -> Measure:
    """F(C) / F(M) of greedy circuits by their number of heads, beside random circuits of that size."""
    generator, whole = torch.Generator().manual_seed(seed), knockouts(knockouts.all)
    ordered = sorted(circuits, key=len)
    value, interval = ratio_of_means(torch.stack([knockouts(c) for c in ordered], -1), whole)
    random = [
        torch.stack([knockouts(_draw(knockouts, len(c), generator)) for _ in range(RANDOM_CIRCUITS)]).mean(0)
        for c in ordered
    ]
    control, control_interval = ratio_of_means(torch.stack(random, -1), whole)
    return Measure(
        value,
        len(knockouts.runs.task),
        "prompts",
        "F(C) / F(M) of the circuit of so many heads that greedy removal leaves",
        {"random_circuits": Control(control, f"as many {SIZE_WORDS}", control_interval)},
        interval,
        ("heads",),
    )


def incompleteness(knockouts: Knockouts, circuit: Circuit, generator: torch.Generator) -> float:
    """max over K of |F(C∖K) − F(M∖K)| / |F(M)|."""
    whole = knockouts.all
    gaps = [
        abs(knockouts.mean(circuit - k) - knockouts.mean(whole - k)) for k in _subsets(circuit, generator, and_all=True)
    ]
    return max(gaps) / abs(knockouts.mean(whole))


def minimality(knockouts: Knockouts, circuit: Circuit, generator: torch.Generator) -> float:
    """min over v of max over K of |F(C∖(K ∪ {v})) − F(C∖K)| / |F(M)|."""
    if not circuit:
        return 0.0
    subsets = _subsets(circuit, generator)
    effects = [
        max(abs(knockouts.mean(circuit - k - {v}) - knockouts.mean(circuit - k)) for k in subsets) for v in circuit
    ]
    return min(effects) / abs(knockouts.mean(knockouts.all))


def _subsets(circuit: Circuit, generator: torch.Generator, *, and_all: bool = False) -> list[Circuit]:
    """The empty set, single heads, random subsets, and perhaps the whole circuit."""
    heads = sorted(circuit)
    random = [frozenset(h for h in heads if float(torch.rand((), generator=generator)) < 0.5) for _ in range(SUBSETS)]
    return [frozenset(), *(frozenset({h}) for h in heads), *random, *([circuit] if and_all else [])]


def _draw(knockouts: Knockouts, size: int, generator: torch.Generator) -> Circuit:
    return frozenset(torch.randperm(len(knockouts.heads), generator=generator)[:size].tolist())
