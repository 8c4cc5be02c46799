# Thin: every target is a few commands that anyone could type. Start with `make book`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# the one that torch 2.13 for GPUs brings; its interpreter runs the kernels' tests where there is no GPU
TRITON := triton==3.7.1

.PHONY: book html test rehearsal lint bench interop peers publish setup clean

book: setup  ## run every chapter that is not done, then build the book
	$(BIN)/saelib run all
	$(BIN)/saelib book

html: setup  ## build the book from the committed outputs, running nothing
	$(BIN)/saelib book --committed

test: lint  ## lint, re-run the notebooks against their committed outputs, unit tests
	$(BIN)/pytest --nbval notebooks
	$(BIN)/pytest tests

rehearsal: setup  ## the whole book and every download against a hub of our own, on a narrow GPT-2; a quarter of an hour
	$(BIN)/pytest --slow tests/test_rehearsal.py tests/test_hub.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup peers  ## ours and others', side by side; half an hour, nothing else running
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/sparsity.py

interop: setup peers  ## the peers load what we write, and we load what they write
	$(BIN)/pytest tests/test_interop.py

peers: setup
	$(BIN)/python benchmarks/setup_peers.py

publish: setup  ## the one way to refresh results/ and the outputs in notebooks/
	$(BIN)/saelib publish

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is missing or older than 3.11: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing requirements.lock into .venv; the first time takes some minutes"
	$(PIP) install --constraint requirements.lock "$$(grep '^torch==' requirements.lock)"
	$(PIP) install --requirement requirements.lock
	@case "$$(uname -sm)" in "Linux x86_64") $(PIP) install --no-deps $(TRITON) ;; esac
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

clean:  ## remove what runs made; the corpus cache and trained models stay
	rm -rf _build/runs _build/results _build/check _build/site
