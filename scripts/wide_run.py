"""A run of 65,536 features on two processes, from the text to the browser: outcomes, and the memory of each rank.

Harvest; train on two ranks until a state is saved, kill -9 one rank, resume on one process; the first steps of the same
run on one process; eval; index by two workers; the app's API, and a page of it in Chromium; export, and the files
imported again.
`scripts/check_ranks.py --wide` calls it. It takes half an hour on two idle cores, and 3 GB of disk.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

D_SAE, L0, BATCH, STEPS = 65_536, 16, 512, 128
TEXT_ROWS, HELD_OUT_ROWS, INDEX_ROWS = BATCH * STEPS, 32_768, 16_384
SAE = [sys.executable, "-m", "sae.cli"]
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "sae.cli"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
FLOAT32_BOUND = 1e-5  # of a figure after 25 steps


def end_to_end(home: Path, text: str) -> dict[str, Any]:
    """The figures of each part; after an interruption the parts that `parts.json` has are not repeated."""
    store, many, one = home / "acts.zarr", home / "many", home / "one"
    rows = ["--tokens", str(TEXT_ROWS), "--heldout-tokens", str(HELD_OUT_ROWS)]
    parts: dict[str, Callable[[], Any]] = {
        "harvest": lambda: done(SAE, "harvest", "--model", "tiny-relu-1l", "--text", text, "--out", store, *rows),
        "train_on_two": lambda: killed_once_saved(training(store, many, "--shard", "features"), many),
        "resumed_on_one": lambda: measured(SAE, *training(store, many)),
        "eval": lambda: done(SAE, "eval", many) and figures(many / "eval.json"),
        "index_by_two": lambda: measured(TORCHRUN, "index", many, "--tokens", INDEX_ROWS),
        "browser": lambda: browsed(home, many),
        "page": lambda: page_of_densest(home, many),
        "export": lambda: exported(home, many),
        "train_on_one": lambda: stopped_after_a_log_line(training(store, one), one),
        "first_log_line": lambda: differences(found["train_on_two"]["first_log_line"], first_log_line(one)),
    }
    kept = home / "parts.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for name, part in parts.items():
        if name not in found:
            found[name] = part()
            kept.write_text(json.dumps(found, indent=2))
    sizes = {"d_sae": D_SAE, "d_in": 512, "k": L0, "batch_tokens": BATCH, "steps": STEPS, "indexed_rows": INDEX_ROWS}
    return {**sizes, **found}


def training(store: Path, out: Path, *more: object) -> list[object]:
    sizes = ["--d-sae", D_SAE, "--l0", L0, "--tokens", BATCH * STEPS, "--batch-tokens", BATCH]
    resampling = ["--set", "resample_shares=0.6"]  # once; the recipe's five times would take half of the time
    how = ["--recipe", "topk", "--device", "cpu"]
    return ["train", "--acts", store, "--out", out, *how, *sizes, *resampling, *more]


def done(program: list[str], *arguments: object) -> bool:
    subprocess.run([*program, *map(str, arguments)], check=True, env=ENVIRONMENT)
    return True


def measured(program: list[str], *arguments: object) -> dict[str, Any]:
    """Runs a command, and says the largest memory of each of its processes that ran `sae`."""
    started = subprocess.Popen([*program, *map(str, arguments)], env=ENVIRONMENT)
    memory = Memory(started.pid)
    while started.poll() is None:
        memory.look()
        time.sleep(0.5)
    assert started.returncode == 0, (arguments, started.returncode)
    return memory.figures()


class Memory:
    """The memory of a process' descendants that run `sae`, by their rank."""

    def __init__(self, parent: int) -> None:
        self.parent = parent
        self.peak: dict[int, int] = {}  # MB, by process
        self.usual: dict[int, list[int]] = {}

    def look(self) -> dict[int, int]:
        """Takes in what each process holds now; returns rank → process."""
        ranks: dict[int, int] = {}
        for process in [self.parent, *children(self.parent)]:
            try:
                words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                status = Path(f"/proc/{process}/status").read_text()
                variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            peak, now = (re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE) for name in ("VmHWM", "VmRSS"))
            if b"sae.cli" in words and not any(word.endswith(b"torchrun") for word in words) and peak and now:
                rank = next((int(each[5:]) for each in variables if each.startswith(b"RANK=")), 0)
                ranks[rank] = process
                self.peak[rank] = max(self.peak.get(rank, 0), int(peak[1]) * 1024 // 10**6)
                self.usual.setdefault(rank, []).append(int(now[1]) * 1024 // 10**6)
        return ranks

    def figures(self) -> dict[str, Any]:
        ranks = sorted(self.peak)
        usual = [int(np.median(self.usual[rank])) for rank in ranks]
        return {"peak_mb": [self.peak[rank] for rank in ranks], "median_mb": usual}


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def killed_once_saved(arguments: list[object], out: Path) -> dict[str, Any]:
    """Trains on two ranks, and kills rank 1 after the first line of the log and the first saved state."""
    command = [*TORCHRUN, *map(str, arguments)]
    log = out.with_suffix(".log").open("w")  # a pipe that nobody reads would fill up
    started = subprocess.Popen(command, env=ENVIRONMENT, stderr=log)
    memory, killed, saved, first = Memory(started.pid), 0.0, 0, {}
    while started.poll() is None:
        ranks = memory.look()
        if not killed and (out / "state.json").exists() and (first := first_log_line(out)) and 1 in ranks:
            saved = json.loads((out / "state.json").read_text())["step"]
            os.kill(ranks[1], signal.SIGKILL)
            killed = time.time()
        time.sleep(0.5)
    seconds = time.time() - killed
    assert killed, "ended before a state was saved"
    said = [line for line in out.with_suffix(".log").read_text().splitlines() if "sae train:" in line]
    state = sorted(path.stat().st_size for path in out.glob("state/*/*.safetensors"))
    return {
        **memory.figures(),
        "saved_step": saved,
        "seconds_from_kill_to_end": round(seconds, 1),
        "status": started.returncode,
        "said": [line.strip() for line in said],
        "state_files": len(state),
        "state_bytes": sum(state),
        "first_log_line": first,
    }


def first_log_line(out: Path) -> dict[str, Any]:
    """Empty as long as there is none."""
    log = out / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return json.loads(lines[0]) if lines and lines[0].endswith("\n") else {}


def stopped_after_a_log_line(arguments: list[object], out: Path) -> dict[str, Any]:
    """The memory of one process that trains until its first line of the log."""
    started = subprocess.Popen([*SAE, *map(str, arguments)], env=ENVIRONMENT)
    memory, asked = Memory(started.pid), False
    while started.poll() is None:
        memory.look()
        if not asked and first_log_line(out):
            started.send_signal(signal.SIGTERM)
            asked = True
        time.sleep(0.5)
    assert started.returncode == 130, started.returncode
    return memory.figures()


def differences(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The first line of both logs: its figures on two ranks and on one process."""
    assert first["step"] == second["step"]
    for name in ("loss", "fvu"):  # the sums of float32 have another order
        assert abs(first[name] / second[name] - 1) < FLOAT32_BOUND, (name, first[name], second[name])
    return {name: [first[name], second[name]] for name in ("step", "loss", "fvu", "l0", "dead_share")}


def figures(report: Path) -> dict[str, Any]:
    found = json.loads(report.read_text())["metrics"]
    return {name: found[name]["value"] for name in ("fvu", "l0", "dead_share", "ce_loss_score_zero")}


def browsed(home: Path, directory: Path) -> dict[str, Any]:
    """What the browser's API says of the dictionary, against the index itself."""
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    from browser import api
    from browser.state import ROOT_VARIABLE
    from store.features import FeatureIndex

    os.environ[ROOT_VARIABLE] = str(home)
    client = TestClient(Starlette(routes=api.routes()), base_url="http://localhost:8501")
    index = FeatureIndex.open(directory / "features.zarr")
    name = directory.name
    known = {each["id"]: each for each in client.get("/api/dictionaries").json()["dictionaries"]}
    table = client.get(f"/api/features?sae={name}").json()["features"]
    densest = sorted(table, key=lambda row: -row["density"])[:3]
    for row in densest:
        assert abs(row["density"] - len(index.firings(row["feature"])[0]) / index.kept_tokens) < 1e-12
    wanted = ",".join(str(row["feature"]) for row in densest)
    pages = client.get(f"/api/feature?sae={name}&feature={wanted}").json()["features"]
    return {
        "indexed": known[name]["indexed"],
        "features_listed": len(table),
        "features_that_fire": sum(row["density"] > 0 for row in table),
        "pages_read": len(pages),
    }


def page_of_densest(home: Path, directory: Path) -> dict[str, Any]:
    """Opens the page of the densest feature in Chromium; page.png shows it."""
    from bench_browser import CHROMIUM, Bench, server
    from playwright.sync_api import sync_playwright

    from store.features import FeatureIndex

    densest = int(np.argmax(FeatureIndex.open(directory / "features.zarr").stats["count"]))
    with server(home) as site, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        bench = Bench(browser.new_page(viewport={"width": 1280, "height": 900}), site, directory.name)
        bench.visit("Feature", f'.groups[data-key*=":{densest}:"]', feature=str(densest))
        page = bench.page
        page.screenshot(path=str(home / "page.png"))
        found = {
            "feature": densest,
            "tokens_shown": page.locator(".groups .tok").count(),
            "firing_tokens_shown": page.locator(".groups .tok.hit").count(),
            "exceptions": page.locator('[data-testid="stException"]').count(),
        }
        browser.close()
    assert found["firing_tokens_shown"] > 0, found
    assert not found["exceptions"], found
    return found


def exported(home: Path, directory: Path) -> dict[str, Any]:
    """Exports for another tool, imports the files again, and compares the dictionaries on stored rows."""
    import torch

    from sae.dictionary.files import load

    theirs, back = home / "exported", home / "back"
    done(SAE, "export", directory, "--format", "sae-lens", "--out", theirs)
    done(SAE, "import", theirs, "--format", "sae-lens", "--out", back)
    ours, again = (load(each).tensors() for each in (directory, back))
    return {"equal": all(torch.equal(tensor, again[name]) for name, tensor in ours.items())}
