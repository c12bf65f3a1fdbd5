"""Verbs that make, measure and hand on dictionaries."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from sae.cli.flags import add_dictionary, add_kernels, add_text, add_verb, size

# As in sae.pipeline, without its imports.
EXPORT_FORMATS = ("native", "sae-lens", "dictionary-learning", "sparsify")
IMPORT_FORMATS = ("sae-lens", "dictionary-learning", "sparsify", "llamascopium", "nanda", "openai")
DUMP_FORMATS = ("sae-dashboard", "paper")  # feature pages without weights


def train(verbs: Any) -> None:
    verb = add_verb(
        verbs, "train", _run_train, "learn a dictionary from an activation store, or from a model while it runs"
    )
    verb.add_argument("--acts", help="the activation store")
    verb.add_argument("--live", metavar="MODEL", help="instead: run this model on --text meanwhile, nothing on disk")
    add_text(verb, required=False)
    verb.add_argument("--out", required=True, help="directory of the dictionary, by custom runs/<run>/<name>")
    verb.add_argument(
        "--recipe", default="balanced", help="such as balanced, topk, jumprelu, towards-monosemanticity; see the README"
    )
    verb.add_argument("--d-sae", type=int, default=4096, help="number of features")
    verb.add_argument("--l0", type=float, help="active features per token wanted: sets k, or finds λ while training")
    verb.add_argument("--tokens", type=int, help="rows seen (default: four epochs of the store; 4M live)")
    verb.add_argument("--batch-tokens", type=int, help="rows per step")
    verb.add_argument("--seed", type=int, default=0, help="of initialisation and row order")
    verb.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="any other setting, e.g. lr=5e-4, l1=3 or exact=true; repeats",
    )
    verb.add_argument(
        "--hook-point",
        action="append",
        help="x's, then y's for a transcoder (default: the store's only one, or an MLP's)",
    )
    verb.add_argument("--keep", type=int, default=1, help="saved states to keep, the last one included")
    verb.add_argument(
        "--log-to", action="append", choices=["tensorboard", "wandb"], help="beside metrics.jsonl; may repeat"
    )
    verb.add_argument(
        "--max-ram",
        type=size,
        default="1GB",
        metavar="SIZE",
        help="of rows held: a larger store is shuffled in two levels",
    )
    add_kernels(verb)


def _refuse_many_processes(verb: str) -> None:
    """What torchrun starts many times would do the same work many times, into one directory."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1:
        raise ValueError(
            f"sae {verb} runs as one process, and was started as {world} (WORLD_SIZE), which would all train the same "
            "dictionary. Start it once, without torchrun; `sae sweep` trains several on one pass over the rows. A "
            "data-parallel loop of your own gets each rank its rows from `sae.pipeline.open_rows`."
        )


def _run_train(args: argparse.Namespace) -> int:
    _refuse_many_processes("train")
    from sae import pipeline
    from sae.config import parsed

    settings = {"batch_tokens": args.batch_tokens, "target_l0": args.l0}
    given = {name: value for name, value in settings.items() if value is not None}
    hook_point, target_hook_point = (*(args.hook_point or []), None, None)[:2]
    if bool(args.acts) == bool(args.live) or bool(args.live) != bool(args.text):
        raise ValueError("say where the rows come from: --acts STORE, or --live MODEL with --text SOURCE.")
    pipeline.train(
        pipeline.Live(args.live, args.text) if args.live else args.acts, args.out,
        recipe=args.recipe, d_sae=args.d_sae, tokens=args.tokens, seed=args.seed,
        config=given | parsed(args.set or []), hook_point=hook_point, target_hook_point=target_hook_point,
        kernels=args.kernels, device=args.device, keep=args.keep, log_to=args.log_to or [], max_ram_bytes=args.max_ram,
    )  # fmt: skip
    print(args.out)
    return 0


def sweep(verbs: Any) -> None:
    verb = add_verb(verbs, "sweep", _run_sweep, "train and evaluate a grid of dictionaries; draws their frontier")
    verb.add_argument("--acts", required=True, help="the activation store")
    verb.add_argument("--out", required=True, help="directory of the sweep, by custom runs/<run>/<sweep>")
    verb.add_argument("--recipe", action="append", required=True, help="may repeat")
    verb.add_argument("--d-sae", type=int, action="append", required=True, help="number of features; may repeat")
    verb.add_argument("--l0", type=float, action="append", required=True, help="active features per token; may repeat")
    verb.add_argument("--seed", type=int, action="append", help="of initialisation and row order; may repeat (0)")
    verb.add_argument("--tokens", type=int, help="rows each run sees (default: four epochs of the store)")
    verb.add_argument("--batch-tokens", type=int, help="rows per step")
    verb.add_argument("--set", action="append", metavar="NAME=VALUE", help="any other setting of every run; repeats")
    verb.add_argument("--hook-point", help="needed when the store holds several")
    verb.add_argument("--memory-gb", type=float, help="for runs trained at once (default: half of what is free)")
    add_kernels(verb)


