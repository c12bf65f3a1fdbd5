# Sourced: makes the project's own environment at .venv and puts it on PATH.
# usage: . scripts/environment.sh EXTRA      `dev`, `docs`, or "" for none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${MONOSEM_VENV:-.venv}"
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "monosem needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3." >&2
    exit 2
}
wanted="$(cat pyproject.toml constraints.txt | cksum)"
stamp="$venv/installed${1:+-$1}"
has() { [ "$(cat "$1" 2>/dev/null)" = "$wanted" ]; }
# An environment with an extra has all that one without it needs.
if ! has "$stamp" && ! { [ -z "$1" ] && { has "$stamp-dev" || has "$stamp-docs"; }; }; then
    echo "setting up $venv (once)"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet install --constraint constraints.txt)
    if ! command -v nvidia-smi >/dev/null; then
        # CPU wheels spare several GB; where their index is out of reach, the default one serves.
        "${pip[@]}" torch --index-url https://download.pytorch.org/whl/cpu --retries 0 --timeout 10 2>/dev/null ||
            "${pip[@]}" torch
    fi
    "${pip[@]}" --editable ".${1:+[$1]}"
    echo "$wanted" >"$stamp"
fi
export PATH="$PWD/$venv/bin:$PATH"
case "$venv" in /*) export PATH="$venv/bin:$PATH" ;; esac
