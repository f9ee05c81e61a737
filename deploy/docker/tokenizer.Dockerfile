# tokenizerd: images to codes and back.
#   docker build -f deploy/docker/tokenizer.Dockerfile -t vqstack/tokenizerd:0.1.0 .
# Build arguments:
#   PYTHON_IMAGE  base of both stages; pin it by digest in production
#   TORCH_INDEX   package index with CPU builds of torch; empty takes the default index, whose Linux
#                 build brings the CUDA libraries along (works, but is several gigabytes larger)
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/vqstack
ENV PATH=/opt/vqstack/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
ARG TORCH_INDEX=""
# Without dependencies: they come from the default index below, at the pinned versions.
RUN grep '^torch==' constraints.txt > torch.txt \
    && pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --requirement torch.txt
COPY pyproject.toml README.md LICENSE CMakeLists.txt ./
COPY csrc csrc
COPY proto proto
COPY engine engine
COPY services services
RUN pip install -c constraints.txt ./proto . \
    && python -m vqkernels

FROM ${PYTHON_IMAGE} AS runtime
COPY --from=build /opt/vqstack /opt/vqstack
# The file system may be mounted read-only: everything that is written goes to /tmp and /cache.
ENV PATH=/opt/vqstack/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    VQSERVE_HOST=0.0.0.0 \
    VQSERVE_GRPC_PORT=50051 \
    VQSERVE_HTTP_PORT=8080
RUN install --directory --owner=10001 --group=10001 /cache
USER 10001:10001
WORKDIR /tmp
EXPOSE 50051 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['VQSERVE_HTTP_PORT'] + '/readyz', timeout=2)"]
ENTRYPOINT ["python", "-m", "vqserve.tokenizer"]
