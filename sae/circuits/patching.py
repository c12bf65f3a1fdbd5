"""Patching: swap a part of a run for the same part of another run, and see how much of the answer comes with it.

Metric: (LD_p − LD_c) / (LD − LD_c), LD the mean logit difference on clean prompts, LD_c on corrupt ones, LD_p with the
patch. "Restoring" patches clean values into the corrupt run (0: nothing is restored, 1: all of it); "breaking" patches
corrupt values into the clean run (1: nothing is lost, 0: all of it).
Sources: Wang et al. 2022, arXiv 2211.00593 (activation and path patching); Nanda 2023, "Attribution patching".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.circuits.intervals import ratio_of_means
from sae.circuits.results import Control, Measure
from sae.circuits.sites import Site, patched, recording
from sae.circuits.tasks import Task
from sae.lm import LanguageModel, Splice

Direction = Literal["restoring", "breaking"]
Where = Bool[Tensor, "prompt pos"]
FORMULA = "(LD_p − LD_c) / (LD − LD_c), LD = logit(answer) − logit(wrong) at the end, means over prompts"
MEANING = {
    "restoring": "clean values in the corrupt run: 0 restores nothing, 1 all of it",
    "breaking": "corrupt values in the clean run: 1 breaks nothing, 0 all of it",
}
RANDOM = "a random direction with the norm of the patch, at the same place"
IDENTITY = "the run's own values patched into it: nothing may change"


class PatchingError(ValueError):
    """A task on which patching has no meaning."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Both runs of a task: logit differences and activations by hook point."""

    model: LanguageModel
    task: Task
    clean: Mapping[str, Float[Tensor, "prompt pos _"]]
    corrupt: Mapping[str, Float[Tensor, "prompt pos _"]]
    ld_clean: Float[Tensor, " prompt"]
    ld_corrupt: Float[Tensor, " prompt"]

    def ld(self, direction: Direction, splices: Mapping[str, Splice]) -> Float[Tensor, " prompt"]:
        """LD of the run that is patched."""
        tokens = self.task.corrupt if direction == "restoring" else self.task.clean
        return self.task.logit_difference(self.model.edited_logits(tokens, splices)).cpu()

    def source(self, direction: Direction) -> Mapping[str, Tensor]:
        """Activations of the run that the patch comes from."""
        return self.clean if direction == "restoring" else self.corrupt

    def own(self, direction: Direction) -> Mapping[str, Tensor]:
        """Activations of the run that is patched."""
        return self.corrupt if direction == "restoring" else self.clean

    def baseline(self, direction: Direction) -> Float[Tensor, " prompt"]:
        """LD of the run without a patch."""
        return self.ld_corrupt if direction == "restoring" else self.ld_clean


@torch.no_grad()
def runs_of(model: LanguageModel, task: Task, hook_points: Sequence[str]) -> Runs:
    """Runs a task twice. Raises: PatchingError if the model's answer does not depend on what differs."""
    caches: list[dict[str, Tensor]] = []
    lds = []
    for tokens in (task.clean, task.corrupt):
        found: dict[str, Tensor] = {}
        logits = model.edited_logits(tokens, {name: recording(found, name) for name in dict.fromkeys(hook_points)})
        caches.append(found)
        lds.append(task.logit_difference(logits).cpu())
    if abs(float((lds[0] - lds[1]).mean())) < 1e-4:
        raise PatchingError(
            f"{task.name}: {model.id} has the same logit difference on clean and corrupt prompts "
            f"({float(lds[0].mean()):.4f}), so nothing can be restored. It does not do this task."
        )
    return Runs(model, task, caches[0], caches[1], lds[0], lds[1])


