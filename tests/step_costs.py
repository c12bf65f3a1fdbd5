"""Counts what one training step asks of a GPU, without one: kernel launches and host synchronisations.

    TRITON_INTERPRET=1 python tests/step_costs.py           # print where they come from
    TRITON_INTERPRET=1 python tests/step_costs.py --write   # write tests/data/step-costs.json

The step runs on the CPU in Triton's interpreter. aten operations are seen by a dispatch mode, reads by Python (`item`,
`bool`, …) by a function mode, Triton launches at the interpreter; what happens inside a Triton kernel is not counted.
Launches are a lower bound: an aten operation counts as the launches that it makes at least on CUDA.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fakes import FewRows, FewRowsOfAModel, FewSites, FewTargets
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from sae.kernels import choose
from sae.training.config import TrainConfig
from sae.training.fixed_plan import FixedPlan, plan_for
from sae.training.fixed_steps import FixedSteps
from sae.training.recipes import Recipe, resolve
from sae.training.state import start
from sae.training.step import train_step

TABLE = Path(__file__).resolve().parent / "data" / "step-costs.json"
D_SAE, BATCH_TOKENS, DEAD = 40, 16, 6

# What each step is made to be: the share of features active before it (sparse or dense products), some features dead.
CASES: dict[str, tuple[str, dict[str, Any], float | None, int]] = {
    "topk": ("topk", {"k": 3, "resample_shares": ()}, None, 0),
    "topk, some dead": ("topk", {"k": 3, "resample_shares": ()}, None, DEAD),
    "batch-topk": ("batch-topk", {"k": 3}, None, 0),
    "balanced": ("balanced", {"k": 3}, None, 0),
    "matryoshka": ("matryoshka", {"k": 3}, None, 0),
    "matryoshka, some dead": ("matryoshka", {"k": 3}, None, DEAD),
    "towards-monosemanticity, sparse": ("towards-monosemanticity", {"l1": 2.0, "resample_shares": ()}, 0.0, 0),
    "towards-monosemanticity, dense": ("towards-monosemanticity", {"l1": 2.0, "resample_shares": ()}, 1.0, 0),
    "anthropic-2024-04, sparse": ("anthropic-2024-04", {"l1": 2.0}, 0.0, 0),
    "anthropic-2024-04, dense": ("anthropic-2024-04", {"l1": 2.0}, 1.0, 0),
    "jumprelu, sparse": ("jumprelu", {"target_l0": 3}, 0.0, 0),
    "jumprelu, dense": ("jumprelu", {"target_l0": 3}, 1.0, 0),
    "gated, sparse": ("gated", {"l1": 2.0, "resample_shares": ()}, 0.0, 0),
    "gated, dense": ("gated", {"l1": 2.0, "resample_shares": ()}, 1.0, 0),
    "p-anneal, sparse": ("p-anneal", {"l1": 2.0, "resample_shares": (), "p_from_share": 0.0}, 0.0, 0),
    "p-anneal, dense": ("p-anneal", {"l1": 2.0, "resample_shares": (), "p_from_share": 0.0}, 1.0, 0),
    "end-to-end, sparse": ("end-to-end", {"l1": 2.0, "resample_shares": ()}, 0.0, 0),
    "crosscoder, sparse": ("crosscoder", {"l1": 2.0}, 0.0, 0),
    "transcoder, sparse": ("transcoder", {"l1": 2.0}, 0.0, 0),
    "transcoder with a skip, sparse": ("transcoder", {"l1": 2.0, "skip": True}, 0.0, 0),
}
ROWS = {"transcoder": FewTargets, "crosscoder": FewSites, "end-to-end": FewRowsOfAModel}

# aten operations that launch nothing on a GPU: they only describe memory
FREE = frozenset(
    [
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "detach",
        "alias",
        "as_strided",
        "empty",
        "empty_strided",
        "empty_like",
        "new_empty",
        "new_empty_strided",
        "unbind",
        "split",
        "split_with_sizes",
        "_reshape_alias",
        "reshape",
        "diagonal",
        "lift_fresh",
        "unfold",
        "narrow",
        "chunk",
        "view_as",
        "set_",
        "resize_",
        "_local_scalar_dense",
    ]
)
# Those that make several launches on CUDA: passes of a sort or a scan, a fill and a copy, a count before a gather.
SEVERAL = {
    "sort": 8,
    "topk": 3,
    "cumsum": 2,
    "constant_pad_nd": 2,
    "nonzero": 4,
    "index by mask": 5,
    "index_put by mask": 6,
    "repeat_interleave": 2,
    "bincount": 4,
    "index_put": 2,
}
# What makes the host wait for a number from the device
WAITING_OPERATIONS = frozenset(
    [
        "nonzero",
        "masked_select",
        "bincount",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "_local_scalar_dense",
        "equal",
        "multinomial",
    ]
) | {"index by mask", "index_put by mask"}
# The rest of the model in end-to-end training: its launches are not the dictionary's; what waits counts all the same
OF_THE_MODEL = "training/downstream_gradient.py"
WAITING_READS = frozenset({"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"})


class Costs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Launches and synchronisations by the line of the project that asks for them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.paused = 0

    def launched(self, times: int) -> None:
        if not any(frame.f_code.co_filename.endswith(OF_THE_MODEL) for frame, _ in traceback.walk_stack(None)):
            self.launches[_line()] += times

    def waited(self, what: str) -> None:
        self.syncs[f"{what} {_line()}"] += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused:
            name = _kind(func.overloadpacket.__name__, args)
            if name not in FREE:
                self.launched(SEVERAL.get(name, 1))
            if name in WAITING_OPERATIONS:
                self.waited(name)
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notices when Python asks a tensor for a number."""

    def __init__(self, costs: Costs) -> None:
        super().__init__()
        self.costs = costs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        if self.costs.paused or name not in WAITING_READS:
            return func(*args, **(kwargs or {}))
        self.costs.waited(name)
        with self.costs.pause():  # the read's own operation is this one
            return func(*args, **(kwargs or {}))


