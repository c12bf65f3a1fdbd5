"""Patching against runs written by hand and TransformerLens' own patching; identities that must hold exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import SHAPE, random_sae, write_model
from torch import Tensor

from sae.circuits.judge import Knockouts, greedy_circuits, incompleteness, judge, minimality, smallest_faithful
from sae.circuits.patching import (
    PatchingError,
    Runs,
    activation_patching,
    gradient_patching,
    gradients,
    path_patching,
    runs_of,
)
from sae.circuits.screening import largest, unit_gradients
from sae.circuits.sites import Site, at, features_of, heads_of, neurons_of, stream_sites
from sae.circuits.tasks import END, Task, TaskError, task_of
from sae.circuits.together import together
from sae.lm import NativeModel

THREE = replace(SHAPE, n_layers=3)
N = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    return NativeModel(write_model(tmp_path_factory.mktemp("three"), shape=THREE), "three-layers")


@pytest.fixture(scope="module")
def task(model: NativeModel) -> Task:
    return task_of(model, "induction", N, seed=3)


def every_hook(model: NativeModel) -> list[str]:
    return list(model.module.hook_widths)


@pytest.fixture(scope="module")
def runs(model: NativeModel, task: Task) -> Runs:
    return runs_of(model, task, every_hook(model))


def ld(task: Task, logits: Tensor) -> Tensor:
    last = logits[:, -1].double()
    return torch.stack([row[a] - row[b] for row, (a, b) in zip(last, task.answers.tolist(), strict=True)])


def share_of(runs: Runs, patched: Tensor) -> float:
    clean, corrupt = (each.double().mean() for each in (runs.ld_clean, runs.ld_corrupt))
    return float((patched.mean() - corrupt) / (clean - corrupt))


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_an_induction_prompt_repeats_and_its_corrupt_twin_swaps(model: NativeModel, task: Task) -> None:
    for i in range(N):
        clean, corrupt = task.clean[i].tolist(), task.corrupt[i].tolist()
        b, d = task.answers[i].tolist()
        first, other = (int(task.positions[name][i]) for name in ("first", "other"))
        assert clean[0] == corrupt[0] == model.bos_id
        assert clean[first] == clean[-1] == corrupt[-1] == corrupt[other]
        assert clean[first + 1] == b
        assert corrupt[other + 1] == d
        assert sorted(clean) == sorted(corrupt)
        assert sum(x != y for x, y in zip(clean, corrupt, strict=True)) == 2


def test_a_file_of_prompts_is_a_task(model: NativeModel, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    line = {"clean": "QZ", "corrupt": "QK", "answer": "a", "wrong": "b", "positions": {"noun": 2}}
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"clean": "QZ x", "corrupt": "QK x"}))
    found = task_of(model, str(path), 10)
    assert found.name == "mine"
    assert found.clean[0, : found.positions[END][0] + 1].tolist() == model.encode_prompt("QZ")
    assert found.answers[0].tolist() == [model.tokenizer.encode(t, add_special_tokens=False).ids[0] for t in "ab"]
    assert found.positions["noun"].tolist() == [2, 2]
    path.write_text(json.dumps(line | {"corrupt": "QK and more"}))
    with pytest.raises(TaskError, match="patching needs prompts of equal length"):
        task_of(model, str(path), 10)
    path.write_text("{}")
    with pytest.raises(TaskError, match="mine.jsonl:1: .*A line has"):
        task_of(model, str(path), 10)
    with pytest.raises(TaskError, match="there is no task 'x'"):
        task_of(model, "x", 10)
    with pytest.raises(TaskError, match="it needs at least 4"):
        task_of(model, "ioi", 10)


def test_padding_on_the_right_changes_no_prediction(model: NativeModel, task: Task) -> None:
    longer = torch.cat([task.clean, task.clean[:, -1:]], 1)
    short, long = (task.logit_difference(model.logits(tokens)) for tokens in (task.clean, longer))
    assert torch.allclose(short, long, atol=1e-4)


# --- patching --------------------------------------------------------------------------------------------------------


def test_a_patch_is_a_run_with_that_value(model: NativeModel, runs: Runs, task: Task) -> None:
    """Each kind of site, both directions, written out with one splice and in float64 where it is summed."""
    sae = random_sae(SHAPE.d_mlp, "blocks.1.mlp.hook_post")
    where = at(task.positions["after_first"], task.clean)
    head, neuron = heads_of(model, [1])[1], neurons_of(model, 2)[5]
    feature, stream = features_of(sae, "blocks.1.mlp.hook_post", [4])[0], stream_sites(model)[1]

    def by_hand(site: Site, place: Tensor | None, x: Tensor, source: Tensor) -> Tensor:
        new = x.clone()
        rows = torch.ones_like(task.clean, dtype=torch.bool) if place is None else place
        if site is head:
            new[..., 8:16] = source[..., 8:16]
        elif site is neuron:
            new[..., 5] = source[..., 5]
        elif site is feature:
            new = x + (sae.encode(source)[..., 4] - sae.encode(x)[..., 4])[..., None] * sae.W_dec[4]
        else:
            new = source
        return torch.where(rows[..., None], new, x)

    for direction in ("restoring", "breaking"):
        own, source = runs.own(direction), runs.source(direction)
        tokens = task.corrupt if direction == "restoring" else task.clean
        for site in (head, neuron, feature, stream):
            for place in (None, where):
                name = site.hook_point
                logits = model.logits(tokens, name, partial(by_hand, site, place, source=source[name]))
                found = activation_patching(runs, [site], [place], direction)
                assert float(found.value) == pytest.approx(share_of(runs, ld(task, logits)), abs=1e-4)
                assert torch.allclose(own[name], model.capture(tokens, name))


def test_the_identity_patch_is_exactly_nothing_and_the_whole_stream_everything(model: NativeModel, runs: Runs) -> None:
    for direction, nothing in (("restoring", 0.0), ("breaking", 1.0)):
        sites = [*stream_sites(model), *heads_of(model, range(3))]
        found = activation_patching(runs, sites, [None], direction)  # type: ignore[arg-type]
        identity = found.controls["identity"].value
        assert (identity == nothing).all()  # type: ignore[union-attr]
        assert found.value[:4, 0].tolist() == pytest.approx([1 - nothing] * 4, abs=1e-5)
        assert found.controls["random_direction"].value.shape == found.value.shape  # type: ignore[union-attr]


def test_the_random_direction_has_the_norm_and_columns_of_the_patch(model: NativeModel, runs: Runs) -> None:
    generator = torch.Generator().manual_seed(0)
    for site in (heads_of(model, [0])[1], stream_sites(model)[2]):
        change = site.change(runs.clean[site.hook_point], runs.corrupt[site.hook_point])
        random = site.random_change(change, generator)
        assert torch.allclose(random.norm(dim=-1), change.norm(dim=-1), atol=1e-4)
        assert torch.equal(random[..., :8] == 0, change[..., :8] == 0)
        cosine = torch.cosine_similarity(random.flatten(), change.flatten(), dim=0)
        assert abs(float(cosine)) < 0.2


def test_transformer_lens_finds_the_same(model: NativeModel, runs: Runs, task: Task) -> None:
    """Its own patching of the residual stream by layer and position, and of head outputs."""
    from transformer_lens import patching as theirs

    bridge = model.bridge()
    _, cache = bridge.run_with_cache(task.clean)

    def metric(logits: Tensor) -> Tensor:
        return torch.tensor(share_of(runs, ld(task, logits.detach())))

    places: list[Any] = [torch.arange(task.clean.shape[1])[None].expand(N, -1) == i for i in range(task.clean.shape[1])]
    before = [Site(f"pre{i}", f"blocks.{i}.hook_resid_pre") for i in range(3)]
    ours = activation_patching(runs, before, places, "restoring").value
    found = theirs.get_act_patch_resid_pre(bridge, task.corrupt, cache, metric)
    assert (ours - found).abs().max() <= 1e-5
    heads = activation_patching(runs, heads_of(model, range(3)), [None], "restoring").value
    by_head = theirs.get_act_patch_attn_head_out_all_pos(bridge, task.corrupt, cache, metric)
    assert (heads[:, 0] - by_head.flatten()).abs().max() <= 1e-5


def test_gradient_patching_is_the_numerical_derivative(model: NativeModel, runs: Runs, task: Task) -> None:
    """LD at x + h (source − x), differentiated in float64."""
    where = at(task.positions["after_other"], task.clean)
    sites = [heads_of(model, [0])[1], neurons_of(model, 1)[7], stream_sites(model)[2]]
    found = gradient_patching(runs, sites, [where, None], "restoring").value
    model.module.double()
    try:
        for i, site in enumerate(sites):
            own, source = (cache[site.hook_point].double() for cache in (runs.corrupt, runs.clean))
            change = site.change(own, source)
            for j, mask in enumerate((where, torch.ones_like(where))):
                step = 1e-4 * torch.where(mask[..., None], change, 0.0)

                def moved(sign: int, step: Tensor = step, site: Site = site) -> Tensor:
                    logits = model.edited_logits(task.corrupt, {site.hook_point: lambda x: x + sign * step})
                    return ld(task, logits).mean()

                up, down = moved(1), moved(-1)
                slope = (up - down) / 2e-4 / (runs.ld_clean - runs.ld_corrupt).double().mean()
                assert float(found[i, j]) == pytest.approx(float(slope), abs=2e-4, rel=1e-3)
    finally:
        model.module.float()


def test_all_units_at_once_are_the_units_one_by_one(model: NativeModel, runs: Runs) -> None:
    hook_point = "blocks.1.mlp.hook_post"
    sae = random_sae(SHAPE.d_mlp, hook_point)
    for dictionary, sites in ((None, neurons_of(model, 1)), (sae, features_of(sae, hook_point, range(24)))):
        every = unit_gradients(runs, hook_point, "breaking", sae=dictionary)
        single = gradient_patching(runs, sites, [None], "breaking")
        assert torch.allclose(every.value, single.value[:, 0], atol=1e-6)
        assert largest(every, 3)[0] == int(single.value.abs().argmax())


def test_units_together_are_one_patch_written_by_hand(model: NativeModel, runs: Runs, task: Task) -> None:
    """The largest neurons or features at once, chosen on the same prompts and on the other half of them."""
    name = "blocks.1.mlp.hook_post"
    x, source, slope = runs.corrupt[name], runs.clean[name], gradients(runs, "restoring", [name])[name]
    sae = random_sae(SHAPE.d_mlp, name)
    neurons = (source - x, torch.eye(SHAPE.d_mlp))
    features = (sae.encode(source) - sae.encode(x), sae.W_dec)
    for dictionary, (moved, directions) in ((None, neurons), (sae, features)):
        found, sizes = together(runs, name, "restoring", sae=dictionary)
        assert sizes == [1, 2, 4, 8, 16, len(directions)]
        effects = (moved * (slope @ directions.T)).sum(1)  # [prompt, unit]

        def share_with(chosen: Tensor, moved: Tensor = moved, directions: Tensor = directions) -> float:
            y = x + (moved * chosen[:, None]) @ directions
            return share_of(runs, ld(task, model.logits(task.corrupt, name, lambda _: y)))

        def top(rows: slice, effects: Tensor = effects) -> Tensor:
            return torch.zeros(effects.shape[1]).index_fill(0, effects[rows].mean(0).abs().topk(4).indices, 1.0)

        fixed = top(slice(None)).expand(N, -1)
        elsewhere = torch.stack([top(slice(1, None, 2)), top(slice(0, None, 2))] * (N // 2))
        assert found.value[2] == pytest.approx(share_with(fixed), abs=1e-4)  # type: ignore[index]
        values = {kind: control.value for kind, control in found.controls.items()}
        assert values["chosen_on_other_prompts"][2] == pytest.approx(share_with(elsewhere), abs=1e-4)  # type: ignore[index]
        everything = share_with(torch.ones(N, len(directions)))
        for last in (found.value[-1], values["random_units"][-1]):  # type: ignore[index]
            assert last == pytest.approx(everything, abs=1e-4)
        whole = share_of(runs, ld(task, model.logits(task.corrupt, name, lambda _: source)))
        assert values["whole_hook_point"].tolist() == pytest.approx([whole] * len(sizes), abs=1e-4)  # type: ignore[union-attr]
        assert (values["identity"] == 0).all()  # type: ignore[union-attr]


def test_a_path_is_the_two_runs_written_by_hand(model: NativeModel, runs: Runs, task: Task) -> None:
    """Sender L0.head.1, receiver the query of L2.head.0: a forward pass with a plain hook, twice."""
    sender, receiver = heads_of(model, [0])[1], heads_of(model, [2], "q")[0]
    z_hooks = [f"blocks.{i}.attn.hook_z" for i in range(3)]
    found = path_patching(runs, [sender], [receiver], z_hooks)
    heard = {}

    def first(name: str, value: Tensor) -> Tensor:
        if name in z_hooks:
            value = runs.clean[name].clone()
            if name == sender.hook_point:
                value[..., 8:16] = runs.corrupt[name][..., 8:16]
        heard[name] = value
        return value

    def second(name: str, value: Tensor) -> Tensor:
        if name == receiver.hook_point:
            value = value.clone()
            value[..., :8] = heard[name][..., :8]
        return value

    model.module(task.clean, first)
    assert float(found.value) == pytest.approx(share_of(runs, ld(task, model.module(task.clean, second))), abs=1e-4)
    late, early = heads_of(model, [2])[0], heads_of(model, [0], "k")[0]
    assert float(path_patching(runs, [late], [early], z_hooks).value) == pytest.approx(1.0, abs=1e-6)


def test_a_feature_can_send_to_a_head(model: NativeModel, runs: Runs) -> None:
    """What the head's key hears is what a run with the feature's corrupt activation writes there, other heads held."""
    sae = random_sae(SHAPE.d_model, "blocks.0.hook_mlp_out")
    sender, receiver = features_of(sae, "blocks.0.hook_mlp_out", [2])[0], heads_of(model, [1], "k")[1]
    z_hooks = [f"blocks.{i}.attn.hook_z" for i in range(3)]
    found = path_patching(runs, [sender], [receiver], z_hooks)
    name = "blocks.0.hook_mlp_out"
    x, wanted = runs.clean[name], runs.corrupt[name]
    y = x + (sae.encode(wanted)[..., 2] - sae.encode(x)[..., 2])[..., None] * sae.W_dec[2]
    block = model.module.blocks[1]
    key = block.attn.k(block.ln1(runs.clean["blocks.0.hook_resid_mid"] + y))

    def hear(value: Tensor) -> Tensor:
        return torch.cat([value[..., :8], key[..., 8:16]], -1)

    logits = model.logits(runs.task.clean, receiver.hook_point, hear)
    assert float(found.value) == pytest.approx(share_of(runs, ld(runs.task, logits)), abs=1e-4)


def test_a_feature_can_send_to_a_feature(model: NativeModel, runs: Runs, task: Task) -> None:
    """Through the MLP between them, heads held: the later feature takes what it hears, and nothing else of it."""
    early, late = "blocks.0.hook_mlp_out", "blocks.1.mlp.hook_post"
    first, second = random_sae(SHAPE.d_model, early), random_sae(SHAPE.d_mlp, late)
    z_hooks = [f"blocks.{i}.attn.hook_z" for i in range(3)]
    block = model.module.blocks[1]
    x, wanted = runs.clean[early], runs.corrupt[early]
    change = first.encode(wanted) - first.encode(x)
    sent = int(change.abs().sum((0, 1)).argmax())
    stream = runs.clean["blocks.1.hook_resid_mid"] + change[..., sent, None] * first.W_dec[sent]
    heard = second.encode(block.get_submodule("mlp").post(block.get_submodule("ln2")(stream)))  # type: ignore[operator]
    clean = runs.clean[late]
    moved = heard - second.encode(clean)
    reader = int(moved.abs().sum((0, 1)).argmax())
    patch = clean + moved[..., reader, None] * second.W_dec[reader]
    expected = share_of(runs, ld(task, model.logits(task.clean, late, lambda _: patch)))
    found = path_patching(runs, features_of(first, early, [sent]), features_of(second, late, [reader]), z_hooks)
    assert abs(expected - 1) > 1e-3
    assert float(found.value) == pytest.approx(expected, abs=1e-4)


def test_a_task_that_the_model_cannot_do_is_refused(model: NativeModel, task: Task) -> None:
    with pytest.raises(PatchingError, match="It does not do this task"):
        runs_of(model, replace(task, corrupt=task.clean), ["blocks.0.hook_resid_pre"])


# --- circuits --------------------------------------------------------------------------------------------------------


class Additive(Knockouts):
    """F is a sum of weights: what the criteria must say is known."""

    def __init__(self, weights: list[float], runs: Runs) -> None:
        super().__init__(runs, [Site(str(i), "none", slice(0, 1)) for i in range(len(weights))])
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def __call__(self, circuit: Any) -> Tensor:
        return self.weights[sorted(circuit)].sum().expand(4) + torch.arange(-1.5, 2.0, dtype=torch.float64) * 0


def test_the_criteria_of_a_sum_are_known(runs: Runs) -> None:
    additive = Additive([6.0, 3.0, 1.0, 0.0, 0.0], runs)
    circuits = greedy_circuits(additive)
    assert [len(c) for c in circuits] == [5, 4, 3, 2, 1, 0]
    assert circuits[2] == {0, 1, 2}
    assert smallest_faithful(additive, circuits, 0.85) == {0, 1}
    g = torch.Generator().manual_seed(0)
    assert incompleteness(additive, frozenset({0, 1}), g) == pytest.approx(0.1)  # head 2 is always missed
    assert incompleteness(additive, frozenset({0, 1, 2}), g) == pytest.approx(0.0)
    assert minimality(additive, frozenset({0, 1}), g) == pytest.approx(0.3)
    assert minimality(additive, frozenset({0, 3}), g) == pytest.approx(0.0)  # head 3 does nothing
    measures = judge(additive, frozenset({0, 1}))
    assert measures["faithfulness"].value == pytest.approx(0.9)
    assert measures["faithfulness"].controls["random_circuits"].value < 0.9  # type: ignore[operator]


def test_knocking_out_puts_the_mean_in_place(model: NativeModel, runs: Runs, task: Task) -> None:
    knockouts = Knockouts(runs, heads_of(model, range(3)))
    assert torch.allclose(knockouts(knockouts.all), runs.ld_clean.double(), atol=1e-5)
    mean = runs.corrupt["blocks.1.attn.hook_z"].mean(0)

    def out(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., 8:16] = mean[:, 8:16]
        return x

    expected = ld(task, model.logits(task.clean, "blocks.1.attn.hook_z", out))
    assert torch.allclose(knockouts(knockouts.all - {3}), expected, atol=1e-4)
