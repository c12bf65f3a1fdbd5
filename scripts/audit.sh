#!/usr/bin/env bash
# Lists known vulnerabilities of the pinned dependencies; fails if there is one. Packages that the database gives no answer
# for (no network, or a mirror without it) are counted, and not reported as free of vulnerabilities.
. "$(dirname "$0")/environment.sh" dev
report="$(mktemp)"
pip-audit --no-deps --disable-pip --progress-spinner off --format json --output "$report" \
    --requirement <(grep -v '^#' constraints.txt) >/dev/null 2>&1 || true
python - "$report" <<'PYTHON'
import json, pathlib, sys

text = pathlib.Path(sys.argv[1]).read_text()
packages = json.loads(text)["dependencies"] if text else []
answered = [package for package in packages if "vulns" in package]
known = [f"{p['name']} {p['version']}: {v['id']}" for p in answered for v in p["vulns"]]
print(f"audit: {len(answered)} of {len(packages)} packages answered for, {len(known)} known vulnerabilities", *known, sep="\n  ")
sys.exit(bool(known))
PYTHON
