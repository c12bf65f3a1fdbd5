"""Start-up: a verb imports what it needs and nothing else, and lazily loaded functions behave like any others."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
from fakes import HOOK_POINT

import sae
from sae import pipeline
from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import save
from sae.jobs.checkpoint import write_tensors
from sae.lm import NativeModel

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in Path(pipeline.__file__).parent.glob("*.py") if path.stem != "__init__")

RUN_VERB = """
import json, sys
from sae.cli import main
try:
    status = main(json.loads(sys.argv[1]))
except SystemExit as stopped:
    status = stopped.code
loaded = set(json.loads(sys.argv[2])) & set(sys.modules)
sys.exit(f"imported {sorted(loaded)}" if loaded else status)
"""


def run_python(program: str, *arguments: str) -> None:
    """Runs a program in a new process, which has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory, tiny_model: NativeModel) -> Path:
    """A dictionary with what steering needs: its model's name and each feature's maximum."""
    import torch

    directory = tmp_path_factory.mktemp("startup") / "sae"
    save(SAE(32, 24), directory, {"hook_point": HOOK_POINT, "model": tiny_model.identity()})
    stats = {"max": torch.ones(24), "p99": torch.ones(24)}
    write_tensors(directory / "feature_stats.safetensors", stats, {"tokens": 1, "split": "heldout"})
    return directory


HEAVY = ("torch", "scipy", "sklearn", "pyarrow", "pandas", "numba", "tokenizers", "transformer_lens", "datasets")
STEERING_NEEDS = ("torch", "numba", "tokenizers")  # the model, the dictionary's kernels, the prompt

VERBS: dict[str, tuple[Callable[[Path, Path], list[str]], tuple[str, ...]]] = {  # arguments, what may be imported
    "info of a dictionary": (lambda sae, store: ["info", str(sae)], ()),
    "info of a store": (lambda sae, store: ["info", str(store)], ()),
    "verify": (lambda sae, store: ["verify", str(store)], ()),
    "export --help": (lambda sae, store: ["export", "--help"], ()),
    "steer": (lambda sae, store: ["steer", str(sae), "--feature", "3", "--set", "5x"], STEERING_NEEDS),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_imports_only_what_it_needs(verb: str, dictionary: Path, tiny_store: Path) -> None:
    arguments, allowed = VERBS[verb]
    forbidden = [package for package in HEAVY if package not in allowed]
    run_python(RUN_VERB, json.dumps(arguments(dictionary, tiny_store)), json.dumps(forbidden))


def test_a_function_keeps_its_name_although_its_module_has_the_same_one() -> None:
    for module in MODULES:  # importing a submodule sets the package's attribute of that name
        import_module(f"sae.pipeline.{module}")
    for name in pipeline.__all__:
        assert not isinstance(getattr(pipeline, name), ModuleType), name
    shared = sorted(set(MODULES) & set(pipeline.__all__))
    assert shared == [
        "compare",
        "controls",
        "evaluate",
        "harvest",
        "index",
        "pretrain",
        "repair",
        "search",
        "sweep",
        "train",
    ]
    assert all(isinstance(getattr(pipeline, name), FunctionType) for name in shared)


@pytest.mark.parametrize(
    "imports",
    [
        "from sae import pipeline; import sae.pipeline.stores; import sae.pipeline.info",
        "import sae.pipeline.stores; from sae import pipeline",
        "from sae.pipeline.stores import verify; from sae import pipeline",
    ],
)
def test_public_names_are_functions_in_any_import_order(imports: str) -> None:
    program = f"{imports}\nimport types\nfrom sae.pipeline import describe\n"
    run_python(program + "assert all(isinstance(f, types.FunctionType) for f in (pipeline.verify, describe))")


def test_a_submodule_imported_first_does_not_hide_its_function() -> None:
    run_python("import sae.pipeline.train\nfrom sae import pipeline\nassert pipeline.train.__name__ == 'train'")


@pytest.mark.parametrize("package", [sae, pipeline], ids=lambda package: package.__name__)
def test_type_checkers_see_the_names_that_load_lazily(package: ModuleType) -> None:
    """The imports under TYPE_CHECKING are the names and modules of the lazy table."""
    assert package.__file__ is not None
    block = next(n for n in ast.parse(Path(package.__file__).read_text()).body if isinstance(n, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.name: line.module for line in block.body if isinstance(line, ast.ImportFrom) for alias in line.names}
    assert seen == package._HOME
    assert sorted(seen) == package.__all__


@pytest.mark.parametrize("package", [sae, pipeline], ids=lambda package: package.__name__)
def test_an_unknown_name_is_refused_with_the_names_there_are(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'tarin'; it has .*train"):
        _ = package.tarin
