#!/usr/bin/env bash
# Runs the tests, two files at a time; arguments go to pytest. First the one-time set-up, if there was none.
#   ./scripts/test.sh                      everything
#   ./scripts/test.sh -m "not slow"        the everyday part
#   ./scripts/test.sh -n 0 --pdb           one at a time
set -u
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"
_setup --dev || exit 1
cd "$_root" || exit 1
export PYTHONPATH="$_root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY=passive  # threads that wait leave the core to the other file's
# The order is that of tests/conftest.py: files that take longest first. pytest-xdist would start with the files of most tests.
exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
