"""Compares recipes by what fidelity does not show: features of domains, probes, absorption, alignment with neurons.

    sae harvest --text corpus.jsonl.xz --out runs/grid/acts.zarr --tokens 6200000 --hook-point blocks.0.mlp.hook_post \\
        --hook-point blocks.0.hook_resid_mid --hook-point blocks.0.mlp.hook_in --hook-point blocks.0.hook_mlp_out
    sae sweep --acts runs/grid/acts.zarr --out runs/grid/plain --hook-point blocks.0.mlp.hook_post \\
        --recipe topk --recipe gated --d-sae 4096 --l0 5 --l0 20 --tokens 4000000
    python scripts/grid.py runs/grid/plain --json docs/measurements/grid.json
    python scripts/grid.py --json docs/measurements/grid.json                     # the table of all entries
    python scripts/grid.py --json docs/measurements/grid.json --domains --l0 20   # the best features' F1 by domain
    python scripts/grid.py --json docs/measurements/grid.json --svg frontier.svg  # fidelity and F1 over L0

`sae sweep` trains and evaluates the dictionaries (`sae train` and `sae eval` a transcoder); give sweeps with different
settings separate directories. This script takes directories that hold such dictionaries, at any depth, measures the
rest and adds one entry to the JSON as soon as it is complete. An entry of the same settings and rows is not measured
again, so an interrupted command continues where it stopped. On a machine with many cores, run one sweep per seed in
parallel, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import machine
from figures import table
from panels import Line, Panel, drawing

FIDELITY = ("l0", "fvu", "ce_loss_score_zero", "ce_loss_score_mean", "delta_ce", "dead_share", "ultra_low_share")
QUALITY = ("mean_f1", "pure_features", "probe_k1", "probe_k5", "top_neuron")
UNITS = "topk_units_ce_loss_score_zero"  # as many of the layer's own units, the largest of each row
COLUMNS = (*FIDELITY, UNITS, "won_back", *QUALITY)
PROBE_TOKENS = 65_536
Entry = dict[str, Any]


# --- measuring -------------------------------------------------------------------------------------------------------


def evaluated(roots: Iterable[Path]) -> list[Path]:
    """The directories of evaluated dictionaries under `roots`."""
    return sorted({path.parent for root in roots for path in root.rglob("eval.json")})


def description(directory: Path) -> Entry:
    """The part of an entry that says what was trained, from a dictionary's config.json."""
    about = json.loads((directory / "config.json").read_text())
    train = about["train"]
    return {
        "recipe": train["recipe"],
        "d_sae": train["d_sae"],
        "target_l0": train["target_l0"],
        "seed": train["seed"],
        "rows": train["tokens"],
        "settings": changed_settings(train),
        "store_rows_sha256": about["store"]["rows_sha256"],
        "batch_tokens": train["batch_tokens"],
        "lambda": about["lambda"]["scaled"],
    }


def changed_settings(train: Entry) -> Entry:
    """The settings of a run that are not its recipe's own."""
    from sae.training import recipes

    asked = {name: train[name] for name in ("d_sae", "tokens", "seed", "target_l0")}
    _, config = recipes.resolve(train["recipe"], **asked)
    usual = json.loads(json.dumps(config.to_dict()))  # tuples become lists, as in config.json
    return {name: value for name, value in train.items() if value != usual.get(name)}


def name_of(run: Entry) -> str:
    """The key of an entry, e.g. `topk-4096-l0_5-batch_tokens_512-4M-s0`."""
    changed = "".join(f"-{name}_{value}" for name, value in run["settings"].items())
    return f"{run['recipe']}-{run['d_sae']}-l0_{run['target_l0']:g}{changed}-{run['rows'] / 1e6:g}M-s{run['seed']}"


def is_measured(run: Entry, entries: dict[str, Entry]) -> bool:
    """Whether the file has an entry with the same settings and the same rows."""
    entry = entries.get(name_of(run))
    return entry is not None and all(entry[key] == run[key] for key in ("rows", "store_rows_sha256"))


def measure(directory: Path) -> Entry:
    """The results of one dictionary: from its eval.json, and the probes and absorption measured here."""
    import sae

    dictionary = sae.load(directory)
    result = json.loads((directory / "eval.json").read_text())
    metrics, domains, decoder = result["metrics"], result["domains"], result["decoder"]
    units = metrics.get(UNITS, {}).get("value")  # an earlier evaluation has none
    entry = {
        "heldout_tokens": result["tokens"],
        **{name: metrics[name]["value"] for name in FIDELITY},
        UNITS: units,
        "won_back": won_back(metrics["ce_loss_score_zero"]["value"], units),
        "shrinkage": metrics["shrinkage"]["value"],
        "mean_f1": domains["mean_f1"],
        "pure_features": domains["pure_features"],
        "best_f1": {domain: best and round(best["f1"], 3) for domain, best in domains["best_feature"].items()},
        "top_neuron": decoder["top_neuron"]["median"],
        "nearest_cosine": decoder["nearest_cosine"]["median"],
        "eval_format": result["format"],
        "hardware": machine.hardware(),
    }
    if not dictionary.is_transcoder:
        where = (directory / dictionary.config["store"]["path"]).resolve()
        setup = _setup(where, dictionary.config["hook_point"], dictionary.config["model"]["id"])
        probed = setup.probed(dictionary, learned=True)
        entry |= {f"probe_{k}": value for k, value in probed["probe"].items()}
        entry["absorption"] = probed["absorption"] and probed["absorption"]["mean"]
    return entry


