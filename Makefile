# Two commands matter: `make demo` and `make test`. Both set up .venv first, which is quick once it is there.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin

.PHONY: help setup demo demo-methods demo-ab evidence evidence-full test test-full audit lint format schema clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## make .venv, with everything that is needed to develop and to serve on the CPU
	@test -n "$(PYTHON)" || { echo "setup: no python3.11 or python3.12 found; install one, or: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@"$(PYTHON)" tools/setup.py

demo: setup  ## serve the demo's recipes on the CPU and print what each gets right
	@$(BIN)/python examples/demo/run.py

demo-methods: setup  ## every merge method on the demo through the server; rewrites docs/methods/accuracy.md
	@$(BIN)/python examples/demo/methods.py

demo-ab: setup  ## three arms, simulated users with known preferences, a restart in the middle, and the report
	@$(BIN)/python examples/demo/ab.py

evidence: setup  ## rebuild the tables and plots of docs/evidence.md and docs/evidence-same-words.md from the recorded results
	@$(BIN)/python -m benchmarks.quality.report

evidence-full: setup  ## the whole quality benchmark, on a GPU
	@$(BIN)/python -m benchmarks.quality.run && $(BIN)/python -m benchmarks.quality.learned && $(BIN)/python -m benchmarks.quality.report

test: setup  ## lint, types, and the tests (a few real vLLM servers on the CPU)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/python -m pytest -m "not full"

test-full: setup  ## everything, the long tests too
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/python -m pytest

audit: setup  ## known vulnerabilities in what is installed
	@$(BIN)/pip-audit --skip-editable

lint: setup  ## what pre-commit checks
	@$(BIN)/pre-commit run --all-files

format: setup  ## let ruff format and fix
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

schema: setup  ## rewrite configs/recipe.schema.json
	@$(BIN)/vllm-merge schema > configs/recipe.schema.json

clean:  ## remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