def _kind(name: str, args: Any) -> str:
    """The operation's name; indexing by a mask is told apart, because it asks how many entries are true."""
    if name not in ("index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"):
        return name
    if not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
        return name
    if name in ("index", "_unsafe_index"):
        return "index by mask"
    one_number = args[2].numel() == 1 and not (len(args) > 3 and args[3])
    return "masked_fill_" if one_number else "index_put by mask"  # CUDA fills x[mask] = number without counting


def _line() -> str:
    """The innermost line of the project on the stack, such as training/step.py:45."""
    for frame in reversed(traceback.extract_stack()):
        if "/sae/" in frame.filename:
            return f"{frame.filename.rpartition('/sae/')[2]}:{frame.lineno}"
    return "?"


@contextmanager
def triton_launches(costs: Costs) -> Iterator[None]:
    """Counts the launches that the interpreter is asked for."""
    from triton.runtime.interpreter import GridExecutor

    execute = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not costs.paused:
            costs.launched(1)
        with costs.pause():
            return execute(self, *args, **kwargs)

    GridExecutor.__call__ = counted
    try:
        yield
    finally:
        GridExecutor.__call__ = execute


def costs_of(step: Callable[[], object]) -> Costs:
    costs = Costs()
    with triton_launches(costs), Reads(costs), costs:
        step()
    return costs


def step_costs(recipe: str, settings: dict[str, Any], density: float | None, dead: int) -> Costs:
    """The costs of the second step of a small run with the Triton kernels: of the step that a GPU would take.

    A fixed-shape step is counted launch by launch; on a GPU one graph holds all of them but the copy of the batch.
    """
    found, config = resolve(
        recipe, d_sae=D_SAE, tokens=BATCH_TOKENS * 40, batch_tokens=BATCH_TOKENS, dead_tokens=10**6, **settings
    )
    rows = ROWS.get(recipe, FewRows)()
    state = start(rows, config, found, choose("triton", "cpu"))
    state.fixed_plan = as_on_a_gpu(found, config)
    fixed = FixedSteps(state, config) if state.fixed_plan else None
    for step in range(2):
        state.tokens_since_fired[:dead] = 10**7
        if density is not None:
            state.density = density
        take = fixed.take if fixed else partial(train_step, state, config=config)
        if step == 1:
            return costs_of(partial(take, rows.batch(1)))
        take(rows.batch(step))
        if fixed and dead:
            fixed.settle()  # makes room for them
    raise AssertionError


def as_on_a_gpu(recipe: Recipe, config: TrainConfig) -> FixedPlan | None:
    return plan_for(recipe, config, torch.device("cuda"), "triton")


def counted() -> dict[str, dict[str, int]]:
    found = {name: step_costs(*case) for name, case in CASES.items()}
    return {name: {"launches": costs.launches.total(), "syncs": costs.syncs.total()} for name, costs in found.items()}


if __name__ == "__main__":
    if "--write" in sys.argv:
        TABLE.write_text(json.dumps(counted(), indent=2) + "\n")
    else:
        for name, case in CASES.items():
            costs = step_costs(*case)
            total, waits = costs.launches.total(), costs.syncs.total()
            print(f"\n{name}: at least {total} launches, {waits} synchronisations")
            for line, times in (*costs.launches.most_common(12), *costs.syncs.most_common()):
                print(f"  {times:4}  {line}")
