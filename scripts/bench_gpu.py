"""Measures rows per second of the training step on a CUDA device: ours, a plain dense torch step, and the roofline.

    python scripts/bench_gpu.py
    python scripts/bench_gpu.py --d-in 512,4096 --d-sae 16384,131072 --json gpu.json

Needs only torch, triton, numpy, safetensors and this source tree (and a peer's package if that peer is asked for). Rows
are on the device. All contenders take turns in one run; a step is timed with CUDA events, from handing out the batch to
the end of the optimiser, including bookkeeping. Without a CUDA device it prints a message and exits with status 2.

The roofline is a bound from what every TopK step needs: the larger of bytes / bandwidth and operations / rate, both
rates measured here (by a copy and a float16 product). Bytes: Adam reads four numbers for each weight and writes three,
its gradient is written and zeroed, the encoder is read for the dense product, active decoder rows twice (x̂, and the
values' gradient), the batch three times; reads from the cache are not counted. Operations: the encoder's dense product,
in float16 as in ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BATCHES = 4
WARM_STEPS = 5


def roofline(d_in: int, d_sae: int, k: int, rows: int, bytes_per_s: float, operations_per_s: float) -> dict[str, float]:
    """Bytes and operations of one step, counted, and the seconds they take at these rates."""
    moved = 4 * d_in * (2 * d_sae * (4 + 3 + 2) + d_sae + 2 * min(rows * k, d_sae) + 3 * rows)
    operations = 2.0 * rows * d_in * d_sae
    return {
        "bytes": moved,
        "operations": operations,
        "seconds": max(moved / bytes_per_s, operations / operations_per_s),
    }


def dense_operations(d_in: int, d_sae: int, rows: int) -> float:
    """Of a dense step: five products."""
    return 10.0 * rows * d_in * d_sae


def stand_in_for_small_dependencies() -> None:
    """Replaces jaxtyping (annotations) and tqdm (progress bars) by dummies on a GPU machine that has neither."""

    class Anything:
        def __class_getitem__(cls, item: Any) -> Any:
            return Any

    for name, attributes in (("jaxtyping", ("Float", "Int", "Bool")), ("tqdm", ("tqdm",))):
        if find_spec(name) is None:
            module = sys.modules[name] = ModuleType(name)
            for attribute in attributes:
                setattr(module, attribute, Anything)


def stand_in_for_stores() -> None:
    """Replaces the packages that read stores by dummies where they are missing: enough to import the order of rows."""
    packages = {"zarr": {"zarr": (), "zarr.codecs": ("Crc32cCodec",), "zarr.storage": ("MemoryStore",)}}
    packages["google_crc32c"] = {"google_crc32c": ()}
    for package, modules in packages.items():
        if package in sys.modules or find_spec(package) is not None:
            continue
        for name, attributes in modules.items():
            module = sys.modules[name] = ModuleType(name)
            for attribute in attributes:
                setattr(module, attribute, object)


# --- contenders: each a function that takes one step ---


def ours(kernels: str, variant: str, d_in: int, d_sae: int, k: int, batches: list[Any]) -> Callable[[], None]:
    """A step as `sae train` takes it: in fixed shapes, or by `sae.training.step.train_step`."""
    from dataclasses import replace

    from sae.kernels import choose
    from sae.training import state, step
    from sae.training.initialise import kaiming_
    from sae.training.recipes import resolve
    from sae.training.rows import Batch

    rows = len(batches[0])
    settings: dict[str, Any] = {"d_sae": d_sae, "tokens": 10**10, "batch_tokens": rows, "lr": 1e-6, "k": k}
    name = {"topk": "topk", "batchtopk": "batch-topk"}[variant]
    recipe, config = resolve(name, **settings, resample_shares=())
    # The start from data takes long and changes no step.
    recipe = replace(recipe, initialise=kaiming_)
    started = state.start(HeldRows(batches), config, recipe, choose(kernels, "cuda"), "cuda")
    place = iter(range(10**9))

    def take_step() -> None:
        step.train_step(started, Batch(batches[next(place) % len(batches)]), config)

    if started.fixed_plan is None:
        return take_step
    from sae.training.fixed_steps import FixedSteps

    fixed = FixedSteps(started, config)
    return lambda: fixed.take(Batch(batches[next(place) % len(batches)]))


def dense_torch(
    variant: str, d_in: int, d_sae: int, k: int, batches: list[Any], *, bfloat16: bool = False, compiled: bool = False
) -> Callable[[], None]:
    """The obvious implementation: dense products, autograd, torch's fused Adam on float32 weights.

    `compiled`: forward and backward pass under torch.compile(mode="reduce-overhead"), as CUDA graphs.
    """
    import torch

    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, device="cuda"), dim=-1)
    leaves = [W_dec.t().clone(), torch.zeros(d_sae, device="cuda"), W_dec, torch.zeros(d_in, device="cuda")]
    W_enc, b_enc, W_dec, b_dec = (torch.nn.Parameter(leaf) for leaf in leaves)
    adam = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=1e-6, fused=True)
    place = iter(range(10**9))

    def loss_of(x: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
            pre = ((x - b_dec) @ W_enc + b_enc).relu()
            flat = pre.flatten() if variant == "batchtopk" else pre
            values, chosen = flat.topk(k * len(x) if variant == "batchtopk" else k, dim=-1, sorted=False)
            f = torch.zeros_like(flat).scatter(-1, chosen, values).view_as(pre)
            return ((x - b_dec - f @ W_dec) ** 2).sum(-1).mean()

    forward = torch.compile(loss_of, mode="reduce-overhead") if compiled else loss_of

    def step() -> None:
        x = batches[next(place) % len(batches)]
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        forward(x).backward()
        assert W_dec.grad is not None
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) * W_dec
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=-1, keepdim=True))

    return step


def sparsify(variant: str, d_in: int, d_sae: int, k: int, batches: list[Any]) -> Callable[[], None]:
    """sparsify's own module and Triton decoder under its bfloat16 autocast, with torch's fused Adam.

    Its trainer's loop is not used, because it hooks a model; the rest of its step is here: decoder gradients projected,
    rows normalised, the rows counted since each feature fired.
    """
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    if variant != "topk":
        raise NotImplementedError("sparsify has no batch-topk")
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), "cuda")
    adam = torch.optim.Adam(coder.parameters(), lr=1e-6, fused=True)
    silent = torch.zeros(d_sae, dtype=torch.int64, device="cuda")
    place = iter(range(10**9))

    def step() -> None:
        x = batches[next(place) % len(batches)]
        out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        coder.set_decoder_norm_to_unit_norm()
        silent.add_(len(x))
        silent[out.latent_indices.flatten()] = 0

    return step


class HeldRows:
    """The batches, as a trainer's source of rows."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.d_in = batches, batches[0].shape[1]

    def batch(self, step: int) -> Any:
        from sae.training.rows import Batch

        return Batch(self.batches[step % len(self.batches)])

    def sample(self, n: int, seed: int) -> Any:
        return self.batches[0][:n].cpu()


