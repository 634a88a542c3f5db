# What this project can do. `make` alone lists it.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help client docs matrix run test test-slow check lint format protos stubs examples types lock bench bench-quick bench-scale clean

help:  ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: .venv/run  ## serve on 127.0.0.1:50051, with an embedded PostgreSQL unless PARLEY_DATABASE_URL is set
	@$(BIN)/parley serve

test: .venv/dev  ## run the quick tests: real server, real channel, real PostgreSQL
	@$(BIN)/pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

test-slow: .venv/dev  ## run the others: faults, workers, plans, windows, fuzz, the access matrix
	@$(BIN)/pytest -m slow

check: lint types test test-slow examples  ## all that CI does

lint: .venv/dev  ## style of code and protos, their generated Python, and that no released client breaks
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/python scripts/protos.py --check
	@$(BIN)/python scripts/protos.py --released

types: .venv/dev  ## strict type checking of everything written by hand
	@$(BIN)/mypy

format: .venv/dev  ## put code and protos into their form
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format
	@$(BIN)/buf format -w protos

protos: .venv/dev  ## generate the Python of the protos
	@$(BIN)/python scripts/protos.py

stubs: .venv/dev  ## generate those for Go, TypeScript, Java and Rust into stubs/, where their toolchains are
	@$(BIN)/python -m scripts.stubs

examples: .venv/dev  ## build and run the clients in examples/, where their toolchains are (CI needs all five)
	@$(BIN)/python -m scripts.examples

docs: .venv/dev  ## write the pages that are made: docs/api.md, errors.md, and what grpcurl.md shows
	@$(BIN)/python -m scripts.docs
	@$(BIN)/python -m scripts.cookbook

client: .venv/dev  ## build the Python client's packages into clients/python/dist
	@$(BIN)/uv build --quiet --out-dir clients/python/dist clients/python
	@ls clients/python/dist/*.whl clients/python/dist/*.tar.gz

matrix: .venv/dev  ## write who may call what into docs/access.md
	@$(BIN)/python -m tests.access_matrix

# Exact versions with their hashes; no address of any index.
lock: .venv/dev  ## resolve the dependencies anew into requirements*.lock
	@scripts/lock

bench: .venv/dev  ## measure every promise of speed, for half an hour, into docs/performance.md (needs Go)
	@$(BIN)/python -m bench.run

bench-quick: .venv/dev  ## the same in a few minutes, roughly, on the terminal alone (needs Go)
	@$(BIN)/python -m bench.run --quick

bench-scale: .venv/dev  ## measure with 10 million messages stored, into docs/scale.md (needs Go and 20 GB)
	@$(BIN)/python -m bench.scale

clean:  ## forget the virtual environment and what tools left behind
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis stubs
	cd examples && rm -rf python/.venv go/gen go/story typescript/node_modules typescript/src/gen typescript/dist java/target rust/target rust/Cargo.lock

# One environment; running needs less of it than working does.
.venv/run: requirements.lock pyproject.toml
	@echo "Setting up .venv …"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Parley needs Python 3.11 or newer: make PYTHON=…")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev: requirements-dev.lock .venv/run
	@echo "Setting up the tools …"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(GRPCURL) || echo "No grpcurl: the README's calls are tested by buf curl."
	@touch $@

# What people debug with; built where Go is, done without elsewhere.
GRPCURL := command -v grpcurl >/dev/null || { command -v go >/dev/null && \
	GOBIN=$(CURDIR)/$(BIN) timeout 300 go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3 2>/dev/null; }
