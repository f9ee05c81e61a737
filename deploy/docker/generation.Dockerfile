# llmd: text generation with a quantized language model.
#   docker build -f deploy/docker/generation.Dockerfile --target runtime -t vqstack/llmd:0.1.0 .
#   docker build -f deploy/docker/generation.Dockerfile -t vqstack/llmd-smollm2:0.1.0 .
# The first image expects a model folder at VQSERVE_MODEL; the second holds one (about 10 minutes of
# quantization on 2 cores at build time).
# Build arguments:
#   PYTHON_IMAGE  base of all stages; pin it by digest in production
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
# The extra `fetch` is what `vqllm quantize smollm2` fetches and converts with.
RUN pip install -c constraints.txt ./proto '.[cpu,fetch]' \
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
    VQSERVE_GRPC_PORT=50052 \
    VQSERVE_HTTP_PORT=8081 \
    VQSERVE_MODEL=/models/smollm2
RUN install --directory --owner=10001 --group=10001 /cache /models
USER 10001:10001
WORKDIR /tmp
EXPOSE 50052 8081
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['VQSERVE_HTTP_PORT'] + '/readyz', timeout=2)"]
ENTRYPOINT ["python", "-m", "vqserve.generation"]

FROM runtime AS model
RUN vqllm quantize smollm2 --output /models/smollm2 --bits 4 --group-size 128

FROM runtime AS with-model
COPY --from=model /models /models
