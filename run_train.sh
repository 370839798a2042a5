#!/usr/bin/env bash
# Trains: ./run_train.sh [--config NAME or PATH] [--section.key=value ...]      (--help lists every option)
#
# Environment:
#   NPROC          processes on this node (default: one per GPU, 1 without GPUs)
#   NNODES         nodes (1); on each of several, run the same command with
#   NODE_RANK      this node's number, from 0, and
#   RDZV_ENDPOINT  host:port of node 0, where all nodes meet
#   RDZV_TIMEOUT   seconds to wait until all nodes are there (600)
#   MAX_RESTARTS   how often all ranks start again from the newest checkpoint when one fails (0)
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
NNODES="${NNODES:-1}"
if [ "$NPROC" = 1 ] && [ "$NNODES" = 1 ]; then
    exec "$PYTHON" -m titan_moe.cli train "$@"
fi

_fail() { echo "error: $1" >&2; exit 2; }
for name in NPROC NNODES NODE_RANK RDZV_TIMEOUT MAX_RESTARTS; do
    case "${!name:-0}" in *[!0-9]*) _fail "$name = '${!name}' is not a number" ;; esac
done
if [ "$NNODES" -gt 1 ]; then
    [ "${NODE_RANK:-$NNODES}" -lt "$NNODES" ] ||
        _fail "NODE_RANK = '${NODE_RANK:-}' must be this node's number, 0 to $((NNODES - 1))"
    case "${RDZV_ENDPOINT:-}" in
    *?:*[0-9]) ;;
    *) _fail "RDZV_ENDPOINT = '${RDZV_ENDPOINT:-}' must be host:port of node 0, the same on every node" ;;
    esac
fi

# Checks configuration and inputs, and prepares the data, once and not in every process.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # its warnings are C++ stacks, one per broken connection
WORLD_SIZE=$((NPROC * NNODES)) "$PYTHON" -m titan_moe.cli train --check "$@"
status=$?
[ "$status" = 64 ] && exit 0 # the run is finished, and has said so
[ "$status" = 0 ] || exit "$status"
if [ -z "${OMP_NUM_THREADS:-}" ]; then # torchrun would set it to 1
    OMP_NUM_THREADS=$(($(getconf _NPROCESSORS_ONLN) / NPROC))
    [ "$OMP_NUM_THREADS" -gt 0 ] || OMP_NUM_THREADS=1
    export OMP_NUM_THREADS
fi

if [ "$NNODES" = 1 ]; then
    nodes=(--local-addr localhost) # not the host name, which may not resolve
else
    # torchrun's default, the static rendezvous. c10d keeps asking node 0's store, and blocks when that node is lost.
    nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --rdzv-endpoint "$RDZV_ENDPOINT"
        --rdzv-conf "timeout=${RDZV_TIMEOUT:-600}")
fi
# Only the launcher's C++ log is off: it would print stacks while it waits for node 0.
TORCH_CPP_LOG_LEVEL=FATAL exec "$PYTHON" -m titan_moe.runtime.launch --nproc-per-node "$NPROC" "${nodes[@]}" \
    --max-restarts "${MAX_RESTARTS:-0}" \
    --no-python env TORCH_CPP_LOG_LEVEL="$TORCH_CPP_LOG_LEVEL" "$PYTHON" -u -m titan_moe.cli train "$@"
