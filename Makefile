# make quickstart: from a bare Python to a diffusion language model that writes, in a few minutes on a CPU.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
JOBS ?= 2
RUN = $(VENV)/bin/python

# where it is set, each of the tests' many processes would compile all of torch's Python anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart lint test test-all clean

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-to-test: requirements-test.txt | $(VENV)/ready
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements-test.txt
	touch $@

corpora/docs_bpe/meta.json: | $(VENV)/ready
	$(RUN) data.py docs --tokenizer=bpe:4096 --name=docs_bpe

# QUICKSTART_FLAGS shortens it: make quickstart QUICKSTART_FLAGS=--steps=40
quickstart: $(VENV)/ready corpora/docs_bpe/meta.json
	$(RUN) train.py configurator/quickstart_ar.py --run_dir=$(RUNS)/quickstart_ar --resume=auto $(QUICKSTART_FLAGS)
	$(RUN) train.py configurator/quickstart.py --run_dir=$(RUNS)/quickstart --compare=$(RUNS)/quickstart_ar --resume=auto $(QUICKSTART_FLAGS)
	$(RUN) sample.py --run_dir=$(RUNS)/quickstart --batch=2
	$(RUN) sample.py --run_dir=$(RUNS)/quickstart --text="Return the [MASK:20] of the list."

lint: $(VENV)/ready-to-test
	$(RUN) -m ruff check .

test: $(VENV)/ready-to-test
	$(RUN) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" tests

test-all: $(VENV)/ready-to-test
	$(RUN) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder tests

clean:
	rm -rf $(VENV)
