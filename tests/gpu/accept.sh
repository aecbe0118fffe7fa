#!/usr/bin/env bash
# The acceptance run on one GPU: builds, checks, measures; at most 10 minutes on one H100.
#   tests/gpu/accept.sh [--dry] [--only STEP,STEP] [RESULTS]      RESULTS: folder, default gpu_results
#   tests/gpu/accept.sh --list                                    the steps and their time limits
# Every step has its own time limit and its own file, RESULTS/steps/STEP.txt; a step that fails does
# not stop the next. Ends with one table (RESULTS/table.txt) and exit status 1 if a step failed.
# --dry runs on any machine what needs no GPU: the same scripts, with small models, on the CPU.
# By environment: PYTHON (python3), CARRY (folder that tests/gpu/carry.sh made; its wheels are used
# where the machine lacks packages), MODELS (folder for the models that are made; needs 3 GB).
set -uo pipefail
cd "$(dirname "$0")/../.."

# name | seconds | gpu: only with a GPU, both: on the CPU too (--dry) | what must hold
STEPS='
device       | 25 | both | the device, versions, copy bandwidth, rate of a matrix product
build        | 80 | both | the extension builds for the GPU, and imports
kernels      | 45 | both | CUDA kernels against fp64; top-k against the CPU kernels, bit by bit
large_rows   | 30 | both | the same beyond element 2^31
memcheck     | 35 | gpu  | compute-sanitizer finds no bad access
racecheck    | 35 | gpu  | compute-sanitizer finds no race
steps_cpu    | 45 | both | training steps on the CPU, the reference of the next two
steps_device | 40 | both | the same steps on the device: fp32, bf16, recompute, offload
compare      | 20 | both | loss, gradient norm, gradients and weights of the two agree
skip         | 20 | both | a skipped step changes no bit, and gives memory back
resume       | 20 | both | saved, resumed, the next step is the same to the bit
memory       | 35 | both | the memory estimate is within 5 % of the peak
ipc          | 35 | gpu  | CUDA IPC to another process: bits, speed, memory back, a killed reader
trace        | 25 | both | host waits and top kernels of one step
bench_fp32   | 30 | both | the operator in fractions of a copy, V = 151,936
bench_bf16   | 30 | both | the same in bf16
bench_shard  | 15 | both | the same for V / 8, the columns of a rank at tp 8
profile      | 10 | gpu  | ncu: bandwidth, issue slots and occupancy of each kernel
'

mistake() { echo "accept.sh: $1; see --help" >&2 && exit 2; }
dry=0 only='' results=''
while (($#)); do
  case $1 in
    --dry) dry=1 ;;
    --only) only=",${2-}," && shift ;;
    --list) echo "$STEPS" | sed '/^$/d' && exit ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit ;;
    -*) mistake "unknown option $1" ;;
    *) [[ -z $results ]] || mistake "got two folders, $results and $1, expected one"; results=$1 ;;
  esac
  shift
