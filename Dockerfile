# The serving image: TorchServe with the YOLOv5 handler behind the front. `make image` builds it. The target `training` is
# the image that trains models (`make image TARGET=training IMAGE=headcount-training`); both have the same layer of torch.
#
#   BASE         image with Python 3.11; the program gives it by digest
#   ACCELERATOR  cpu, or cuda: keeps the libraries that only a GPU needs
#   TORCH        cpu: torch from PyTorch's own CPU index, which makes the image a third of the size
#                index: torch from the package index, with hashes checked; that is the CUDA build
#   REQUIRE      precision that the network has to be compiled for (bfloat16, float32); empty for none
#   WEIGHTS      name of the .pt file in .headcount/weights
#   INDEX        URL of the package index, where it is not pip's own
#   SOURCES      hash of the build context, for the label
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS tools
ENV UV_CACHE_DIR=/cache UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_SYSTEM_CERTS=1
ARG INDEX=
COPY requirements/tools.txt /build/
RUN --mount=type=cache,target=/cache \
    pip install --no-cache-dir --break-system-packages ${INDEX:+--index-url "$INDEX"} --require-hashes -r /build/tools.txt

# The gigabytes, below everything that changes.
FROM tools AS torch
ARG TORCH=index
ARG INDEX=
COPY requirements/torch.txt /build/
RUN --mount=type=cache,target=/cache \
    if [ "$TORCH" = cpu ]; then \
      uv pip install --target /opt/torch --torch-backend cpu "$(grep -o '^torch==[0-9.]*' /build/torch.txt)"; \
    else \
      uv pip install --target /opt/torch ${INDEX:+--default-index "$INDEX"} --require-hashes -r /build/torch.txt; \
    fi

FROM tools AS packages
ARG INDEX=
COPY requirements/serve.txt /build/
RUN --mount=type=cache,target=/cache \
    uv pip install --target /opt/packages ${INDEX:+--default-index "$INDEX"} --require-hashes -r /build/serve.txt \
    && rm -f /opt/packages/.lock # uv's, which anybody could write

# Compiles the network, with the only compiler there is, and makes the model archive.
FROM tools AS model
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev && rm -rf /var/lib/apt/lists/*
ENV PYTHONPATH=/opt/headcount:/opt/packages:/opt/torch
ARG WEIGHTS=yolov5n
ARG REQUIRE=
COPY serving/__init__.py serving/compile.py serving/contract.py serving/detector.py serving/looks.py serving/network.py \
     serving/pictures.py /opt/headcount/serving/
COPY .headcount/weights/${WEIGHTS}.pt /build/
RUN --mount=type=bind,from=torch,source=/opt/torch,target=/opt/torch \
    --mount=type=bind,from=packages,source=/opt/packages,target=/opt/packages \
    python -m serving.compile --checkpoint /build/${WEIGHTS}.pt --out /build/compiled ${REQUIRE:+--require ${REQUIRE}}
COPY serving /opt/headcount/serving
RUN --mount=type=bind,from=torch,source=/opt/torch,target=/opt/torch \
    --mount=type=bind,from=packages,source=/opt/packages,target=/opt/packages \
    python -m serving.archive --checkpoint /build/${WEIGHTS}.pt --compiled /build/compiled --out /opt/headcount/archive \
    && python -m compileall -q /opt/headcount/serving

# What a CPU never runs: headers, tests, the GPU's compiler, and of the CUDA build's libraries all that torch does not
# link but loads when it finds a GPU. That is 1.4 GB.
FROM torch AS slim
ARG ACCELERATOR=cpu
RUN cd /opt/torch && rm -rf torch/include torch/test bin .lock \
    && if [ "$ACCELERATOR" = cpu ]; then \
      rm -rf triton triton-*; \
      if [ -d nvidia ]; then \
        ldd torch/lib/libtorch_python.so | grep -o '/opt/torch/[^ ]*' | xargs readlink -f | sort -u > /build/linked; \
        find nvidia -name '*.so*' -type f | sort | sed 's|^|/opt/torch/|' | comm -13 /build/linked - | xargs rm; \
      fi; \
    fi

FROM tools AS training-packages
ARG TORCH=index
ARG INDEX=
COPY requirements/training.txt /build/
# --no-deps, because the file is complete and torch has a layer of its own.
RUN --mount=type=cache,target=/cache \
    uv pip install --target /opt/training ${INDEX:+--default-index "$INDEX"} --no-deps --require-hashes -r /build/training.txt \
    && if [ "$TORCH" = cpu ]; then \
      rm -r /opt/training/torchvision* \
      && uv pip install --target /opt/training --no-deps --torch-backend cpu "$(grep -o '^torchvision==[0-9.]*' /build/training.txt)"; \
    fi && rm -f /opt/training/.lock

FROM ${BASE} AS training
ARG BASE
ARG ACCELERATOR=cpu
ARG TORCH=index
ARG SOURCES=
LABEL org.opencontainers.image.title="headcount-training" \
      org.opencontainers.image.description="Trains the workloads of Headcount: arguments MODULE OPTIONS, as training.census" \
      org.opencontainers.image.base.name="${BASE}" \
      headcount.torch="${TORCH}" \
      headcount.sources="${SOURCES}"
COPY --from=slim /opt/torch /opt/torch
COPY --from=training-packages /opt/training /opt/training
COPY headcount/data.py /opt/headcount/headcount/
COPY serving/__init__.py serving/contract.py /opt/headcount/serving/
COPY serving/exported/*.py /opt/headcount/serving/exported/
COPY training /opt/headcount/training
ENV PYTHONPATH=/opt/headcount:/opt/training:/opt/torch \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    HEADCOUNT_HOME=/tmp/headcount \
    HEADCOUNT_ACCELERATOR=${ACCELERATOR}
WORKDIR /opt/headcount
ENTRYPOINT ["python", "-m"]

# The serving image is the last stage, hence the default target.
FROM ${BASE}
ARG BASE
ARG ACCELERATOR=cpu
ARG TORCH=index
ARG SOURCES=
LABEL org.opencontainers.image.title="headcount" \
      org.opencontainers.image.description="Counts the people in pictures: TorchServe with YOLOv5" \
      org.opencontainers.image.base.name="${BASE}" \
      headcount.torch="${TORCH}" \
      headcount.sources="${SOURCES}"
COPY --from=slim /opt/torch /opt/torch
COPY --from=packages /opt/packages /opt/packages
COPY --from=model /opt/headcount /opt/headcount
ENV PYTHONPATH=/opt/headcount:/opt/packages:/opt/torch \
    PYTHONDONTWRITEBYTECODE=1 \
    HEADCOUNT_ACCELERATOR=${ACCELERATOR} \
    HEADCOUNT_HOST=0.0.0.0
USER 65532:65532
WORKDIR /opt/headcount
EXPOSE 8080
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "serving.launcher", "--archive", "/opt/headcount/archive"]
