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
SITE := build/site
FASHION := /usr/share/datasets/fashion-mnist

.PHONY: help setup demo test test-gpu test-long test-methods test-faults test-hosts lint docs smoke-vitl \
	study freeze clean data/digits data/photographs data/fashion

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with the pinned packages, and compile DeepSpeed's CPU Adam

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	pip install -q -c constraints.txt -e '.[dev,docs]'
	@DS_ACCELERATOR=cpu python -c 'from deepspeed.ops.adam import DeepSpeedCPUAdam as A; import torch; A([torch.zeros(1)])' \
		> $(VENV)/cpu_adam.log 2>&1 || echo "ZeRO-Offload will not work: CPU Adam cannot be compiled, see $(VENV)/cpu_adam.log"
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

# Date, machine, commit and versions, which begin a log of results.
ORIGIN = { date -u +%F; lscpu | grep -E '^(Model name|CPU\(s\))'; grep MemTotal /proc/meminfo; git rev-parse HEAD; \
	pip list | grep -E '^(torch|deepspeed|transformers|peft) '; }

# What lets each recipe go through all its phases in 18 steps.
RECIPE ?= prelora_exp1
SHORT_prelora_exp1 := lora.warmup='3 steps'
SHORT_relora := phases.full.until='3 steps' phases.relora.rewarm='2 steps' \
	phases.relora.merge.every='5 steps' phases.relora.merge.rewarm='1 steps'
SHORT_prelora_relora := phases.full.until='2 steps' phases.relora.rewarm='1 steps' \
	phases.relora.merge.every='4 steps' phases.relora.merge.rewarm='1 steps' phases.warmup.until='3 steps'
SHORT_dynalora := phases.lora.active.every='3 steps'
SMOKE = out/smoke_vitl_$(RECIPE)
SMOKED = benchmarks/results/smoke_vitl_$(RECIPE)

smoke-vitl: setup data/photographs  ## train ViT-L/16 at 224 px through all phases of RECIPE on 2 CPU ranks (5 to 10 minutes, 24 GiB)
	$(if $(SHORT_$(RECIPE)),,$(error RECIPE=$(RECIPE) is not one of $(patsubst SHORT_%,%,$(filter SHORT_%,$(.VARIABLES)))))
	rm -rf $(SMOKE) && mkdir -p benchmarks/results
	@$(ORIGIN) | tee $(SMOKED).log
	$(DEEPSPEED) --recipe launch/recipes/vit_large_in1k_$(RECIPE).yaml --deepspeed_config ds_configs/zero2.json \
		run.output_dir=$(SMOKE) data.train=data/photographs/train data.val=data/photographs/val data.workers=0 \
		train.global_batch_size=8 train.micro_batch_size=4 train.log_every=1 \
		train.duration='18 steps' train.eval_every='18 steps' observe.every='1 step' $(SHORT_$(RECIPE)) \
		2>&1 | sed "s|$(CURDIR)/||g" | tee -a $(SMOKED).log
	prelora evaluate $(SMOKE)/model --data data/photographs/val
	prelora report $(SMOKE) | tee $(SMOKED).txt

data/photographs: data/photographs/val/manifest.json
data/photographs/val/manifest.json: | setup
	rm -rf data/photographs
	prelora shards photographs data/photographs --train 64 --val 16

study: setup data/fashion  ## train each method on Fashion-MNIST with 3 seeds, and compare (about 5 hours; can be stopped and resumed)
	python benchmarks/study.py

# Of the 60,000 training images, 5,000 are held out for every choice.
data/fashion: data/fashion/val/manifest.json
data/fashion/val/manifest.json: | setup
	@test -d $(FASHION) || { echo "$(FASHION) is missing; install Debian's package dataset-fashion-mnist"; exit 1; }
	rm -rf data/fashion
	prelora shards build $(FASHION) data/fashion/all --split train --samples-per-shard 5000
	prelora shards build $(FASHION) data/fashion/test --split test --samples-per-shard 5000
	prelora shards index 'data/fashion/all/shard-{000000..000010}.tar' --out data/fashion/train --like data/fashion/all
	prelora shards index data/fashion/all/shard-000011.tar --out data/fashion/val --like data/fashion/all

test: setup  ## run all tests, two files at a time, fast ones first
	pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: setup  ## on a machine with GPUs: run what only they can show, and measure them (about 10 minutes)
	PRELORA_GPU=1 pytest tests/gpu -rs -p no:cacheprovider
	python benchmarks/gpu.py --minutes 4

test-long: setup  ## run the additional settings of long tests (about 10 minutes)
	pytest -m long --durations=0

test-methods: setup  ## train each method on the digits and compare the accuracies, and test each kind of adapter at each ZeRO stage (20 minutes to an hour)
	python benchmarks/methods_digits.py
	@$(ORIGIN) | tee benchmarks/results/kinds.log
	pytest -n 2 tests/ranks/test_kinds.py tests/ranks/test_adalora.py -m 'long or not long' -rA | tee -a benchmarks/results/kinds.log

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
