# An image for GKE, with TPUs or GPUs:
#
#   docker build -t IMAGE .                        # TPU
#   docker build --build-arg ACCELERATOR=cuda -t IMAGE .
FROM python:3.12-slim
ARG ACCELERATOR=tpu
WORKDIR /spatialvla_jax
COPY . .
RUN pip install --no-cache-dir ".[$ACCELERATOR,gcs,s3]"
CMD ["spatialvla-jax", "--help"]
