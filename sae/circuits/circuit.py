"""One question about a task, answered by patching: which positions, heads, neurons or features carry the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sae.circuits.intervals import mean_interval, numbers
from sae.circuits.judge import Knockouts, by_size, greedy_circuits, judge, smallest_faithful
from sae.circuits.patching import (
    Direction,
    PatchingError,
    Runs,
    Where,
    activation_patching,
    gradient_patching,
    path_patching,
    runs_of,
)
from sae.circuits.results import Measure
from sae.circuits.screening import largest, unit_gradients
from sae.circuits.sites import Site, at, features_of, heads_of, neurons_of, stream_sites
from sae.circuits.tasks import Task
from sae.circuits.together import together
from sae.dictionary.autoencoder import SAE
from sae.lm import LanguageModel

DIRECTIONS: tuple[Direction, ...] = ("restoring", "breaking")
BY = ("position", "head", "neuron", "feature")
METHODS = ("activation", "gradient", "path", "judge")
BY_METHOD = {"path": ("head", "feature"), "judge": ("head",)}
SCREENED = 32  # neurons or features that are patched exactly: those with the largest first-order effects
FAITHFUL = 0.87  # 1 − 0.46 / 3.56: what the circuit of Wang et al. 2022 for GPT-2 small reaches

Found = tuple[dict[str, Measure], dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """What is asked: by what, by which method, of one layer or of all; features are those of a dictionary."""

    by: str = "position"
    method: str = "activation"
    layer: int | None = None
    sae: SAE | None = None
    hook_point: str | None = None  # of the dictionary
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("by", self.by, BY), ("method", self.method, METHODS)):
            if value not in known:
                raise PatchingError(f"--{name} must be one of {', '.join(known)}; got {value!r}.")
        if self.by == "feature" and (self.sae is None or self.hook_point is None):
            raise PatchingError("--by feature needs a dictionary: give its directory instead of a model.")
        allowed = BY_METHOD.get(self.method, BY)
        if self.by not in allowed:
            raise PatchingError(f"--method {self.method} goes --by {' or '.join(allowed)}; got {self.by!r}.")


def answer(model: LanguageModel, task: Task, question: Question) -> Found:
    """Measures and the labels of their axes.

    Raises: PatchingError for a layer that does not exist, or a task that the model does not do.
    """
    layers = _layers(model, question.layer)
    run: Callable[[LanguageModel, Task, Question, Sequence[int]], Found] = _sites
    if question.method == "path":
        run = _paths
    elif question.method == "judge":
        run = _judged
    elif question.by in ("neuron", "feature"):
        run = _units
    return run(model, task, question, layers)


def _layers(model: LanguageModel, layer: int | None) -> Sequence[int]:
    if layer is None:
        return range(model.n_layers)
    if not 0 <= layer < model.n_layers:
        raise PatchingError(f"--layer {layer} does not exist; {model.id} has layers 0 … {model.n_layers - 1}.")
    return [layer]


def _sites(model: LanguageModel, task: Task, question: Question, layers: Sequence[int]) -> Found:
    """Heads at all positions, or the stream and what is added to it, by named position."""
    places: list[tuple[str, Where | None]] = [("all positions", None)]
    if question.by == "head":
        groups = {"head": heads_of(model, layers)}
    else:
        places += [(name, at(where, task.clean)) for name, where in task.positions.items()]
        parts = ["resid_post", "attn_out", *([] if _attention_only(model) else ["mlp_out"])]
        groups = {part: [site for site in stream_sites(model, part) if _of(site, layers)] for part in parts}
    runs = runs_of(model, task, [site.hook_point for sites in groups.values() for site in sites])
    patch = gradient_patching if question.method == "gradient" else activation_patching
    measures = {
        f"{direction}_{name}": patch(runs, sites, [where for _, where in places], direction, seed=question.seed)
        for name, sites in groups.items()
        for direction in DIRECTIONS
    }
    labels: dict[str, Any] = {
        f"site.{direction}_{name}": [site.name for site in sites]
        for name, sites in groups.items()
        for direction in DIRECTIONS
    }
    return measures, labels | {"place": [name for name, _ in places]} | _lds(runs)


def _units(model: LanguageModel, task: Task, question: Question, layers: Sequence[int]) -> Found:
    """Neurons or features: all to first order, and the largest exactly, alone and together."""
    measures: dict[str, Measure] = {}
    labels: dict[str, Any] = {}
    if question.sae is not None and question.by == "feature":
        assert question.hook_point is not None
        hooks, sae = [question.hook_point], question.sae
    else:
        hooks, sae = [f"blocks.{layer}.mlp.hook_post" for layer in layers], None
    runs = runs_of(model, task, hooks)
    for hook in hooks:
        stem = "feature" if sae is not None else f"L{hook.split('.')[1]}.neuron"
        for direction in DIRECTIONS:
            slope = unit_gradients(runs, hook, direction, sae=sae, seed=question.seed)
            measures[f"{direction}_{stem}.first_order"] = slope
            if question.method == "gradient":
                continue
            numbers = largest(slope, SCREENED)
            if sae is not None:
                sites = features_of(sae, hook, numbers)
            else:
                every = neurons_of(model, int(hook.split(".")[1]))
                sites = [every[i] for i in numbers]
            name = f"{direction}_{stem}"
            measures[name] = activation_patching(runs, sites, [None], direction, seed=question.seed)
            labels[f"site.{name}"] = [site.name for site in sites]
            measures[f"{name}.together"], labels[f"units.{name}.together"] = together(
                runs, hook, direction, sae=sae, seed=question.seed
            )
    return measures, labels | {"place": ["all positions"]} | _lds(runs)


def _paths(model: LanguageModel, task: Task, question: Question, layers: Sequence[int]) -> Found:
    """Heads, or the largest features, into the queries, keys and values of heads."""
    receivers = {part: heads_of(model, layers, part) for part in "qkv"}
    every = heads_of(model, range(model.n_layers))
    z_hooks = list(dict.fromkeys(site.hook_point for site in every))
    hooks = [*z_hooks, *(site.hook_point for sites in receivers.values() for site in sites)]
    senders = every
    if question.by == "feature":
        assert question.sae is not None
        assert question.hook_point is not None
        hooks.append(question.hook_point)
    runs = runs_of(model, task, hooks)
    if question.sae is not None and question.hook_point is not None and question.by == "feature":
        slope = unit_gradients(runs, question.hook_point, "breaking", sae=question.sae, seed=question.seed)
        senders = features_of(question.sae, question.hook_point, largest(slope, SCREENED))
    measures = {
        f"into_{part}": path_patching(runs, senders, sites, z_hooks, seed=question.seed)
        for part, sites in receivers.items()
    }
    labels: dict[str, Any] = {"sender": [site.name for site in senders]}
    labels |= {f"receiver.into_{part}": [site.name for site in sites] for part, sites in receivers.items()}
    return measures, labels | _lds(runs)


def _judged(model: LanguageModel, task: Task, question: Question, layers: Sequence[int]) -> Found:
    heads = heads_of(model, layers)
    runs = runs_of(model, task, [site.hook_point for site in heads])
    knockouts = Knockouts(runs, heads)
    circuits = greedy_circuits(knockouts)
    chosen = smallest_faithful(knockouts, circuits, FAITHFUL)
    measures = judge(knockouts, chosen, seed=question.seed)
    measures["faithfulness_by_size"] = by_size(knockouts, circuits, seed=question.seed)
    named = [[heads[i].name for i in sorted(circuit)] for circuit in sorted(circuits, key=len)]
    labels: dict[str, Any] = {"circuit": [heads[i].name for i in sorted(chosen)], "circuits_by_size": named}
    return measures, labels | {"heads": list(range(len(circuits)))} | _lds(runs)


def _lds(runs: Runs) -> dict[str, Any]:
    means = [float(ld.double().mean()) for ld in (runs.ld_clean, runs.ld_corrupt)]
    right = float((runs.ld_clean > 0).double().mean())
    labels: dict[str, Any] = {"logit_difference": {"clean": means[0], "corrupt": means[1], "clean_above_0": right}}
    low, _ = numbers(mean_interval(runs.ld_clean - runs.ld_corrupt))
    if -math.inf < low <= 0:  # without end for a single prompt
        labels["warning"] = (
            f"{runs.model.id} does not do the task {runs.task.name}: its logit difference is {means[0]:.3f} on clean "
            f"prompts and {means[1]:.3f} on corrupt ones, within chance of each other. Shares of that difference mean "
            "nothing."
        )
    return labels


def _of(site: Site, layers: Sequence[int]) -> bool:
    return any(site.hook_point.startswith(f"blocks.{layer}.") for layer in layers)


def _attention_only(model: LanguageModel) -> bool:
    try:
        model.hook_width("blocks.0.hook_mlp_out")
    except ValueError:
        return True
    return False
