#!/usr/bin/env bash
# Compiles every variant of the fixed-shape step's kernels for GPUs, without one: with the installed version of Triton and
# with two others. Run it after a change of a kernel: the tests compile only some of the variants.
#   bash scripts/check_tritons.sh [DIR]   # DIR keeps the two versions (1.3 GB); by default they are deleted again
. "$(dirname "$0")/environment.sh" dev
home=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "$home"' EXIT
for version in 3.2.0 3.6.0; do
    [ -d "$home/$version" ] || python -m pip install --quiet --no-deps --target "$home/$version" "triton==$version"
done
MONOSEM_TRITONS=$home python -m pytest -k every_variant tests/test_fixed_compile.py
