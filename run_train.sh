#!/usr/bin/env bash
# Trains: ./run_train.sh [--config NAME or PATH] [--section.key=value ...]      (--help lists every option)
#
# NPROC=n processes on this node (default: all GPUs, else 1). More nodes: NNODES, NODE_RANK, RDZV_ENDPOINT, and RDZV_TIMEOUT
# seconds for all to come. MAX_RESTARTS=n starts all ranks again, from the newest checkpoint, when one fails.
set -u
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
_setup || exit 1
export PYTHONPATH="$_root${PYTHONPATH:+:$PYTHONPATH}"

if [ -z "${NPROC:-}" ]; then
    NPROC=1
    if command -v nvidia-smi >/dev/null 2>&1; then
        NPROC="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)"
        [ "$NPROC" -gt 0 ] || NPROC=1
    fi
fi
if [ "$NPROC" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
    exec "$PYTHON" -m titan_moe.cli train "$@"
fi

# Configuration and inputs are checked here, once and not by every process.
export NPROC
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # its warnings are stacks of C++, one per broken connection
WORLD_SIZE=$((NPROC * ${NNODES:-1})) "$PYTHON" -m titan_moe.cli train --check "$@"
status=$?
[ "$status" = 64 ] && exit 0 # the run is finished, and has said so
[ "$status" = 0 ] || exit "$status"
if [ -z "${OMP_NUM_THREADS:-}" ]; then # torchrun would make it 1
    OMP_NUM_THREADS=$(($(getconf _NPROCESSORS_ONLN) / NPROC))
    [ "$OMP_NUM_THREADS" -gt 0 ] || OMP_NUM_THREADS=1
    export OMP_NUM_THREADS
fi
exec "$PYTHON" -m titan_moe.runtime.launch "$@"
