# The verbs. `make serve` and `make test` set up everything they need; the second time they need nothing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3.11
PORT ?= 8080
GRPC ?= 7070
HOME_FOLDER := .headcount
# A folder with the weights, pictures and tables serves as their mirror, where it exists.
export HEADCOUNT_MIRROR ?= $(abspath $(wildcard ../shared/data))
# Python starts hundreds of times in the tests and once for each worker: it keeps its bytecode, in the environment.
unexport PYTHONDONTWRITEBYTECODE

UV := .tools/bin/uv
BIN := .venv/bin
WEIGHTS ?= yolov5n
# Holds the path of the checkpoint that serves: another one than WEIGHTS where that cannot be fetched.
CHECKPOINT := $(HOME_FOLDER)/weights/$(WEIGHTS).path
COMPILED := $(HOME_FOLDER)/compiled/$(WEIGHTS)
ARCHIVE := $(HOME_FOLDER)/archive/$(WEIGHTS)
SAMPLE = $$(ls $(HOME_FOLDER)/people/bus*.jpg 2>/dev/null | head -n 1)

# Four at a time, because most tests wait for other processes. Which run in one process: tests/conftest.py.
TESTS = $(BIN)/pytest -n 4 --dist loadscope --no-loadscope-reorder

.PHONY: help train pipeline pipeline-compile tensorboard tune plots serve test review prices picture check coverage lint samples install policy test-engine bench compile sandbox up deploy down live image scan drift-issue lock format clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

serve: $(if $(MODEL),.venv/.serve,$(ARCHIVE)/.made) ## count people in pictures at http://127.0.0.1:8080, or serve an exported model (MODEL=DIR, PORT=, GRPC=, WEIGHTS=yolov5s …)
	@exec $(BIN)/python -m serving.launcher --console --port $(PORT) --grpc 127.0.0.1:$(GRPC) \
	  $(if $(MODEL),--model "$(MODEL)",--archive $(ARCHIVE) --compiled $(COMPILED) --sample "$(SAMPLE)")

test: lint samples ## lint, types and every test (PYTEST=options)
	$(TESTS) $(PYTEST)

check: lint samples ## lint, types and the fast tests
	$(TESTS) -m "not slow" $(PYTEST)

lint: .venv/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy

samples: .venv/.dev $(CHECKPOINT) # without them the tests say which ones did not run
	@$(BIN)/python -m headcount.data bus.jpg zidane.jpg coco128 adult mnist > /dev/null || true

install: .venv/.dev ## the environment that `pulumi` and `headcount` run in; then: source .venv/bin/activate

coverage: lint samples ## the fast tests, and the lines that they do not reach
	$(TESTS) -m "not slow" --cov --cov-report=term-missing:skip-covered $(PYTEST)

test-engine: .venv/.dev .tools/policy/.made samples ## the tests that need Pulumi's command line and its plugins on the PATH
	HEADCOUNT_REQUIRE=engine,policy $(BIN)/pytest tests/test_vertex_engine.py tests/test_vertex_job_engine.py tests/test_engine_*.py $(PYTEST)

bench: samples compile ## ratios of throughput, latency, accuracy and cost in one table (BENCH=, see bench/README.md)
	$(BIN)/python -m bench --checkpoint "$$(cat $(CHECKPOINT))" --compiled $(COMPILED) --archive $(ARCHIVE) $(BENCH)

compile: .venv/.serve $(CHECKPOINT) ## compile the network for this machine now, as `make serve` does in the background
	@$(LOCAL_COMPILE)
	@$(MAKE_ARCHIVE)

train: .venv/.training ## train a model into runs/ (WORKLOAD=census|digits|search|gan, ARGS=options, RUN=folder)
	@test -n "$(WORKLOAD)" || { echo "say WORKLOAD=census, digits, search or gan"; exit 2; }
	@exec $(BIN)/python -m training.$(WORKLOAD) --job-dir $(or $(RUN),runs/$(WORKLOAD)) $(ARGS)

pipeline: .venv/.training ## run the census pipeline on this machine into runs/pipelines (ARGS="--param train_steps=500", RUN=folder)
	@exec $(BIN)/python -m training.pipelines run --root $(or $(RUN),runs/pipelines) $(ARGS)

pipeline-compile: .venv/.training ## write the template of the census pipeline, runs/pipelines/census.yaml (ARGS=options)
	@exec $(BIN)/python -m training.pipelines compile $(ARGS)

