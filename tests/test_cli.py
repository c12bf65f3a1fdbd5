"""The `sae` command: help, configuration files, errors a person can act on, and the whole pipeline by its verbs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from fakes import HOOK_POINT

import sae
from sae.cli import build_parser, main
from sae.pipeline.resolve import store_of
from store.common import write_json

ROOT = Path(__file__).resolve().parent.parent
VERBS = (
    "pretrain",
    "harvest",
    "train",
    "sweep",
    "eval",
    "index",
    "browse",
    "search",
    "steer",
    "compare",
    "controls",
    "lens",
    "export",
    "import",
    "info",
    "verify",
    "clean",
    "store",
)


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^    {verb} ", said, re.M) for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_for_each_of_its_few_flags(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert "--config" in capsys.readouterr().out
    parser = build_parser()._subparsers._group_actions[0].choices[verb]  # type: ignore[union-attr, index]
    flags = [action for action in parser._actions if action.option_strings]
    shared = {"--help", "--config", "--text-column", "--special-tokens"}  # every verb's, or with every text
    shared |= {"--device", "--shard", "--precision"}  # where a verb runs, and in which numbers
    assert len([flag for flag in flags if not shared & set(flag.option_strings)]) <= 16
    assert all(action.help for action in flags)


def test_a_flag_of_an_earlier_version_says_what_it_is_called_now(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--text", "t", "--out", "o", "--n-ctx", "64"])
    assert stopped.value.code == 2
    assert "--n-ctx is called --set n_ctx=VALUE now." in capsys.readouterr().err


def test_no_verb_prints_help_and_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "VERB" in capsys.readouterr().out


def test_import_and_help_load_nothing_heavy() -> None:
    """`sae --help` must answer at once: it imports neither torch nor anything else that takes a second."""
    program = (
        "import sys, sae, sae.cli\n"
        "try: sae.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'zarr', 'streamlit', 'transformer_lens', 'transformers', 'datasets', 'tokenizers'}"
        " & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --- --config --------------------------------------------------------------------------------------------------------


def seen(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, object]:
    """What `sae train` would be called with."""
    from sae import pipeline

    calls: list[dict[str, object]] = []
    monkeypatch.setattr(pipeline, "train", lambda acts, out, **rest: calls.append({"acts": acts, "out": out, **rest}))
    assert main(list(arguments)) == 0
    return calls[0]


def test_a_config_file_gives_settings_and_flags_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.toml"
    file.write_text(
        'acts = "a"\nout = "o"\nd-sae = 128\ntokens = 4000\nl0 = 0.5\nset = ["exact=true"]\nbatch_tokens = 64\n'
    )
    call = seen(monkeypatch, "train", "--config", str(file), "--d-sae", "256", "--out=elsewhere")
    assert (call["acts"], call["out"], call["d_sae"], call["tokens"]) == ("a", "elsewhere", 256, 4000)
    assert (call["l0"], call["config"]) == (0.5, {"exact": True, "batch_tokens": 64})


def test_a_flag_that_repeats_replaces_the_files_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae import pipeline
    from sae.text import sources

    file = tmp_path / "harvest.toml"
    file.write_text('text = ["one", "two"]\nout = "o"\nhook-point = ["a", "b"]\n')
    opened: list[str] = []

    def open_text(spec: str, **_: object) -> None:
        opened.append(spec)
        raise sources.TextError("enough")

    monkeypatch.setattr("sae.lm.load_model", lambda *_, **__: None)
    monkeypatch.setattr(import_module("sae.pipeline.harvest"), "open_text", open_text)
    monkeypatch.setattr(pipeline, "harvest", lambda *_, **__: None)
    assert main(["harvest", "--config", str(file)]) == 2
    assert main(["harvest", "--config", str(file), "--text", "three"]) == 2
    assert opened == ["one", "three"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("d_seo = 4", "--d-seo"),
        ("token = 4", "--token"),  # not an abbreviation of tokens
        ("tokens = 'many'", "invalid int value: 'many'"),
        ("[train]\nlr = 1", "train"),
        ("torn = ", "train.toml"),
    ],
)
def test_a_config_file_with_a_mistake_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    file = tmp_path / "train.toml"
    file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--acts", "a", "--out", "o", "--config", str(file)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_config_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", "nowhere.toml"])
    assert stopped.value.code == 2
    assert "nowhere.toml" in capsys.readouterr().err


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("harvest --model nowhere --text T --out O", "no such directory"),
        ("harvest --model M --text nowhere.txt --out O", "no such file or directory"),
        ("harvest --model M --text T --out O --hook-point blocks.7.mlp.hook_post", "it has blocks.0.hook_resid_pre"),
        ("harvest --model M --text T --out O --seq-len 64", "seq_len = 64"),
        ("harvest --model M --text T --out O --tokens 0", "tokens must be at least 1"),
        ("harvest --model M --text T --out T/acts.zarr --tokens 64", "made-up.jsonl"),
        ("train --acts nowhere --out O", "nowhere"),
        ("train --acts A --out O --recipe topkk", "Did you mean 'topk'?"),
        ("train --acts A --out O --set l1=3", "no L1 penalty"),
        ("train --acts A --out O --tokens 5", "less than one batch"),
        ("train --acts A --out O --hook-point other", "blocks.0.mlp.hook_post"),
        ("eval nowhere", "is not a dictionary"),
        ("index nowhere", "is not a dictionary"),
        ("export nowhere --out O", "is not a dictionary"),
        ("import nowhere --out O", "nowhere: no such file or directory"),
        ("steer nowhere --feature 1 --ablate", "is not a dictionary"),
        ("steer nowhere --feature 1", "name the features and what to do with them"),
        ("steer nowhere --feature 1 --set 5x --ablate", "name the features and what to do with them"),
        ("steer nowhere --feature 1 --set five", "'five'"),
        ("steer nowhere --feature 1 --feature 2 --feature 3 --set 1 --set 2", "2 times for 3 features"),
        ("info nowhere", "nowhere"),
        ("verify nowhere", "nowhere"),
    ],
)
def test_wrong_input_is_exit_2_and_one_clear_message(
    arguments: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model_dir: Path,
    tiny_text: Path,
    tiny_store: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"M": tiny_model_dir, "T": tiny_text, "A": tiny_store, "O": tmp_path / "out"}
    words = [str(names.get(w, tiny_text / "acts.zarr" if w.startswith("T/") else w)) for w in arguments.split()]
    assert main(words) == 2
    captured = capsys.readouterr()
    messages = [line for line in captured.err.splitlines() if line.startswith(f"sae {words[0]}: ")]
    assert len(messages) == 1, captured.err
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("arguments", [["fly"], ["train"], ["train", "--acts", "a", "--out", "o", "--tokens", "x"]])
def test_wrong_use_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: sae" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(
    tiny_model_dir: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = str(tmp_path / "acts.zarr")
    command = ["harvest", "--model", str(tiny_model_dir), "--text", str(tiny_text), "--out", out, "--device", "cuda"]
    assert main(command) == 2
    assert "--device cuda: not available on this machine" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["store", "browser"])
def test_another_package_in_place_of_ours_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package was imported')")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from sae.cli import main; sys.exit(main(['info', '.']))"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert f"the package {name!r} found at {tmp_path} is not monosem's" in done.stderr
    assert "into its own environment" in done.stderr


# --- the whole pipeline by its verbs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_text: Path) -> Path:
    """runs/a/acts.zarr and runs/a/topk, made by the command."""
    root = tmp_path_factory.mktemp("runs") / "a"
    acts, out = str(root / "acts.zarr"), str(root / "topk")
    harvest = ["harvest", "--model", str(tiny_model_dir), "--text", str(tiny_text), "--out", acts]
    assert main([*harvest, "--tokens", "4096", "--heldout-tokens", "512", "--device", "cpu"]) == 0
    train = ["train", "--acts", acts, "--recipe", "topk", "--out", out, "--d-sae", "64", "--l0", "4"]
    assert main([*train, "--tokens", "20000", "--batch-tokens", "256"]) == 0
    assert main(["eval", out]) == 0
    assert main(["index", out, "--tokens", "2000"]) == 0
    return root


def test_the_verbs_leave_what_the_design_says(run: Path) -> None:
    files = {p.name for p in (run / "topk").iterdir()}
    assert files >= {
        "sae.safetensors",
        "config.json",
        "state.safetensors",
        "metrics.jsonl",
        "eval.json",
        "feature_stats.safetensors",
        "features.zarr",
    }
    config = json.loads((run / "topk" / "config.json").read_text())
    assert (config["kind"], config["recipe"], config["hook_point"]) == ("sae", "topk", HOOK_POINT)
    assert (config["d_in"], config["d_sae"], config["k"]) == (32, 64, 4)
    assert config["store"]["path"] == "../acts.zarr"


def test_eval_prints_a_table_or_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run / "topk")]) == 0
    assert "ce_loss_score_zero" in capsys.readouterr().out
    assert main(["eval", str(run / "topk"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run / "topk" / "eval.json").read_text())


def test_a_run_may_be_moved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dictionary finds its store by the path between them."""
    import shutil

    moved = Path(shutil.copytree(run, tmp_path / "elsewhere" / "a"))
    (moved / "topk" / "eval.json").unlink()
    assert main(["eval", str(moved / "topk")]) == 0
    assert (moved / "topk" / "eval.json").read_bytes() == (run / "topk" / "eval.json").read_bytes()


