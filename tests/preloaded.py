"""Imported by the process that `Commands` forks from: what every `sae` command would otherwise load itself.

Modules, and the compiled loops of the CPU kernels: numba reads each from its cache at its first call, all together in
about a second, longer than the short runs of these tests take.
"""

from __future__ import annotations

import torch
import torch._dynamo
from fakes import FewRows

import sae.cli
import sae.lm.pretrain
import sae.pipeline.harvest
import sae.pipeline.sweep
import sae.pipeline.train  # noqa: F401
from sae.kernels import choose
from sae.training.recipes import RECIPES, resolve
from sae.training.state import start
from sae.training.step import train_step


def load_compiled_loops() -> None:
    """Takes two steps of every recipe that needs nothing but rows."""
    for name, recipe in RECIPES.items():
        if not recipe.needs:
            given = {"k": 2} if "k" in recipe.settings else {}
            _, config = resolve(name, d_sae=32, tokens=1600, batch_tokens=16, dead_tokens=16, **given)
            state = start(FewRows(), config, recipe, choose(device="cpu"))
            for step, density in enumerate((0.0, 1.0)):  # sparse, then dense products
                state.density = density
                train_step(state, FewRows().batch(step), config)


torch.set_num_threads(1)
if not torch.cuda.is_available():  # otherwise the backward pass starts threads, which a fork does not inherit
    load_compiled_loops()
