"""Compiles the kernels of the fixed-shape step for GPUs, without one: `test_fixed_compile` runs it.

    python tests/compile_fixed_step.py sm_80 sm_90 sm_100 gfx942
    python tests/compile_fixed_step.py --few gfx942     # one variant of each kernel, for NVIDIA one at each d_in

The kernels and their arguments are those of real launches at real size, recorded on tensors without memory ("meta"), so
a step that needed a number from the device could not be recorded. Prints a line for each kernel, with the registers of
a thread and the bytes of local memory (spilled registers) where the tool to read them is there.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sae.dictionary.autoencoder import SAE
from sae.kernels import triton_backend
from sae.kernels.triton_step.buffers import Constants, Learned, Sizes, first_room
from sae.kernels.triton_step.step import FixedStep
from sae.training.adam import Adam
from sae.training.dense_step import DenseStep
from sae.training.fixed_plan import PENALTIES
from sae.training.recipes import resolve
from sae.training.sparsity_penalty import LambdaController
from sae.training.state import TrainState

SHAPES = ((512, 16_384), (4096, 131_072))
ROWS, K = 4096, 32
PREFIX_SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
}
READER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

Launch = tuple[Any, dict[str, str], dict[str, Any], int]  # kernel, types, what is compiled in, warps


def sizes(d_in: int, d_sae: int) -> Iterator[Sizes]:
    """Of topk and batch-topk, also in bfloat16, of matryoshka with dead features, and of those with a penalty."""
    yield Sizes(ROWS, d_in, d_sae, K, first_room(K, d_sae, of_batch=False))
    room = first_room(K, d_sae, of_batch=True)
    yield Sizes(ROWS, d_in, d_sae, K, room, of_batch=True)
    yield Sizes(ROWS, d_in, d_sae, K, first_room(K, d_sae, of_batch=False), exact=False)
    yield Sizes(ROWS, d_in, d_sae, K, room, of_batch=True, exact=False)
    prefix_ends = tuple(round(share * d_sae) for share in PREFIX_SHARES)
    yield Sizes(ROWS, d_in, d_sae, K, room, of_batch=True, prefix_ends=prefix_ends, dead_room=d_sae // 4)
    for penalty in (
        PENALTIES.values() if d_in == 512 else ("l1", "norms", "gates")
    ):  # d_in changes nothing in the others
        yield Sizes(ROWS, d_in, d_sae, 0, 1024 if penalty == "l1" else 256, penalty=penalty)
    yield Sizes(ROWS, d_in, d_sae, 0, 256, penalty="l1", target_width=d_in, skip=True)
    if d_in == 512:
        yield Sizes(ROWS, d_in, d_sae, 0, 256, penalty="norms", site_widths=(d_in // 2,) * 2)
        yield Sizes(ROWS, d_in, d_sae, 0, 256, penalty="jumps", exact=False)
        yield Sizes(ROWS, d_in, d_sae, 0, 256, penalty="l1", elsewhere=True)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """What is launched inside the block, on tensors without memory."""
    found: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        warps = options.pop("num_warps", 4)
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        assert set(given) == set(kernel.arg_names), f"{kernel.__name__}: {set(given) ^ set(kernel.arg_names)}"
        held = {name: value for name, value in given.items() if name in options or _compiled_in(value)}
        types = {name: "constexpr" if name in held else _type(value) for name, value in given.items()}
        found.append((kernel, types, held, warps))

    launch, JITFunction.run = JITFunction.run, record
    try:
        with torch.device("meta"):
            yield found
    finally:
        JITFunction.run = launch


def launches(wanted: Sizes) -> list[Launch]:
    """What a step of this size launches."""
    with recorded() as found:
        d_in, d_sae = wanted.d_in, wanted.d_sae
        matrix, vector = torch.zeros(d_sae, d_in), torch.zeros(d_sae)
        moments = dict.fromkeys(("W_enc", "W_dec"), (matrix, matrix))
        moments |= dict.fromkeys(("b_enc", "threshold", "r_mag", "b_mag"), (vector, vector))
        moments["b_dec"] = (torch.zeros(d_in),) * 2
        moments["W_skip"] = (torch.zeros(d_in, d_in),) * 2
        learned = Learned(
            matrix,
            vector,
            matrix,
            torch.zeros(d_in),
            moments,
            torch.zeros(d_sae, dtype=torch.int64),
            vector if wanted.of_batch or wanted.has_own else None,
            vector if wanted.penalty == "gates" else None,
            torch.zeros(d_in, d_in) if wanted.skip else None,
        )
        outside = (lambda held: None) if wanted.elsewhere else None
        FixedStep(wanted, constants(wanted), learned, outside).run()
    return found


def constants(wanted: Sizes) -> Constants:
    free = wanted.penalty == "norms"  # like anthropic-2024-04
    clips = free or wanted.dead_room > 0 or wanted.penalty == "gates"
    found = Constants(1.5, 0.9, 0.999, 1e-8, not free, 10**6, 1 / 32, 1e-4, 16.0, clip=float(clips))
    return replace(found, pre_bias=not free, bandwidth=0.1, search=(1.0, 10.0, 90.0, 0.01))


def dense_launches(recipe: str, d_in: int, d_sae: int) -> list[Launch]:
    """What a dense step of this recipe launches besides PyTorch's own kernels."""
    found, config = resolve(recipe, d_sae=d_sae, tokens=ROWS * 1000, batch_tokens=ROWS, target_l0=K)
    with recorded() as launched:
        sae = SAE(d_in, d_sae, activation=found.activation, pre_bias=found.pre_bias)
        adam = Adam(sae, triton_backend, beta1=config.beta1, unit_norm=found.unit_norm)
        silent, penalty = torch.zeros(d_sae, dtype=torch.int64), LambdaController.start(config, 1.0)
        wanted = Sizes(ROWS, d_in, d_sae, 0, 0, penalty=PENALTIES[found.objective])
        DenseStep(TrainState(sae, adam, 1.5, silent, penalty), config, wanted, constants(wanted)).run()
    return launched


