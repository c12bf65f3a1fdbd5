"""ROME: one fact is changed by a rank-one change of an MLP's output matrix, and what else changes is counted.

W' = W + Λ (C⁻¹ k*)ᵀ, Λ = (v* − W k*) / ((C⁻¹ k*)ᵀ k*), C = E[k kᵀ] over text; k* is the mean activation of the neurons
at the subject, v* an output of the MLP there that makes the new answer likely. It is made while the model runs:
`y → y + (k · u) Λ`, u = C⁻¹ k*, which is the same, and leaves the weights as they are.
Source: Meng et al. 2022, arXiv 2202.05262, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.circuits.intervals import mean_interval, numbers
from sae.circuits.results import Control, Measure
from sae.lm import LanguageModel, Splice

RIDGE = 1e-4  # of the mean of C's diagonal: neurons that never fire make C singular


class RomeError(ValueError):
    """A fact cannot be written where it was asked for."""


@dataclass(frozen=True)
class Question:
    """A prompt, as token ids, and the id of its true answer."""

    prompt: Sequence[int]
    answer: int


@dataclass(frozen=True)
class Request:
    """One fact to change. `subjects` are the positions of the subject's last token in `prompts`.

    `paraphrases` ask for the same fact, `neighbours` for that of others, `other_relations` for others of the subject.
    """

    prompts: Sequence[Sequence[int]]
    subjects: Sequence[int]
    old: int
    new: int
    paraphrases: Sequence[Sequence[int]]
    neighbours: Sequence[Question]
    other_relations: Sequence[Question]


@dataclass(frozen=True)
class Variant:
    """Where and how a fact is written: the layer; the token, from the subject's last on; with C or the identity."""

    layer: int
    token_offset: int = 0
    whitened: bool = True


@dataclass(frozen=True, eq=False)
class RankOne:
    """`y → y + (k · u) Λ` at the MLP of `layer`: W_out changed by Λ uᵀ."""

    layer: int
    u: Float[Tensor, " d_mlp"]
    written: Float[Tensor, " d_model"]  # Λ

    def splices(self) -> dict[str, Splice]:
        """The change, as splices of one run."""
        keys: dict[str, Tensor] = {}

        def see(k: Tensor) -> Tensor:
            keys["k"] = k
            return k

        def write(y: Tensor) -> Tensor:
            return y + (keys["k"] @ self.u.to(y))[..., None] * self.written.to(y)

        return {_post(self.layer): see, _out(self.layer): write}


def _post(layer: int) -> str:
    return f"blocks.{layer}.mlp.hook_post"


def _out(layer: int) -> str:
    return f"blocks.{layer}.hook_mlp_out"


@torch.no_grad()
def second_moment(
    model: LanguageModel, tokens: Int[Tensor, "contexts pos"], layer: int
) -> Float[Tensor, "d_mlp d_mlp"]:
    """C = E[k kᵀ] over all tokens, in float64."""
    total, n = None, 0
    for part in torch.split(tokens, 16):
        k = model.capture(part, _post(layer)).flatten(0, 1).double().cpu()
        total, n = (k.T @ k if total is None else total + k.T @ k), n + len(k)
    assert total is not None
    return total / n


def rank_one(
    model: LanguageModel,
    request: Request,
    variant: Variant,
    C: Float[Tensor, "d_mlp d_mlp"],
    *,
    steps: int = 40,
    lr: float = 0.1,
    decay: float = 2e-3,
) -> RankOne:
    """The change that writes the new answer: v* − W k* is found by Adam, k* is a mean over the prompts."""
    tokens, ends = _rows(request.prompts)
    row, where = torch.arange(len(tokens)), torch.tensor(request.subjects) + variant.token_offset
    captured = model.capture_all(tokens, [_post(variant.layer)])[_post(variant.layer)]
    k = captured[row, where].double().mean(0).cpu()
    added = _target(model, tokens, ends, where, request.new, variant.layer, steps, lr, decay)
    whitened = k
    if variant.whitened:
        ridge = RIDGE * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
        whitened = torch.linalg.solve(C + ridge, k)
    if not float(whitened @ k) > 0:
        raise RomeError(
            f"no neuron of layer {variant.layer} is active at the subject, so no fact can be written there."
        )
    return RankOne(variant.layer, (whitened / (whitened @ k)).float(), added)