def _run_sweep(args: argparse.Namespace) -> int:
    _refuse_many_processes("sweep")
    from sae import pipeline
    from sae.config import parsed

    batch = {"batch_tokens": args.batch_tokens} if args.batch_tokens else {}
    frontier = pipeline.sweep(
        args.acts, args.out, names=args.recipe, d_sae=args.d_sae, l0=args.l0, seeds=args.seed or [0],
        tokens=args.tokens, config=batch | parsed(args.set or []), hook_point=args.hook_point, kernels=args.kernels,
        device=args.device, memory_gb=args.memory_gb,
    )  # fmt: skip
    print(frontier)
    return 0


def evaluate(verbs: Any) -> None:
    verb = add_verb(verbs, "eval", _run_eval, "measure a dictionary on the frozen held-out split")
    add_dictionary(verb)
    add_kernels(verb)
    verb.add_argument("--json", action="store_true", help="print eval.json")


def _run_eval(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.report import eval_table

    result = pipeline.evaluate(args.sae, store=args.acts, model=args.model, device=args.device, kernels=args.kernels)
    print(json.dumps(result, indent=2) if args.json else eval_table(result))
    return 0


def index(verbs: Any) -> None:
    verb = add_verb(verbs, "index", _run_index, "build the feature index that the browser reads")
    add_dictionary(verb)
    add_kernels(verb)
    verb.add_argument("--tokens", type=int, default=1_000_000, help="tokens to index, held-out ones first")


def _run_index(args: argparse.Namespace) -> int:
    from sae import pipeline

    path = pipeline.index(
        args.sae, store=args.acts, model=args.model, tokens=args.tokens, device=args.device, kernels=args.kernels
    )
    print(path)
    return 0


def export(verbs: Any) -> None:
    verb = add_verb(verbs, "export", _run_export, "write a dictionary in another tool's layout")
    verb.add_argument("sae", help="directory of the dictionary")
    verb.add_argument("--format", default="native", choices=EXPORT_FORMATS, help="layout")
    verb.add_argument("--out", required=True, help="directory to write")


def _run_export(args: argparse.Namespace) -> int:
    from sae import pipeline

    print(pipeline.export(args.sae, args.format, args.out))
    return 0


def import_dictionary(verbs: Any) -> None:
    verb = add_verb(verbs, "import", _run_import, "take another tool's dictionary, or its feature pages to browse")
    verb.add_argument("source", help="directory, file, or hub:owner/repo[/path][@revision] (downloads)")
    verb.add_argument("--out", required=True, help="directory of the dictionary, by custom runs/<run>/<name>")
    verb.add_argument(
        "--format", choices=(*IMPORT_FORMATS, *DUMP_FORMATS),
        help="whose layout it is (default: as the files say); sae-dashboard (Neuronpedia too) and paper: feature pages",
    )  # fmt: skip
    verb.add_argument("--model", help="directory, shipped name or hub id to check it against and record")
    verb.add_argument("--hook-point", help="where it reads its activations (default: as the files say)")


def _run_import(args: argparse.Namespace) -> int:
    from sae import pipeline

    if args.format in DUMP_FORMATS:
        if args.model or args.hook_point:
            raise ValueError("--model and --hook-point are for dictionaries; feature pages are shown as they stand.")
        pipeline.import_dump(args.source, args.out, format=args.format)
        print(args.out)
        return 0

    sae = pipeline.import_dictionary(
        args.source, args.out, format=args.format, model=args.model, hook_point=args.hook_point
    )
    place = f"{sae.config['model'].get('id', 'a model it does not name')} at {sae.config['hook_point']}"
    print(f"{sae.config['imported']['format']}: {sae.show_shape()}, of {place}", file=sys.stderr)
    for note in sae.config["imported"]["notes"]:
        print(f"  {note}", file=sys.stderr)
    print(args.out)
    return 0
