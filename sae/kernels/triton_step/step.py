"""The launches of a fixed-shape step, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sae.kernels.triton_step import by_feature, explain, learn, screen
from sae.kernels.triton_step.buffers import LOG_STEPS, RATES, Buffers, Constants, Learned, Sizes, power_of_two
from sae.kernels.triton_step.choice import ENTRY_NUMBERS, Choice, entry_block, warps
from sae.kernels.triton_step.dead_features import DeadFeatures


class FixedStep:
    """One training step on what lies in `buffers.x`. The same launches with the same arguments every time."""

    def __init__(self, sizes: Sizes, constants: Constants, learned: Learned) -> None:
        self.sizes, self.constants, self.learned = sizes, constants, learned
        self.buffers = Buffers(sizes, learned.W_enc.device)
        self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Derives the screen's copy and bounds from the weights, and clears what a halted step may have left.

        Needed at the start, and after anything else has changed the weights.
        """
        held, sizes, learned = self.buffers, self.sizes, self.learned
        held.narrow_w.copy_(learned.W_enc)
        held.narrow_b.copy_(learned.b_enc)
        norm = torch.maximum(learned.W_enc.norm(dim=1), held.narrow_w.float().norm(dim=1)) * (1 + 2.0**-20)
        floor = learned.b_enc.abs() * (2.0**-11 + 2.0**-21) + 2.0**-20 * norm + 2.0**-24
        for bound, numbers in ((held.group_norm, norm), (held.group_floor, floor)):
            finite = torch.where(numbers < torch.inf, numbers, torch.inf)
            padded = torch.nn.functional.pad(finite, (0, sizes.groups * sizes.group - sizes.d_sae))
            bound.copy_(padded.view(sizes.groups, sizes.group).amax(1).view(torch.int32))
        if learned.threshold is not None:
            held.level.copy_(learned.threshold.amax()[None])
            torch.sub(held.level, learned.threshold, out=held.lift)
        for scratch in (held.counts, held.bitmap, held.flags, held.coming_flags):
            scratch.zero_()

    @torch.no_grad()
    def run(self) -> None:
        """Every stage once."""
        self._screen()
        Choice(self.sizes, self.learned, self.buffers).run()
        self._explain()
        dead = DeadFeatures(self.sizes, self.constants, self.learned, self.buffers)
        if self.sizes.dead_room:
            dead.explain_error(warps(power_of_two(self.sizes.d_in), 8))
        self._sum_columns()
        if self.sizes.dead_room:
            dead.pass_back()
        self._sort_by_feature()
        self._learn()

    def _screen(self) -> None:
        held, sizes, d_in = self.buffers, self.sizes, self.sizes.d_in
        columns = power_of_two(d_in)
        screen.prepare[(sizes.rows + bool(sizes.dead_room),)](
            held.x,
            self.learned.b_dec,
            self.constants.scale,
            held.centred,
            held.narrow_x,
            held.row_error,
            held.row_floor,
            held.step,
            held.steps_done,
            held.entry_count,
            held.histograms,
            held.smallest_rank,
            held.coming_flags,
            self.learned.tokens_since_fired,
            held.slots,
            held.dead,
            held.n_dead,
            held.flags,
            self.constants.dead_after,
            sizes.d_sae,
            sizes.dead_room,
            sizes.rows,
            d_in,
            d_in**0.5 * 2.0**-25,
            AUX=sizes.dead_room > 0,
            HISTOGRAMS=len(held.histograms) if sizes.of_batch else 0,
            COLUMNS=columns,
            num_warps=warps(columns, 8),
        )
        with float32_sums():
            torch.addmm(held.narrow_b, held.narrow_x, held.narrow_w.t(), out=held.screened)

    def _explain(self) -> None:
        held, sizes = self.buffers, self.sizes
        explain.explain[(sizes.rows,)](
            held.x,
            self.constants.scale,
            self.learned.W_dec,
            self.learned.b_dec,
            held.features,
            held.values,
            held.kept,
            held.gradient,
            held.d_values,
            held.row_losses,
            held.prefix_ends,
            held.rates,
            held.step,
            held.flags,
            sizes.rows,
            sizes.d_in,
            sizes.width,
            RATES,
            PREFIXES=sizes.prefixes,
            PENALISED=sizes.all_positive,
            ROOM=sizes.width,
            **entry_block(sizes.width, sizes.d_in, min(2, sizes.prefixes)),
        )

    def _sum_columns(self) -> None:
        held, sizes = self.buffers, self.sizes
        explain.columns[(-(-sizes.d_in // 32),)](
            held.gradient,
            held.sums,
            held.row_losses,
            held.losses,
            held.x,
            self.constants.scale,
            held.dead_sources,
            held.aux_parts,
            held.flags,
            sizes.rows,
            sizes.d_in,
            PREFIXES=sizes.prefixes,
            AUX=sizes.dead_room > 0,
            ROWS=64,
            COLUMNS=32,
            AT_ONCE=1024,
            num_warps=4,
        )

    def _sort_by_feature(self) -> None:
        held, sizes = self.buffers, self.sizes
        by_feature.place[(-(-sizes.d_sae // 1024),)](
            held.counts,
            held.starts,
            held.entry_count,
            held.group_norm,
            held.group_floor,
            held.next_level,
            self.learned.tokens_since_fired,
            held.flags,
            0 if sizes.dead_room else self.constants.dead_after,
            sizes.d_sae,
            sizes.groups,
            FEATURES=1024,
            num_warps=4,
        )
        words = min(power_of_two(sizes.words), 128, max(1, ENTRY_NUMBERS // sizes.width))
        by_feature.fill[(sizes.rows,)](
            held.features,
            held.kept,
            held.bitmap,
            held.starts,
            held.entries,
            held.flags,
            sizes.width,
            sizes.words,
            ROOM=sizes.width,
            WORDS=words,
            num_warps=4,
        )

    def _learn(self) -> None:
        held, sizes, learned, constants = self.buffers, self.sizes, self.learned, self.constants
        adam = (1 - constants.beta1, constants.beta2, 1 - constants.beta2, constants.eps)
        columns = power_of_two(sizes.d_in)
        block = {"ENTRIES": max(1, min(16, 4096 // columns)), "COLUMNS": columns, "num_warps": warps(2 * columns, 16)}
        learn.learn_decoder[(sizes.d_sae,)](
            learned.W_dec,
            *learned.moments["W_dec"],
            held.gradient,
            held.values,
            held.entries,
            held.starts,
            held.counts,
            held.prefix_ends,
            held.slots,
            held.dead_gradients[0],
            held.aux_factor,
            held.rates,
            held.step,
            held.flags,
            *adam,
            sizes.width,
            sizes.rows,
            sizes.d_in,
            RATES,
            AUX=sizes.dead_room > 0,
            UNIT=constants.unit_norm,
            PREFIXES=sizes.prefixes,
            **block,
        )
        threshold = held.lift if learned.threshold is None else learned.threshold
        learn.learn_encoder[(sizes.programs,)](
            learned.W_enc,
            *learned.moments["W_enc"],
            learned.b_enc,
            *learned.moments["b_enc"],
            held.narrow_w,
            held.narrow_b,
            held.group_norm,
            held.group_floor,
            held.centred,
            held.d_values,
            held.entries,
            held.starts,
            held.counts,
            held.bitmap,
            learned.tokens_since_fired,
            held.through_encoder,
            threshold,
            held.lift,
            held.level,
            held.next_level,
            held.smallest_rank,
            held.slots,
            held.dead_gradients[1],
            held.dead_d_b,
            held.aux_factor,
            held.rates,
            held.step,
            held.flags,
            *adam,
            float(constants.min_density * sizes.rows),
            float(constants.patience),
            sizes.width,
            sizes.d_in,
            sizes.d_sae,
            sizes.words,
            sizes.rows,
            RATES,
            AUX=sizes.dead_room > 0,
            THRESHOLDS=sizes.of_batch,
            GROUP=sizes.group,
            **block,
        )
        learn.finish[(-(-sizes.d_in // 32),)](
            learned.b_dec,
            *learned.moments["b_dec"],
            held.sums,
            held.through_encoder,
            sizes.programs,
            threshold,
            held.lift,
            held.level,
            held.next_level,
            held.rates,
            held.step,
            held.steps_done,
            held.flags,
            *adam,
            sizes.d_in,
            sizes.d_sae,
            held.entry_count,
            held.losses,
            held.log,
            LOG_STEPS,
            RATES,
            self.constants.most_entries,
            held.n_dead,
            sizes.fewest_dead,
            held.coming_flags,
            THRESHOLDS=sizes.of_batch,
            PARTS=64,
            COLUMNS=32,
            FEATURES=1024,
            num_warps=4,
        )


@contextmanager
def float32_sums() -> Iterator[None]:
    """Float16 products add in float32 inside the block: otherwise the screen's bound does not hold."""
    settings = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")  # the second since PyTorch 2.7
    before = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    try:
        for name in before:
            setattr(settings, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
