"""The shipped `attn-2l` beside TransformerLens: the same patching and sums, and the circuit that the page shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae.circuits.parts import contributions, last_point, logit_reader, stream_parts, total
from sae.circuits.patching import Runs, activation_patching, path_patching, runs_of
from sae.circuits.sites import Site, heads_of, stream_sites
from sae.circuits.tasks import Task, task_of
from sae.lm import LanguageModel, load_model

N = 4


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model("attn-2l")


@pytest.fixture(scope="module")
def bridge(model: LanguageModel) -> Any:
    return model.bridge()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def task(model: LanguageModel) -> Task:
    return task_of(model, "induction", N, seed=1)


@pytest.fixture(scope="module")
def runs(model: LanguageModel, task: Task) -> Runs:
    parts = [*stream_sites(model), *stream_sites(model, "attn_out"), *heads_of(model, range(2))]
    keys = [site for part in "qk" for site in heads_of(model, [1], part)]
    return runs_of(model, task, ["blocks.1.hook_resid_pre", *(site.hook_point for site in [*parts, *keys])])


@pytest.mark.parametrize("direction", ["restoring", "breaking"])
def test_transformer_lens_patches_to_the_same_shares(bridge: Any, runs: Runs, task: Task, direction: Any) -> None:
    """Its own functions: the stream and attention outputs by layer and position, heads at all positions."""
    from transformer_lens import patching as theirs

    own, source = (task.corrupt, task.clean) if direction == "restoring" else (task.clean, task.corrupt)
    _, cache = bridge.run_with_cache(source)

    def metric(logits: Tensor) -> Tensor:
        """The share by the formula, from TransformerLens' logits."""
        last = logits[:, -1].double()
        found = torch.stack([row[a] - row[b] for row, (a, b) in zip(last, task.answers.tolist(), strict=True)])
        clean, corrupt = (each.double().mean() for each in (runs.ld_clean, runs.ld_corrupt))
        return (found.mean() - corrupt) / (clean - corrupt)

    places: list[Any] = [torch.zeros_like(task.clean, dtype=torch.bool) for _ in range(task.clean.shape[1])]
    for pos, place in enumerate(places):
        place[:, pos] = True
    entering = [Site(f"{layer}", f"blocks.{layer}.hook_resid_pre") for layer in range(2)]
    written = [Site(f"{layer}", f"blocks.{layer}.hook_attn_out") for layer in range(2)]
    with torch.no_grad():
        for sites, patch in ((entering, theirs.get_act_patch_resid_pre), (written, theirs.get_act_patch_attn_out)):
            ours = activation_patching(runs, sites, places, direction).value
            assert (ours - patch(bridge, own, cache, metric)).abs().max() <= 1e-5
        heads = activation_patching(runs, heads_of(runs.model, range(2)), [None], direction).value
        by_head = theirs.get_act_patch_attn_head_out_all_pos(bridge, own, cache, metric)
        assert (heads[:, 0] - by_head.flatten()).abs().max() <= 1e-5  # type: ignore[index]


def test_parts_sum_to_the_stream_and_the_logits_of_transformer_lens(
    model: LanguageModel, bridge: Any, task: Task
) -> None:
    """Each head, the embedding, the position and the biases: their sum is the stream that TransformerLens caches."""
    _, cache = bridge.run_with_cache(task.clean[:1])
    logits = model.logits(task.clean[:1])[0].double()
    for point in ("blocks.0.hook_resid_post", last_point(model)):
        summed = total(stream_parts(model, task.clean[0].tolist(), point=point))
        assert (summed - cache[point][0]).norm() <= 1e-5 * cache[point][0].norm()
    answer, wrong = task.answers[0].tolist()
    found = contributions(stream_parts(model, task.clean[0].tolist()), logit_reader(model, answer, wrong))
    read = found.values.sum(0)[:, 0] + found.constant[..., 0]
    assert torch.allclose(read.double(), logits[:, answer] - logits[:, wrong], atol=1e-4)


def test_the_previous_token_head_is_heard_by_the_keys_of_the_induction_heads(runs: Runs) -> None:
    """As `docs/results-lenses.md` says: 0.0 into the keys of 1.1 and 1.3, into no query and into no other key."""
    sender = heads_of(runs.model, [0])[:1]
    z_hooks = [f"blocks.{layer}.attn.hook_z" for layer in range(2)]
    keys, queries = (
        path_patching(runs, sender, heads_of(runs.model, [1], part), z_hooks).value[0]  # type: ignore[index]
        for part in "kq"
    )
    assert keys[[1, 3]].max() < 0.85
    assert keys[[0, 2]].min() > 0.95
    assert queries.min() > 0.95
