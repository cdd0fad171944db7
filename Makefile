# Every target makes the environment it needs; PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OPENCLIP := .venv-openclip
PICKSCORE := pickscore:model=tiny-clip

.DEFAULT_GOAL := help
.PHONY: help env demo test test-openclip lint clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(STAMP)  ## Create .venv with everything that tests and the demo need

demo: $(STAMP)  ## Align the embedded model on shapes and judge it: minutes on two CPU cores, nothing to download
	$(BIN)/python -m diffalign train configs/shapes_demo.yaml --resume auto
	$(BIN)/python -m diffalign eval --models base=tiny-sd3 grpo=runs/shapes_demo fk=tiny-sd3+fk:particles=4 \
	    grpo_fk=runs/shapes_demo+fk:particles=4 --prompts shapes-test --first 60 --images 2 --steer-by $(PICKSCORE) \
	    --rewards geneval $(PICKSCORE) vlm_echo:model=tiny-vlm --features dino:model=tiny-dino --dtype bf16 --out runs/shapes_demo_eval

test: $(STAMP)  ## Run the tests
	$(BIN)/python -m pytest

# An environment of its own: torchvision, which open_clip needs, breaks transformers beside a torch it was not built for.
test-openclip: $(OPENCLIP)/.installed  ## Compare the openclip reward and the readers of its format with open_clip itself
	$(OPENCLIP)/bin/python -m pytest tests/openclip

# mypy takes the bare diffalign/ for the whole package, so it is shown a tree that looks like the installed one.
lint: $(STAMP)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(VENV)/tree && mkdir -p $(VENV)/tree/diffalign
	ln -s $(CURDIR)/diffalign/* $(CURDIR)/rewards $(CURDIR)/pipelines $(CURDIR)/eval $(CURDIR)/configs $(VENV)/tree/diffalign/
	cd $(VENV)/tree && ../bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p diffalign

clean:  ## Remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) $(OPENCLIP) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is named so that pip never trades it for another build; CONTRIBUTING.md says why the install is strict.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0 -e '.[dev]' --config-settings editable_mode=strict
	touch $@

# constraints.txt has the torchvision for this torch. The tests import the tree, so the install need not be strict.
$(OPENCLIP)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OPENCLIP)
	$(OPENCLIP)/bin/python -m pip install -c constraints.txt torch==2.13.0 pytest -e '.[openclip]'
	touch $@
