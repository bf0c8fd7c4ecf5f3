# CPU by default; for GPUs: docker build --build-arg INDEX=https://download.pytorch.org/whl/cu130 .
FROM python:3.11-slim
ARG INDEX=https://download.pytorch.org/whl/cpu
# --compile needs a C++ compiler, of any version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --index-url "$INDEX" "torch>=2.11,<2.14" \
    && pip install --no-cache-dir . \
    && useradd --create-home trainer
USER trainer
WORKDIR /home/trainer
ENTRYPOINT ["lightning-gpt"]
CMD ["--help"]
