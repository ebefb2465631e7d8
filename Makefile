# Every target creates or updates .venv by itself, and again when pyproject.toml or constraints.txt changed.
PYTHON ?= python3
PORT ?= 8080
MLFLOW_PORT ?= 5000
# The CPU build of torch is enough for the demo; for a GPU: make setup TORCH="torch==2.13.0 --index-url <your CUDA index>"
TORCH ?= torch==2.13.0
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Bytecode is made when a module is first used: compiling all of every package takes as long as downloading them.
export PIP_NO_COMPILE := 1

.PHONY: setup demo serve test test-load bench-autoscaling test-autoscaling test-cluster test-fleet lint bench bench-serving bench-swaps bench-transfer clean test-images test-node test-charts test-engine test-xla lock

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	pip install --quiet $(TORCH)
	pip install --quiet -c constraints.txt -e '.[training,services]'
	touch $@

.venv/.stamp-dev: .venv/.stamp
	pip install --quiet -c constraints.txt -e '.[training,services,dev]'
	touch $@

demo: setup
	bit demo run

serve: setup
	bit serve --port $(PORT) --mlflow-port $(MLFLOW_PORT)

lint: .venv/.stamp-dev
	ruff check .
	ruff format --check .
	mypy
	lint-imports

# Hundreds of tests over real processes, browsers and clocks: one that fails is tried twice more and named in the summary (RERUN).
test: lint
	pytest --reruns 2

# The service under load: needs both cores for itself.
test-load: .venv/.stamp-dev
	pytest -m heavy tests/services

# The service beside other servers, each in an environment of its own (25 minutes; needs the machine for itself).
bench-serving: .venv/.stamp-dev .peers/litserve/.stamp .peers/mlserver/.stamp
	python -m benchmarks.serving --peers

.peers/%/.stamp: benchmarks/peers/%.txt
	$(PYTHON) -m venv .peers/$*
	.peers/$*/bin/pip install --quiet -r $<
	touch $@

# A thousand swaps under load (5 minutes).
bench-swaps: .venv/.stamp-dev
	python -m benchmarks.swaps

# Builds inference and training-cpu and starts them: as root, with buildah, debootstrap and runc.
test-images: .venv/.stamp-dev
	pytest -m heavy tests/images

# The chart on a real node, from the project's own image: as test-images, and the kit that tests/clusters.py names, containerd, CNI plugins and nftables.
test-node: .venv/.stamp-dev
	pytest -m heavy tests/operations

# The charts as processes: an upgrade under load; charts/mlflow over SQLite and a folder, over Postgres (Debian's, as root) and S3 (moto).
test-charts: .venv/.stamp-dev
	pytest -m heavy tests/charts

# Locks the packages of the images anew.
lock:
	docker/lock

# Jobs on a real control plane, pods' own commands as processes, and once in real pods; needs the kit that tests/clusters.py names.
test-cluster: .venv/.stamp-dev
	pytest -m heavy tests/cluster --ignore tests/cluster/test_fleet.py

# Two hundred tenants' jobs at once (3 minutes of both cores).
test-fleet: .venv/.stamp-dev
	pytest -m heavy tests/cluster/test_fleet.py

# Real Prometheus, KEDA and HPA act on the load of a real service: needs the kit that tests/clusters.py names, Debian's prometheus and both cores.
test-autoscaling: .venv/.stamp-dev
	pytest -m heavy tests/autoscaling

# Kills, lost ranks, other worlds, an MLflow that goes away (4 minutes on 2 quiet cores).
test-engine: .venv/.stamp-dev
	pytest -m heavy tests/training/engine

# The training loop on torch_xla's device for processors, in an environment of its own (its torch is another; 4 GB).
test-xla: .peers/xla/.stamp
	PJRT_DEVICE=CPU .peers/xla/bin/python -m pytest --noconftest -p no:cacheprovider tests/xla

.peers/xla/.stamp: constraints.txt
	$(PYTHON) -m venv .peers/xla
	grep -v '^torch' constraints.txt > .peers/xla/constraints.txt
	.peers/xla/bin/pip install --quiet -c .peers/xla/constraints.txt torch==2.9.0 torch_xla==2.9.0 fsspec numpy opencv-python-headless \
		prometheus-client pyarrow pydantic pytest pyyaml rich simplejpeg httpx
	touch $@

bench: setup
	python -m benchmarks.training_step

# Few-shot transfer on the demo's data from three sizes of upstream: under 15 minutes on 2 cores, resumable.
bench-transfer: setup
	test -d data/upstream || bit demo data
	test -f runs/pack/upstream/receipt.json || bit pack
	bit benchmark --suite demo

bench-autoscaling: .venv/.stamp-dev
	python -m benchmarks.autoscaling

clean:
	rm -rf runs .mlflow .checkpoints .outbox .fetched .serve data/upstream tenants/*/pictures dvc.lock tenants/*/dvc.lock \
		.dvc/cache/runs  # else DVC would restore receipts of versions that the new MLflow has never seen
