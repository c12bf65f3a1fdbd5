"""What may import what: the contracts of pyproject.toml hold, and each of them can fail."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sae", "store", "browser")
# runs import-linter without searching for its shell command
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(root), "COLUMNS": "200"},
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "*.json")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_import_contracts_hold() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


# one breach of each contract: (module, line to add, part of the contract's name)
BREACHES = [
    ("store/schema.py", "import sae.training.config", "imports point down only"),
    ("sae/training/config.py", "import browser.tokens", "imports point down only"),
    ("sae/training/config.py", "import sae.training.loop", "no cycles"),
    ("sae/dictionary/files.py", "import sae.evaluation.metrics", "a verb goes down from cli"),
    ("sae/jobs/progress.py", "import sae.lm.base", "a verb goes down from cli"),
    ("sae/indexing/map.py", "import sae.pipeline.index", "a verb goes down from cli"),
    ("sae/harvesting/harvest.py", "from store.activations import ActivationStore", "only sae.pipeline imports store"),
    ("store/schema.py", "import torch", "store knows neither torch"),
    ("browser/data.py", "import sae.dictionary.files", "only browser.live imports sae"),
    ("sae/training/loop.py", "import transformer_lens", "transformer_lens has one door"),
    ("browser/data.py", "import zarr", "zarr has one room"),
    ("sae/cli/tables.py", "import streamlit", "streamlit has one room"),
    ("sae/text/documents.py", "import datasets", "datasets has one door"),
    ("sae/indexing/build.py", "import umap", "umap has one door"),
    ("sae/cli/tables.py", "import scipy", "scipy, scikit-learn and pyarrow have one room"),
    ("sae/pipeline/search.py", "import sentence_transformers", "sentence_transformers has one door"),
    ("sae/circuits/depth.py", "import concept_erasure", "concept_erasure has one door"),
    ("sae/lm/base.py", "import huggingface_hub", "huggingface_hub has one door"),
    ("sae/jobs/progress.py", "import wandb", "trackers have one door"),
    ("sae/training/loop.py", "import triton", "triton has one room"),
    ("sae/training/adam.py", "import numba", "numba has one door"),
    ("sae/training/losses.py", "import sae.text.tokenizer", "the trainer runs on a bare machine"),
]


def test_torch_distributed_has_one_room() -> None:
    """import-linter knows packages of others only as a whole, so this contract is checked here."""

    def imports(path: Path) -> bool:
        return any(
            (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"))
            or (isinstance(node, ast.ImportFrom) and node.module == "torch" and "distributed" in map(_name, node.names))
            or (isinstance(node, ast.Import) and any(_name(a).startswith("torch.distributed") for a in node.names))
            or (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"))
            for node in ast.walk(ast.parse(path.read_text()))
        )

    found = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py") if imports(path)}
    assert found
    assert all(path.parent == Path("sae/parallel") for path in found), found


def _name(alias: ast.alias) -> str:
    return alias.name


def test_each_contract_can_be_broken(copy: Path) -> None:
    """All breaches at once, in a copy: every contract of pyproject.toml must be reported."""
    for module, line, _ in BREACHES:
        with (copy / module).open("a") as file:
            file.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1
    broken = [line for line in done.stdout.splitlines() if " BROKEN" in line]
    for _, _, name in BREACHES:
        assert any(name in line for line in broken), f"{name}: not reported in\n{done.stdout}"
    contracts = (ROOT / "pyproject.toml").read_text().count("[[tool.importlinter.contracts]]")
    assert len(broken) == contracts


def forbidden_calls(source: str) -> list[str]:
    """Uses of pickle: the module, and what unpickles behind another name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
            found.append(node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{alias.name}" for alias in node.names if alias.name in ("save", "load")]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in (("torch", "save"), ("torch", "load")):
                found.append(f"torch.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
    return found


PEERS_FILES = "sae/interop/files.py"
PICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


@pytest.mark.parametrize(
    "path", sorted(p.relative_to(ROOT).as_posix() for d in PACKAGES for p in (ROOT / d).rglob("*.py"))
)
def test_nothing_is_pickled(path: str) -> None:
    allowed = ["torch.load", "torch.save"] if path == PEERS_FILES else []
    assert sorted(forbidden_calls((ROOT / path).read_text())) == allowed


def test_peers_files_are_read_without_running_what_is_in_them() -> None:
    tree = ast.parse((ROOT / PEERS_FILES).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert calls
    assert all("weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords] for call in calls)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.save(1, 'x')",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "def f():\n    import dill",
    ],
)
def test_pickling_would_be_noticed(source: str) -> None:
    assert forbidden_calls(source)
    assert not forbidden_calls("import numpy as np\nnp.load('x', allow_pickle=False)\nimport json\njson.load(f)")