def _target(
    model: LanguageModel,
    tokens: Int[Tensor, "prompt pos"],
    ends: Int[Tensor, " prompt"],
    where: Int[Tensor, " prompt"],
    new: int,
    layer: int,
    steps: int,
    lr: float,
    decay: float,
) -> Float[Tensor, " d_model"]:
    """v* − W k*: what must be added to the MLP's output at the subject, from −log P(new) + decay · ‖added‖²."""
    row, wanted = torch.arange(len(tokens)), torch.full((len(tokens),), new)
    width = model.hook_width(_out(layer))
    with torch.inference_mode(False), torch.enable_grad():
        added = torch.zeros(width, requires_grad=True)
        mask = (torch.arange(tokens.shape[1])[None] == where[:, None])[..., None]
        optimizer = torch.optim.Adam([added], lr=lr)
        for _ in range(steps):
            logits = model.edited_logits(tokens.clone(), {_out(layer): lambda y: y + mask.to(y) * added.to(y)})
            nll = torch.nn.functional.cross_entropy(logits[row, ends].cpu(), wanted)
            if float(nll.detach()) < 0.05:
                break
            optimizer.zero_grad()
            (nll + decay * added.square().sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return added.detach()


SCORES = {
    "efficacy": "share of edits after which P(new) > P(old) on the prompts of the edit",
    "paraphrase": "share of other wordings of the fact with P(new) > P(old)",
    "neighbours": "share of the same questions about other subjects that keep their answer on top",
    "other_relations": "share of other questions about the subject that keep their answer on top",
}


@torch.no_grad()
def scores(model: LanguageModel, request: Request, splices: Mapping[str, Splice]) -> dict[str, float]:
    """What an edit does: the four scores of one request (`SCORES`)."""
    return {
        "efficacy": _prefers(model, request, request.prompts, splices),
        "paraphrase": _prefers(model, request, request.paraphrases, splices),
        "neighbours": _kept(model, request.neighbours, splices),
        "other_relations": _kept(model, request.other_relations, splices),
    }


def rome(
    model: LanguageModel,
    requests: Sequence[Request],
    variants: Mapping[str, Variant],
    moments: Callable[[int], Float[Tensor, "d_mlp d_mlp"]],
    *,
    meanings: Mapping[str, str],
) -> dict[str, Measure]:
    """The scores of the first variant, with the other variants and the unedited model as controls."""
    found = {"unedited": [scores(model, request, {}) for request in requests]}
    for name, variant in variants.items():
        found[name] = [
            scores(model, r, rank_one(model, r, variant, moments(variant.layer)).splices()) for r in requests
        ]
    tested, *_ = variants
    what = {"unedited": "the model without an edit", **meanings}
    measures = {}
    for score, formula in SCORES.items():
        columns = {name: torch.tensor([each[score] for each in column]) for name, column in found.items()}
        ends = {name: numbers(mean_interval(column)) for name, column in columns.items()}
        measures[score] = Measure(
            float(columns[tested].mean()),
            len(requests),
            "edits",
            f"{formula}; {meanings[tested]}",
            {
                name: Control(float(column.mean()), what[name], ends[name])
                for name, column in columns.items()
                if name != tested
            },
            ends[tested],
        )
    return measures


def _prefers(
    model: LanguageModel, request: Request, prompts: Sequence[Sequence[int]], splices: Mapping[str, Splice]
) -> float:
    logits = _last_logits(model, prompts, splices)
    return float((logits[:, request.new] > logits[:, request.old]).double().mean())


def _kept(model: LanguageModel, questions: Sequence[Question], splices: Mapping[str, Splice]) -> float:
    if not questions:
        return 1.0
    best = _last_logits(model, [q.prompt for q in questions], splices).argmax(-1).tolist()
    return fmean(float(found == q.answer) for found, q in zip(best, questions, strict=True))


def _last_logits(
    model: LanguageModel, prompts: Sequence[Sequence[int]], splices: Mapping[str, Splice]
) -> Float[Tensor, "prompt d_vocab"]:
    tokens, ends = _rows(prompts)
    return model.edited_logits(tokens, splices)[torch.arange(len(tokens)), ends].cpu()


def _rows(prompts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, " prompt"]]:
    """Prompts padded on the right, and where each ends."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[*p, *[p[-1]] * (longest - len(p))] for p in prompts])
    return tokens, torch.tensor([len(p) - 1 for p in prompts])
