# make demo   install, train on synthetic shapes, evaluate, write pictures
# make test   install, run the tests
# make test-slow  the tests that `make test` leaves out: notebooks, restarts, exports
# make setup  install only        make lint   style and types        make clean  remove .venv
# make docs   install, build the documentation site in output/site/
#
# Override:  make setup PYTHON=python3.12
#            make setup PIP_ARGS="--extra-index-url <index of torch for your CUDA>"

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q $(PIP_ARGS)

.PHONY: demo test test-slow setup lint format docs clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/dsrcnn demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --no-loadscope-reorder

test: setup
	$(PYTEST) --dist loadscope

test-slow: setup
	$(PYTEST) --dist load -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

setup: $(VENV)/.installed

clean:
	rm -rf $(VENV)

# A stamp is written after its step succeeded, so an interrupted setup continues where it stopped.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "This needs Python 3.10 or newer, not $$($(PYTHON) --version 2>&1); write PYTHON=..."; exit 1; }
	@echo "Creating $(VENV) and installing torch (about 5 GB, a few minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'pip>=23.2,<26.3' setuptools wheel
	$(PIP) torch torchvision
	@touch $@

$(VENV)/.detectron2: requirements-detectron2.txt | $(VENV)/.torch
	@if [ ! -e $@.partial ] && \
	  $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("detectron2") is None)'; \
	then echo "Detectron2 is installed already."; \
	else echo "Installing Detectron2 0.6 as pure Python ..."; touch $@.partial; \
	  $(PIP) --force-reinstall --no-deps --require-hashes --use-pep517 --no-build-isolation \
	    -r requirements-detectron2.txt && \
	  rm $@.partial; fi
	@touch $@

$(VENV)/.installed: setup.py pyproject.toml | $(VENV)/.torch $(VENV)/.detectron2
	@echo "Installing dsrcnn and its dependencies ..."
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps 'lvis>=0.5.3' # it depends on a second OpenCV, which would overwrite ours
	@echo "(pip may report that Detectron2 needs black, future, hydra-core and pydot; they are not used.)"
	@$(BIN)/python -W ignore -c 'import dsrcnn.engine.main, cv2, faster_coco_eval' && \
	  $(BIN)/dsrcnn --version || \
	  { echo "The installation is damaged; run 'make clean' and try again."; exit 1; }
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	@touch $@
