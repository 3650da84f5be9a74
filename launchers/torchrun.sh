#!/usr/bin/env bash
# Train with torchrun on one or several machines, with restarts. Edit the four settings, and start this on each machine.
NODES=${NODES:-1}            # number of machines; if several, all must see the run's folder
RANKS=${RANKS:-2}            # processes per machine: its number of GPUs, or of cores
RENDEZVOUS=${RENDEZVOUS:-localhost:0}  # host:port of one of them, open to the others; localhost:0 for one machine
[ "$NODES" = 1 ] || : "${JOB:?give the same JOB on all machines}"
JOB=${JOB:-$(date +%Y%m%d-%H%M%S)}     # job name, which also names the run's folder; the same on all machines

# Without this most restarts fail: successive groups of workers share a store, and read the keys of the one before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds after SIGTERM for the last step and its checkpoint, before torchrun kills the workers (30 by default).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# torchrun itself, but for signals. After one, when the workers have written their checkpoint, it would print a traceback
# and exit with 1; and Slurm's notices would end it at once.
TORCHRUN='
import os, signal, sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main
for notice in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(notice, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
try:
    main()
except SignalException:
    sys.exit(0)'
exec python -c "$TORCHRUN" --nnodes "$NODES" --nproc-per-node "$RANKS" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$JOB" -m longnet_dist train "$@"