tensorboard: .venv/.training ## curves of all runs below runs/ at http://127.0.0.1:6006 (RUN=folder)
	@exec $(BIN)/tensorboard --logdir $(or $(RUN),runs) --host 127.0.0.1

tune: .venv/.training ## tune digits on this machine as training/digits_tuning.yaml says (ARGS=options, RUN=folder)
	@exec $(BIN)/python -m training.tune --spec training/digits_tuning.yaml --job-dir $(or $(RUN),runs/tuning) $(ARGS)

review: .venv/.dev ## what `pulumi up` would change, cost and risk, for a pull request (STACK=dev, ARGS=options)
	@$(BIN)/headcount review $(or $(STACK),dev) $(ARGS) || test $$? -ne 1 # 2 and 3 say that there is a change

prices: .venv/.dev ## fill the price table from Google's Cloud Billing catalogue, with your credentials (REGION=: add one)
	@$(BIN)/python -m review.catalogue $(if $(REGION),--region $(REGION))

plots: .venv/.training ## draw learning curves, a tuning and the search's comparison into runs/plots: an hour the first time (RUN=folder)
	$(BIN)/python -m training.experiments census --job-dir $(or $(RUN),runs/plots)/census
	$(BIN)/python -m training.experiments digits --job-dir $(or $(RUN),runs/plots)/digits --seeds 1
	$(BIN)/python -m training.experiments search --job-dir $(or $(RUN),runs/plots)/search -- --trials 30 --trial-steps 60 --holdout 2000 --train-steps 60
	$(BIN)/python -m training.tune --spec training/digits_tuning.yaml --job-dir $(or $(RUN),runs/plots)/tuning -- --train-steps 300 --holdout 5000

sandbox: .venv/.dev ## Google Cloud on this machine, 127.0.0.1:8790 (FRESH=1: from empty)
	@exec $(BIN)/python -m sandbox --state $(HOME_FOLDER)/sandbox $(if $(FRESH),--fresh)

up: .venv/.dev samples ## the whole program on this machine, from nothing to a count (PICTURE=)
	@picture="$(or $(PICTURE),$(SAMPLE))"; $(BIN)/python -m laptop up $${picture:+"$$picture"}

deploy: .venv/.dev samples ## the whole program on this machine with a model that a job trains (WORKLOAD=census|digits, ARGS=options)
	@$(BIN)/python -m laptop deploy "$(WORKLOAD)" $(ARGS)

down: .venv/.dev ## destroy it again
	@$(BIN)/python -m laptop down

image: $(CHECKPOINT) ## build the serving image (TARGET=training: the training image; IMAGE=, DOCKER=, BASE=, TORCH=cpu|index, BUILD_ARGS=)
	@torch="$(TORCH)"; test -n "$$torch" || torch=$$($(BIN)/python -m infra.torch_source); \
	DOCKER_BUILDKIT=1 $(or $(DOCKER),docker) build --platform linux/amd64 --build-arg TORCH="$$torch" \
	  $(if $(BASE),--build-arg BASE=$(BASE)) $${PIP_INDEX_URL:+--build-arg INDEX="$$PIP_INDEX_URL"} \
	  --build-arg WEIGHTS="$$(basename "$$(cat $(CHECKPOINT))" .pt)" -t $(or $(IMAGE),headcount) $(if $(TARGET),--target $(TARGET)) $(BUILD_ARGS) .

scan: ## look for known vulnerabilities in an image (IMAGE=headcount; needs trivy on the PATH)
	@command -v trivy > /dev/null || { echo "trivy is missing: https://trivy.dev/latest/getting-started/installation/"; exit 1; }
	trivy image --scanners vuln --severity HIGH,CRITICAL --ignore-unfixed --exit-code 1 $(or $(IMAGE),headcount)

drift-issue: .venv/.dev ## open, update or close the GitHub issue about a stack's drift (STACK=; needs gh)
	@PATH="$(abspath $(BIN)):$$PATH" .github/drift-issue $(or $(STACK),dev)

$(UV): requirements/tools.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "Python 3.11 is needed; '$(PYTHON)' is not one. Install it, or: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .tools && .tools/bin/pip install -q --require-hashes -r requirements/tools.txt && touch $@

