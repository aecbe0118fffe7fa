#!/usr/bin/env bash
# One node:  examples/math_qwen3_4b/launch.sh [section.key=value ...]
# Ends with 0 done, 75 stopped and saved (start it again), 93 do not start it again, 1 crashed.
set -u
CONFIG=$(dirname "$0")/config.yaml
# A large checkpoint takes longer than the 30 s that torchrun gives its ranks after SIGTERM.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

vopd exit-code --clear "$CONFIG" "$@" || exit
torchrun --standalone --nproc-per-node "${GPUS:-8}" -m megatron_vopd.train "$CONFIG" "$@" &
trap 'kill -TERM $! 2>/dev/null' TERM INT  # torchrun passes it on, and the ranks save
wait $!
wait $!  # a signal ends only the first wait
vopd exit-code "$CONFIG" "$@"
