#!/usr/bin/env bash
# Runs the store's tests that need no torch on the newest zarr 3, which needs Python 3.12 or newer.
# Prints what ran, or why nothing did. PYTHON_312 names an interpreter that is not found automatically.
set -euo pipefail
cd "$(dirname "$0")/.."
for python in ${PYTHON_312:-} python3.14 python3.13 python3.12 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python none; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
if [ "$python" = none ]; then
    echo "store on the newest zarr: not run, no Python 3.12 or newer is available"
    exit 0
fi
venv="${MONOSEM_VENV:-.venv}-newest-zarr"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if ! "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --upgrade "zarr>=3,<4" numpy google-crc32c pytest hypothesis; then
    echo "store on the newest zarr: not run, its packages could not be installed"
    exit 0
fi
echo "store on the newest zarr:"
PYTHONPATH=".:tests:scripts" "$venv/bin/python" -m pytest --noconftest -p without_torch \
    tests/test_activations.py tests/test_batches.py tests/test_features.py tests/test_store_schema.py tests/test_fault_injection.py