# --- measuring ---


def made_up(d_in: int, rows: int) -> list[Any]:
    """ReLU-MLP-like batches of rank d_in / 4, as the CPU benchmark has them."""
    import torch

    g = torch.Generator("cuda").manual_seed(0)
    rank = max(1, d_in // 4)
    basis = torch.randn(rank, d_in, generator=g, device="cuda")
    return [
        torch.relu(torch.randn(rows, rank, generator=g, device="cuda") @ basis / rank**0.5 - 0.5)
        for _ in range(BATCHES)
    ]


def seconds_of(work: Callable[[], Any], times: int) -> list[float]:
    import torch

    found = []
    for _ in range(times):
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        found.append(started.elapsed_time(ended) / 1000)
    return found


def rates() -> tuple[float, float]:
    """Bytes per second of a copy of 1 GiB (read and written), operations per second of a float16 product."""
    import torch

    a = torch.empty(2**28, device="cuda")
    b = torch.empty_like(a)
    x = torch.randn(8192, 8192, device="cuda").half()
    for work in (lambda: b.copy_(a), lambda: x @ x):
        seconds_of(work, 3)
    copy, product = (min(seconds_of(work, 10)) for work in (lambda: b.copy_(a), lambda: x @ x))
    return 2 * 4 * a.numel() / copy, 2 * 8192.0**3 / product


def measure(
    variant: str, d_in: int, d_sae: int, k: int, rows: int, steps: int, who: list[str], rate: tuple[float, float]
) -> list[dict[str, Any]]:
    """Every contender's seconds per step, in turn; one that does not fit into memory is reported as such."""
    import torch

    batches = made_up(d_in, rows)
    make: dict[str, Callable[[], Callable[[], None]]] = {
        "monosem triton": lambda: ours("triton", variant, d_in, d_sae, k, batches),
        "monosem reference": lambda: ours("reference", variant, d_in, d_sae, k, batches),
        "dense torch": lambda: dense_torch(variant, d_in, d_sae, k, batches),
        "dense torch bf16": lambda: dense_torch(variant, d_in, d_sae, k, batches, bfloat16=True),
        "sparsify": lambda: sparsify(variant, d_in, d_sae, k, batches),
    }
    bound = roofline(d_in, d_sae, k, rows, *rate)
    shape = {"variant": variant, "d_in": d_in, "d_sae": d_sae, "k": k, "rows": rows}
    contenders: dict[str, tuple[Callable[[], None], list[float]]] = {}
    found: list[dict[str, Any]] = []
    for name in who:
        try:
            contenders[name] = make[name](), []
            seconds_of(contenders[name][0], WARM_STEPS)
        except (torch.cuda.OutOfMemoryError, ImportError, NotImplementedError) as error:
            contenders.pop(name, None)
            said = str(error).splitlines()[0] if not isinstance(error, torch.cuda.OutOfMemoryError) else "out of memory"
            found.append({**shape, "who": name, "problem": said, "roofline": bound})
            torch.cuda.empty_cache()
    for _ in range(steps):
        for step, taken in contenders.values():
            taken += seconds_of(step, 1)
    return found + [{**shape, "who": n, "seconds": t, "roofline": bound} for n, (_, t) in contenders.items()]


def show(found: list[dict[str, Any]]) -> None:
    shape, bound = found[0], found[0]["roofline"]
    d_in, d_sae, rows = shape["d_in"], shape["d_sae"], shape["rows"]
    plain = [statistics.median(f["seconds"]) for f in found if f["who"] == "dense torch" and "seconds" in f]
    print(f"\n{shape['variant']} k = {shape['k']}, d_in {d_in:,}, d_sae {d_sae:,}, batch {rows:,}")
    print(
        f"roofline: {bound['bytes'] / 1e9:.2f} GB, {bound['operations'] / 1e12:.2f} TFLOP in float16 "
        f"(a dense step: {dense_operations(d_in, d_sae, rows) / 1e12:.2f} TFLOP in float32), "
        f"{1000 * bound['seconds']:.2f} ms, {rows / bound['seconds']:,.0f} rows/s"
    )
    print("| who | ms/step min | median | max | rows/s | dense torch / this | of the roofline |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for f in found:
        if "problem" in f:
            print(f"| {f['who']} | {f['problem']} | | | | | |")
            continue
        low, median, high = min(f["seconds"]), statistics.median(f["seconds"]), max(f["seconds"])
        ratio = f"{plain[0] / median:.2f}" if plain else ""
        print(
            f"| {f['who']} | {1000 * low:.2f} | {1000 * median:.2f} | {1000 * high:.2f} | {f['rows'] / median:,.0f} "
            f"| {ratio} | {bound['seconds'] / median:.0%} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="topk,batchtopk", help="comma-separated")
    parser.add_argument("--d-in", default="512,1024,4096", help="comma-separated")
    parser.add_argument("--d-sae", default="16384,65536,131072", help="comma-separated")
    parser.add_argument("--k", type=int, default=32, help="active features per row")
    parser.add_argument("--batch", type=int, default=4096, help="rows per step")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each contender")
    parser.add_argument(
        "--who",
        default="monosem triton,dense torch",
        help="comma-separated; also monosem reference, dense torch bf16, sparsify (the package eai-sparsify)",
    )
    parser.add_argument("--json", type=Path, help="write all times here")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and none is available.", file=sys.stderr)
        return 2
    import triton

    stand_in_for_small_dependencies()
    rate = rates()
    description = machine.hardware(
        capability=torch.cuda.get_device_capability(),
        copy_gb_per_s=round(rate[0] / 1e9),
        float16_tflop_per_s=round(rate[1] / 1e12),
        triton=triton.__version__,
    )
    print(description)
    everything: list[dict[str, Any]] = []
    for variant in args.variants.split(","):
        for d_in in map(int, args.d_in.split(",")):
            for d_sae in map(int, args.d_sae.split(",")):
                found = measure(variant, d_in, d_sae, args.k, args.batch, args.steps, args.who.split(","), rate)
                show(found)
                sys.stdout.flush()
                everything += found
                if args.json:
                    args.json.write_text(json.dumps({"hardware": description, "results": everything}, indent=1) + "\n")
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
