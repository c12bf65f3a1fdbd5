"""Trains our recipes and SAELens' own on a world with known features; SAELens' evaluation judges both.

    python scripts/synthetic_world.py DIR --world 16k --samples 4000000 --d-sae 4096 --l0 25 --batch 1024
    python scripts/synthetic_world.py DIR --world 2k --samples 800000 --d-sae 512 --l0 8

The world is SynthSAEBench (Chanin & Garriga-Alonso 2026, arXiv 2602.14687): correlated, hierarchical features in fewer
dimensions. It is made, and its samples drawn, by the package sae-lens in an environment of its own (DIR/sae-lens, from
PyPI once). All see the same samples in the same order. Dictionaries are judged on the same --judged fresh samples by
`eval_sae_on_synthetic_data`: F1 of each feature as a classifier of the true one nearest to it, MCC (mean |cosine| of a
one-to-one matching), uniqueness, explained variance, L0, dead features. `random` is the control: a dictionary with
random directions whose features fire as often.

`--samples` and `--seeds` may be lists (commas): a learning curve, and repeats. `--peer-lr` lists learning rates; each
is a run of its own. Recipes and peers with a penalty instead of k take it from --set and --peer-set. Prints a table and
writes DIR/results.json; after an interruption, repeat the command: finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import check_peers
import machine
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import sae
from sae.dictionary.autoencoder import SAE
from sae.interop.saelens import write
from sae.training.config import parsed
from sae.training.recipes import recipe_named
from sae.training.rows import Batch
from store.common import write_json

SIDE = Path(__file__).resolve().parent / "peers" / "synthetic_world.py"
SAMPLES_SEED, JUDGE_SEED = 1, 2
RECIPES = "balanced,batch-topk,matryoshka,topk,jumprelu,towards-monosemanticity,gated"
PEERS = "batchtopk,matryoshka,jumprelu,standard"
COLUMNS = ("f1", "mcc", "uniqueness", "explained_variance", "l0", "dead", "seconds")


class FileRows:
    """Samples of a file in its order, as all trainers here see them; from the start again after the last one."""

    def __init__(self, file: Path, batch_tokens: int) -> None:
        self._rows = np.load(file, mmap_mode="r")
        self._batch_tokens, self.d_in = batch_tokens, self._rows.shape[1]

    def batch(self, step: int) -> Batch:
        start = step * self._batch_tokens % (len(self._rows) - self._batch_tokens + 1)
        return Batch(torch.from_numpy(self._rows[start : start + self._batch_tokens].astype(np.float32)))

    def sample(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        chosen = np.random.default_rng(seed).choice(len(self._rows), size=min(n, len(self._rows)), replace=False)
        return torch.from_numpy(self._rows[np.sort(chosen)].astype(np.float32))


class Bench:
    """The environment, the world, its samples, and the results so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = args.dir / args.world
        self.out.mkdir(parents=True, exist_ok=True)
        self.python = self._environment()
        self.world, self.file = self.out / "world", self.out / "samples.npy"
        if not (self.world / "synthetic_model.safetensors").exists():
            self.ask("make", args.world, self.world)
        if not self.file.exists() or len(np.load(self.file, mmap_mode="r")) < max(args.samples):
            self.ask("sample", self.world, self.file, max(args.samples), SAMPLES_SEED)
        results = args.dir / "results.json"
        self.found: dict[str, Any] = json.loads(results.read_text())["results"] if results.exists() else {}

    def _environment(self) -> Path:
        python, problem = check_peers.environment(
            self.args.dir / "sae-lens", check_peers.PEERS["sae-lens"], self.args.package, self.args.torch
        )
        if python is None:
            raise SystemExit(f"sae-lens could not be installed: {problem}")
        return python

    def ask(self, *arguments: object) -> str:
        """What SAELens' side prints; its progress goes to stderr."""
        command = [str(part) for part in (self.python, SIDE, *arguments)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def knows(self, name: str) -> bool:
        """Whether the run is finished; prints its row if so."""
        if name in self.found:
            print_row(name, self.found[name])
        return name in self.found

    def measure(self, name: str, about: dict[str, Any], directory: Path, seconds: float) -> None:
        """Judges a dictionary, prints its row and adds it to results.json."""
        answer = self.ask("judge", self.world, self.args.judged, JUDGE_SEED, directory)
        judged = json.loads(answer.splitlines()[-1])
        self.found[name] = about | {
            "f1": judged["classification"]["f1_score"],
            "precision": judged["classification"]["precision"],
            "recall": judged["classification"]["recall"],
            "mcc": judged["mcc"],
            "uniqueness": judged["uniqueness"],
            "explained_variance": judged["explained_variance"],
            "l0": judged["sae_l0"],
            "true_l0": judged["true_l0"],
            "dead": judged["dead_latents"],
            "shrinkage": judged["shrinkage"],
            "seconds": round(seconds, 1),
            "hardware": machine.hardware(),
        }
        write_json(self.args.dir / "results.json", {"results": self.found})
        print_row(name, self.found[name])


def print_row(name: str, values: dict[str, Any]) -> None:
    cells = " ".join(f"{values[column]:18.3f}" for column in COLUMNS)
    print(f"{name:58} {cells}", flush=True)


def run_ours(bench: Bench, recipe: str, samples: int, seed: int) -> None:
    args = bench.args
    has_k = "k" in recipe_named(recipe).defaults
    changed = [entry.replace("=", "") for entry in args.set]
    name = "-".join(["ours", args.world, recipe, f"d{args.d_sae}", f"l{args.l0:g}", str(samples), *changed, f"s{seed}"])
    if bench.knows(name):
        return
    rows = FileRows(bench.file, args.batch)
    settings = {"batch_tokens": args.batch} | parsed(args.set)
    started = time.monotonic()
    trained = sae.train(
        rows,
        bench.out / name,
        recipe=recipe,
        d_sae=args.d_sae,
        tokens=samples,
        seed=seed,
        l0=int(args.l0) if has_k else args.l0,
        config=settings,
    )
    seconds = time.monotonic() - started
    exported = bench.out / name / "sae-lens"
    write(trained, exported)
    about = {"by": "ours", "recipe": recipe, "samples": samples, "seed": seed, "settings": settings}
    bench.measure(name, about, exported, seconds)


def run_peer(bench: Bench, architecture: str, samples: int, seed: int, lr: float) -> None:
    args = bench.args
    changed = [entry.replace("=", "") for entry in args.peer_set]
    name = "-".join(
        ["saelens", args.world, architecture, f"d{args.d_sae}", f"l{args.l0:g}", str(samples), f"lr{lr:g}", *changed]
        + [f"s{seed}"]
    )
    if bench.knows(name):
        return
    settings = {
        "architecture": architecture,
        "samples": samples,
        "batch_samples": args.batch,
        "seed": seed,
        "runner": {"lr": lr, "lr_decay_steps": samples // args.batch // 5},
        "sae": {"d_sae": args.d_sae, **peer_settings(args, architecture)},
    }
    answer = bench.ask("train", bench.world, bench.file, bench.out / name, json.dumps(settings))
    seconds = json.loads(answer.splitlines()[-1])["seconds"]
    about = {"by": "sae-lens", "recipe": architecture, "samples": samples, "seed": seed, "settings": settings}
    bench.measure(name, about, bench.out / name, seconds)


def peer_settings(args: argparse.Namespace, architecture: str) -> dict[str, Any]:
    """k where the architecture has one, the widths of matryoshka's prefixes, and --peer-set."""
    given = {name: json.loads(value) for name, _, value in (entry.partition("=") for entry in args.peer_set)}
    settings: dict[str, Any] = {"k": args.l0} if architecture in ("batchtopk", "matryoshka") else {}
    if architecture == "matryoshka":  # the shares of Bussmann et al. 2025, those of our recipe
        shares = recipe_named("matryoshka").defaults["prefix_shares"]
        settings["matryoshka_widths"] = [round(share * args.d_sae) for share in shares[:-1]]
    return settings | given


def run_random(bench: Bench, seed: int) -> None:
    """The control: random directions, tied, with the threshold at which L0 is --l0."""
    args = bench.args
    name = f"random-{args.world}-d{args.d_sae}-l{args.l0:g}-s{seed}"
    if bench.knows(name):
        return
    x = FileRows(bench.file, args.batch).sample(16_384, seed)
    control = SAE(x.shape[1], args.d_sae, activation="jumprelu").requires_grad_(False)
    directions = torch.randn(args.d_sae, x.shape[1], generator=torch.Generator().manual_seed(seed))
    control.W_dec.copy_(torch.nn.functional.normalize(directions, dim=-1))
    control.W_enc.copy_(control.W_dec.T)
    control.b_enc.zero_()
    control.b_dec.copy_(x.mean(0))
    pre = control.pre_acts(x)
    control.threshold.fill_(pre.flatten().topk(round(args.l0 * len(x))).values[-1])
    control.config = {"recipe": "random", "hook_point": "none"}
    exported = bench.out / name
    write(control, exported)
    bench.measure(name, {"by": "control", "recipe": "random", "samples": 0, "seed": seed}, exported, 0.0)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, metavar="DIR", help="holds the environment, the world, samples and runs")
    parser.add_argument("--world", choices=["16k", "2k"], default="16k", help="number of true features")
    parser.add_argument("--samples", type=numbers, default=[4_000_000], help="samples each run sees; commas")
    parser.add_argument("--seeds", type=numbers, default=[0], help="seeds of the runs; commas")
    parser.add_argument("--d-sae", type=int, default=4096, help="number of features")
    parser.add_argument("--l0", type=float, default=25, help="active features per sample: k, or the λ search's target")
    parser.add_argument("--batch", type=int, default=1024, help="samples per step")
    parser.add_argument("--recipes", default=RECIPES, help="ours; commas; '' for none")
    parser.add_argument("--peers", default=PEERS, help="SAELens' architectures; commas; '' for none")
    parser.add_argument("--peer-lr", default="3e-4,1e-3", help="SAELens' learning rates, one run each; commas")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of our runs")
    parser.add_argument("--peer-set", action="append", default=[], metavar="NAME=JSON", help="a setting of theirs")
    parser.add_argument("--judged", type=int, default=100_000, help="fresh samples that judge a dictionary")
    parser.add_argument("--package", default="sae-lens==6.54.12", help="what pip installs")
    parser.add_argument("--torch", default="torch==2.13.0", help="the torch that pip installs with it")
    args = parser.parse_args()
    bench = Bench(args)
    print(f"{'run':58} " + " ".join(f"{name:>18}" for name in COLUMNS))
    for seed in args.seeds:
        run_random(bench, seed)
        for samples in args.samples:
            for recipe in filter(None, args.recipes.split(",")):
                run_ours(bench, recipe, samples, seed)
            for architecture in filter(None, args.peers.split(",")):
                for lr in map(float, args.peer_lr.split(",")):
                    run_peer(bench, architecture, samples, seed, lr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