# uv links packages from its cache, so that the gigabytes of torch are on the disk once. It does not read pip's
# configuration, where a machine may name a package index of its own.
INSTALL = index=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$(.tools/bin/pip config get global.index-url 2>/dev/null || true)}}; \
	test -z "$$index" || export UV_DEFAULT_INDEX="$$index"; UV_SYSTEM_CERTS=1 $(UV) pip install --python $(or $(1),$(BIN)/python)
.venv/.serve: $(UV) requirements/serve.txt requirements/torch.txt requirements/client.txt pyproject.toml
	@test -x $(BIN)/python || $(UV) venv -q --python $$(.tools/bin/python -c 'import sys; print(sys._base_executable)') .venv
	@$(call INSTALL) --require-hashes -r requirements/serve.txt -r requirements/torch.txt -r requirements/client.txt
	@TMPDIR=$(CURDIR)/.tools $(UV) pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e . && touch $@ # it leaves a lock

.venv/.training: .venv/.serve requirements/training.txt
	@$(call INSTALL) --no-deps --require-hashes -r requirements/training.txt # the file is complete; torch is installed
	@touch $@

.venv/.dev: .venv/.serve requirements/dev.txt
	@$(call INSTALL) --require-hashes -r requirements/dev.txt
	@touch .venv/.training $@ # it has training's packages, too

policy: .tools/policy/.made ## the environment of the policies, then: pulumi preview -s dev --policy-pack infra/policy

.tools/policy/.made: $(UV) requirements/policy.txt pyproject.toml
	@test -x $(@D)/bin/python || $(UV) venv -q --python $$(.tools/bin/python -c 'import sys; print(sys._base_executable)') $(@D)
	@$(call INSTALL,$(@D)/bin/python) --require-hashes -r requirements/policy.txt
	@TMPDIR=$(CURDIR)/.tools $(UV) pip install -q --python $(@D)/bin/python --no-deps --no-build-isolation -e . && touch $@

$(CHECKPOINT): | .venv/.serve
	@mkdir -p $(@D)
	@$(BIN)/python -m headcount.data $(WEIGHTS).pt > $@

LOCAL_COMPILE = $(BIN)/python -m serving.local_compile --checkpoint "$$(cat $(CHECKPOINT))" --out $(COMPILED)
MAKE_ARCHIVE = compiled=$$($(LOCAL_COMPILE) --show) && $(BIN)/python -m serving.archive \
	--checkpoint "$$(cat $(CHECKPOINT))" --out $(ARCHIVE) $${compiled:+--compiled "$$compiled"} && touch $(ARCHIVE)/.made
$(ARCHIVE)/.made: .venv/.serve $(CHECKPOINT) $(addprefix serving/,handler.py compile.py detector.py network.py) \
		$(wildcard $(COMPILED)/key)
	@$(BIN)/python -m headcount.data bus.jpg > /dev/null || true # for the line that `make serve` prints
	@$(MAKE_ARCHIVE)

# All extras are resolved together, and each other file is constrained to that result. The files hold hashes and no
# address of a package index.
COMPILE = $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate
lock: $(UV) ## write requirements/ after a change of pyproject.toml (UPGRADE=--upgrade: newest allowed versions)
	$(COMPILE) $(UPGRADE) pyproject.toml --all-extras -o requirements/dev.txt
	for part in serve client; do $(COMPILE) pyproject.toml --extra $$part -c requirements/dev.txt -o requirements/$$part.txt; done
	echo 'torch; python_version < "3"' | $(COMPILE) pyproject.toml --extra training -c requirements/dev.txt --override - -o requirements/training.txt
	grep -o '"torch==[^"]*' pyproject.toml | tr -d \" | $(COMPILE) - -c requirements/dev.txt -o requirements/torch.txt
	$(COMPILE) $(UPGRADE) --group policy -o requirements/policy.txt
	echo 'uv' | $(COMPILE) $(UPGRADE) - -o requirements/tools.txt

live: .venv/.dev ## prove pulumi_vertex on Google itself (PROJECT=, REGION=, IMAGE=, LIVE=options): costs money for hours
	@$(BIN)/python -m tests.live_vertex $(PROJECT) $(LIVE)

picture: .venv/.dev ## take the README's picture of the page again, of what `make serve` serves (PORT=; needs Chromium)
	@PYTHONPATH=tests:. $(BIN)/python docs/pictures/page.py http://127.0.0.1:$(PORT)

format: .venv/.dev ## let ruff format and sort
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean: ## remove environments and everything fetched or built here
	rm -rf .venv .tools $(HOME_FOLDER) build *.egg-info
