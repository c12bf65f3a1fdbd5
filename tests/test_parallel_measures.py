"""Evaluation and index by several ranks: every figure of one process, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def evaluated(directory: str, store: str, model: str) -> dict[str, Any]:
    return pipeline.evaluate(directory, store=store, model=model, over_ranks=True)


def indexed(directory: str, store: str, model: str, tokens: int) -> str:
    return str(pipeline.index(directory, store=store, model=model, tokens=tokens, over_ranks=True))


@pytest.fixture
def dictionary(tmp_path: Path, tiny_model: NativeModel) -> Callable[..., Path]:
    def saved(name: str, **settings: Any) -> Path:
        config = {"hook_point": HOOK_POINT, "model": tiny_model.identity(), **settings}
        save(random_sae(SHAPE.d_mlp), tmp_path / name, config)
        return tmp_path / name

    return saved


@pytest.mark.parametrize(("world", "settings"), [(3, {}), (2, {"row_filter": {"skip_positions": 3}})])
def test_ranks_evaluate_as_one_process(
    dictionary: Callable[..., Path], tiny_store: Path, tiny_model_dir: Path, world: int, settings: dict[str, Any]
) -> None:
    one, many = dictionary("one", **settings), dictionary("many", **settings)
    expected = pipeline.evaluate(one, store=tiny_store, model=str(tiny_model_dir))
    found = on_ranks(world, evaluated, str(many), str(tiny_store), str(tiny_model_dir))
    assert found == [json.loads(json.dumps(expected))] * world
    assert (many / "eval.json").read_bytes() == (one / "eval.json").read_bytes()
    wanted, _ = read_tensors(one / "feature_stats.safetensors")
    for name, tensor in read_tensors(many / "feature_stats.safetensors")[0].items():
        assert torch.equal(tensor, wanted[name]), name


def contents(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an index by name."""
    homes = [home.parent for home in path.rglob("zarr.json") if json.loads(home.read_text())["node_type"] == "array"]
    return {str(home.relative_to(path)): np.asarray(zarr.open_array(home, mode="r")[:]) for home in homes}


def test_ranks_index_as_one_process(
    dictionary: Callable[..., Path], tiny_store: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one process that has room for the correlations of three features at a time."""
    one, many, little = (dictionary(name) for name in ("one", "many", "little"))
    model, tokens = str(tiny_model_dir), 3000
    expected = contents(pipeline.index(one, store=tiny_store, model=model, tokens=tokens))
    assert len(expected) > 40
    assert on_ranks(2, indexed, str(many), str(tiny_store), model, tokens) == [str(many / "features.zarr")] * 2
    monkeypatch.setattr(over_ranks, "CORRELATION_BYTES", 3 * 12 * SHAPE.d_mlp)
    pipeline.index(little, store=tiny_store, model=model, tokens=tokens)
    for other in (many, little):
        found = contents(other / "features.zarr")
        assert found.keys() == expected.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=f"{other.name} {name}")
        assert not list(other.glob("*.partial"))