def test_a_link_to_a_dictionary_finds_the_store_of_the_dictionary(run: Path, tmp_path: Path) -> None:
    """The recorded path is relative to what the link points to; beside the link there is no store."""
    link = tmp_path / "shelf" / "best"
    link.parent.mkdir()
    link.symlink_to(run / "topk", target_is_directory=True)
    store = store_of(sae.load(link), link, None)
    assert Path(store.path).resolve() == (run / "acts.zarr").resolve()


def test_steer_writes_both_texts_the_same_for_the_same_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    feature = int(np.argmax(load_file(run / "topk" / "feature_stats.safetensors")["max"]))
    command = ["steer", str(run / "topk"), "--feature", str(feature), "--set", "8x", "--prompt", "the quick"]
    said = []
    for _ in range(2):
        assert main([*command, "--max-new-tokens", "12", "--seed", "3"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    base, steered = (re.search(rf"^{name} +(.*)$", said[0], re.M) for name in ("base", "steered"))
    assert base
    assert steered
    assert base[1].strip("'\"").startswith("the quick")
    assert base[1] != steered[1]
    assert main([*command[:4], "--scale", "1x", "--max-new-tokens", "12"]) == 0
    assert "the texts never differ" in capsys.readouterr().out


def test_steer_edits_of_several_kinds_over_a_sweep(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    from sae import pipeline

    units = pipeline.feature_units(run / "topk")
    first, second = np.argsort(-units["feature_max"])[:2].tolist()
    command = ["steer", str(run / "topk"), "--edit", f"{first}:set:4:p99", "--edit", f"{second}:ablate", "--seed", "3"]
    assert main([*command, "--max-new-tokens", "6", "--sweep", "0, 1,5x", "--prompt", "the quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["edits"] == [f"{first}:set:4:p99", f"{second}:ablate"]
    assert [row["factor"] for row in found["steered"]] == [0.0, 1.0, 5.0]
    assert all(len(row["ids"]) == 6 for row in (found["base"], *found["steered"]))
    assert sum(entry["steered"] for entry in found["next_tokens"]) <= 1.0001
    assert main([*command, "--max-new-tokens", "3", "--pinned", "--sweep", "1,5"]) == 0
    said = capsys.readouterr().out
    assert said.count("perplexity under the base model") == 2
    assert "'1,2,3,4,5,6,7,8,9,10" in said
    assert main(["steer", str(run / "topk"), "--edit", "1:set"]) == 2
    assert "has no value for 'set'" in capsys.readouterr().err
    assert main(["steer", str(run / "topk"), "--prompt", "the"]) == 2
    assert "name the features and what to do with them" in capsys.readouterr().err


def test_info_says_what_computes_here_and_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "kernels_here: cpu: active features in compiled loops, screened by a" in shown
    assert shown.index("python: ") < shown.index("device_here: ") < shown.index("kernels_here: ")
    assert "matmul_here: " in shown
    monkeypatch.setenv("SAE_KERNELS", "reference")
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["device_here"]) == ("machine", "cpu")
    why = "chosen by name, or nothing faster is available on this machine"
    assert found["kernels_here"] == f"reference: plain torch: {why}"


def test_export_info_and_verify(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "sae-lens")
    assert main(["export", str(run / "topk"), "--format", "sae-lens", "--out", out]) == 0
    assert capsys.readouterr().out.strip() == out
    assert (tmp_path / "sae-lens" / "cfg.json").is_file()
    for path, kind in (
        (run, "run"),
        (run / "topk", "sae"),
        (run / "acts.zarr", "activation store"),
        (run / "topk" / "features.zarr", "feature index"),
    ):
        assert main(["info", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kind"] == kind
        assert main(["info", str(path)]) == 0
        shown = capsys.readouterr().out
        assert f"kind: {kind}" in shown
        assert "kernels_here" not in shown  # it would take torch: `sae info` without a path says it
    assert main(["verify", str(run / "acts.zarr")]) == 0
    assert "every checksum holds" in capsys.readouterr().out


def test_verify_finds_a_damaged_shard_and_fails(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    acts = Path(shutil.copytree(run / "acts.zarr", tmp_path / "acts.zarr"))
    shard = next(p for p in sorted((acts / "hooks").rglob("*")) if p.is_file() and p.suffix != ".json")
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    assert main(["verify", str(acts)]) == 1
    said = capsys.readouterr().out
    assert shard.name in said
    assert f"{acts}: 1 problem" in said


def test_another_models_store_is_refused(
    run: Path, tmp_path: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fakes import write_model

    other = str(write_model(tmp_path / "other", seed=5))
    acts = str(tmp_path / "acts.zarr")
    assert (
        main(
            [
                "harvest",
                "--model",
                other,
                "--text",
                str(tiny_text),
                "--out",
                acts,
                "--tokens",
                "256",
                "--heldout-tokens",
                "64",
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert main(["eval", str(run / "topk"), "--acts", acts]) == 2
    assert "Harvest that model's activations first" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    """`sae info PATH | head -1`: what is printed is longer than a pipe holds."""
    write_json(tmp_path / "config.json", {"kind": "sae", "notes": ["x" * 1000] * 2000})
    command = subprocess.Popen(
        [sys.executable, "-m", "sae.cli", "info", str(tmp_path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert command.stdout is not None
    assert command.stdout.readline() == b"{\n"
    command.stdout.close()
    assert command.stderr is not None
    with command.stderr:
        assert command.stderr.read() == b""
    assert command.wait(60) == 1
