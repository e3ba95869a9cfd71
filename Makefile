# Needs Python ≥ 3.11 with venv and pip, make, and for the JavaScript clients Node ≥ 20 with npm, for Spring's a JDK ≥ 17
# with Maven, as for a real Kafka and Cassandra, for pages Chromium. All else is set up here.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test check contracts test-mutants load bench fuzz soak services services-stop image lock clean

# The first Python that is new enough; `make PYTHON=...` takes another.
PYTHON ?= $(firstword $(foreach python,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(python) -c 'import ensurepip, sys, venv; sys.version_info >= (3, 11) and print("$(python)")' 2>/dev/null)))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
NODE := $(shell node -e 'console.log(parseInt(process.versions.node) >= 20 ? "node" : "")' 2>/dev/null)
NPM := $(if $(NODE),$(shell command -v npm 2>/dev/null))
JDK := $(shell javac -version 2>&1 | sed -n 's/^javac \([0-9]*\).*/\1/p')
MVN := $(if $(filter-out 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16,$(JDK)),$(shell command -v mvn 2>/dev/null))
SERVICES := $(if $(MVN),$(foreach server,kafka cassandra,tests/support/java/$(server)/target/installed))
CLIENTS := $(if $(NPM),tests/clients/node_modules/installed tests/contracts/node_modules/installed) $(if $(MVN),tests/clients/java/target/installed)

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

run: .venv/run  ## Start a complete presence server on http://127.0.0.1:8080
	$(BIN)/presence serve

test: check $(CLIENTS) $(SERVICES)  ## Check the code, then run all tests
	$(BIN)/python -m pytest -n 5 --dist worksteal --ignore tests/fleet/test_faults.py --ignore tests/loadtest/test_distrust.py
	$(BIN)/python -m pytest -n 3 tests/fleet/test_faults.py
	$(BIN)/python -m pytest tests/loadtest/test_distrust.py

check: .venv/dev  ## Check style, types and the direction of imports
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

contracts: .venv/dev  ## Verify a fresh server by the contract, all of it (ARGS="--only WATCH-12 --html report.html")
	$(BIN)/python -m tests.contracts.verified --patient $(ARGS)

test-mutants: .venv/dev  ## Run the whole suite of the contract on each broken server (for hours; in `make test` the cases meant for it)
	$(BIN)/python -m tests.contracts.mutants --all $(ARGS)

load: .venv/dev  ## Load a fresh server: 2,000 clients for a minute, and a report (ARGS="--sessions 5000"; docs/load-testing.md)
	$(BIN)/python -m loadtest run steady --sessions 2000 --seconds 60 $(ARGS)

bench: .venv/dev $(SERVICES)  ## Measure the small parts, then the table of docs/performance.md (ROWS="connects churn": some of it)
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python -m benchmarks $(ROWS)

fuzz: .venv/dev  ## Fuzz a server (SECONDS=60, SEED=, LEVEL=all, RATE=inf, NICE=0, APART=1), or with TARGET=codec the codec
ifeq ($(TARGET),codec)
	$(PIP) install --target .venv/fuzz atheris==3.0.0
	PYTHONPATH=.venv/fuzz:. $(BIN)/python tests/fuzz/codec.py -max_total_time=$(SECONDS) -max_len=4096
else
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --level $(LEVEL) --rate $(RATE) --nice $(NICE) $(if $(APART),--apart) $(if $(SEED),--seed $(SEED))
endif
soak: .venv/dev $(SERVICES)  ## Break a fleet for hours (SECONDS=60, SEED=, FULL=1: with Kafka and Cassandra)
	$(BIN)/python -m tests.fleet soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(if $(FULL),--full)

SECONDS ?= 60
LEVEL ?= all
RATE ?= inf
NICE ?= 0

services: .venv/dev $(SERVICES)  ## Start a real Redis, Kafka and Cassandra in the background, and print what to export
	@$(BIN)/python -m tests.support.services

services-stop: .venv/dev  ## End them, and remove their data
	@$(BIN)/python -m tests.support.services stop

image: .venv/dev $(SERVICES)  ## Make the image for the container-backed tests, of this machine's own files
	@$(BIN)/python -m tests.support.images

lock: .venv/dev  ## Pin the dependencies anew, with hashes (UPGRADE=1: the newest that the ranges allow)
	$(COMPILE) -o requirements/run.txt pyproject.toml requirements/run.in
	$(COMPILE) -o requirements/dev.txt pyproject.toml requirements/dev.in
	for folder in clients contracts; do (cd tests/$$folder && \
		npm $(if $(UPGRADE),update,install) --package-lock-only --omit-lockfile-registry-resolved) || exit; done
COMPILE = CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/pip-compile --quiet --no-config $(if $(UPGRADE),--upgrade) \
	--generate-hashes --allow-unsafe --strip-extras --no-emit-options --resolver=backtracking

clean:  ## Remove all that was made here
	-[ ! -d .services ] || $(BIN)/python -m tests.support.services stop
	rm -rf .venv .services tests/*/node_modules tests/clients/java/target tests/support/java/*/target build dist \
		*.egg-info contracts/build contracts/*.egg-info .benchmarks .hypothesis .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: an environment is made once, and again when what it is made from has changed. The development environment
# holds what `make run` needs, too.
.venv/run: requirements/run.txt pyproject.toml | .venv/bin/python
	$(PIP) install --require-hashes --requirement requirements/run.txt
	$(PIP) install --no-deps --no-build-isolation --no-index --editable .
	@touch $@

.venv/dev: requirements/dev.txt pyproject.toml | .venv/bin/python
	$(PIP) install --require-hashes --requirement requirements/dev.txt
	$(PIP) install --no-deps --no-build-isolation --no-index --editable .
	@touch $@ .venv/run

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python ≥ 3.11 with venv and pip was found: install one, or say make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv

tests/%/node_modules/installed: tests/%/package-lock.json
	cd tests/$* && npm ci --ignore-scripts --no-audit --no-fund --silent
	@touch $@

# Without a network and with nothing in Maven's cache its tests are skipped, and the summary says so.
tests/clients/java/target/installed: tests/clients/java/pom.xml tests/clients/java/Driver.java
	-cd tests/clients/java && mvn -q -B dependency:copy-dependencies && \
		javac -d target/classes -cp 'target/lib/*' Driver.java && touch target/installed

tests/support/java/%/target/installed: tests/support/java/%/pom.xml
	-cd $(<D) && rm -rf target && mvn -q -B dependency:copy-dependencies && touch target/installed
