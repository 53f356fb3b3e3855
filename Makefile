# Every target sets itself up: nothing is needed but python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Suites start hundreds of processes; one that may not write down what it compiled compiles all of Prefect again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check slow endurance conformance chaos chaos-answers chaos-ingest-kills chaos-kills chaos-protocol pixels plans properties fuzz hostile cancels mutants sbom docs bench up down clean

demo: $(STAMP)
	$(BIN)/python -m examples.demo

# Most tests wait rather than compute, hence six at a time; those with a Prefect server share one. What waits for other
# processes depends on what else the machine does: one more try is allowed, and shown.
test: $(STAMP)
	$(BIN)/python -m pytest -n 6 --reruns 1

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each file has a server and workers of its own, hence file by file. With UNTIL, in seconds since 1970, no test begins
# later, and the order of the files is another one each time.
slow: $(STAMP)
	$(BIN)/python -m pytest -m 'slow and not endurance' -n 2 --dist loadfile --reruns 1 $(UNTIL:%=--no-loadscope-reorder --until %) tests

endurance: $(STAMP)
	$(BIN)/python -m pytest -m endurance

conformance: $(STAMP)
	$(BIN)/python -m pytest -m conformance -n 2 --dist loadfile --reruns 1 $(UNTIL:%=--no-loadscope-reorder --until %) tests/conformance

# SEEDS for each platform, from SEED on; a failing one prints the command that repeats it.
chaos: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m chaos --seeds $(or $(SEEDS),30) --seed $(or $(SEED),0)

chaos-answers: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m chaos.answers

# A session on VIP killed before and after every EVERY-th request, and taken up again in every way.
chaos-kills: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m chaos kills --every $(or $(EVERY),1)

# KILLS of each policy, from SEED on.
chaos-ingest-kills: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m chaos.ingest_kills --kills $(or $(KILLS),30) --seed $(or $(SEED),0)

chaos-protocol: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m chaos.protocol --schedules $(or $(SCHEDULES),10000) --seed $(or $(SEED),0)

# STATES of a session on VIP, from SEED on: planned, run, and compared with the journal of the sandbox.
plans: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m harness.plans --states $(or $(STATES),100) --seed $(or $(SEED),0)

# EXAMPLES for each property; the default suite tries a few.
properties: $(STAMP)
	EXAMPLES=$(or $(EXAMPLES),10000) $(BIN)/python -m pytest -q --hypothesis-profile=thorough --timeout 3600 tests/vip/test_vip_properties.py

# EXAMPLES for each parser of what servers say, and of files of ours.
fuzz: $(STAMP)
	EXAMPLES=$(or $(EXAMPLES),2000) $(BIN)/python -m pytest -q -s --hypothesis-profile=thorough --timeout 3600 tests/shared/test_fuzz.py

# A hostile server against the client of each platform: attack, error, memory, seconds.
hostile: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m harness.hostile

# Runs that are cancelled while worker, process or server are dead: when their remote jobs have ended.
cancels: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m harness.cancels

mutants: $(STAMP)
	$(BIN)/python tests/mutants.py

# Every kind of image file for every channel: how many cells are equal, refused by name, wrong.
pixels: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m harness.image_formats

# The bill of materials of what is installed (CycloneDX), its licences, and known vulnerabilities.
sbom: $(STAMP)
	PYTHONPATH=tests:. $(BIN)/python -m harness.supply_chain

# Pages for people, in build/site, to be opened without a network. A warning is an error.
docs: $(STAMP)
	rm -rf build/sources build/site
	mkdir -p build/sources/prefect_biomed
	ln -s $(foreach package,analysis blocks clients flows tasks sandbox,$(CURDIR)/$(package)) build/sources/prefect_biomed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	! grep -rlE '<(script|link|img|iframe)[^>]* (src|href)="https?:' build/site --include='*.html'

bench: $(STAMP)
	$(BIN)/python -m benchmarks

up: $(STAMP)
	$(BIN)/prefect-biomed up --home .demo

down:
	$(BIN)/prefect-biomed down --home .demo

clean:
	rm -rf $(VENV) .cache build

# uv when it is there, because it is faster; venv and pip when it is not.
$(STAMP): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	fi
	@touch $@
