# The oldest that is there of those that the suite passes with; python3 may be another one.
PYTHON ?= $(firstword $(foreach minor,11 12 13,$(shell command -v python3.$(minor) 2>/dev/null)) python3.11)
VENV := .venv
BIN := $(VENV)/bin
# All that accelerate would else remark on; --quiet leaves an error at the one line that says it.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

# A process for each core, with one thread each: threads that wait for each other cost more than they bring.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

.PHONY: train test test-newest test-slow test-app style check phantom-base space

train: $(VENV)/installed  ## adapt the phantom base to another site; ARGS="..." passes flags
	$(LAUNCH) train.py $(ARGS)

test: $(VENV)/installed  ## everything but what takes minutes
	$(PYTEST) $(ARGS)

test-newest:  ## the same with the newest of everything that pyproject.toml allows, in a venv of its own
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade -e '.[test]'
	.venv-newest/bin/python -m pip freeze --exclude-editable > .venv-newest/versions.txt
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest --numprocesses auto --maxprocesses 8 $(ARGS)

test-slow: $(VENV)/installed  ## what takes minutes or gigabytes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-app: $(VENV)/installed  ## the app in a real browser (Debian: chromium)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow or not slow' tests/app $(ARGS)

style: $(VENV)/installed-dev  ## format, fix what can be fixed, and renew the code in phantom_base/
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cp *_medct.py phantom_base/

check: $(VENV)/installed-dev  ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/named && ln -sfn "$(CURDIR)" $(VENV)/named/medct  # mypy names a package after its folder
	$(BIN)/mypy

phantom-base: $(VENV)/installed  ## train phantom_base/ anew, about half an hour
	$(BIN)/python -m medct.training.phantom_base phantom_base.new
	rm -rf phantom_base && mv phantom_base.new phantom_base

space:  ## the last commit as a Space in dist/space: hf upload ORG/NAME dist/space . --repo-type space
	rm -rf dist/space dist/unfinished && mkdir -p dist/unfinished
	git archive HEAD space | tar -x -C dist/unfinished
	git archive --prefix=medct/ HEAD . ':!tests' ':!docs' ':!benchmarks' ':!space' | tar -x -C dist/unfinished/space
	mv dist/unfinished/space dist/space && rmdir dist/unfinished

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
