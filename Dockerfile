# docker build -t prefixserve .
# On a GPU machine the same image runs with `docker run --gpus all`: torch's own wheel brings CUDA.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
# gcc builds the CPU kernels; it stays in this stage.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && python -m venv /opt/venv
COPY requirements.lock requirements-no-deps.lock ./
RUN /opt/venv/bin/pip install --no-cache-dir -r requirements.lock \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps -r requirements-no-deps.lock
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY prefix_store prefix_store
COPY clients clients
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 10001 prefixserve && install -d -o prefixserve /data
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PREFIXSERVE_DATA_DIR=/data PREFIXSERVE_HOST=0.0.0.0
USER prefixserve
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=120s CMD ["prefixserve", "status", "--json"]
ENTRYPOINT ["prefixserve"]
CMD ["serve"]
