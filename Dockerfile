# The server. Build: docker build -t turboserve .   (--build-arg BACKEND=cuda12 for NVIDIA)   Run: see docs/deploy.md
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY kernels ./kernels
COPY server ./server
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
# The MLX backend: cpu, cuda12 or cuda13. The CUDA libraries come as Python packages; the host brings the driver.
ARG BACKEND=cpu
# g++ stays: on a CPU, MLX compiles fused element-wise operations at run time.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
RUN wheel="$(ls /wheels/turboserve-*.whl)" && pip install --no-cache-dir "${wheel}[${BACKEND}]" && rm -rf /wheels

RUN useradd --uid 10001 --create-home turboserve && mkdir -p /models /cache && chown turboserve /models /cache
USER turboserve
WORKDIR /home/turboserve
# Inside a container every address is foreign, so the server refuses to start without TURBOSERVE_API_KEY
# (or --allow-anonymous, for a network that is trusted).
ENV TURBOSERVE_HOST=0.0.0.0 \
    TURBOSERVE_PORT=8000 \
    TURBOSERVE_CACHE_DIR=/cache/turboserve \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1
VOLUME ["/models", "/cache"]
EXPOSE 8000
# /health needs no key. The start period covers loading and calibrating a model of a few billion parameters.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['TURBOSERVE_PORT'] + '/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["turboserve"]
CMD ["serve"]
