"""What a training under torchrun does when a rank fails: messages and seconds for each fault, and a series of kills.

    python scripts/check_ranks.py --kills 100 --json docs/measurements/ranks.json
    python scripts/check_ranks.py --only stall
    python scripts/check_ranks.py --recipes --json recipes.json
    python scripts/check_ranks.py --wide DIR --text TEXT --json wide.json

Each fault happens to rank 1 of two (gloo, CPU) in a small training; the seconds are from the fault until torchrun has
ended. Ranks that stall are given 10 s (SAE_RANK_TIMEOUT_S) instead of 300. Cutting a link needs network namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
TIMEOUT_S = 10
FLOAT64_BOUND = 1e-12  # of any tensor after 30 steps, as a share of its largest value
FAULTS = ("exception", "stall", "kill -9", "full disk", "unreadable shard", "SIGTERM", "SIGTERM while stalled")
A, B = "10.77.0.1", "10.77.0.2"  # the two machines of the cut link


def make_store(home: Path) -> Path:
    """20,000 random rows, as activations that came as an array."""
    np.save(home / "rows.npy", np.random.default_rng(0).normal(size=(20_000, 16)).astype(np.float32))
    out = home / "acts.zarr"
    command = [sys.executable, "-m", "sae.cli", "harvest", "--from", str(home / "rows.npy"), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def arguments(store: Path, out: Path, *, fault: str, mark: Path, tokens: int) -> list[str]:
    """What follows torchrun's own flags."""
    train = ["train", "--acts", str(store), "--out", str(out), "--recipe", "topk", "--l0", "4", "--d-sae", "64"]
    sizes = ["--batch-tokens", "64", "--tokens", str(tokens), "--shard", "features", "--device", "cpu"]
    return [str(HERE / "faulty_rank.py"), fault, str(mark), *train, *sizes]


def fault_happens(name: str, home: Path, store: Path) -> dict[str, Any]:
    """Starts a training, waits for its end after the fault, and says what it wrote."""
    out, mark = home / name.replace(" ", "-"), home / f"{name}.time"
    fault = "stall" if name == "SIGTERM while stalled" else "none" if name == "SIGTERM" else name
    endless = 64 * (2000 if fault != "full disk" else 60)
    command = ["torchrun", "--standalone", "--nproc-per-node", "2"]
    started = subprocess.Popen(
        [*command, *arguments(store, out, fault=fault, mark=mark, tokens=endless)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SAE_RANK_TIMEOUT_S": str(TIMEOUT_S if name == "stall" else 300), "OMP_NUM_THREADS": "1"},
    )
    if name.startswith("SIGTERM"):
        wait_for(mark if fault == "stall" else out / "metrics.jsonl", started)
        mark.write_text(str(time.time()))
        started.send_signal(signal.SIGTERM)
    _, said = started.communicate(timeout=180)
    return summary(name, time.time() - float(mark.read_text()), started.returncode, said)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not (path.exists() and path.stat().st_size) and process.poll() is None:
        time.sleep(0.1)


def summary(name: str, seconds: float, status: int | None, said: str) -> dict[str, Any]:
    lines = [
        line for line in said.splitlines() if "sae train:" in line or "sae: rank" in line or "stopped at step" in line
    ]
    return {"fault": name, "seconds": round(seconds, 1), "status": status, "messages": lines}


def link_is_cut(home: Path, store: Path) -> dict[str, Any]:
    """Two machines as network namespaces, one rank on each; the cable between them goes."""
    mark, ranks = home / "link.time", []
    names = ("rank-a", "rank-b")
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1])
        for name, end, address in zip(names, ("va", "vb"), (A, B), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        return {"fault": "cut link", "not_possible_here": str(getattr(error, "stderr", error)).strip()}
    try:
        for n, (name, end, address) in enumerate(zip(names, ("va", "vb"), (A, B), strict=True)):
            torchrun = ["torchrun", "--nnodes", "2", "--node-rank", str(n), "--local-addr", address]
            meet = ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-conf", f"is_host={1 - n}"]
            meet += ["--rdzv-endpoint", f"{A}:29400"]
            rest = arguments(store, home / "link", fault="none", mark=mark, tokens=64 * 20_000)
            ranks.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *torchrun, *meet, *rest],
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"GLOO_SOCKET_IFNAME": end, "SAE_RANK_TIMEOUT_S": str(TIMEOUT_S)},
                )
            )
        wait_for(home / "link" / "metrics.jsonl", ranks[0])
        cut = time.time()
        ip("-n", names[0], "link", "set", "va", "down")
        ended = []
        for rank in ranks:
            with suppress(subprocess.TimeoutExpired):  # torchrun itself may wait longer for the other machine
                rank.wait(timeout=90)
            seconds, status = time.time() - cut, rank.poll()
            rank.kill()
            ended.append(summary("cut link", seconds, status, rank.communicate()[1]))
        return {"fault": "cut link", "machines": ended}
    finally:
        for rank in ranks:
            rank.kill()
        for name in names:
            ip("netns", "del", name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="kill a run so often, at random moments (default: 0)")
    parser.add_argument(
        "--only", action="append", choices=[*FAULTS, "cut link"], help="this fault; may be repeated (default: all)"
    )
    parser.add_argument("--recipes", action="store_true", help="only train every recipe on each mesh, 30 steps")
    parser.add_argument("--wide", type=Path, metavar="DIR", help="only a run of 65,536 features, in this directory")
    parser.add_argument("--text", default="default", help="its text (default: the text on this machine)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if args.wide:
        from machine import hardware
        from wide_run import end_to_end

        shown({**hardware(), "wide_run": end_to_end(args.wide, args.text)}, args.json)
        return
    if args.recipes:
        from recipe_cases import of_all_recipes

        found = {"recipes": of_all_recipes()}
        shown(found, args.json)
        if (worst := max(found["recipes"]["float64"].values())) > FLOAT64_BOUND:
            raise SystemExit(f"in float64 a mesh is {worst:.0e} from one process, and may be {FLOAT64_BOUND:.0e}.")
        return
    found = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, gloo", "faults": []}
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        store = make_store(home)
        for name in args.only or [*FAULTS, "cut link"]:
            happens = link_is_cut(home, store) if name == "cut link" else fault_happens(name, home, store)
            print(json.dumps(happens, indent=2, ensure_ascii=False), flush=True)
            found["faults"].append(happens)
        if args.kills:
            from kill_series import series

            found["series"] = series(home, args.kills, random.Random(0))
            print(found["series"])
    shown(found, args.json)


def shown(found: dict[str, Any], path: Path | None) -> None:
    figures = json.dumps(found, indent=2, ensure_ascii=False)
    print(figures)
    if path:
        path.write_text(figures + "\n")


if __name__ == "__main__":
    main()
