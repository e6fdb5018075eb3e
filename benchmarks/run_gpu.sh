#!/usr/bin/env bash
# Build, smoke test, timings, counters, memory check and tests on a machine with an NVIDIA GPU, nvcc and torch. It is
# written for a machine that is lent for a short time: no network, and results in a small folder, at most 8 files of
# 16 MiB. Two calls, the first within 480 s, the second within 240 s:
#
#   benchmarks/run_gpu.sh first --wheels .wheels --commit "$(git rev-parse HEAD)"
#   benchmarks/run_gpu.sh second --wheels .wheels --commit "$(git rev-parse HEAD)" --cuda CHOICE --triton CHOICE
#
# first:    build ceilings smoke sweeps hidden counters memcheck tests
# second:   build peers step compiled, beside the choices that the first one's sweeps print as the fastest
# --wheels: a folder of wheels to install first, without what they depend on; what is missing is listed and left out:
#           pip download --no-deps -d .wheels trl==1.16.0 liger-kernel==0.8.5 datasets==5.2.0 dill==0.4.1 \
#             multiprocess==0.70.19
# --commit: what the rows say they are of, where the sources came without their history.
# --out:    where logs and rows go (default: $OUT, else benchmarks/results/<the GPU's name>, of a rehearsal
#           benchmarks/results/rehearsal).
# --stage:  only this one; repeatable. Without "build", the package that python3 finds is measured.
# --limit:  STAGE=SECONDS, another limit than the one below; repeatable.
# --scratch: where it builds; kept, so that a later call finds the package there (default: a new folder, removed).
# --rehearse: every step that a CPU can do, on small shapes, in a minute; nothing of it is a measurement.
#
# Every stage is stopped at its limit, and what it measured until then is written. A stage that fails does not keep the
# others from running, except the build.
set -uo pipefail

usage() { echo "run_gpu.sh: $*" >&2; exit 2; }

call=${1:-}
shift || true
declare -A limit
case "$call" in # the sums leave the calls 40 s and 20 s for the machine's own pauses
  first)
    stages=(build ceilings smoke sweeps hidden counters memcheck tests)
    limit=([build]=60 [ceilings]=20 [smoke]=65 [sweeps]=95 [hidden]=50 [counters]=50 [memcheck]=25 [tests]=75)
    seconds=440 ;;
  second)
    stages=(build peers step compiled)
    limit=([build]=60 [peers]=80 [step]=25 [compiled]=55)
    seconds=220 ;;
  *) usage "expected first or second, got '$call'" ;;
esac

wheels="" out=${OUT:-} scratch="" rehearse="" cuda="" triton="" chosen=()
while [ $# -gt 0 ]; do
  case "$1" in
    --rehearse) # with time for a slow machine: what is rehearsed is the order of things
      rehearse=--rehearse seconds=$((4 * seconds))
      for stage in "${stages[@]}"; do limit[$stage]=$((4 * ${limit[$stage]})); done
      shift; continue ;;
    --wheels | --commit | --out | --scratch | --stage | --limit | --cuda | --triton)
      [ $# -ge 2 ] || usage "$1: expected a value" ;;
    *) usage "unknown option $1" ;;
  esac
  case "$1" in
    --wheels) wheels=$(realpath -m "$2"); [ -d "$wheels" ] || usage "--wheels: no such folder: $2" ;;
    --commit) export FASTGRPO_COMMIT=$2 ;;
    --out) out=$2 ;;
    --scratch) scratch=$(realpath -m "$2") ;;
    --stage) [ -n "${limit[$2]:-}" ] || usage "--stage: expected one of ${stages[*]}, got $2"; chosen+=("$2") ;;
    --limit) [ -n "${limit[${2%%=*}]:-}" ] || usage "--limit: expected one of ${stages[*]} with seconds, got $2"
      limit[${2%%=*}]=${2#*=} ;;
    --cuda) cuda=$2 ;;
    --triton) triton=$2 ;;
  esac
  shift 2
