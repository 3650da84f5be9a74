#!/usr/bin/env bash
# Submit a training run to a running Ray cluster. Edit the three settings, then:
#   launchers/ray_job.sh --seq-len 1048576 --data /shared/tokens
DASHBOARD=${DASHBOARD:-http://127.0.0.1:8265}  # the jobs API; remotely, after ssh -L 8265:127.0.0.1:8265 head
RANKS=${RANKS:-2}                              # processes in the whole cluster; with GPUs, one per GPU
FOLDER=${FOLDER:-/shared/runs/$(date +%Y%m%d-%H%M%S)}  # on storage that every node sees
# The token is read from ~/.ray/auth_token or RAY_AUTH_TOKEN (docs/ray.md), and sent only to a cluster that uses tokens.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
set -euo pipefail
exec ray job submit --address "$DASHBOARD" -- \
    python -m longnet_dist train --launcher ray --ranks "$RANKS" --run-folder "$FOLDER" "$@"
