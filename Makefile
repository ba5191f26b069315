# Each target does its own set-up: a virtual environment in .venv, and Apache Kafka's jars in .cache for the tests.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
KAFKA := .cache/kafka/ready
# Most of the tests' time is waiting. Each process has servers of its own.
PROCESSES ?= 2

.PHONY: demo test check bench chaos kafka help

help:  ## say what there is
	@sed -n 's/^\([a-z]*\):.*## /make \1: /p' Makefile

demo: $(READY)  ## run notebooks/quickstart.ipynb on the local stack and show what comes out
	$(BIN)/python notebooks/demo.py

test: $(READY)  ## run all tests, on the local stack and on Apache Kafka
	$(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal $(ARGS)

check: $(READY)  ## ruff, strict types, layers of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## measure one task there and back, and the rate of a map
	$(BIN)/python bench/bench.py $(ARGS)

chaos: $(READY)  ## kill, stop and cut off everything at random while maps run, and check every outcome
	$(BIN)/python chaos/chaos.py $(ARGS)

kafka: $(KAFKA)  ## fetch Apache Kafka by Maven

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(KAFKA): tests/kafka/pom.xml
	mvn -q -B -f $< dependency:copy-dependencies -DoutputDirectory=$(CURDIR)/.cache/kafka/libs -DincludeScope=runtime
	touch $@
