#!/usr/bin/env bash
# Train on one or several machines with torchrun, with restarts that work. Edit the four lines, and run it on each machine.
NODES=${NODES:-1}            # machines; of several, all must see the run's folder
RANKS=${RANKS:-2}            # processes on each: its GPUs, or its cores
RENDEZVOUS=${RENDEZVOUS:-localhost:0}  # host:port of one of the machines, open to the others; localhost:0 for one alone
[ "$NODES" = 1 ] || : "${JOB:?give the same JOB on all machines}"
JOB=${JOB:-$(date +%Y%m%d-%H%M%S)}     # its name, of which the run's folder is made; of several machines, the same on all

# Without it most restarts fail: rounds of workers share a store, and find the keys of the last round in it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# After SIGTERM: what the last step and its checkpoint may take, before torchrun kills (30 s otherwise).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --nnodes "$NODES" --nproc-per-node "$RANKS" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$JOB" \
    --max-restarts "${RESTARTS:-3}" -m longnet_dist train "$@"
