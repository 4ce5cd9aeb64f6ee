# The finetuning engine on top of its NVIDIA GPUs base image.
# Built by docker/build-and-push-finetuning-image.sh, or, after the base image:
#   docker build -f docker/cuda/worker.Dockerfile -t cuda-finetuning-worker .
#
# Run:
#   docker run --rm --gpus all --ipc host -v "$PWD":/workspace -v finetuning-cache:/cache \
#     cuda-finetuning-worker sft config.yaml
ARG BASE_IMAGE=cuda-finetuning-base:latest
FROM ${BASE_IMAGE}

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="cuda-finetuning-worker" \
      org.opencontainers.image.description="finetuning: YAML-configured LLM fine-tuning on NVIDIA GPUs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"

USER 0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/finetuning

# Extras in brackets. What they bring is not in the tested set of constraints.txt.
ARG EXTRAS="[deepspeed,tensorboard]"
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN python3 keep_vendor_torch.py pin constraints.txt > pins.txt \
    && python3 -m pip install --no-cache-dir --constraint pins.txt ".${EXTRAS}" \
    && python3 keep_vendor_torch.py check vendor-torch.json \
    && if python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('kernels') is None)"; then \
        echo "the package kernels must not be in this image" >&2; exit 1; fi \
    && finetuning --version

WORKDIR /workspace
USER 1000
ENTRYPOINT ["finetuning"]
CMD ["--help"]
