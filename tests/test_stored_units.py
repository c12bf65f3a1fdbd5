"""The L0 of stored rows: recorded shard by shard, told at the end of a harvest, and compared with the L0 asked for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import HOOK_POINT, FewRows

from sae import pipeline
from sae.lm import NativeModel
from sae.lm.units import active_units, participation_ratio
from sae.training.rows import Batch
from store.activations import ActivationStore
from store.common import HELD_OUT, TRAIN

RESID = "blocks.0.hook_resid_pre"


@pytest.fixture(scope="module")
def harvested(tiny_model: NativeModel, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    out, told = tmp_path_factory.mktemp("units") / "acts.zarr", []
    hooks = (HOOK_POINT, RESID)
    pipeline.harvest(tiny_model, tiny_text, out, tokens=2048, heldout_tokens=256, hook_points=hooks, report=told.append)
    return out, told


@pytest.mark.parametrize("split", [TRAIN, HELD_OUT])
@pytest.mark.parametrize("hook", [HOOK_POINT, RESID])
def test_the_record_against_the_stored_rows_one_by_one(harvested: tuple[Path, list], split: str, hook: str) -> None:
    store = ActivationStore.open(harvested[0])
    active, ratio = [], []
    for shard in store.markers(split):
        keep = store.read_contexts(split, shard).keep.reshape(-1)
        for row in store.read_acts(split, shard, hook).astype(np.float64)[keep]:
            active.append(sum(a != 0 for a in row))
            ratio.append(sum(row**2) ** 2 / sum(row**4))
    found = store.totals(split, hook)
    assert found.units_l0 == np.mean(active)
    assert found.units_participation_ratio == pytest.approx(np.mean(ratio), rel=1e-12)
    described = pipeline.describe(harvested[0])["splits"][split]["hook_points"][hook]
    assert described["units_l0"] == found.units_l0
    assert described["units_participation_ratio"] == found.units_participation_ratio


def test_a_harvest_says_the_l0_of_each_hook_point(harvested: tuple[Path, list], tiny_model: NativeModel) -> None:
    path, told = harvested
    store = ActivationStore.open(path)
    for hook in (HOOK_POINT, RESID):
        totals, width = store.totals(TRAIN, hook), store.hook_points[hook]
        line = f"{hook}: L0 {totals.units_l0:.1f} of {width} units, participation ratio "
        assert [each for each in told if each.startswith(line)], told
    dense = store.totals(TRAIN, RESID).units_l0
    assert dense == pytest.approx(tiny_model.hook_width(RESID), abs=0.01)  # but for a few entries that round to 0


def test_the_store_and_the_metrics_define_a_row_alike(harvested: tuple[Path, list]) -> None:
    store = ActivationStore.open(harvested[0])
    parts = []
    for shard in store.markers(TRAIN):
        keep = store.read_contexts(TRAIN, shard).keep.reshape(-1)
        parts.append(torch.from_numpy(store.read_acts(TRAIN, shard, RESID)[keep]))
    rows, found = torch.cat(parts), store.totals(TRAIN, RESID)
    assert active_units(rows).double().mean().item() == found.units_l0
    assert participation_ratio(rows).mean().item() == pytest.approx(found.units_participation_ratio, rel=1e-12)


def test_shards_without_the_record_are_read_and_keep_their_bytes(harvested: tuple[Path, list], tmp_path: Path) -> None:
    """As version 0.1 wrote them."""
    import shutil

    path = tmp_path / "acts.zarr"
    shutil.copytree(harvested[0], path)
    marker = next((path / "markers" / TRAIN).glob("*.json"))
    fields = json.loads(marker.read_text())
    assert fields.pop("units").keys() == {HOOK_POINT, RESID}
    marker.write_text(json.dumps(fields))
    store = ActivationStore.open(path)
    found = store.totals(TRAIN, HOOK_POINT)
    assert (found.units_l0, found.units_participation_ratio) == (None, None)
    assert found.kept_rows == ActivationStore.open(harvested[0]).totals(TRAIN, HOOK_POINT).kept_rows
    shard = int(marker.stem)
    assert store.marker(TRAIN, shard).to_json().keys() == fields.keys()


class Dense(FewRows):
    """Made-up rows in which three of eight entries are not 0."""

    def sample(self, n: int, seed: int) -> torch.Tensor:
        rows = super().sample(n, seed)
        rows[:, 3:] = 0
        return rows

    def batch(self, step: int) -> Batch:
        return Batch(self.sample(16, step))


@pytest.mark.parametrize(
    ("recipe", "l0"), [("topk", 3), ("topk", 2), ("towards-monosemanticity", 4.0), ("towards-monosemanticity", None)]
)
def test_training_warns_of_an_l0_that_is_not_below_that_of_the_rows(
    tmp_path: Path, recipe: str, l0: float | None
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline.train(Dense(), tmp_path / "a", recipe=recipe, l0=l0, d_sae=32, tokens=64, config={"batch_tokens": 16})
    found = [str(each.message) for each in caught if "activations themselves" in str(each.message)]
    assert len(found) == (l0 is not None and l0 >= 3)
    for message in found:
        assert f"an L0 of {l0:g} was asked for, and the activations themselves have 3.0" in message
