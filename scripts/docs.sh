#!/usr/bin/env bash
# Serves the documentation at http://127.0.0.1:8000 and rebuilds it as files change. Arguments go to `mkdocs serve`.
. "$(dirname "$0")/environment.sh" docs
exec mkdocs serve --dev-addr 127.0.0.1:8000 "$@"
