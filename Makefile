.PHONY: install test bench check format

install: ## the package with its test tools, from this checkout
	pip install -c constraints.txt ".[test]"

test:
	pytest

bench: ## paired timings; compare across commits with --benchmark-autosave --benchmark-compare
	pytest benchmarks

check:
	ruff check .
	ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror

format:
	ruff check --fix .
	ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format -i
