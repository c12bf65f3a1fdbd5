"""The `sae` command: one file per verb parses its flags, calls one function of `sae.pipeline` and prints the result.

Heavy imports happen inside the verbs, so that `sae --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from sae import __version__
from sae.cli.browse import browse
from sae.cli.clean import clean
from sae.cli.compare import compare
from sae.cli.controls import controls
from sae.cli.evaluate import evaluate
from sae.cli.export import export
from sae.cli.flags import with_config_file
from sae.cli.harvest import harvest
from sae.cli.import_dictionary import import_dictionary
from sae.cli.index import index
from sae.cli.info import info
from sae.cli.lens import lens
from sae.cli.output import escape_unknown_characters, nobody_reads
from sae.cli.pretrain import pretrain
from sae.cli.search import search
from sae.cli.steer import steer
from sae.cli.store import store
from sae.cli.sweep import sweep
from sae.cli.train import train
from sae.cli.verify import verify
from sae.jobs.ranks import is_first_rank, rank_and_world

VERBS = (
    pretrain,
    harvest,
    train,
    sweep,
    evaluate,
    index,
    browse,
    search,
    steer,
    compare,
    controls,
    lens,
    export,
    import_dictionary,
    info,
    verify,
    clean,
    store,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit status: 0 done, 1 a check failed, 2 wrong usage or input, 130 interrupted."""
    escape_unknown_characters()
    _refuse_shadowed_packages()
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(with_config_file(parser, arguments))
    args.arguments = arguments  # harvest starts itself again, once for each worker
    if not hasattr(args, "handler"):
        parser.print_help()
        return 2
    from sae.jobs.progress import Interrupted

    try:
        status: int = args.handler(args)
        sys.stdout.flush()
        return status
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return 1
        if getattr(error, "reported_elsewhere", False):  # by another rank of this training
            return 2
        (rank, _), explained = rank_and_world(), _explained(error)
        if _said_by_another_rank(explained):
            return 2
        which = f"rank {rank}: " if rank and not explained.startswith("rank ") else ""
        print(f"sae {args.verb}: {which}{explained}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        if is_first_rank():
            print(f"\nsae {args.verb}: {error or 'interrupted'}", file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments once, if several ranks are given the same."""

    def error(self, message: str) -> NoReturn:
        if _said_by_another_rank(message):
            self.exit(2)
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="sae",
        description="Train, browse, steer and export sparse-autoencoder dictionaries of a language model.",
        epilog="`sae VERB --help` explains a verb and its flags.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for add in VERBS:
        add(verbs)
    return parser


def _explained(error: Exception) -> str:
    """The message; a full disk is named where the system's own message names no file."""
    from store.common import full_disk

    if isinstance(error, OSError) and not error.filename and (reason := full_disk(error)):
        return f"the output or a file could not be written: {reason}. Make room and repeat the command."
    return str(error)


def _said_by_another_rank(message: str) -> bool:
    """Whether another of the processes that torchrun started prints this error."""
    if rank_and_world()[1] == 1:
        return False
    from sae.parallel.said_once import said_by_another

    return said_by_another(message)


def _refuse_shadowed_packages() -> None:
    """`store` and `browser` are common names: another package of that name could be imported instead of ours."""
    ours = Path(__file__).resolve().parent.parent.parent
    for name in ("store", "browser"):
        spec = find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != ours:
            sys.exit(
                f"sae: the package {name!r} found at {found} is not monosem's (expected in {ours}). "
                "Install monosem into its own environment (python -m venv DIR), without the other package."
            )