def share(runs: Runs, ld: Float[Tensor, "prompt ..."]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(LD_p − LD_c) / (LD − LD_c) and its 95% interval over prompts."""
    corrupt = runs.ld_corrupt.view(-1, *[1] * (ld.ndim - 1))
    return ratio_of_means(ld - corrupt, runs.ld_clean - runs.ld_corrupt)


@torch.no_grad()
def activation_patching(
    runs: Runs, sites: Sequence[Site], places: Sequence[Where | None], direction: Direction, *, seed: int = 0
) -> Measure:
    """The share of each site at each place, in one direction; axes: site, place.

    Control: a random direction of equal norm at each of them, and the identity patch, which must give the share of the
    unpatched run exactly (0 when restoring, 1 when breaking).
    """
    generator = torch.Generator().manual_seed(seed)

    def grid(patch: Callable[[Site, Where | None], Splice]) -> Float[Tensor, "prompt site place"]:
        rows = [[runs.ld(direction, {site.hook_point: patch(site, place)}) for place in places] for site in sites]
        return torch.stack([torch.stack(row, -1) for row in rows], 1)

    source, own = runs.source(direction), runs.own(direction)
    value, interval = share(runs, grid(lambda site, place: patched(site, source[site.hook_point], place)))
    random, random_interval = share(
        runs, grid(lambda site, place: patched(site, source[site.hook_point], place, random=generator))
    )
    identity, _ = share(runs, grid(lambda site, place: patched(site, own[site.hook_point], place)))
    return Measure(
        value,
        len(runs.task),
        "prompts",
        f"{FORMULA}; {MEANING[direction]}",
        {"random_direction": Control(random, RANDOM, random_interval), "identity": Control(identity, IDENTITY)},
        interval,
        ("site", "place"),
    )


def gradient_patching(
    runs: Runs, sites: Sequence[Site], places: Sequence[Where | None], direction: Direction, *, seed: int = 0
) -> Measure:
    """The first-order estimate of `activation_patching`, minus the unpatched share: change · ∂LD/∂x / (LD − LD_c).

    One backward pass gives all sites. Control: the same with random directions of equal norm.
    """
    source, own = runs.source(direction), runs.own(direction)
    gradient = gradients(runs, direction, [site.hook_point for site in sites])
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    random: list[Tensor] = []
    for site in sites:
        x, wanted = own[site.hook_point], source[site.hook_point]
        change = site.change(x, wanted)
        for values, moved in ((found, change), (random, site.random_change(change, generator))):
            effect = (moved * gradient[site.hook_point]).sum(-1).cpu()  # [prompt, pos]
            values.append(torch.stack([effect.sum(1) if w is None else (effect * w).sum(1) for w in places], -1))
    spread = runs.ld_clean - runs.ld_corrupt
    value, interval = ratio_of_means(torch.stack(found, 1), spread)
    control, control_interval = ratio_of_means(torch.stack(random, 1), spread)
    return Measure(
        value,
        len(runs.task),
        "prompts",
        "Σ (x_source − x) · ∂LD/∂x / (LD − LD_c), means over prompts: what patching adds, to first order; "
        f"{MEANING[direction]}",
        {"random_direction": Control(control, RANDOM, control_interval)},
        interval,
        ("site", "place"),
    )


def gradients(runs: Runs, direction: Direction, hook_points: Sequence[str]) -> dict[str, Float[Tensor, "prompt pos _"]]:
    """∂ΣLD/∂x at each hook point, of the run that is patched."""
    task = runs.task
    tokens = (task.corrupt if direction == "restoring" else task.clean).clone()
    leaves: dict[str, Tensor] = {}

    def leaf(name: str) -> Splice:
        def splice(x: Tensor) -> Tensor:
            leaves[name] = torch.zeros_like(x, requires_grad=True)
            return x + leaves[name]

        return splice

    with torch.inference_mode(False), torch.enable_grad():
        logits = runs.model.edited_logits(tokens, {name: leaf(name) for name in dict.fromkeys(hook_points)})
        found = torch.autograd.grad(task.logit_difference(logits).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@torch.no_grad()
def path_patching(
    runs: Runs, senders: Sequence[Site], receivers: Sequence[Site], heads: Sequence[str], *, seed: int = 0
) -> Measure:
    """How much of the answer travels from each sender into each receiver; axes: sender, receiver.

    The clean run is broken: (1) the sender takes its corrupt value, the outputs `heads` (hook points of attn.hook_z) of
    all other heads are held at their clean ones, MLPs are recomputed, and the receivers' inputs are recorded; (2) in a
    clean run one receiver takes what was recorded. 1: nothing travels on this path.
    Control: in (1), a random direction with the norm of the sender's change. A receiver before its sender gives 1.
    Source: Wang et al. 2022, arXiv 2211.00593, appendix B.
    """
    generator = torch.Generator().manual_seed(seed)

    def grid(random: torch.Generator | None) -> Float[Tensor, "prompt sender receiver"]:
        rows = []
        for sender in senders:
            heard = _heard(runs, sender, receivers, heads, random)
            rows.append(
                torch.stack(
                    [
                        runs.ld("breaking", {site.hook_point: patched(site, heard[site.hook_point])})
                        for site in receivers
                    ],
                    -1,
                )
            )
        return torch.stack(rows, 1)

    value, interval = share(runs, grid(None))
    control, control_interval = share(runs, grid(generator))
    return Measure(
        value,
        len(runs.task),
        "prompts",
        f"{FORMULA}; corrupt value of the sender, heard by the receiver alone: 1 breaks nothing, 0 all of it",
        {"random_direction": Control(control, RANDOM, control_interval)},
        interval,
        ("sender", "receiver"),
    )


def _heard(
    runs: Runs, sender: Site, receivers: Sequence[Site], heads: Sequence[str], random: torch.Generator | None
) -> dict[str, Tensor]:
    """What the receivers read when only the sender is corrupt and all other heads are held."""
    found: dict[str, Tensor] = {}
    send = patched(sender, runs.corrupt[sender.hook_point], random=random)
    splices: dict[str, Splice] = {name: _held(runs.clean[name]) for name in heads}
    if sender.hook_point in splices:
        clean = runs.clean[sender.hook_point]
        splices[sender.hook_point] = lambda x: send(clean.to(x))
    else:
        splices[sender.hook_point] = send
    for name in dict.fromkeys(site.hook_point for site in receivers):
        splices[name] = recording(found, name)
    runs.model.edited_logits(runs.task.clean, splices)
    return found


def _held(value: Tensor) -> Splice:
    return lambda x: value.to(x)
