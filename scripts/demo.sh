#!/usr/bin/env bash
# From a fresh machine to a browser full of features: environment, harvest, dictionary, evaluation, index, app.
#   bash scripts/demo.sh [--no-browse] [--out DIR] [--minutes N]
. "$(dirname "$0")/environment.sh" ""  # an explicit argument, or the sourced file would see ours
exec python scripts/demo.py "$@"
