# make quickstart   tune a tiny model on this machine's CPU and see it answer better
# make test         run the tests
# Both build the environment first. Options: SYSTEM_PYTHON=python3.12, PIP_OPTIONS=…, PYTEST_OPTIONS=…

SYSTEM_PYTHON ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
PIP_OPTIONS ?= $(if $(CI),--quiet)
PYTEST_OPTIONS ?= -n auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test lint lint-containers audit format schema docs constraints clean distclean

help: ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: $(VENV)/.installed ## build .venv with the exact tested packages

# The stamp is newer than what it was made from, or the installation is made again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	"constraints.txt needs Python 3.11 or newer, %s is %d.%d; set SYSTEM_PYTHON" % (sys.executable, *sys.version_info[:2]))'
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e '.[test]'
	@touch $@

quickstart: venv ## tune, merge and try a tiny model on the CPU
	$(PYTHON) examples/quickstart/run.py

test: venv ## run the tests
	$(PYTHON) -m pytest $(PYTEST_OPTIONS)

lint: venv ## check style and layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

lint-containers: venv ## check the Dockerfiles and shell scripts
	$(PYTHON) -m pip install --disable-pip-version-check --quiet -e '.[lint-containers]'
	$(VENV)/bin/hadolint docker/*/*.Dockerfile
	$(VENV)/bin/shellcheck docker/*.sh .ci/run deploy/slurm/*.sbatch

audit: venv ## ask for known weaknesses of the packages in constraints.txt
	@if $(PYTHON) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[audit]'; \
	then $(PYTHON) .ci/audit.py; else echo 'NOT AUDITED: pip-audit could not be installed'; fi

format: venv ## put the code into shape
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

schema: venv ## write docs/schema anew from the config
	@mkdir -p docs/schema
	set -e; for method in sft dpo kto reward grpo orpo cpo; do \
	    $(VENV)/bin/finetuning schema $$method > docs/schema/$$method.json.new; \
	    mv docs/schema/$$method.json.new docs/schema/$$method.json; done

docs: schema ## write everything that is generated anew
	$(PYTHON) -m finetuning.config.reference docs/reference/config.md
	$(PYTHON) -m finetuning.plan.support docs/reference/support.md

# A fresh environment without pins, so that the set is what the bounds of pyproject.toml give today.
constraints: ## write constraints.txt anew from the newest releases that the bounds admit
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(SYSTEM_PYTHON) -m venv "$$fresh"; \
	"$$fresh/bin/python" -m pip install --disable-pip-version-check $(PIP_OPTIONS) -e '.[test]'; \
	grep '^#' constraints.txt > "$$fresh/constraints.txt"; \
	"$$fresh/bin/python" -m pip list --format freeze --exclude finetuning --exclude pip \
	    | tr 'A-Z_' 'a-z-' | sed -E '/^(nvidia-|cuda-|triton)/d; s/^(torch==[^+]*)\+.*/\1/' \
	    | sort >> "$$fresh/constraints.txt"; \
	mv "$$fresh/constraints.txt" constraints.txt

clean: ## remove what tests and tools left behind
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environment, too
	rm -rf $(VENV)
