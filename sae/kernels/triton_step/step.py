"""The launches of a fixed-shape step, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sae.kernels.triton_step import by_feature, explain, outside, screen
from sae.kernels.triton_step.buffers import RATES, Buffers, Constants, Learned, Sizes, power_of_two
from sae.kernels.triton_step.choice import ENTRY_NUMBERS, Choice, entry_block, warps
from sae.kernels.triton_step.dead_features import DeadFeatures
from sae.kernels.triton_step.learning import Learning


class FixedStep:
    """One training step on what lies in `buffers.x`. The same launches with the same arguments every time."""

    def __init__(
        self, sizes: Sizes, constants: Constants, learned: Learned, outside: Callable[[Buffers], None] | None = None
    ) -> None:
        self.sizes, self.constants, self.learned = sizes, constants, learned
        # Where the loss is not of these kernels: from `x_hat` makes `gradient[0]` and `row_losses[0]`.
        self.outside = outside
        assert sizes.elsewhere == (outside is not None)
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
        if sizes.of_batch and learned.own is not None:
            held.level.copy_(learned.own.amax()[None])
            torch.sub(held.level, learned.own, out=held.lift)
        if sizes.penalty == "jumps" and learned.own is not None:
            torch.sub(self.constants.bandwidth / 2, learned.own, out=held.lift)
        if sizes.penalty == "norms":
            parts = torch.split(learned.W_dec, list(sizes.site_widths or (sizes.d_out,)), dim=1)
            held.norms.copy_(torch.stack([part.norm(dim=1) for part in parts], dim=1))
        for scratch in (held.counts, held.bitmap, held.flags, held.coming_flags):
            scratch.zero_()

    def run(self) -> None:
        """Every stage once."""
        self.reconstruct()
        if self.outside is not None:
            self.outside(self.buffers)
        self.learn()

    @torch.no_grad()
    def reconstruct(self) -> None:
        """The stages up to x̂ and, but for a loss from outside, its gradient."""
        self._screen()
        Choice(self.sizes, self.constants, self.learned, self.buffers).run()
        if self.outside is None:
            self._explain()
        else:
            self._reconstruct_for_outside()

    @torch.no_grad()
    def learn(self) -> None:
        """The other stages."""
        if self.outside is not None:
            self._pass_back_from_outside()
        dead = DeadFeatures(self.sizes, self.constants, self.learned, self.buffers)
        if self.sizes.dead_room:
            dead.explain_error(warps(power_of_two(self.sizes.d_in), 8))
        self._sum_columns()
        if self.sizes.dead_room:
            dead.pass_back()
        self._sort_by_feature()
        Learning(self.sizes, self.constants, self.learned, self.buffers).run()

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
            held.active,
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
            PRE_BIAS=self.constants.pre_bias,
            HISTOGRAMS=len(held.histograms) if sizes.of_batch else 0,
            COLUMNS=columns,
            num_warps=warps(columns, 8),
        )
        with float32_sums():
            torch.addmm(held.narrow_b, held.narrow_x, held.narrow_w.t(), out=held.screened)

    @property
    def _target(self) -> tuple[Tensor, float]:
        """What is to be reconstructed, and its scale."""
        if self.sizes.target_width:
            return self.buffers.y, self.constants.target_scale
        return self.buffers.x, self.constants.scale

    def _explain(self) -> None:
        held, sizes, learned = self.buffers, self.sizes, self.learned
        bias, bias_stride = learned.b_dec, 0
        if learned.W_skip is not None:
            bias, bias_stride = held.linear, sizes.d_out
            torch.addmm(learned.b_dec, held.centred, learned.W_skip, out=held.linear)  # without pre-bias: x · scale
        explain.explain[(sizes.rows,)](
            *self._target,
            learned.W_dec,
            bias,
            bias_stride,
            held.features,
            held.values,
            held.kept,
            held.gradient,
            held.d_values,
            held.row_losses,
            held.prefix_ends,
            held.norms,
            held.pre_acts,
            held.lift if learned.own is None else learned.own,
            held.d_own,
            held.active,
            held.penalty,
            held.rates,
            held.step,
            held.flags,
            self.constants.bandwidth,
            sizes.rows,
            sizes.d_out,
            sizes.width,
            RATES,
            PREFIXES=sizes.prefixes,
            PENALTY=sizes.penalty,
            SITES=sizes.sites,
            ROOM=sizes.width,
            **entry_block(sizes.width, sizes.d_out, 2 if sizes.prefixes > 1 or sizes.penalty == "gates" else 1),
        )

    def _reconstruct_for_outside(self) -> None:
        held, sizes = self.buffers, self.sizes
        outside.reconstruct[(sizes.rows,)](
            *self._target,
            self.learned.W_dec,
            self.learned.b_dec,
            held.features,
            held.values,
            held.kept,
            held.x_hat,
            held.row_losses,
            held.flags,
            sizes.rows,
            sizes.d_out,
            sizes.width,
            ROOM=sizes.width,
            **entry_block(sizes.width, sizes.d_out),
        )

    def _pass_back_from_outside(self) -> None:
        held, sizes = self.buffers, self.sizes
        outside.pass_back[(sizes.rows,)](
            self.learned.W_dec,
            held.features,
            held.values,
            held.kept,
            held.gradient,
            held.d_values,
            held.row_losses,
            held.penalty,
            held.rates,
            held.step,
            held.flags,
            sizes.rows,
            sizes.d_out,
            sizes.width,
            RATES,
            ROOM=sizes.width,
            **entry_block(sizes.width, sizes.d_out),
        )

    def _sum_columns(self) -> None:
        held, sizes = self.buffers, self.sizes
        explain.columns[(-(-sizes.d_out // 32),)](
            held.gradient,
            held.sums,
            held.row_losses,
            held.losses,
            *self._target,
            held.dead_sources,
            held.aux_parts,
            held.flags,
            sizes.rows,
            sizes.d_out,
            PREFIXES=sizes.prefixes,
            NUMBERS=4 if sizes.penalty == "powers" else 2,
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


@contextmanager
def float32_sums() -> Iterator[None]:
    """Narrow products add in float32 inside the block: otherwise the screen's bound does not hold."""
    settings = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
    names.append("allow_fp16_accumulation")  # since PyTorch 2.7
    before = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    try:
        for name in before:
            setattr(settings, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
