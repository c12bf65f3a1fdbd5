#!/usr/bin/env bash
# Compiles the fixed-shape step for GPUs, without one, with other versions of Triton than the installed one.
#   bash scripts/check_tritons.sh [DIR]   # DIR keeps the two versions (1.3 GB); by default they are deleted again
. "$(dirname "$0")/environment.sh" dev
home=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "$home"' EXIT
for version in 3.2.0 3.6.0; do
    [ -d "$home/$version" ] || python -m pip install --quiet --no-deps --target "$home/$version" "triton==$version"
done
MONOSEM_TRITONS=$home python -m pytest -k other_versions_of_triton tests/test_fixed_step.py
