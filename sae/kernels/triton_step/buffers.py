"""The memory of a fixed-shape step: its sizes, and every tensor that one stage leaves for another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LARGEST_ROOM = 1024  # candidates of a row
SMALLEST_DEAD_ROOM = 32  # dead features
LOG_STEPS = 32  # steps whose figures are kept until the host reads them
RATES, RATE_COLUMNS = 1024, 6  # coming steps whose learning rates and λ are on the device (`penalty`)
PROGRAMS = 528  # of `learn_encoder`: four for each of an H200's multiprocessors, and the same number everywhere
BAR_BINS, DIGIT_BINS = 2048, 4096  # of histograms: for the batch's bar, and for the three digits (`batch_select`)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Sizes:
    """What a fixed-shape step is made for. All of it is known before the first step, and only `room` may change."""

    rows: int
    d_in: int
    d_sae: int
    k: int
    room: int  # candidates of a row
    of_batch: bool = False  # whether k · rows entries of the batch are chosen, instead of k of each row
    penalty: str = ""  # what λ multiplies (`explain`); then every entry above its threshold is active, whatever k
    prefix_ends: tuple[int, ...] = ()  # of matryoshka; () is one prefix with all features
    dead_room: int = 0  # dead features for AuxK; 0: a step with dead features is not done
    exact: bool = True  # whether float32 products decide; otherwise a bfloat16 one does, which then is no screen
    target_width: int = 0  # of a transcoder's y; 0: the target is x
    skip: bool = False  # whether ŷ has a linear part, x W_skip
    elsewhere: bool = False  # whether the gradient of x̂ comes from outside of the step (`outside`)
    site_widths: tuple[int, ...] = ()  # the parts of a crosscoder's decoder rows, whose norms "norms" adds; () is one

    @property
    def d_out(self) -> int:
        return self.target_width or self.d_in

    @property
    def width(self) -> int:
        """Entries of a row at most: a power of two."""
        return self.room if self.of_batch or self.penalty else power_of_two(self.k)

    @property
    def entries(self) -> int:
        """Entries of a batch at most."""
        return self.rows * (self.width if self.penalty else self.k)

    @property
    def group(self) -> int:
        """Features in a group: about 1,024 groups, and at least 2 k of them."""
        group = max(32, power_of_two(self.d_sae) // 1024)
        while group > 1 and self.d_sae < 2 * self.k * group:
            group //= 2
        return group

    @property
    def groups(self) -> int:
        return -(-self.d_sae // self.group)

    @property
    def words(self) -> int:
        """Words of 32 rows."""
        return -(-self.rows // 32)

    @property
    def prefixes(self) -> int:
        return max(1, len(self.prefix_ends))

    @property
    def sites(self) -> int:
        return max(1, len(self.site_widths))

    @property
    def has_own(self) -> bool:
        """Whether features have parameters of their own: learned thresholds, or magnitudes besides gates."""
        return self.penalty in ("jumps", "gates")

    def penalty_among(self, *names: str) -> str:
        """The penalty for a kernel in which only these differ, so that it is compiled once for all others."""
        return self.penalty if self.penalty in names else ""

    @property
    def fewest_dead(self) -> int:
        """Dead features at or below which there is too much room for them; −1: never."""
        return self.dead_room // 8 if self.dead_room > SMALLEST_DEAD_ROOM else -1

    @property
    def programs(self) -> int:
        return min(PROGRAMS, self.d_sae)

    def with_more_room(self) -> Sizes:
        """Twice the room, as far as there is more."""
        return replace(self, room=min(2 * self.room, LARGEST_ROOM))


def first_room(k: int, d_sae: int, *, of_batch: bool) -> int:
    """Room for a row's candidates: twice its entries, or eight times the mean number where rows share a batch's."""
    wanted = power_of_two(8 * k if of_batch else 2 * k)
    return max(32, min(wanted, power_of_two(d_sae), LARGEST_ROOM))


def dead_room_for(n_dead: int) -> int:
    """Room for so many dead features and half as many again."""
    return max(SMALLEST_DEAD_ROOM, power_of_two(n_dead + n_dead // 2))


@dataclass(frozen=True)
class Constants:
    """Numbers that stay the same in all steps of a run."""

    scale: float
    beta1: float
    beta2: float
    eps: float
    unit_norm: bool
    dead_after: int = 0  # rows without a firing after which a feature is dead, for AuxK; 0: never
    aux_coefficient: float = 0.0
    min_density: float = 0.0  # batch-topk's balance
    patience: float = 1.0
    most_entries: int = 2**31 - 1  # of a batch after which the next step should not be sparse
    pre_bias: bool = True
    target_scale: float = 0.0  # of y, where it is not x
    clip: float = 0.0  # largest joint norm of the gradients; 0: no limit
    bandwidth: float = 0.0  # of JumpReLU's pseudo-gradients
    threshold_lr_ratio: float = 1.0
    search: tuple[float, float, float, float] | None = None  # for λ: log target L0, first and last step, gain


@dataclass(frozen=True)
class Learned:
    """What a step changes: parameters with their moments, one row per feature, and the rows since each firing."""

    W_enc: Tensor  # [d_sae, d_in], like its moments
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    moments: dict[str, tuple[Tensor, Tensor]]
    tokens_since_fired: Tensor
    own: Tensor | None = None  # batch-topk's estimated and JumpReLU's learned thresholds, or r_mag of gates
    b_mag: Tensor | None = None  # of gates
    W_skip: Tensor | None = None  # [d_in, d_out]


class Exchange:
    """What any fixed-shape step is told by the host, and what it tells."""

    def __init__(self, device: torch.device) -> None:
        self.rates = torch.zeros(RATES, RATE_COLUMNS, device=device)
        self.log = torch.zeros(LOG_STEPS, 3, device=device)
        self.penalty = torch.zeros(4, device=device, dtype=torch.float64)
        flags = (torch.zeros(1, device=device, dtype=torch.int32) for _ in range(4))
        self.flags, self.coming_flags, self.step, self.steps_done = flags


class Buffers(Exchange):
    """The tensors of a step, by the stage that writes them."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        super().__init__(device)
        rows, d_in, d_out, d_sae, width = sizes.rows, sizes.d_in, sizes.d_out, sizes.d_sae, sizes.width

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=torch.int32)

        def narrow(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=torch.float16 if sizes.exact else torch.bfloat16)

        # AuxK: what the dead features' gradients are made from (the error left and the centred rows), and by slot
        room = sizes.dead_room
        self.dead_sources = floats(2 if room else 1, rows, d_in)
        self.slots, self.dead, self.n_dead = whole(d_sae if room else 1), whole(max(1, room)), whole(1)
        self.dead_enc, self.dead_dec, self.dead_b = floats(room, d_in), floats(room, d_in), floats(room)
        self.dead_acts, self.dead_gradients = floats(2, rows, room), floats(2, room, d_in)
        self.dead_d_b, self.aux_factor = floats(max(1, room)), floats(1)
        self.aux_parts = floats(3, -(-d_in // 32))
        # the batch, and the screen's copy of the encoder
        self.x, self.y = floats(rows, d_in), floats(rows if sizes.target_width else 0, d_out)
        self.centred, self.narrow_x = self.dead_sources[-1], narrow(rows, d_in)
        self.row_error, self.row_floor = floats(rows), floats(rows)
        self.narrow_w, self.narrow_b = narrow(d_sae, d_in), narrow(d_sae)
        self.group_norm, self.group_floor = whole(sizes.groups), whole(sizes.groups)  # bits of float32 numbers
        # the screen
        self.screened, self.best = narrow(rows, d_sae), narrow(rows, sizes.groups)
        self.bar = floats(1 if sizes.of_batch or sizes.penalty else rows)
        self.candidates, self.count = whole(rows, sizes.room), whole(rows)
        # the choice
        self.features, self.values, self.d_values = whole(rows, width), floats(rows, width), floats(rows, width)
        self.kept, self.counts, self.bitmap = whole(rows), whole(d_sae), whole(d_sae, sizes.words)
        if sizes.of_batch:
            self.sure_ranks = floats(rows, sizes.groups)
            self.pre, self.ranks, self.ties = floats(rows, width), floats(rows, width), whole(rows)
        self.histograms = whole(BAR_BINS + DIGIT_BINS if sizes.of_batch else 1)
        lifted = sizes.of_batch or sizes.penalty == "jumps"
        self.lift, self.level, self.next_level = floats(d_sae if lifted else 1), floats(1), whole(1)
        self.smallest_rank = whole(1)
        # the loss and its gradients
        self.gradient, self.sums = floats(sizes.prefixes, rows, d_out), floats(d_out)
        # what ŷ has besides its features' part, and the gradient of W_skip
        self.linear, self.skip_gradient = floats(rows if sizes.skip else 0, d_out), floats(d_in * sizes.skip, d_out)
        self.row_losses, self.losses = floats(4, rows), floats(4)
        self.x_hat = floats(rows if sizes.elsewhere else 0, d_out)
        # the norms of decoder rows, by site, and the site of each column
        self.norms = floats(*((d_sae, sizes.sites) if sizes.penalty == "norms" else (1, 1)))
        sites = [site for site, n in enumerate(sizes.site_widths or (d_out,)) for _ in range(n)]
        self.site_of = torch.tensor(sites, dtype=torch.int32, device=device)
        self.prefix_ends = torch.tensor(sizes.prefix_ends or (d_sae,), dtype=torch.int32, device=device)
        # by feature
        self.starts, self.entries, self.entry_count = whole(d_sae), whole(sizes.entries), whole(1)
        self.through_encoder = floats(sizes.programs, d_in)
        self.squares, self.clip_factor = floats(sizes.programs), floats(1)
        # of features with parameters of their own
        some = (rows, width) if sizes.has_own else (1, 1)
        self.pre_acts, self.d_own, self.active = floats(*some), floats(*some), whole(1)
        self.own_gradients, self.mean_own = floats(2, d_sae if sizes.has_own else 1), floats(1)
        self.fired, self.bias_less = (make(d_sae if sizes.has_own else 1) for make in (whole, floats))