done
[ ${#chosen[@]} -eq 0 ] || stages=("${chosen[@]}")

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1)
if [ -n "$rehearse" ]; then
  gpu=rehearsal # so its rows are not beside measured ones
  export CUDA_VISIBLE_DEVICES=""
elif [ -z "$gpu" ]; then
  echo "run_gpu.sh: nvidia-smi shows no GPU here; --rehearse does what a CPU can" >&2
  exit 1
fi
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "${out:-$here/results/$(echo "$gpu" | tr 'A-Z ' 'a-z-')}")
mkdir -p "$out" || exit
if [ -z "$scratch" ]; then
  scratch=$(mktemp -d) || exit
  trap 'rm -rf "$scratch"' EXIT
fi
site=$scratch/site
mkdir -p "$site" || exit
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

# Python runs outside the checkout, whose package has no libraries and would be found first.
gpu_py() { (cd "$here" && python3 gpu.py "$@" --out "$out" --scratch "$scratch" $rehearse); }

build() {
  local install=(python3 -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check
    --upgrade --target "$site")
  if [ -n "$wheels" ]; then "${install[@]}" "$wheels"/*.whl || return; fi
  "${install[@]}" --no-build-isolation -C build-dir="$scratch/build" -C cmake.define.FASTGRPO_CUDA_DRIVER=ON \
    "$root" || return
  (cd "$scratch" && python3 -m fastgrpo env) || return
  [ -z "$wheels" ] || (cd "$scratch" && python3 - << 'PEERS') # one that is missing is left out
import importlib

for name in ("trl.trainer.grpo_trainer", "liger_kernel.chunked_loss", "datasets"):
    try:
        importlib.import_module(name)
        print(f"{name}: can be imported")
    except Exception as problem:
        print(f"{name}: cannot be imported: {problem}")
PEERS
}

ceilings() {
  [ -n "$rehearse" ] || nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu \
    --format=csv
  gpu_py ceilings
}

# A smoke test that loses its process, to an illegal access or a kernel that hangs, goes on behind that case.
smoke_of() {
  local status=3
  while [ $status -eq 3 ]; do gpu_py smoke "$@"; status=$?; done
  return $status
}
smoke() { # side by side, because Triton compiles for most of its time
  local processes=() process status=0
  smoke_of --backend cuda & processes+=($!)
  for dtype in bf16 fp32 fp16; do smoke_of --backend triton --dtype $dtype & processes+=($!); done
  for process in "${processes[@]}"; do wait "$process" || status=1; done
  return $status
}

sweeps() { gpu_py sweeps; }
hidden() { gpu_py hidden; }

counters() {
  local name kernel status=0
  local sections=(--section SpeedOfLight --section MemoryWorkloadAnalysis --section LaunchStats --section Occupancy
    --section WarpStateStats --section SchedulerStats)
  if [ -n "$rehearse" ]; then
    gpu_py one --kernel cuda:token_loss --kernel triton:token_loss --kernel triton:row_stats
    return
  fi
  for kernel in one_pass:cuda:token_loss token_kernel:triton:token_loss stats_kernel:triton:row_stats; do
    name=${kernel%%:*}
    (cd "$here" && timeout --foreground 30 ncu --clock-control none "${sections[@]}" --kernel-name "regex:$name" \
      --launch-count 1 python3 gpu.py one --kernel "${kernel#*:}" --out "$out" --scratch "$scratch") >> "$out/counters.txt" 2>&1 ||
      { echo "$name: ncu failed; see counters.txt"; status=1; }
  done
  grep -E "Context|Duration|DRAM Throughput|L2 Hit|Registers Per|Achieved Occ" "$out/counters.txt"
  return $status
}

memcheck() {
  local driver status=0
  driver=$(find "$scratch/build" -type f -name fastgrpo_cuda_driver -perm -u+x 2> /dev/null)
  if [ -n "$rehearse" ]; then
    echo "the program for a GPU: ${driver:-not built, for want of nvcc or of the stage build}"
    driver=$(cd "$root/tests" && python3 - "$scratch" << 'DRIVER'
import sys

import cuda_host

kernels = sorted((cuda_host.CSRC / "cuda").glob("*.cu"))
print(cuda_host.build(sys.argv[1], [*kernels, cuda_host.HERE.parent / "cuda_driver" / "driver.cpp"], program="driver"))
DRIVER
    ) && "$driver" --quick --filter "bf16 V=61, "
    return
  fi
  [ -n "$driver" ] || { echo "the program was not built: the stage build makes it"; return 1; }
  timeout --foreground 8 "$driver" | tail -n 1 || status=1
  compute-sanitizer --tool memcheck --error-exitcode 1 "$driver" --quick || status=1
  return $status
}

# What needs no GPU is left to other machines, and so are datasets and trl, which need not be here.
files=(test_backend_contract.py test_backend_cuda.py test_backend_triton.py test_cuda_bits.py)
files+=(test_triton_narrower.py test_loss.py test_linear.py test_logps.py test_ops.py)
tests() {
  local run=(python3 -m pytest -p no:cacheprovider -rfE -k "cuda or triton or gpu" "${files[@]}") spread=()
  if python3 -c "import xdist, pytest_timeout" 2> /dev/null; then
    spread=(-n 8 --timeout=60 --timeout-method=thread) # a wrong barrier phase hangs
  else
    echo "pytest-xdist and pytest-timeout are not here: one process, and nothing stops a test that hangs"
  fi
  cd "$root/tests" || return
  if [ -n "$rehearse" ]; then
    [ ${#spread[@]} -eq 0 ] || spread[1]=1
    run+=(-k "test_an_id_out_of_range_reads_nothing or test_no_host_sync_on_a_gpu")
  fi
  # interrupted before the limit, so that it says what failed
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} timeout --foreground --signal=INT $((most > 20 ? most - 8 : most)) \
    "${run[@]}" -v "${spread[@]}" > "$out/tests.log" 2>&1
  local status=$?
  sed -n '/short test summary/,$p' "$out/tests.log" | head -n 40
  tail -n 1 "$out/tests.log"
  return $status
}

peers() { gpu_py peers --cuda "$cuda" --triton "$triton"; }
step() { gpu_py step; }
compiled() { gpu_py compiled --cuda "$cuda" --triton "$triton"; }

export -f gpu_py build ceilings smoke smoke_of sweeps hidden counters memcheck tests peers step compiled
export here root out scratch site wheels rehearse cuda triton
export files_text="${files[*]}"
failed=0 table=""
for stage in "${stages[@]}"; do
  left=$((seconds - SECONDS)) begun=$SECONDS
  export most=$((${limit[$stage]} < left ? ${limit[$stage]} : left))
  if [ $left -le 2 ]; then
    table+=$'\n'"  $stage: no time was left"
    failed=1
    continue
  fi
  echo "== $stage, at most $most s" | tee -a "$out/$call.log"
  timeout --kill-after=5 "$most" bash -c "set -o pipefail; files=($files_text); $stage 2>&1 | tee -a '$out/$call.log'"
  status=$?
  case $status in
    0) said="done" ;;
    124 | 137) said="stopped at its limit of $most s; what it wrote is kept" ;;
    *) said="failed" ;;
  esac
  table+=$'\n'"  $stage: $said, $((SECONDS - begun)) s"
  [ $status -eq 0 ] || failed=1
  if [ "$stage" = build ] && [ $status -ne 0 ]; then break; fi # or another build would be measured
done
{
  echo "== $call: ${SECONDS} s in all$table"
  find "$out" -type f -printf '  %P %k KiB\n' | sort
  large=$(find "$out" -maxdepth 2 -type f -size +16M | wc -l) count=$(find "$out" -type f | wc -l)
  [ "$large" -eq 0 ] && [ "$count" -le 8 ] || echo "  expected at most 8 files of 16 MiB, got $count, $large larger"
} | tee -a "$out/$call.log"
exit $failed
