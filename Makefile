.POSIX:
# Everything happens in one environment, $(VENV). Each target installs what it needs there, once per change of
# pyproject.toml or constraints.txt. PYTHON=... names the interpreter, ARGS=... is handed to pytest, to the bench or to luthier.
VENV = .venv
BIN = $(VENV)/bin
RANGE = pyproject.toml constraints.txt
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable
# What PROCESSOR=plain sets for the tests: libraries then leave alone what a processor with AVX2 and without bf16 does not have.
PLAIN = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Haswell \
	NPY_DISABLE_CPU_FEATURES=X86_V4,AVX512_ICL,AVX512_SPR
SUITABLE = import sys, importlib.util as u; v = sys.version_info; sys.exit( \
	"is Python %d.%d" % v[:2] if not (3, 10) <= v[:2] <= (3, 13) else \
	None if u.find_spec("venv") and u.find_spec("ensurepip") else \
	"cannot make environments (on Debian and Ubuntu: apt install python3-venv)")

.PHONY: help quickstart test coverage lint package newest oldest docs docs-text bench bench-techniques bench-objectives workshop clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

quickstart: $(VENV)/.core ## teach a small model some facts and show what it learnt and what it kept
	@echo "training by recipes/quickstart.yaml"
	@$(BIN)/luthier train recipes/quickstart.yaml $(ARGS)

test: $(VENV)/.test ## run every test, ARGS="-k word" some of them, PROCESSOR=plain as with AVX2 and without bf16
	@case "$(PROCESSOR)" in \
		"") echo "testing" ;; \
		plain) echo "testing as on a plain processor"; export $(PLAIN) ;; \
		*) echo "PROCESSOR is $(PROCESSOR); leave it out, or say plain" >&2; exit 2 ;; \
	esac; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

coverage: $(VENV)/.test ## run every test and say how much of the code they run (a third slower)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report= $(ARGS)
	@echo "tests run $$($(BIN)/python -m coverage report --format=total) % of the lines of luthier/"

lint: $(VENV)/.lint ## check style, types and the direction of imports
	@echo "checking style"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "checking types"
	@$(BIN)/mypy
	@echo "checking the direction of imports"
	@$(BIN)/lint-imports --no-logo

package: $(VENV)/.package ## build wheel and sdist into dist/, and train from the wheel in an environment without the repository
	@rm -rf dist build/installed
	@$(BIN)/python -m build --outdir dist . >/dev/null
	@ls dist
	@$(BIN)/python -m venv build/installed
	@echo "installing the wheel"
	@build/installed/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt dist/*.whl
	@mkdir build/installed/empty && cd build/installed/empty && ../bin/luthier --version && \
		../bin/luthier quickstart model=workshop-small train.steps=2 && ls runs/quickstart-1/report.html

newest: $(VENV)/.made ## test with the newest releases that pyproject.toml admits, in build/newest (torch is large)
	@rm -rf build/newest && $(BIN)/python -m venv build/newest
	@build/newest/bin/python -m pip install -qq --disable-pip-version-check --upgrade --editable '.[test]' $(NEWEST)
	@build/newest/bin/python -m pip list --format=freeze | grep -E '^(torch|transformers|accelerate|peft|trl|optuna)=='
	@OMP_NUM_THREADS=1 build/newest/bin/python -m pytest -n auto --dist worksteal $(ARGS)

oldest: $(VENV)/.made ## test with the oldest releases that pyproject.toml admits, in build/oldest
	@rm -rf build/oldest && $(BIN)/python -m venv build/oldest
	@build/oldest/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[test]'
	@build/oldest/bin/python -m pip list --format=freeze | grep -E '^(torch|transformers|accelerate|peft|trl|optuna)=='
	@OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest -n auto --dist worksteal $(ARGS)

docs: $(VENV)/.docs ## build the documentation into site/
	@$(BIN)/python docs/generate.py --check
	@echo "building the documentation into site/"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-text: $(VENV)/.core ## write what the code knows into the pages of docs/
	@$(BIN)/python docs/generate.py

bench: $(VENV)/.bench ## measure speed and memory beside the usual tools
	@echo "measuring speed and memory"
	@$(BIN)/python -m bench $(ARGS)

bench-techniques: $(VENV)/.bench ## measure speed and memory of every technique
	@$(BIN)/python -m bench.techniques $(ARGS)

bench-objectives: $(VENV)/.bench ## measure what every objective adds to a step
	@$(BIN)/python -m bench.objectives $(ARGS)

workshop: $(VENV)/.core ## build the models that come with luthier again, from nothing (about an hour)
	@echo "building the models of the workshop into build/"
	@$(BIN)/python -m luthier.lab.workshop $(ARGS)

clean: ## remove the environment, caches and everything built; results of runs stay
	@echo "removing .venv and other environments, caches, site/ and dist/"
	@rm -rf .venv site dist build/installed build/newest build/oldest .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	@tried=; for python in $${PYTHON:-python3 python3.12 python3.11 python3.13 python3.10}; do \
		if says=$$("$$python" -c '$(SUITABLE)' 2>&1); then \
			echo "making $(VENV) with $$("$$python" --version)"; \
			"$$python" -m venv $(VENV) && touch $@; exit; \
		fi; \
		tried="$$tried  $$python: $$(echo "$$says" | head -n 1)\n"; \
	done; \
	printf '%s\n%b' "luthier needs Python 3.10 to 3.13; name one with make PYTHON=/path/to/python. Tried:" "$$tried" >&2; exit 1

$(VENV)/.core: $(VENV)/.made $(RANGE)
	@echo "installing luthier (the first time takes some minutes: torch is large)"
	@$(INSTALL) . && touch $@

$(VENV)/.test: $(VENV)/.core
	@echo "installing what the tests need"
	@$(INSTALL) '.[test]' && touch $@

$(VENV)/.lint: $(VENV)/.core
	@echo "installing the checkers"
	@$(INSTALL) '.[lint]' && touch $@

$(VENV)/.package: $(VENV)/.made
	@echo "installing what builds packages"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt build && touch $@

$(VENV)/.docs: $(VENV)/.core
	@echo "installing what the documentation needs"
	@$(INSTALL) '.[docs]' && touch $@

$(VENV)/.bench: $(VENV)/.core
	@echo "installing the tools to compare with"
	@$(INSTALL) '.[bench]' && touch $@
