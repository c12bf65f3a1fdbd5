"""Features against neurons and controls by a rule instead of a rater: whose activations does a short rule predict?

    python scripts/rules.py runs/demo/sae --tokens 400000 --json docs/measurements/rules.json --svg docs/rules.svg

For each dictionary, the neurons of its layer and the controls of `sae controls` (PCA, ICA, random directions, and the
shuffled model if `sae controls` has trained a dictionary on it), on the same held-out text. A unit counts as active on
the rows of its --firings largest activations, so that units of all densities have equally many. The rule (one to six
tokens, previous tokens, pairs or domains) is learned on one half of the contexts; F1 and balanced accuracy are of the
other half.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import machine
import numpy as np
from figures import table
from panels import Line, Panel, drawing

import sae
from sae.analysis import baselines
from sae.analysis.rule_scores import Activations, estimates, score_units, survival
from sae.dictionary.autoencoder import SAE
from sae.dictionary.inference import FrozenSAE
from sae.indexing.rules import Kind, kinds_of_rule
from sae.lm.units import units_to_match
from sae.pipeline.controls import BASIS_ROWS, Setup
from sae.pipeline.resolve import autoencoder, model_of, store_of
from store.common import HELD_OUT, write_json

AT = [i / 20 for i in range(21)]


class Text(NamedTuple):
    """What the rules see: one row of each array per context."""

    kinds: list[Kind]
    keep: np.ndarray


def text_of(setup: Setup) -> Text:
    blocks = list(setup.blocks(HELD_OUT))
    tokens, keep = (np.concatenate([getattr(b, name).numpy() for b in blocks]) for name in ("tokens", "keep"))
    domain = np.concatenate([b.domain for b in blocks])
    return Text(kinds_of_rule(tokens, keep, np.where(keep, domain, -1)), keep)


def activations(setup: Setup, dictionary: SAE, firings: int, device: str) -> Activations:
    """The largest activations of each feature on the kept rows of the text."""
    placed, first, found = FrozenSAE(dictionary, device), 0, Activations(dictionary.d_sae, firings)
    for block in setup.blocks(HELD_OUT):
        acts = placed.encode(block.acts.flatten(0, 1))
        rows = acts.support.rows
        counted = block.keep.flatten()[rows] & (acts.values > 0)
        found.add(first + rows[counted].numpy(), acts.support.features[counted].numpy(), acts.values[counted].numpy())
        first += acts.n_rows
    return found


def measure(setup: Setup, dictionary: SAE, text: Text, args: argparse.Namespace) -> dict[str, Any]:
    found = activations(setup, dictionary, args.firings, args.device)
    f1, accuracy = score_units(found, text.kinds, text.keep)
    return {
        "units": dictionary.d_sae,
        "scored": len(f1),
        "silent": int((found.firings == 0).sum()),
        "f1": estimates(f1),
        "balanced_accuracy": estimates(accuracy),
        "f1_at_least": survival(f1, AT),
    }


def populations(directory: Path, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Each population's name and its measurement."""
    dictionary = autoencoder(directory)
    model = model_of(dictionary, None, device=args.device)
    setup = Setup(
        store_of(dictionary, directory, None), model, dictionary.config["hook_point"], args.tokens, args.device
    )
    text = text_of(setup)
    k = units_to_match(
        float(dictionary.config["train"]["target_l0"] or dictionary.config["train"]["k"]), dictionary.d_in
    )
    made = baselines.made_without_training(setup.training_rows(BASIS_ROWS), dictionary.d_sae, k, args.seed)
    yield "features", lambda: measure(setup, dictionary, text, args)
    for name in ("neurons", "pca", "ica", "random"):
        yield name, lambda name=name: measure(setup, made[name], text, args)  # type: ignore[misc]
    control = directory / "controls" / "shuffled_model"
    if (control / "sae.safetensors").exists():
        yield "shuffled_model", lambda: shuffled(setup, control, text, args)


def shuffled(setup: Setup, control: Path, text: Text, args: argparse.Namespace) -> dict[str, Any]:
    with baselines.shuffled_weights(setup.model, args.seed) as model:
        there = Setup(setup.store, model, setup.hook_point, args.tokens, args.device, live=True)
        return measure(there, sae.load(control), text, args)


def cell(estimate: dict[str, Any]) -> str:
    if not estimate:
        return "–"
    low, high = estimate["ci95"]
    return f"{estimate['value']:.3f} [{low:.3f}, {high:.3f}]"


def show(entry: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{found['scored']:,} of {found['units']:,}",
            *(cell(found["f1"].get(column, {})) for column in ("median", "above_0.6", "above_0.8")),
            cell(found["balanced_accuracy"].get("median", {})),
        ]
        for name, found in entry["measured"].items()
    ]
    return table(["", "units scored", "median F1", "F1 > 0.6", "F1 > 0.8", "median balanced accuracy"], rows)


def picture(title: str, measured: dict[str, Any]) -> str:
    """An SVG: for each population the share of units whose rule scores at least F1."""
    lines = [
        Line(name, list(zip(AT, found["f1_at_least"], strict=True)), control=name != "features")
        for name, found in measured.items()
        if found["scored"]
    ]
    return drawing([Panel(f"{title}: share of units", "whose rule has at least this F1", lines)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionaries", nargs="+", type=Path, metavar="DIR", help="trained dictionaries")
    parser.add_argument("--tokens", type=int, default=400_000, help="held-out tokens, spread over the store")
    parser.add_argument("--firings", type=int, default=200, help="rows on which each unit counts as active")
    parser.add_argument("--seed", type=int, default=0, help="of random directions, ICA and the shuffled weights")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="file of results, one entry per dictionary; added to")
    parser.add_argument("--svg", type=Path, help="draw the first dictionary's distributions")
    args = parser.parse_args()
    entries: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for directory in args.dictionaries:
        entry: dict[str, Any] = {"hardware": machine.hardware(), "firings": args.firings, "tokens": args.tokens}
        entry["measured"] = {}
        for name, measured in populations(directory, args):
            entry["measured"][name] = measured()
        print(f"\n{directory}, {args.firings} firings per unit\n{show(entry)}", flush=True)
        entries[directory.name] = entry
        if args.json:
            write_json(args.json, entries)
        if args.svg and directory == args.dictionaries[0]:
            args.svg.write_text(picture(directory.name, entry["measured"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
