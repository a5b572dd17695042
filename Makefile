# make demo   install, train on synthetic shapes, evaluate, write pictures
# make test   install, run the tests
# make setup  install only        make lint   style and types        make clean  remove .venv
#
# Override:  make setup PYTHON=python3.12
#            make setup PIP_ARGS="--extra-index-url <index of torch for your CUDA>"

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q $(PIP_ARGS)

.PHONY: demo test setup lint format clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/dsrcnn demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadscope \
	  --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.installed

clean:
	rm -rf $(VENV)

# Each stamp is written only after its step succeeded, so an interrupted run goes on where it was.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; write PYTHON=... (found: $$($(PYTHON) --version 2>&1))"; exit 1; }
	@echo "Creating $(VENV) and installing torch (about 5 GB, a few minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'pip>=23.2,<26.3' setuptools wheel
	$(PIP) torch torchvision
	@touch $@

$(VENV)/.detectron2: requirements-detectron2.txt | $(VENV)/.torch
	@if [ ! -e $@.partial ] && \
	  $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("detectron2") is None)'; \
	then echo "Detectron2 is there already."; \
	else echo "Installing Detectron2 0.6 as pure Python ..."; touch $@.partial; \
	  $(PIP) --force-reinstall --no-deps --require-hashes --use-pep517 --no-build-isolation \
	    -r requirements-detectron2.txt && \
	  rm $@.partial; fi
	@touch $@

$(VENV)/.installed: setup.py pyproject.toml | $(VENV)/.torch $(VENV)/.detectron2
	@echo "Installing dsrcnn and what it needs ..."
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps 'lvis>=0.5.3' # its list of needs has a second OpenCV, which would overwrite ours
	@echo "(pip may say that Detectron2 lacks black, future, hydra-core and pydot: nothing here uses them.)"
	@$(BIN)/python -W ignore -c 'import dsrcnn, cv2, faster_coco_eval' || \
	  { echo "The installation is damaged; run 'make clean' and try again."; exit 1; }
	@touch $@
