#!/usr/bin/env bash
# Train on all workers of a TPU VM slice with gcloud; restart after every failure and preemption.
#
#   launch/tpu_vm.sh [--dry-run] TPU ZONE CONFIG WORKDIR [arguments of `spatialvla-jax train`]
#
# The repository, with its environment, is in ~/spatialvla_jax on every worker. WORKDIR is a bucket's URL (gs://…) or on
# a file system that all share. Exit 2: user error, do not retry. A run exits with 0 after SIGTERM too: only the file
# `finished` says that its last step is done.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
if (( $# < 4 )); then sed -n '4s/^# *//p' "$0" >&2; exit 2; fi
tpu=$1 zone=$2 config=$3 workdir=$4; shift 4

printf -v train '%q ' .venv/bin/spatialvla-jax train --config "$config" --workdir "$workdir" --coordinator auto "$@"
code='import sys; from spatialvla_jax.utils import storage as s; exit(not s.exists(s.to_path(sys.argv[1]) / "finished"))'
printf -v finished '%q ' .venv/bin/python -c "$code" "$workdir"
command=(gcloud compute tpus tpu-vm ssh "$tpu" --zone "$zone" --worker all --command "cd ~/spatialvla_jax && $train && $finished")

if [[ $dry_run ]]; then printf '%q ' "${command[@]}"; echo; exit; fi
until "${command[@]}"; do
  code=$?
  if (( code == 2 )); then exit 2; fi
  echo "the run ended with $code; again in 30 s" >&2
  sleep 30
done
