#!/usr/bin/env bash
# All checks on a fresh machine: linter, types, import contracts, tests. Arguments go to pytest.
. "$(dirname "$0")/environment.sh" dev
if [ ! -x /usr/bin/chromium ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    # Only the tests marked `browser` need it; without it they are skipped and say so.
    (apt-get update && apt-get install --yes --no-install-recommends chromium) >/dev/null 2>&1 || true
fi
ruff check .
ruff format --check .
said="$(mktemp)"
mypy >"$said" 2>&1 & types=$! # a minute on one core; what follows takes the other
lint-imports
python -m pip --disable-pip-version-check check
[ $# -gt 0 ] || bash scripts/newest_zarr.sh
# One more than the cores: some tests wait for a browser or another process.
python -m pytest --numprocesses $(($(nproc) < 8 ? $(nproc) + 1 : 8)) --dist worksteal --durations 20 "$@" || failed=$?
wait $types || failed=$?
cat "$said"; rm "$said"
exit "${failed:-0}"
