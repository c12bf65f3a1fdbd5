"""What erasing a concept costs: probes and losses after LEACE, a random subspace of equal rank, and the best features.

The concept is a domain of the text: its tokens against all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.analysis.probing import balanced_rows, fit_probe
from sae.circuits.erasure import Eraser, leace, random_eraser
from sae.circuits.intervals import Z, numbers, ratio_of_means
from sae.circuits.results import Control, Measure
from sae.circuits.text import Contexts
from sae.dictionary.autoencoder import SAE
from sae.lm import LanguageModel, Splice

KS = (1, 10, 50)  # features that are set to 0
PROBE_ROWS = 4000  # of the concept, and as many others
LEAST_ROWS = 200  # of the concept, at least


class ConceptError(ValueError):
    """A concept that the text does not have; the message says which it has."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Kept rows of a text: activations, and whether each is of the concept."""

    x: Float[Tensor, "row d_in"]
    inside: Bool[Tensor, " row"]


def erase(
    model: LanguageModel,
    hook_point: str,
    concept: str,
    train: Contexts,
    held_out: Contexts,
    *,
    sae: SAE | None = None,
    seed: int = 0,
) -> tuple[dict[str, Measure], Eraser]:
    """Probe accuracy and loss after erasing the concept at `hook_point`; the edits are fitted on training text.

    Raises: ConceptError if the text has no such domain, or too little of it; ErasureError without concept-erasure.
    """
    fitted, tested = (_rows(model, hook_point, concept, contexts) for contexts in (train, held_out))
    eraser = leace(fitted.x, fitted.inside.long(), 2)
    edits: dict[str, Splice] = {"leace": eraser, "random_subspace": random_eraser(fitted.x, eraser.rank, seed=seed)}
    what = {"random_subspace": f"a random subspace of the same rank ({eraser.rank}) is removed"}
    if sae is not None:
        best = _best_features(sae, fitted)
        for k in (k for k in KS if k <= sae.d_sae):
            edits[f"features_{k}"] = _without(sae, best[:k])
            what[f"features_{k}"] = f"the {k} features that differ most between the concept and the rest are set to 0"
    measures = {"probe_accuracy": _probe(edits, what, fitted, tested, seed)}
    measures |= _losses(model, hook_point, concept, held_out, edits, what)
    return measures, eraser


def _rows(model: LanguageModel, hook_point: str, concept: str, contexts: Contexts) -> Rows:
    if concept not in contexts.domains:
        known = ", ".join(sorted(contexts.domains))
        raise ConceptError(f"the text has no domain {concept!r}; it has {known}. A concept is a domain of the text.")
    parts = [model.capture(part, hook_point).cpu() for part in torch.split(contexts.tokens, 8)]
    inside = (contexts.domain == contexts.domains.index(concept))[contexts.keep]
    if min(int(inside.sum()), int((~inside).sum())) < LEAST_ROWS:
        raise ConceptError(
            f"{int(inside.sum()):,} of {len(inside):,} tokens are of the domain {concept!r}; erasure needs at least "
            f"{LEAST_ROWS} of it and of the others. Read more text with --n."
        )
    return Rows(torch.cat(parts)[contexts.keep].clone(), inside)


def _best_features(sae: SAE, rows: Rows) -> list[int]:
    """By |mean inside − mean outside| / standard deviation, largest first."""
    acts = torch.cat([sae.encode(part).double() for part in torch.split(rows.x, 4096)])
    difference = acts[rows.inside].mean(0) - acts[~rows.inside].mean(0)
    score = difference.abs() / acts.std(0).clamp_min(1e-9)
    return [int(i) for i in score.argsort(descending=True)]


def _without(sae: SAE, features: list[int]) -> Splice:
    chosen = torch.tensor(features)

    def splice(x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        removed: Tensor = sae.encode(x)[..., chosen] @ sae.W_dec[chosen]
        return x - removed

    return splice


def _probe(edits: Mapping[str, Splice], what: Mapping[str, str], train: Rows, test: Rows, seed: int) -> Measure:
    """Held-out accuracy of a probe that is trained anew after each edit."""
    rng = np.random.default_rng(seed)
    chosen, asked = (balanced_rows(rows.inside.numpy(), PROBE_ROWS, rng) for rows in (train, test))

    def accuracy(edit: Splice) -> float:
        x, x_test = (edit(rows.x[index]).double().numpy() for rows, index in ((train, chosen), (test, asked)))
        scale = np.maximum(x.std(0), 1e-6)
        probe = fit_probe((x - x.mean(0)) / scale, train.inside.numpy()[chosen])
        return float(probe.score((x_test - x.mean(0)) / scale, test.inside.numpy()[asked]))

    def interval(share: float) -> tuple[float, float]:
        half = Z * (share * (1 - share) / len(asked)) ** 0.5
        return share - half, share + half

    found = {name: accuracy(edit) for name, edit in {**edits, "before": lambda x: x}.items()}
    meanings = {**what, "before": "nothing is erased"}
    return Measure(
        found["leace"],
        len(asked),
        "held-out tokens",
        "accuracy of a logistic regression trained after LEACE, the concept against as many other tokens (chance 0.5)",
        {name: Control(found[name], meanings[name], interval(found[name])) for name in meanings},
        interval(found["leace"]),
    )


@torch.no_grad()
def _losses(
    model: LanguageModel,
    hook_point: str,
    concept: str,
    held_out: Contexts,
    edits: Mapping[str, Splice],
    what: Mapping[str, str],
) -> dict[str, Measure]:
    """Δ cross-entropy of each edit, where the next token is of the concept and where it is of another domain."""
    of_concept = held_out.domain[:, 1:] == held_out.domains.index(concept)
    counted = held_out.predicted[:, :-1]
    clean = _token_losses(model, held_out, hook_point, None)
    change = {name: _token_losses(model, held_out, hook_point, edit) - clean for name, edit in edits.items()}
    measures = {}
    for group, of, inside in (("concept", "the concept", of_concept), ("others", "other domains", ~of_concept)):
        mask = counted & inside
        n = mask.sum(1).double()
        found = {name: ratio_of_means((delta * mask).sum(1), n) for name, delta in change.items()}
        measures[f"delta_loss_{group}"] = Measure(
            float(found["leace"][0]),
            int(n.sum()),
            "held-out tokens",
            f"mean cross-entropy after LEACE − before, nats, of tokens of {of}",
            {name: Control(float(found[name][0]), what[name], numbers(found[name][1])) for name in what},
            numbers(found["leace"][1]),
        )
    return measures


def _token_losses(
    model: LanguageModel, contexts: Contexts, hook_point: str, edit: Splice | None
) -> Float[Tensor, "contexts next"]:
    found = []
    for tokens, keep in zip(torch.split(contexts.tokens, 8), torch.split(contexts.keep, 8), strict=True):
        if edit is None:
            found.append(model.token_losses(tokens).cpu())
            continue
        here = keep[..., None].to(model.device)
        found.append(model.token_losses(tokens, hook_point, _where(here, edit)).cpu())
    return torch.cat(found).double()


def _where(keep: Bool[Tensor, "contexts pos 1"], edit: Splice) -> Splice:
    return lambda x: torch.where(keep, edit(x), x)
