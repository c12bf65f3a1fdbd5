"""`sae eval`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sae.cli.flags import add_dictionary, add_kernels, add_verb
from sae.jobs.ranks import is_first_rank


def evaluate(verbs: Any) -> None:
    verb = add_verb(
        verbs, "eval", _run_eval, "measure a dictionary on the held-out text", example="sae eval runs/a/first"
    )
    add_dictionary(verb)
    add_kernels(verb)
    verb.add_argument("--json", action="store_true", help="print eval.json instead of a table")


def _run_eval(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.cli.crosscoder_table import crosscoder_table
    from sae.cli.tables import eval_table

    result = pipeline.evaluate(
        args.sae, store=args.acts, model=args.model, device=args.device, kernels=args.kernels, over_ranks=True
    )
    if not is_first_rank():
        return 0
    if args.json:
        print(json.dumps(result, indent=2))
    elif result.get("kind") == "crosscoder":
        print(crosscoder_table(result, pipeline.crosscoder_control(args.sae)))
    else:
        print(eval_table(result))
    return 0
