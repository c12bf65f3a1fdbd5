"""The `sae` command: parses, calls one function of the pipeline per verb, prints. Heavy imports happen inside verbs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sae import __version__

Handler = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit status: 0 done, 1 a check failed, 2 wrong use or input, 130 interrupted with all saved."""
    _refuse_shadowed_packages()
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(_with_config_file(parser, arguments))
    if not hasattr(args, "handler"):
        parser.print_help()
        return 2
    from sae.progress import Interrupted

    try:
        return args.handler(args)
    except (ValueError, OSError) as error:
        print(f"sae {args.verb}: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"\nsae {args.verb}: {error or 'interrupted'}", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sae", description="Dictionaries of a language model's features: train, look, steer, export."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for add in (_pretrain, _harvest, _train, _eval, _index, _browse, _steer, _export, _info, _verify):
        add(verbs)
    return parser


def _verb(verbs: Any, name: str, handler: Handler, summary: str) -> argparse.ArgumentParser:
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


def _device(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where the model runs")


def _text(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--text",
        action="append",
        required=True,
        metavar="SOURCE",
        help="file, directory, dataset or 'default'; may repeat",
    )


def _dictionary(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("sae", help="directory of the dictionary")
    verb.add_argument("--acts", help="the activation store (default: the one it was trained on)")
    verb.add_argument("--model", help="directory, shipped name or hub id (default: the one it was trained on)")


# --- verbs -----------------------------------------------------------------------------------------------------------


def _pretrain(verbs: Any) -> None:
    verb = _verb(verbs, "pretrain", _run_pretrain, "train a one-layer transformer (tokenizer first) on text")
    _text(verb)
    verb.add_argument("--out", required=True, help="directory of the model")
    verb.add_argument("--tokens", type=int, default=60_000_000, help="tokens seen in training")
    verb.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    verb.add_argument("--batch-contexts", type=int, default=32, help="contexts per step")
    verb.add_argument("--seed", type=int, default=0, help="of initialisation and data order")
    verb.add_argument("--d-model", type=int, default=128, help="residual width")
    verb.add_argument("--d-mlp", type=int, default=512, help="MLP width")
    verb.add_argument("--n-heads", type=int, default=12, help="attention heads of 16 dimensions")
    verb.add_argument("--n-ctx", type=int, default=256, help="context length in tokens")
    verb.add_argument("--d-vocab", type=int, default=8192, help="tokens of the byte-level BPE")


def _run_pretrain(args: argparse.Namespace) -> int:
    from sae.pretrain import PretrainConfig, pretrain
    from sae.text import combine, open_text
    from sae.transformer import TransformerConfig

    shape = TransformerConfig(
        d_model=args.d_model, d_mlp=args.d_mlp, n_heads=args.n_heads, n_ctx=args.n_ctx, d_vocab=args.d_vocab
    )
    config = PretrainConfig(train_tokens=args.tokens, lr=args.lr, batch_contexts=args.batch_contexts, seed=args.seed)
    print(pretrain(combine([open_text(spec) for spec in args.text]), Path(args.out), shape=shape, config=config))
    return 0


def _harvest(verbs: Any) -> None:
    verb = _verb(verbs, "harvest", _run_harvest, "stream a model's activations on text into a Zarr store")
    verb.add_argument("--model", default="tiny-relu-1l", help="directory, shipped name or hub id")
    _text(verb)
    verb.add_argument("--out", required=True, help="the store, by custom runs/<run>/acts.zarr")
    verb.add_argument("--tokens", type=int, default=2_000_000, help="training tokens (one row each)")
    verb.add_argument("--heldout-tokens", type=int, help="held-out tokens (default: a tenth, 65,536 to 262,144)")
    verb.add_argument("--hook-point", action="append", help="may repeat (default: blocks.0.mlp.hook_post)")
    verb.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"], help="on disk")
    verb.add_argument("--seq-len", type=int, help="context length in tokens (default: 256, or the model's if shorter)")
    _device(verb)


def _run_harvest(args: argparse.Namespace) -> int:
    from sae import harvesting, pipeline
    from sae.lm import load_model
    from sae.text import combine, open_text

    model = load_model(args.model, device=_resolved(args.device))
    source = combine([open_text(spec) for spec in args.text])
    hook_points = args.hook_point or [pipeline.DEFAULT_HOOK_POINT]
    heldout = args.heldout_tokens or harvesting.default_heldout_tokens(args.tokens)
    plan = harvesting.plan(args.tokens, heldout, args.seq_len or min(256, model.context_tokens))
    widths = [model.hook_width(hook_point) for hook_point in hook_points]
    print(f"forecast: {pipeline.forecast_harvest(plan, widths, args.dtype, Path(args.out))}", file=sys.stderr)
    pipeline.harvest(
        model, source, args.out, tokens=args.tokens, hook_points=hook_points, dtype=args.dtype,
        heldout_tokens=heldout, seq_len=args.seq_len,
    )  # fmt: skip
    if source.report.documents:
        print(f"text read: {source.report.summary()}", file=sys.stderr)
        for problem in source.report.first_problems:
            print(f"  {problem}", file=sys.stderr)
    print(args.out)
    return 0


def _train(verbs: Any) -> None:
    verb = _verb(verbs, "train", _run_train, "learn a dictionary from an activation store")
    verb.add_argument("--acts", required=True, help="the activation store")
    verb.add_argument("--out", required=True, help="directory of the dictionary, by custom runs/<run>/<name>")
    verb.add_argument("--recipe", default="topk", help="towards-monosemanticity or topk")
    verb.add_argument("--d-sae", type=int, default=4096, help="number of features")
    verb.add_argument("--tokens", type=int, help="rows seen (default: four epochs of the store)")
    verb.add_argument("--batch-tokens", type=int, help="rows per step")
    verb.add_argument("--lr", type=float, help="peak learning rate")
    verb.add_argument("--l1", type=float, help="λ on inputs scaled to E‖x‖² = d_in (config.json has other conventions)")
    verb.add_argument("--k", type=int, help="active features per token (topk)")
    verb.add_argument(
        "--dead-tokens",
        type=int,
        help="silent for this many rows = dead (default: an eightieth of the run, 100,000 to 10M)",
    )
    verb.add_argument("--seed", type=int, default=0, help="of initialisation and row order")
    verb.add_argument(
        "--exact", action="store_true", default=None, help="the paper's resampling counts instead of shares of the run"
    )
    verb.add_argument("--hook-point", help="needed when the store holds several")
    verb.add_argument(
        "--kernels",
        default="auto",
        choices=["auto", "cpu", "reference"],
        help="what computes (default: the fastest)",
    )


def _run_train(args: argparse.Namespace) -> int:
    from sae import pipeline

    settings = {name: getattr(args, name) for name in ("batch_tokens", "lr", "l1", "k", "dead_tokens", "exact")}
    pipeline.train(
        args.acts, args.out, recipe=args.recipe, d_sae=args.d_sae, tokens=args.tokens, seed=args.seed,
        config={name: value for name, value in settings.items() if value is not None}, hook_point=args.hook_point,
        kernels=args.kernels,
    )  # fmt: skip
    print(args.out)
    return 0


def _eval(verbs: Any) -> None:
    verb = _verb(verbs, "eval", _run_eval, "measure a dictionary on the frozen held-out split")
    _dictionary(verb)
    verb.add_argument("--json", action="store_true", help="print eval.json")


def _run_eval(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.report import eval_table

    result = pipeline.evaluate(args.sae, store=args.acts, model=args.model)
    print(json.dumps(result, indent=2) if args.json else eval_table(result))
    return 0


def _index(verbs: Any) -> None:
    verb = _verb(verbs, "index", _run_index, "build the feature index that the browser reads")
    _dictionary(verb)
    verb.add_argument("--tokens", type=int, default=1_000_000, help="tokens to index, held-out ones first")


def _run_index(args: argparse.Namespace) -> int:
    from sae import pipeline

    print(pipeline.index(args.sae, store=args.acts, model=args.model, tokens=args.tokens))
    return 0


def _browse(verbs: Any) -> None:
    verb = _verb(verbs, "browse", _run_browse, "open the feature browser on a directory of runs")
    verb.add_argument("root", nargs="?", default="runs", help="directory of runs")
    verb.add_argument("--port", type=int, default=8501, help="on 127.0.0.1")
    verb.add_argument("--no-open", action="store_true", help="do not open a browser window")


def _run_browse(args: argparse.Namespace) -> int:
    # A process of its own: `sae` is below `browser` and does not import it.
    command = [sys.executable, "-m", "browser.launch", args.root, "--port", str(args.port)]
    return subprocess.call(command + (["--no-open"] if args.no_open else []))


def _steer(verbs: Any) -> None:
    verb = _verb(verbs, "steer", _run_steer, "write with features changed, beside the same text unchanged")
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


def _export(verbs: Any) -> None:
    verb = _verb(verbs, "export", _run_export, "write a dictionary as safetensors for other tools")
    verb.add_argument("sae", help="directory of the dictionary")
    verb.add_argument("--format", default="native", choices=["native", "sae-lens"], help="layout")
    verb.add_argument("--out", required=True, help="directory to write")


def _run_export(args: argparse.Namespace) -> int:
    from sae import pipeline

    print(pipeline.export(args.sae, args.format, args.out))
    return 0


def _info(verbs: Any) -> None:
    verb = _verb(verbs, "info", _run_info, "describe a dictionary, store, index, model or run")
    verb.add_argument("path")
    verb.add_argument("--json", action="store_true", help="print JSON")


def _run_info(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.report import description

    found = pipeline.describe(args.path)
    print(json.dumps(found, indent=2, default=str) if args.json else description(found))
    return 0


def _verify(verbs: Any) -> None:
    verb = _verb(verbs, "verify", _run_verify, "check every checksum of an activation store")
    verb.add_argument("path")


def _run_verify(args: argparse.Namespace) -> int:
    from sae import pipeline

    problems = pipeline.verify(args.path)
    for problem in problems:
        print(problem)
    print(f"{args.path}: {len(problems)} found wrong" if problems else f"{args.path}: every checksum holds")
    return 1 if problems else 0


# --- around the verbs ------------------------------------------------------------------------------------------------


def _resolved(device: str) -> str:
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise ValueError(
            f"--device {device}: there is none here; choose {', '.join(d for d in available if available[d])}."
        )
    return device


def _with_config_file(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
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


def _refuse_shadowed_packages() -> None:
    """`store` and `browser` are common names: another package of that name would be imported instead of ours."""
    ours = Path(__file__).resolve().parent.parent
    for name in ("store", "browser"):
        spec = find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != ours:
            sys.exit(
                f"sae: the package {name!r} found at {found} is not monosem's (expected in {ours}). "
                "monosem wants an environment of its own: python -m venv … and install it there."
            )


if __name__ == "__main__":
    sys.exit(main())
