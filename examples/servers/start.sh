#!/usr/bin/env bash
# Start the vLLM servers of a run, those of rollout.urls at this host; ends them all when it ends.
#   examples/servers/start.sh CONFIG [section.key=value ...]
# By environment: HOST (127.0.0.1), LOG_DIR (.), PYTHON (python).
# What is started, and with which flags:  vopd server-commands CONFIG [section.key=value ...]
set -euo pipefail

# The routes for weights are open to whoever reaches the port, and no key guards them: loopback.
# With HOST set to another address, close that network to everybody but the trainer.
HOST=${HOST:-127.0.0.1}
export LOG_DIR=${LOG_DIR:-.} PYTHON=${PYTHON:-python}
mkdir -p "$LOG_DIR"
COMMANDS=$("$PYTHON" -m megatron_vopd.cli server-commands "$@" --host "$HOST")

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 143' TERM INT
while IFS= read -r command; do
  port=${command#* --port } port=${port%% *}
  eval "exec $command" >"$LOG_DIR/server_$port.log" 2>&1 </dev/null &
  echo "http://$HOST:$port (log: $LOG_DIR/server_$port.log)"
done <<<"$COMMANDS"
# One that ends takes the others along, so that a broken start is seen.
wait -n
