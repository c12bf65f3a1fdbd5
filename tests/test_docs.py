"""The documentation is correct: its commands run, its flags exist, its links have targets, the site builds.

Commands and Python blocks run at tiny sizes; TINY and FLAGS say what is replaced, NOT_RUN what is left out and why.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from fakes import SHAPE, made_up_documents, write_jsonl, write_model

from sae.cli import build_parser, main
from sae.evaluation.feature_stats import firing_summary
from sae.evaluation.metrics import METRICS
from sae.pipeline.lenses import LENSES
from sae.training.recipes import RECIPES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
sys.path.insert(0, str(DOCS))
import hooks  # noqa: E402

# What is replaced in a command or a Python block before it runs: a pattern and its replacement.
TINY = {
    r"d_sae=4096, l0=20\)": "d_sae=64, l0=20, tokens=4_096)",
    r"\b(4096|16384)\b": "64",  # features
    r'"default"': '"made-up.jsonl"',
    r"--text (default|notes/|letters\.jsonl\.xz)": "--text made-up.jsonl",
    r"\btiny-relu-1l\b": "tiny-model",
    r"\battn-2l\b": "tiny-attention",
    r"(sae lens (?:heads|growth) \S+)": r"\1 --text made-up.jsonl",
    r"\.harvest\((.*), tokens=[\d_]+": r".harvest(\1, tokens=4_096, heldout_tokens=1024",
    r"tokens=1_600_000": "tokens=4_096",
    r"batch_tokens=1024": "batch_tokens=64",
}
# Flags put at the end of a verb's command, where they override those before.
FLAGS = {
    "harvest": "--tokens 4096 --heldout-tokens 1024",
    "train": "--d-sae 64 --tokens 4096 --batch-tokens 256",
    "sweep": "--tokens 2048 --batch-tokens 256",
    "index": "--tokens 4096",
    "controls": "--tokens 1024 --train-tokens 2048 --only random --only shuffled_model",
    "compare": "--tokens 1024",
    "lens": "--n 4",
    "steer": "--max-new-tokens 4",
}
# Commands that are not run, by a pattern, and the reason.
NOT_RUN = {
    r"^bash scripts/": "makes an environment, runs all tests or starts servers",
    r"^python scripts/": "each script has its own tests",
    r"^(git|cd|python3|pip) ": "installs",
    r"^sae browse": "starts a server; tests/test_browser_chromium.py does",
    r"--workers": "starts processes; tests/test_harvest_workers.py does",
    r"lm/": "trains a language model; tests/test_pretrain.py does",
    r"runs/more/|runs/both/": "needs two harvests; tests/test_store_upkeep.py merges stores",
    r"lens keys runs/two": "needs features about 24 tokens; tests/test_previous_token.py sets them by hand",
    r"clean runs/mine --acts": "needs the index of every dictionary; tests/test_store_upkeep.py has them",
}
# Pages with blocks that need the files made by the README's commands, in the order they run.
AFTER_README = [
    "recipes",
    "sinks-and-outliers",
    "formats",
    "store-guarantees",
    "your-own-text",
    "gpus-and-many-machines",
    "browser",
    "api",
]


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The command lines of a shell block, without comments; `cd x && y` as two."""
        joined = self.text.replace("\\\n", " ")
        lines = [re.sub(r"\s#\s.*$", "", line).strip() for line in joined.splitlines()]
        return [part.strip() for line in lines for part in re.split(r"&&|(?<!\S)\. \S+", line) if part.strip(" #")]


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
    return [
        Block(page.name, text[: match.start()].count("\n") + 1, match[1], match[2])
        for match in found
        if match[1] in languages
    ]


def tiny(text: str) -> str:
    for pattern, smaller in TINY.items():
        text = re.sub(pattern, smaller, text)
    return text


def run_page(page: Path) -> None:
    """Runs the blocks of a page in the current directory; Python blocks share their names."""
    names: dict[str, object] = {}
    for block in blocks(page, "bash", "python"):
        where = f"{block.page}:{block.line}"
        if block.language == "python":
            exec(compile(tiny(block.text), where, "exec"), names)
            continue
        for command in block.commands:
            if any(re.search(pattern, command) for pattern in NOT_RUN):
                continue
            program, verb, *rest = shlex.split(tiny(command))
            assert program == "sae", f"{where}: {command}: neither a sae command nor named in NOT_RUN"
            assert main([verb, *rest, *shlex.split(FLAGS.get(verb, ""))]) == 0, f"{where}: {command}"


