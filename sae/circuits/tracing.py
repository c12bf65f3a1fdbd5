"""Causal tracing: the subject of a fact is corrupted, one activation is restored, and the answer may come back.

IE = P(answer | restored) − P(answer | corrupted), mean over prompts. The subject is corrupted by Gaussian noise on its
tokens, or by the tokens of another subject. Source: Meng et al. 2022, arXiv 2202.05262, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.circuits.intervals import mean_interval, numbers
from sae.circuits.results import Control, Measure
from sae.circuits.sites import Site, at, patched, recording, stream_sites
from sae.circuits.tasks import END, Task
from sae.lm import LanguageModel, Splice

Corruption = Literal["gaussian", "swap"]
KINDS = ("resid_post", "mlp_out", "attn_out")
ENTERING = "blocks.0.hook_resid_pre"
SUBJECT = "subject"
NOISE_SCALE = 3.0
MOVED = "the same change on as many other tokens of the prompt, chosen at random"
CORRUPTED_BY = {
    "gaussian": "noise of 3 standard deviations (of what enters the first block) on its tokens",
    "swap": "the tokens of another subject",
}


@torch.no_grad()
def causal_tracing(
    model: LanguageModel,
    task: Task,
    corruption: Corruption,
    *,
    kinds: Sequence[str] = KINDS,
    draws: int = 4,
    seed: int = 0,
) -> tuple[dict[str, Measure], dict[str, list[str]]]:
    """IE by layer and place for each kind of activation, and the labels of both axes.

    Places are the task's named positions, one token each, and `subject`, all corrupted tokens of the subject together.
    Control: at the same place, a random direction with the norm of what restores. `total_effect` is P(answer) in the
    clean run minus the corrupted one, the most that restoring can give back.
    """
    places = {name: at(where, task.clean) for name, where in task.positions.items()}
    places[SUBJECT] = task.clean != task.corrupt
    sites = {kind: stream_sites(model, kind)[-model.n_layers :] for kind in kinds}
    clean: dict[str, Tensor] = {}
    names = [ENTERING, *(site.hook_point for found in sites.values() for site in found)]
    p_clean = _p(model, task, task.clean, {name: recording(clean, name) for name in dict.fromkeys(names)})
    generator = torch.Generator().manual_seed(seed)
    runs, moved = _corruptions(model, task, corruption, clean[ENTERING], draws, generator)

    def mean_over(splices: Callable[[], Mapping[str, Splice]]) -> Float[Tensor, " prompt"]:
        return torch.stack([_p(model, task, tokens, _joined(noise, splices())) for tokens, noise in runs]).mean(0)

    p_corrupt = mean_over(dict)
    effect = p_clean - p_corrupt
    elsewhere = p_clean - torch.stack([_p(model, task, task.clean, noise) for noise in moved]).mean(0)
    measures = {
        "total_effect": Measure(
            float(effect.mean()),
            len(task),
            "prompts",
            f"P(answer) − P(answer | corrupted), subject corrupted by {CORRUPTED_BY[corruption]}",
            {"other_tokens": Control(float(elsewhere.mean()), MOVED, numbers(mean_interval(elsewhere)))},
            numbers(mean_interval(effect)),
        )
    }
    for kind, found in sites.items():
        grids = {}
        for name, random in (("value", None), ("control", generator)):
            rows = [[mean_over(_restoring(site, clean, where, random)) for where in places.values()] for site in found]
            grids[name] = torch.stack([torch.stack(row, -1) for row in rows], 1) - p_corrupt[:, None, None]
        measures[f"restored_{kind}"] = Measure(
            grids["value"].mean(0),
            len(task),
            "prompts",
            f"P(answer | {kind} restored) − P(answer | corrupted), subject corrupted by {CORRUPTED_BY[corruption]}",
            {
                "random_direction": Control(
                    grids["control"].mean(0),
                    "a random direction with the norm of what restores, at the same place",
                    mean_interval(grids["control"]),
                )
            },
            mean_interval(grids["value"]),
            ("layer", "place"),
        )
    return measures, {"layer": [f"layer {i}" for i in range(model.n_layers)], "place": list(places)}


def _corruptions(
    model: LanguageModel,
    task: Task,
    corruption: Corruption,
    entering: Float[Tensor, "prompt pos d_model"],
    draws: int,
    generator: torch.Generator,
) -> tuple[list[tuple[Tensor, dict[str, Splice]]], list[dict[str, Splice]]]:
    """The runs over which IE is averaged (tokens, what adds noise), and the control: each change on other tokens."""
    subject = task.clean != task.corrupt
    if corruption == "swap":
        change = model.capture(task.corrupt, ENTERING) - entering
        return [(task.corrupt, {})], [{ENTERING: _adding(_moved(task, change, subject, generator))}]
    scale = NOISE_SCALE * float(entering.std())
    noises = [scale * torch.randn(entering.shape, generator=generator).to(entering) for _ in range(draws)]
    on_subject = [torch.where(subject[..., None].to(noise.device), noise, 0.0) for noise in noises]
    return (
        [(task.clean, {ENTERING: _adding(noise)}) for noise in on_subject],
        [{ENTERING: _adding(_moved(task, noise, subject, generator))} for noise in on_subject],
    )


def _moved(
    task: Task,
    change: Float[Tensor, "prompt pos d_model"],
    subject: Bool[Tensor, "prompt pos"],
    generator: torch.Generator,
) -> Float[Tensor, "prompt pos d_model"]:
    """What is added to the subject's tokens, on as many others: not the first token of the prompt, nor padding."""
    found = torch.zeros_like(change)
    for row, end in enumerate(task.positions[END].tolist()):
        mine = subject[row].nonzero()[:, 0]
        others = (~subject[row, 1 : end + 1]).nonzero()[:, 0] + 1
        chosen = others[torch.randperm(len(others), generator=generator)[: len(mine)]]
        found[row, chosen] = change[row, mine[: len(chosen)]]
    return found


def _adding(noise: Tensor) -> Splice:
    return lambda x: x + noise.to(x)


def _restoring(
    site: Site, clean: Mapping[str, Tensor], where: Bool[Tensor, "prompt pos"], random: torch.Generator | None
) -> Callable[[], dict[str, Splice]]:
    return lambda: {site.hook_point: patched(site, clean[site.hook_point], where, random=random)}


def _joined(first: Mapping[str, Splice], second: Mapping[str, Splice]) -> dict[str, Splice]:
    """Both; at the same hook point one after the other."""
    found = dict(first)
    for name, splice in second.items():
        before = found.get(name)
        found[name] = splice if before is None else (lambda x, a=before, b=splice: b(a(x)))  # type: ignore[misc]
    return found


def _p(model: LanguageModel, task: Task, tokens: Tensor, splices: Mapping[str, Splice]) -> Float[Tensor, " prompt"]:
    """P(answer) at the end of each prompt."""
    row = torch.arange(len(task))
    logits = model.edited_logits(tokens, splices).cpu()[row, task.positions[END]]
    return logits.double().softmax(-1)[row, task.answers[:, 0]]