def _compiled_in(value: Any) -> bool:
    """Triton compiles the number 1 in."""
    return isinstance(value, int) and value == 1


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compiled(launch: Launch, target: GPUTarget) -> Any:
    kernel, types, held, warps = launch
    aligned = [
        number
        for number, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name in ("d", "d_sae", "rows", "words", "width", "groups")
    ]
    warps = warps if target.backend == "cuda" else min(warps, 8)
    return triton.compile(source(kernel, types, held, aligned), target=target, options={"num_warps": warps})


def source(kernel: Any, types: dict[str, str], held: dict[str, Any], aligned: list[int]) -> Any:
    """What is compiled: in the words of Triton 3.2, or in those since 3.3."""
    if "constants" not in inspect.signature(ASTSource).parameters:
        attributes = {(number,): [["tt.divisibility", 16]] for number in aligned}
        return ASTSource(fn=kernel, signature=types, constexprs=held, attrs=attributes)
    from triton.backends.compiler import AttrsDescriptor

    given = {name: kind for name, kind in types.items() if kind != "constexpr"}
    hints = AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
    return ASTSource(fn=kernel, signature=given, constants=held, attrs=hints)


def used(binary: bytes) -> str:
    """Registers of a thread, and its bytes of local memory."""
    if not READER.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        shown = subprocess.run([READER, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
    return f"{found['REG']} registers {found['STACK'] + found['LOCAL']} local"


def wanted_launches() -> Iterator[tuple[int, Launch]]:
    """d_in and a launch, each different one once."""
    seen: set[str] = set()
    for d_in, d_sae in SHAPES:
        sparse = [launches(each) for each in sizes(d_in, d_sae)]
        dense = [dense_launches(recipe, d_in, d_sae) for recipe in ("jumprelu", "p-anneal")]
        for launch in sum(sparse + dense, []):
            kernel, types, held, warps = launch
            if (key := f"{kernel.__name__} {types} {held} {warps}") not in seen:
                seen.add(key)
                yield d_in, launch


def main() -> int:
    assert os.environ.get("TRITON_INTERPRET") != "1"
    few, names = "--few" in sys.argv, [each for each in sys.argv[1:] if each != "--few"]
    wanted = list(wanted_launches())
    of_each = {launch[0].__name__: (d_in, launch) for d_in, launch in wanted}
    of_each_width = {(launch[0].__name__, d_in): (d_in, launch) for d_in, launch in wanted}
    for name in names:
        of_nvidia = name.startswith("sm_")
        target = GPUTarget("cuda", int(name[3:]), 32) if of_nvidia else GPUTarget("hip", name, 64)
        taken = (of_each_width if of_nvidia else of_each).values() if few else wanted
        for d_in, launch in taken:
            code = compiled(launch, target).asm["cubin" if of_nvidia else "hsaco"]
            print(name, launch[0].__name__, d_in, len(code), used(code) if of_nvidia else "", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
