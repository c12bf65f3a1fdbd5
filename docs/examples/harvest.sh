#!/bin/bash
# Harvest with one process for each GPU of this machine.
set -euo pipefail
torchrun --standalone --nproc-per-node "${GPUS:-8}" --no-python \
  sae harvest --model "${MODEL:-tiny-relu-1l}" --text "${TEXT:-default}" --out "${STORE:-acts.zarr}" --tokens "${TOKENS:-2000000}"
