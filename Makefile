# Two commands do everything: `make run` and `make test`. Both set up what they need, once.
PYTHON ?= python3
# what `pip install` is given for PyTorch; the small one without CUDA is
#   TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch torchvision
# a file of exact versions, say .github/constraints.txt, with which the tests pass; none: the newest.
# With it, PyTorch's own index must stand beside the usual one, since it lacks most versions:
#   TORCH="torch torchvision --extra-index-url https://download.pytorch.org/whl/cpu"
CONSTRAINTS ?=
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/pip install --disable-pip-version-check -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS),)
# small tensors, and worker threads of our own: one arithmetic thread each; where there are more,
# one that waits leaves the core to others
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
# some two hundred processes import the package and the tests: Python compiles them once
unexport PYTHONDONTWRITEBYTECODE
# two notebooks at a time on two cores: a worker each
ONE_WORKER := FEWSHOTMETA_WORKERS=1
# cells and tests on real data run where there is any
FLAGS := $(if $(FEWSHOTMETA_DATA),--flags data,)

PORT ?= 8000

.PHONY: run test test-site lab clean readme docs docs-serve reliability fuzz mutants bench
.PHONY: clean-check export-check readme-check notebooks pytest
.DEFAULT_GOAL := run

run: $(READY)
	$(BIN)/fewshotmeta run nbs/experiments/train.ipynb --name glyphs/first_run -p \
	  inner_lr=0.1 meta_lr=0.003 schedule=cosine meta_batch=4 iterations=600 \
	  valid_every=200 valid_tasks=100 test_tasks=200 scale=short

# the notebooks beside the tests, which wait now and then
test: clean-check export-check readme-check
	$(MAKE) --no-print-directory -j2 notebooks pytest

# the site, built from clean and read in a browser
test-site: $(READY)
	$(ONE_THREAD) $(BIN)/pytest tests/test_site.py

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir nbs

readme: $(READY)
	$(BIN)/python tests/readme.py --write

# the site, in _docs/: what changed since the last time
docs: $(READY)
	$(ONE_THREAD) $(BIN)/python nbs/_site

# the same at http://localhost:8000, and again whenever a notebook is saved
docs-serve: $(READY)
	$(ONE_THREAD) $(BIN)/python nbs/_site --serve --port $(PORT)

# every reliability test at full length (half an hour), and the table on the page Workers
reliability: $(READY)
	$(ONE_THREAD) $(BIN)/python tests/reliability.py

# 20,000 altered inputs for whatever is read from outside; `make test` tries some hundred
fuzz: $(READY)
	FEWSHOTMETA_FUZZ=20000 $(ONE_THREAD) $(BIN)/pytest -n 2 tests/test_fuzz*.py

# a small fault at a time in the rooms that must not lose a result: which ones does no test find?
# (Two hours. A run that is broken off goes on where it was.)
mutants: $(READY)
	$(ONE_THREAD) $(BIN)/python tests/mutants.py --workers 2 --write runs/reliability/mutants.json

# every case and candidate of the bench (forty minutes on a machine that does nothing else)
bench: $(VENV)/.peers
	$(BIN)/fewshotmeta bench --rounds 5

# learn2learn and higher; the C files of learn2learn's package do not build from Python 3.11 on and
# are made anew
L2L := learn2learn-0.2.0
$(VENV)/.peers: $(READY)
	$(PIP) higher==0.2.1 'cython<3.1' 'setuptools<80' wheel scipy gym requests 'numpy>=2'
	$(PIP) --no-deps --no-build-isolation qpth==0.0.16
	$(BIN)/pip download -q --no-deps --no-binary :all: --no-build-isolation -d $(VENV)/peers \
	  $(subst -,==,$(L2L))
	tar xf $(VENV)/peers/$(L2L).tar.gz -C $(VENV)/peers
	$(BIN)/cython -3 $(VENV)/peers/$(L2L)/learn2learn/data/*.pyx
	$(PIP) --no-deps --no-build-isolation $(VENV)/peers/$(L2L)
	touch $@

clean:
	rm -rf $(VENV) build dist _docs _proc .pytest_cache *.egg-info
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

clean-check: $(READY)
	$(BIN)/python tests/unchanged.py $(BIN)/nbdev_clean

export-check: $(READY)
	$(BIN)/python tests/unchanged.py $(BIN)/nbdev_export

readme-check: $(READY)
	$(BIN)/python tests/readme.py

notebooks: $(READY)
	$(ONE_THREAD) $(ONE_WORKER) $(BIN)/nbdev_test --n_workers 2 --timing $(FLAGS)

pytest: $(READY)
	$(ONE_THREAD) $(BIN)/pytest -n 4 --dist loadgroup --ignore tests/test_site.py

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fewshotmeta needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e '.[dev,docs]'
	touch $@
