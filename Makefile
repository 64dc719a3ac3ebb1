# Everything runs from .venv, and nothing outside this folder is changed.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3.11
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(BIN):$(PATH)
# DeepSpeed 0.19 caches compiled ops per user regardless of version; use one cache per environment.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
DEEPSPEED := deepspeed --num_accelerators 2 launch/pretrain.py
DEMO := out/digits_demo
SMOKE := out/smoke_vitl
SITE := build/site

.PHONY: help setup demo test test-long test-methods test-faults test-hosts lint docs smoke-vitl freeze clean data/digits data/photographs

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with the pinned packages

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	pip install -q -c constraints.txt -e '.[dev,docs]'
	@touch $@

demo: setup data/digits  ## train the digits demo through all three phases on 2 CPU ranks (2 to 3 minutes)
	@if [ -e $(DEMO) ]; then old=$(DEMO).$$(date +%Y%m%d-%H%M%S); mv $(DEMO) $$old; echo "the previous run was moved to $$old"; fi
	$(DEEPSPEED) --recipe launch/recipes/digits_demo.yaml --deepspeed_config ds_configs/zero2.json
	prelora evaluate $(DEMO)/model --data data/digits/val
	prelora report $(DEMO)

data/digits: data/digits/val/manifest.json
data/digits/val/manifest.json: | setup
	rm -rf data/digits
	prelora shards digits data/digits

smoke-vitl: setup data/photographs  ## train ViT-L/16 at 224 px through all phases on 2 CPU ranks (about 5 minutes, 24 GiB)
	rm -rf $(SMOKE) && mkdir -p benchmarks/results
	@{ date -u +%F; lscpu | grep -E '^(Model name|CPU\(s\))'; grep MemTotal /proc/meminfo; git rev-parse HEAD; \
		pip list | grep -E '^(torch|deepspeed|transformers|peft) '; } | tee benchmarks/results/smoke_vitl.log
	$(DEEPSPEED) --recipe launch/recipes/vit_large_in1k_prelora_exp1.yaml --deepspeed_config ds_configs/zero2.json \
		run.output_dir=$(SMOKE) data.train=data/photographs/train data.val=data/photographs/val data.workers=0 \
		train.global_batch_size=8 train.micro_batch_size=4 train.log_every=1 \
		train.duration='18 steps' train.eval_every='18 steps' observe.every='1 step' lora.warmup='3 steps' \
		2>&1 | sed "s|$(CURDIR)/||g" | tee -a benchmarks/results/smoke_vitl.log
	prelora evaluate $(SMOKE)/model --data data/photographs/val
	prelora report $(SMOKE) | tee benchmarks/results/smoke_vitl.txt

data/photographs: data/photographs/val/manifest.json
data/photographs/val/manifest.json: | setup
	rm -rf data/photographs
	prelora shards photographs data/photographs --train 64 --val 16

test: setup  ## run all tests
	pytest

test-long: setup  ## run the additional settings of long tests (about 10 minutes)
	pytest -m long --durations=0

test-methods: setup  ## train each method on the digits, and compare the accuracies with full training (about 10 minutes)
	python benchmarks/methods_digits.py

test-faults: setup  ## kill ranks 44 times at random (seeded) moments, and compare with undisturbed runs (about 8 minutes)
	python benchmarks/faults.py

test-hosts: setup  ## start runs on 2, 4 and 16 hosts (namespaces) and try every fault; needs root (about 30 minutes)
	python benchmarks/many_hosts.py | tee benchmarks/results/hosts.log

lint: setup  ## run ruff, mypy and the import contracts
	ruff check .
	mypy prelora_ds
	lint-imports --no-logo

docs: setup  ## write what docs/ has from the code, and build the site of the documentation; a broken link is an error
	python -c 'from prelora_ds.config.reference import reference; print(end=reference())' > docs/config.tmp
	mv docs/config.tmp docs/config.md
	python -c 'from prelora_ds.config.kinds_tables import with_tables as w; print(end=w(open("docs/methods.md").read()))' > docs/methods.tmp
	mv docs/methods.tmp docs/methods.md
	rm -rf $(SITE)
	sphinx-build -q -W --keep-going -b html -c docs/site . $(SITE)
	@echo "open $(SITE)/index.html in a browser"

freeze:  ## write the package versions of .venv into constraints.txt
	@{ head -1 constraints.txt; pip freeze --exclude-editable | grep -v -i -E '^(nvidia|cuda|triton|pip)[-=]' | sort -f; } \
		> constraints.tmp && mv constraints.tmp constraints.txt

clean:  ## remove .venv, caches and generated data, but not out/
	rm -rf $(VENV) data build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
