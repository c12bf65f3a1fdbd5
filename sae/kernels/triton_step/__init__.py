"""A training step in fixed shapes, for a CUDA device: the host never waits, and one CUDA graph holds all launches.

    prepare → product → group maxima → bar → collect → choose → explain (→ dead features) → columns → place → fill
            → learn decoder → learn encoder → finish

Every size is known beforehand: a row has room for a fixed number of candidates, a feature's entries are found by a
counting sort, gradients are used where they are made and never stored as matrices. What a step decides stays on the
device. A step that cannot be done in these shapes sets a bit in `flags`; from then on no kernel changes anything, so
the step has not happened and none after it, until the host takes that step another way and clears the flags.

`screen`, `select`, `batch_select`, `explain`, `dead_select`, `by_feature` and `learn` hold the kernels, stage by stage;
`buffers` the memory between them; `choice`, `dead_features` and `step` the launches; `graph` their capture.
`dense` holds those around the dense products of a step whose activations are not sparse yet: `sae.training.dense_step`.
"""

from __future__ import annotations

# Bits of `flags`. NOT_FINITE, OVERRUN: the step was not done. DENSE: the next one is for dense products.
# SPARSE: it is no longer. DEAD: the room for dead features (first none) does not fit their number.
NOT_FINITE, OVERRUN, DEAD, DENSE, WARMING_UP, SPARSE = 1, 2, 4, 8, 16, 32
