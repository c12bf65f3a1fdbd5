"""`sae lens`."""

from __future__ import annotations

import argparse
from typing import Any

from sae.cli.flags import add_device, add_text, add_verb

NAMES = (
    "circuit",
    "depth",
    "erase",
    "facts",
    "growth",
    "heads",
    "keys",
)  # those of sae.pipeline.lenses, which is slow to import
SETTINGS = ("text", "task", "by", "method", "layer", "concept", "n", "seed")


def lens(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "lens",
        _run_lens,
        "look at how a model computes, with a control beside each number",
        example="sae lens depth tiny-relu-1l",
    )
    verb.add_argument("name", metavar="NAME", choices=NAMES, help=f"{', '.join(NAMES)}; the page Lenses explains each")
    verb.add_argument("path", metavar="PATH", help="directory of a dictionary, or a model as in sae harvest --model")
    add_text(verb, required=False, help="text to measure on (default: the text on this machine); may be repeated")
    verb.add_argument(
        "--task", metavar="TASK", help="circuit: induction, ioi, facts or a FILE.jsonl of prompts (default: induction)"
    )
    verb.add_argument("--by", metavar="PART", help="circuit: position, head, neuron or feature (default: position)")
    verb.add_argument(
        "--method",
        metavar="METHOD",
        help="circuit: activation, gradient, path or judge (default: activation); facts: recall, gaussian, swap "
        "or rome (default: gaussian)",
    )
    verb.add_argument(
        "--layer", type=int, metavar="N", help="look at this layer only; facts: edit this one; keys: whose heads"
    )
    verb.add_argument("--concept", metavar="DOMAIN", help="erase: the domain of the text to erase")
    verb.add_argument("--n", type=int, metavar="N", help="how many contexts or prompts to measure on")
    verb.add_argument("--seed", type=int, metavar="N", help="seed of what is drawn at random, controls included")
    verb.add_argument(
        "--out",
        metavar="DIR",
        help="directory of the result (default: lenses in the dictionary's directory, runs/lenses/MODEL for a model)",
    )
    add_device(verb)


def _run_lens(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.circuits.results import read_result
    from sae.cli.lens_table import lens_table

    given = {name: getattr(args, name, None) for name in SETTINGS}
    settings = {name: value for name, value in given.items() if value is not None}
    path = pipeline.lens(args.name, args.path, out=args.out, device=args.device, **settings)
    print(lens_table(read_result(path)))
    print(path)
    return 0
