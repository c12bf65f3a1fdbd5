"""One dictionary on many ranks: the selection of one process, and its numbers step by step."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from kill_series import series
from ranks import Case, StableKernels, bytes_of_a_step, exchanged_on_fake_ranks, on_ranks, run_on, train_all_on

from sae import pipeline
from sae.cli import build_parser
from sae.dictionary.files import load
from sae.jobs.checkpoint import CheckpointError
from sae.kernels.sparsity import BatchTopK, TopK
from sae.parallel.cost import cheapest, exchanged_bytes, modelled_step_s
from sae.parallel.decisions import refuse_different_settings
from sae.parallel.kernels import agreeing
from sae.parallel.launch import check_started, mesh_shape
from sae.parallel.mesh import ONE, Mesh
from sae.parallel.selection import among_largest, smallest_kept
from sae.training.recipes import RECIPES
from sae.training.state_files import read_state, saved_header

MESHES = [(1, 2), (2, 1), (2, 2)]


# --- the mesh --------------------------------------------------------------------------------------------------------


def test_one_rank_exchanges_nothing_and_changes_nothing() -> None:
    x = torch.randn(3, 4)
    for operation in (ONE.gather_rows, ONE.scatter_sum, ONE.own_rows, ONE.average, ONE.over_shards):
        assert operation(x) is x
    assert ONE.reduce(x, "sum", "world") is x
    assert ONE.scatter_sums([x]) == [x]
    assert ONE.tell({"a": 1}) == {"a": 1}
    assert ONE.agree(True)
    assert not ONE.agree(torch.tensor(False))
    kernels = StableKernels()
    assert agreeing(kernels, ONE) is kernels  # type: ignore[arg-type, comparison-overlap]
    assert not ONE.calls


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_are_even_parts_of_all_features(shards: int) -> None:
    mesh = Mesh()
    mesh.shards = shards
    parts = [mesh.features(23, i) for i in range(shards)]
    assert [feature for part in parts for feature in part] == list(range(23))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def exchanges(shape: tuple[int, int]) -> dict[str, Any]:
    mesh = Mesh(*shape)
    own = torch.full((2, 3), float(mesh.rank), requires_grad=True)
    gathered = mesh.gather_rows(own.detach())
    partial = torch.arange(float(len(gathered) * 3)).view(-1, 3).requires_grad_()
    summed = mesh.scatter_sum(partial * (mesh.rank + 1))
    (summed * (mesh.rank + 1)).sum().backward()
    assert partial.grad is not None
    return {
        "gathered": gathered.tolist(),
        "summed": summed.tolist(),
        "gradient": partial.grad.tolist(),
        "max": mesh.reduce(torch.tensor(mesh.rank), "max", "rows").item(),
        "agreed": (mesh.agree(mesh.rank == mesh.world - 1), mesh.agree(False)),
        "told": mesh.tell({"rank": mesh.rank, "text": "λ" * (mesh.rank + 1)}),
        "everyones": mesh.everyones("x" * mesh.rank),
        "rows": mesh.all_rows(mesh.own_rows(torch.arange(5.0)[:, None]), 5).flatten().tolist(),
    }


def test_what_ranks_exchange() -> None:
    """2 row groups × 2 shards: rank = 2 · row group + shard."""
    for rank, found in enumerate(on_ranks(4, exchanges, (2, 2))):
        group, shard = divmod(rank, 2)
        ranks = [2 * group, 2 * group + 1]
        assert found["gathered"] == [[float(r)] * 3 for r in ranks for _ in range(2)]
        partial = np.arange(12.0).reshape(4, 3)
        mine = slice(2 * shard, 2 * shard + 2)
        assert found["summed"] == (partial[mine] * sum(r + 1 for r in ranks)).tolist()
        # each row's sum is weighted by the rank that owns the row
        owners = np.repeat([r + 1 for r in ranks], 2)[:, None]
        assert found["gradient"] == (np.ones((4, 3)) * owners * (rank + 1)).tolist()
        assert found["max"] == 2 + shard
        assert found["agreed"] == (True, False)
        assert found["told"] == {"rank": 0, "text": "λ"}
        assert found["everyones"] == ["", "x", "xx", "xxx"]
        assert found["rows"] == [0, 1, 2, 3, 4]


# --- selection -------------------------------------------------------------------------------------------------------


def test_the_largest_of_a_row_are_those_of_a_stable_sort(rng: Any) -> None:
    for _ in range(200):
        n, k = rng.randint(1, 8), rng.randint(1, 8)
        values = torch.tensor([[rng.randint(-1, 3) for _ in range(n)] for _ in range(4)], dtype=torch.float32)
        for row, kept in zip(values.tolist(), among_largest(values, k).tolist(), strict=True):
            ranked = sorted((i for i in range(n) if row[i] > 0), key=lambda i: (-row[i], i))[:k]
            assert [i for i in range(n) if kept[i]] == sorted(ranked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_kept_value_is_found_digit_by_digit(rng: Any, dtype: torch.dtype) -> None:
    """Against sorting, with equal values and values of very different size."""
    bits_of = {torch.float32: (torch.int32, 3), torch.float64: (torch.int64, 6)}[dtype]
    for _ in range(100):
        n, wanted = rng.randint(0, 30), rng.randint(1, 20)
        values = torch.tensor([rng.choice([1e-40, 0.5, 0.5, 1.0, rng.random(), 1e30]) for _ in range(n)], dtype=dtype)
        bar, room = smallest_kept(values.view(bits_of[0]).long(), wanted, lambda counts: counts, bits_of[1])
        if n <= wanted:
            assert (bar, room) == (0, 0)
            continue
        expected = values.sort(descending=True).values[wanted - 1]
        assert torch.tensor([bar]).to(bits_of[0]).view(dtype) == expected
        assert room == wanted - int((values > expected).sum())


def selected(shape: tuple[int, int], seed: int, k: int, batch: bool) -> list[tuple[int, int]]:
    """The (row, feature) pairs that this rank's shard selects, with small whole numbers: many exact ties."""
    mesh, generator = Mesh(*shape), torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (8, 3), generator=generator).double()
    W_enc = torch.randint(-2, 3, (3, 7), generator=generator).double()
    lift = torch.randint(0, 2, (7,), generator=generator).double()
    rows = slice(mesh.row_group * (8 // mesh.row_groups), (mesh.row_group + 1) * (8 // mesh.row_groups))
    own = list(mesh.features(7))
    kernels = agreeing(StableKernels(), mesh)  # type: ignore[arg-type]
    rule = BatchTopK(k, lift[own]) if batch else TopK(k)
    support, pre = kernels.select(x[rows], kernels.prepare(W_enc[:, own]), torch.zeros(len(own)).double(), rule)
    assert torch.equal(pre, (x[rows] @ W_enc[:, own])[support.rows, support.features.long()])
    return [(rows.start + r, own[f]) for r, f in zip(support.rows.tolist(), support.features.tolist(), strict=True)]


def selections(shape: tuple[int, int], cases: list[tuple[int, int, bool]]) -> list[list[tuple[int, int]]]:
    return [selected(shape, *case) for case in cases]


@pytest.mark.parametrize("shape", MESHES)
def test_shards_select_what_brute_force_selects(shape: tuple[int, int], rng: Any) -> None:
    """The largest values, and of equal ones those of the first rank, then of its first entries."""
    cases = [(rng.randint(0, 10**6), rng.randint(1, 5), rng.random() < 0.5) for _ in range(40)]
    found = on_ranks(shape[0] * shape[1], selections, shape, cases)
    mesh = Mesh()
    mesh.row_groups, mesh.shards = shape
    shard_of = {feature: i for i in range(shape[1]) for feature in mesh.features(7, i)}
    for number, (seed, k, batch) in enumerate(cases):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-2, 3, (8, 3), generator=generator)
        pre = (x @ torch.randint(-2, 3, (3, 7), generator=generator)).tolist()
        lift = torch.randint(0, 2, (7,), generator=generator).tolist() if batch else [0] * 7
        ranked = sorted(
            ((r, f) for r in range(8) for f in range(7) if pre[r][f] > 0),
            key=lambda e: (-pre[e[0]][e[1]] - lift[e[1]], e[0] * shape[0] // 8, shard_of[e[1]], e),
        )
        expected = ranked[: 8 * k] if batch else [e for r in range(8) for e in [e for e in ranked if e[0] == r][:k]]
        assert sorted(e for rank in found for e in rank[number]) == sorted(expected), (seed, k, batch)


# --- training --------------------------------------------------------------------------------------------------------

DEAD = {"dead_tokens": 16}
CASES = {
    "topk": Case("topk", {"k": 3, "resample_shares": (), **DEAD}),
    "topk, ties": Case("topk", {"k": 3, "resample_shares": (), "aux_coefficient": 0.0}, tied=True),
    "topk, multi": Case("topk", {"k": 2, "multi_k": 4, "resample_shares": (), **DEAD}),
    "batch-topk": Case("batch-topk", {"k": 3, **DEAD}),
    "batch-topk, ties": Case("batch-topk", {"k": 3, "aux_coefficient": 0.0}, tied=True),
    "balanced": Case("balanced", {"k": 3, "min_density": 0.02}),
    "relu": Case("towards-monosemanticity", {"target_l0": 4, "resample_shares": (), **DEAD}),
    "relu, free norms": Case("anthropic-2024-04", {"target_l0": 4, "clip": 0.5}),
    "matryoshka": Case("matryoshka", {"k": 3, **DEAD}),
    "gated": Case("gated", {"target_l0": 4, "resample_shares": (), **DEAD}),
    "jumprelu": Case("jumprelu", {"target_l0": 4, "min_density": 0.02}),
    "p-anneal": Case("p-anneal", {"target_l0": 4, "resample_shares": (), **DEAD}),
    "transcoder": Case("transcoder", {"target_l0": 4, "skip": True}),
    "reseeding": Case("topk", {"k": 3, "resample_shares": (0.3, 0.6), **DEAD}),
    "resampling": Case("towards-monosemanticity", {"l1": 60.0, "lr": 0.02, "resample_shares": (0.5, 0.8), **DEAD}),
    "gated resampling": Case("gated", {"l1": 60.0, "lr": 0.02, "resample_shares": (0.5, 0.8), **DEAD}),
    "crosscoder": Case("crosscoder", {"target_l0": 4}),
    "end-to-end": Case("end-to-end", {"resample_shares": ()}),
}


@pytest.fixture(scope="module")
def on_one() -> list[dict[str, Any]]:
    (found,) = on_ranks(1, train_all_on, (1, 1), list(CASES.values()))
    return found


@pytest.mark.parametrize("shape", MESHES)
def test_many_ranks_compute_what_one_process_computes(on_one: list[dict[str, Any]], shape: tuple[int, int]) -> None:
    """Every recipe, in float64: curves, all parameters, Adam's moments and counters, after 30 steps.

    Each recipe once on meshes of one axis, and in all its variants on one of both.
    """
    recipes = {case.recipe: name for name, case in reversed(CASES.items())}
    cases = CASES if shape == (2, 2) else {name: CASES[name] for name in recipes.values()}
    wanted, worst = dict(zip(CASES, on_one, strict=True)), {}
    for found in on_ranks(shape[0] * shape[1], train_all_on, shape, list(cases.values())):
        for name, mine in zip(cases, found, strict=True):
            expected = wanted[name]
            worst |= {(name, key): deviation(mine[key], expected[key]) for key in expected}
    assert max(worst.values()) < 1e-12, {where: by for where, by in worst.items() if by >= 1e-12}


def test_the_cases_are_the_hard_ones(on_one: list[dict[str, Any]]) -> None:
    found = dict(zip(CASES, on_one, strict=True))
    assert all(found[name]["dead"] > 100 for name in ("topk", "batch-topk", "matryoshka"))  # AuxK has work
    assert all(found[name]["placed"] for name in ("reseeding", "resampling", "gated resampling"))
    assert {case.recipe for case in CASES.values()} == set(RECIPES)


def deviation(found: Any, expected: Any) -> float:
    """The largest difference, as a share of the largest value."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max(initial=0) / max(1e-30, np.abs(expected).max(initial=0)))


# --- whole runs ------------------------------------------------------------------------------------------------------

TOPK = ("topk", {"k": 3, "dead_tokens": 16})


def test_a_run_continues_on_its_mesh_bit_for_bit_and_on_any_other_closely(tmp_path: Path) -> None:
    """Interrupted by a signal to one rank: all stop at the same step, after one save."""
    on_ranks(2, run_on, (1, 2), str(tmp_path / "unbroken"), *TOPK)
    assert on_ranks(2, run_on, (1, 2), str(tmp_path / "cut"), *TOPK, 21) in ([steps, steps] for steps in range(15, 21))
    assert not (tmp_path / "cut" / "state.safetensors").exists()
    for name in ("one", "rows"):
        shutil.copytree(tmp_path / "cut", tmp_path / name)
    assert on_ranks(2, run_on, (1, 2), str(tmp_path / "cut"), *TOPK) == [40, 40]
    assert on_ranks(1, run_on, (1, 1), str(tmp_path / "one"), *TOPK) == [40]
    assert on_ranks(2, run_on, (2, 1), str(tmp_path / "rows"), *TOPK) == [40, 40]
    assert not (tmp_path / "one" / "state.json").exists()
    assert not (tmp_path / "one" / "state").exists()
    unbroken = load(tmp_path / "unbroken").tensors()
    for name, tensor in load(tmp_path / "cut").tensors().items():
        assert torch.equal(tensor, unbroken[name]), name
    assert (tmp_path / "cut/sae.safetensors").read_bytes() == (tmp_path / "unbroken/sae.safetensors").read_bytes()
    for name in ("one", "rows"):
        for tensor, expected in zip(load(tmp_path / name).tensors().values(), unbroken.values(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert steps == [25, 40]


def test_a_state_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    """Killed while it writes the files of the next state: the one before counts, and the leftovers go."""
    on_ranks(2, run_on, (1, 2), str(tmp_path / "cut"), *TOPK, 21)
    step = saved_header(tmp_path / "cut")["step"]
    leftover = tmp_path / "cut" / "state" / "000000099" / "features-0000000000.safetensors"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half a file")
    assert saved_header(tmp_path / "cut")["step"] == step
    on_ranks(2, run_on, (1, 2), str(tmp_path / "cut"), *TOPK)
    assert [path.name for path in (tmp_path / "cut" / "state").iterdir()] == ["000000040"]


def test_a_run_killed_at_random_moments_continues_bit_for_bit(tmp_path: Path, rng: Any) -> None:
    """SIGKILL to one rank or to all, with a save at every step; `scripts/check_ranks.py` kills a hundred times."""
    found = series(tmp_path, 4, rng)
    assert found["same_mesh_differs"] == 0
    assert found["other_mesh"] < 1e-12


def test_a_damaged_part_of_a_state_is_named(tmp_path: Path) -> None:
    on_ranks(2, run_on, (1, 2), str(tmp_path), *TOPK, 21)
    (part,) = tmp_path.glob("state/*/features-0000000014.safetensors")
    part.write_bytes(part.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match=r"features-0000000014.safetensors is damaged"):
        read_state(tmp_path, ONE, 27)


def settings_of_rank() -> str:
    mesh = Mesh(1, 2)
    try:
        refuse_different_settings(mesh, {"lr": 0.1 * (1 + mesh.rank), "k": 3})
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_settings_that_differ_between_ranks_are_refused_by_all() -> None:
    first, second = on_ranks(2, settings_of_rank)
    assert first.startswith("ValueError: ")
    assert "lr is 0.1 on rank 0 and 0.2 on rank 1" in first
    assert second.startswith("FailedElsewhere")


# --- torchrun --------------------------------------------------------------------------------------------------------

SIZES = {"d_in": 4096, "d_sae": 131_072, "batch_tokens": 4096, "k": 32}


def test_what_is_wrong_with_shard_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    check_started(None)
    with pytest.raises(ValueError, match="torchrun --standalone --nproc-per-node N -m sae.cli train … --shard rows"):
        check_started("rows")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="6 processes were started"):
        check_started(None)
    for shard, message in (
        ("2x2", "needs 4 processes, and 6 run. Use 6x1, 3x2, 2x3, 1x6"),
        ("columns", "must be one of features, rows"),
        ("features", "Use --batch-tokens 4092 or 4098"),
    ):
        with pytest.raises(ValueError, match=message):
            mesh_shape(shard, **SIZES)
    fitting = {**SIZES, "batch_tokens": 6144}
    assert [mesh_shape(shard, **fitting) for shard in ("features", "rows", "3x2")] == [(1, 6), (6, 1), (3, 2)]
    with pytest.raises(ValueError, match="5 features cannot be divided among 6 shards"):
        mesh_shape("features", **{**fitting, "d_sae": 5})


def test_auto_exchanges_least() -> None:
    assert cheapest(8, 8, **SIZES) == (1, 8)
    assert cheapest(8, 8, **{**SIZES, "d_sae": 512}) == (8, 1)  # gradients of so few features are less than the rows
    assert cheapest(32, 8, **{**SIZES, "d_sae": 1 << 24, "batch_tokens": 131_072})[1] >= 8


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2)])
def test_a_step_exchanges_the_bytes_of_the_formulas(shape: tuple[int, int]) -> None:
    case = Case("topk", {"k": 3, "resample_shares": (), "aux_coefficient": 0.0}, steps=1, d_sae=28)
    found = on_ranks(shape[0] * shape[1], bytes_of_a_step, shape, case)[0]
    given = {"d_in": 8, "d_sae": 28, "batch_tokens": 16, "k": 3, "bytes_per_value": 8}
    for operation, expected in exchanged_bytes(*shape, **given).items():
        assert abs(found.get(operation, 0) - expected) <= 400, (operation, found, expected)  # b_dec, counts, flags


CALLS = {  # of a topk step, whatever the number of ranks: by shards, by row groups, by both
    "1xF": {"gather_rows": 2, "stack": 1, "scatter_sum": 1, "reduce": 3},
    "Rx1": {"reduce": 7},
    "RxF": {"gather_rows": 2, "stack": 1, "scatter_sum": 1, "reduce": 7},
}


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (8, 8), (1, 64), (128, 8), (32, 32)])
def test_calls_and_bytes_of_a_step_on_many_ranks(shape: tuple[int, int]) -> None:
    """On up to 1,024 ranks that are not there: what rank 0 calls and gets, against the formulas."""
    ((calls, found),) = on_ranks(1, exchanged_on_fake_ranks, shape, 2048)
    given = {"d_in": 8, "d_sae": 2048, "batch_tokens": 8 * shape[0] * shape[1], "k": 4}
    for operation, expected in exchanged_bytes(*shape, **given).items():
        assert abs(found.get(operation, 0) - expected) <= 600, (operation, found, expected)  # b_dec, counts, flags
    assert calls == CALLS[f"{'1' if shape[0] == 1 else 'R'}x{'1' if shape[1] == 1 else 'F'}"]


def test_the_modelled_times_are_those_of_the_documentation() -> None:
    """Each line of the table: features, batch, then milliseconds on the meshes of its heading."""
    lines = (Path(__file__).parent.parent / "docs/gpus-and-many-machines.md").read_text().splitlines()
    (heading,) = (i for i, line in enumerate(lines) if line.startswith("| features | batch | 1x1"))
    shapes = [tuple(map(int, cell.split("x"))) for cell in lines[heading].strip("| ").split(" | ")[2:]]
    rows = [line.strip("| ").split(" | ") for line in lines[heading + 2 : heading + 9]]
    assert len(shapes) == 8
    for features, batch, *times in rows:
        sizes = {"d_sae": int(features.replace(",", "")), "batch_tokens": int(batch.replace(",", ""))}
        for (r, f), time in zip(shapes, times, strict=True):
            assert time == f"{1e3 * modelled_step_s(r, f, **sizes):,.0f}", (features, batch, r, f)


def test_the_formulas_give_the_figures_of_the_documentation() -> None:
    def total(row_groups: int, shards: int, d_sae: int) -> float:
        return sum(exchanged_bytes(row_groups, shards, **{**SIZES, "d_sae": d_sae}).values())

    for d_sae in (131_072, 1 << 20):
        assert round(total(1, 8, d_sae) / 1e6, -1) == 180
    assert round(total(8, 1, 131_072) / 1e9, 1) == 7.5
    assert round(total(8, 1, 1 << 20) / 1e9) == 60


# --- under torchrun --------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent


def test_a_rank_that_fails_under_torchrun_is_named(tmp_path: Path) -> None:
    """One real start: rank 1 raises in a step; one message says who, where, when, what is kept and what to do."""
    store = tmp_path / "acts.zarr"
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(4096, 8)).astype(np.float32))
    pipeline.store_activations(tmp_path / "rows.npy", store)
    train = ["train", "--acts", str(store), "--out", str(tmp_path / "sae"), "--recipe", "topk", "--l0", "4"]
    sizes = ["--d-sae", "64", "--batch-tokens", "32", "--tokens", "6400", "--shard", "features", "--device", "cpu"]
    fault = [str(ROOT / "scripts/faulty_rank.py"), "exception", str(tmp_path / "mark")]
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", *fault, *train, *sizes]
    environment = {"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if "sae train: " in line]
    assert len(said) == 1, ended.stderr
    assert re.search(
        r"rank 1 \(\S+, process \d+\) failed in step 4\d: something that nobody foresaw\. Nothing was saved yet\. "
        r"Repeat the command, on as many ranks or on others\.",
        said[0],
    )


def test_the_examples_can_be_read() -> None:
    """Shell files parse, the job has the fields of an indexed job, and every flag of `sae` in them exists."""
    examples = sorted((ROOT / "docs/examples").iterdir())
    assert {path.suffix for path in examples} == {".sh", ".sbatch", ".py", ".yaml"}
    for path in examples:
        text = path.read_text()
        if path.suffix in (".sh", ".sbatch"):
            subprocess.run(["bash", "-n", str(path)], check=True)
        elif path.suffix == ".py":
            compile(text, str(path), "exec")
        for verb in ("harvest", "train"):
            known = next(a for a in build_parser()._actions if a.dest == "verb").choices[verb]._option_string_actions  # type: ignore[index, union-attr]
            for command in re.findall(rf"(?:sae|sae\.cli) {verb} ([^\n&]*(?:\\\n[^\n&]*)*)", text):
                assert set(re.findall(r"--[a-z-]+", command)) <= set(known), (path.name, command)
    job = yaml.safe_load((ROOT / "docs/examples/harvest-job.yaml").read_text())
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert f"--world {job['spec']['completions']}" in container["args"][0]
