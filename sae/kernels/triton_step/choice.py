"""The launches that choose a batch's entries, by the rule of the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sae.kernels.triton_step import batch_select, screen, select
from sae.kernels.triton_step.buffers import BAR_BINS, Buffers, Constants, Learned, Sizes, power_of_two

SCREEN_NUMBERS = 4096  # of a block in the screen
ENTRY_NUMBERS = 8192  # of a block of entries and columns
RANKS = 2048  # of a block of ranks


@dataclass(frozen=True)
class Choice:
    """From the screened product to each row's entries."""

    sizes: Sizes
    constants: Constants
    learned: Learned
    held: Buffers

    def run(self) -> None:
        """The stages of the rule."""
        if self.sizes.penalty:
            self._choose_above()
        elif self.sizes.of_batch:
            self._choose_of_batch()
        else:
            self._choose_of_rows()

    def _bounds(self) -> tuple[Tensor, ...]:
        held = self.held
        return held.row_error, held.row_floor, held.group_norm, held.group_floor

    def _find_maxima(self) -> None:
        held, sizes = self.held, self.sizes
        at_once = max(1, SCREEN_NUMBERS // sizes.group)
        screen.group_maxima[(sizes.rows, -(-sizes.groups // at_once))](
            held.screened,
            held.best,
            *self._bounds(),
            held.lift,
            held.sure_ranks if sizes.of_batch else held.best,
            held.flags,
            sizes.d_sae,
            sizes.groups,
            GROUP=sizes.group,
            GROUPS=at_once,
            RANKED=sizes.of_batch,
            num_warps=4,
        )

    def _collect(self) -> None:
        held, sizes = self.held, self.sizes
        screen.collect[(sizes.rows,)](
            held.screened,
            held.best,
            *self._bounds(),
            held.bar,
            held.histograms,
            held.lift,
            held.candidates,
            held.count,
            held.flags,
            sizes.d_sae,
            sizes.groups,
            sizes.k * sizes.rows,
            GROUP=sizes.group,
            GROUPS=min(power_of_two(sizes.groups), max(1, SCREEN_NUMBERS // sizes.group)),
            ROOM=sizes.room,
            BAR="zero" if sizes.penalty else "batch" if sizes.of_batch else "row",
            LIFTED=len(held.lift) > 1,
            POSITIVE=sizes.penalty != "jumps",
            SKIP=not sizes.penalty,  # `best` is made only where the bar comes from it
            num_warps=4,
        )

    def _to_choose(self) -> tuple[Tensor, ...]:
        """What a selection reads and writes: the candidates, their exact products' factors, and the entries kept."""
        held, learned = self.held, self.learned
        entries = held.features, held.values, held.kept, held.counts, held.bitmap, held.flags
        return self._factor(), learned.W_enc, learned.b_enc, held.candidates, held.count, *entries

    def _factor(self) -> Tensor:
        """What pre-activations come from: the centred rows, or the product that has them already."""
        return self.held.centred if self.sizes.exact else self.held.screened

    def _factor_width(self) -> int:
        return self.sizes.d_in if self.sizes.exact else self.sizes.d_sae

    def _choose_above(self) -> None:
        held, sizes, learned = self.held, self.sizes, self.learned
        self._collect()
        select.choose_above[(sizes.rows,)](
            *self._to_choose(),
            held.lift if learned.own is None else learned.own,
            held.lift if learned.b_mag is None else learned.b_mag,
            held.pre_acts,
            self.constants.bandwidth,
            self._factor_width(),
            sizes.width,
            sizes.words,
            PENALTY=sizes.penalty_among("jumps", "gates"),
            ROOM=sizes.room,
            **entry_block(sizes.room, sizes.d_in),
        )

    def _choose_of_rows(self) -> None:
        held, sizes = self.held, self.sizes
        self._find_maxima()
        screen.row_bar[(sizes.rows,)](
            held.best,
            *self._bounds(),
            held.bar,
            held.flags,
            sizes.k,
            sizes.groups,
            GROUPS=power_of_two(sizes.groups),
            STEPS=16,
            num_warps=4,
        )
        self._collect()
        select.choose[(sizes.rows,)](
            *self._to_choose(),
            sizes.k,
            self._factor_width(),
            sizes.width,
            sizes.words,
            ROOM=sizes.room,
            **entry_block(sizes.room, sizes.d_in),
        )

    def _choose_of_batch(self) -> None:
        held, sizes = self.held, self.sizes
        wanted, bins, digits = sizes.k * sizes.rows, held.histograms, held.histograms[BAR_BINS:]
        self._find_maxima()
        self._count_digits(held.sure_ranks, bins, 0)
        self._collect()
        batch_select.evaluate[(sizes.rows,)](
            self._factor(),
            self.learned.W_enc,
            self.learned.b_enc,
            held.lift,
            held.candidates,
            held.count,
            held.pre,
            held.ranks,
            digits,
            held.flags,
            self._factor_width(),
            ROOM=sizes.room,
            **entry_block(sizes.room, sizes.d_in),
        )
        for digit in (1, 2):
            self._count_digits(held.ranks, digits, digit)
        batch_select.count_ties[(sizes.rows,)](
            held.ranks, digits, held.ties, held.flags, wanted, ROOM=sizes.room, num_warps=4
        )
        batch_select.keep_largest[(sizes.rows,)](
            held.pre,
            held.ranks,
            held.candidates,
            digits,
            held.ties,
            held.features,
            held.values,
            held.kept,
            held.counts,
            held.bitmap,
            held.smallest_rank,
            held.flags,
            wanted,
            sizes.width,
            sizes.words,
            ROOM=sizes.room,
            ROWS=power_of_two(sizes.rows),
            num_warps=4,
        )

    def _count_digits(self, ranks: Tensor, histograms: Tensor, digit: int) -> None:
        batch_select.count_digits[(-(-ranks.numel() // RANKS),)](
            ranks,
            histograms,
            self.held.flags,
            self.sizes.k * self.sizes.rows,
            ranks.numel(),
            ROUND=digit,
            BLOCK=RANKS,
            num_warps=8,
        )


def warps(numbers: int, most: int) -> int:
    """Warps for a block of so many numbers: 256 to each."""
    return min(most, max(1, numbers // 256))


def entry_block(room: int, d_in: int, copies: int = 1) -> dict[str, Any]:
    """The columns at once of a block of `room` entries, and its warps: at most 64 numbers to a thread."""
    columns = min(64, power_of_two(d_in), max(16, ENTRY_NUMBERS // room))
    return {"COLUMNS": columns, "num_warps": min(16, max(4, copies * room // 32))}
