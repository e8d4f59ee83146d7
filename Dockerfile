# An image of `qwen2vl serve` for CPUs; not built where this repository is developed, which has no
# container engine. For an NVIDIA GPU, install torch from its CUDA index instead.
#
#   docker build -t qwen2vl .
#   docker run -p 127.0.0.1:8000:8000 -e QWEN2VL_API_KEY=SECRET qwen2vl
#   docker run -p 127.0.0.1:8000:8000 -e QWEN2VL_API_KEY=SECRET -v models:/models \
#       qwen2vl --model Qwen/Qwen2-VL-2B-Instruct
#
# Clients that name the server otherwise than localhost need --allowed-hosts NAME.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 HF_HOME=/models
WORKDIR /app

# torch first: the layer is kept while the code changes.
COPY constraints.txt .
RUN pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu

COPY pyproject.toml README.md LICENSE NOTICE ./
COPY qwen2vl ./qwen2vl
RUN pip install -c constraints.txt ".[grammar]" \
    && useradd --create-home --uid 1000 qwen2vl \
    && mkdir -p /models && chown qwen2vl /models

USER qwen2vl
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD \
    ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready')"]

# exec form: SIGTERM reaches the server, which drains.
ENTRYPOINT ["qwen2vl", "serve", "--host", "0.0.0.0", "--log-format", "json"]
