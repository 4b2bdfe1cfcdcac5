# One virtual environment serves everything; it is made once and kept.
# PYTHON names an interpreter (python3.12, or a path); without it the environment that is there is used, and where
# there is none the newest Python from 3.13 down to 3.11. Another PYTHON makes the environment anew.
BIN := .venv/bin
PYTHON ?=
# an environment that runs and can install is kept; a dead or half-made one is made anew
WHOLE := $(shell $(BIN)/python -m pip --version >/dev/null 2>&1 && echo $(BIN)/python)
FOUND := $(if $(PYTHON)$(if $(WHOLE),,none),$(shell tools/python.sh "$(PYTHON)"),$(WHOLE))
VERSION := $(if $(FOUND),$(shell "$(FOUND)" -c 'import platform; print(platform.python_version())'))
READY := .venv/.ready-$(VERSION)
export PATH := $(CURDIR)/$(BIN):$(PATH)
# compiled modules are kept, whatever the shell says: a process that compiles torch and transformers again starts 10 s later
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo test check notebooks pytest test-matrix bench docs lock readme clean

install: $(READY)
	@echo "vadnb: Python $(VERSION) in .venv"

# fastcore 2 beside fastcore 1: the package must import with both, the tools of nbdev need 1
$(READY): settings.ini setup.py locks/dev.txt locks/fastcore2.txt
	@test -n "$(VERSION)"
	@echo "vadnb: installing with $(FOUND) (Python $(VERSION))"
	@if [ -z "$(WHOLE)" ] || [ "$$($(BIN)/python -c 'import platform; print(platform.python_version())')" != "$(VERSION)" ]; \
	    then "$(FOUND)" -m venv --clear .venv; fi
	$(BIN)/python -m pip install -q "uv>=0.5"
	$(BIN)/uv pip install -q --python $(BIN)/python -r locks/dev.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	$(BIN)/uv pip install -q --python $(BIN)/python --target .venv/fastcore2 --no-deps -r locks/fastcore2.txt
	touch $(READY)

demo: install
	$(BIN)/vadnb demo

# notebooks clean, package in step with the notebooks, README and locks in step; then the notebooks, then pytest
test: install check notebooks pytest

check: install
	$(BIN)/python tools/check.py

notebooks: check
	OMP_NUM_THREADS=1 timeout 1500 $(BIN)/nbdev_test --timing

pytest: notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

# every interpreter found with the newest of everything, and the oldest with the oldest that is allowed; prints one table
test-matrix: install
	$(BIN)/python tools/matrix.py

bench: install
	$(BIN)/python -m bench

# a static site from the notebooks as they are stored, in build/site/html; dead links and foreign requests stop it
docs: install
	$(BIN)/python tools/docs.py

lock: install
	$(BIN)/python tools/lock.py

readme: install
	$(BIN)/python tools/readme.py

clean:
	rm -rf .venv .venvs build *.egg-info
