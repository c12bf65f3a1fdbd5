"""What the verbs share: how a verb is added, common flags, settings from a file."""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
Handler = Callable[[argparse.Namespace], int]


def add_verb(verbs: Any, name: str, handler: Handler, summary: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name,
        help=summary,
        description=summary,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # a misspelt key of --config must not pass for a flag it begins
    )
    verb.add_argument("--config", metavar="FILE.toml", help="settings by flag name, e.g. tokens = 1000000; flags win")
    verb.set_defaults(handler=handler)
    return verb


def add_device(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where the model runs")


def add_dictionary_device(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where the dictionary runs")


def add_kernels(verb: argparse.ArgumentParser) -> None:
    add_dictionary_device(verb)
    verb.add_argument(
        "--kernels",
        default="auto",
        choices=["auto", "cpu", "reference", "triton"],
        help="what computes (default: the fastest, or SAE_KERNELS)",
    )


def add_text(verb: argparse.ArgumentParser, *, required: bool = True) -> None:
    verb.add_argument(
        "--text",
        action="append",
        required=required,
        metavar="SOURCE",
        help="file, directory, dataset or 'default'; may repeat",
    )


def add_dictionary(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("sae", help="directory of the dictionary")
    verb.add_argument("--acts", help="the activation store (default: the one it was trained on)")
    verb.add_argument("--model", help="directory, shipped name or hub id (default: the one it was trained on)")


def size(text: str) -> int:
    """Bytes of `500MB`, `2g` or `1000000`."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def resolved_device(device: str) -> str:
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise ValueError(
            f"--device {device}: there is none here; choose {', '.join(d for d in available if available[d])}."
        )
    return device


def with_config_file(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """Puts the settings of `--config FILE.toml` before the flags and leaves out those that flags give too."""
    peek = argparse.ArgumentParser(add_help=False)
    peek.add_argument("--config")
    path = peek.parse_known_args(arguments)[0].config
    if path is None or not arguments:
        return arguments
    try:
        settings = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--config {path}: {error}")
    given = {argument.split("=")[0] for argument in arguments}
    flags: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if flag in given:
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                parser.error(f"--config {path}: [{name}] is a table; give settings by flag name, e.g. tokens = 1000000")
            flags += ([flag] if item else []) if isinstance(item, bool) else [flag, str(item)]
    return [arguments[0], *flags, *arguments[1:]]


def _refuse_many_processes(verb: str) -> None:
    """What torchrun starts many times would do the same work many times, into one directory."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1:
        raise ValueError(
            f"sae {verb} runs as one process, and was started as {world} (WORLD_SIZE), which would all train the same "
            "dictionary. Start it once, without torchrun; `sae sweep` trains several on one pass over the rows. A "
            "data-parallel loop of your own gets each rank its rows from `sae.pipeline.open_rows`."
        )
