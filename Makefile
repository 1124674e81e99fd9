# `make help` prints what is here. `make demo` and `make test` need Python 3.11+, pip, make and git, and nothing set up before.

PYTHON     ?= python3
VENV       ?= .venv
EXTRAS     ?= data,test
EXPERIMENT ?= txt2img_laion
SCALE      ?= full
ARGS       ?=
DS_OPS     ?= DS_BUILD_SHM_COMM=1
PROCESSES  ?= $(if $(filter toy,$(SCALE)),1)
WEIGHTS    ?= $(or $(LDM_SCALE_WEIGHTS),weights)
RUN        ?= runs/$(EXPERIMENT)/$(SCALE)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Without PROCESSES= the launcher takes one for each GPU; the engine of toy jobs is for one.
LAUNCH := PROCESSES=$(PROCESSES) launchers/accelerate.sh
READY := $(VENV)/.ready
# TORCH=system keeps the torch that $(PYTHON) has, a vendor's perhaps. WHEELHOUSE=DIR takes every package from there.
PINS   := $(if $(filter system,$(TORCH)),$(VENV)/constraints.txt,constraints.txt)
SOURCE := $(if $(WHEELHOUSE),--no-index --find-links $(abspath $(WHEELHOUSE)))
IMG2DATASET := .local/img2dataset/bin/img2dataset
DEBIAN := chromium iproute2 munge slurm-client slurmctld slurmd
JOB   := +experiment=$(EXPERIMENT) scale=$(SCALE) $(ARGS)

TOY       := data/toy
TOY_STAGE := runs/autoencoder_kl_f4/toy

TOY_PROMPTS := a small red circle at the top left on a white background,\
	a large blue square in the centre on a white background,a small green triangle at the right on a white background,\
	a large yellow circle at the bottom on a white background

OPENMOJI      := data/openmoji
OPENMOJI_ARGS := scale=toy name=openmoji data.images=$(OPENMOJI)/train data.validation=$(OPENMOJI)/val \
	data.latents=$(OPENMOJI)/latents data.transform.size=64 evaluation.caption_accuracy=false
OPENMOJI_TEXT := first_stage.checkpoint=runs/autoencoder_kl_f4/openmoji conditioning.vocab_size=2048

