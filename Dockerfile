# All images of the project. Build one with
#   docker build --target inference --build-arg REVISION=$(git rev-parse HEAD) -t bit-inference .
# Targets: inference, mlflow, training (CUDA), training-cpu, training-xla.
#
# BASE: any Debian with python3 (3.11 or newer) and its venv module. TORCH: what pip installs as torch, options included.
# Wheels that a build should take before it asks an index come as a second context: --build-context wheels=FOLDER, and with
# --build-arg PIP_NO_INDEX=1 from nowhere else.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
ARG TORCH=torch==2.13.0

FROM scratch AS wheels

# What every image shares: a user without a name, no byte code to write, everything that must be writable below /tmp.
FROM ${BASE} AS base
ARG REVISION=unknown
ENV PATH=/opt/venv/bin:/app/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp BIT_GIT_COMMIT=${REVISION}
LABEL org.opencontainers.image.title="bit-mlops" \
      org.opencontainers.image.description="Big Transfer for many tenants: training and inference" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /app
USER 10001:10001

# The stages below install packages; only their /opt/venv goes into an image. pip, caches and the packages' own tests stay behind.
FROM ${BASE} AS packages
ARG PIP_NO_INDEX
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/wheels PIP_CONSTRAINT=/src/constraints.txt
COPY constraints.txt docker/install /src/

FROM packages AS inference-packages
COPY pyproject.toml /src/
RUN --mount=type=bind,from=wheels,target=/wheels /src/install services

FROM packages AS training-packages
ARG TORCH
COPY pyproject.toml /src/
RUN --mount=type=bind,from=wheels,target=/wheels /src/install training "${TORCH}"

FROM packages AS xla-packages
ENV PIP_CONSTRAINT=/src/constraints-xla.txt
COPY pyproject.toml constraints-xla.txt /src/
RUN --mount=type=bind,from=wheels,target=/wheels /src/install training "torch_xla[tpu]==2.9.0"

FROM packages AS mlflow-packages
RUN --mount=type=bind,from=wheels,target=/wheels /src/install - "mlflow[auth]" psycopg2-binary boto3 google-cloud-storage

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

FROM base AS inference
COPY --from=inference-packages /opt/venv /opt/venv
COPY --from=code /code/services /app
ENV BIT_SERVE_HOST=0.0.0.0 BIT_SERVE_PORT=8080 BIT_SERVE_CACHE_DIR=/tmp/cache
EXPOSE 8080
HEALTHCHECK --start-period=30s CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/v2/health/live')"]
CMD ["bit-serve"]

FROM base AS training-xla
COPY --from=xla-packages /opt/venv /opt/venv
COPY --from=code /code/training /app
ENV PJRT_DEVICE=TPU
CMD ["bit", "--help"]

FROM base AS training
COPY --from=training-packages /opt/venv /opt/venv
COPY --from=code /code/training /app
CMD ["bit", "--help"]

# The same stage under the name that says what TORCH was: a CPU build, --build-arg TORCH="torch==2.13.0 --index-url …".
FROM training AS training-cpu
