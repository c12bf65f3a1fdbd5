"""A training step with dense products that can be captured: for the time before the activations are sparse.

Loss and gradients are those of the recipe's objective. What is special is around them: λ and the learning rate come
from the device, a loss that is not finite changes nothing, and no number goes to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.kernels.triton_step import dense, own
from sae.kernels.triton_step.buffers import LOG_STEPS, RATES, Constants, Exchange, Sizes, power_of_two
from sae.training import losses
from sae.training.config import TrainConfig
from sae.training.objectives import Outcome, ScaledBatch, StepContext
from sae.training.recipes import recipe_named
from sae.training.state import TrainState

NUMBERS, FEATURES = 1024, 1024  # of a program


class DenseBuffers(Exchange):
    """What outlives one stage; the activations and their gradients are in PyTorch's own memory."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        super().__init__(device)
        self.x = torch.zeros(sizes.rows, sizes.d_in, device=device)
        self.told = torch.zeros(3, device=device)  # λ, p, and p of the next step
        self.losses = torch.zeros(4, device=device)
        self.mean_threshold = torch.zeros(1, device=device)


class DenseStep:
    """One training step on what lies in `buffers.x`. The same launches every time."""

    def __init__(self, state: TrainState, config: TrainConfig, sizes: Sizes, constants: Constants) -> None:
        self.state, self.config, self.sizes, self.constants = state, config, sizes, constants
        self.recipe = recipe_named(config.recipe)
        self.buffers = DenseBuffers(sizes, state.device)

    def renew(self) -> None:
        """Clears what a halted step may have left."""
        self.buffers.flags.zero_()
        self.buffers.coming_flags.zero_()

    def run(self) -> None:
        """Every stage once."""
        held = self.buffers
        dense.begin[(1,)](
            held.told,
            held.step,
            held.steps_done,
            held.coming_flags,
            held.flags,
            held.penalty,
            held.rates,
            RATES,
            num_warps=1,
        )
        with torch.enable_grad():
            x = held.x * self.constants.scale
            outcome = self.recipe.objective(self.state.sae, ScaledBatch(x, x), self._context())
            torch.autograd.backward(outcome.loss)
        with torch.no_grad():
            self._take_losses(outcome)
            if self.config.clip:
                self.state.optimizer.clip_gradients()
            for name, _ in self.state.sae.named_parameters():
                self._learn(name)
            self._count_silence(outcome.acts.fired())
            self._finish(outcome.acts.n_active())

    def _context(self) -> StepContext:
        coefficient, p, _ = self.buffers.told.unbind()
        return StepContext(
            self.config,
            self.state.optimizer.kernels,
            coefficient if self.state.penalty.coefficient else 0.0,
            sparse=False,
            dead=torch.empty(0, dtype=torch.bool, device=self.state.device),  # of AuxK, which penalties do without
            p=p,
            scale=self.constants.scale,
        )

    @property
    def _anneals(self) -> bool:
        return self.sizes.penalty == "powers"

    def _take_losses(self, outcome: Outcome) -> None:
        loss, error = outcome.loss.detach(), outcome.error.detach()
        before = after = loss
        if self._anneals:
            before, after = (losses.lp_norm(outcome.acts, p) for p in self.buffers.told[1:].unbind())
        dense.take_losses[(1,)](loss, error, before, after, self.buffers.losses, self.buffers.flags, num_warps=1)

    def _learn(self, name: str) -> None:
        held, constants, numbers = self.buffers, self.constants, self.state.optimizer.in_memory(name)
        now = held.rates, held.step, held.flags
        adam = 1 - constants.beta1, constants.beta2, 1 - constants.beta2, constants.eps
        n, d = numbers[0].shape
        if name == "W_dec" and constants.unit_norm:
            columns = power_of_two(d)
            warps = min(16, max(1, columns // 256))
            dense.learn_unit_rows[(n,)](*numbers, *now, *adam, d, RATES, COLUMNS=columns, num_warps=warps)
            return
        threshold = name == "threshold"
        ratio = float(constants.threshold_lr_ratio) if threshold else 1.0
        dense.learn_numbers[(-(-n * d // NUMBERS),)](
            *numbers, *now, ratio, *adam, n * d, RATES, AT_LEAST_ZERO=threshold, NUMBERS=NUMBERS, num_warps=4
        )

    def _count_silence(self, fired: Tensor) -> None:
        held, state, d_sae = self.buffers, self.state, self.sizes.d_sae
        revives = self.sizes.penalty == "jumps" and self.constants.min_density > 0
        threshold = state.sae.threshold.detach() if revives else held.mean_threshold
        if revives:
            own.mean_own[(1,)](threshold, held.mean_threshold, held.flags, d_sae, FEATURES=4096, num_warps=8)
        dense.count_silence[(-(-d_sae // FEATURES),)](
            state.tokens_since_fired,
            fired.view(torch.uint8),
            state.sae.b_enc.detach(),
            threshold,
            held.mean_threshold,
            held.flags,
            self.sizes.rows,
            self.constants.min_density * self.sizes.rows / self.constants.patience,
            float(self.constants.min_density),
            d_sae,
            REVIVES=revives,
            FEATURES=FEATURES,
            num_warps=4,
        )

    def _finish(self, active: Tensor) -> None:
        held, constants = self.buffers, self.constants
        dense.finish_dense[(1,)](
            held.penalty,
            held.losses,
            active,
            *(constants.search or (0.0,) * 4),
            held.rates,
            held.step,
            held.steps_done,
            held.flags,
            held.coming_flags,
            self.sizes.rows,
            constants.most_entries,
            held.log,
            LOG_STEPS,
            RATES,
            ANNEALS=self._anneals,
            SEARCHES=constants.search is not None,
            num_warps=1,
        )
