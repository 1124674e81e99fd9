#!/usr/bin/env bash
# One process of a job, started by srun: tells torch.distributed what Slurm knows, and becomes the command in "$@".
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-}}
PROCESSES=$LOCAL_WORLD_SIZE source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
exec "$@"
