# One virtual environment serves everything; it is made once and kept.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: install demo test bench readme clean

install: $(READY)

# fastcore 2 beside fastcore 1: the package must import with both, the tools of nbdev need 1
$(READY): settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "uv>=0.5"
	$(BIN)/uv pip install -q --python $(BIN)/python -e '.[dev]'
	$(BIN)/uv pip install -q --python $(BIN)/python --target .venv/fastcore2 --no-deps "fastcore>=2"
	touch $(READY)

demo: $(READY)
	$(BIN)/vadnb demo

# notebooks clean, package in step with the notebooks, README in step with the index, then the notebooks, then pytest
test: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/check.py
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 timeout 1500 $(BIN)/nbdev_test --timing
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

bench: $(READY)
	$(BIN)/python -m bench

readme: $(READY)
	$(BIN)/python tools/readme.py

clean:
	rm -rf .venv build *.egg-info
