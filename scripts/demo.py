"""The demo: makes a dictionary of tiny-relu-1l on the default text, checks it against measured figures, opens the app.

    bash scripts/demo.sh               # makes the environment, then runs this
    python scripts/demo.py --minutes 2 --no-browse

Exit status 1 means that a figure is worse than scripts/demo_reference.json allows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dictionary import build

RECIPE = "matryoshka"
# Per minute of --minutes on 2 cores. The work is counted in rows, so the same --minutes gives the same result.
HARVEST_TOKENS, TRAIN_TOKENS, INDEX_TOKENS = 250_000, 800_000, 150_000
# Figures over seeds, by --minutes, written by `python scripts/demo_reference.py`.
REFERENCE = Path(__file__).with_name("demo_reference.json")


def settings(minutes: int) -> dict[str, int]:
    return {
        "tokens": HARVEST_TOKENS * minutes,
        "train_tokens": TRAIN_TOKENS * minutes,
        "index_tokens": INDEX_TOKENS * minutes,
    }


def check(result: dict[str, Any], minutes: int) -> list[str]:
    """One line per figure, next to that of as many of the layer's own units.

    A figure worse than median ± 3 standard deviations over seeds is marked with FAIL.
    """
    known = json.loads(REFERENCE.read_text()).get(str(minutes), {})
    lines = []
    for name in ("ce_loss_score_zero", "ce_loss_score_mean", "delta_ce", "fvu", "l0", "dead_share", "ultra_low_share"):
        value = result["metrics"][name]["value"]
        if value is None:
            lines.append(f"{name:20}         –   {result['metrics'][name]['formula']}")
            continue
        line = f"{name:20} {value:9.4f}"
        units = (result["metrics"].get(f"topk_units_{name}") or {}).get("value")
        if units is not None:
            line += f"   {result['units']['k']:,} largest own units {units:.4f}"
        if name in known:
            median, sd, better = known[name]["median"], known[name]["sd"], known[name]["better"]
            bound = median - 3 * sd if better == "higher" else median + 3 * sd
            failed = value < bound if better == "higher" else value > bound
            line += f"   measured median {median:.4f}, sd {sd:.4f}" + (f"   FAIL: beyond {bound:.4f}" if failed else "")
        lines.append(line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="directory of the run")
    parser.add_argument("--minutes", type=int, default=2, help="time budget on 2 cores, without the installation")
    parser.add_argument("--no-browse", action="store_true", help="stop after the table")
    args = parser.parse_args()
    if args.minutes < 1:
        parser.error("--minutes must be at least 1")
    result, seconds = build(["default"], args.out, recipe=RECIPE, **settings(args.minutes))
    lines = check(result, args.minutes)
    print(f"\ntiny-relu-1l, {RECIPE}, 4,096 features, {result['tokens']:,} held-out tokens of the default text")
    print("\n".join(lines))
    metrics, verdict = result["metrics"], result["units"]["verdict"]
    print(f"{'own units, L0':20} {metrics['units_l0']['value']:9.4f}")
    print(f"{'participation ratio':20} {metrics['units_participation_ratio']['value']:9.4f}")
    print(
        f"{'ce_gain_over_units':20} {metrics['ce_gain_over_units']['value']:9.4f}"
        + (f"   {verdict}" if verdict else "")
    )
    print("\n".join(f"{stage:20} {took:8.1f} s" for stage, took in seconds.items()))
    if any("FAIL" in line for line in lines):
        print("the demo's dictionary is worse than the measured figures: something is broken", file=sys.stderr)
        return 1
    if args.no_browse:
        return 0
    return subprocess.call([sys.executable, "-m", "sae.cli", "browse", str(args.out.parent)])


if __name__ == "__main__":
    sys.exit(main())
