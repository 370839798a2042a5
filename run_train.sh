#!/usr/bin/env bash
# Trains: ./run_train.sh [--config NAME or PATH] [--section.key=value ...]      (--help lists every option)
#
# Environment:
#   NPROC          processes on this node (default: one per visible GPU, 1 without GPUs)
#   NNODES         nodes (1); on each of several, run the same command with
#   NODE_RANK      this node's number, from 0, and
#   RDZV_ENDPOINT  host:port of node 0, where all nodes meet
#   RDZV_TIMEOUT   seconds to wait until all nodes are there (600)
#   MAX_RESTARTS   how often all ranks start again from the newest checkpoint when one fails (0)
#   NUMA           bind each rank to the CPU cores near its GPU: node, socket, exclusive or core-complex (not bound)
# Under srun and mpirun nothing of this is needed: a task is a rank, or, with one task per node, starts NPROC ranks.
set -u
# This file may be linked into a folder on PATH.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/scripts/setup.sh"
_setup || exit 1
export PYTHONPATH="$_root${PYTHONPATH:+:$PYTHONPATH}"

for word in "$@"; do # else every rank would print the help
    case "$word" in -h | --help) exec "$PYTHON" -m titan_moe.cli train --help ;; esac
done
settings="$("$PYTHON" -m titan_moe.runtime.processes)" || exit $?
eval "$settings" # sets NPROC, NNODES, NODE_RANK, RDZV_ENDPOINT, RDZV_TIMEOUT, MAX_RESTARTS, NUMA and OMP_NUM_THREADS
# What only this configuration needs is installed too, where the environment is set-up's own.
if _is_own && ! _has_extra hf; then
    ranks=() # else those that the environment describes
    if [ $((NPROC * NNODES)) != 1 ]; then ranks=(RANK=0 "WORLD_SIZE=$((NPROC * NNODES))"); fi
    needed="$(env ${ranks[@]+"${ranks[@]}"} "$PYTHON" -m titan_moe.cli train --extras "$@")" || exit $?
    for extra in $needed; do _has_extra "$extra" || _add_extra "$extra" || exit 1; done
fi
if [ "${NPROC:-1}" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
    exec "$PYTHON" -m titan_moe.cli train "$@"
fi

# Checks configuration and inputs, and prepares the data, once and not in every process.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # its warnings are C++ stacks, one per broken connection
RANK=0 WORLD_SIZE=$((NPROC * NNODES)) "$PYTHON" -m titan_moe.cli train --check "$@"
status=$?
[ "$status" = 64 ] && exit 0 # the run is finished, and has said so
[ "$status" = 0 ] || exit "$status"

nodes=()
if [ "$NNODES" != 1 ]; then
    nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --rdzv-endpoint "$RDZV_ENDPOINT"
        --rdzv-conf "timeout=$RDZV_TIMEOUT")
fi
binding=()
if [ -n "$NUMA" ]; then binding=(--numa-binding "$NUMA"); fi
# Only the launcher's C++ log is off: it would print stacks while it waits for node 0.
TORCH_CPP_LOG_LEVEL=FATAL exec "$PYTHON" -m titan_moe.runtime.launch --nproc-per-node "$NPROC" \
    ${nodes[@]+"${nodes[@]}"} ${binding[@]+"${binding[@]}"} --max-restarts "$MAX_RESTARTS" \
    --no-python env TORCH_CPP_LOG_LEVEL="$TORCH_CPP_LOG_LEVEL" "$PYTHON" -u -m titan_moe.cli train "$@"