@pytest.fixture
def workspace(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a tiny model and text, as the current one."""
    (tmp_path / "tiny-model").symlink_to(tiny_model_dir)
    write_jsonl(tmp_path / "made-up.jsonl", made_up_documents(800))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_of_the_readme_and_of_the_pages_that_build_on_it_runs(workspace: Path) -> None:
    for page in (ROOT / "README.md", *(DOCS / f"{name}.md" for name in AFTER_README)):
        run_page(page)


def test_every_block_of_the_tutorial_runs(workspace: Path) -> None:
    run_page(DOCS / "tutorial.md")


def test_every_block_of_the_tutorial_on_circuits_runs(workspace: Path) -> None:
    """With a model of two layers of attention, untrained, and three snapshots of it."""
    shape = replace(SHAPE, n_layers=2, attn_only=True)
    model = write_model(workspace / "tiny-attention", shape=shape)
    for seed, tokens in enumerate((0, 512, 1024)):
        write_model(model / "kept" / f"{tokens}-tokens", seed=seed, shape=shape)
    run_page(DOCS / "tutorial-circuit.md")
    circuits = {"circuit-induction-activation-head", "circuit-induction-path-head", "circuit-induction-judge-head"}
    assert {path.stem for path in Path("runs/lenses").rglob("*.json")} == {"heads", "growth"} | circuits
    assert Path("runs/two/attn-out/features.zarr").exists()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("<iframe" in output["data"].get("text/html", "") for output in shown), "no feature is shown"


def sae_commands() -> Iterator[tuple[str, list[str]]]:
    """Every `sae …` command of every page, as its words; `sae train: …` is a message."""
    for page in PAGES:
        for block in blocks(page, "bash", "text"):
            for command in block.commands:
                if command.startswith("sae ") and not re.match(r"sae (VERB|\w+:)", command):
                    yield f"{block.page}:{block.line}", shlex.split(command)[1:]


def test_every_sae_command_in_the_documentation_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(parser: argparse.ArgumentParser, message: str) -> None:
        raise ValueError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", fail)
    parser, seen = build_parser(), set()
    for where, words in sae_commands():
        try:
            parser.parse_args(words)
        except ValueError as error:
            pytest.fail(f"{where}: sae {' '.join(words)}: {error}")
        seen.add(words[0])
    assert seen >= set(hooks.verbs()) - {"pretrain", "store"}, "a verb is missing from the documentation"


# Flags of other programs that pages name.
OTHERS = {
    "--standalone",
    "--nnodes",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--max-restarts",
    "--nproc-per-node",
    "--no-python",
    "--cpus-per-task",
    "--mem",
    "--signal",
    "--strict",
    "--durations",
    "--help",
    "--version",
}


def test_every_flag_named_in_the_documentation_exists() -> None:
    known = {option for verb in hooks.verbs().values() for action in verb._actions for option in action.option_strings}
    for script in (ROOT / "scripts").glob("*.*"):
        known |= set(re.findall(r"--[a-z][a-z0-9-]+", script.read_text())) if script.suffix in (".py", ".sh") else set()
    for page in PAGES:
        code = re.findall(r"^```.*?^```|`[^`\n]+`", page.read_text(), re.M | re.S)
        named = {flag for part in code for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", part)}
        assert not named - known - OTHERS, f"{page.name} names flags that do not exist"


def test_every_flag_is_documented() -> None:
    page = hooks.command_line()
    for name, verb in hooks.verbs().items():
        (section,) = re.findall(rf"^## sae {name}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
        for action in hooks.arguments(verb):
            for option in action.option_strings or [action.dest]:
                assert f"`{option}`" in section, f"sae {name}: {option} is missing on the page"
            assert action.help or not action.option_strings, f"sae {name}: {action.option_strings} has no help"


def test_the_readme_is_short_and_every_link_leads_somewhere() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md")):
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_recipe_has_its_entry_with_loss_and_source() -> None:
    page = (DOCS / "recipes.md").read_text()
    sections = dict(re.findall(r"^### ([a-z0-9-]+)\n(.*?)(?=^##|\Z)", page, re.M | re.S))
    assert sections.keys() == RECIPES.keys()
    for name, recipe in RECIPES.items():
        assert recipe.loss in sections[name], f"{name}: its loss is {recipe.loss}"
        assert recipe.source in sections[name], f"{name}: its source is {recipe.source}"
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in RECIPES)


def test_every_metric_has_its_entry_with_its_version() -> None:
    page = hooks.on_page_markdown((DOCS / "metrics.md").read_text())
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \| (.*?) \| (\d+) \| (.+) \|$", page, re.M)}
    known = {name: {"version": m.version} for name, m in METRICS.items()} | firing_summary(
        np.zeros(1, np.int64), 1_000_000
    )
    for name, metric in known.items():
        assert rows[name][1] == str(metric["version"]), f"{name}: version {metric['version']}"
        assert rows[name][2], f"{name}: its trap is missing"


def source_of(*rooms: str) -> str:
    """The source of some rooms as one text, with strings that continue on the next line joined."""
    files = [path for room in rooms for path in (ROOT / room).rglob("*.[ps][yh]")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))


@pytest.mark.parametrize("name", LENSES)
def test_every_lens_has_a_page_with_its_formulas_controls_source_and_picture(name: str) -> None:
    text = (DOCS / f"lens-{name}.md").read_text()
    measures = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    assert measures
    assert re.search(r"\| measure \| formula \| (further )?control \|", text)
    assert re.search(r"\b(et al\.|nostalgebraist) 20\d\d", text), "no source"
    assert name == "facts" or re.search(r"!\[.+\]\(measurements/lens-\w+\.svg\)", text), "no picture"
    assert f"lens-{name}.md" in (DOCS / "lenses.md").read_text()


def test_the_page_on_the_browser_has_every_view_and_names_panels_that_exist() -> None:
    from browser.registry import VIEWS

    page, source = (DOCS / "browser.md").read_text(), source_of("browser")
    assert not {view.title for view in VIEWS.values()} - set(re.findall(r"^## (.+)$", page, re.M))
    for name in re.findall(r"\*\*([^*\n]+)\*\*", page):
        assert name.endswith((".", ":")) or name.removesuffix(" …") in source, f"no panel is called {name!r}"


def test_every_message_in_troubleshooting_is_one_of_ours() -> None:
    source = source_of("sae", "store", "browser", "scripts")
    for message in re.findall(r"^- \*\*`([^`]+)`\*\*", (DOCS / "troubleshooting.md").read_text(), re.M):
        assert message in source, f"no message says {message!r}"


def test_the_site_builds_without_warnings_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    packages = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": packages},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert len(pages) >= len(list(DOCS.glob("*.md")))
    for page in pages:
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="([^"]+)"', page.read_text())
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="([^"]+)"', page.read_text())
        assert not [url for url in loaded if re.match(r"https?:|//", url)], page.name
