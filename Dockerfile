# jchameleon's server. On a CPU:
#
#     docker build -t jchameleon .
#     docker run -p 127.0.0.1:50051:50051 -v jchameleon:/var/lib/jchameleon jchameleon
#
# With jax for NVIDIA GPUs (the host needs NVIDIA's container toolkit):
#
#     docker build --build-arg EXTRAS='[cuda12]' -t jchameleon:cuda12 .
#     docker run --gpus all ...
FROM python:3.11-slim

ARG EXTRAS=""

# Nobody in particular; the volume keeps weights and compiled programs between runs.
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin jchameleon \
    && install --directory --owner 10001 --mode 0700 /var/lib/jchameleon

COPY pyproject.toml README.md LICENSE /src/
COPY jchameleon /src/jchameleon
COPY configs /src/configs
RUN pip install --no-cache-dir "/src${EXTRAS}" && rm -r /src

USER 10001
ENV JCHAMELEON_HOME=/var/lib/jchameleon PYTHONUNBUFFERED=1
VOLUME /var/lib/jchameleon
EXPOSE 50051 9464

# Ready, not only live: a model that loads is "starting" for as long as that takes.
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s --retries=3 \
    CMD ["python", "-c", "import grpc; from grpc_health.v1 import health_pb2 as p, health_pb2_grpc as g; c = grpc.insecure_channel('127.0.0.1:50051'); r = g.HealthStub(c).Check(p.HealthCheckRequest(service='jchameleon.v1.InferenceService'), timeout=4); raise SystemExit(r.status != 1)"]

# The container's network is its own; publish the port only where that is wanted, or
# give tls_cert and tls_key in a configuration instead of --allow-insecure.
STOPSIGNAL SIGTERM
ENTRYPOINT ["jchameleon", "serve"]
CMD ["--host", "0.0.0.0", "--allow-insecure"]