done
if [[ -n $only ]]; then
  names=$(echo "$STEPS" | sed -n 's/ *|.*//p' | paste -sd,)
  [[ -n ${only//,/} ]] || mistake "--only: got nothing, expected some of $names"
  for name in ${only//,/ }; do
    [[ ,$names, == *",$name,"* ]] || mistake "--only: got '$name', expected some of $names"
  done
fi
results=${results:-gpu_results} python=${PYTHON:-python3}
command -v "$python" >/dev/null || mistake "PYTHON: got $python, which is no program, expected an interpreter"
[[ -z ${CARRY:-} ]] || compgen -G "$CARRY/*.whl" >/dev/null ||
  mistake "CARRY: got $CARRY, expected the folder of wheels that tests/gpu/carry.sh made"
device=cuda size='' patience=1
# Without a GPU the limits only end what hangs: the machine may have two busy cores.
((dry)) && device=cpu size=--small patience=8
mkdir -p "$results/steps" 2>/dev/null || mistake "$results: cannot make this folder, expected one to write into"
results=$(cd "$results" && pwd)
models=${MODELS:-$results/models}
table=$results/table.txt
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}

if [[ -n ${CARRY:-} ]]; then
  site=$(mktemp -d)
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$CARRY"/*.whl || exit
  export PYTHONPATH=$PYTHONPATH:$site:$CARRY
fi
if ((!dry)) && ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  echo "accept.sh: no CUDA device that torch can use here; --dry runs what needs none" >&2
  exit 2
fi

run() { "$python" "tests/gpu/$1.py" "${@:2}"; }
sanitized() {
  # The project's kernels alone: those of cuBLAS would take minutes, and trip racecheck.
  compute-sanitizer --tool "$1" --error-exitcode 9 --kernel-name kns=megatron_vopd \
    "$python" tests/gpu/check_kernels.py --kinds gaussian --unaligned
}
bench() { "$python" tools/benchmark_ops.py --device "$device" --no-compile --out "$results/bench" "$@"; }

step_device() { { ((dry)) || nvidia-smi; } && run measure_device --device "$device"; }
step_build() {
  if ((!dry)); then
    MEGATRON_VOPD_CUDA=1 MAX_JOBS=$(nproc) "$python" setup.py --quiet build_ext --inplace || return
  fi
  "$python" -c 'from megatron_vopd.ops import native; print(native.build_info())'
}
step_kernels() { run check_kernels --device "$device" ${size:+--unaligned --kinds gaussian ties minus_inf}; }
step_large_rows() { run check_large_rows --device "$device" ${size:+--tokens 64 --vocab 5003}; }
step_memcheck() { sanitized memcheck; }
step_racecheck() { sanitized racecheck; }
step_steps_cpu() { run check_trainer steps --device cpu --models "$models" --out "$models/cpu" $size; }
step_steps_device() { run check_trainer steps --device "$device" --models "$models" --out "$models/device" $size; }
step_compare() { run check_trainer compare "$models/cpu" "$models/device"; }
step_skip() { run check_trainer skip --device "$device" --models "$models" $size; }
step_resume() { run check_trainer resume --device "$device"; }
step_memory() { run check_memory --device "$device"; }
step_ipc() { run check_ipc && PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True run check_ipc; }
step_trace() { run trace_step --device "$device" $size; }
step_bench_fp32() { bench ${size:+--tokens 8 --vocab 2048 --repeats 2}; }
step_bench_bf16() { bench --dtype bf16 ${size:+--tokens 8 --vocab 2048 --repeats 2}; }
step_bench_shard() { bench --vocab 18992 ${size:+--vocab 1024 --tokens 8 --repeats 2}; }
step_profile() {
  ncu --target-processes all --kernel-name 'regex:stats|gradient|merge' --launch-count 8 \
    --section SpeedOfLight --section Occupancy --section LaunchStats \
    "$python" tests/gpu/check_large_rows.py --device cuda --tokens 512
}

failed=0 started=$SECONDS
printf '%-13s %-9s %5s  %s\n' step result s "what must hold" >"$table"
while IFS='|' read -r name limit where what; do
  name=${name// /} limit=${limit// /} where=${where// /}
  [[ -z $name || (-n $only && $only != *",$name,"*) ]] && continue
  if ((dry)) && [[ $where == gpu ]]; then
    printf '%-13s %-9s %5s %s\n' "$name" 'not run' - "$what (needs a GPU)" >>"$table"
    continue
  fi
  echo "== $name (at most $((limit * patience)) s)"
  begin=$SECONDS
  # A subshell with a session of its own, so that the limit ends whatever the step has started.
  export -f run sanitized bench "step_$name"
  export python device size results models dry
  timeout --kill-after=5 $((limit * patience)) bash -c "set -o pipefail; step_$name" \
    >"$results/steps/$name.txt" 2>&1 </dev/null
  code=$? verdict=passed
  if ((code)); then
    verdict=failed && failed=$((failed + 1))
    ((code == 124 || code == 137)) && verdict='too slow'
    tail -n 5 "$results/steps/$name.txt"
  fi
  printf '%-13s %-9s %5d %s\n' "$name" "$verdict" $((SECONDS - begin)) "$what" >>"$table"
done <<<"$STEPS"
[[ -n ${MODELS:-} ]] || rm -rf "$models"
tar -czf "$results/steps.tar.gz" -C "$results" steps
echo "$failed failed, $((SECONDS - started)) s, torch $("$python" -c 'import torch; print(torch.__version__)')" >>"$table"
cat "$table"
((failed == 0))
