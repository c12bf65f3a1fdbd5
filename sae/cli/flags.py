"""What the verbs share: how a verb is added, common flags, settings from a file."""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.text.sources import TextSource

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
MODEL = "a model's directory, the name of a shipped model (such as tiny-relu-1l), or a hub id (owner/name)"
Handler = Callable[[argparse.Namespace], int]


class Help(argparse.HelpFormatter):
    """Adds the default to a flag's help, if it has one and the text does not mention it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default is None or default is False or default in ("", argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: {default:,})" if isinstance(default, int) else f"{text} (default: {default})"


class Renamed(argparse.Action):
    """Flags of an earlier version: refused, with the new name in the message.

    `const` is the new name; `{name}` in it stands for the old one in the form of a setting (`d_vocab`).
    """

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, flag: str | None = None) -> None:
        assert flag is not None
        parser.error(f"{flag} is called {self.const.format(name=flag.lstrip('-').replace('-', '_'))} now.")


class Either(argparse.Action):
    """Flags that exclude each other, and so share an entry of the help; each fills a place of its own.

    `const` is {flag: place}; the values of `repeated` flags are collected.
    """

    def __init__(self, *args: Any, repeated: bool = False, **kwargs: Any) -> None:
        self.repeated = repeated
        super().__init__(*args, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        place = self.const[option_string]
        setattr(namespace, place, [*(getattr(namespace, place) or []), values] if self.repeated else values)


def add_verb(verbs: Any, name: str, handler: Handler, summary: str, *, example: str = "") -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"Example: {example}" if example else None,
        formatter_class=Help,
        allow_abbrev=False,  # a misspelt key of --config must not be read as the abbreviation of a flag
    )
    verb.add_argument(
        "--config",
        metavar="FILE.toml",
        help="read flags from this file, such as tokens = 1000000; flags given here win",
    )
    verb.set_defaults(handler=handler)
    return verb


def add_device(verb: argparse.ArgumentParser, *, mps: bool = False) -> None:
    """`mps` only for verbs that run nothing but a language model: dictionaries have no kernels for Apple's GPUs."""
    verb.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda", *(["mps"] if mps else [])],
        help="where to compute; auto uses a CUDA device if there is one, else the CPU",
    )


def add_kernels(verb: argparse.ArgumentParser) -> None:
    add_device(verb)
    verb.add_argument(
        "--kernels",
        default="auto",
        choices=["auto", "cpu", "reference", "triton"],
        help="implementation of the dictionary's operations; auto uses the environment variable SAE_KERNELS if it is "
        "set, else the fastest that runs on the device",
    )


def add_text(verb: argparse.ArgumentParser, *, help: str = "", required: bool = True) -> None:
    verb.add_argument(
        "--text",
        action="append",
        required=required,
        metavar="SOURCE",
        help=help or "a file, a directory, a dataset, or 'default' for the text on this machine; may be repeated",
    )


def add_text_column(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--text-column",
        metavar="NAME",
        help="the column of tables, or the key of JSON lines, that holds the text (default: text, else the only one of "
        "strings)",
    )


def add_special_tokens(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--special-tokens",
        action="store_true",
        help="read special tokens in texts as such, e.g. <|im_start|> as one token, instead of spelling them out; chat "
        "messages are always read so",
    )


def print_text_read(source: TextSource) -> None:
    """Says how much text a source gave, what was not read of it and why; nothing if no text was needed."""
    if source.report.documents:
        print(f"text read: {source.report.summary()}", file=sys.stderr)
        for problem in source.report.first_problems:
            print(f"  {problem}", file=sys.stderr)


def add_dictionary(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("sae", metavar="DICTIONARY", help="directory of the dictionary")
    verb.add_argument("--acts", metavar="STORE", help="activation store (default: the one it was trained on)")
    verb.add_argument("--model", help=f"{MODEL} (default: the model it was trained on)")


def add_settings(verb: argparse.ArgumentParser) -> None:
    """What `train` and `sweep` pass on to the recipe; `settings` reads it."""
    verb.add_argument("--batch-tokens", type=int, metavar="N", help="rows per training step (default: the recipe's)")
    verb.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="any other training setting, such as lr=5e-4, l1=3 or max_norm_multiple=10; may be repeated",
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of --batch-tokens and --set. Raises: ValueError for an unknown setting or a wrong value."""
    from sae.training.config import parsed

    given = {} if args.batch_tokens is None else {"batch_tokens": args.batch_tokens}
    return given | parsed(args.set or [])


def size(text: str) -> int:
    """Bytes of `500MB`, `2g` or `1000000`."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def with_config_file(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """Puts the settings of `--config FILE.toml` before the flags, without those that are given as flags too."""
    peek = argparse.ArgumentParser(add_help=False)
    peek.add_argument("--config")
    path = peek.parse_known_args(arguments)[0].config
    if path is None or not arguments:
        return arguments
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
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
                parser.error(
                    f"--config {path}: [{name}] is a table, but settings are given by flag name, such as "
                    "tokens = 1000000"
                )
            flags += ([flag] if item else []) if isinstance(item, bool) else [flag, str(item)]
    return [arguments[0], *flags, *arguments[1:]]
