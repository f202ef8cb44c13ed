# Everything from nothing: `make demo` compares methods on a small model and then on a real one, each with its report, `make test` runs every check.
# The first call makes the environment; later calls find it by its stamp.

PYTHON ?= python3
VENV ?= .venv
# On Linux pip's plain torch brings CUDA's packages along. Where a CPU build can be had, name it: make TORCH="torch==2.13.0+cpu"
TORCH ?= torch==2.13.0
FIRST ?= longspan compare longspan-7m -m none -m ntk -m streaming -m window -t ppl:text=novel -l 4k --samples 3 --out runs/first
DEMO ?= longspan compare smollm2-135m -m none -m ntk -m streaming -t ppl -l 12k --samples 1 --out runs/demo
WORKERS ?= 2
NEWEST ?= .venv-newest
OLDEST ?= .venv-oldest
# What `make test-python`, `test-oldest` and `test-newest` run: all tests, or some by name.
TESTS ?= tests

# A browser is installed beside the packages.
MAKEFLAGS += --jobs=2

# Packages are compiled when they are first imported, and kept so, in whatever shell: without that every import takes twice as long.
unexport PYTHONDONTWRITEBYTECODE

define run_tests
OMP_NUM_THREADS=1 $(1)/pytest -n $(WORKERS) --dist worksteal $(2)
endef
# Kernels without a GPU: Triton reads the variable when a kernel is defined, so their tests have a process of their own.
define run_kernels
$(if $(filter Linux,$(shell uname -s)),TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(1)/pytest -n $(WORKERS) --dist worksteal -m kernels --every-kernel tests/engine,@echo "no Triton on this system: the tests of kernels are skipped")
endef

BIN := $(abspath $(VENV))/bin
BARE := $(VENV)/.bare
READY := $(VENV)/.ready
BROWSER := $(VENV)/.browser
MKDOCS := $(VENV)/.mkdocs

.PHONY: demo test test-fast test-python test-kernels test-oldest test-newest lint format docs tables new-method clean

demo: $(READY)
	PATH="$(BIN):$$PATH" $(FIRST)
	PATH="$(BIN):$$PATH" $(DEMO)

test: $(READY) $(BROWSER) lint
	$(call run_tests,$(BIN),)
	$(call run_kernels,$(BIN))

# A part of the tests, in less than two minutes on two cores, for while one works: tools/fast.py says which.
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tools.fast -n $(WORKERS) --dist worksteal

# All tests but those of kernels, and those of kernels alone: the halves of `make test`, without lint.
test-python: $(READY) $(BROWSER)
	$(call run_tests,$(BIN),$(TESTS))

test-kernels: $(READY)
	$(call run_kernels,$(BIN))

# The tests with the oldest torch, transformers and Triton that pyproject.toml allows, in an environment of its own.
test-oldest: $(BROWSER)
	$(MAKE) VENV=$(OLDEST) $(OLDEST)/.bare
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $$($(OLDEST)/bin/python tools/oldest.py) -e '.[test]'
	$(OLDEST)/bin/python -c "import torch, transformers; print('oldest: torch', torch.__version__, 'transformers', transformers.__version__)"
	$(call run_tests,$(OLDEST)/bin,$(TESTS))
	$(call run_kernels,$(OLDEST)/bin)

# The tests with the newest releases of everything, in an environment of its own, whatever pyproject.toml allows: it tells what the
# next bounds need, and keeps no change from landing. `make demo VENV=.venv-newest` afterwards runs the demo with them.
test-newest: $(BROWSER)
	$(MAKE) VENV=$(NEWEST) $(NEWEST)/.bare
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --upgrade $$($(NEWEST)/bin/python tools/unbounded.py)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -e .
	@touch $(NEWEST)/.ready
	$(NEWEST)/bin/python -c "import torch, transformers, triton, accelerate as a; print('newest: torch', torch.__version__, 'transformers', transformers.__version__, 'triton', triton.__version__, 'accelerate', a.__version__)"
	$(call run_tests,$(NEWEST)/bin,$(TESTS))
	$(call run_kernels,$(NEWEST)/bin)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/imports.py
	MYPY_NUM_WORKERS=2 $(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation site, in site/. A warning fails the build, and a dead link is one (but with --quiet mkdocs counts no warnings). Modules
# are read as text, so torch is not needed.
# The variable leaves out mkdocs-material's notice about other site generators.
docs: $(MKDOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site is in site/index.html"

# The tables of the documentation that come from the catalogue, after a method was added or changed.
tables: $(READY)
	$(BIN)/python tools/slots.py
	$(BIN)/python tools/survey.py > docs/survey.md.new && mv docs/survey.md.new docs/survey.md
	$(BIN)/python tests/conformance/matrix.py > docs/conformance.md.new && mv docs/conformance.md.new docs/conformance.md

# One source file to start from, and what else a method of its kind needs: make new-method NAME=strided KIND=pattern
new-method:
	@$(PYTHON) tools/new_method.py "$(NAME)" "$(KIND)"

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist site

$(BARE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "longspan needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { test "$$(id -u)" = 0 && apt-get update && apt-get install -y python3-venv; } || { echo "Python's venv is missing: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first: a range such as longspan's own would take the newest build there is.
$(READY): pyproject.toml constraints.txt | $(BARE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt -e '.[dev]'
	@touch $@

# What the documentation site needs: the packages of the extra docs alone.
$(MKDOCS): pyproject.toml constraints.txt | $(BARE)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' >$(VENV)/docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --requirement $(VENV)/docs.txt
	@touch $@

# A browser for the tests of the report's page. Without one they are skipped, and say so.
$(BROWSER): | $(BARE)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -q && apt-get install -y -q --no-install-recommends chromium chromium-driver; } || echo "no chromium: tests that need a browser are skipped"
	@touch $@
