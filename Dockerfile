# hf-locstitch in a container:
#   docker build -t hf-locstitch:cpu .
#   docker build -t hf-locstitch:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --rm -v "$PWD:/work" -v hf-cache:/cache hf-locstitch:cpu merge --base ./base --ft ./a ./b --out merged
# TORCH_INDEX: where torch is from. PyPI's wheels for Linux on x86-64 bring CUDA; the host needs NVIDIA's driver and
# container toolkit (docker run --gpus all).
FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=eval
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/venv
COPY constraints.txt ./
RUN torch="$(grep '^torch==' constraints.txt)" \
    && pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple -c constraints.txt "$torch"
COPY pyproject.toml README.md LICENSE ./
COPY hf_locstitch hf_locstitch
RUN pip install -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"

FROM python:3.12-slim
COPY --from=build /opt/venv /opt/venv
# HF_HOME: models, and compiled loops. The last two: for NVIDIA's container toolkit.
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/cache \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 merger && mkdir /cache /work && chown merger /cache /work
USER 1000
WORKDIR /work
ENTRYPOINT ["hf-locstitch"]
CMD ["--help"]