def won_back(score: float, units: float | None) -> float | None:
    """(score − units) / (1 − units), the share of what the layer's own units lose that a dictionary keeps, if any."""
    return None if units is None or units >= 1 else (score - units) / (1 - units)


@cache
def _setup(store: Path, hook_point: str, model: str) -> Any:
    """The text and the model that all dictionaries of one hook point are measured on."""
    import sae
    from sae.pipeline.controls import Setup
    from store.activations import ActivationStore

    return Setup(ActivationStore.open(store), sae.load_model(model), hook_point, PROBE_TOKENS)


def read_entries(path: Path) -> dict[str, Entry]:
    return json.loads(path.read_text()) if path.exists() else {}


def add(path: Path, name: str, entry: Entry) -> None:
    """Adds an entry to the file, which is replaced as a whole."""
    from store.common import write_json

    write_json(path, read_entries(path) | {name: entry})


# --- tables ----------------------------------------------------------------------------------------------------------


def results_table(entries: dict[str, Entry]) -> str:
    """One line for each recipe, settings and L0: the value, or the mean and range over seeds."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries.values():
        key = (entry["target_l0"], entry["recipe"], entry["d_sae"], json.dumps(entry["settings"]), entry["rows"])
        groups.setdefault(key, []).append(entry)
    rows = []
    for (l0, recipe, _, settings, _), group in sorted(groups.items(), key=lambda item: str(item[0])):
        name = recipe if settings == "{}" else f"{recipe} {settings}"
        rows.append(
            [name, f"{l0:g}", len(group), *(_cell([entry.get(column) for entry in group]) for column in COLUMNS)]
        )
    return table(["recipe", "target L0", "seeds", *COLUMNS], rows)


def domain_table(entries: dict[str, Entry], l0: float) -> str:
    """Held-out F1 of the best single feature for each domain, a column for each recipe trained for this L0."""
    groups: dict[str, list[dict[str, float | None]]] = {}
    chosen = [entry for entry in entries.values() if entry["target_l0"] == l0]
    usual_rows = statistics.mode(entry["rows"] for entry in chosen) if chosen else 0
    for entry in chosen:
        settings = "" if not entry["settings"] else f" {json.dumps(entry['settings'])}"
        length = "" if entry["rows"] == usual_rows else f", {entry['rows']:,} rows"
        groups.setdefault(entry["recipe"] + settings + length, []).append(entry["best_f1"])
    domains = sorted({domain for group in groups.values() for best in group for domain in best})
    rows = [[domain, *(_cell([best.get(domain) for best in group]) for group in groups.values())] for domain in domains]
    return table(["domain", *groups], rows)


def picture(entries: dict[str, Entry]) -> str:
    """Fidelity and domains over the L0 asked for, of recipes trained for three or more; means over seeds.

    Dashed: as many of the layer's own units, the largest of each row, as the first dictionary has active features.
    """
    asked: dict[str, set[float]] = {}
    for entry in entries.values():
        asked.setdefault(entry["recipe"], set()).add(entry["target_l0"])
    recipes = sorted(recipe for recipe, l0s in asked.items() if len(l0s) >= 3)
    chosen = [entry for entry in entries.values() if entry["recipe"] in recipes]

    def line(column: str, recipe: str, name: str = "") -> Line:
        values: dict[float, list[float]] = {}
        for entry in chosen:
            if entry["recipe"] == recipe and entry.get(column) is not None:
                values.setdefault(entry["target_l0"], []).append(entry[column])
        points = [(l0, statistics.mean(found)) for l0, found in sorted(values.items())]
        return Line(name or recipe, points, control=bool(name))

    fidelity = [line("ce_loss_score_zero", recipe) for recipe in recipes]
    fidelity.append(line(UNITS, recipes[0], "largest units"))
    domains = [line("mean_f1", recipe) for recipe in recipes]
    x_axis = "L0 asked for (log scale)"
    return drawing(
        [
            Panel("ce_loss_score, zero ablation", x_axis, fidelity, powers_of_2=True),
            Panel("mean F1 of the best feature for each domain", x_axis, domains, powers_of_2=True),
        ]
    )


def _cell(values: list[Any]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.4g}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.4g} to {max(known):.4g})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="directories of evaluated dictionaries to measure")
    parser.add_argument("--json", type=Path, required=True, help="the file of entries")
    parser.add_argument("--domains", action="store_true", help="print the best features' F1 by domain instead")
    parser.add_argument("--l0", action="append", type=float, help="with --domains: the target L0; may repeat (20)")
    parser.add_argument("--svg", type=Path, help="draw fidelity and F1 over L0 into this file")
    args = parser.parse_args()
    for directory in evaluated(args.runs):
        run = description(directory)
        if not is_measured(run, read_entries(args.json)):
            entry = run | measure(directory)
            add(args.json, name_of(run), entry)
            print(f"{name_of(run)}: " + ", ".join(f"{name} {_cell([entry.get(name)])}" for name in COLUMNS), flush=True)
    entries = read_entries(args.json)
    if args.svg:
        args.svg.write_text(picture(entries))
    print(
        "\n\n".join(domain_table(entries, l0) for l0 in args.l0 or [20.0]) if args.domains else results_table(entries)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
