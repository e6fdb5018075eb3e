.PHONY: install test slow bench report gpu driver memcheck check format

install: ## the package with its test tools, from this checkout
	pip install -c constraints.txt ".[test]"

test:
	pytest

slow: ## full runs of the recipes, many minutes
	pytest -m slow

bench: ## small paired timings; compare across commits with --benchmark-autosave --benchmark-compare
	pytest benchmarks

report: ## the README's section on speed, from the rows in benchmarks/results
	fastgrpo bench --report

gpu: ## on a machine with an NVIDIA GPU: build, smoke test, timings, counters, memory check, tests, peers
	benchmarks/run_gpu.sh first
	benchmarks/run_gpu.sh second

DRIVER = build/driver/tests/cuda_driver/fastgrpo_cuda_driver

driver: ## the CUDA kernels and a program that runs each of them, without torch
	cmake -S . -B build/driver -DFASTGRPO_CUDA_DRIVER=ON
	cmake --build build/driver --target fastgrpo_cuda_driver

memcheck: driver ## every CUDA kernel under compute-sanitizer
	compute-sanitizer --error-exitcode 1 --tool memcheck $(DRIVER) --quick

check:
	ruff check .
	ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror

format:
	ruff check --fix .
	ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format -i
