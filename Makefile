# make demo, make test: what they need goes into .venv when it is first needed (test-aot's into
# .venv-aot).
.PHONY: help demo test test-gpu test-aot ptx sanitize lint clean
.DEFAULT_GOAL := help

bin := .venv/bin
comma := ,

# On a machine with an NVIDIA GPU, the CUDA extra that its driver can run.
driver := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null \
	| grep -oE -m 1 '^[0-9]+')
cuda := $(if $(driver),$(shell [ $(driver) -ge 580 ] && echo cuda13 || echo cuda12))

# .venv holds the extras that a stamp is named after, as pyproject.toml now lists them.
for_dev := .venv/installed-dev-examples$(cuda:%=-%)
for_demo := $(or $(wildcard $(for_dev)),.venv/installed-examples$(cuda:%=-%))

help:
	@echo 'make demo      restore a checkpoint, chat with a 4-bit KV cache, measure its perplexity'
	@echo 'make test      the tests that need no GPU'
	@echo 'make test-gpu  the tests that need an NVIDIA GPU'
	@echo 'make test-aot  compile what runs on GPUs without one and check the result (1.5 GB)'
	@echo 'make ptx       compile jaxgds/engines/zstd.cu to what is shipped beside it'
	@echo 'make sanitize  the Hopper kernels under compute-sanitizer: bad accesses and races'
	@echo 'make lint      ruff and pyright'
	@echo 'make clean     remove .venv, the downloads and the caches'

demo: $(for_demo)
	@$(bin)/python -m examples.demo

test: $(for_dev)
	$(bin)/python -m pytest -m "not gpu and not aot"

test-gpu: $(for_dev)
	$(bin)/python -m pytest -m gpu

test-aot: .venv-aot/installed-aot
	.venv-aot/bin/python -m pytest -m aot tests/pallas_kernels/mosaic tests/jaxgds/test_*_aot.py

ptx: .venv-aot/installed-aot
	.venv-aot/bin/python tests/jaxgds/zstd_ptx.py

sanitize: $(for_dev)
	set -e; for case in $$($(bin)/python tests/sanitize.py --list); do \
		for tool in "memcheck --report-api-errors no" racecheck; do \
			compute-sanitizer --tool $$tool --error-exitcode 1 --show-backtrace no \
				$(bin)/python tests/sanitize.py $$case; \
		done; \
	done

lint: $(for_dev)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/pyright

clean:
	rm -rf .venv .venv-aot .demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment that works is kept; otherwise it is made by the first Python >= 3.12 that
# runs. (A pyenv shim exists for versions that the current folder does not select: they do not run.)
recent = -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
pythons = "$(PYTHON)" python3.12 python3.13 python3.14 python3 \
	"$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3

define install
	@set -e; \
	if ! { $(@D)/bin/python $(recent) && $(@D)/bin/python -m pip --version >/dev/null 2>&1; }; then \
		python=; \
		for candidate in $(pythons); do \
			if [ -n "$$candidate" ] && "$$candidate" $(recent); then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo 'No Python >= 3.12 was found. Install one, for example with'; \
			echo '    pyenv install 3.12'; \
			echo '    apt install python3 python3-venv     (Debian 13, Ubuntu 24.04 or newer)'; \
			echo 'or name it: make PYTHON=/path/to/python3 $(MAKECMDGOALS)'; \
			exit 1; \
		fi >&2; \
		if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
			echo "$$python cannot make virtual environments: its venv package is missing. Run"; \
			echo '    apt install python3-venv'; \
			exit 1; \
		fi >&2; \
		echo "Making $(@D) with $$($$python --version) ($$python)"; \
		"$$python" -m venv --clear $(@D); \
	fi; \
	echo 'Installing into $(@D): $(subst -, and ,$*)'; \
	$(@D)/bin/python -m pip install --disable-pip-version-check \
		--editable '.[$(subst -,$(comma),$*)]'; \
	touch $@
endef

.venv/installed-%: pyproject.toml
	$(install)

.venv-aot/installed-%: pyproject.toml
	$(install)
