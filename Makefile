# `make help` prints what is here. `make demo` and `make test` need Python 3.11+, pip, make and git, and nothing set up before.

PYTHON     ?= python3
VENV       ?= .venv
EXPERIMENT ?= txt2img_laion
SCALE      ?= full
ARGS       ?=
PROCESSES  ?= 1

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
READY := $(VENV)/.ready
JOB   := +experiment=$(EXPERIMENT) scale=$(SCALE) $(ARGS)

TOY       := data/toy
TOY_STAGE := runs/autoencoder_kl_f4/toy

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-openmoji test test-fast lint types bench toy precompute-latents train sample evaluate report clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-20s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: EXPERIMENT=$(EXPERIMENT) SCALE=$(SCALE) ARGS='key=value ...' PROCESSES=$(PROCESSES)"

setup: $(READY) ## Make .venv with everything (once)

$(READY): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e '.[data,test]'
	touch $(READY)

demo: toy ## The whole pipeline on a laptop: shards, first stage, latents, training, samples, scores, report
	@$(MAKE) --no-print-directory precompute-latents SCALE=toy
	@$(MAKE) --no-print-directory train SCALE=toy
	@$(MAKE) --no-print-directory sample SCALE=toy
	@python -m ldm_scale.jobs.summary $(TOY_STAGE) runs/txt2img_laion/toy

demo-openmoji: setup ## The same pipeline on 4,495 emoji (about 20 minutes; CC BY-SA 4.0, fetched, not kept)
	python -m data_tools.make_openmoji data/openmoji
	python train.py +experiment=autoencoder_openmoji scale=toy
	python precompute_latents.py +experiment=txt2img_openmoji scale=toy
	python train.py +experiment=txt2img_openmoji scale=toy
	python -m ldm_scale.jobs.summary runs/autoencoder_openmoji/toy runs/txt2img_openmoji/toy

toy: setup ## Toy shards and a first stage trained on them: what SCALE=toy jobs start from
	@python -m data_tools.make_toy_world $(TOY)
	@python train.py +experiment=autoencoder_kl_f4 scale=toy

test: setup ## Every test
	pytest -n 2 --dist loadfile

test-fast: setup ## The inner loop: no slow tests, under 2 minutes
	pytest -n 2 --dist loadfile -m 'not slow'

lint: setup ## ruff, import-linter (the floors), codespell
	ruff check .
	ruff format --check .
	lint-imports --no-logo
	codespell

types: setup ## mypy
	mypy

bench: setup ## Every benchmark: prints ratios against a peer or a limit measured in the same run
	for file in benchmarks/*.py; do python $$file; done

ifeq ($(SCALE),toy)
precompute-latents: toy
endif
precompute-latents: setup ## Encode images once: EXPERIMENT= SCALE= ARGS='data.images=... data.latents=...'
	accelerate launch --num_processes $(PROCESSES) --num_machines 1 --mixed_precision no --dynamo_backend no precompute_latents.py $(JOB)

train: setup ## Train: EXPERIMENT= SCALE= ARGS=
	accelerate launch --num_processes $(PROCESSES) --num_machines 1 --mixed_precision no --dynamo_backend no train.py $(JOB)

sample: setup ## Draw some captions from a trained run: EXPERIMENT= ARGS='run_dir=... "prompts=[a caption]"'
	python sample.py run_dir=runs/$(EXPERIMENT)/$(SCALE) $(ARGS)

evaluate: setup ## Score a trained run: EXPERIMENT= SCALE= ARGS=
	python evaluate.py run_dir=runs/$(EXPERIMENT)/$(SCALE) $(ARGS)

report: setup ## Write report.html again: RUN=
	python -m ldm_scale.tracking.report $(RUN)

clean: ## Remove what runs and demos wrote (data, runs), not .venv
	rm -rf runs data outputs multirun
