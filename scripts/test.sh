#!/usr/bin/env bash
# Runs the tests; arguments go to pytest. First the one-time set-up, if there was none.
#   ./scripts/test.sh                      everything
#   ./scripts/test.sh -m "not slow"        the everyday part
set -u
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
_setup --dev || exit 1
cd "$_root" || exit 1
export PYTHONPATH="$_root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m pytest "$@"
