# The major dependencies of finetuning on top of AMD GPUs.
# Built by docker/build-and-push-finetuning-image.sh, or:
#   docker build -f docker/rocm/base.Dockerfile -t rocm-finetuning-base .
#
# ROCm 7.14 and not 10: bitsandbytes 0.50 has no library for ROCm 10, and without one there is no QLoRA.
ARG VENDOR_IMAGE=rocm/pytorch:rocm7.14.1_ubuntu24.04_py3.12_pytorch_release_2.12.0@sha256:cc9b00f90b85c97b015b040fa55c8d1b404b7cacc6ad57d74ee3451c97508da1
ARG MC_IMAGE=quay.io/minio/mc:RELEASE.2025-08-13T08-35-41Z@sha256:a7fe349ef4bd8521fb8497f55c6042871b2ae640607cf99d9bede5e9bdf11727
FROM ${MC_IMAGE} AS mc
FROM ${VENDOR_IMAGE}

LABEL org.opencontainers.image.title="rocm-finetuning-base" \
      org.opencontainers.image.description="Dependencies of the finetuning engine on AMD GPUs" \
      org.opencontainers.image.licenses="Apache-2.0"

USER 0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/finetuning

# The vendor's interpreter may be marked as managed by the distribution: this image is nobody else's.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

COPY docker/keep_vendor_torch.py constraints.txt ./
RUN python3 keep_vendor_torch.py record vendor-torch.json --build hip \
    && python3 keep_vendor_torch.py pin constraints.txt > pins.txt \
    && python3 -m pip install --no-cache-dir --constraint pins.txt \
        accelerate bitsandbytes datasets jinja2 mlflow numpy opentelemetry-sdk peft pillow pydantic pyyaml rich \
        safetensors setuptools simpleeval starlette tokenizers transformers trl uvicorn \
    && python3 keep_vendor_torch.py check vendor-torch.json

# `ps` is what the Silogen engine's chart calls, and so is `mc` below.
RUN apt-get update && apt-get install --yes --no-install-recommends procps && rm -rf /var/lib/apt/lists/*
COPY --from=mc /usr/bin/mc /usr/local/bin/mc

# User 1000, with the groups that own the devices of AMD GPUs, unless the host numbers them otherwise.
RUN { ! getent passwd 1000 || userdel "$(getent passwd 1000 | cut -d: -f1)"; } \
    && for group in video render; do getent group "$group" || groupadd --system "$group"; done \
    && useradd --uid 1000 --gid 0 --groups video,render --home-dir /home/finetuning --no-create-home finetuning

# Group 0 owns what is written, so that any user id can run this image with group 0.
# Nothing outside of /cache, /workspace, /tmp and the folders of the Silogen engine's chart is written: mount those and
# run with --read-only. A mount at /HF_HOME, as the Silogen engine has it, lands in HF_HOME through the link. The chart
# mounts /workdir/checkpoints and shows /workdir/logs, and the engine writes to ./checkpoints and ./logs.
RUN install -d -m 0775 -o 1000 -g 0 /cache /cache/huggingface /workspace /workspace/logs /home/finetuning /local_resources \
    && ln -s /cache/huggingface /HF_HOME && ln -s /workspace /workdir

# USER and LOGNAME: torch's compile cache asks for the user's name, which an arbitrary user id does not have.
# USE_HUB_KERNELS=0 and no package `kernels`: code from the hub is never fetched at import.
ENV HOME=/home/finetuning \
    USER=finetuning \
    LOGNAME=finetuning \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    MPLCONFIGDIR=/cache/matplotlib \
    HF_HUB_DISABLE_TELEMETRY=1 \
    DO_NOT_TRACK=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_ALLOW_FILE_STORE=true \
    MLFLOW_HTTP_REQUEST_TIMEOUT=10 \
    MLFLOW_HTTP_REQUEST_MAX_RETRIES=2 \
    USE_HUB_KERNELS=0

WORKDIR /workspace
# Without a group in this line the user keeps the groups of the password file.
USER 1000
