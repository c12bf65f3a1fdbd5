"""SoLU against ReLU by a rule instead of a rater: are the neurons of one twin described better than those of the other?

    python scripts/solu.py runs/solu/d runs/relu/d --tokens 100000 --firings 100 --json docs/measurements/solu.json

Each directory is a dictionary of the neurons (mlp.hook_post) of a one-layer native model; the twins differ in the
activation function alone. Scored are the neurons as the output matrix reads them (with SoLU after its LayerNorm), with
SoLU also before that norm, the same model's neurons with its weights shuffled, random directions among the neurons, and
the features. A unit counts as active on the rows of its --firings largest activations; its rule is learned on one half
of held-out contexts and scored on the other (`scripts/rules.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import figures
import rules
import torch
from torch import Tensor

from sae.analysis import baselines
from sae.analysis.rule_scores import Activations, estimates, score_units
from sae.evaluation.blocks import Block
from sae.lm import NativeModel
from sae.lm.transformer import Block as TransformerBlock
from sae.pipeline.controls import Setup
from sae.pipeline.resolve import autoencoder, model_of, store_of
from store.common import HELD_OUT

Units = Callable[[Block], Tensor]  # activations [row, unit] of a block


def scored(setup: Setup, units: Units, text: rules.Text, firings: int) -> dict[str, Any]:
    """Held-out F1 of the rules of all units; what is negative counts as silent."""
    first, found = 0, None
    for block in setup.blocks(HELD_OUT):
        acts = units(block) * block.keep.flatten()[:, None]
        found = found or Activations(acts.shape[1], firings)
        rows, of = (acts > 0).nonzero(as_tuple=True)
        found.add(first + rows.numpy(), of.numpy(), acts[rows, of].numpy())
        first += len(acts)
    assert found is not None
    f1, accuracy = score_units(found, text.kinds, text.keep)
    return {
        "units": len(found.firings),
        "scored": len(f1),
        "f1": estimates(f1),
        "balanced_accuracy": estimates(accuracy),
    }


def before_the_norm(model: NativeModel, hook_point: str) -> Units:
    """x · softmax(x) of the neurons' input, as the model computes it before the LayerNorm that follows."""
    block = model.module.blocks[int(hook_point.split(".")[1])]
    assert isinstance(block, TransformerBlock)
    mlp = block.mlp
    hook_in = hook_point.replace("hook_post", "hook_in")

    @torch.inference_mode()
    def units(block: Block) -> Tensor:
        acts: Tensor = mlp.act_fn(mlp.get_submodule("in")(model.capture(block.tokens, hook_in).flatten(0, 1)))
        return acts

    return units


def populations(directory: Path, args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    dictionary = autoencoder(directory)
    model = model_of(dictionary, None, device="cpu")
    assert isinstance(model, NativeModel)
    hook_point = dictionary.config["hook_point"]
    setup = Setup(store_of(dictionary, directory, None), model, hook_point, args.tokens, "cpu")
    text = rules.text_of(setup)

    def rows(block: Block) -> Tensor:
        return block.acts.flatten(0, 1).float()

    def measure(units: Units) -> dict[str, Any]:
        return scored(setup, units, text, args.firings)

    yield "neurons", measure(rows)
    if model.module.config.act_fn == "solu_ln":
        yield "neurons before the norm", measure(before_the_norm(model, hook_point))
    with baselines.shuffled_weights(model, args.seed):
        yield "shuffled model", measure(lambda block: model.capture(block.tokens, hook_point).flatten(0, 1).float())
    noise = torch.randn(dictionary.d_in, dictionary.d_in, generator=torch.Generator().manual_seed(args.seed))
    mean = torch.cat([rows(block)[block.keep.flatten()] for block in setup.blocks(HELD_OUT)]).mean(0)
    turned = torch.nn.functional.normalize(noise, dim=0)
    yield "random directions", measure(lambda block: (rows(block) - mean) @ turned)
    yield "features", measure(lambda block: dictionary.encode(rows(block)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionaries", nargs="+", type=Path, metavar="DIR", help="dictionaries, one for each twin")
    parser.add_argument("--tokens", type=int, default=100_000, help="held-out tokens, spread over the store")
    parser.add_argument("--firings", type=int, default=100, help="rows on which each unit counts as active")
    parser.add_argument("--seed", type=int, default=0, help="of random directions and the shuffled weights")
    parser.add_argument("--json", type=Path, help="file of results, one section per dictionary; added to")
    args = parser.parse_args()
    for directory in args.dictionaries:
        found = {"tokens": args.tokens, "firings": args.firings, "measured": dict(populations(directory, args))}
        print(f"\n{directory}, {args.firings} firings per unit\n{rules.show(found)}", flush=True)
        figures.record(args.json, directory.parent.name, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
