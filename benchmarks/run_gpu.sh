#!/usr/bin/env bash
# Build, tests, compute-sanitizer and benchmarks on a machine with an NVIDIA GPU, nvcc and torch; without a network.
#
#   benchmarks/run_gpu.sh [--stage build|test|sanitize|bench] [--wheels FOLDER] [--out FOLDER]
#
# --wheels: a folder of wheels to install first, without what they depend on (trl, liger-kernel, datasets, ...); what is
#           missing is listed by the benchmark and left out.
# --out:    where logs and rows go (default: benchmarks/results/<the GPU's name>).
#
# Every stage has its own time limit, less than 9 minutes in all. Rows are written as they are measured, so that a run
# that is stopped keeps them. The stage "build" needs no GPU.
set -uo pipefail

stages="build test sanitize bench" wheels="" out=""
while [ $# -gt 0 ]; do
  case "$1" in
    --stage) stages=${2:?"--stage: expected build, test, sanitize or bench"} ;;
    --wheels) wheels=$(realpath -m "${2:?"--wheels: expected a folder"}") ;;
    --out) out=$(realpath -m "${2:?"--out: expected a folder"}") ;;
    *) echo "run_gpu.sh: unknown option $1" >&2; exit 2 ;;
  esac
  shift 2
done
for stage in $stages; do
  case "$stage" in build | test | sanitize | bench) ;; *) echo "run_gpu.sh: unknown stage $stage" >&2; exit 2 ;; esac
done

cd "$(dirname "$0")/.." || exit
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1)
if [ -z "$gpu" ] && [ "$stages" != build ]; then
  echo "run_gpu.sh: nvidia-smi shows no GPU here" >&2
  exit 1
fi
out=${out:-benchmarks/results/$(echo "${gpu:-none}" | tr 'A-Z ' 'a-z-')}
mkdir -p "$out"
export PYTHONUNBUFFERED=1

build() {
  if [ -n "$wheels" ]; then
    python3 -m pip install --quiet --no-index --no-deps "$wheels"/*.whl || return
  fi
  python3 -m pip install --no-build-isolation --no-deps --no-index --force-reinstall . || return
  (cd / && python3 -m fastgrpo env) # not the checkout's package, which has no libraries
}

# Tests and benchmarks import what was installed: Python would find the checkout's package first in this folder.
tests() { (cd tests && python3 -m pytest -q -p no:cacheprovider -m gpu . && python3 -m pytest -q -p no:cacheprovider test_backend_cuda.py); }

sanitize() {
  (cd tests && PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool memcheck \
    python3 -m pytest -q -p no:cacheprovider test_backend_cuda.py -k "not_count or family") || return
  (cd tests && compute-sanitizer --error-exitcode 1 --tool racecheck \
    python3 -m pytest -q -p no:cacheprovider test_backend_cuda.py -k "not_count or family")
}

# What the project's targets are about comes first.
bench() {
  local json failed=0
  json=$(realpath "$out")/rows.jsonl
  cd benchmarks || return
  measure() { python3 -m fastgrpo bench --device cuda --json "$json" --seconds 0.5 "$@" || failed=1; }
  measure --model qwen2.5-7b --model llama3-8b --shape B=8,T=1024 --op loss --op logps --dtype bf16
  measure --model qwen2.5-7b --shape B=5,T=1638 --op linear --dtype bf16 --inactive 0 --inactive 0.4
  measure --full --op advantages --op step
  measure --model llama3-8b --model gemma2-9b --model qwen2.5-0.5b --shape B=5,T=1638 --op linear --dtype bf16 \
    --inactive 0 --inactive 0.4
  measure --model qwen2.5-7b --model llama3-8b --model gemma2-9b --shape B=5,T=410 --shape B=5,T=6554 \
    --op linear --op loss --dtype bf16 --inactive 0 --inactive 0.4
  return $failed
}

declare -A limit=([build]=100 [test]=145 [sanitize]=55 [bench]=215) # seconds; the whole in less than 540
failed=""
for stage in $stages; do
  function=$stage
  [ "$stage" = test ] && function=tests
  echo "== $stage, at most ${limit[$stage]} s"
  export -f build tests sanitize bench
  export wheels out
  timeout --kill-after=5 "${limit[$stage]}" bash -c "set -o pipefail; $function 2>&1 | tee '$out/$stage.log'"
  status=$?
  [ $status -eq 124 ] || [ $status -eq 137 ] && echo "== $stage reached its limit; what it measured is in $out"
  [ $status -ne 0 ] && failed="$failed $stage"
  [ "$failed" = " build" ] && break # or an older build would be measured
done
[ -z "$failed" ] || { echo "== failed or stopped:$failed"; exit 1; }
