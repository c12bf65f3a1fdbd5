"""Evaluation and index by several ranks: every figure of one process, bit for bit."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import zarr
from fakes import HOOK_POINT, SHAPE, random_sae
from ranks import on_ranks

from sae import pipeline
from sae.dictionary.files import save
from sae.indexing import over_ranks
from sae.jobs.checkpoint import read_tensors
from sae.lm import NativeModel

IN = "blocks.0.mlp.hook_in"
REPORTS = ("plain", "filtered", "cross")
TOKENS = 640  # of the index


@pytest.fixture(scope="module")
def two_sites(tiny_model: NativeModel, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two hook points of one model, and of few shards: 24 held out, for training 64."""
    out = tmp_path_factory.mktemp("sites") / "acts.zarr"
    given: dict[str, Any] = {"tokens": 1024, "heldout_tokens": 384, "seq_len": 16}
    return pipeline.harvest(tiny_model, tiny_text, out, hook_points=[IN, HOOK_POINT], **given)


def made(home: Path, model: NativeModel, sites: Path) -> None:
    """A dictionary, one whose training left rows out, and a crosscoder."""
    config = {"hook_point": HOOK_POINT, "model": model.identity()}
    save(random_sae(SHAPE.d_mlp), home / "plain", config)
    save(random_sae(SHAPE.d_mlp), home / "filtered", {**config, "row_filter": {"skip_positions": 3}})
    common = {"scale": 1.0, "model": model.identity(), "store": {"path": str(sites)}}
    widths = {IN: SHAPE.d_model, HOOK_POINT: SHAPE.d_mlp}
    recorded = [{"name": hook, "width": width, "hook_point": hook, **common} for hook, width in widths.items()]
    save(random_sae(SHAPE.d_model + SHAPE.d_mlp), home / "cross", {"sites": recorded})


def measured(home: str, store: str, model: str) -> list[Any]:
    """Three evaluations and an index, as each rank returns them."""
    how: dict[str, Any] = {"model": model, "kernels": "reference", "over_ranks": True}
    with patch.object(import_module("sae.pipeline.evaluate"), "SPREAD_SHARDS", 8):
        found: list[Any] = [pipeline.evaluate(f"{home}/{name}", store=store, **how) for name in REPORTS[:2]]
    found.append(pipeline.evaluate(f"{home}/cross", **how))
    return [*found, str(pipeline.index(f"{home}/plain", store=store, tokens=TOKENS, **how))]


def indexed_in_little_memory(home: str, store: str, model: str) -> None:
    """Room for the correlations of three features at a time."""
    with patch.object(over_ranks, "CORRELATION_BYTES", 3 * 12 * SHAPE.d_mlp):
        pipeline.index(f"{home}/plain", store=store, model=model, tokens=TOKENS, kernels="reference")


@pytest.fixture(scope="module")
def homes(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: NativeModel, tiny_model_dir: Path, two_sites: Path
) -> dict[str, tuple[Path, list[list[Any]]]]:
    """The directories that one process and three wrote, and what each rank returned."""
    found = {}
    for name, world in (("one", 1), ("many", 3)):
        home = tmp_path_factory.mktemp(name)
        made(home, tiny_model, two_sites)
        found[name] = home, on_ranks(world, measured, str(home), str(two_sites), str(tiny_model_dir))
    return found


@pytest.mark.parametrize("name", REPORTS)
def test_ranks_evaluate_as_one_process(homes: dict[str, tuple[Path, list[list[Any]]]], name: str) -> None:
    (one, (expected,)), (many, found) = homes["one"], homes["many"]
    place = REPORTS.index(name)
    assert [each[place] for each in found] == [json.loads(json.dumps(expected[place]))] * 3
    assert (many / name / "eval.json").read_bytes() == (one / name / "eval.json").read_bytes()
    tensors = "sites.safetensors" if name == "cross" else "feature_stats.safetensors"
    wanted, _ = read_tensors(one / name / tensors)
    theirs, _ = read_tensors(many / name / tensors)
    assert theirs.keys() == wanted.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor, wanted[key]), key


def test_a_crosscoder_is_measured_at_both_sites_and_by_its_losses(
    homes: dict[str, tuple[Path, list[list[Any]]]],
) -> None:
    """What is compared above is not empty."""
    report = json.loads((homes["many"][0] / "cross" / "eval.json").read_text())
    assert [site["name"] for site in report["sites"]] == [IN, HOOK_POINT]
    for name in ("fvu", "ce_sae", "ce_loss_score_zero"):
        values = [report["metrics"][f"{name}_site_{n}"]["value"] for n in (1, 2)]
        assert np.isfinite(values).all()
        assert values[0] != values[1]


def contents(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an index by name."""
    homes = [home.parent for home in path.rglob("zarr.json") if json.loads(home.read_text())["node_type"] == "array"]
    return {str(home.relative_to(path)): np.asarray(zarr.open_array(home, mode="r")[:]) for home in homes}


def test_ranks_index_as_one_process(
    homes: dict[str, tuple[Path, list[list[Any]]]],
    tmp_path: Path,
    tiny_model: NativeModel,
    tiny_model_dir: Path,
    two_sites: Path,
) -> None:
    """Also one process with little memory."""
    (one, _), (many, found) = homes["one"], homes["many"]
    assert [each[-1] for each in found] == [str(many / "plain" / "features.zarr")] * 3
    made(tmp_path, tiny_model, two_sites)
    on_ranks(1, indexed_in_little_memory, str(tmp_path), str(two_sites), str(tiny_model_dir))
    expected = contents(one / "plain" / "features.zarr")
    assert len(expected) > 40
    for home in (many, tmp_path):
        theirs = contents(home / "plain" / "features.zarr")
        assert theirs.keys() == expected.keys()
        for name, array in theirs.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=f"{home.name} {name}")
        assert not list((home / "plain").glob("*.partial"))
