#!/usr/bin/env bash
# Start vLLM servers for a run with `rollout.engine: server`; ends them all when it ends.
#   examples/servers/start.sh MODEL_DIR [NUM_SERVERS] [FIRST_PORT]
# Settings by environment: DEVICE cpu|cuda, DTYPE, MAX_MODEL_LEN, TP, HOST, LOG_DIR, PYTHON.
set -euo pipefail

MODEL=${1:?usage: start.sh MODEL_DIR [NUM_SERVERS] [FIRST_PORT]}
NUM_SERVERS=${2:-1}
FIRST_PORT=${3:-8000}
DEVICE=${DEVICE:-cuda}
TP=${TP:-1}
LOG_DIR=${LOG_DIR:-.}
mkdir -p "$LOG_DIR"

# The routes for weights are open to whoever reaches the port, and no key guards them: loopback.
# With HOST set to another address, close that network to everybody but the trainer.
HOST=${HOST:-127.0.0.1}
export VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1 VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1}

if [ "$DEVICE" = cpu ]; then
  BACKEND=megatron_vopd_shm
  # Seeded samples need prompts read whole here: vLLM cannot set a CPU's random state back.
  EXTRA=(--enforce-eager --no-enable-chunked-prefill)
  export GLOO_SOCKET_IFNAME=lo VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-4}
else
  BACKEND=nccl
  EXTRA=(--hf-overrides '{"head_dtype": "float32"}')
fi

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 143' TERM INT
for ((i = 0; i < NUM_SERVERS; i++)); do
  port=$((FIRST_PORT + i))
  if [ "$DEVICE" = cuda ]; then
    export CUDA_VISIBLE_DEVICES=$(seq -s, $((i * TP)) $((i * TP + TP - 1)))
  fi
  # Scale-out is what vLLM calls its routes for token ids. Log-probs of the distribution that is
  # sampled; random weights until the first push.
  "${PYTHON:-python}" -m vllm.entrypoints.openai.api_server \
    --model "$MODEL" --host "$HOST" --port "$port" --dtype "${DTYPE:-bfloat16}" \
    --tensor-parallel-size "$TP" --max-model-len "${MAX_MODEL_LEN:-4096}" \
    --load-format dummy --skip-tokenizer-init --generation-config vllm --enable-scale-out \
    --logprobs-mode processed_logprobs --disable-uvicorn-access-log \
    --weight-transfer-config "{\"backend\": \"$BACKEND\"}" "${EXTRA[@]}" \
    >"$LOG_DIR/server_$port.log" 2>&1 &
  echo "http://$HOST:$port (log: $LOG_DIR/server_$port.log)"
done
# One that ends takes the others along, so that a broken start is seen.
wait -n
