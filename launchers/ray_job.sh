#!/usr/bin/env bash
# Submit a training to a Ray cluster that runs. Edit the three lines; then: launchers/ray_job.sh --seq-len 1048576 --data /shared/tokens
DASHBOARD=${DASHBOARD:-http://127.0.0.1:8265}      # the cluster's jobs API; from afar, through ssh -L 8265:127.0.0.1:8265 head
RANKS=${RANKS:-2}                                  # processes over the whole cluster: its GPUs
FOLDER=${FOLDER:-/shared/runs/$(date +%Y%m%d-%H%M%S)}  # on storage that all nodes see
# The token comes from ~/.ray/auth_token or RAY_AUTH_TOKEN: see docs/ray.md. It is not sent to a cluster without tokens.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
set -euo pipefail
exec ray job submit --address "$DASHBOARD" -- \
    python -m longnet_dist train --launcher ray --ranks "$RANKS" --run-folder "$FOLDER" "$@"
