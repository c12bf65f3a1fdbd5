"""Verbs that show: the browser, steered text, what an artefact is."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from sae.cli.flags import add_verb


def browse(verbs: Any) -> None:
    verb = add_verb(verbs, "browse", _run_browse, "open the feature browser on a directory of runs")
    verb.add_argument("root", nargs="?", default="runs", help="directory of runs")
    verb.add_argument("--port", type=int, default=8501, help="on 127.0.0.1")
    verb.add_argument("--no-open", action="store_true", help="do not open a browser window")


def _run_browse(args: argparse.Namespace) -> int:
    # A process of its own: `sae` is below `browser` and does not import it.
    command = [sys.executable, "-m", "browser.launch", args.root, "--port", str(args.port)]
    return subprocess.call(command + (["--no-open"] if args.no_open else []))


def steer(verbs: Any) -> None:
    verb = add_verb(verbs, "steer", _run_steer, "write with features changed, beside the same text unchanged")
    verb.add_argument("sae", help="directory of the dictionary")
    verb.add_argument("--feature", type=int, action="append", required=True, help="feature number; may repeat")
    verb.add_argument("--set", action="append", help="to this multiple of the feature's maximum, e.g. 5x")
    verb.add_argument("--add", action="append", help="plus this multiple of the feature's maximum, e.g. 2x")
    verb.add_argument("--scale", action="append", help="times this factor, e.g. 0.5x")
    verb.add_argument("--ablate", action="store_true", help="to zero")
    verb.add_argument("--prompt", default="", help="text to go on from")
    verb.add_argument("--max-new-tokens", type=int, default=40, help="tokens to write")
    verb.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    verb.add_argument("--seed", type=int, default=0, help="of the random stream both texts share")
    verb.add_argument("--model", help="directory, shipped name or hub id (default: the dictionary's)")


def _run_steer(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.steering import steer

    edits = _edits(args)
    dictionary, model = pipeline.open_pair(args.sae, args.model)
    result = steer(
        model, dictionary, args.prompt, edits, seed=args.seed, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, feature_max=pipeline.feature_max(args.sae),
    )  # fmt: skip
    print(f"base     {args.prompt + result.base_text!r}")
    print(f"steered  {args.prompt + result.steered_text!r}")
    where = "never" if result.first_divergence is None else f"at new token {result.first_divergence}"
    print(f"they part {where}; KL(steered ‖ base) {sum(result.kl) / len(result.kl):.3f} nats per token")
    return 0


def _edits(args: argparse.Namespace) -> list[Any]:
    """One edit per --feature: every mode flag is given once for all features, or once for each."""
    from sae.steering import Edit

    given = {mode: getattr(args, mode) for mode in ("set", "add", "scale") if getattr(args, mode)}
    if len(given) + args.ablate != 1:
        raise ValueError("say what to do with the features: one of --set 5x, --add 2x, --scale 0.5x, --ablate.")
    if args.ablate:
        return [Edit(feature, "ablate") for feature in args.feature]
    ((mode, values),) = given.items()
    if len(values) == 1:
        values = values * len(args.feature)
    if len(values) != len(args.feature):
        raise ValueError(f"--{mode} is given {len(values)} times for {len(args.feature)} features.")
    return [Edit(f, mode, _multiple(v)) for f, v in zip(args.feature, values, strict=True)]


def _multiple(text: str) -> float:
    try:
        return float(text.removesuffix("x"))
    except ValueError:
        raise ValueError(f"expected a multiple such as 5x, got {text!r}.") from None


def info(verbs: Any) -> None:
    verb = add_verb(verbs, "info", _run_info, "describe a dictionary, store, index, model or run")
    verb.add_argument("path")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _run_info(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.report import description

    found = pipeline.describe(args.path)
    print(json.dumps(found, indent=2, default=str) if args.json else description(found))
    return 0
