"""`sae info`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sae.cli.flags import add_verb


def info(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "info",
        _run_info,
        "describe a dictionary, a store, an index, a model, a run, or this machine",
        example="sae info runs/a/first --feature 12",
    )
    verb.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="what to describe; without it: this machine and the kernels chosen on it",
    )
    verb.add_argument("--feature", type=int, metavar="N", help="show this feature of a dictionary with a feature index")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _run_info(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.cli.tables import description, feature_table

    if args.feature is not None:
        if not args.path:
            raise ValueError("--feature shows one feature of a dictionary: sae info DIRECTORY --feature N.")
        feature = pipeline.describe_feature(args.path, args.feature)
        print(json.dumps(feature, indent=2, ensure_ascii=False) if args.json else feature_table(feature))
    elif args.path is None and not args.json:
        for name, value in pipeline.machine_facts():  # line by line: the last ones take seconds
            print(description({name: value}), flush=True)
    else:
        found = pipeline.describe(args.path)
        print(json.dumps(found, indent=2, default=str) if args.json else description(found))
    return 0
