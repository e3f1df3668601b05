# make test, make demo, make docs: each sets up its own environment first, and is quick when there is nothing new to set up.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := test

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PY := $(VENV)/bin/python
TOOLS_STAMP := $(VENV)/tools.stamp
PACKAGE_STAMP := $(VENV)/package-$(MI_KERNELS_BUILD).stamp
LOG := build/install.log
BUILD_INPUTS := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
EXTENSION := $(wildcard mi_kernels/_C*.so)

# How the library runs here, for the closing line.
define path_taken
$$($(PY) -c 'import mi_kernels; s = mi_kernels.backends()["cpu"]; \
print("compiled extension" if s == "available" else "pure-Python path: " + s)')
endef

# NO_MKDOCS_2_WARNING: an advertisement of mkdocs-material, no warning of ours.
SITE = NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

# $(call step,name,command): says what starts; on failure says which target failed at what.
define step
@printf '\n== %s\n' '$(1)'; $(2) || { echo 'make $@: FAILED at: $(1)'; exit 1; }
endef

.PHONY: test demo bench gpu docs clean FORCE

test: $(PACKAGE_STAMP)
	$(call step,ruff check,$(PY) -m ruff check .)
	$(call step,mypy,$(PY) -m mypy)
	$(call step,the site with warnings as errors,$(SITE))
	$(call step,pytest,$(PY) -m pytest -q)
ifneq ($(wildcard tests/triton_checks.py),)
	$(call step,Triton kernels,$(PY) -m tests.triton_checks)
endif
ifneq ($(wildcard tests/cuda_checks.py),)
	$(call step,CUDA kernels,$(PY) -m tests.cuda_checks)
endif
	@echo "make test: passed ($(path_taken))"

demo: $(PACKAGE_STAMP)
	$(call step,training the demo,$(PY) -m models demo --out runs/demo)
	@test -s runs/demo/report.html || { echo 'make demo: FAILED at: no report in runs/demo'; exit 1; }
	@echo "make demo: done, the report is runs/demo/report.html ($(path_taken))"

bench: $(PACKAGE_STAMP)
	$(call step,InfoNCE on this CPU,$(PY) -m bench.cpu)
	$(call step,concat critics on this CPU,$(PY) -m bench.mlp_critic)
	$(call step,CLUB$(comma) MMD and HSIC on this CPU,$(PY) -m bench.club)
	$(call step,the other losses on this CPU,$(PY) -m bench.losses)
	$(call step,attention on this CPU,$(PY) -m bench.attention)
	$(call step,LSTM scans on this CPU,$(PY) -m bench.lstm)
	$(call step,layers of sequence models on this CPU,$(PY) -m bench.layers)
	$(call step,the tables of README.md and docs,$(PY) -m bench.readme)
	$(call step,the figures of README.md and docs,$(PY) -m bench.plots)
	@echo "make bench: done, the figures are in bench/results/ ($(path_taken))"

docs: $(PACKAGE_STAMP)
	$(call step,the site,$(SITE))
	@echo "make docs: done: open build/site/index.html; its search wants a server, python -m http.server -d build/site"

gpu: $(PACKAGE_STAMP)
	$(call step,everything that a GPU has to say (the figures go to runs/gpu),$(PY) -m bench.gpu --out runs/gpu)
	@echo "make gpu: done, the figures are in runs/gpu/gpu.json ($(path_taken))"

clean:
	rm -rf .venv build dist *.egg-info mi_kernels/_C*.so .pytest_cache .ruff_cache .mypy_cache
	@echo "make clean: removed .venv and everything that was built"

$(TOOLS_STAMP): Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1)." \
	  "Name another one with PYTHON=..."; exit 1; }
	$(call step,virtual environment in $(VENV),test -x $(PY) || $(PYTHON) -m venv $(VENV))
	$(call step,installing $(TORCH) (the longest step),$(PY) -m pip install '$(TORCH)')
	$(call step,installing build tools,$(PY) -m pip install --upgrade 'setuptools>=77' wheel ninja)
	@touch $@

# Without an extension this runs every time: a compiler may have come, and where none has it is quick.
$(PACKAGE_STAMP): $(TOOLS_STAMP) $(BUILD_INPUTS) $(if $(EXTENSION),,FORCE)
	@mkdir -p $(dir $(LOG))
	$(call step,building and installing the package (log: $(LOG)),\
	  $(PY) -m pip install -v --no-build-isolation -e '.[test$(comma)models$(comma)triton$(comma)docs$(comma)dev]' > $(LOG) 2>&1 \
	  || { tail -n 40 $(LOG); false; })
	@grep -o '^ *mi-kernels: .*' $(LOG) || true
	@rm -f $(VENV)/package-*.stamp; touch $@

comma := ,
