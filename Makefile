# Two commands: `make demo` and `make test`. Both set up what they need and are safe to run twice.
EXTRAS  ?= cpu,search,train,dev
PYTHON  ?= 3.11
PORT    ?= 8000
KEEP    ?=
VENV    := .venv
BIN     := $(VENV)/bin
comma   := ,
STAMP   := $(VENV)/.sparkray-$(subst $(comma),-,$(EXTRAS))

# A folder of wheels named by PIP_FIND_LINKS serves uv too; elsewhere uv picks torch's CPU index by itself.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
TORCH_BACKEND := $(if $(findstring cuda,$(EXTRAS)),auto,cpu)
UV_TORCH := $(if $(strip $(PIP_FIND_LINKS)$(UV_FIND_LINKS)),,--torch-backend $(TORCH_BACKEND))

export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup demo test test-all check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v uv >/dev/null 2>&1 || python3 -m pip install --quiet 'uv>=0.9,<1'
	@test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) $(VENV)
	uv pip install --quiet --compile-bytecode --python $(BIN)/python $(UV_TORCH) -c constraints.txt -e '.[$(EXTRAS)]'
	@# The command line answers in a fraction of the time where its few libraries are compiled ahead.
	@$(BIN)/python -m compileall -q sparkray $$($(BIN)/python -c 'import typer, rich, pydantic; print(*(m.__path__[0] for m in (typer, rich, pydantic)))')
	@touch $(STAMP)

demo: setup
	@$(BIN)/sparkray demo --port $(PORT) $(if $(KEEP),--keep)

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: setup
	$(BIN)/python -m pytest -m "not gpu"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
