# The CPU image: what CI runs for real, and what smoke experiments need anywhere. `make image-cpu`.
#
#   docker build -f images/cpu.Dockerfile -t baton:cpu .
#
# Dockerfile.cuda without CUDA; the comments are there. The base is one with Python 3.11, for which
# images/torch-cpu.lock has the hash of torch's small build.
ARG BASE_IMAGE=debian:bookworm-slim

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS libraries
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates python3 python3-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --uid 10001 --create-home baton \
    && install -d -m 1777 /runs /cache /home/baton
ENV PATH=/opt/venv/bin:$PATH \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Where the build of torch without CUDA is found; empty if it lies in images/wheels.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY images/torch-cpu.lock /opt/baton/images/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=images/wheels,target=/wheels \
    pip install --no-compile --require-hashes --no-deps --find-links /wheels \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r /opt/baton/images/torch-cpu.lock \
    && { python -m compileall -qq -j 0 /opt/venv || true; }
COPY images/requirements.lock /opt/baton/images/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,source=images/wheels,target=/wheels \
    pip install --no-compile --require-hashes --no-deps --no-build-isolation --use-pep517 --find-links /wheels \
        -r /opt/baton/images/requirements.lock \
    && pip check && { python -m compileall -qq -j 0 /opt/venv || true; }
ENV HOME=/home/baton \
    USER=baton \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    MODELSCOPE_CACHE=/cache/modelscope \
    MPLCONFIGDIR=/cache/matplotlib \
    BATON_DEVICE=cpu \
    BATON_HOME=/opt/baton
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "baton"]
CMD ["--help"]

FROM libraries AS wheel
COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist /src

FROM libraries AS runtime
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps --no-index /dist/*.whl && pip check
COPY jobs /opt/baton/jobs
COPY launch /opt/baton/launch
USER 10001
ARG BASE_IMAGE
ARG VERSION=unknown
ARG COMMIT=unknown
ARG TORCH=unknown
ENV BATON_COMMIT=${COMMIT}
LABEL org.opencontainers.image.title="baton for CPUs" \
      org.opencontainers.image.description="Preemption-safe LLM training jobs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      baton.torch="${TORCH}"
