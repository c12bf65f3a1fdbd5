"""Shows how the features of one domain split as dictionaries grow: the features at each size and the edges between.

    sae compare runs/a/d512 runs/a/d4096 --out runs/cmp/1 && sae compare runs/a/d4096 runs/a/d16384 --out runs/cmp/2
    python scripts/splitting.py --acts runs/a/acts.zarr --domain base64 --json splitting.json \\
        --sae runs/a/d512 --sae runs/a/d4096 --sae runs/a/d16384 --compare runs/cmp/1 --compare runs/cmp/2

A feature belongs to the domain if more than half of its firings on held-out text are in it. An edge joins features
whose activations have masked cosine ≥ 0.4 (Bricken et al. 2023, "feature splitting"); `sae compare` writes the edges.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pyarrow.parquet as parquet
import torch

import sae
from store.activations import ActivationStore
from store.common import HELD_OUT

MIN_FIRINGS, MAIN_SHARE = 10, 0.5


@torch.inference_mode()
def firings(dictionaries: list[sae.SAE], acts: ActivationStore, domain: str, tokens: int) -> list[np.ndarray]:
    """Firings of each feature [d_sae, 2]: in the domain, and anywhere, on the first held-out tokens."""
    found = [np.zeros((dictionary.d_sae, 2), np.int64) for dictionary in dictionaries]
    documents, rows = acts.documents(HELD_OUT), 0
    for shard in sorted(acts.markers(HELD_OUT)):
        contexts = acts.read_contexts(HELD_OUT, shard)
        kept = contexts.keep.reshape(-1)
        mine = {int(number) for number, entry in documents.items() if entry[2] == domain}
        inside = np.isin(contexts.document.reshape(-1), list(mine))[kept]
        for dictionary, table in zip(dictionaries, found, strict=True):
            x = torch.from_numpy(acts.read_acts(HELD_OUT, shard, dictionary.config["hook_point"])[kept])
            fired = dictionary.feature_acts(x).sparse()
            row, feature = fired.support.rows.numpy(), fired.support.features.numpy()
            active = fired.values.numpy() > 0
            for column, chosen in enumerate((active & inside[row], active)):
                table[:, column] += np.bincount(feature[chosen], minlength=len(table))
        rows += int(kept.sum())
        if rows >= tokens:
            return found
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acts", type=Path, required=True, help="the activation store")
    parser.add_argument("--domain", required=True, help="a domain of the store's documents")
    parser.add_argument("--sae", type=Path, action="append", required=True, help="a dictionary; repeat, smallest first")
    parser.add_argument(
        "--compare",
        type=Path,
        action="append",
        required=True,
        help="comparison of each dictionary with the next; repeat",
    )
    parser.add_argument("--tokens", type=int, default=131_072, help="held-out tokens to count on")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    dictionaries = [sae.load(path) for path in args.sae]
    tables = firings(dictionaries, ActivationStore.open(args.acts), args.domain, args.tokens)
    ours = [np.flatnonzero((table[:, 1] >= MIN_FIRINGS) & (table[:, 0] > MAIN_SHARE * table[:, 1])) for table in tables]
    edges: list[dict[str, Any]] = []
    for level, path in enumerate(args.compare):
        columns = parquet.read_table(path / "edges.parquet").to_pydict()
        between = np.isin(columns["a"], ours[level]) & np.isin(columns["b"], ours[level + 1])
        edges += [
            {"level": level, "a": columns["a"][i], "b": columns["b"][i], "masked": round(columns["masked"][i], 3)}
            for i in np.flatnonzero(between)
        ]
    result = {
        "hardware": machine.hardware(),
        "domain": args.domain,
        "heldout_tokens": args.tokens,
        "rows": [dictionary.config["train"]["tokens"] for dictionary in dictionaries],
        "levels": [
            {"d_sae": table.shape[0], "features": [{"feature": int(f), "firings": int(table[f, 1])} for f in mine]}
            for table, mine in zip(tables, ours, strict=True)
        ],
        "edges": edges,
    }
    for level, part in enumerate(result["levels"]):
        children = [sum(e["level"] == level and e["a"] == f["feature"] for e in edges) for f in part["features"]]
        print(
            f"d_sae {part['d_sae']:>6,}: {len(children)} features of {args.domain}; edges to the next size: {children}"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