.DEFAULT_GOAL := help
.PHONY: help setup system-packages wheelhouse prebuild-ops img2dataset demo demo-openmoji compression-sweep test test-fast \
	test-faults lint types bench model-table fetch-weights toy plan precompute-latents train \
	status sample evaluate report dashboard relay clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  \033[1m%-20s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: EXPERIMENT=$(EXPERIMENT) SCALE=$(SCALE) ARGS='key=value ...' PROCESSES=$(or $(PROCESSES),one for each GPU)"

setup: $(READY) ## Make .venv with everything (once)

$(READY): pyproject.toml constraints.txt
	$(if $(WHEELHOUSE),cd $(WHEELHOUSE) && sha256sum --quiet --check SHA256SUMS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) $(VENV)
	$(if $(filter system,$(TORCH)),$(VENV)/bin/python launchers/keep_torch.py constraints.txt > $(PINS))
	$(VENV)/bin/pip install --quiet --upgrade-strategy only-if-needed $(SOURCE) -c $(PINS) -e '.[$(EXTRAS)]'
	touch $(READY)

system-packages: ## What tests use beside Python: a Slurm of their own, network namespaces, a browser (Debian, as root)
	@missing=$$(for name in $(DEBIAN); do dpkg -s $$name 2>/dev/null | grep -q ' installed' || printf ' %s' $$name; done); \
	test -z "$$missing" || { test "$$(id -u)" = 0 && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; } || \
	echo "Tests are skipped for want of packages; as root: apt-get install$$missing"

wheelhouse: ## Everything that setup installs, as wheels, for machines without internet: WHEELHOUSE=DIR
	@test -n '$(WHEELHOUSE)' || { echo 'error: say where: make wheelhouse WHEELHOUSE=DIR' >&2; exit 2; }
	$(PYTHON) -m pip wheel --quiet --wheel-dir $(WHEELHOUSE) -c constraints.txt '.[$(EXTRAS)]' 'setuptools>=77'
	cd $(WHEELHOUSE) && rm -f ldm_scale-*.whl && sha256sum *.whl > SHA256SUMS
	@du -sh $(WHEELHOUSE) && echo "On a machine with the same system and Python: make setup WHEELHOUSE=$(WHEELHOUSE)"

prebuild-ops: setup ## Build DeepSpeed's operators now, not at the first step: DS_OPS=DS_BUILD_CPU_ADAM=1 for others
	$(VENV)/bin/pip install --quiet 'setuptools>=77'
	$(DS_OPS) $(VENV)/bin/pip install --quiet --force-reinstall --no-deps --no-cache-dir --no-build-isolation \
		--no-binary deepspeed -c constraints.txt deepspeed

img2dataset: $(IMG2DATASET) ## img2dataset for data_tools.download, apart: it wants an older webdataset

$(IMG2DATASET):
	$(PYTHON) -m venv .local/img2dataset
	.local/img2dataset/bin/pip install --quiet 'img2dataset>=1.47,<2'

demo: toy ## The whole pipeline on a laptop: shards, first stage, latents, training, samples, scores, report
	@python precompute_latents.py +experiment=txt2img_laion scale=toy precompute.overwrite=true
	@python train.py +experiment=txt2img_laion scale=toy
	@python sample.py run_dir=runs/txt2img_laion/toy images_per_prompt=4 'prompts=[$(TOY_PROMPTS)]'
	@python -m ldm_scale.jobs.summary $(TOY_STAGE) runs/txt2img_laion/toy

demo-openmoji: setup ## The same pipeline on 4,495 emoji (about 15 minutes; CC BY-SA 4.0, fetched, not kept)
	@python -m data_tools.make_openmoji $(OPENMOJI)
	@python train.py +experiment=autoencoder_kl_f4 $(OPENMOJI_ARGS) total_images=32_000
	@python precompute_latents.py +experiment=txt2img_laion $(OPENMOJI_ARGS) $(OPENMOJI_TEXT) precompute.overwrite=true
	@python train.py +experiment=txt2img_laion $(OPENMOJI_ARGS) $(OPENMOJI_TEXT) total_images=64_000
	@python -m ldm_scale.jobs.summary runs/autoencoder_kl_f4/openmoji runs/txt2img_laion/openmoji

toy: setup ## Toy shards and a first stage trained on them: what SCALE=toy jobs start from
	@python -m data_tools.make_toy_world $(TOY) --backgrounds white
	@python train.py +experiment=autoencoder_kl_f4 scale=toy

FACTORS := 1 2 4 8 16 32

compression-sweep: setup ## One model at every compression, f = 1 to 32: SCALE=toy trains and compares them, full plans them
ifeq ($(SCALE),toy)
	@python -m data_tools.make_toy_world $(TOY) --backgrounds white
	@python train.py +sweep=compression_first_stages scale=toy $(ARGS)
	@python precompute_latents.py +sweep=compression scale=toy $(ARGS)
	@python train.py +sweep=compression scale=toy $(ARGS)
	@python -m ldm_scale.jobs.compression_tradeoff $(FACTORS:%=runs/compression_f%/toy) --steps 5 10 20 50
else
	@failed=0; for f in $(FACTORS); do \
		python -m ldm_scale.jobs.plan +experiment=compression_f$$f name=compression --gpus 1 $(ARGS) || failed=$$?; \
	done; exit $$failed
endif

test: setup system-packages $(IMG2DATASET) ## Every test
	pytest -n 2 --dist loadfile

test-fast: setup ## The inner loop: no slow tests, under 2 minutes
	pytest -n 2 --dist loadfile -m 'not slow'

test-faults: setup ## Long runs of kills, full disks and changing worlds
	pytest -m faults

lint: setup ## ruff, import-linter (the floors), codespell
	ruff check .
	ruff format --check .
	lint-imports --no-logo
	codespell

types: setup ## mypy
	mypy

bench: setup ## Every benchmark: ratios against a peer or a limit measured in the same run. One of them needs the demo's model
	@failed=0; for file in benchmarks/*.py; do echo $$file; python $$file || failed=$$?; done; exit $$failed

model-table: setup ## docs/models.md: every experiment's parameters and operations, beside the published ones
	@python -m ldm_scale.jobs.model_table docs/models.md

fetch-weights: setup ## Inception, VGG16, BERT's tokenizer, CLIP, kl-f8 and vq-f4 from their authors, for jobs offline: WEIGHTS=DIR
	@python -m ldm_scale.jobs.fetch_weights $(WEIGHTS)

ifeq ($(SCALE),toy)
precompute-latents: toy
endif
precompute-latents: setup ## Encode images once: EXPERIMENT= SCALE= ARGS='data.images=... data.latents=...'
	$(LAUNCH) precompute_latents.py $(JOB)

plan: setup ## What a training would take, and what would stop it: EXPERIMENT= SCALE= ARGS='--gpus 64 --price 2.5 data.latents=...'
	@python -m ldm_scale.jobs.plan $(JOB)

train: setup ## Train: EXPERIMENT= SCALE= ARGS=
	$(LAUNCH) train.py $(JOB)

status: setup ## How all runs stand, a line each
	@python -m ldm_scale.jobs.status runs

sample: setup ## Draw captions with a trained run: RUN= ARGS='"prompts=[a caption]"'
	python sample.py run_dir=$(RUN) $(ARGS)

evaluate: setup ## Score a trained run: RUN= ARGS=
	python evaluate.py run_dir=$(RUN) $(ARGS)

report: setup ## Write report.html again: RUN=; or several runs side by side, comparison.html: RUNS="a b"
	@python -m ldm_scale.jobs.report $(or $(RUNS),$(RUN)) $(ARGS)

dashboard: setup ## A W&B workspace with the panels of docs/dashboard.md, of what a run logs: RUN=
	@python -m ldm_scale.jobs.dashboard $(RUN) $(ARGS)

relay: setup ## On a machine with internet: follow a run without it into W&B, live or afterwards: RUN= ARGS=--once
	@python -m ldm_scale.jobs.relay $(RUN) $(ARGS)

clean: ## Remove what the demos, toy jobs and the toy sweep wrote; not .venv, nor other runs and data
	rm -rf $(TOY) $(OPENMOJI) runs/*/toy runs/*/openmoji multirun/compression*
