"""The launches that change the parameters: gradients by feature, clipped or not, and Adam's step on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae.kernels.triton_step import clip, learn, own
from sae.kernels.triton_step.buffers import LOG_STEPS, RATES, Buffers, Constants, Learned, Sizes, power_of_two
from sae.kernels.triton_step.choice import warps


@dataclass(frozen=True)
class Learning:
    """From the entries in the order of features to the next step's parameters."""

    sizes: Sizes
    constants: Constants
    learned: Learned
    held: Buffers

    def run(self) -> None:
        """Every parameter once."""
        if self.learned.W_skip is not None:
            torch.mm(self.held.centred.t(), self.held.gradient[0], out=self.held.skip_gradient)
        if self.sizes.has_own:
            self._own_gradients()
        if self.constants.clip:
            self._clip()
        if self.sizes.has_own:
            self._learn_own()
        if self._revives:
            own.mean_own[(1,)](
                self.learned.own, self.held.mean_own, self.held.flags, self.sizes.d_sae, FEATURES=4096, num_warps=8
            )
        self._learn_decoder()
        self._learn_encoder()
        if self.learned.W_skip is not None:
            self._learn_skip(self.learned.W_skip)
        self._finish()

    @property
    def _adam(self) -> tuple[float, float, float, float]:
        constants = self.constants
        return 1 - constants.beta1, constants.beta2, 1 - constants.beta2, constants.eps

    def _block(self, width: int) -> dict[str, Any]:
        columns = power_of_two(width)
        return {"ENTRIES": max(1, min(16, 4096 // columns)), "COLUMNS": columns, "num_warps": warps(2 * columns, 16)}

    @property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.held.entries, self.held.starts, self.held.counts

    @property
    def _now(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.held.rates, self.held.step, self.held.flags

    def _clip(self) -> None:
        held, sizes, learned = self.held, self.sizes, self.learned
        block = self._block(max(sizes.d_in, sizes.d_out)) | {"COLUMNS": power_of_two(sizes.d_in)}
        # Both gradients at once: what `_block` takes would not fit the registers.
        block |= {"ENTRIES": max(1, block["ENTRIES"] // 2), "num_warps": min(block["num_warps"], 8)}
        clip.measure[(sizes.programs,)](
            learned.W_enc,
            learned.W_dec,
            held.centred,
            held.gradient,
            held.values,
            held.d_values,
            *self._by_feature,
            held.prefix_ends,
            held.norms,
            held.site_of,
            held.slots,
            *held.dead_gradients,
            held.dead_d_b,
            held.aux_factor,
            held.own_gradients,
            held.bias_less,
            held.penalty,
            held.rates,
            held.step,
            held.through_encoder,
            held.squares,
            held.flags,
            held.skip_gradient,
            sizes.width,
            sizes.rows,
            sizes.d_in,
            sizes.d_out,
            sizes.d_sae,
            RATES,
            PRE_BIAS=self.constants.pre_bias,
            AUX=sizes.dead_room > 0,
            PENALTY=sizes.penalty_among("norms", "jumps", "gates"),
            SITES=sizes.sites,
            PREFIXES=sizes.prefixes,
            SKIP=sizes.skip,
            COLUMNS_OUT=power_of_two(sizes.d_out),
            **block,
        )
        clip.clip_factor[(1,)](
            held.squares,
            held.sums,
            held.through_encoder,
            held.clip_factor,
            held.flags,
            self.constants.clip,
            sizes.programs,
            sizes.d_out,
            PRE_BIAS=self.constants.pre_bias,
            PARTS=64,
            COLUMNS=32,
            num_warps=4,
        )

    def _own_gradients(self) -> None:
        held, sizes, learned = self.held, self.sizes, self.learned
        own.own_gradients[(sizes.d_sae,)](
            learned.own,
            learned.b_enc,
            held.d_own,
            held.values,
            held.pre_acts,
            *self._by_feature,
            held.own_gradients,
            held.fired,
            held.bias_less,
            held.flags,
            sizes.d_sae,
            PENALTY=sizes.penalty,
            ENTRIES=32,
            num_warps=1,
        )

    def _learn_own(self) -> None:
        held, sizes, learned, constants = self.held, self.sizes, self.learned, self.constants
        gated = learned.b_mag is not None
        own.learn_own[(-(-sizes.d_sae // 1024),)](
            learned.own,
            *learned.moments["r_mag" if gated else "threshold"],
            learned.own if learned.b_mag is None else learned.b_mag,
            *learned.moments["b_mag" if gated else "threshold"],
            held.lift,
            held.own_gradients,
            held.clip_factor,
            *self._now,
            *self._adam,
            float(constants.threshold_lr_ratio),
            float(constants.bandwidth),
            sizes.d_sae,
            RATES,
            CLIPPED=constants.clip > 0,
            PENALTY=sizes.penalty,
            FEATURES=1024,
            num_warps=4,
        )

    def _learn_decoder(self) -> None:
        held, sizes, learned, constants = self.held, self.sizes, self.learned, self.constants
        learn.learn_decoder[(sizes.d_sae,)](
            learned.W_dec,
            *learned.moments["W_dec"],
            held.gradient,
            held.values,
            *self._by_feature,
            held.prefix_ends,
            held.norms,
            held.site_of,
            held.slots,
            held.dead_gradients[0],
            held.aux_factor,
            held.clip_factor,
            held.penalty,
            *self._now,
            *self._adam,
            sizes.width,
            sizes.rows,
            sizes.d_out,
            RATES,
            AUX=sizes.dead_room > 0,
            CLIPPED=constants.clip > 0,
            PENALTY=sizes.penalty_among("norms"),
            SITES=sizes.sites,
            UNIT=constants.unit_norm,
            PREFIXES=sizes.prefixes,
            **self._block(sizes.d_out),
        )

    @property
    def _threshold(self) -> Tensor:
        """Batch-topk's or JumpReLU's thresholds; of other recipes a tensor that is not read."""
        return self.held.lift if self.learned.own is None else self.learned.own

    @property
    def _revives(self) -> bool:
        """Whether JumpReLU's silent features come back."""
        return self.sizes.penalty == "jumps" and self.constants.min_density > 0

    def _learn_encoder(self) -> None:
        held, sizes, learned, constants = self.held, self.sizes, self.learned, self.constants
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
            *self._by_feature,
            held.bitmap,
            learned.tokens_since_fired,
            held.through_encoder,
            self._threshold,
            held.lift,
            held.level,
            held.next_level,
            held.smallest_rank,
            held.slots,
            held.dead_gradients[1],
            held.dead_d_b,
            held.aux_factor,
            held.clip_factor,
            held.fired,
            held.bias_less,
            held.mean_own,
            *self._now,
            *self._adam,
            float(constants.min_density * sizes.rows),
            float(constants.min_density),
            float(constants.patience),
            sizes.width,
            sizes.d_in,
            sizes.d_sae,
            sizes.words,
            sizes.rows,
            RATES,
            AUX=sizes.dead_room > 0,
            CLIPPED=constants.clip > 0,
            PENALTY=sizes.penalty_among("jumps", "gates"),
            REVIVES=self._revives,
            THRESHOLDS=sizes.of_batch,
            GROUP=sizes.group,
            **self._block(sizes.d_in),
        )

    def _learn_skip(self, W_skip: Tensor) -> None:
        held, constants = self.held, self.constants
        learn.learn_skip[(-(-W_skip.numel() // 1024),)](
            W_skip,
            *self.learned.moments["W_skip"],
            held.skip_gradient,
            held.clip_factor,
            *self._now,
            *self._adam,
            W_skip.numel(),
            RATES,
            CLIPPED=constants.clip > 0,
            NUMBERS=1024,
            num_warps=4,
        )

    def _finish(self) -> None:
        held, sizes, learned, constants = self.held, self.sizes, self.learned, self.constants
        learn.finish[(-(-sizes.d_out // 32),)](
            learned.b_dec,
            *learned.moments["b_dec"],
            held.sums,
            held.through_encoder,
            sizes.programs,
            held.clip_factor,
            self._threshold,
            held.lift,
            held.level,
            held.next_level,
            held.penalty,
            *(constants.search or (0.0, 0.0, 0.0, 0.0)),
            held.rates,
            held.step,
            held.steps_done,
            held.flags,
            *self._adam,
            sizes.rows,
            sizes.d_out,
            sizes.d_sae,
            held.active if sizes.has_own else held.entry_count,
            held.losses,
            held.log,
            LOG_STEPS,
            RATES,
            constants.most_entries,
            held.n_dead,
            sizes.fewest_dead,
            held.coming_flags,
            PRE_BIAS=constants.pre_bias,
            CLIPPED=constants.clip > 0,
            ANNEALS=sizes.penalty == "powers",
            SEARCHES=constants.search is not None,
            THRESHOLDS=sizes.of_batch,
            PARTS=64,
            COLUMNS=32,
            FEATURES=1024,
            num_warps=4,
        )
