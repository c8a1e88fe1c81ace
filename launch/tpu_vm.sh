#!/usr/bin/env bash
# Train on a TPU VM slice with gcloud, on all of its workers; start again after every failure and preemption.
#
#   launch/tpu_vm.sh [--dry-run] TPU ZONE CONFIG WORKDIR [arguments of `spatialvla-jax train`]
#
# The repository lies in ~/spatialvla_jax on every worker, with its environment; WORKDIR is a bucket's URL (gs://…) or on
# a file system that all share. Exit code 2 of a run is bad input, which no restart mends; after SIGTERM it ends with 0,
# too, so that its last step is told by the file that it writes then.
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
