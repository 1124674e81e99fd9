#!/usr/bin/env bash
# A job on this host alone, by `accelerate launch`.
#
#   [PROCESSES=8] launchers/accelerate.sh train.py +experiment=txt2img_laion name=NAME
#
#   PROCESSES  one for each GPU where it is not set, or one where there is none
#
# Every flag is given, so that nothing is taken from a default_config.yaml of other work.
set -euo pipefail
. "$(dirname "$0")/env.sh"

if ((PROCESSES == 1)); then
    exec python "$@" # for one process `accelerate launch` has no agent: told to stop, it leaves the job behind (1.15)
fi
exec accelerate launch --multi_gpu --num_processes "$PROCESSES" --num_machines 1 --machine_rank 0 --gpu_ids all \
    --main_process_port 0 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process "$OMP_NUM_THREADS" "$@"
