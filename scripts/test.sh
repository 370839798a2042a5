#!/usr/bin/env bash
# Runs the tests; arguments go to pytest. First the one-time set-up, if there was none.
#   ./scripts/test.sh                      everything
#   ./scripts/test.sh -m "not slow"        the everyday part
# TEST_PROCESSES=n tests at a time (default 2); 0: in one process, for a debugger.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
_setup --dev || exit 1
cd "$_root" || exit 1
export PYTHONPATH="$_root${PYTHONPATH:+:$PYTHONPATH}"
processes="${TEST_PROCESSES:-2}"
# Threads that wait for each other spin: two tests with two threads each, on two cores, take ten times as long.
[ "$processes" = 0 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -n "$processes" --dist loadgroup "$@"
