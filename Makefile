# Each target does its own set-up: a virtual environment in .venv, and Apache Kafka's jars in .cache for the tests.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
KAFKA := .cache/kafka/ready
# Most of the tests' time is waiting. Each process has servers of its own.
PROCESSES ?= 3

# Types and lint of the card's script, where npm is there.
SCRIPTS := $(if $(shell command -v npm),check-card)

.PHONY: demo test check check-card bench bench-card screenshots chaos kafka help

help:  ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' Makefile

demo: $(READY)  ## run notebooks/quickstart.ipynb on the local stack and show what comes out
	$(BIN)/python notebooks/demo.py

test: $(READY)  ## run all tests, on the local stack and on Apache Kafka
	$(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal $(ARGS)

check: $(READY)  ## ruff, strict types, layers of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(if $(SCRIPTS),$(MAKE) --no-print-directory $(SCRIPTS),@echo "card.js is not checked: npm is not there")

check-card: tests/js/node_modules/ready  ## types and lint of the card's script; needs npm
	npm --prefix tests/js run --silent check

bench: $(READY)  ## measure one task there and back, and the rate of a map
	$(BIN)/python bench/bench.py $(ARGS)

bench-card: $(READY)  ## measure what a live card sends
	$(BIN)/python bench/card.py $(ARGS)

screenshots: $(READY)  ## make the README's pictures anew; needs Chromium
	$(BIN)/python docs/screenshots.py

chaos: $(READY)  ## kill, stop and cut off everything at random while maps run, and check every outcome
	$(BIN)/python chaos/chaos.py $(ARGS)

kafka: $(KAFKA)  ## fetch Apache Kafka by Maven

$(READY): pyproject.toml
	@echo "Installing into .venv: some minutes the first time, 1.3 GB with all that the tests need."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

tests/js/node_modules/ready: tests/js/package.json
	npm --prefix tests/js install --silent --no-package-lock
	touch $@

$(KAFKA): tests/kafka/pom.xml
	mvn -q -B -f $< dependency:copy-dependencies -DoutputDirectory=$(CURDIR)/.cache/kafka/libs -DincludeScope=runtime
	touch $@
