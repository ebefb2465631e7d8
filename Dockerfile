# All images of the project. Build one with
#   docker build --target inference --build-arg REVISION=$(git rev-parse HEAD) -t bit-inference .
# Targets: inference, mlflow, training (CUDA), training-cpu, training-xla.
#
# BASE: any Debian with python3 (3.11) and its venv module. Packages are locked with their hashes in docker/requirements (`make lock`).
# TORCH: what pip is told to install as torch; training-cpu demands --build-arg TORCH="torch==2.13.0 --index-url <your CPU index>".
# Wheels that a build should take before it asks an index come as a second context: --build-context wheels=FOLDER, and with
# --build-arg PIP_NO_INDEX=1 from nowhere else.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
ARG TORCH="--require-hashes --no-deps -r /src/requirements/torch.txt"
ARG TORCH_XLA="--require-hashes --no-deps -r /src/requirements/torch-xla.txt"

FROM scratch AS wheels

# Where TORCH was not named, refuses training-cpu before anything is downloaded: the locked torch is the CUDA build.
FROM ${BASE} AS named-torch
ARG TORCH
RUN case "${TORCH}" in *requirements/torch.txt*) \
        echo 'training-cpu: the locked torch is for CUDA; name a CPU build: --build-arg TORCH="torch==VERSION --index-url INDEX"' >&2; exit 1;; \
    esac

# What every image shares: a user without a name, everything that must be writable below /tmp, so that the root can be read-only.
FROM ${BASE} AS base
ENV PATH=/opt/venv/bin:/app/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
LABEL org.opencontainers.image.title="bit-mlops" \
      org.opencontainers.image.description="Big Transfer for many tenants: training and inference" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /app
USER 10001:10001

# The stages below install packages; only their /opt/venv goes into an image. pip, caches and the packages' own tests stay behind.
FROM ${BASE} AS packages
ARG PIP_NO_INDEX
# An argument ends with its stage, a variable is inherited.
ENV PIP_NO_INDEX=${PIP_NO_INDEX} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/wheels
COPY docker/install /src/
COPY docker/requirements/build.txt /src/requirements/

# Each takes its own lock files, so that a new one of another image leaves its packages in the cache.
FROM packages AS inference-packages
COPY docker/requirements/services.txt /src/requirements/
RUN --mount=type=bind,from=wheels,target=/wheels /src/install services

FROM packages AS training-packages
ARG TORCH
COPY docker/requirements/training.txt docker/requirements/torch.txt /src/requirements/
RUN --mount=type=bind,from=wheels,target=/wheels /src/install training "${TORCH}"

FROM packages AS xla-packages
ARG TORCH_XLA
COPY docker/requirements/training.txt docker/requirements/torch-xla.txt /src/requirements/
RUN --mount=type=bind,from=wheels,target=/wheels /src/install training "${TORCH_XLA}"

FROM packages AS mlflow-packages
COPY docker/requirements/mlflow.txt /src/requirements/
RUN --mount=type=bind,from=wheels,target=/wheels /src/install mlflow

# The project itself, unpacked into /app: the one layer that a change of the code makes anew.
FROM packages AS code
COPY pyproject.toml README.md LICENSE /src/
COPY services /src/services
COPY training /src/training
RUN --mount=type=bind,from=wheels,target=/wheels /src/install code

FROM base AS mlflow
COPY --from=mlflow-packages /opt/venv /opt/venv
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"

# Every program below ends by itself on SIGTERM as process 1 (tests/images), so that no init stands before it.
FROM base AS inference
COPY --from=inference-packages /opt/venv /opt/venv
COPY --from=code /code/services /app
ENV BIT_SERVE_HOST=0.0.0.0 BIT_SERVE_PORT=8080 BIT_SERVE_CACHE_DIR=/tmp/cache
EXPOSE 8080
HEALTHCHECK --start-period=30s CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"BIT_SERVE_PORT\"]}/v2/health/live')"]
CMD ["bit-serve"]
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"

FROM base AS training-xla
COPY --from=xla-packages /opt/venv /opt/venv
COPY --from=code /code/training /app
ENV PJRT_DEVICE=TPU
CMD ["bit", "--help"]
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"
ENV BIT_GIT_COMMIT=${REVISION}

FROM base AS training
COPY --from=training-packages /opt/venv /opt/venv
COPY --from=code /code/training /app
CMD ["bit", "--help"]
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"
ENV BIT_GIT_COMMIT=${REVISION}

# The same stage under the name that says what TORCH was.
FROM training AS training-cpu
RUN --mount=type=bind,from=named-torch,target=/mnt true
