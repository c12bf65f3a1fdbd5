"""Fixtures shared by the tests: one thread, a tiny model, made-up text, one small finished store."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import shape_checks  # before `sae`: its modules are imported with their shapes checked
import torch
from browser_sites import chromium, live_root, live_site, open_page, planted_root, planted_site, windows  # noqa: F401
from fakes import SEED, made_up_documents, write_jsonl, write_model
from sink_model import write_sink_model
from without_torch import no_waiting_for_the_disk, pytest_terminal_summary  # noqa: F401

from sae import pipeline
from sae.lm import NativeModel

check_shapes_again = shape_checks.check_shapes_again

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is made, so before any is


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(SEED, str(time.time_ns() % 10**9))  # workers inherit it


def pytest_report_header() -> str:
    return f"random seed: {os.environ[SEED]} (set {SEED} to repeat it)"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of this test: different in every session, the same again with the seed that was printed."""
    return random.Random(f"{os.environ[SEED]} {request.node.nodeid}")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path) -> NativeModel:
    return NativeModel(tiny_model_dir, str(tiny_model_dir))


@pytest.fixture(scope="session")
def model_with_sink(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Path, Any]:
    """A model of `transformers` with a sink at its first position: its directory, and the model itself."""
    directory = tmp_path_factory.mktemp("sink") / "model"
    return directory, write_sink_model(directory, tiny_model_dir / "tokenizer.json")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of documents with ids, domains and sources."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "made-up.jsonl", made_up_documents(4000))


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, tiny_model: NativeModel, tiny_text: Path) -> Path:
    """A finished store of 8,192 training and 1,024 held-out rows of 32; read it, do not change it."""
    out = tmp_path_factory.mktemp("run") / "acts.zarr"
    return pipeline.harvest(tiny_model, tiny_text, out, tokens=8192, heldout_tokens=1024)
