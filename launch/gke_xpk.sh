#!/usr/bin/env bash
# Train on GKE with xpk, on one or several TPU slices; the cluster restarts it after failures.
#
#   launch/gke_xpk.sh [--dry-run] CLUSTER TPU_TYPE SLICES IMAGE CONFIG WORKDIR [arguments of `spatialvla-jax train`]
#
# IMAGE holds the repository, installed, in its working directory (see Dockerfile); WORKDIR is a bucket's URL (gs://…) or
# on a file system that the cluster mounts in every pod (`xpk storage attach … --auto-mount=true`). The job's name is
# $NAME, or derived from WORKDIR. With COMMAND=sweep in the environment it runs `sweep` instead of `train`.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
if (( $# < 6 )); then sed -n '4s/^# *//p' "$0" >&2; exit 2; fi
cluster=$1 type=$2 slices=$3 image=$4 config=$5 workdir=$6; shift 6

name=${NAME:-$(basename "$workdir" | tr '[:upper:]_.' '[:lower:]--')}
printf -v train '%q ' spatialvla-jax "${COMMAND:-train}" --config "$config" --workdir "$workdir" --coordinator auto "$@"
# A run exits with 0 after SIGTERM too. Only the file `finished` says that its last step is done.
code='import sys; from spatialvla_jax.utils import storage as s; exit(not s.exists(s.to_path(sys.argv[1]) / "finished"))'
printf -v finished '%q ' python -c "$code" "$workdir"
if [[ ${COMMAND:-train} == train ]]; then train="$train && $finished"; fi
command=(xpk workload create --cluster "$cluster" --workload "$name" --tpu-type "$type" --num-slices "$slices"
  --docker-image "$image" --max-restarts 100 --termination-grace-period-seconds 300
  --command "$train")

if [[ $dry_run ]]; then printf '%q ' "${command[@]}"; echo; exit; fi
exec "${command[@]}"
